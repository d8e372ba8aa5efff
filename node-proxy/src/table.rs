//! What this node knows of the mesh: all meshed pods, the Services, and the mesh-wide settings.
//!
//! Readers (the data path, any thread) look addresses up in concurrent maps and never wait for a
//! writer longer than one shard's insertion. The writer (discovery, one task) keeps the rest of the
//! bookkeeping in [`model`]. Resources that are not valid are refused one by one; what was known
//! before stays.
//!
//! Invariants:
//! - an address that is in no [`Workload`] is outside the mesh, but only once [`Table::loaded`] is true;
//! - a Service port keeps its [`EndpointSet`], and with it the load of its endpoints, for as long as
//!   the Service declares it;
//! - IPv4-mapped IPv6 addresses are looked up, and stored, as IPv4.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use ipnet::IpNet;
use mesh_api::client::delta::{Subscriptions, Update};
use mesh_api::identity::Identity;
use mesh_api::proto::mesh::{EnrolmentState, TunnelKind};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;

use crate::balance::EndpointSet;
use crate::http::policy::State;
use crate::http::route::{Backend, PortRules};
use crate::maps::SharedMap;

mod decode;
mod demand;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod log;
mod model;
mod target;

use demand::Demand;
use model::Model;
pub use model::{Applied, Kind};
pub use target::{Target, TargetState};

/// One meshed pod, of any node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// The pod's UID.
    pub uid: Arc<str>,
    /// What it proves to its peers.
    pub identity: Identity,
    /// The pod's name.
    pub name: Arc<str>,
    /// What owns the pod, else its name: the `workload` label of metrics.
    pub owner: Arc<str>,
    /// All of its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its node's name.
    pub node: Arc<str>,
    /// Where its node's tunnel listener is, one per family.
    pub node_addresses: Vec<IpAddr>,
    /// How far into the mesh, or out of it, it is.
    pub state: EnrolmentState,
    /// How it is reached.
    pub tunnel: TunnelKind,
    /// Ports where callers send plaintext.
    pub exclude_inbound_ports: Vec<u16>,
    /// Destination ports to which it sends plaintext.
    pub exclude_outbound_ports: Vec<u16>,
    /// Destinations to which it sends plaintext.
    pub exclude_outbound_cidrs: Vec<IpNet>,
}

/// A Service. A headless one has no addresses.
#[derive(Debug)]
pub struct Service {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Cluster IPs, external IPs, load-balancer addresses.
    pub addresses: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<Arc<ServicePort>>,
}

/// A port of a Service.
#[derive(Debug)]
pub struct ServicePort {
    /// Namespace and name of the Service.
    pub service: (Arc<str>, Arc<str>),
    /// The declared port.
    pub port: u16,
    /// Its name, empty for an unnamed one.
    pub name: Arc<str>,
    /// The port on every node's address, if any.
    pub node_port: Option<u16>,
    /// What it speaks; empty: unset.
    pub app_protocol: Arc<str>,
    /// Only endpoints of the caller's node are used (`internalTrafficPolicy: Local`).
    pub internal_traffic_local: bool,
    /// Which endpoints are preferred.
    pub traffic_distribution: TrafficDistribution,
    /// Who answers.
    pub endpoints: Arc<EndpointSet>,
    /// Routes and policies.
    pub http: Arc<ArcSwap<PortRules>>,
    /// What is counted for it: retry budget, requests in flight.
    pub state: Arc<State>,
    /// `name.namespace`, as metrics and the access log say it.
    pub label: Arc<str>,
    /// `name.namespace:port`, as metrics say it of a route's backend.
    pub backend: Arc<str>,
    /// `namespace/name:port`, as requests on a tunnel say it.
    pub reference: Arc<str>,
}

/// A Service's `trafficDistribution` (KEP-4444, KEP-3015).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TrafficDistribution {
    /// No preference.
    #[default]
    Any,
    /// Endpoints of the caller's zone.
    PreferSameZone,
    /// Endpoints of the caller's node, then of its zone.
    PreferSameNode,
}

