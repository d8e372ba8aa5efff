//! Connects to an app from inside its pod's network namespace, or to the outside from inside a caller's.
//!
//! The proxy has no capability: the sockets come from the pod's [`Stock`](crate::stock::Stock), made by the agent with mark and
//! IP_TRANSPARENT set, so that binding one to the caller's address is allowed.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::errors::ProxyError;
use mesh_api::names::{INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT};
use socket2::SockRef;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};

use crate::budget::{Charge, Resource};
use crate::pods::Pod;
use crate::tcp::{bound_buffers, finish_writing};

/// Time to get a socket and a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an app has to close a connection that was not used.
pub const UNUSED: Duration = Duration::from_secs(10);

/// A connection from inside a pod's namespace. Its socket goes back to the pod's stock when the
/// connection has ended on both sides.
#[derive(Debug)]
pub struct Delivered {
    stream: Option<TcpStream>,
    pod: Arc<Pod>,
    v6: bool,
    charge: Charge,
}

/// Connects to `to`, one of `pod`'s own addresses, so that the app sees `from` as its peer.
pub async fn to_app(pod: &Arc<Pod>, from: IpAddr, to: SocketAddr) -> Result<Delivered, ProxyError> {
    to_app_for(pod, from, to, false).await
}

/// The same; one of the node's probes may go beyond the pod's limit of sockets.
pub async fn to_app_for(
    pod: &Arc<Pod>,
    from: IpAddr,
    to: SocketAddr,
    probe: bool,
) -> Result<Delivered, ProxyError> {
    if matches!(to.port(), OUTBOUND_PORT | INBOUND_PORT | TUNNEL_PORT) || to.ip().is_loopback() {
        return Err(ProxyError::ForbiddenTarget);
    }
    open(pod, Some(from), to, probe).await
}

/// Connects to `to` as the pod itself would, uncaptured.
pub async fn to_outside(pod: &Arc<Pod>, to: SocketAddr) -> Result<Delivered, ProxyError> {
    open(pod, None, to, false).await
}

async fn open(
    pod: &Arc<Pod>,
    from: Option<IpAddr>,
    to: SocketAddr,
    probe: bool,
) -> Result<Delivered, ProxyError> {
    let charge = pod.account.charge_for(Resource::Socket, probe)?;
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let v6 = to.is_ipv6();
    let socket = pod
        .stock
        .take(v6, deadline)
        .await
        .ok_or(ProxyError::NoSocket)?;
    let connecting = connect(socket, from, to);
    match timeout_at(deadline, connecting).await {
        Ok(Ok(stream)) => Ok(Delivered {
            stream: Some(stream),
            pod: Arc::clone(pod),
            v6,
            charge,
        }),
        Ok(Err(error)) => Err(match error.kind() {
            io::ErrorKind::ConnectionRefused => ProxyError::ConnectRefused,
            io::ErrorKind::TimedOut => ProxyError::ConnectTimeout,
            _ => {
                tracing::debug!(pod = %pod.uid, %to, ?from, %error, "connect failed");
                ProxyError::ConnectFailed
            }
        }),
        Err(_late) => Err(ProxyError::ConnectTimeout),
    }
}

async fn connect(socket: OwnedFd, from: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    if let Some(from) = from {
        bound_buffers(SockRef::from(&socket))?;
        // Port 0 with IP_BIND_ADDRESS_NO_PORT: the port is chosen by connect, per destination.
        socket.bind(SocketAddr::new(from, 0))?;
    }
    socket.connect(to).await
}

impl Delivered {
    /// The connection.
    pub fn stream(&mut self) -> &mut TcpStream {
        // Taken only by what consumes the value.
        self.stream
            .as_mut()
            .expect("a delivered connection has its stream until it is recycled")
    }

    /// The connection alone, and what it is charged as; its socket is not used again.
    pub fn into_stream(mut self) -> (TcpStream, Charge) {
        let stream = self
            .stream
            .take()
            .expect("a delivered connection has its stream until it is recycled");
        (stream, self.charge)
    }

    /// Ends a connection on which nothing was sent: in order, since a reset would show in the app's log. One that the app
    /// does not end in time is dropped.
    pub async fn close_unused(mut self) {
        let stream = self.stream();
        if finish_writing(stream).is_err() {
            return;
        }
        let mut rest = [0; 512];
        let ending = async { while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
        if timeout(UNUSED, ending).await.is_ok() {
            self.recycle();
        }
    }

    /// Gives the socket back for another connection. Only for one that has ended on both sides.
    pub fn recycle(mut self) {
        if let Some(socket) = self.stream.take().and_then(|stream| stream.into_std().ok()) {
            self.pod.stock.give_back(socket.into(), self.v6);
        }
    }
}
