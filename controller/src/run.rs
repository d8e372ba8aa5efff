//! Puts the parts together and keeps them running.
//!
//! Order at the start: root, manifests, enrolment, and only then the port: the first table a node gets is
//! complete, so a restart of the controller takes no pod out of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::StatusCode;
use rustls::server::ServerConfig;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ca::{Authority, CaError};
use crate::config::Config;
use crate::enrolment::{Store, StoreError};
use crate::hub::{Hub, Start};
use crate::metrics::{Metrics, Outcome};
use crate::providers::Objects;
use crate::providers::directory::Reader;
use crate::serve::{self, Services};
use crate::watch::{Changes, Watch};
use crate::web::{self, Page};

/// Why the controller cannot start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A port is taken or not allowed.
    #[error("{field}: cannot listen on {address}: {source}")]
    Listen {
        /// Field of the configuration.
        field: &'static str,
        /// Its value.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The authority has no usable root.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The enrolment state cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The manifests cannot be listed.
    #[error("provider.directory: {path}: {source}")]
    Provider {
        /// The directory.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A part ended that should not.
    #[error("{0} ended unexpectedly; please report it")]
    Part(String),
}

/// A controller at work. Dropped, it stops at once.
#[derive(Debug)]
pub struct Controller {
    hub: Arc<Hub>,
    authority: Arc<Authority>,
    address: SocketAddr,
    metrics_address: SocketAddr,
    health_address: SocketAddr,
    stop: watch::Sender<bool>,
    parts: JoinSet<&'static str>,
}

impl Controller {
    /// Starts all parts; returns once nodes can connect.
    pub async fn start(config: &Config) -> Result<Self, RunError> {
        let metrics = Metrics::default();
        let authority = Arc::new(Authority::open(config.authority())?);
        let roots = Watch::new(authority.directory());
        let (store, stored) = Store::open(&config.state_dir)?;
        let watch = Watch::new(&config.provider.directory);
        let mut reader = Reader::new(&config.provider.directory);
        let objects = read(&mut reader, &Changes::Unknown, &metrics);
        let objects = objects.map_err(|source| RunError::Provider {
            path: config.provider.directory.display().to_string(),
            source,
        })?;
        let start = Start {
            settings: config.mesh(),
            objects,
            bundle: authority.bundle(),
            store,
            stored,
        };
        let hub = Hub::new(start, metrics.clone());
        let tls = Arc::new(ArcSwap::new(authority.server_config()?));

        let listener = listen("listen", config.listen).await?;
        let metrics_listener = listen("metricsListen", config.metrics_listen).await?;
        let health_listener = listen("healthListen", config.health_listen).await?;
        let local = |listener: &TcpListener, asked| listener.local_addr().unwrap_or(asked);
        let (stop, stopping) = watch::channel(false);
        let mut controller = Self {
            address: local(&listener, config.listen),
            metrics_address: local(&metrics_listener, config.metrics_listen),
            health_address: local(&health_listener, config.health_listen),
            hub: hub.clone(),
            authority: authority.clone(),
            stop,
            parts: JoinSet::new(),
        };
        let readable = Arc::new(AtomicBool::new(true));
        let mistakes = Arc::new(ArcSwap::from_pointee(mistakes(&reader)));
        controller.part("manifests", {
            let (hub, readable, mistakes) = (hub.clone(), readable.clone(), mistakes.clone());
            provide(reader, watch, hub, readable, mistakes)
        });
        controller.part("certificate authority", {
            rotate(authority.clone(), roots, hub.clone(), tls.clone())
        });
        controller.part("clock", tick(hub.clone()));
        let services = Services {
            hub: hub.clone(),
            authority: authority.clone(),
            tokens: config.tokens.clone(),
            tls,
        };
        let stop = stopping.clone();
        controller.part("gRPC server", async move {
            if let Err(error) = serve::serve(listener, services, stop).await {
                tracing::error!("gRPC server: {error}");
            }
        });
        let status_hub = hub.clone();
        controller.part("metrics server", {
            web::serve(metrics_listener, move |path| {
                metrics_page(path, &metrics, &status_hub, &mistakes.load())
            })
        });
        controller.part("health server", {
            web::serve(health_listener, move |path| {
                let stopping = *stopping.borrow();
                health_page(path, stopping, readable.load(Ordering::Relaxed), &authority)
            })
        });
        tracing::info!(
            address = %controller.address,
            metrics = %controller.metrics_address,
            health = %controller.health_address,
            "controller ready"
        );
        Ok(controller)
    }

    /// Where nodes connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics_address
    }

    /// Where health is.
    pub fn health_address(&self) -> SocketAddr {
        self.health_address
    }

    /// The state, for tests.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// The certificate authority, for tests.
    pub fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// Waits for a part to end, which none should.
    pub async fn failed(&mut self) -> RunError {
        match self.parts.join_next().await {
            Some(Ok(part)) => RunError::Part(part.into()),
            Some(Err(error)) => RunError::Part(format!("a part of the controller ({error})")),
            None => RunError::Part("every part".into()),
        }
    }

    /// Stops: nodes are told to go elsewhere, calls that are under way are finished for a moment.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let drained = async {
            while let Some(ended) = self.parts.join_next().await {
                if matches!(ended, Ok("gRPC server")) {
                    break;
                }
            }
        };
        // A client that reads nothing must not keep us.
        let _ = tokio::time::timeout(STOP_WAIT, drained).await;
        self.parts.shutdown().await;
    }

    fn part(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.parts.spawn(async move {
            part.await;
            name
        });
    }
}