/// What is known of an address and port as a Service.
#[derive(Debug, Clone)]
pub enum ServiceLookup {
    /// A declared port.
    Port(Arc<ServicePort>),
    /// The address is this Service's, which does not declare the port.
    NoSuchPort(Arc<Service>),
    /// No Service has this address.
    NotAService,
    /// Not every Service is held and this address has not been asked for yet.
    Unknown,
}

/// Mesh-wide settings. All empty until a table is loaded.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mesh {
    /// Trust domain of every identity.
    pub trust_domain: String,
    /// Roots that are trusted now, DER.
    pub trust_bundle: Vec<Vec<u8>>,
    /// All Services are held: an address in none of them is not a Service.
    pub services_complete: bool,
    /// InternalIPs of all nodes.
    pub node_addresses: HashSet<IpAddr>,
}

/// The table. Shared by every thread.
pub struct Table {
    view: View,
    model: Mutex<Model>,
    demand: Demand,
    online: AtomicBool,
    loaded: watch::Sender<bool>,
    /// Loaded but for types that not every controller knows.
    nearly_loaded: watch::Sender<bool>,
    /// Raised after every response that was taken.
    changes: watch::Sender<u64>,
}

/// What readers look at.
#[derive(Default)]
struct View {
    workloads: SharedMap<IpAddr, Arc<Workload>>,
    /// Several Services may share an external address.
    services: SharedMap<IpAddr, Vec<Arc<Service>>>,
    node_ports: SharedMap<u16, Arc<ServicePort>>,
    /// The Service ports of which a pod's port is an endpoint, ready or not. Only this node's pods are asked for.
    service_ports: SharedMap<SocketAddr, Vec<Arc<ServicePort>>>,
    mesh: ArcSwap<Mesh>,
    node: Arc<str>,
}

impl Table {
    /// An empty table of this node that is not loaded.
    pub fn new(node: &str) -> Arc<Table> {
        Arc::new(Table {
            view: View {
                node: node.into(),
                ..View::default()
            },
            model: Mutex::default(),
            demand: Demand::new(),
            online: AtomicBool::new(false),
            loaded: watch::Sender::new(false),
            nearly_loaded: watch::Sender::new(false),
            changes: watch::Sender::new(0),
        })
    }

    /// Whether a complete first table has been taken, from the controller or from disk.
    pub fn loaded(&self) -> watch::Receiver<bool> {
        self.loaded.subscribe()
    }

    /// Whether only types are missing that not every controller knows ([`Kind::is_optional`]).
    pub fn nearly_loaded(&self) -> watch::Receiver<bool> {
        self.nearly_loaded.subscribe()
    }

    /// Waits no longer for types that not every controller knows.
    pub fn settle(&self) {
        self.model.lock().settle();
        self.update_loaded();
    }

    /// The meshed pod with this address.
    pub fn workload(&self, address: IpAddr) -> Option<Arc<Workload>> {
        let found = self.view.workloads.get(&address.to_canonical())?;
        Some(Arc::clone(&found))
    }

    /// As [`Table::workload`], waiting for the table to learn that the address is one of this identity's: it may
    /// not be known yet, or as that of the pod that had it before.
    pub async fn wait_for_workload(
        &self,
        address: IpAddr,
        identity: &Identity,
        limit: Duration,
    ) -> Option<Arc<Workload>> {
        let owner = || self.workload(address).filter(|w| w.identity == *identity);
        self.wait(limit, owner).await
    }

    /// The Service port a destination stands for.
    pub fn service(&self, destination: SocketAddr) -> ServiceLookup {
        let address = destination.ip().to_canonical();
        let port = destination.port();
        let mesh = self.view.mesh.load();
        if !mesh.services_complete {
            self.demand.touch(address);
        }
        if let Some(services) = self.view.services.get(&address) {
            let declared = |service: &Arc<Service>| {
                service
                    .ports
                    .iter()
                    .find(|p| p.port == port)
                    .map(Arc::clone)
            };
            if let Some(found) = services.iter().find_map(declared) {
                return ServiceLookup::Port(found);
            }
            if let Some(service) = services.first() {
                return ServiceLookup::NoSuchPort(Arc::clone(service));
            }
        }
        if mesh.node_addresses.contains(&address) {
            return match self.view.node_ports.get(&port) {
                Some(found) => ServiceLookup::Port(Arc::clone(&found)),
                None => ServiceLookup::NotAService,
            };
        }
        if mesh.services_complete || self.demand.is_absent(address) {
            ServiceLookup::NotAService
        } else {
            ServiceLookup::Unknown
        }
    }

