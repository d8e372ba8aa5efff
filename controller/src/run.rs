//! Puts the parts together and keeps them running.
//!
//! Order at the start: root, objects, enrolment, and only then the port: the first table a node gets is
//! complete, so a restart of the controller takes no pod out of it. Health answers from the beginning, as an
//! API server may be long in coming.

mod directory;
mod kubernetes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::StatusCode;
use parking_lot::Mutex;
use rustls::server::ServerConfig;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::ca::tokens::Tokens;
use crate::ca::{Authority, CaError, Roots};
use crate::config::{Backing, Config};
use crate::enrolment::StoreError;
use crate::hub::{Hub, Keeper, Start};
use crate::metrics::Metrics;
use crate::providers::Objects;
use crate::providers::kubernetes::ConnectError;
use crate::serve::{self, Services};
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
    /// The configuration was not checked.
    #[error("{0}")]
    Config(String),
    /// The API server cannot be spoken to.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It can, but does not do what is needed.
    #[error("provider.kubernetes: {0}")]
    Api(#[from] kube::Error),
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
    parts: Parts,
}

/// What a provider brings: everything that the controller stands on.
struct Foundation {
    objects: Objects,
    roots: Roots,
    keeper: Keeper,
    tokens: Arc<dyn Tokens>,
    provider: Provider,
}

/// The parts that keep up with the provider.
enum Provider {
    Directory(Box<directory::Following>),
    Kubernetes(Box<kubernetes::Following>),
}

/// The running parts, by name.
#[derive(Debug, Default)]
struct Parts {
    running: JoinSet<&'static str>,
    /// Those that end when they are told to, and have something to finish.
    ending: Vec<&'static str>,
}

/// What parts share.
#[derive(Clone)]
struct Common {
    hub: Arc<Hub>,
    authority: Arc<Authority>,
    tls: Arc<ArcSwap<ServerConfig>>,
    health: Arc<Health>,
    stop: watch::Receiver<bool>,
}

/// What keeps the controller from being ready, and what is to be told of objects.
#[derive(Debug, Default)]
struct Health {
    problems: Mutex<BTreeMap<&'static str, String>>,
    mistakes: Mutex<Vec<String>>,
    authority: OnceLock<Arc<Authority>>,
}

impl Controller {
    /// Starts all parts; returns once nodes can connect.
    pub async fn start(config: &Config) -> Result<Self, RunError> {
        let mut mistakes = Vec::new();
        let backing = config.backing(&mut mistakes);
        let backing = backing.ok_or_else(|| RunError::Config(mistakes.join("; ")))?;
        let metrics = Metrics::default();
        let listener = listen("listen", config.listen).await?;
        let metrics_listener = listen("metricsListen", config.metrics_listen).await?;
        let health_listener = listen("healthListen", config.health_listen).await?;
        let local = |listener: &TcpListener, asked| listener.local_addr().unwrap_or(asked);
        let addresses = [
            local(&listener, config.listen),
            local(&metrics_listener, config.metrics_listen),
            local(&health_listener, config.health_listen),
        ];
        let [address, metrics_address, health_address] = addresses;
        let (stop, stopping) = watch::channel(false);
        let mut parts = Parts::default();
        let health = Arc::new(Health::default());
        health.set("start", Some("starting".into()));
        parts.add("health server", {
            let (health, stopping) = (health.clone(), stopping.clone());
            web::serve(health_listener, move |path| {
                health_page(path, *stopping.borrow(), &health)
            })
        });

        let Foundation {
            objects,
            roots,
            keeper,
            tokens,
            provider,
        } = match backing {
            Backing::Directory {
                manifests,
                ca,
                tokens,
                state,
            } => directory::open(config, &metrics, (&manifests, &ca, &tokens, &state))?,
            Backing::Kubernetes { provider, secret } => {
                kubernetes::open(config, &metrics, &health, (&provider, &secret)).await?
            }
        };
        let authority = Arc::new(Authority::new(config.authority(), roots));
        // Set once: nobody else does.
        let _ = health.authority.set(authority.clone());
        let start = Start {
            settings: config.mesh(),
            objects,
            bundle: authority.bundle(),
            keeper,
        };
        let hub = Hub::new(start, metrics.clone());
        let tls = Arc::new(ArcSwap::new(authority.server_config()?));
        set_root_expiry(&authority, &hub);
        let common = Common {
            hub: hub.clone(),
            authority: authority.clone(),
            tls: tls.clone(),
            health: health.clone(),
            stop: stopping.clone(),
        };
        match provider {
            Provider::Directory(following) => following.start(&mut parts, &common),
            Provider::Kubernetes(following) => following.start(&mut parts, &common).await?,
        }
        parts.add("clock", tick(hub.clone()));
        let services = Services {
            hub: hub.clone(),
            authority: authority.clone(),
            tokens,
            tls,
        };
        parts.add_ending("gRPC server", async move {
            if let Err(error) = serve::serve(listener, services, stopping).await {
                tracing::error!("gRPC server: {error}");
            }
        });
        parts.add("metrics server", {
            let (hub, health) = (hub.clone(), health.clone());
            web::serve(metrics_listener, move |path| {
                metrics_page(path, &metrics, &hub, &health.mistakes.lock())
            })
        });
        health.set("start", None);
        tracing::info!(
            address = %address,
            metrics = %metrics_address,
            health = %health_address,
            "controller ready"
        );
        Ok(Self {
            hub,
            authority,
            address,
            metrics_address,
            health_address,
            stop,
            parts,
        })
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
        match self.parts.running.join_next().await {
            Some(Ok(part)) => RunError::Part(part.into()),
            Some(Err(error)) => RunError::Part(format!("a part of the controller ({error})")),
            None => RunError::Part("every part".into()),
        }
    }

