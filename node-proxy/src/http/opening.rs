//! The first bytes of a captured connection, until they say which protocol it is.
//!
//! No timer decides. A port that is declared to be HTTP waits for the client, since HTTP clients speak first.
//! Elsewhere one look is taken at what has come already; if that is nothing, the caller opens the way to the
//! server as for TCP and takes whoever speaks first: a server that greets is not delayed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_api::names::is_http;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::detect::{Protocol, detect};
use super::route::RouteSet;
use crate::table::ServicePort;

/// A connection whose first bytes have been read.
#[derive(Debug)]
pub struct Opening {
    /// What it speaks.
    pub protocol: Protocol,
    /// What was read to find out.
    pub bytes: Bytes,
}

/// What the declaration of a port says of its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// The client speaks first. What is neither HTTP nor TLS is refused.
    Http,
    /// TLS that is routed by server name: the client speaks first.
    Tls,
    /// Never looked into.
    Opaque,
    /// Nothing is declared.
    Unset,
}

/// What an `appProtocol` means.
pub fn declared(app_protocol: &str) -> Declared {
    match app_protocol {
        "" => Declared::Unset,
        name if is_http(name) => Declared::Http,
        _ => Declared::Opaque,
    }
}

/// What a Service's port is to callers with these routes.
pub fn of_service(port: &ServicePort, routes: Option<&RouteSet>) -> Declared {
    match (routes, declared(&port.app_protocol)) {
        (Some(RouteSet::Tls(_)), _) => Declared::Tls,
        (Some(RouteSet::Tcp(_)), _) => Declared::Opaque,
        (Some(RouteSet::Http(_) | RouteSet::Grpc(_)), Declared::Unset) => Declared::Http,
        (_, declared) => declared,
    }
}

/// What a port of a pod of this node is to callers that have no proxy of the mesh: what the Services with this endpoint
/// say, as far as they agree. Routes by server name and of TCP are the Services' only.
pub fn of_endpoint(services: &[Arc<ServicePort>]) -> Declared {
    let mut all = Declared::Unset;
    for port in services {
        let rules = port.http.load();
        let routes = rules.producer.as_deref().filter(|set| set.is_http());
        match of_service(port, routes) {
            Declared::Unset => {}
            declared if all == Declared::Unset || all == declared => all = declared,
            _ => return Declared::Unset,
        }
    }
    all
}

/// Bytes of one read while the protocol is not known.
const READ: usize = 4096;
/// A client that has begun what may be a line of HTTP has this long to send enough of it to be recognised.
pub const SLOW: Duration = Duration::from_secs(10);

/// One look at what has arrived. `Ok(None)`: nothing yet.
pub fn look(socket: &TcpStream, bytes: &mut BytesMut) -> io::Result<Option<Protocol>> {
    bytes.reserve(READ);
    match socket.try_read_buf(bytes) {
        // The client has finished without a word: for TCP to carry on.
        Ok(0) => Ok(Some(Protocol::Opaque)),
        Ok(_) => Ok(detect(bytes)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// What the declaration and the client's first bytes say. `None`: who speaks first decides, the client or the server.
pub async fn begun(
    declared: Declared,
    socket: &TcpStream,
    bytes: &mut BytesMut,
) -> io::Result<Option<Protocol>> {
    match declared {
        Declared::Opaque => Ok(Some(Protocol::Opaque)),
        Declared::Tls => read(socket, bytes).await.map(Some),
        Declared::Http => Ok(Some(match read(socket, bytes).await? {
            // HTTP/1 says what is wrong with it: passed on, the app might take it for a request that nobody has looked
            // at. A client that ends without a word is left to TCP.
            Protocol::Opaque if !bytes.is_empty() => Protocol::Http1,
            known => known,
        })),
        Declared::Unset => {
            let known = look(socket, bytes)?;
            if known.is_some() || !bytes.is_empty() {
                return Ok(known);
            }
            // What the client sent with its first packets may just not have been delivered yet.
            tokio::task::yield_now().await;
            look(socket, bytes)
        }
    }
}

/// Reads until the protocol is known. For connections whose client is known to speak first. One that is slow about
/// what may be a request line is left to HTTP/1, which refuses it in time and says why.
async fn read(socket: &TcpStream, bytes: &mut BytesMut) -> io::Result<Protocol> {
    let mut deadline = None;
    loop {
        match deadline {
            None => socket.readable().await?,
            Some(deadline) => match timeout_at(deadline, socket.readable()).await {
                Ok(readable) => readable?,
                Err(_late) => return Ok(Protocol::Http1),
            },
        }
        if let Some(protocol) = look(socket, bytes)? {
            return Ok(protocol);
        }
        if !bytes.is_empty() {
            deadline.get_or_insert_with(|| Instant::now() + SLOW);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_that_mean_http() {
        for name in [
            "http",
            "HTTP",
            "kubernetes.io/h2c",
            "grpc",
            "gRPC-Web",
            "ws",
            "kubernetes.io/ws",
        ] {
            assert_eq!(declared(name), Declared::Http, "{name}");
        }
        for name in [
            "https",
            "tcp",
            "mysql",
            "kubernetes.io/wss",
            "example.com/http",
        ] {
            assert_eq!(declared(name), Declared::Opaque, "{name}");
        }
        assert_eq!(declared(""), Declared::Unset);
    }
}
