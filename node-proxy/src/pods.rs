//! The enrolled pods of this node, and the node itself, as the data path sees them.
//!
//! A [`Pod`] is found by UID from the moment its certificate is asked for, and by address from the moment
//! it is served. Connections hold the `Arc`, so a pod that has left lives until its last connection ends.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use mesh_api::identity::{Identity, InvalidIdentity};
use mesh_api::names;
use mesh_api::proto::mesh::{self, Mode, probe};
use tokio::sync::{Notify, watch};

use crate::budget::{Account, Limits};
use crate::http::limits::Rates;
use crate::identity::{Identities, IdentityGuard};
use crate::maps::SharedMap;
use crate::stock::{Stock, Supply};
use crate::turns::Turns;

mod metrics;
#[cfg(test)]
mod tests;

pub use metrics::PodsCollector;

/// An enrolled pod.
#[derive(Debug)]
pub struct Pod {
    /// UID in Kubernetes.
    pub uid: Arc<str>,
    /// What the controller says of it; replaced as a whole when it changes.
    pub info: ArcSwap<PodInfo>,
    /// Who it is.
    pub identity: Identity,
    /// Keeps key and certificate of the identity on this node.
    pub certificate: IdentityGuard,
    /// Sockets in its namespace.
    pub stock: Stock,
    /// What it consumes here.
    pub account: Arc<Account>,
    /// Connections that need its capture rules and routes.
    pub captured: Captured,
    /// What callers used up of its Services' rate limits.
    pub rates: Rates,
    /// Its connections take turns with those of others.
    pub turns: Arc<Turns>,
    /// Whether it has left the mesh: its HTTP connections then end as they do when the process drains.
    pub leaving: watch::Sender<bool>,
    /// It is to be found by its addresses. It may have none yet: the controller speaks of a pod before its agent does.
    pub served: AtomicBool,
}

/// What the controller says of a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    /// Namespace in Kubernetes.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Service account it runs as.
    pub service_account: Arc<str>,
    /// Deployment, StatefulSet, ... that owns it, else its own name.
    pub owner: Arc<str>,
    /// All addresses.
    pub addresses: Vec<IpAddr>,
    /// Plaintext from outside the mesh is refused.
    pub strict: bool,
    /// Ports that are not captured.
    pub exclude_inbound_ports: Vec<u16>,
    /// Ports that are not captured.
    pub exclude_outbound_ports: Vec<u16>,
    /// Destinations that are not captured.
    pub exclude_outbound_cidrs: Vec<IpNet>,
    /// What the node's own addresses may send in strict mode.
    pub probes: Vec<Probe>,
    /// Zone of its node; empty if unknown.
    pub zone: Arc<str>,
}

/// A probe of the pod's manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Port in the pod.
    pub port: u16,
    /// What it sends.
    pub kind: ProbeKind,
}

/// What a probe sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeKind {
    /// A GET of this path.
    HttpGet(String),
    /// Nothing.
    TcpSocket,
    /// A gRPC health check of this service.
    Grpc(String),
}

/// Why what the controller says of a pod cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidPod {
    /// UID, namespace or name is missing.
    #[error("pod without {0}")]
    Missing(&'static str),
    /// Neither 4 nor 16 bytes.
    #[error("pod {pod}: an address of {length} bytes")]
    Address {
        /// Namespace and name.
        pod: String,
        /// Bytes.
        length: usize,
    },
    /// Not 0..65536.
    #[error("pod {pod}: port {port} is out of range")]
    Port {
        /// Namespace and name.
        pod: String,
        /// What was sent.
        port: u32,
    },
    /// Not a CIDR.
    #[error("pod {pod}: {cidr:?} is not a CIDR")]
    Cidr {
        /// Namespace and name.
        pod: String,
        /// What was sent.
        cidr: String,
    },
    /// Trust domain, namespace and service account make no SPIFFE ID.
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
}

