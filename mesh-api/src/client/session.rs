//! The task behind [`Controller`](super::Controller): certificate, connection, renewal, again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::Rng;
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use tokio::time::Instant;

use super::backoff::Backoff;
use super::connect::{ClientError, Connection, End, connect};
use super::credentials::{self, Credentials, KeyRequest};
use super::{Link, Shared};
use crate::identity::NodeIdentity;
use crate::proto::control::certificates_client::CertificatesClient;
use crate::proto::control::{IssueNodeRequest, Role};
use crate::tls;

/// Keeps the connection for ever.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut session = Session::new(shared);
    let mut backoff = Backoff::new(RECONNECT_MIN, RECONNECT_MAX);
    let mut last = String::new();
    loop {
        let began = Instant::now();
        let reason = match session.establish().await {
            Ok(connection) => {
                last.clear();
                session.hold(connection).await
            }
            Err(e) => e.to_string(),
        };
        session.shared.publish(None);
        if began.elapsed() > PROVEN {
            backoff.reset();
        }
        let delay = backoff.delay();
        let address = &session.shared.config.address;
        // The same reason again is no news.
        if reason == last {
            tracing::debug!(address, reason, ?delay, "no connection to the controller");
        } else {
            tracing::warn!(
                address,
                reason,
                ?delay,
                "no connection to the controller, retrying"
            );
        }
        last = reason;
        tokio::time::sleep(delay).await;
    }
}

struct Session {
    shared: Arc<Shared>,
    credentials: Option<Credentials>,
    generation: u64,
}

impl Session {
    /// Begins with what an earlier process left in `credentials_dir`.
    fn new(shared: Arc<Shared>) -> Self {
        let mut session = Self {
            shared,
            credentials: None,
            generation: 0,
        };
        if let Some(path) = session.key_path() {
            match Credentials::load(&path) {
                Ok(Some(found)) if session.is_ours(&found.uri) => session.credentials = Some(found),
                Ok(Some(found)) => {
                    tracing::warn!(path = %path.display(), found = found.uri, "kept node certificate is of another node, getting a new one");
                }
                Ok(None) => {}
                Err(e) => {
                    tracing::warn!(path = %path.display(), error = %e, "kept node certificate cannot be used, getting a new one");
                }
            }
        }
        if let Some(path) = session.bundle_path()
            && let Ok(text) = std::fs::read(&path)
        {
            match credentials::bundle_from_pem(&text) {
                Ok(bundle) if !bundle.is_empty() => session.shared.set_bundle(bundle),
                _ => {
                    tracing::warn!(path = %path.display(), "kept trust bundle cannot be used, starting from the mounted one");
                }
            }
        }
        session
    }

    /// A mutually authenticated connection, with a certificate got before it if there is none.
    async fn establish(&mut self) -> Result<Connection, ClientError> {
        let now = SystemTime::now();
        let key = match &self.credentials {
            Some(held) if held.valid_at(now) => held.certified.clone(),
            _ => {
                let issued = self.issue().await?;
                self.credentials.insert(issued).certified.clone()
            }
        };
        let connection = self.dial(Some(key)).await?;
        self.publish(&connection);
        Ok(connection)
    }

    /// Returns why the connection ended. Renews the certificate, and with it the connection, on time.
    async fn hold(&mut self, mut connection: Connection) -> String {
        let mut backoff = Backoff::new(RENEW_MIN, RENEW_MAX);
        let mut due = self.renewal();
        let mut earliest = Instant::now();
        loop {
            let shared = self.shared.clone();
            tokio::select! {
                end = &mut connection.ended => return match end {
                    Ok(End::Closed(reason)) => format!("connection ended: {reason}"),
                    Ok(End::Unheard(reason)) => {
                        self.credentials = None;
                        format!("connection ended before the controller said anything: {reason}")
                    }
                    Ok(End::CertificateRefused(reason)) => {
                        self.credentials = None;
                        format!("node certificate refused: {reason}")
                    }
                    Err(_) => "connection ended".into(),
                },
                () = shared.refused.notified() => {
                    self.credentials = None;
                    return "node certificate refused".into();
                }
                () = reached(due, earliest) => match self.renew().await {
                    Ok(renewed) => {
                        connection = renewed;
                        due = self.renewal();
                        if due > SystemTime::now() {
                            backoff.reset();
                        }
                        earliest = Instant::now() + backoff.delay();
                    }
                    Err(e) => {
                        let delay = backoff.delay();
                        tracing::warn!(error = %e, ?delay, "node certificate not renewed, retrying");
                        earliest = Instant::now() + delay;
                    }
                },
            }
        }
    }

    async fn renew(&mut self) -> Result<Connection, ClientError> {
        let renewed = self.issue().await?;
        let key = renewed.certified.clone();
        let connection = self.dial(Some(key)).await?;
        self.credentials = Some(renewed);
        self.publish(&connection);
        Ok(connection)
    }

