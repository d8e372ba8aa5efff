//! Who must know of which route or policy, for meshes with more Services than every node is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_api::proto::mesh::PolicyTargetKind;

use crate::model::Model;

/// A resource concerns the nodes that hold one of its Services, and those with a pod of its own namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Concerns {
    /// Services (`namespace/name`) of each route, by `kind/namespace/name`.
    pub routes: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Services of each XBackendTrafficPolicy, by `namespace/name`.
    pub backend_traffic_policies: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Services of each TrafficPolicy, those of the routes it is for included.
    pub traffic_policies: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// The Services that routes of a Service send requests to: who holds it needs them.
    pub backends: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
}

impl Concerns {
    pub(super) fn new(model: &Model) -> Self {
        let mut concerns = Self::default();
        for (name, route) in &model.routes {
            let parents = route.parents.iter();
            let parents: BTreeSet<Arc<str>> =
                parents.map(|p| service(&p.namespace, &p.service)).collect();
            let mirrors = route.rules.iter().flat_map(|r| &r.filters);
            let of_backends = route.rules.iter().flat_map(|r| &r.backends);
            let mirrors = mirrors.chain(of_backends.clone().flat_map(|b| &b.filters));
            let mirrors = mirrors.filter_map(|f| match f.filter.as_ref()? {
                mesh_api::proto::mesh::route_filter::Filter::RequestMirror(m) => m.backend.as_ref(),
                _ => None,
            });
            let backends: BTreeSet<Arc<str>> = of_backends
                .chain(mirrors)
                .map(|b| service(&b.namespace, &b.service))
                .collect();
            for parent in &parents {
                let of_parent = concerns.backends.entry(parent.clone()).or_default();
                of_parent.extend(backends.iter().cloned());
            }
            concerns.routes.insert(name.as_str().into(), parents);
        }
        for (name, policy) in &model.backend_traffic_policies {
            let services = policy.services.iter();
            let services = services.map(|s| service(&policy.namespace, s)).collect();
            concerns
                .backend_traffic_policies
                .insert(name.as_str().into(), services);
        }
        for (name, policy) in &model.traffic_policies {
            let mut services = BTreeSet::new();
            for target in &policy.targets {
                let kind = match target.kind() {
                    PolicyTargetKind::Service | PolicyTargetKind::Unspecified => {
                        services.insert(service(&policy.namespace, &target.name));
                        continue;
                    }
                    PolicyTargetKind::HttpRoute => "httproute",
                    PolicyTargetKind::GrpcRoute => "grpcroute",
                };
                let route = format!("{kind}/{}/{}", policy.namespace, target.name);
                let parents = concerns.routes.get(route.as_str());
                services.extend(parents.into_iter().flatten().cloned());
            }
            concerns
                .traffic_policies
                .insert(name.as_str().into(), services);
        }
        concerns
    }
}

fn service(namespace: &str, name: &str) -> Arc<str> {
    format!("{namespace}/{name}").into()
}
