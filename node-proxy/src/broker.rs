//! The client of the agent's socket: receives listeners and sockets, and keeps what it was given.
//!
//! The protocol is `mesh-api/proto/broker.proto`. The agent may be away for hours and come back as another
//! process: everything that was received stays in the [`Roster`] and keeps being served, duplicates of all
//! listeners are offered to the agent that lacks them, and requests for sockets are made again.
//!
//! Two proxies may be connected at once. Each accepts until the newest has said Ready; the agent then sends
//! Drain to the others, and Resume if the newest dies. A Drain holds for the connection it came on: an
//! agent that was restarted does not know of it and decides anew.
//!
//! Bounded: one packet is read at a time, at most [`OUTGOING`] wait to be sent, a stock has one request
//! under way. An agent that does not read is disconnected.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_api::seqpacket::Connection;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rand::Rng;
use tokio::sync::watch;

use crate::process::lifecycle::Lifecycle;
use crate::stock::Supply;

mod messages;
mod roster;
mod session;
#[cfg(test)]
mod tests;

pub use roster::{Parts, Roster, Stage};

/// Messages that wait to be sent.
const OUTGOING: usize = 1024;
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How the client stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// A connection to an agent is open.
    pub connected: bool,
    /// A whole snapshot has been received, now or earlier, and every pod and listener in it is served.
    pub ready: bool,
}

/// The client.
pub struct Broker {
    socket: PathBuf,
    instance: String,
    roster: Arc<Roster>,
    supply: Arc<Supply>,
    lifecycle: Arc<Lifecycle>,
    metrics: Metrics,
    state: watch::Sender<State>,
    drained_by_agent: AtomicBool,
}

impl Broker {
    /// Connects once [`Broker::run`] is polled.
    pub fn new(
        socket: PathBuf,
        roster: Arc<Roster>,
        supply: Arc<Supply>,
        lifecycle: Arc<Lifecycle>,
        metrics: Metrics,
    ) -> Self {
        Self {
            socket,
            instance: instance(),
            roster,
            supply,
            lifecycle,
            metrics,
            state: watch::Sender::new(State::default()),
            drained_by_agent: AtomicBool::new(false),
        }
    }

    /// Follows how the client stands.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// What was received.
    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// Connects, again and again. Never ends.
    pub async fn run(&self) -> Infallible {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.connect() {
                Ok(connection) => {
                    tracing::info!(socket = %self.socket.display(), "connected to the agent");
                    let connected = Connected::new(self);
                    let (error, welcomed) = session::run(self, &connection).await;
                    drop(connected);
                    // An agent that speaks is worth asking again at once; one that hangs up is not.
                    if welcomed {
                        pause = FIRST_PAUSE;
                    }
                    tracing::warn!(%error, "connection to the agent ended; serving on");
                }
                Err(error) => {
                    tracing::debug!(socket = %self.socket.display(), %error, "the agent is away; serving on");
                }
            }
            let jittered = pause.mul_f64(rand::rng().random_range(0.75..1.25));
            tokio::time::sleep(jittered).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn connect(&self) -> std::io::Result<Connection> {
        let connection = Connection::connect(&self.socket)?;
        let peer = connection.peer()?.uid;
        if peer != 0 && peer != nix::unistd::geteuid().as_raw() {
            return Err(std::io::Error::new(
                std::io::ErrorKind::PermissionDenied,
                format!(
                    "the process behind the socket runs as uid {peer}, not as root: not the agent"
                ),
            ));
        }
        Ok(connection)
    }
}

/// Sorts by the time of the start, and differs for each.
fn instance() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    format!("{:020}-{:08x}", now.as_nanos(), rand::rng().random::<u32>())
}

/// Shows the client as connected until dropped.
struct Connected<'a>(&'a Broker);

impl<'a> Connected<'a> {
    fn new(broker: &'a Broker) -> Self {
        broker.metrics.connected.set(1);
        broker.state.send_modify(|state| state.connected = true);
        Self(broker)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.metrics.connected.set(0);
        self.0.state.send_modify(|state| state.connected = false);
        self.0.roster.forget_requests();
    }
}

/// Metrics of the client.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    connected: Gauge<i64, AtomicI64>,
    messages: Family<MessageLabels, Counter>,
    requests: Family<ResultLabels, Counter<u64, AtomicU64>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MessageLabels {
    direction: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "broker_connected",
            "Whether the agent's socket is connected",
            metrics.connected.clone(),
        );
        registry.register(
            "broker_messages",
            "Messages exchanged with the agent, by direction and kind",
            metrics.messages.clone(),
        );
        registry.register(
            "broker_socket_requests",
            "Answers of the agent to requests for sockets: ok, partial or refused",
            metrics.requests.clone(),
        );
        metrics
    }

    fn message(&self, direction: &'static str, kind: &'static str) {
        self.messages
            .get_or_create(&MessageLabels { direction, kind })
            .inc();
    }

    fn request(&self, result: &'static str) {
        self.requests.get_or_create(&ResultLabels { result }).inc();
    }
}
