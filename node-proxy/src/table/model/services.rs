//! Services joined to their EndpointSlices.

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_api::client::delta::Update;

use super::{Applied, Held, Model};
use crate::balance::{EndpointSet, EndpointSpec};
use crate::table::decode::{self, Slice};
use crate::table::{Service, ServicePort, View};

impl Model {
    pub(super) fn apply_services(
        &mut self,
        view: &View,
        updates: &[Update],
        removed: &[String],
        applied: &mut Applied,
    ) {
        for update in updates {
            match decode::service(&update.name, &update.value, &mut self.interner) {
                Ok(spec) => self.put_service(view, update, spec),
                Err(reason) => applied.reject(&update.name, reason, false),
            }
        }
        for name in removed {
            if let Some(old) = self.services.remove(name.as_str()) {
                withdraw(view, &old.value, None);
            }
            self.refresh_target(name, Some(true));
        }
    }

    fn put_service(&mut self, view: &View, update: &Update, spec: decode::ServiceSpec) {
        let old = self
            .services
            .get(update.name.as_str())
            .map(|h| Arc::clone(&h.value));
        let known = |port: u16| {
            let mut before = old.iter().flat_map(|s| &s.ports);
            before.find(|p| p.port == port)
        };
        let service = (Arc::clone(&spec.namespace), Arc::clone(&spec.name));
        let label: Arc<str> = format!("{}.{}", spec.name, spec.namespace).into();
        let ports = spec
            .ports
            .into_iter()
            .map(|p| {
                let known = known(p.port);
                let endpoints = known.map_or_else(
                    || Arc::new(EndpointSet::new()),
                    |p| Arc::clone(&p.endpoints),
                );
                let http = known.map_or_else(Arc::default, |p| Arc::clone(&p.http));
                let state = known.map_or_else(Arc::default, |p| Arc::clone(&p.state));
                // The same objects for as long as the port is declared: meters are found by them.
                let (label, backend, reference) = match known {
                    Some(p) => (
                        Arc::clone(&p.label),
                        Arc::clone(&p.backend),
                        Arc::clone(&p.reference),
                    ),
                    None => (
                        Arc::clone(&label),
                        format!("{label}:{}", p.port).into(),
                        format!("{}/{}:{}", spec.namespace, spec.name, p.port).into(),
                    ),
                };
                Arc::new(ServicePort {
                    service: service.clone(),
                    port: p.port,
                    name: p.name,
                    node_port: p.node_port,
                    app_protocol: p.app_protocol,
                    internal_traffic_local: spec.internal_traffic_local,
                    traffic_distribution: spec.traffic_distribution,
                    endpoints,
                    http,
                    state,
                    label,
                    backend,
                    reference,
                })
            })
            .collect();
        let service = Arc::new(Service {
            namespace: spec.namespace,
            name: spec.name,
            addresses: spec.addresses,
            ports,
        });
        // Its endpoints and rules are in place before anyone can find it.
        self.set_endpoints(view, &update.name, &service);
        for port in &service.ports {
            // Routes and policies are attached by a port's number and name.
            if known(port.port).is_none_or(|before| before.name != port.name) {
                self.rules.build(&update.name, port);
            }
        }
        publish(view, &service);
        if let Some(old) = &old {
            withdraw(view, old, Some(&service));
        }
        let held = Held {
            version: update.version.as_str().into(),
            value: service,
        };
        self.services.insert(update.name.as_str().into(), held);
        self.refresh_target(&update.name, Some(false));
    }

    pub(super) fn apply_slices(
        &mut self,
        view: &View,
        updates: &[Update],
        removed: &[String],
        applied: &mut Applied,
    ) {
        let mut touched = BTreeSet::new();
        for update in updates {
            match decode::slice(&update.name, &update.value, &mut self.interner) {
                Ok(slice) => {
                    touched.extend(self.remove_slice(&update.name));
                    let name: Arc<str> = update.name.as_str().into();
                    let of = self
                        .slices_of
                        .entry(Arc::clone(&slice.service))
                        .or_default();
                    of.insert(Arc::clone(&name));
                    touched.insert(Arc::clone(&slice.service));
                    self.slices
                        .insert(name, (update.version.as_str().into(), slice));
                }
                Err(reason) => applied.reject(&update.name, reason, false),
            }
        }
        for name in removed {
            touched.extend(self.remove_slice(name));
        }
        for service in touched {
            if let Some(held) = self.services.get(&service) {
                self.set_endpoints(view, &service, &held.value);
            }
        }
    }

