//! A TLS connection from a node, and who its certificate says it is.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use mesh_api::identity::{NodeIdentity, NodeRole};
use mesh_api::tls;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where the connection came from.
    pub address: SocketAddr,
    /// What its certificate proves; `None`: it showed none, or not that of a node.
    pub node: Option<Arc<NodeIdentity>>,
}

/// The node that makes a request, if it proved to be one with that role.
pub(super) fn node_of<T>(
    request: &Request<T>,
    role: Option<NodeRole>,
) -> Result<Arc<NodeIdentity>, Status> {
    let peer = request.extensions().get::<Peer>();
    let node = peer.and_then(|p| p.node.clone()).ok_or_else(|| {
        Status::unauthenticated("this call needs the certificate of a node; ask IssueNode for one")
    })?;
    match role {
        Some(role) if node.role != role => Err(Status::permission_denied(format!(
            "this call is for the {role} of a node, not for its {}",
            node.role
        ))),
        _ => Ok(node),
    }
}

/// A connection that ends when the certificate it was opened with does: a node that is not given a new one
/// is cut off then, and one that was comes back with it.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    end: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    pub(super) fn new(
        stream: TlsStream<TcpStream>,
        address: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let leaf = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first());
        let node = leaf
            .and_then(|leaf| tls::uri_name(leaf).ok())
            .and_then(|uri| uri.parse::<NodeIdentity>().ok())
            .map(Arc::new);
        let life = match leaf.and_then(tls::not_after) {
            Some(end) => {
                let end = SystemTime::UNIX_EPOCH + end;
                end.duration_since(SystemTime::now()).unwrap_or_default()
            }
            None => ANONYMOUS_LIFE,
        };
        Self {
            stream,
            peer: Peer { address, node },
            end: Box::pin(tokio::time::sleep(life)),
            _permit: permit,
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            let why = "the certificate of the connection has expired";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A connection without certificate is for one call of IssueNode.
const ANONYMOUS_LIFE: Duration = Duration::from_secs(60);
