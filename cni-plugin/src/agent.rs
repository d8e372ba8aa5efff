//! The node agent: enters pods' network namespaces, programs capture, hands sockets to the proxies.
//!
//! Its death disturbs nothing: rules, routes and the proxies' sockets stay. A successor reads the
//! records in the state directory, is given the listeners back, and goes on. It never un-enrols a pod
//! because it is told to stop; `warren-cni uninstall` does that.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::client::{ClientConfig, Controller};
use mesh_api::identity::NodeRole;
use mesh_api::proto::cni::{Request, Response, Status, Uninstall, request::Body};
use mesh_api::seqpacket::Connection;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub mod broker;
pub mod chain;
pub mod config;
pub mod control;
pub mod enrol;
pub mod netns;
pub mod node;
pub mod record;
mod report;
pub mod rules;
pub mod running;
mod server;
pub mod sockets;

use broker::Broker;
use chain::Chain;
use config::{AgentConfig, LogFormat};
use control::Control;
use netns::Netns;
use node::Node;
use record::Store;
use running::Running;
use sockets::Sockets;

/// Why the agent cannot run. The text is for the person who started it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// `warren-cni agent`.
pub fn main(config: &Path) -> Result<(), Error> {
    let config: AgentConfig = mesh_api::config::load(config)?;
    start_log(&config);
    raise_descriptor_limit();
    runtime()?.block_on(async {
        let controller = Controller::start(client_config(&config));
        let agent = Agent::start(&config, Arc::new(controller.clone()))?;
        let node = Arc::clone(&agent.node);
        let follow = tokio::spawn(control::follow(controller, Arc::clone(&agent.node)));
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let result = tokio::select! {
            result = agent.run() => result,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        };
        follow.abort();
        if node.leaving() {
            remove_traces(&config);
            tracing::info!("agent ends; this node has left the mesh");
        } else {
            tracing::info!("agent ends; enrolled pods stay enrolled");
        }
        result
    })
}

/// `warren-cni uninstall`: asks the agent that runs, or is one itself until it is done.
pub fn uninstall(config: &Path, deadline: Duration) -> Result<(), Error> {
    let config: AgentConfig = mesh_api::config::load(config)?;
    start_log(&config);
    raise_descriptor_limit();
    runtime()?.block_on(async {
        if let Ok(connection) = Connection::connect(&config.cni_socket) {
            return ask_to_uninstall(&connection, deadline).await;
        }
        let controller = Controller::start(client_config(&config));
        let mut agent = Agent::start(&config, Arc::new(controller))?;
        agent.leave_chain()?;
        let node = Arc::clone(&agent.node);
        let done = tokio::select! {
            ended = agent.run() => return ended,
            done = node.leave(Instant::now() + deadline) => done,
        };
        remove_traces(&config);
        if done {
            Ok(())
        } else {
            Err("captured connections did not end by the deadline; they were cut".into())
        }
    })
}

/// `warren-cni status`: prints what the agent says of itself. Fails if it is away, or, unless only asked whether it is
/// `alive`, not ready: a liveness and a readiness probe.
pub fn status(config: &Path, alive: bool) -> Result<(), Error> {
    let config: AgentConfig = mesh_api::config::load(config)?;
    let report = runtime()?.block_on(status_of(&config.cni_socket))?;
    println!("{report:#}");
    match alive || report["ready"] == true {
        true => Ok(()),
        false => Err(format!("not ready: {}", report["problems"]).into()),
    }
}

/// Asks the agent behind this socket.
pub async fn status_of(socket: &Path) -> Result<serde_json::Value, Error> {
    let away = |error: std::io::Error| -> Error {
        let socket = socket.display();
        format!("the agent does not answer at {socket}: {error}; is it running?").into()
    };
    let ask = async {
        let connection = Connection::connect(socket)?;
        let request = Request {
            body: Some(Body::Status(Status {})),
        };
        connection.send(&request, &[]).await?;
        match connection.receive::<Response>().await? {
            Some((response, _)) => Ok(response.report),
            None => Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
        }
    };
    let answer = tokio::time::timeout(STATUS_PATIENCE, ask)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(away)?;
    Ok(serde_json::from_str(&answer)?)
}

/// A running agent. Its tasks end with it.
pub struct Agent {
    /// The node's pods.
    pub node: Arc<Node>,
    broker: Arc<Broker>,
    chain: Chain,
    keep_chain: Option<JoinHandle<()>>,
    config: AgentConfig,
}

