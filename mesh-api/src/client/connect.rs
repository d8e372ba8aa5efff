//! One TLS connection to the controller with HTTP/2 on it, which tells when and why it ended.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{AlertDescription, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::credentials::CredentialsError;
use crate::{names, tls};

/// An established connection.
pub(super) struct Connection {
    pub(super) channel: Channel,
    /// Resolves when the connection has ended.
    pub(super) ended: oneshot::Receiver<End>,
}

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// By either end or the network.
    Closed(String),
    /// Before the controller said anything, which is what refusing our certificate may look like:
    /// its alert is lost when it closes with bytes of ours unread.
    Unheard(String),
    /// The controller does not take our certificate.
    CertificateRefused(String),
}

/// Dials the controller and proves it to be the controller. `client`: what to prove ourselves with.
pub(super) async fn connect(
    address: &str,
    roots: Arc<RootCertStore>,
    client: Option<Arc<CertifiedKey>>,
) -> Result<Connection, ClientError> {
    let failed = |source| ClientError::Connect {
        address: address.into(),
        source,
    };
    let config = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match client {
        Some(key) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key))),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A ticket would bring back the certificate of an earlier connection.
    config.resumption = Resumption::disabled();
    let name =
        ServerName::try_from(names::CONTROLLER_NAME).map_err(|e| failed(io::Error::other(e)))?;

    let dial = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
    };
    let stream = tokio::time::timeout(DIAL_TIMEOUT, dial)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(failed)?;

    let (sender, ended) = oneshot::channel();
    let mut once = Some(TokioIo::new(Watched {
        io: stream,
        ended: Some(sender),
        end: None,
        heard: false,
    }));
    // The channel would call this again to reconnect by itself. It must not: the session decides
    // with which certificate and roots a connection is made.
    let connector = tower::service_fn(move |_| {
        let io = once.take().ok_or(io::ErrorKind::NotConnected);
        async move { io.map_err(io::Error::from) }
    });
    let channel = Endpoint::from_shared(format!("http://{}", names::CONTROLLER_NAME))?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector(connector)
        .await?;
    Ok(Connection { channel, ended })
}

/// Notes why the stream ends and tells it when the stream is let go.
struct Watched<T> {
    io: T,
    ended: Option<oneshot::Sender<End>>,
    end: Option<io::Error>,
    /// Something has been read.
    heard: bool,
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            let reason = self
                .end
                .as_ref()
                .map_or("closed".into(), io::Error::to_string);
            let end = match &self.end {
                Some(e) if refuses_certificate(e) => End::CertificateRefused(reason),
                _ if self.heard => End::Closed(reason),
                _ => End::Unheard(reason),
            };
            // Nobody listens once the connection was replaced.
            let _ = ended.send(end);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buffer) {
            Poll::Ready(Err(e)) => {
                let kept = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
                self.end = Some(match kept {
                    Some(tls) => io::Error::new(e.kind(), tls.clone()),
                    None => io::Error::new(e.kind(), e.to_string()),
                });
                Poll::Ready(Err(e))
            }
            other => {
                self.heard |= buffer.filled().len() > before;
                other
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// In TLS 1.3 a client learns that its certificate is refused only when it first reads.
fn refuses_certificate(error: &io::Error) -> bool {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        tls,
        Some(rustls::Error::AlertReceived(
            AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::CertificateRequired
        ))
    )
}

/// Why there is no connection or no certificate.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file with the roots for first contact.
    #[error("trust bundle {path}: {reason}")]
    TrustBundle {
        /// File name.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The token cannot be read.
    #[error("token file {path}: {source}")]
    Token {
        /// File name.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The controller cannot be reached, or is not proven to be the controller.
    #[error("controller {address}: {source}")]
    Connect {
        /// Its address.
        address: String,
        /// What the system or TLS said.
        source: io::Error,
    },
    /// HTTP/2 could not be begun.
    #[error("controller: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// This side's TLS settings.
    #[error("TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
    /// The controller did not issue a node certificate.
    #[error("the controller issued no certificate for {role} of node {node}: {message}")]
    NotIssued {
        /// The node asked for.
        node: String,
        /// The process asked for.
        role: crate::identity::NodeRole,
        /// Its answer.
        message: String,
    },
    /// The issued certificate is not what was asked for, or cannot be kept.
    #[error("node certificate: {0}")]
    Credentials(#[from] CredentialsError),
}

impl ClientError {
    /// The other end did not prove to be the controller.
    pub(super) fn is_untrusted(&self) -> bool {
        let Self::Connect { source, .. } = self else {
            return false;
        };
        let tls = source
            .get_ref()
            .and_then(|e| e.downcast_ref::<rustls::Error>());
        matches!(tls, Some(rustls::Error::InvalidCertificate(_)))
    }
}

/// TCP and TLS handshake together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// A table arrives in few round trips, and no more than this waits in memory.
const WINDOW: u32 = 1 << 20;