    /// Returns the Service the slice belonged to.
    fn remove_slice(&mut self, name: &str) -> Option<Arc<str>> {
        let (_, slice) = self.slices.remove(name)?;
        if let Some(of) = self.slices_of.get_mut(&slice.service) {
            of.remove(name);
            if of.is_empty() {
                self.slices_of.remove(&slice.service);
            }
        }
        Some(slice.service)
    }

    fn set_endpoints(&self, view: &View, name: &str, service: &Service) {
        let slices: Vec<&Slice> = self
            .slices_of
            .get(name)
            .into_iter()
            .flatten()
            .filter_map(|slice| self.slices.get(slice).map(|(_, slice)| slice))
            .collect();
        for port in &service.ports {
            let mut specs = Vec::new();
            for slice in &slices {
                let Some((_, target)) = slice.ports.iter().find(|(name, _)| *name == port.name)
                else {
                    continue;
                };
                specs.extend(slice.endpoints.iter().map(|e| EndpointSpec {
                    address: SocketAddr::new(e.address, *target),
                    ready: e.ready,
                    serving: e.serving,
                    terminating: e.terminating,
                    node: Arc::clone(&e.node),
                    zone: Arc::clone(&e.zone),
                    for_zones: e.for_zones.clone(),
                    for_nodes: e.for_nodes.clone(),
                }));
            }
            // An endpoint that is moving between slices may be in both: the ready one counts.
            specs.sort_by_key(|spec| !spec.ready);
            list(view, port, &specs);
            port.endpoints.set(specs);
        }
    }
}

/// Lists the port under its endpoints on this node. They are few, so all that are listed are looked through.
fn list(view: &View, port: &Arc<ServicePort>, specs: &[EndpointSpec]) {
    let here: HashSet<SocketAddr> = specs
        .iter()
        .filter(|spec| spec.node.is_empty() || spec.node == view.node)
        .map(|spec| spec.address)
        .collect();
    for endpoint in &here {
        let mut ports = view.service_ports.entry(*endpoint).or_default();
        ports.retain(|other| other.reference != port.reference);
        ports.push(Arc::clone(port));
    }
    unlist(view, port, |endpoint| here.contains(endpoint));
}

fn unlist(view: &View, port: &ServicePort, keep: impl Fn(&SocketAddr) -> bool) {
    view.service_ports.retain(|endpoint, ports| {
        if !keep(endpoint) {
            ports.retain(|other| other.reference != port.reference);
        }
        !ports.is_empty()
    });
}

fn is_same(a: &Service, b: &Service) -> bool {
    a.namespace == b.namespace && a.name == b.name
}

fn publish(view: &View, service: &Arc<Service>) {
    for address in &service.addresses {
        let mut here = view.services.entry(*address).or_default();
        here.retain(|other| !is_same(other, service));
        here.push(Arc::clone(service));
        here.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    }
    for port in &service.ports {
        if let Some(node_port) = port.node_port {
            view.node_ports.insert(node_port, Arc::clone(port));
        }
    }
}

/// Takes away what `old` had and `new` has not.
fn withdraw(view: &View, old: &Service, new: Option<&Service>) {
    for address in &old.addresses {
        if new.is_some_and(|new| new.addresses.contains(address)) {
            continue;
        }
        view.services.remove_if_mut(address, |_, here| {
            here.retain(|other| !is_same(other, old));
            here.is_empty()
        });
    }
    let kept = |node_port: u16| {
        new.is_some_and(|new| new.ports.iter().any(|p| p.node_port == Some(node_port)))
    };
    for port in &old.ports {
        if !new.is_some_and(|new| new.ports.iter().any(|p| p.port == port.port)) {
            unlist(view, port, |_| false);
        }
        if let Some(node_port) = port.node_port.filter(|n| !kept(*n)) {
            view.node_ports
                .remove_if(&node_port, |_, held| held.service == port.service);
        }
    }
}