    /// Stops: nodes are told to go elsewhere, calls that are under way are finished for a moment.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let drained = async {
            let mut ending = std::mem::take(&mut self.parts.ending);
            while !ending.is_empty() {
                match self.parts.running.join_next().await {
                    Some(Ok(ended)) => ending.retain(|name| *name != ended),
                    Some(Err(_)) => {}
                    None => break,
                }
            }
        };
        // A client that reads nothing must not keep us.
        let _ = tokio::time::timeout(STOP_WAIT, drained).await;
        self.parts.running.shutdown().await;
    }
}

impl Parts {
    fn add(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.running.spawn(async move {
            part.await;
            name
        });
    }

    /// One that ends when the controller is told to stop, and is waited for then.
    fn add_ending(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.ending.push(name);
        self.add(name, part);
    }
}

impl Health {
    /// What a part has to say against being ready; absent: nothing.
    fn set(&self, part: &'static str, problem: Option<String>) {
        let mut problems = self.problems.lock();
        match problem {
            Some(problem) => drop(problems.insert(part, problem)),
            None => drop(problems.remove(part)),
        }
    }

    fn problem(&self) -> Option<String> {
        let authority = self.authority.get();
        if authority.is_some_and(|a| a.root_not_after() <= OffsetDateTime::now_utc()) {
            return Some("the root certificate has expired".into());
        }
        self.problems.lock().values().next().cloned()
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

/// Where roots are kept.
trait RootSource: Send {
    /// Waits until they may be others than before. Cancel safe.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
    /// Reads them.
    fn read(&mut self) -> impl Future<Output = Result<Roots, CaError>> + Send;
}

/// Follows the roots, and renews the controller's own certificate.
async fn rotate(common: Common, mut source: impl RootSource) {
    let Common {
        hub,
        authority,
        tls,
        ..
    } = common;
    let mut renewal = tokio::time::interval(SERVER_RENEWAL);
    renewal.tick().await;
    // The snapshot that told the nodes of a root which does not sign yet.
    let mut pending: Option<u64> = None;
    // When to read again what could not be read.
    let mut again: Option<Instant> = None;
    loop {
        let changed = async {
            match again {
                Some(at) => drop(tokio::time::timeout_at(at, source.changed()).await),
                None => source.changed().await,
            }
        };
        let held = async {
            match pending {
                Some(seq) => hub.mesh_config_held(seq).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = changed => match source.read().await {
                Ok(roots) => {
                    again = None;
                    let changed = authority.take(roots);
                    if changed.bundle || (changed.pending && pending.is_none()) {
                        let seq = hub.set_bundle(authority.bundle());
                        tracing::info!("the trust bundle changed");
                        pending = changed.pending.then_some(seq);
                        renew(&authority, &tls);
                    } else if !changed.pending {
                        pending = None;
                    }
                }
                Err(error) => {
                    again = Some(Instant::now() + READ_AGAIN);
                    tracing::error!("{error}; the roots in use stay in force");
                }
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

fn health_page(path: &str, stopping: bool, health: &Health) -> Option<Page> {
    let problem = match path {
        "/healthz/live" => None,
        "/healthz/ready" if stopping => Some("stopping".to_owned()),
        "/healthz/ready" => health.problem(),
        _ => return None,
    };
    Some(Page {
        status: match problem {
            None => StatusCode::OK,
            Some(_) => StatusCode::SERVICE_UNAVAILABLE,
        },
        content_type: "text/plain",
        body: format!("{}\n", problem.as_deref().unwrap_or("ok")),
    })
}

const STOP_WAIT: Duration = Duration::from_secs(2);
/// The controller's own certificate lives a day.
const SERVER_RENEWAL: Duration = Duration::from_secs(3600);
const READ_AGAIN: Duration = Duration::from_secs(5);
