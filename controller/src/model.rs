//! The mesh as the users' objects describe it: immutable, built by pure functions.
//!
//! Invariants: a pod is in the model when the mesh may have to do with it: bound to a node, not on the host's
//! network, not of `warren-system`, not finished. Whether it opted in is a field, since agents must know
//! of the others too. What a node has reported about a pod is not here but in [`crate::enrolment`].

mod annotations;
mod pod;
mod policies;
mod routes;
mod service;
mod status;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use mesh_api::names::{MESH_LABEL, MODE_LABEL};
use mesh_api::proto::mesh::{
    BackendTrafficPolicy, EndpointSlice, Mode, Route, Service, TrafficPolicy,
};

pub use annotations::{Exclusions, FieldMistake, mesh_label, mode_label, tunnel_annotation};
pub use pod::{Pod, ProbeMistake, probe_mistakes};
pub use status::{Condition, ObjectStatus, ParentStatus, Warning};

use crate::providers::{NamespacedName, Objects};

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
    /// Zones by node name; only of nodes that have one.
    pub zones: BTreeMap<String, String>,
    /// By `namespace/name`.
    pub services: BTreeMap<String, Service>,
    /// By `namespace/slice`; only those of a Service.
    pub slices: BTreeMap<String, EndpointSlice>,
    /// By `kind/namespace/name`; only what is in force.
    pub routes: BTreeMap<String, Route>,
    /// By `namespace/name`; only what is in force.
    pub backend_traffic_policies: BTreeMap<String, BackendTrafficPolicy>,
    /// By `namespace/name`; only what is in force.
    pub traffic_policies: BTreeMap<String, TrafficPolicy>,
    /// What is to be said of routes and policies, in force or not.
    pub statuses: Vec<ObjectStatus>,
    /// What in the objects could not be used, for the log.
    pub warnings: Vec<Warning>,
}

/// Builds the model.
pub fn build(objects: &Objects, settings: &Settings) -> Model {
    let mut model = without_routes(objects, settings, None);
    judge_routes(objects, &mut model);
    model
}

/// Builds the model that follows `old`, which was built from `old_objects`. What was made of a pod is taken over
/// if its manifest is the same one. What was made of routes and policies is if nothing that it depends on
/// changed: to judge them costs the compilation of their expressions, and endpoints change far more often.
pub fn rebuild(
    objects: &Objects,
    settings: &Settings,
    (old_objects, old): (&Objects, &Model),
) -> Model {
    let mut model = without_routes(objects, settings, Some((old_objects, old)));
    let same = objects.services == old_objects.services
        && objects.http_routes == old_objects.http_routes
        && objects.grpc_routes == old_objects.grpc_routes
        && objects.tls_routes == old_objects.tls_routes
        && objects.tcp_routes == old_objects.tcp_routes
        && objects.backend_traffic_policies == old_objects.backend_traffic_policies
        && objects.traffic_policies == old_objects.traffic_policies;
    if same {
        model.routes = old.routes.clone();
        model.backend_traffic_policies = old.backend_traffic_policies.clone();
        model.traffic_policies = old.traffic_policies.clone();
        model.statuses = old.statuses.clone();
    } else {
        judge_routes(objects, &mut model);
    }
    model
}

fn judge_routes(objects: &Objects, model: &mut Model) {
    let routes = routes::build(objects);
    let policies = policies::build(objects);
    model.routes = routes.routes;
    model.backend_traffic_policies = policies.backend;
    model.traffic_policies = policies.traffic;
    model.statuses = [routes.statuses, policies.statuses].concat();
}

fn without_routes(
    objects: &Objects,
    settings: &Settings,
    old: Option<(&Objects, &Model)>,
) -> Model {
    let mut warnings = Vec::new();
    // Where there was something to warn of, it is said again.
    let old = old.filter(|(old, model)| {
        old.namespaces == objects.namespaces
            && model.settings == *settings
            && model.warnings.iter().all(|w| w.object.kind != "Namespace")
    });
    let warned: HashSet<(&str, &str)> = old
        .iter()
        .flat_map(|(_, model)| &model.warnings)
        .map(|w| (w.object.namespace.as_str(), w.object.name.as_str()))
        .collect();
    let known = |name: &NamespacedName, manifest: &Arc<k8s::Pod>| {
        let (objects, model) = old?;
        let same = Arc::ptr_eq(objects.pods.get(name)?, manifest);
        let usable = same && !warned.contains(&(name.0.as_str(), name.1.as_str()));
        let uid = manifest.metadata.uid.as_deref().filter(|_| usable)?;
        model.pods.get(uid).cloned()
    };
    let nodes = objects
        .nodes
        .iter()
        .map(|(name, node)| (name.clone(), service::node_addresses(node, &mut warnings)))
        .collect();
    let pods = objects
        .pods
        .iter()
        .filter_map(|(name, manifest)| {
            if let Some(pod) = known(name, manifest) {
                return Some(pod);
            }
            let defaults = namespace_defaults(objects, &name.0, settings, &mut warnings);
            pod::build(manifest, defaults, settings, &mut warnings).map(Arc::new)
        })
        .map(|pod| (pod.uid.clone(), pod))
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
    let zones = objects.nodes.iter().filter_map(|(name, node)| {
        let zone = node.metadata.labels.as_ref()?.get(ZONE_LABEL)?;
        Some((name.clone(), zone.clone()))
    });
    Model {
        settings: settings.clone(),
        pods,
        nodes,
        zones: zones.collect(),
        services,
        slices,
        routes: BTreeMap::new(),
        backend_traffic_policies: BTreeMap::new(),
        traffic_policies: BTreeMap::new(),
        statuses: Vec::new(),
        warnings,
    }
}

/// Label of a node that says which zone it is in.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What a namespace says for its pods.
#[derive(Clone, Copy, Debug)]
struct NamespaceDefaults {
    /// The whole mesh is switched off, by Warren's own namespace: no pod's own label counts.
    off: bool,
    opted_in: bool,
    mode: Mode,
}

fn namespace_defaults(
    objects: &Objects,
    name: &str,
    settings: &Settings,
    warnings: &mut Vec<Warning>,
) -> NamespaceDefaults {
    let labels = objects
        .namespaces
        .get(name)
        .and_then(|n| n.metadata.labels.as_ref());
    let label = |key: &str| labels.and_then(|l| l.get(key)).map(String::as_str);
    let mut warn = |mistake: FieldMistake| {
        let warning = Warning::new("Namespace", "", name, mistake.to_string());
        // Every pod asks.
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    };
    let off = objects.mesh_is_off();
    let opted_in = label(MESH_LABEL).map_or(Ok(false), mesh_label);
    let mode = label(MODE_LABEL).map_or(Ok(settings.mode), mode_label);
    NamespaceDefaults {
        off,
        opted_in: !off && opted_in.map_err(&mut warn).unwrap_or(false),
        // In doubt, refuse: a namespace that asks for a mode which does not exist is strict.
        mode: mode.map_err(warn).unwrap_or(Mode::Strict),
    }
}

#[cfg(test)]
mod tests;