    /// The Service ports of which a port of one of this node's pods is an endpoint.
    pub fn service_ports(&self, endpoint: SocketAddr) -> Vec<Arc<ServicePort>> {
        let found = self.view.service_ports.get(&endpoint);
        found.map(|ports| ports.clone()).unwrap_or_default()
    }

    /// That of them which is called so ([`ServicePort::reference`]).
    pub fn service_port(&self, endpoint: SocketAddr, reference: &str) -> Option<Arc<ServicePort>> {
        let ports = self.view.service_ports.get(&endpoint)?;
        let named = ports.iter().find(|port| *port.reference == *reference);
        named.map(Arc::clone)
    }

    /// As [`Table::service`], asking the controller for what is not known. With the controller away or
    /// silent for `limit`, an unknown address counts as not a Service.
    pub async fn find_service(&self, destination: SocketAddr, limit: Duration) -> ServiceLookup {
        let known = self.service(destination);
        if !matches!(known, ServiceLookup::Unknown) {
            return known;
        }
        if !self.online.load(Ordering::Relaxed) {
            return ServiceLookup::NotAService;
        }
        self.demand.ask(destination.ip().to_canonical());
        let answer = || match self.service(destination) {
            ServiceLookup::Unknown => None,
            other => Some(other),
        };
        self.wait(limit, answer)
            .await
            .unwrap_or(ServiceLookup::NotAService)
    }

    /// The Service port of a rule's backend, waiting for one that has been asked for but is not here yet.
    /// `None`: there is none (500), or the controller said nothing in time.
    pub async fn find_backend(
        &self,
        backend: &Backend,
        limit: Duration,
    ) -> Option<Arc<ServicePort>> {
        let answer = || match backend.state() {
            TargetState::Known(port) => Some(Some(port)),
            TargetState::Absent => Some(None),
            TargetState::Pending if !self.online.load(Ordering::Relaxed) => Some(None),
            TargetState::Pending => None,
        };
        self.wait(limit, answer).await.flatten()
    }

    /// Mesh-wide settings.
    pub fn mesh(&self) -> Arc<Mesh> {
        self.view.mesh.load_full()
    }

    /// Everything, for the admin socket.
    pub fn dump(&self) -> serde_json::Value {
        let mesh = self.mesh();
        let mut workloads: Vec<_> = self.model.lock().workloads().collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut services: BTreeMap<_, _> = self
            .model
            .lock()
            .services()
            .map(|s| ((Arc::clone(&s.namespace), Arc::clone(&s.name)), s))
            .collect();
        json!({
            "loaded": *self.loaded.borrow(),
            "controllerConnected": self.online.load(Ordering::Relaxed),
            "mesh": {
                "trustDomain": mesh.trust_domain,
                "servicesComplete": mesh.services_complete,
                "trustedRoots": mesh.trust_bundle.len(),
                "nodeAddresses": mesh.node_addresses.iter().collect::<Vec<_>>(),
            },
            "workloads": workloads.iter().map(|w| dump_workload(w)).collect::<Vec<_>>(),
            "services": services.values_mut().map(|s| dump_service(s)).collect::<Vec<_>>(),
            "askedFor": self.demand.dump(),
        })
    }

    /// Takes one response of the controller (or of the disk). Valid resources are in force when this
    /// returns; the others are named in [`Applied::rejected`], and what was held in their place stays.
    pub fn apply(&self, type_url: &str, updates: &[Update], removed: &[String]) -> Applied {
        let applied = self
            .model
            .lock()
            .apply(&self.view, type_url, updates, removed);
        if type_url == Kind::Service.type_url() {
            for update in updates {
                self.demand.found(update.aliases.iter().map(String::as_str));
            }
            self.demand.absent(removed.iter().map(String::as_str));
        }
        if [Kind::MeshConfig, Kind::Service, Kind::Route]
            .iter()
            .any(|kind| kind.type_url() == type_url)
        {
            let named = self.model.lock().named_services();
            self.demand.name(named);
        }
        self.changes.send_modify(|n| *n += 1);
        applied
    }