async fn listen(field: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| RunError::Listen {
        field,
        address,
        source,
    })
}

fn read(reader: &mut Reader, changes: &Changes, metrics: &Metrics) -> std::io::Result<Objects> {
    let read = reader.read(changes);
    let result = match &read {
        Err(_) => "failed",
        Ok(_) if reader.mistakes().is_empty() => "ok",
        Ok(_) => "mistakes",
    };
    metrics
        .reloads
        .get_or_create_owned(&Outcome { result })
        .inc();
    metrics
        .manifest_mistakes
        .set(reader.mistakes().len() as i64);
    read
}

async fn provide(
    mut reader: Reader,
    mut watch: Watch,
    hub: Arc<Hub>,
    readable: Arc<AtomicBool>,
    told: Arc<ArcSwap<Vec<String>>>,
) {
    loop {
        let changes = watch.changed().await;
        match read(&mut reader, &changes, hub.metrics()) {
            Ok(objects) => {
                readable.store(true, Ordering::Relaxed);
                told.store(Arc::new(mistakes(&reader)));
                hub.set_objects(objects);
            }
            Err(error) => {
                readable.store(false, Ordering::Relaxed);
                tracing::error!("manifests cannot be read, the last ones stay in force: {error}");
            }
        }
    }
}

fn mistakes(reader: &Reader) -> Vec<String> {
    reader.mistakes().iter().map(ToString::to_string).collect()
}

/// Follows the authority's directory, and renews the controller's own certificate.
async fn rotate(
    authority: Arc<Authority>,
    mut watch: Watch,
    hub: Arc<Hub>,
    tls: Arc<ArcSwap<ServerConfig>>,
) {
    let mut renewal = tokio::time::interval(SERVER_RENEWAL);
    renewal.tick().await;
    // The snapshot that told the nodes of a root which does not sign yet.
    let mut pending: Option<u64> = None;
    set_root_expiry(&authority, &hub);
    loop {
        let held = async {
            match pending {
                Some(seq) => hub.mesh_config_held(seq).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = watch.changed() => match authority.reload() {
                Ok(changed) => {
                    if changed.bundle || (changed.pending && pending.is_none()) {
                        let seq = hub.set_bundle(authority.bundle());
                        tracing::info!("the trust bundle changed");
                        pending = changed.pending.then_some(seq);
                        renew(&authority, &tls);
                    } else if !changed.pending {
                        pending = None;
                    }
                }
                Err(error) => tracing::error!("{error}; the roots in use stay in force"),
            },
            () = held => {
                authority.promote();
                pending = None;
                renew(&authority, &tls);
                set_root_expiry(&authority, &hub);
                tracing::info!("every node trusts the new root; it signs from now on");
            }
            _ = renewal.tick() => renew(&authority, &tls),
        }
    }
}

fn renew(authority: &Authority, tls: &ArcSwap<ServerConfig>) {
    match authority.server_config() {
        Ok(config) => tls.store(config),
        Err(error) => tracing::error!("the controller's certificate was not renewed: {error}"),
    }
}

fn set_root_expiry(authority: &Authority, hub: &Hub) {
    let end = authority.root_not_after().unix_timestamp();
    hub.metrics().root_expiry.set(end as f64);
}

async fn tick(hub: Arc<Hub>) {
    let mut clock = tokio::time::interval(Duration::from_secs(1));
    loop {
        clock.tick().await;
        hub.tick();
    }
}

fn metrics_page(path: &str, metrics: &Metrics, hub: &Hub, mistakes: &[String]) -> Option<Page> {
    let (content_type, body) = match path {
        "/metrics" => (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            metrics.encode(),
        ),
        "/status" => {
            let mut status = hub.status();
            status["mistakes"] = mistakes.into();
            ("application/json", format!("{status:#}\n"))
        }
        _ => return None,
    };
    Some(Page {
        status: StatusCode::OK,
        content_type,
        body,
    })
}

fn health_page(path: &str, stopping: bool, readable: bool, authority: &Authority) -> Option<Page> {
    let problem = match path {
        "/healthz/live" => None,
        "/healthz/ready" if stopping => Some("stopping"),
        "/healthz/ready" if !readable => Some("the manifests cannot be read"),
        "/healthz/ready" if authority.root_not_after() <= OffsetDateTime::now_utc() => {
            Some("the root certificate has expired")
        }
        "/healthz/ready" => None,
        _ => return None,
    };
    Some(Page {
        status: match problem {
            None => StatusCode::OK,
            Some(_) => StatusCode::SERVICE_UNAVAILABLE,
        },
        content_type: "text/plain",
        body: format!("{}\n", problem.unwrap_or("ok")),
    })
}

const STOP_WAIT: Duration = Duration::from_secs(2);
/// The controller's own certificate lives a day.
const SERVER_RENEWAL: Duration = Duration::from_secs(3600);