impl PodInfo {
    /// Checks and converts the controller's record.
    pub fn from_proto(pod: &mesh::NodePod) -> Result<Self, InvalidPod> {
        let mesh::NodePod {
            uid,
            namespace,
            name,
            service_account,
            addresses,
            enrolled: _,
            mode,
            exclude_inbound_ports,
            exclude_outbound_ports,
            exclude_outbound_cidrs,
            probes,
            owner,
            zone,
            namespace_opted_in: _,
        } = pod;
        for (field, value) in [("uid", uid), ("namespace", namespace), ("name", name)] {
            if value.is_empty() {
                return Err(InvalidPod::Missing(field));
            }
        }
        let called = || format!("{namespace}/{name}");
        let port = |port: u32| {
            u16::try_from(port).map_err(|_| InvalidPod::Port {
                pod: called(),
                port,
            })
        };
        let ports = |ports: &[u32]| ports.iter().map(|p| port(*p)).collect::<Result<_, _>>();
        let address = |bytes: &bytes::Bytes| {
            names::address_from_bytes(bytes).ok_or_else(|| InvalidPod::Address {
                pod: called(),
                length: bytes.len(),
            })
        };
        let cidr = |cidr: &String| {
            cidr.parse().map_err(|_| InvalidPod::Cidr {
                pod: called(),
                cidr: cidr.clone(),
            })
        };
        Ok(Self {
            namespace: namespace.as_str().into(),
            name: name.as_str().into(),
            service_account: service_account.as_str().into(),
            owner: if owner.is_empty() { name } else { owner }.as_str().into(),
            addresses: addresses.iter().map(address).collect::<Result<_, _>>()?,
            strict: *mode == Mode::Strict as i32,
            zone: zone.as_str().into(),
            exclude_inbound_ports: ports(exclude_inbound_ports)?,
            exclude_outbound_ports: ports(exclude_outbound_ports)?,
            exclude_outbound_cidrs: exclude_outbound_cidrs
                .iter()
                .map(cidr)
                .collect::<Result<_, _>>()?,
            probes: probes
                .iter()
                // A handler this version does not know allows nothing.
                .filter_map(|probe| Some((probe.port, probe.handler.as_ref()?)))
                .map(|(number, handler)| {
                    Ok(Probe {
                        port: port(number)?,
                        kind: match handler {
                            probe::Handler::HttpGet(get) => ProbeKind::HttpGet(get.path.clone()),
                            probe::Handler::TcpSocket(_) => ProbeKind::TcpSocket,
                            probe::Handler::Grpc(grpc) => ProbeKind::Grpc(grpc.service.clone()),
                        },
                    })
                })
                .collect::<Result<_, InvalidPod>>()?,
        })
    }

    /// Who the pod is.
    pub fn identity(&self, trust_domain: &str) -> Result<Identity, InvalidIdentity> {
        Identity::new(trust_domain, &self.namespace, &self.service_account)
    }

    fn has_v6(&self) -> bool {
        self.addresses.iter().any(IpAddr::is_ipv6)
    }
}

impl Pod {
    /// Asks for the identity's certificate and starts to stock sockets.
    pub fn new(
        uid: Arc<str>,
        info: PodInfo,
        identity: Identity,
        identities: &Arc<Identities>,
        supply: &Arc<Supply>,
        limits: &Limits,
    ) -> Arc<Self> {
        let account = Account::new(Arc::clone(&info.namespace), Arc::clone(&info.name), limits);
        let stock = Stock::new(Arc::clone(supply), Arc::clone(&uid), info.has_v6());
        Arc::new(Self {
            certificate: identities.acquire(identity.clone()),
            uid,
            identity,
            stock,
            account,
            captured: Captured::default(),
            rates: Rates::default(),
            turns: Arc::default(),
            leaving: watch::Sender::new(false),
            served: AtomicBool::default(),
            info: ArcSwap::from_pointee(info),
        })
    }
}

/// The node's own namespace.
#[derive(Debug)]
pub struct Host {
    /// Sockets to dial other nodes with.
    pub stock: Stock,
    /// Addresses of all the node's interfaces: where probes come from.
    pub addresses: ArcSwap<Vec<IpAddr>>,
}

impl Host {
    /// Knows no address yet.
    pub fn new(supply: &Arc<Supply>) -> Arc<Self> {
        Arc::new(Self {
            stock: Stock::new(Arc::clone(supply), "".into(), false),
            addresses: ArcSwap::default(),
        })
    }

