//! The first bytes of a captured connection, until they say which protocol it is.
//!
//! No timer decides. A port that is declared to be HTTP waits for the client, since HTTP clients speak first.
//! Elsewhere one look is taken at what has come already; if that is nothing, the caller opens the way to the
//! server as for TCP and takes whoever speaks first: a server that greets is not delayed.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_api::names::is_http;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::detect::{MAX_PEEK, Protocol, detect};

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
    /// HTTP, or TLS that is routed by server name: the client speaks first.
    ClientFirst,
    /// Never looked into.
    Opaque,
    /// Nothing is declared.
    Unset,
}

/// What an `appProtocol` means.
pub fn declared(app_protocol: &str) -> Declared {
    match app_protocol {
        "" => Declared::Unset,
        name if is_http(name) => Declared::ClientFirst,
        _ => Declared::Opaque,
    }
}

/// Bytes of one read while the protocol is not known.
const READ: usize = 4096;
/// A client that has begun what may be a line of HTTP has this long to send enough of it to be recognised.
const SLOW: Duration = Duration::from_secs(10);

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

/// Reads until the protocol is known. For connections whose client is known to speak first. One that is slow about
/// what may be a request line is left to HTTP/1, which refuses it in time and says why.
pub async fn read(socket: &TcpStream, mut bytes: BytesMut) -> io::Result<Opening> {
    let mut deadline = None;
    let protocol = loop {
        match deadline {
            None => socket.readable().await?,
            Some(deadline) => match timeout_at(deadline, socket.readable()).await {
                Ok(readable) => readable?,
                Err(_late) => break Protocol::Http1,
            },
        }
        if let Some(protocol) = look(socket, &mut bytes)? {
            break protocol;
        }
        if bytes.len() > MAX_PEEK {
            break Protocol::Opaque;
        }
        if !bytes.is_empty() {
            deadline.get_or_insert_with(|| Instant::now() + SLOW);
        }
    };
    Ok(Opening {
        protocol,
        bytes: bytes.freeze(),
    })
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
            assert_eq!(declared(name), Declared::ClientFirst, "{name}");
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