    fn publish(&mut self, connection: &Connection) {
        self.generation += 1;
        tracing::info!(
            address = self.shared.config.address,
            connection = self.generation,
            "connected to the controller"
        );
        self.shared.publish(Some(Link {
            channel: connection.channel.clone(),
            generation: self.generation,
        }));
    }

    /// Has a new key certified for the token in the token file.
    async fn issue(&self) -> Result<Credentials, ClientError> {
        let config = &self.shared.config;
        let token =
            std::fs::read_to_string(&config.token_file).map_err(|source| ClientError::Token {
                path: config.token_file.display().to_string(),
                source,
            })?;
        let connection = self.dial(None).await?;
        let request = KeyRequest::new()?;
        let role = match config.role {
            crate::identity::NodeRole::Proxy => Role::Proxy,
            crate::identity::NodeRole::Agent => Role::Agent,
        };
        let not_issued = |message: String| ClientError::NotIssued {
            node: config.node.clone(),
            role: config.role,
            message,
        };
        let mut client = CertificatesClient::new(connection.channel);
        let call = client.issue_node(IssueNodeRequest {
            token: token.trim().into(),
            node: config.node.clone(),
            role: role.into(),
            csr: request.csr.clone(),
        });
        let response = tokio::time::timeout(ISSUE_TIMEOUT, call)
            .await
            .map_err(|_| not_issued("no answer in time".into()))?
            .map_err(|status| not_issued(format!("{}: {}", status.code(), status.message())))?
            .into_inner();
        let path = self.key_path();
        let is_ours = |uri: &str| self.is_ours(uri);
        let issued = request.complete(response.chain, is_ours, path.as_deref())?;
        if !response.trust_bundle.is_empty() {
            if let Some(path) = self.bundle_path() {
                let text = credentials::bundle_to_pem(&response.trust_bundle);
                credentials::write_private(&path, text.as_bytes())?;
            }
            self.shared.set_bundle(response.trust_bundle);
        }
        Ok(issued)
    }

    /// Dials with the roots last told by the controller. If it does not prove itself by those, with
    /// those of the mounted file, which whoever runs the mesh may have replaced while this node was away.
    async fn dial(&self, key: Option<Arc<CertifiedKey>>) -> Result<Connection, ClientError> {
        let address = &self.shared.config.address;
        let Some(told) = self.shared.bundle.load_full() else {
            return connect(address, self.mounted_roots()?, key).await;
        };
        let roots = tls::roots(told.iter().map(Vec::as_slice))?;
        match connect(address, roots, key.clone()).await {
            Err(e) if e.is_untrusted() => {
                let Ok(mounted) = self.mounted_roots() else {
                    return Err(e);
                };
                connect(address, mounted, key).await
            }
            other => other,
        }
    }

    fn mounted_roots(&self) -> Result<Arc<RootCertStore>, ClientError> {
        let path = &self.shared.config.trust_bundle;
        let failed = |reason: String| ClientError::TrustBundle {
            path: path.display().to_string(),
            reason,
        };
        let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
        let bundle = credentials::bundle_from_pem(&text).map_err(|e| failed(e.to_string()))?;
        tls::roots(bundle.iter().map(Vec::as_slice)).map_err(|e| failed(e.to_string()))
    }

    /// Half of the certificate's life, give or take a tenth of that.
    fn renewal(&self) -> SystemTime {
        let share = rand::rng().random_range(0.45..=0.55);
        match &self.credentials {
            Some(held) => held.life(share),
            None => SystemTime::now(),
        }
    }

    fn is_ours(&self, uri: &str) -> bool {
        let config = &self.shared.config;
        uri.parse::<NodeIdentity>()
            .is_ok_and(|id| id.node == config.node && id.role == config.role)
    }

    fn key_path(&self) -> Option<PathBuf> {
        let config = &self.shared.config;
        let name = format!("node-{}.pem", config.role);
        config.credentials_dir.as_ref().map(|dir| dir.join(name))
    }

    fn bundle_path(&self) -> Option<PathBuf> {
        let dir = self.shared.config.credentials_dir.as_ref();
        dir.map(|dir| dir.join("trust-bundle.pem"))
    }
}

/// Waits for a moment of the wall clock, which may jump, and for one of the monotonic clock.
async fn reached(due: SystemTime, earliest: Instant) {
    tokio::time::sleep_until(earliest).await;
    while let Ok(left) = due.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(CLOCK_CHECK)).await;
        if left.is_zero() {
            return;
        }
    }
}

const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(15);
/// A connection that lasted this long was a good one: the next delay is short again.
const PROVEN: Duration = Duration::from_secs(5);
const RENEW_MIN: Duration = Duration::from_secs(1);
const RENEW_MAX: Duration = Duration::from_secs(150);
const ISSUE_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon a jump of the wall clock is noticed.
const CLOCK_CHECK: Duration = Duration::from_secs(60);