    /// Replaces the addresses.
    pub fn set_addresses(&self, addresses: Vec<IpAddr>) {
        let usable_v6 = |a: &IpAddr| matches!(a, IpAddr::V6(v6) if !v6.is_unicast_link_local() && !v6.is_loopback());
        self.stock.set_has_v6(addresses.iter().any(usable_v6));
        self.addresses.store(Arc::new(addresses));
    }
}

/// The pods of this node.
#[derive(Debug, Default)]
pub struct Pods {
    by_uid: SharedMap<Arc<str>, Arc<Pod>>,
    by_address: SharedMap<IpAddr, Arc<Pod>>,
}

impl Pods {
    /// No pods.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The pod that is served at this address.
    pub fn by_address(&self, address: IpAddr) -> Option<Arc<Pod>> {
        let address = address.to_canonical();
        self.by_address.get(&address).map(|pod| Arc::clone(&pod))
    }

    /// The pod with this UID, served or about to be.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.by_uid.get(uid).map(|pod| Arc::clone(&pod))
    }

    /// All of them, served or about to be.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.by_uid.iter().map(|pod| Arc::clone(&pod)).collect()
    }

    /// Makes the pod known, not yet by address.
    pub(crate) fn add(&self, pod: &Arc<Pod>) {
        // It may come back before its last connection from before has ended.
        pod.leaving.send_replace(false);
        self.by_uid.insert(Arc::clone(&pod.uid), Arc::clone(pod));
    }

    /// Makes it known by its addresses.
    pub(crate) fn serve(&self, pod: &Arc<Pod>) {
        pod.served.store(true, Ordering::Release);
        for address in &pod.info.load().addresses {
            self.by_address.insert(*address, Arc::clone(pod));
        }
    }

    /// Replaces what is known of the pod.
    pub(crate) fn update(&self, pod: &Arc<Pod>, info: PodInfo) {
        let old = pod.info.load_full();
        pod.stock.set_has_v6(info.has_v6());
        pod.info.store(Arc::new(info));
        if pod.served.load(Ordering::Acquire) {
            self.serve(pod);
            let new = pod.info.load();
            self.unserve(
                pod,
                old.addresses.iter().filter(|a| !new.addresses.contains(a)),
            );
        }
    }

    /// Forgets the pod; connections that hold it live on, and are told.
    pub(crate) fn remove(&self, pod: &Arc<Pod>) {
        pod.leaving.send_replace(true);
        pod.served.store(false, Ordering::Release);
        self.unserve(pod, pod.info.load().addresses.iter());
        self.by_uid.remove_if(&pod.uid, |_, p| Arc::ptr_eq(p, pod));
    }

    /// An address may belong to the next pod already; that one keeps it.
    fn unserve<'a>(&self, pod: &Arc<Pod>, addresses: impl Iterator<Item = &'a IpAddr>) {
        for address in addresses {
            self.by_address
                .remove_if(address, |_, p| Arc::ptr_eq(p, pod));
        }
    }

    /// Calls every stock's tick.
    pub(crate) fn tick(&self) {
        for pod in &self.by_uid {
            pod.stock.tick();
        }
    }
}

/// Counts connections that only live while the pod's rules and routes are there: accepted from its
/// capture listeners, or delivered with a foreign source address.
#[derive(Debug, Default)]
pub struct Captured(Arc<CapturedState>);

#[derive(Debug, Default)]
struct CapturedState {
    open: AtomicUsize,
    none: Notify,
}

/// One such connection, until dropped.
#[derive(Debug)]
pub struct CapturedGuard(Arc<CapturedState>);

impl Captured {
    /// Counts one more.
    pub fn enter(&self) -> CapturedGuard {
        self.0.open.fetch_add(1, Ordering::AcqRel);
        CapturedGuard(Arc::clone(&self.0))
    }

    /// How many there are.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Acquire)
    }

    /// Ends when there are none.
    pub async fn none(&self) {
        loop {
            let mut none = std::pin::pin!(self.0.none.notified());
            none.as_mut().enable();
            if self.open() == 0 {
                return;
            }
            none.await;
        }
    }
}

impl Drop for CapturedGuard {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
    }
}