    /// Everything of a type has been applied. The table is loaded once that is so of every type.
    /// Returns whether it is news.
    pub fn complete(&self, type_url: &str) -> bool {
        let Some(kind) = Kind::of(type_url) else {
            return false;
        };
        let news = self.model.lock().complete(kind);
        self.update_loaded();
        news
    }

    fn update_loaded(&self) {
        let (nearly, complete) = {
            let model = self.model.lock();
            (model.is_complete_but_for_optional(), model.is_complete())
        };
        for (sender, now) in [(&self.nearly_loaded, nearly), (&self.loaded, complete)] {
            sender.send_if_modified(|held| !std::mem::replace(held, now) && now);
        }
    }

    /// Names and versions of the resources of a type that are held.
    pub fn known(&self, type_url: &str) -> HashMap<String, String> {
        self.model.lock().known(type_url)
    }

    /// How many resources of a type are held.
    pub fn count(&self, kind: Kind) -> usize {
        self.model.lock().count(kind)
    }

    /// What to subscribe to: everything of everything, and the addresses asked for.
    pub fn subscriptions(&self) -> watch::Receiver<Subscriptions> {
        self.demand.subscriptions()
    }

    /// Whether a discovery stream is open.
    pub fn set_online(&self, online: bool) {
        self.online.store(online, Ordering::Relaxed);
    }

    /// Unsubscribes from addresses that nobody has asked for in a while.
    pub fn expire_demand(&self) {
        self.demand.expire(tokio::time::Instant::now());
    }

    async fn wait<T>(&self, limit: Duration, mut found: impl FnMut() -> Option<T>) -> Option<T> {
        if let Some(found) = found() {
            return Some(found);
        }
        let mut changes = self.changes.subscribe();
        let wait = async {
            loop {
                // After the subscription, so that no change is missed.
                if let Some(found) = found() {
                    return Some(found);
                }
                changes.changed().await.ok()?;
            }
        };
        tokio::time::timeout(limit, wait).await.ok().flatten()
    }
}

fn dump_workload(workload: &Workload) -> serde_json::Value {
    let Workload {
        uid,
        identity,
        name,
        owner,
        addresses,
        node,
        node_addresses,
        state,
        tunnel,
        exclude_inbound_ports,
        exclude_outbound_ports,
        exclude_outbound_cidrs,
    } = workload;
    json!({
        "uid": **uid,
        "namespace": identity.namespace(),
        "name": **name,
        "owner": **owner,
        "identity": identity.as_str(),
        "addresses": addresses,
        "node": **node,
        "nodeAddresses": node_addresses,
        "state": state.as_str_name(),
        "tunnel": tunnel.as_str_name(),
        "excludeInboundPorts": exclude_inbound_ports,
        "excludeOutboundPorts": exclude_outbound_ports,
        "excludeOutboundCidrs": exclude_outbound_cidrs,
    })
}

fn dump_service(service: &Service) -> serde_json::Value {
    let Service {
        namespace,
        name,
        addresses,
        ports,
    } = service;
    let port = |port: &Arc<ServicePort>| {
        let endpoints: Vec<_> = port
            .endpoints
            .endpoints()
            .iter()
            .map(|e| json!({ "address": e.address, "pending": e.pending() }))
            .collect();
        json!({
            "port": port.port,
            "name": *port.name,
            "nodePort": port.node_port,
            "appProtocol": *port.app_protocol,
            "internalTrafficLocal": port.internal_traffic_local,
            "trafficDistribution": format!("{:?}", port.traffic_distribution),
            "endpoints": endpoints,
            "rules": port.http.load().dump(),
        })
    };
    json!({
        "namespace": **namespace,
        "name": **name,
        "addresses": addresses,
        "ports": ports.iter().map(port).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests;
