//! The socket broker: hands listeners and sockets to any number of node proxies over a `SOCK_SEQPACKET`
//! unix socket (`mesh-api/proto/broker.proto`).
//!
//! It works by state, not by events: [`Broker`] holds what proxies are to serve, each connection
//! compares that with what it has told its proxy and sends the difference. So nothing waits in queues,
//! a proxy that connects late gets the same as one that was there, and no message can be lost.
//!
//! Both sides hold duplicates of the listeners. A restarted agent lacks them; proxies say what they
//! hold, the agent asks for what it lacks, and checks each offered socket before it adopts it.
//!
//! All connected proxies accept until the newest has said that it is ready; then the older ones are told
//! to drain, and to resume if the newest goes first. What comes from a proxy is bounded: one packet at
//! a time, [`MAX_PROXIES`] connections; a proxy that does not read is disconnected.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_api::proto::broker::Listener;
use mesh_api::proto::mesh::NodePod;
use mesh_api::seqpacket;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::netns::{Netns, NetnsId};
use super::record::Store;
use super::sockets::{ListenerSocket, Sockets, check_listener, host_listeners, pod_listeners};

mod connection;

/// Connections of proxies that are served at once: an old and a new one, and a few that are going.
pub const MAX_PROXIES: usize = 8;
/// Those that have not said Hello yet included.
const MAX_CONNECTIONS: usize = 2 * MAX_PROXIES;
/// Longer than a proxy waits between two attempts to connect.
const SETTLE: Duration = Duration::from_secs(3);

/// What proxies are to serve, and how far they are. Cheap to share.
#[derive(Debug)]
pub struct Broker {
    state: Mutex<State>,
    /// Counts changes of the state.
    changed: watch::Sender<u64>,
    sockets: Sockets,
    store: Store,
    next_connection: AtomicU64,
}

/// Listeners of one pod or of the node, in the order in which they travel.
#[derive(Debug)]
pub struct Listeners {
    /// Tells these from later ones of the same pod.
    id: u64,
    sockets: Vec<ListenerSocket>,
}

#[derive(Debug)]
struct State {
    /// By then every proxy that is alive has come, or come back.
    settled: Instant,
    /// Number of the last change; entries carry the one that made them what they are.
    generation: u64,
    pods: HashMap<String, Entry>,
    host: HostEntry,
    proxies: BTreeMap<u64, Proxy>,
    /// Instances in the order in which they came; survives the agent.
    instances: Vec<String>,
}

#[derive(Debug)]
struct Entry {
    generation: u64,
    netns: Netns,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// `listeners`: `None` while the agent lacks them and a proxy may hold them.
    Serve {
        pod: Box<NodePod>,
        listeners: Option<Arc<Listeners>>,
    },
    Leave,
}

#[derive(Debug, Default)]
struct HostEntry {
    generation: u64,
    node_addresses: Vec<IpAddr>,
    listeners: Option<Arc<Listeners>>,
    interface_addresses: Vec<IpAddr>,
}

/// A connected proxy.
#[derive(Debug)]
struct Proxy {
    /// Place in `State::instances`.
    age: usize,
    ready: bool,
    drain: bool,
    /// Latest answer to AddPod, by pod: of which generation, and what.
    served: HashMap<String, (u64, Result<(), String>)>,
    /// Generations of the RemovePods that were acknowledged, by pod.
    removed: HashMap<String, u64>,
    /// Pods that were reported as drained after that.
    drained: HashSet<String>,
    /// Listeners that were adopted from this proxy.
    adopted: HashMap<String, u64>,
    /// Pods, and the node (empty), whose listeners were asked for and have not come.
    awaited: HashSet<String>,
}

impl Broker {
    /// `node_addresses`: the node's InternalIPs.
    pub fn new(store: Store, sockets: Sockets, node_addresses: Vec<IpAddr>) -> Arc<Self> {
        let instances = store.instances().unwrap_or_else(|error| {
            tracing::warn!(%error, "the order of the proxies is not known");
            Vec::new()
        });
        let state = State {
            host: HostEntry {
                node_addresses,
                ..HostEntry::default()
            },
            instances,
            settled: Instant::now() + SETTLE,
            generation: 0,
            pods: HashMap::new(),
            proxies: BTreeMap::new(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            sockets,
            store,
            next_connection: AtomicU64::new(0),
        })
    }

