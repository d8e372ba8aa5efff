//! From a listener that the broker passed to a connection of a known workload.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::errors::ProxyError;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::flow::Flow;
use crate::pods::Pod;
use crate::resolve::is_own_listener;
use crate::tcp::{bound_buffers, reset_on_close, set_options};
use crate::telemetry::{Party, ReasonLabels, Reporter};
use crate::tunnel::serve::Entrance;
use crate::worker::Worker;
use crate::{inbound, outbound, tunnel};

/// What a listener captures, and for whom.
#[derive(Clone, Debug)]
pub enum Capture {
    /// 15001 of a pod.
    Outbound(Arc<Pod>),
    /// 15006 of a pod.
    Inbound(Arc<Pod>),
    /// 15008 of a pod.
    Hbone(Arc<Pod>),
    /// 15008 of the node.
    Tunnel,
}

/// Pause after the process ran out of descriptors or memory: the queue waits, it does not spin.
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts until stopped; while the process drains, connections are left in the queue for its successor.
/// Nothing is accepted before the first table is there. Connections are dealt out to `workers` in turn.
pub async fn run(
    workers: Vec<Arc<Worker>>,
    capture: Capture,
    listener: OwnedFd,
    stop: CancellationToken,
) {
    let context = Arc::clone(&workers[0].context);
    let listener = match listen(listener, &capture) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(?capture, %error, "listener cannot be used"),
    };
    let mut draining = workers[0].draining();
    draining.mark_changed();
    let mut loaded = context.table.loaded();
    tokio::select! {
        () = stop.cancelled() => return,
        ready = loaded.wait_for(|loaded| *loaded) => if ready.is_err() { return },
    }
    let mut turn = workers.iter().cycle();
    let mut accepting = workers[0].accepting();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = draining.changed() => {
                if changed.is_err() {
                    return;
                }
                drop(accepting);
                tokio::select! {
                    () = stop.cancelled() => return,
                    resumed = draining.wait_for(|draining| !*draining) => if resumed.is_err() { return },
                }
                accepting = workers[0].accepting();
            }
            accepted = listener.accept() => match accepted {
                Ok((socket, peer)) => {
                    if let Some(worker) = turn.next() {
                        begin(worker, &capture, socket, peer);
                    }
                    // Not the whole queue at once: others are to be served meanwhile.
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    let reason = accept_error(&error);
                    context.telemetry.accept_errors.get_or_create(&ReasonLabels { reason }).inc();
                    if reason != "aborted" {
                        tracing::error!(%error, "connections cannot be accepted");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            },
        }
    }
}

fn listen(listener: OwnedFd, capture: &Capture) -> io::Result<TcpListener> {
    set_options(SockRef::from(&listener))?;
    if let Capture::Outbound(_) = capture {
        bound_buffers(SockRef::from(&listener))?;
    }
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn begin(worker: &Arc<Worker>, capture: &Capture, socket: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let own = Arc::clone(worker);
    match capture {
        Capture::Outbound(pod) => {
            let Some(destination) = destination(worker, Reporter::Source, pod, &socket, peer)
            else {
                return;
            };
            let serving = outbound::serve(own, Arc::clone(pod), socket, peer, destination);
            worker.spawn(Arc::clone(&pod.turns).take(serving));
        }
        Capture::Inbound(pod) => {
            let Some(destination) = destination(worker, Reporter::Destination, pod, &socket, peer)
            else {
                return;
            };
            let serving = inbound::serve(own, Arc::clone(pod), socket, peer, destination);
            worker.spawn(Arc::clone(&pod.turns).take(serving));
        }
        Capture::Hbone(pod) => {
            let entrance = Entrance::Pod(Arc::clone(pod));
            worker.spawn_tunnel(tunnel::serve::serve(own, entrance, socket, peer));
        }
        Capture::Tunnel => worker.spawn_tunnel(async move {
            // Its events are to come on its own thread, which need not be the one that accepted.
            match socket.into_std().and_then(TcpStream::from_std) {
                Ok(socket) => tunnel::serve::serve(own, Entrance::Node, socket, peer).await,
                Err(error) => tracing::warn!(%peer, %error, "a tunnel's socket cannot be used"),
            }
        }),
    }
}

/// The original destination; `None` after a connection to the capture port itself has been refused.
fn destination(
    worker: &Worker,
    reporter: Reporter,
    pod: &Pod,
    socket: &TcpStream,
    peer: SocketAddr,
) -> Option<SocketAddr> {
    let local = socket.local_addr().map(canonical).ok()?;
    let destination = original_destination(socket, peer.ip()).unwrap_or(local);
    if !is_own_listener(destination, local) {
        return Some(destination);
    }
    Flow::new(reporter, peer, destination, Party::unknown())
        .fail(&worker.context, ProxyError::ForbiddenTarget);
    tracing::debug!(pod = %pod.uid, %peer, %destination, "connection to a capture port itself");
    reset_on_close(socket);
    None
}

/// What connection tracking says the packet was sent to (SO_ORIGINAL_DST).
fn original_destination(socket: &TcpStream, peer: IpAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(socket);
    let original = match peer {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    original.ok()?.as_socket().map(canonical)
}

/// Dual-stack listeners see IPv4 peers as IPv4-mapped IPv6 addresses.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn accept_error(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "descriptors",
        Some(libc::ENOBUFS | libc::ENOMEM) => "memory",
        Some(libc::ECONNABORTED) => "aborted",
        _ => "other",
    }
}
