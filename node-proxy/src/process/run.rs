//! The worker process: puts the parts together, runs them, and ends them in order.
//!
//! One thread runs everything that is not traffic (discovery, certificates, broker, admin); the data path
//! has threads of its own. On SIGTERM the process stops accepting and ends with its last connection and tunnel, or
//! 5 s before the grace period does; a second signal ends it at once.

use std::io;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use mesh_api::client::ClientConfig;
use mesh_api::config::ConfigError;
use mesh_api::identity::NodeRole;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};

use super::http::{UnixServer, serve_tcp};
use super::lifecycle::Lifecycle;
use crate::admin::Admin;
use crate::admin::logging::{Logging, LoggingError};
use crate::broker::{self, Broker, Parts, Roster};
use crate::config::Config;
use crate::connections::Connections;
use crate::discovery;
use crate::health::{Health, Metrics};
use crate::identity::Identities;
use crate::memory;
use crate::pods::{Host, Pods, PodsCollector};
use crate::process::{descriptor_limit, descriptors};
use crate::seccomp::Profile;
use crate::stock::{self, Supply};
use crate::supervisor::{self, EX_CONFIG, SupervisorError};
use crate::telemetry::Telemetry;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::trace::{Exporting, Tracer};
use crate::tunnel::tls::ServerConfigs;
use crate::worker::{Context, Workers};

/// How long after the first table the start is over: keys are made and certificates fetched by then.
const START: Duration = Duration::from_secs(1);