    /// Accepts proxies for ever. Only processes of `proxy_uid` are spoken to.
    pub async fn listen(self: Arc<Self>, socket: &Path, proxy_uid: u32) -> io::Result<()> {
        let listener = seqpacket::Listener::bind(socket)?;
        std::fs::set_permissions(socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        std::os::unix::fs::chown(socket, Some(proxy_uid), None)?;
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Never closed. Who finds no place waits in the socket's queue.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return Ok(());
            };
            let connection = match listener.accept().await {
                Ok(connection) => connection,
                Err(error) => {
                    // Out of descriptors, most likely, which passes. The agent must not end for it.
                    tracing::error!(%error, "broker: a connection cannot be accepted");
                    tokio::time::sleep(super::RETRY).await;
                    continue;
                }
            };
            let broker = Arc::clone(&self);
            tokio::spawn(async move {
                connection::serve(&broker, connection, proxy_uid).await;
                drop(place);
            });
        }
    }

    /// Has the pod served. `listeners`: `None` while the agent lacks them. Returns what to wait for.
    pub fn serve(&self, netns: &Netns, pod: NodePod, listeners: Option<Arc<Listeners>>) -> u64 {
        self.change(|state, generation| {
            let uid = pod.uid.clone();
            let work = Work::Serve {
                pod: Box::new(pod),
                listeners,
            };
            let netns = netns.clone();
            state.pods.insert(
                uid,
                Entry {
                    generation,
                    netns,
                    work,
                },
            );
            generation
        })
    }

    /// Has the pod served, with listeners that a proxy may have given back already.
    pub fn serve_unless_adopted(&self, netns: &Netns, pod: &NodePod) {
        let has = {
            let state = self.state.lock();
            let entry = state
                .pods
                .get(&pod.uid)
                .filter(|entry| entry.netns.id() == netns.id());
            match entry.map(|entry| &entry.work) {
                Some(Work::Serve { listeners, .. }) => listeners.clone(),
                _ => None,
            }
        };
        self.serve(netns, pod.clone(), has);
    }

    /// Has proxies stop accepting for the pod and say when its last captured connection has ended.
    pub fn leave(&self, uid: &str, netns: &Netns) {
        self.change(|state, generation| {
            for proxy in state.proxies.values_mut() {
                proxy.drained.remove(uid);
                proxy.removed.remove(uid);
            }
            let entry = Entry {
                generation,
                netns: netns.clone(),
                work: Work::Leave,
            };
            state.pods.insert(uid.to_owned(), entry);
        });
    }

    /// No proxy needs to know of the pod any more.
    pub fn forget(&self, uid: &str) {
        self.change(|state, _| state.pods.remove(uid));
    }

    /// Waits until a proxy that accepts serves what [`Broker::serve`] returned, and meanwhile says why
    /// none does.
    pub async fn served(&self, uid: &str, generation: u64, waiting: impl Fn(String)) {
        self.until(|state| match state.served(uid, generation) {
            Ok(()) => Some(()),
            Err(reason) => {
                waiting(reason);
                None
            }
        })
        .await;
    }

    /// Waits until every connected proxy has said that the pod is drained, and for those that were
    /// connected lately and may come back.
    pub async fn drained(&self, uid: &str) {
        loop {
            let settled = self
                .until(|state| {
                    let drained = |proxy: &Proxy| proxy.drained.contains(uid);
                    let all = state.proxies.values().all(drained);
                    all.then_some(state.settled)
                })
                .await;
            if settled <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(settled).await;
        }
    }

    /// Waits until a proxy has given back the pod's listeners.
    pub async fn adopted(&self, uid: &str) -> Arc<Listeners> {
        self.until(|state| match &state.pods.get(uid)?.work {
            Work::Serve { listeners, .. } => listeners.clone(),
            Work::Leave => None,
        })
        .await
    }

    /// A proxy is ready.
    pub fn is_ready(&self) -> bool {
        self.state.lock().any_ready()
    }

    /// The connected proxies, the oldest first.
    pub fn proxies(&self) -> serde_json::Value {
        let state = self.state.lock();
        let mut proxies: Vec<&Proxy> = state.proxies.values().collect();
        proxies.sort_by_key(|proxy| proxy.age);
        let row = |proxy: &&Proxy| {
            let served = proxy.served.values().filter(|(_, result)| result.is_ok());
            serde_json::json!({
                "instance": state.instances.get(proxy.age),
                "ready": proxy.ready,
                "draining": proxy.drain,
                "pods": served.count(),
            })
        };
        proxies.iter().map(row).collect()
    }

    /// Follows every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The addresses of the node's interfaces.
    pub fn set_interface_addresses(&self, addresses: Vec<IpAddr>) {
        if self.state.lock().host.interface_addresses != addresses {
            self.change(|state, generation| {
                state.host.interface_addresses = addresses;
                state.host.generation = generation;
            });
        }
    }

    /// Opens the node's tunnel listeners, or takes them back from a proxy. Ends when they are there.
    pub async fn open_host_listeners(&self) {
        loop {
            let addresses = {
                let state = self.state.lock();
                if state.host.listeners.is_some() {
                    return;
                }
                state.host.node_addresses.clone()
            };
            match self.sockets.listen_on_host(&addresses).await {
                Ok(sockets) => {
                    self.change(|state, generation| {
                        state.host.listeners = Some(Arc::new(Listeners::new(sockets)));
                        state.host.generation = generation;
                    });
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    tracing::debug!("tunnel listeners are held by a proxy; waiting for its offer");
                }
                Err(error) => {
                    tracing::warn!(%error, ?addresses, "tunnel listeners cannot be opened; retrying");
                }
            }
            let adopted = self.until(|state| state.host.listeners.as_ref().map(|_| ()));
            // Elapsed: try again.
            let _ = tokio::time::timeout(super::RETRY, adopted).await;
        }
    }

    /// Opens a pod's listeners. `AddrInUse` while a proxy holds earlier ones.
    pub async fn open_listeners(&self, netns: &Netns) -> io::Result<Arc<Listeners>> {
        let sockets = self.sockets.listen_in_pod(netns).await?;
        Ok(Arc::new(Listeners::new(sockets)))
    }

    fn change<T>(&self, edit: impl FnOnce(&mut State, u64) -> T) -> T {
        let mut state = self.state.lock();
        state.generation += 1;
        let generation = state.generation;
        let result = edit(&mut state, generation);
        state.choose_who_accepts();
        // Under the lock, so that the numbers never go back.
        self.changed.send_replace(generation);
        result
    }

    async fn until<T>(&self, found: impl Fn(&State) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            if let Some(value) = found(&self.state.lock()) {
                return value;
            }
            // Cannot fail: `self` holds the sender.
            let _ = changed.changed().await;
        }
    }

    /// Takes listeners that a proxy offers, after checking each.
    fn adopt(&self, from: u64, uid: &str, kinds: &[i32], fds: Vec<OwnedFd>) -> Result<(), String> {
        let (netns, expected) = {
            let state = self.state.lock();
            if uid.is_empty() {
                let expected = host_listeners(&state.host.node_addresses)
                    .into_iter()
                    .map(|(kind, address)| (kind, address.port(), Some(address.ip())))
                    .collect();
                (self.sockets.host().id(), expected)
            } else {
                let entry = state.pods.get(uid).ok_or("this pod is not known here")?;
                let expected = pod_listeners()
                    .map(|(kind, port)| (kind, port, None))
                    .to_vec();
                (entry.netns.id(), expected)
            }
        };
        let listeners = Arc::new(Listeners::checked(netns, &expected, kinds, fds)?);
        self.change(|state, generation| {
            if let Some(proxy) = state.proxies.get_mut(&from) {
                proxy.adopted.insert(uid.to_owned(), listeners.id);
            }
            if uid.is_empty() {
                if state.host.listeners.is_none() {
                    state.host.listeners = Some(listeners);
                    state.host.generation = generation;
                }
                return Ok(());
            }
            let entry = state
                .pods
                .get_mut(uid)
                .ok_or("this pod has gone meanwhile")?;
            if let Work::Serve {
                listeners: slot, ..
            } = &mut entry.work
                && slot.is_none()
            {
                *slot = Some(listeners);
                entry.generation = generation;
            }
            Ok(())
        })
    }
}

