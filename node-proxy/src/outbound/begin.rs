//! What a captured connection turns out to be: where it goes, and who speaks which protocol. The way to the server is
//! opened here for all but HTTP.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use mesh_api::errors::ProxyError;
use tokio::net::TcpStream;
use tokio::time::{Duration, Instant, timeout, timeout_at};

use super::{ESTABLISH_TIMEOUT, Route, establish};
use crate::balance::Pending;
use crate::deliver::UNUSED;
use crate::flow::Flow;
use crate::http::caller::Target;
use crate::http::detect::Protocol;
use crate::http::opening::{self, Declared, Opening};
use crate::pods::Pod;
use crate::resolve::{self, Path};
use crate::table::ServiceLookup;
use crate::worker::Worker;

/// How long a Service that was never heard of is asked for.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// What a captured connection turned out to be.
pub(super) enum Begun {
    Http(Target, Opening),
    Tcp {
        route: Route,
        opening: Spoken,
        pending: Option<Pending>,
    },
}

/// What was said before both ways were open.
#[derive(Default)]
pub(super) struct Spoken {
    pub(super) client: Bytes,
    pub(super) server: Bytes,
}

/// Finds out what the destination is and who speaks which protocol, and opens the way for all but HTTP.
pub(super) async fn begin(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    flow: &mut Flow,
    socket: &TcpStream,
) -> Result<Begun, ProxyError> {
    let target = target(worker, flow).await;
    let mut bytes = BytesMut::new();
    let gone = |_| ProxyError::Cancelled;
    let declared = declared(&target, pod);
    let known = opening::begun(declared, socket, &mut bytes).await;
    let known = match known.map_err(gone)? {
        // Only TLS passes where it is routed: anything else has no server name to be routed by.
        Some(protocol @ (Protocol::Http1 | Protocol::Http2)) if declared != Declared::Tls => {
            let bytes = bytes.freeze();
            return Ok(Begun::Http(target, Opening { protocol, bytes }));
        }
        other => other,
    };
    let server_name = match &known {
        Some(Protocol::Tls { sni }) => sni.clone(),
        _ => None,
    };
    let deadline = Instant::now() + ESTABLISH_TIMEOUT;
    let (mut route, pending) = timeout_at(
        deadline,
        establish(worker, pod, flow, &target, server_name.as_deref()),
    )
    .await
    .unwrap_or(Err(ProxyError::ConnectTimeout))?;
    let mut spoken = Spoken::default();
    if known.is_none() {
        match first(socket, &mut route, &mut bytes, &mut spoken.server).await? {
            First::Client(protocol @ (Protocol::Http1 | Protocol::Http2)) => {
                worker.spawn_untracked(route.close_unused());
                let bytes = bytes.freeze();
                return Ok(Begun::Http(target, Opening { protocol, bytes }));
            }
            First::Client(_) | First::Server => {}
        }
    }
    spoken.client = bytes.freeze();
    Ok(Begun::Tcp {
        route,
        opening: spoken,
        pending,
    })
}

/// What was said first, and by whom.
enum First {
    Client(Protocol),
    Server,
}

/// Waits for whoever speaks first; `server` gets what was taken of the server's words. A client that has begun something
/// that may be HTTP is waited for until it is, or is not, or the server speaks. A server that begins with SETTINGS waits
/// for its client's preface (RFC 9113, section 3.4), so the client decides.
async fn first(
    socket: &TcpStream,
    route: &mut Route,
    bytes: &mut BytesMut,
    server: &mut Bytes,
) -> Result<First, ProxyError> {
    let mut waits = false;
    loop {
        tokio::select! {
            biased;
            readable = socket.readable() => {
                readable.map_err(|_| ProxyError::Cancelled)?;
                let known = opening::look(socket, bytes).map_err(|_| ProxyError::Cancelled)?;
                if let Some(protocol) = known {
                    return Ok(First::Client(protocol));
                }
            }
            spoken = route.first(server), if !waits => {
                waits = spoken?;
                if !waits {
                    return Ok(First::Server);
                }
            }
        }
    }
}

