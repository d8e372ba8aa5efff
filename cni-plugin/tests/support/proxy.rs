//! A node proxy, played: the real broker protocol, and transparent delivery of what it accepts.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_api::proto::broker::{
    Ack, Family, Hello, Listener, NeedSockets, Offer, PodDrained, Ready, ToAgent, ToProxy,
    to_agent, to_proxy,
};
use mesh_api::seqpacket::Connection;
use socket2::SockRef;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

pub struct Proxy {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

/// A connection that was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub uid: String,
    pub kind: Listener,
    pub from: IpAddr,
    pub original: SocketAddr,
}

struct Shared {
    instance: String,
    state: Mutex<State>,
    runtime: tokio::runtime::Handle,
}

#[derive(Default)]
struct State {
    pods: HashMap<String, Pod>,
    host: Vec<(Listener, Arc<OwnedFd>)>,
    host_addresses: usize,
    accepted: Vec<Accepted>,
    /// Captured connections that run, by pod.
    running: HashMap<String, usize>,
    leaving: HashSet<String>,
    draining: bool,
    snapshots: usize,
    /// Requests for sockets of the present connection.
    requests: Option<mpsc::UnboundedSender<Request>>,
    adopted: usize,
    refuse: Option<String>,
}

struct Pod {
    listeners: Vec<(Listener, Arc<OwnedFd>)>,
    tasks: Vec<JoinHandle<()>>,
}

type Request = (NeedSockets, oneshot::Sender<Vec<OwnedFd>>);

impl Drop for Pod {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Proxy {
    pub fn start(socket: &Path, instance: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let shared = Arc::new(Shared {
            instance: instance.into(),
            state: Mutex::default(),
            runtime: runtime.handle().clone(),
        });
        let task = Arc::clone(&shared);
        let socket = socket.to_owned();
        runtime.spawn(async move { task.run(socket).await });
        Self {
            shared,
            runtime: Some(runtime),
        }
    }

    pub fn kill(self) {
        drop(self);
    }

    pub fn accepted(&self) -> Vec<Accepted> {
        self.shared.state.lock().unwrap().accepted.clone()
    }

    pub fn serves(&self, uid: &str) -> bool {
        self.shared.state.lock().unwrap().pods.contains_key(uid)
    }

    pub fn holds_host(&self) -> bool {
        self.shared.state.lock().unwrap().host.len() == 2
    }

    pub fn draining(&self) -> bool {
        self.shared.state.lock().unwrap().draining
    }

    pub fn snapshots(&self) -> usize {
        self.shared.state.lock().unwrap().snapshots
    }

    /// Offers that the agent took.
    pub fn adopted(&self) -> usize {
        self.shared.state.lock().unwrap().adopted
    }

    /// From now on AddPod is answered with this error, or not any more.
    pub fn refuse(&self, error: Option<&str>) {
        self.shared.state.lock().unwrap().refuse = error.map(str::to_owned);
    }

    /// Gives up its listeners for what a hostile or broken proxy might offer instead.
    pub fn replace_listeners(&self, uid: &str, from: &str) {
        let mut state = self.shared.state.lock().unwrap();
        let other = state.pods[from].listeners.clone();
        state.pods.get_mut(uid).unwrap().listeners = other;
    }

