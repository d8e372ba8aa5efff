//! The controller's gRPC server, on TLS of its own so that certificates and roots change without a restart.
//!
//! A client may come without a certificate; it can call `IssueNode` then and nothing else. Who a client is
//! comes from its certificate alone, never from what it says.

mod calls;
mod discovery;
mod peer;
mod session;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use mesh_api::proto::control::certificates_server::CertificatesServer;
use mesh_api::proto::control::enrolment_server::EnrolmentServer;
use mesh_api::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use rustls::server::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

pub use peer::Peer;

use crate::ca::Authority;
use crate::ca::tokens::Tokens;
use crate::hub::Hub;
use crate::metrics::{Metrics, Outcome};
use peer::Connection;

/// What the server needs.
#[derive(Clone, Debug)]
pub struct Services {
    /// Discovery and enrolment.
    pub hub: Arc<Hub>,
    /// Certificates.
    pub authority: Arc<Authority>,
    /// Judges the tokens of nodes.
    pub tokens: Arc<dyn Tokens>,
    /// The TLS configuration of new connections; replaced on rotation.
    pub tls: Arc<ArcSwap<ServerConfig>>,
}

/// Serves until `stop` says so, or its sender is gone. Discovery streams are ended then; calls finish.
pub async fn serve(
    listener: TcpListener,
    services: Services,
    mut stop: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let Services {
        hub,
        authority,
        tokens,
        tls,
    } = services;
    let (accepted, connections) = mpsc::channel(HANDSHAKES);
    let mut acceptor = JoinSet::new();
    acceptor.spawn(accept(listener, tls, accepted, hub.metrics().clone()));
    let discovery = discovery::DiscoveryService {
        hub: hub.clone(),
        stop: stop.clone(),
        turns: Arc::new(Semaphore::new(discovery::TURNS)),
    };
    let stopped = async move {
        // An error means that the sender is gone.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let certificates = calls::CertificatesService {
        hub: hub.clone(),
        authority,
        tokens,
    };
    Server::builder()
        // Ends the streams of nodes that vanished well within a lease.
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .max_concurrent_streams(256)
        .add_service(
            AggregatedDiscoveryServiceServer::new(discovery)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(CertificatesServer::new(certificates))
        .add_service(EnrolmentServer::new(calls::EnrolmentService { hub }))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stopped)
        .await
}

async fn accept(
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    accepted: mpsc::Sender<std::io::Result<Connection>>,
    metrics: Metrics,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= HANDSHAKES {
            handshakes.join_next().await;
        }
        // The semaphore is never closed.
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let (socket, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                // Out of descriptors: let some be closed first.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, accepted) = (TlsAcceptor::from(tls.load_full()), accepted.clone());
        let metrics = metrics.clone();
        handshakes.spawn(async move {
            let result = match handshake(&acceptor, socket).await {
                Ok(stream) => {
                    let connection = Connection::new(stream, address, permit);
                    // Closed when the server stops.
                    let _ = accepted.send(Ok(connection)).await;
                    "ok"
                }
                Err(reason) => {
                    tracing::info!(%address, reason, "TLS handshake failed");
                    "failed"
                }
            };
            metrics
                .handshakes
                .get_or_create_owned(&Outcome { result })
                .inc();
        });
    }
}

async fn handshake(
    acceptor: &TlsAcceptor,
    socket: TcpStream,
) -> Result<tokio_rustls::server::TlsStream<TcpStream>, String> {
    socket.set_nodelay(true).map_err(|e| e.to_string())?;
    let done = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket)).await;
    done.map_err(|_| "timeout".to_owned())?
        .map_err(|e| e.to_string())
}

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at the same time.
const HANDSHAKES: usize = 128;
/// Connections at the same time: two per node and some.
const CONNECTIONS: usize = 8192;
/// A node that reconnects names every resource it holds in one message.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;