impl Agent {
    /// Takes up what an earlier agent left. Needs root and a tokio runtime.
    pub fn start(config: &AgentConfig, control: Arc<dyn Control>) -> Result<Self, Error> {
        let store = Store::open(&config.state_dir)?;
        let mark = store.mark()?;
        for socket in [&config.broker_socket, &config.cni_socket] {
            if let Some(directory) = socket.parent() {
                std::fs::create_dir_all(directory)
                    .map_err(|e| format!("{}: {e}", directory.display()))?;
            }
        }
        let sockets = Sockets::start(mark, Netns::host()?)?;
        let broker = Broker::new(store.clone(), sockets, config.node_addresses.clone());
        let unknown =
            (config.cni.install).then(|| "the CNI chain has not been looked at".to_owned());
        let (problem, chain_problem) = watch::channel(unknown);
        let node = Node::start(
            control,
            Arc::clone(&broker),
            store,
            mark,
            &config.exclude_namespaces,
            Running {
                proc_dir: config.cni.proc_dir.clone(),
                netns_dir: config.cni.netns_dir.clone(),
            },
            chain_problem,
        )?;
        let chain = Chain::new(config);
        let keep_chain = config
            .cni
            .install
            .then(|| tokio::spawn(chain.clone().keep(problem)));
        tracing::info!(
            node = config.node,
            mark = format!("{:#010x}", mark.0),
            "agent starts"
        );
        Ok(Self {
            node,
            broker,
            chain,
            keep_chain,
            config: config.clone(),
        })
    }

    /// Serves until something that cannot be done without fails.
    pub async fn run(mut self) -> Result<(), Error> {
        let config = self.config.clone();
        let (uninstall, asked) = mpsc::channel(1);
        let broker = Arc::clone(&self.broker);
        let node = Arc::clone(&self.node);
        tokio::select! {
            ended = Arc::clone(&broker).listen(&config.broker_socket, config.proxy_uid) => {
                Err(failed("broker socket", &config.broker_socket, ended))
            }
            ended = server::listen(&config.cni_socket, Arc::clone(&node), uninstall) => {
                Err(failed("CNI socket", &config.cni_socket, ended))
            }
            () = Arc::clone(&node).run() => Err("the report task ended".into()),
            never = async {
                broker.open_host_listeners().await;
                std::future::pending::<()>().await
            } => { let () = never; Ok(()) }
            result = self.uninstalled(asked) => result,
        }
    }

    /// Waits for the request to leave the chain, does it, and goes on waiting.
    async fn uninstalled(&mut self, mut asked: mpsc::Receiver<()>) -> Result<(), Error> {
        if asked.recv().await.is_some()
            && let Err(error) = self.leave_chain()
        {
            tracing::error!(%error, "CNI: the plugin stays in the chain; remove its entry by hand");
        }
        // Those who asked wait for this.
        drop(asked);
        std::future::pending().await
    }

    fn leave_chain(&mut self) -> Result<(), Error> {
        if let Some(keep) = self.keep_chain.take() {
            keep.abort();
        }
        if self.config.cni.install {
            self.chain.remove()?;
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(keep) = &self.keep_chain {
            keep.abort();
        }
    }
}

fn failed(what: &str, path: &Path, ended: std::io::Result<()>) -> Error {
    match ended {
        Ok(()) => format!("{what} {}: closed", path.display()).into(),
        Err(error) => format!("{what} {}: {error}", path.display()).into(),
    }
}

/// What is left of an agent whose node has left the mesh: nobody is to find a socket that leads nowhere, nor a record
/// of pods that are in no mesh.
fn remove_traces(config: &AgentConfig) {
    let gone = |result: std::io::Result<()>, path: &Path| match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "it stays");
        }
        _ => {}
    };
    for socket in [&config.broker_socket, &config.cni_socket] {
        gone(std::fs::remove_file(socket), socket);
    }
    gone(
        std::fs::remove_dir_all(&config.state_dir),
        &config.state_dir,
    );
}

async fn ask_to_uninstall(connection: &Connection, deadline: Duration) -> Result<(), Error> {
    let request = Request {
        body: Some(Body::Uninstall(Uninstall {
            deadline_seconds: deadline.as_secs(),
        })),
    };
    connection.send(&request, &[]).await?;
    let patience = deadline + Duration::from_secs(30);
    let answer = tokio::time::timeout(patience, connection.receive::<Response>()).await;
    match answer.map_err(|_| "the agent did not answer in time")?? {
        Some((Response { code: 0, .. }, _)) => Ok(()),
        Some((
            Response {
                message, details, ..
            },
            _,
        )) => Err(format!("{message}: {details}").into()),
        None => Err("the agent ended before it was done; try again".into()),
    }
}

fn client_config(config: &AgentConfig) -> ClientConfig {
    ClientConfig {
        address: config.controller.address.clone(),
        trust_bundle: config.controller.trust_bundle.clone(),
        token_file: config.controller.token_file.clone(),
        node: config.node.clone(),
        role: NodeRole::Agent,
        credentials_dir: Some(config.state_dir.join("credentials")),
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

fn start_log(config: &AgentConfig) {
    // Checked when the configuration was loaded.
    let filter = tracing_subscriber::EnvFilter::new(&config.log);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Each enrolled pod takes four descriptors.
fn raise_descriptor_limit() {
    if let Err(error) = mesh_api::descriptors::raise_limit() {
        tracing::warn!(%error, "the descriptor limit cannot be raised");
    }
}

/// It answers at once, from memory.
const STATUS_PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts at what another process must make possible.
const RETRY: Duration = Duration::from_millis(200);