    /// Sockets as the agent makes them.
    pub fn sockets(&self, uid: &str, family: Family, count: u32) -> Vec<OwnedFd> {
        let shared = Arc::clone(&self.shared);
        let uid = uid.to_owned();
        let runtime = self.runtime.as_ref().unwrap();
        runtime.block_on(async move { shared.sockets(&uid, family, count).await })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        // The tasks are gone; so are the last listeners, as with a process.
        let mut state = self.shared.state.lock().unwrap();
        state.pods.clear();
        state.host.clear();
    }
}

impl Shared {
    async fn run(self: Arc<Self>, socket: PathBuf) {
        loop {
            if let Ok(connection) = Connection::connect(&socket) {
                let ended = self.session(&connection).await;
                eprintln!("proxy {}: session ended: {ended:?}", self.instance);
                let mut state = self.state.lock().unwrap();
                state.requests = None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn session(self: &Arc<Self>, connection: &Connection) -> std::io::Result<()> {
        let (requests, mut to_request) = mpsc::unbounded_channel::<Request>();
        // Pods that have drained.
        let (drained, mut to_report) = mpsc::unbounded_channel::<String>();
        let (held_pods, holds_host) = {
            let mut state = self.state.lock().unwrap();
            state.requests = Some(requests);
            let held: Vec<String> = state.pods.keys().cloned().collect();
            (held, !state.host.is_empty())
        };
        let mut next = 1u64;
        let mut id = || {
            next += 1;
            next
        };
        let hello = to_agent::Body::Hello(Hello {
            instance: self.instance.clone(),
            version: "test".into(),
            held_pods,
            holds_host_listeners: holds_host,
        });
        send(connection, id(), hello, vec![]).await?;
        let mut asked: HashMap<u64, oneshot::Sender<Vec<OwnedFd>>> = HashMap::new();
        let mut offers: HashSet<u64> = HashSet::new();
        let mut named: HashSet<String> = HashSet::new();
        loop {
            let received = tokio::select! {
                received = connection.receive::<ToProxy>() => received?,
                Some((request, answer)) = to_request.recv() => {
                    let id = id();
                    asked.insert(id, answer);
                    send(connection, id, to_agent::Body::NeedSockets(request), vec![]).await?;
                    continue;
                }
                Some(uid) = to_report.recv() => {
                    let body = to_agent::Body::PodDrained(PodDrained { uid });
                    send(connection, id(), body, vec![]).await?;
                    continue;
                }
            };
            let Some((ToProxy { id: of, body }, fds)) = received else {
                return Ok(());
            };
            let mut error = String::new();
            match body.unwrap() {
                to_proxy::Body::Ack(ack) => {
                    if offers.remove(&ack.of) && ack.error.is_empty() {
                        self.state.lock().unwrap().adopted += 1;
                    } else if !ack.error.is_empty() {
                        eprintln!("proxy {}: the agent refused: {}", self.instance, ack.error);
                    }
                    continue;
                }
                to_proxy::Body::Sockets(sockets) => {
                    assert_eq!(sockets.error, "");
                    let _ = asked.remove(&sockets.of).unwrap().send(fds);
                    continue;
                }
                to_proxy::Body::Welcome(welcome) => {
                    let host = welcome.want_host_listeners.then(String::new);
                    for uid in welcome.want_pods.into_iter().chain(host) {
                        let listeners = {
                            let state = self.state.lock().unwrap();
                            match uid.is_empty() {
                                true => state.host.clone(),
                                false => state.pods[&uid].listeners.clone(),
                            }
                        };
                        let offer = to_agent::Body::Offer(Offer {
                            pod_uid: uid,
                            listeners: listeners.iter().map(|(kind, _)| *kind as i32).collect(),
                        });
                        let fds = listeners.into_iter().map(|(_, fd)| fd).collect();
                        let id = id();
                        offers.insert(id);
                        send(connection, id, offer, fds).await?;
                    }
                }
                to_proxy::Body::AddPod(add) => {
                    let uid = add.pod.unwrap().uid;
                    named.insert(uid.clone());
                    let refuse = self.state.lock().unwrap().refuse.clone();
                    match refuse {
                        Some(text) => error = text,
                        None => self.add(&uid, &add.listeners, fds),
                    }
                }
                to_proxy::Body::RemovePod(remove) => {
                    self.remove(&remove.uid, &drained);
                }
                to_proxy::Body::HostListeners(listeners) => {
                    let mut state = self.state.lock().unwrap();
                    state.host_addresses = listeners.host_addresses.len();
                    if !fds.is_empty() {
                        state.host = pair(&listeners.listeners, fds);
                    }
                }
                to_proxy::Body::SnapshotEnd(_) => {
                    {
                        let mut state = self.state.lock().unwrap();
                        state.pods.retain(|uid, _| named.contains(uid));
                        state.draining = false;
                        state.snapshots += 1;
                    }
                    send(connection, id(), to_agent::Body::Ready(Ready {}), vec![]).await?;
                }
                to_proxy::Body::Drain(_) => self.state.lock().unwrap().draining = true,
                to_proxy::Body::Resume(_) => self.state.lock().unwrap().draining = false,
            }
            send(
                connection,
                0,
                to_agent::Body::Ack(Ack { of, error }),
                vec![],
            )
            .await?;
        }
    }

    fn add(self: &Arc<Self>, uid: &str, kinds: &[i32], fds: Vec<OwnedFd>) {
        let mut state = self.state.lock().unwrap();
        if fds.is_empty() {
            assert!(state.pods.contains_key(uid), "no listeners for {uid}");
            return;
        }
        let listeners = pair(kinds, fds);
        let tasks = (listeners.iter())
            .map(|(kind, fd)| {
                let listener = std::net::TcpListener::from(fd.try_clone().unwrap());
                let shared = Arc::clone(self);
                self.runtime
                    .spawn(shared.accept(uid.to_owned(), *kind, listener))
            })
            .collect();
        state.pods.insert(uid.to_owned(), Pod { listeners, tasks });
    }

    fn remove(self: &Arc<Self>, uid: &str, drained: &mpsc::UnboundedSender<String>) {
        {
            let mut state = self.state.lock().unwrap();
            state.pods.remove(uid);
            state.leaving.insert(uid.to_owned());
        }
        let shared = Arc::clone(self);
        let (uid, drained) = (uid.to_owned(), drained.clone());
        self.runtime.spawn(async move {
            while shared
                .state
                .lock()
                .unwrap()
                .running
                .get(&uid)
                .is_some_and(|n| *n > 0)
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let _ = drained.send(uid);
        });
    }

    async fn accept(self: Arc<Self>, uid: String, kind: Listener, listener: std::net::TcpListener) {
        let listener = TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            *self
                .state
                .lock()
                .unwrap()
                .running
                .entry(uid.clone())
                .or_default() += 1;
            let shared = Arc::clone(&self);
            let uid = uid.clone();
            self.runtime.spawn(async move {
                if let Err(error) = shared.carry(&uid, kind, stream).await {
                    eprintln!("proxy {}: {uid}: {error}", shared.instance);
                }
                *shared.state.lock().unwrap().running.get_mut(&uid).unwrap() -= 1;
            });
        }
    }

    /// To where the connection was going: from the pod itself, or with the caller's address.
    async fn carry(&self, uid: &str, kind: Listener, mut stream: TcpStream) -> std::io::Result<()> {
        let from = stream.peer_addr()?;
        let original = original_destination(&stream)?;
        self.state.lock().unwrap().accepted.push(Accepted {
            uid: uid.into(),
            kind,
            from: from.ip().to_canonical(),
            original,
        });
        if kind == Listener::Hbone {
            return Ok(());
        }
        let family = match original {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        };
        let fd = self.sockets(uid, family, 1).await.pop().unwrap();
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(fd));
        if kind == Listener::Inbound {
            // The very port, too: what delivery must be able to do at any time.
            socket.bind(SocketAddr::new(from.ip().to_canonical(), from.port()))?;
        }
        let mut upstream = socket.connect(original).await?;
        let copied = copy_bidirectional(&mut stream, &mut upstream).await;
        let _ = stream.shutdown().await;
        copied.map(|_| ())
    }

    async fn sockets(&self, uid: &str, family: Family, count: u32) -> Vec<OwnedFd> {
        loop {
            let (answer, sockets) = oneshot::channel();
            let request = NeedSockets {
                pod_uid: uid.into(),
                family: family.into(),
                count,
            };
            let requests = self.state.lock().unwrap().requests.clone();
            if let Some(requests) = requests
                && requests.send((request, answer)).is_ok()
                && let Ok(sockets) = sockets.await
            {
                return sockets;
            }
            // The agent is away; a real proxy has a stock.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn pair(kinds: &[i32], fds: Vec<OwnedFd>) -> Vec<(Listener, Arc<OwnedFd>)> {
    assert_eq!(kinds.len(), fds.len());
    let kinds = kinds.iter().map(|kind| Listener::try_from(*kind).unwrap());
    kinds.zip(fds.into_iter().map(Arc::new)).collect()
}

fn original_destination(stream: &TcpStream) -> std::io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let original = match stream.local_addr()?.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4()?,
        IpAddr::V6(_) => socket.original_dst_v6()?,
    };
    Ok(original.as_socket().unwrap())
}

async fn send(
    connection: &Connection,
    id: u64,
    body: to_agent::Body,
    fds: Vec<Arc<OwnedFd>>,
) -> std::io::Result<()> {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    connection
        .send(
            &ToAgent {
                id,
                body: Some(body),
            },
            &fds,
        )
        .await
}
