//! The mesh as the users' objects describe it: immutable, built by pure functions.
//!
//! Invariants: a pod is in the model when the mesh may have to do with it: bound to a node, not on the host's
//! network, not of `warren-system`, not finished. Whether it opted in is a field, since agents must know
//! of the others too. What a node has reported about a pod is not here but in [`crate::enrolment`].

mod annotations;
mod pod;
mod service;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::names::{MESH_LABEL, MODE_LABEL};
use mesh_api::proto::mesh::{EndpointSlice, Mode, Service};

pub use annotations::{Exclusions, FieldMistake, mesh_label, mode_label, tunnel_annotation};
pub use pod::{Pod, ProbeMistake, probe_mistakes};

use crate::providers::Objects;

/// What is set for the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The trust domain of all identities.
    pub trust_domain: String,
    /// The mode where a namespace sets none.
    pub mode: Mode,
}

/// The mesh at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// What is set for the whole mesh.
    pub settings: Settings,
    /// By UID.
    pub pods: BTreeMap<Arc<str>, Arc<Pod>>,
    /// InternalIPs by node name.
    pub nodes: BTreeMap<String, Vec<IpAddr>>,
    /// By `namespace/name`.
    pub services: BTreeMap<String, Service>,
    /// By `namespace/slice`; only those of a Service.
    pub slices: BTreeMap<String, EndpointSlice>,
    /// What in the objects could not be used, for the log.
    pub warnings: Vec<String>,
}

/// Builds the model.
pub fn build(objects: &Objects, settings: &Settings) -> Model {
    let mut warnings = Vec::new();
    let nodes = objects
        .nodes
        .iter()
        .map(|(name, node)| (name.clone(), service::node_addresses(node, &mut warnings)))
        .collect();
    let pods = objects
        .pods
        .values()
        .filter_map(|manifest| {
            let namespace = manifest.metadata.namespace.as_deref().unwrap_or_default();
            let defaults = namespace_defaults(objects, namespace, settings, &mut warnings);
            pod::build(manifest, defaults, settings, &mut warnings)
        })
        .map(|pod| (pod.uid.clone(), Arc::new(pod)))
        .collect();
    let services = objects
        .services
        .values()
        .filter_map(|s| service::service(s, &mut warnings))
        .map(|s| (format!("{}/{}", s.namespace, s.name), s))
        .collect();
    let slices = objects
        .slices
        .values()
        .filter_map(|s| service::slice(s, &mut warnings))
        .map(|s| (format!("{}/{}", s.namespace, s.name), s))
        .collect();
    Model {
        settings: settings.clone(),
        pods,
        nodes,
        services,
        slices,
        warnings,
    }
}

/// What a namespace says for its pods.
#[derive(Clone, Copy, Debug)]
struct NamespaceDefaults {
    opted_in: bool,
    mode: Mode,
}

fn namespace_defaults(
    objects: &Objects,
    name: &str,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> NamespaceDefaults {
    let labels = objects
        .namespaces
        .get(name)
        .and_then(|n| n.metadata.labels.as_ref());
    let label = |key: &str| labels.and_then(|l| l.get(key)).map(String::as_str);
    let mut warn = |mistake: FieldMistake| warnings.push(format!("Namespace {name}: {mistake}"));
    let opted_in = label(MESH_LABEL).map_or(Ok(false), mesh_label);
    let mode = label(MODE_LABEL).map_or(Ok(settings.mode), mode_label);
    NamespaceDefaults {
        opted_in: opted_in.map_err(&mut warn).unwrap_or(false),
        // In doubt, refuse: a namespace that asks for a mode which does not exist is strict.
        mode: mode.map_err(warn).unwrap_or(Mode::Strict),
    }
}

#[cfg(test)]
mod tests;