/// Whether a server's first bytes are HTTP/2's: a SETTINGS frame (RFC 9113, sections 4.1 and 6.5).
pub fn is_settings(bytes: &[u8]) -> bool {
    match bytes {
        [l1, l2, l3, 4, 0, 0, 0, 0, 0, ..] => {
            u32::from_be_bytes([0, *l1, *l2, *l3]).is_multiple_of(6)
        }
        _ => false,
    }
}

/// What the original destination stands for, and what its declaration says.
async fn target(worker: &Arc<Worker>, flow: &mut Flow) -> Target {
    let context = &worker.context;
    let destination = flow.destination_address;
    let mut lookup = context.table.service(destination);
    if matches!(lookup, ServiceLookup::Unknown) {
        lookup = context
            .table
            .find_service(destination, LOOKUP_TIMEOUT)
            .await;
    }
    match lookup {
        ServiceLookup::Port(port) => {
            flow.service = Some(Arc::clone(&port.label));
            Target::Service(port)
        }
        // Of a port the Service does not declare nobody knows more than the node's own rules.
        ServiceLookup::NoSuchPort(_) => Target::Outside(destination),
        ServiceLookup::NotAService | ServiceLookup::Unknown => {
            match resolve::path(&context.table, &context.pods, &context.node, destination) {
                Ok(Path::Direct) => Target::Outside(destination),
                // HBONE peers take connections, not requests.
                Ok(Path::Hbone(..)) => Target::Opaque(destination),
                Ok(Path::Local(..) | Path::Tunnel(..)) | Err(_) => Target::Pod(destination),
            }
        }
    }
}

fn declared(target: &Target, pod: &Pod) -> Declared {
    match target {
        Target::Outside(_) | Target::Opaque(_) => Declared::Opaque,
        Target::Pod(_) => Declared::Unset,
        Target::Service(port) => {
            let rules = port.http.load();
            let routes = rules.routes_for(pod.identity.namespace());
            opening::of_service(port, routes.map(|set| &**set))
        }
    }
}

impl Route {
    /// Ends a way on which nothing was sent: in order, since a reset would show in the app's log.
    async fn close_unused(self) {
        match self {
            Self::Socket { delivered, .. } => delivered.close_unused().await,
            Self::Tunnel(mut stream) => {
                if stream.send.send_data(Bytes::new(), true).is_err() {
                    return;
                }
                let ending = async {
                    while let Some(Ok(chunk)) = stream.receive.data().await {
                        // The stream has gone if this fails.
                        let _ = stream.receive.flow_control().release_capacity(chunk.len());
                    }
                };
                // One that does not end in time is reset by being dropped.
                let _ = timeout(UNUSED, ending).await;
            }
        }
    }

    /// Waits for the other side's first bytes. Whether they are HTTP/2's; what had to be taken to know is in `taken`.
    async fn first(&mut self, taken: &mut Bytes) -> Result<bool, ProxyError> {
        match self {
            Self::Tunnel(stream) => {
                *taken = match stream.receive.data().await {
                    Some(Ok(chunk)) => chunk,
                    None => Bytes::new(),
                    Some(Err(_)) => return Err(ProxyError::TunnelReset),
                };
                Ok(is_settings(taken))
            }
            Self::Socket { delivered, .. } => {
                let mut head = [0; 9];
                // A failure is for the relay to find and to pass on.
                let length = delivered.stream().peek(&mut head).await.unwrap_or(0);
                Ok(is_settings(&head[..length]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_of_an_http2_server() {
        assert!(is_settings(&[0, 0, 18, 4, 0, 0, 0, 0, 0, 0, 3]));
        assert!(is_settings(&[0, 0, 0, 4, 0, 0, 0, 0, 0]));
        for other in [
            &b"220 mail.example ESMTP"[..],
            &[0, 0, 18, 4, 0, 0, 0, 0, 1],
            &[0, 0, 17, 4, 0, 0, 0, 0, 0],
            &[0, 0, 18, 4, 0, 0],
            b"",
        ] {
            assert!(!is_settings(other), "{other:?}");
        }
    }
}