impl Listeners {
    fn new(sockets: Vec<ListenerSocket>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            sockets,
        }
    }

    /// Pairs and checks what came: every expected kind once and nothing else.
    fn checked(
        netns: NetnsId,
        expected: &[(Listener, u16, Option<IpAddr>)],
        kinds: &[i32],
        fds: Vec<OwnedFd>,
    ) -> Result<Self, String> {
        use std::os::fd::AsFd;
        if kinds.len() != fds.len() || kinds.len() != expected.len() {
            return Err(format!(
                "{} listeners are named and {} came; {} are expected",
                kinds.len(),
                fds.len(),
                expected.len()
            ));
        }
        let mut sockets: Vec<ListenerSocket> = Vec::with_capacity(fds.len());
        for (kind, fd) in kinds.iter().zip(fds) {
            let found = expected.iter().find(|(k, ..)| *k as i32 == *kind);
            let Some((kind, port, address)) = found else {
                return Err(format!("listener {kind} does not belong here"));
            };
            if sockets.iter().any(|other| other.kind == *kind) {
                return Err(format!("{} came twice", kind.as_str_name()));
            }
            check_listener(fd.as_fd(), netns, *port, *address)
                .map_err(|why| format!("{} cannot be adopted: {why}", kind.as_str_name()))?;
            sockets.push(ListenerSocket { kind: *kind, fd });
        }
        Ok(Self::new(sockets))
    }

    fn kinds(&self) -> Vec<i32> {
        self.sockets.iter().map(|s| s.kind as i32).collect()
    }
}

