//! Sockets made inside network namespaces, by one thread that does nothing else.
//!
//! A socket keeps the namespace it was made in, whoever holds it. In a pod's namespace sockets may
//! bind foreign addresses (IP_TRANSPARENT), so that the app sees who calls; in the node's they may not.
//! All carry the mesh mark, by which the capture rules know the mesh's own packets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use mesh_api::names::{INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT};
use mesh_api::proto::broker::{Family, Listener};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::sync::{mpsc, oneshot};

use super::netns::Netns;
use super::rules::MeshMark;
use crate::sys;

/// Asks the thread for sockets. The thread ends with the last handle.
#[derive(Clone, Debug)]
pub struct Sockets {
    jobs: mpsc::Sender<Job>,
    host: Netns,
}

/// Where sockets are made.
#[derive(Clone, Debug)]
pub enum Place {
    /// A pod's namespace.
    Pod(Netns),
    /// The node's own.
    Host,
}

/// A listening socket and what it is for.
#[derive(Debug)]
pub struct ListenerSocket {
    /// Its purpose.
    pub kind: Listener,
    /// The socket.
    pub fd: OwnedFd,
}

impl Sockets {
    /// Starts the thread. `host` is the node's namespace.
    pub fn start(mark: MeshMark, host: Netns) -> io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        std::thread::Builder::new()
            .name("sockets".into())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    job.done(mark);
                }
            })?;
        Ok(Self { jobs, host })
    }

    /// The node's own namespace.
    pub fn host(&self) -> &Netns {
        &self.host
    }

    /// A pod's three listeners. `AddrInUse` while a proxy holds earlier ones.
    pub async fn listen_in_pod(&self, netns: &Netns) -> io::Result<Vec<ListenerSocket>> {
        let wanted = pod_listeners().map(|(kind, port)| (kind, vec![any_v6(port), any_v4(port)]));
        self.listen(Place::Pod(netns.clone()), wanted.into()).await
    }

    /// The node's tunnel listeners.
    pub async fn listen_on_host(&self, addresses: &[IpAddr]) -> io::Result<Vec<ListenerSocket>> {
        let wanted = (host_listeners(addresses).into_iter())
            .map(|(kind, address)| (kind, vec![address]))
            .collect();
        self.listen(Place::Host, wanted).await
    }

    /// Unconnected sockets to dial with: as many as could be made, and why not all.
    pub async fn dial(
        &self,
        place: Place,
        family: Family,
        count: usize,
    ) -> (Vec<OwnedFd>, Option<io::Error>) {
        let (reply, answer) = oneshot::channel();
        let task = Task::Dial {
            family,
            count,
            reply,
        };
        match self.send(place, task, answer).await {
            Ok(sockets) => sockets,
            Err(error) => (Vec::new(), Some(error)),
        }
    }

    async fn listen(
        &self,
        place: Place,
        wanted: Vec<(Listener, Vec<SocketAddr>)>,
    ) -> io::Result<Vec<ListenerSocket>> {
        let (reply, answer) = oneshot::channel();
        let task = Task::Listen { wanted, reply };
        self.send(place, task, answer).await?
    }

    async fn send<T>(
        &self,
        place: Place,
        task: Task,
        answer: oneshot::Receiver<T>,
    ) -> io::Result<T> {
        let gone = || io::Error::other("the thread that makes sockets has ended");
        let (netns, in_pod) = match place {
            Place::Pod(netns) => (netns, true),
            Place::Host => (self.host.clone(), false),
        };
        let job = Job {
            netns,
            in_pod,
            task,
        };
        self.jobs.send(job).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

/// The listeners of every pod's namespace.
pub fn pod_listeners() -> [(Listener, u16); 3] {
    [
        (Listener::Outbound, OUTBOUND_PORT),
        (Listener::Inbound, INBOUND_PORT),
        (Listener::Hbone, TUNNEL_PORT),
    ]
}

/// The node's listeners: one for the first address of each family.
pub fn host_listeners(addresses: &[IpAddr]) -> Vec<(Listener, SocketAddr)> {
    let first = |kind, v4: bool| {
        let address = addresses.iter().find(|address| address.is_ipv4() == v4)?;
        Some((kind, SocketAddr::new(*address, TUNNEL_PORT)))
    };
    [
        first(Listener::TunnelV4, true),
        first(Listener::TunnelV6, false),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Whether a socket that a proxy offers is the listener it claims to be: a listening TCP socket of
/// that namespace, on that port and, if one is given, address.
pub fn check_listener(
    socket: BorrowedFd<'_>,
    netns: super::netns::NetnsId,
    port: u16,
    address: Option<IpAddr>,
) -> Result<(), String> {
    let failed = |what: &str, e: io::Error| format!("{what} cannot be read: {e}");
    let namespace = Netns::of_socket(socket).map_err(|e| failed("its namespace", e))?;
    if namespace.id() != netns {
        return Err("it belongs to another network namespace".into());
    }
    let socket = SockRef::from(&socket);
    let kind = socket.r#type().map_err(|e| failed("its type", e))?;
    if kind != Type::STREAM {
        return Err("it is not a TCP socket".into());
    }
    if !socket.is_listener().map_err(|e| failed("its state", e))? {
        return Err("it does not listen".into());
    }
    let local = socket.local_addr().map_err(|e| failed("its address", e))?;
    let Some(local) = local.as_socket() else {
        return Err("it is not an IP socket".into());
    };
    if local.port() != port {
        return Err(format!("it listens on port {}, not {port}", local.port()));
    }
    let right = match address {
        Some(address) => local.ip() == address,
        None => local.ip().is_unspecified(),
    };
    if !right {
        return Err(format!("it listens on {}", local.ip()));
    }
    Ok(())
}

struct Job {
    netns: Netns,
    in_pod: bool,
    task: Task,
}

enum Task {
    Listen {
        /// Each with the addresses to try in turn.
        wanted: Vec<(Listener, Vec<SocketAddr>)>,
        reply: oneshot::Sender<io::Result<Vec<ListenerSocket>>>,
    },
    Dial {
        family: Family,
        count: usize,
        reply: oneshot::Sender<(Vec<OwnedFd>, Option<io::Error>)>,
    },
}

impl Job {
    fn done(self, mark: MeshMark) {
        let entered = self.netns.enter();
        // Whoever asked may have given up; what was made is closed then.
        match self.task {
            Task::Listen { wanted, reply } => {
                let _ = reply.send(entered.and_then(|()| {
                    (wanted.into_iter())
                        .map(|(kind, addresses)| {
                            let fd = listen(mark, self.in_pod, &addresses)?;
                            Ok(ListenerSocket { kind, fd })
                        })
                        .collect()
                }));
            }
            Task::Dial {
                family,
                count,
                reply,
            } => {
                let _ = reply.send(match entered {
                    Ok(()) => dial(mark, self.in_pod, family, count),
                    Err(error) => (Vec::new(), Some(error)),
                });
            }
        }
    }
}

fn listen(mark: MeshMark, in_pod: bool, addresses: &[SocketAddr]) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match listen_on(mark, in_pod, *address) {
            // A namespace without IPv6 has no such family, or no such address.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
            {
                last = e;
            }
            done => return done,
        }
    }
    Err(last)
}

fn listen_on(mark: MeshMark, in_pod: bool, address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = socket(mark, in_pod, Domain::for_address(address))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!in_pod)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn dial(
    mark: MeshMark,
    in_pod: bool,
    family: Family,
    count: usize,
) -> (Vec<OwnedFd>, Option<io::Error>) {
    let domain = match family {
        Family::V6 => Domain::IPV6,
        Family::V4 | Family::Unspecified => Domain::IPV4,
    };
    let mut sockets = Vec::with_capacity(count);
    while sockets.len() < count {
        match dial_socket(mark, in_pod, domain) {
            Ok(socket) => sockets.push(socket),
            Err(error) => return (sockets, Some(error)),
        }
    }
    (sockets, None)
}

fn dial_socket(mark: MeshMark, in_pod: bool, domain: Domain) -> io::Result<OwnedFd> {
    let socket = socket(mark, in_pod, domain)?;
    // The port is chosen at connect, by the whole four-tuple: a source address does not run out of
    // ports that are in use towards other destinations.
    let level = libc::IPPROTO_IP;
    sys::set_option(socket.as_fd(), level, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    Ok(socket.into())
}

fn socket(mark: MeshMark, in_pod: bool, domain: Domain) -> io::Result<Socket> {
    // Close-on-exec and non-blocking at once.
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_mark(mark.0)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE_INTERVAL),
    )?;
    if in_pod {
        // One bit of the socket; the level is only the way to it.
        let level = libc::IPPROTO_IP;
        sys::set_option(socket.as_fd(), level, libc::IP_TRANSPARENT, 1)?;
        if domain == Domain::IPV6 {
            let level = libc::IPPROTO_IPV6;
            sys::set_option(socket.as_fd(), level, libc::IPV6_TRANSPARENT, 1)?;
        }
    }
    Ok(socket)
}

fn any_v4(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

fn any_v6(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

/// Callers that wait while no proxy accepts. The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// Requests that wait for the thread.
const QUEUE: usize = 256;
/// Accepted connections inherit these.
const KEEPALIVE: Duration = Duration::from_secs(180);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
