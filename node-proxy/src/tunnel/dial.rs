//! Opens one tunnel: a socket of the right namespace, TLS, HTTP/2, and the peer's first answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use mesh_api::tls::PeerRole;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::BufReader;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::ahead::ReadsAhead;
use super::tls::{Peer, Refusal, peer, refusal, tls_refusal};
use super::{
    CONNECTION_WINDOW, MAX_FRAME, MAX_HEADER_LIST, READ_AHEAD, SEND_BUFFER, STREAM_WINDOW,
};
use crate::identity::Trust;
use crate::stock::Stock;
use crate::turns::Paced;

/// From the first packet to a tunnel that can be used.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// The connection of a tunnel.
pub type Driving = Connection<Paced<ReadsAhead<TlsStream<BufReader<TcpStream>>>>, Bytes>;

/// A tunnel that the server has accepted.
#[derive(Debug)]
pub struct Dialed {
    /// To open streams with.
    pub send: SendRequest<Bytes>,
    /// To be driven by its own task.
    pub connection: Driving,
    /// Keepalive handle of `connection`.
    pub ping: h2::PingPong,
    /// The server.
    pub peer: Peer,
}

/// Dials `address` with a socket of `stock`.
pub async fn dial(
    stock: &Stock,
    address: SocketAddr,
    config: Arc<ClientConfig>,
    callee: &Identity,
    trust: &Trust,
) -> Result<Dialed, Refusal> {
    let deadline = Instant::now() + DIAL_TIMEOUT;
    let late = |error, result| move |_| Refusal { error, result };
    let tcp = timeout_at(deadline, connect(stock, address, deadline))
        .await
        .map_err(late(ProxyError::TunnelConnect, "connect_timeout"))?
        .map_err(|error| Refusal {
            error,
            result: "connect",
        })?;
    timeout_at(deadline, handshake(tcp, config, callee, trust))
        .await
        .map_err(late(ProxyError::TunnelHandshake, "handshake_timeout"))?
}

async fn connect(
    stock: &Stock,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TcpStream, ProxyError> {
    let socket = stock
        .take(address.is_ipv6(), deadline)
        .await
        .ok_or(ProxyError::NoSocket)?;
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
    connecting.await.map_err(|_| ProxyError::TunnelConnect)
}

async fn handshake(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    callee: &Identity,
    trust: &Trust,
) -> Result<Dialed, Refusal> {
    let internal = Refusal {
        error: ProxyError::Internal,
        result: "internal",
    };
    let name = ServerName::try_from(callee.server_name()).map_err(|_| internal)?;
    let tls = TlsConnector::from(config)
        .connect(name, BufReader::with_capacity(READ_AHEAD, tcp))
        .await
        .map_err(|e| refusal(&e))?;
    let state = tls.get_ref().1;
    // One that was not offered has failed the handshake.
    if state.alpn_protocol().is_none() {
        return Err(Refusal {
            error: ProxyError::TunnelHandshake,
            result: "protocol",
        });
    }
    let peer = peer(state, PeerRole::Server, trust).map_err(|e| tls_refusal(&e))?;
    let (send, mut connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        .handshake(Paced::new(ReadsAhead::new(tls)))
        .await
        .map_err(http2_refusal)?;
    let mut ping = connection.ping_pong().ok_or(internal)?;
    // In TLS 1.3 the client is done before the server has judged its certificate. The answer to a PING
    // proves that it has, so a refusal is known here, with its reason, and not by the first stream.
    tokio::select! {
        biased;
        pong = ping.ping(h2::Ping::opaque()) => { pong.map_err(http2_refusal)?; }
        ended = &mut connection => {
            return Err(ended.err().map_or(Refusal { error: ProxyError::TunnelReset, result: "closed" }, http2_refusal));
        }
    }
    Ok(Dialed {
        send,
        connection,
        ping,
        peer,
    })
}

fn http2_refusal(error: h2::Error) -> Refusal {
    let closed = Refusal {
        error: ProxyError::TunnelHandshake,
        result: "http2",
    };
    error.into_io().map_or(closed, |e: io::Error| refusal(&e))
}
