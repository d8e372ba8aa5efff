//! What a node may see of a snapshot, and what `*` means for it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Kind, Subscription};
use crate::resources::{self, Concerns, Snapshot, Table};

/// One type of a snapshot, as one node may see it.
pub(super) struct View<'a> {
    pub(super) snapshot: &'a Arc<Snapshot>,
    pub(super) node: &'a str,
    pub(super) kind: Kind,
    /// For what follows them: the Services this stream has been sent.
    pub(super) services: BTreeSet<Arc<str>>,
}

impl View<'_> {
    fn table(&self, snapshot: &Snapshot) -> Arc<Table> {
        match self.kind {
            Kind::MeshConfig => snapshot.mesh.clone(),
            Kind::NodePod => snapshot
                .node_pods
                .get(self.node)
                .cloned()
                .unwrap_or_default(),
            Kind::Workload => snapshot.workloads.clone(),
            Kind::Service => snapshot.services.clone(),
            Kind::EndpointSlice => snapshot.slices.clone(),
            Kind::Route => snapshot.routes.clone(),
            Kind::BackendTrafficPolicy => snapshot.backend_traffic_policies.clone(),
            Kind::TrafficPolicy => snapshot.traffic_policies.clone(),
        }
    }

    /// Whether `old` holds the same for this node. May say no where it does.
    pub(super) fn same_as(&self, old: &Snapshot) -> bool {
        let services_same = || {
            Arc::ptr_eq(&old.services, &self.snapshot.services)
                && Arc::ptr_eq(&old.namespaces_of_node, &self.snapshot.namespaces_of_node)
                && Arc::ptr_eq(&old.concerns, &self.snapshot.concerns)
        };
        let table = self.table(old);
        let same_table = Arc::ptr_eq(&table, &self.table(self.snapshot));
        match self.kind {
            Kind::MeshConfig | Kind::Workload => same_table,
            Kind::NodePod => {
                same_table || (table.is_empty() && self.table(self.snapshot).is_empty())
            }
            Kind::Service => services_same(),
            // Which Services were sent can change by a subscription too.
            kind if kind.follows_services(self.snapshot) => false,
            Kind::EndpointSlice => false,
            Kind::Route | Kind::BackendTrafficPolicy | Kind::TrafficPolicy => {
                same_table && old.services_complete
            }
        }
    }

    /// The resource a subscribed name means.
    pub(super) fn resolve(&self, name: &str) -> Option<Arc<str>> {
        if self.kind == Kind::Service
            && let Some(address) = name.strip_prefix("address/")
        {
            let address: IpAddr = address.parse().ok()?;
            return self
                .snapshot
                .service_by_address
                .get(&address.to_canonical())
                .cloned();
        }
        let table = self.table(self.snapshot);
        table.get_key_value(name).map(|(name, _)| name.clone())
    }

    /// Everything the client should hold.
    pub(super) fn wanted(
        &self,
        subscription: &Subscription,
    ) -> BTreeMap<Arc<str>, Arc<resources::Resource>> {
        let table = self.table(self.snapshot);
        let mut wanted = BTreeMap::new();
        if subscription.wildcard {
            let all = table.iter().filter(|(name, _)| self.in_wildcard(name));
            wanted.extend(all.map(|(n, r)| (n.clone(), r.clone())));
        }
        for name in subscription.names.iter().filter_map(|n| self.resolve(n)) {
            if let Some(resource) = table.get(&name) {
                wanted.insert(name, resource.clone());
            }
        }
        if self.kind == Kind::Service && subscription.wildcard && !self.snapshot.services_complete {
            let backends = &self.snapshot.concerns.backends;
            let needed: Vec<_> = wanted
                .keys()
                .filter_map(|service| backends.get(service))
                .flatten()
                .filter_map(|backend| Some((backend.clone(), table.get(backend)?.clone())))
                .collect();
            wanted.extend(needed);
        }
        wanted
    }

    /// Whether `*` means the resource.
    fn in_wildcard(&self, name: &Arc<str>) -> bool {
        match self.kind {
            Kind::MeshConfig | Kind::NodePod | Kind::Workload => true,
            Kind::Service => {
                self.snapshot.services_complete
                    || name
                        .split_once('/')
                        .is_some_and(|(namespace, _)| self.is_on_node(namespace))
            }
            Kind::Route | Kind::BackendTrafficPolicy | Kind::TrafficPolicy => {
                self.snapshot.services_complete || self.concerns_node(name)
            }
            Kind::EndpointSlice => {
                let service = self.snapshot.service_of_slice.get(name);
                service.is_some_and(|s| self.services.contains(s))
            }
        }
    }

    /// Whether a namespace has a pod on the node.
    fn is_on_node(&self, namespace: &str) -> bool {
        let node = self.snapshot.namespaces_of_node.get(self.node);
        node.is_some_and(|namespaces| namespaces.contains(namespace))
    }

    /// Whether a route or policy belongs to a namespace with a pod on the node, or to a Service that the
    /// stream was sent.
    fn concerns_node(&self, name: &str) -> bool {
        let Concerns {
            routes,
            backend_traffic_policies,
            traffic_policies,
            backends: _,
        } = &*self.snapshot.concerns;
        let (services, namespaced) = match self.kind {
            Kind::Route => (routes.get(name), name.split_once('/').map(|(_, rest)| rest)),
            Kind::BackendTrafficPolicy => (backend_traffic_policies.get(name), Some(name)),
            _ => (traffic_policies.get(name), Some(name)),
        };
        let namespace = namespaced.and_then(|n| n.split_once('/'));
        namespace.is_some_and(|(namespace, _)| self.is_on_node(namespace))
            || services.is_some_and(|all| all.iter().any(|s| self.services.contains(s)))
    }
}