/// Why the worker ended early.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Privileges, filter, or a call to the kernel.
    #[error(transparent)]
    Process(#[from] SupervisorError),
    /// The file is at fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The log cannot be started.
    #[error("log: {0}")]
    Logging(#[from] LoggingError),
    /// Something that should run for ever has ended.
    #[error("a part of the process ended: {0}")]
    Part(String),
    /// A thread or runtime cannot be started.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

impl RunError {
    /// What the process exits with.
    pub fn code(&self) -> u8 {
        match self {
            // Another start would fail alike.
            Self::Config(_) => EX_CONFIG,
            Self::Process(error) => error.code(),
            Self::Logging(_) | Self::Part(_) | Self::System(..) => 1,
        }
    }
}

/// Runs the worker. `supervisor`: the process it dies with; 0 for none.
pub fn worker(config: &Path, supervisor: u32, allow_privileged: bool) -> Result<(), RunError> {
    let system = |what| move |error| RunError::System(what, error);
    if supervisor != 0
        && !supervisor::tie_to_parent(supervisor).map_err(system("PR_SET_PDEATHSIG"))?
    {
        return Ok(());
    }
    supervisor::harden(Profile::Worker, "worker", allow_privileged)?;
    let config: Config = mesh_api::config::load(config)?;
    let logging = Logging::start(&config.log, config.log_format)?;
    descriptors::make_room(descriptor_limit());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("runtime"))?;
    let result = runtime.block_on(run(config, logging));
    // A blocked file operation must not hold up the end.
    runtime.shutdown_background();
    result
}

async fn run(config: Config, logging: Logging) -> Result<(), RunError> {
    let system = |what| move |error| RunError::System(what, error);
    let mut terminate = signal(SignalKind::terminate()).map_err(system("SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("SIGINT"))?;
    // Only now is nothing lost that came while they were blocked.
    supervisor::unblock_signals().map_err(system("unblocking signals"))?;

    let (tracer, exporter) = Tracer::new(&config.tracing, &config.node);
    let telemetry = Telemetry::with(config.metrics.bounds(), tracer);
    let exporting = exporter.map(Exporting::start);
    let discovery =
        telemetry.register(|registry| discovery::start(discovery_config(&config), registry));
    let supply = Supply::new(
        descriptor_limit(),
        telemetry.register(stock::Metrics::register),
    );
    let (pods, host) = (Pods::new(), Host::new(&supply));
    telemetry.register(|r| r.register_collector(Box::new(PodsCollector::new(&pods, &host))));
    let access_log = AccessLog::start(config.access_log, Arc::clone(&telemetry))
        .map_err(system("access log"))?
        .with_query(config.access_log_query);
    let context = Context {
        node: config.node.as_str().into(),
        table: Arc::clone(&discovery.table),
        identities: Arc::clone(&discovery.identities),
        pods: Arc::clone(&pods),
        host: Arc::clone(&host),
        telemetry: Arc::clone(&telemetry),
        access_log,
        server_configs: ServerConfigs::default(),
        connections: Arc::new(Connections::default()),
    };
    let workers = Workers::start(config.workers, context).map_err(system("worker threads"))?;
    let lifecycle = lifecycle(&workers, &discovery.identities);
    let roster = Roster::new(Parts {
        pods,
        host,
        supply: Arc::clone(&supply),
        table: Arc::clone(&discovery.table),
        identities: Arc::clone(&discovery.identities),
        workers: Arc::clone(&workers),
        limits: config.limits.resolved(descriptor_limit()),
    });
    let broker = Broker::new(
        config.broker_socket.clone(),
        Arc::clone(&roster),
        supply,
        Arc::clone(&lifecycle),
        telemetry.register(broker::Metrics::register),
    );
    let health = Health::new(
        &discovery.table,
        &discovery.identities,
        broker.state(),
        &lifecycle,
    );
    let metrics = Arc::new(Metrics::new(telemetry));
    let drain_time = config.drain_time();
    let loaded = discovery.table.loaded();

    let mut parts: JoinSet<&'static str> = JoinSet::new();
    parts.spawn(async move { match broker.run().await {} });
    parts.spawn(descriptors::keep_room(descriptor_limit()).map(|never| match never {}));
    parts.spawn(
        serve_tcp(
            "metrics",
            config.metrics_listen,
            Arc::clone(&metrics).handler(),
        )
        .map(|never| match never {}),
    );
    parts.spawn(
        serve_tcp("health", config.health_listen, health.clone().handler())
            .map(|never| match never {}),
    );
    tokio::spawn(after_start(loaded));
    serve_admin(
        &mut parts,
        Admin {
            config,
            roster,
            health,
            metrics,
            logging,
            lifecycle: Arc::clone(&lifecycle),
        },
    );

    let ended = tokio::select! {
        () = either(&mut terminate, &mut interrupt) => Ok(()),
        Some(part) = parts.join_next() => Err(part_ended(part)),
    };
    discovery.identities.keep_files(true);
    ended?;
    let deadline = Instant::now() + drain_time;
    tracing::info!(
        seconds = drain_time.as_secs(),
        connections = workers.live(),
        "asked to stop: draining"
    );
    lifecycle.terminate(deadline);
    let result = tokio::select! {
        () = workers.drain(deadline) => Ok(()),
        () = either(&mut terminate, &mut interrupt) => {
            tracing::warn!(connections = workers.live(), "asked to stop again: ending at once");
            Ok(())
        }
        // What is left needs sockets from the broker.
        Some(part) = parts.join_next() => Err(part_ended(part)),
    };
    if let Some(exporting) = exporting {
        exporting.flush().await;
    }
    tracing::info!("ended");
    result
}

fn discovery_config(config: &Config) -> discovery::Config {
    discovery::Config {
        controller: ClientConfig {
            address: config.controller.address.clone(),
            trust_bundle: config.controller.trust_bundle.clone(),
            token_file: config.controller.token_file.clone(),
            node: config.node.clone(),
            role: NodeRole::Proxy,
            // Set by discovery.
            credentials_dir: None,
        },
        state_dir: config.state_dir.clone(),
        secrets_dir: config.secrets_dir.clone(),
    }
}

fn lifecycle(workers: &Arc<Workers>, identities: &Arc<Identities>) -> Arc<Lifecycle> {
    let (workers, identities) = (Arc::clone(workers), Arc::clone(identities));
    Arc::new(Lifecycle::new(move |accept| {
        // Keys belong to who accepts: a process that drains is told of no new pod, and would take them for unwanted.
        identities.keep_files(!accept);
        if accept {
            workers.resume_accepting();
        } else {
            workers.stop_accepting();
        }
    }))
}

/// Ends when the process has most likely done what it does only once.
async fn after_start(mut loaded: watch::Receiver<bool>) {
    if loaded.wait_for(|loaded| *loaded).await.is_ok() {
        tokio::time::sleep(START).await;
        memory::unmap_program();
    }
}

/// The admin interface is for people: traffic does not stop for want of it.
fn serve_admin(parts: &mut JoinSet<&'static str>, admin: Admin) {
    let path = admin.config.admin_socket.clone();
    match UnixServer::bind(&path) {
        Ok(server) => {
            let handler = admin.handler();
            parts.spawn(async move { match server.serve("admin", handler).await {} });
        }
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "no admin socket; its directory must be writable");
        }
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn part_ended(part: Result<&'static str, tokio::task::JoinError>) -> RunError {
    RunError::Part(part.map_or_else(|error| error.to_string(), str::to_owned))
}
