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
    /// For what follows them: the subscription to Services.
    pub(super) services: Option<&'a Subscription>,
}

/// What a subscription was last compared with.
#[derive(Debug)]
pub(super) struct Compared {
    pub(super) snapshot: Arc<Snapshot>,
    /// [`Subscription::changed_names`] of the Services.
    services: u64,
}

impl View<'_> {
    /// The same of another snapshot.
    pub(super) fn of<'b>(&'b self, snapshot: &'b Arc<Snapshot>) -> View<'b> {
        View {
            snapshot,
            node: self.node,
            kind: self.kind,
            services: self.services,
        }
    }

    pub(super) fn compared(&self) -> Compared {
        Compared {
            snapshot: self.snapshot.clone(),
            services: self.services.map_or(0, |s| s.changed_names),
        }
    }

    /// This type's resources.
    pub(super) fn now(&self) -> Arc<Table> {
        self.table(self.snapshot)
    }

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
    pub(super) fn same_as(&self, old: &Compared) -> bool {
        let Compared {
            snapshot: old,
            services,
        } = old;
        let same_table = Arc::ptr_eq(&self.table(old), &self.now());
        let same_scope = || {
            Arc::ptr_eq(&old.namespaces_of_node, &self.snapshot.namespaces_of_node)
                && Arc::ptr_eq(&old.concerns, &self.snapshot.concerns)
                && old.services_complete == self.snapshot.services_complete
        };
        let same_services = || self.services.is_none_or(|s| s.changed_names == *services);
        match self.kind {
            Kind::MeshConfig | Kind::Workload => same_table,
            Kind::NodePod => same_table || (self.table(old).is_empty() && self.now().is_empty()),
            Kind::Service => same_table && same_scope(),
            Kind::EndpointSlice => same_table && same_services(),
            Kind::Route | Kind::BackendTrafficPolicy | Kind::TrafficPolicy => {
                same_table && same_scope() && same_services()
            }
        }
    }

    /// The names that may be others than they were in `old`, if the rest is known to be the same.
    pub(super) fn changed_since(&self, old: &Compared) -> Option<BTreeSet<Arc<str>>> {
        let changes = match self.kind {
            Kind::Workload => &self.snapshot.workload_changes,
            Kind::EndpointSlice => {
                let services = self.services.map_or(0, |s| s.changed_names);
                if services != old.services {
                    return None;
                }
                &self.snapshot.slice_changes
            }
            _ => return None,
        };
        Some(changes.since(old.snapshot.seq)?.cloned().collect())
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
    pub(super) fn in_wildcard(&self, name: &Arc<str>) -> bool {
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
                service.is_some_and(|s| self.was_sent(s))
            }
        }
    }

    /// Whether this stream was sent a Service.
    fn was_sent(&self, service: &str) -> bool {
        self.services
            .is_some_and(|s| s.sent.version(service).is_some())
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
            || services.is_some_and(|all| all.iter().any(|s| self.was_sent(s)))
    }
}