impl State {
    fn any_ready(&self) -> bool {
        self.host.listeners.is_some() && self.proxies.values().any(|p| p.ready)
    }

    fn served(&self, uid: &str, generation: u64) -> Result<(), String> {
        let mut reason = "no node proxy is connected".to_owned();
        for proxy in self.proxies.values().filter(|proxy| !proxy.drain) {
            match proxy.served.get(uid) {
                Some((of, Ok(()))) if *of >= generation => return Ok(()),
                Some((of, Err(error))) if *of >= generation => {
                    reason = format!("the node proxy cannot serve it: {error}");
                }
                _ => reason = "the node proxy has not confirmed it yet".to_owned(),
            }
        }
        Err(reason)
    }

    /// The newest proxy that is ready drains the older ones.
    fn choose_who_accepts(&mut self) {
        let newest = self
            .proxies
            .values()
            .filter(|p| p.ready)
            .map(|p| p.age)
            .max();
        for proxy in self.proxies.values_mut() {
            proxy.drain = newest.is_some_and(|newest| proxy.age < newest);
        }
    }

    /// The place of an instance in the order, its last one if it is new.
    fn age(&mut self, instance: &str) -> usize {
        if let Some(age) = self.instances.iter().position(|known| known == instance) {
            return age;
        }
        self.instances.push(instance.to_owned());
        self.instances.len() - 1
    }
}

impl Broker {
    fn register(
        &self,
        instance: &str,
        held: &HashSet<String>,
        holds_host: bool,
    ) -> Option<(u64, HashSet<String>)> {
        let (registered, instances) = self.change(|state, _| {
            if state.proxies.len() >= MAX_PROXIES {
                return (None, None);
            }
            let before = state.instances.len();
            state.forget_old_instances();
            let age = state.age(instance);
            let grown = state.instances.len() != before;
            let lacks = |entry: &Entry| {
                matches!(
                    &entry.work,
                    Work::Serve {
                        listeners: None,
                        ..
                    }
                )
            };
            let mut awaited: HashSet<String> = (state.pods.iter())
                .filter(|(uid, entry)| lacks(entry) && held.contains(*uid))
                .map(|(uid, _)| uid.clone())
                .collect();
            if holds_host && state.host.listeners.is_none() {
                awaited.insert(String::new());
            }
            let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
            let proxy = Proxy {
                age,
                ready: false,
                drain: false,
                served: HashMap::new(),
                removed: HashMap::new(),
                drained: HashSet::new(),
                adopted: HashMap::new(),
                awaited: awaited.clone(),
            };
            state.proxies.insert(id, proxy);
            (Some((id, awaited)), grown.then(|| state.instances.clone()))
        });
        if let Some(instances) = instances
            && let Err(error) = self.store.put_instances(&instances)
        {
            tracing::warn!(%error, "the order of the proxies is not kept");
        }
        registered
    }
}

impl State {
    /// Keeps the list short while nobody's place depends on it.
    fn forget_old_instances(&mut self) {
        const KEPT: usize = 64;
        if self.proxies.is_empty() && self.instances.len() > KEPT {
            self.instances.drain(..self.instances.len() - KEPT);
        }
    }
}
