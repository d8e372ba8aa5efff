//! The tunnels of one worker thread, pooled by (caller identity, callee identity, address).
//!
//! Invariants:
//! - A tunnel is handed out only while both certificates are valid and are the newest, under the trust
//!   bundle in force; streams it carries live on after that.
//! - At most one dial per key is under way; everyone who needs the tunnel waits for it and hears its
//!   reason when it fails. A waiter that gives up does not cancel it.
//! - A tunnel past its share of streams stays in use for those; the next stream opens another one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::SendRequest;
use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio::time::Instant;

use super::dial::{Dialed, Driving, dial};
use super::tls::{Kind, Refusal, client_config};
use crate::identity::{Identities, LocalIdentity, Trust};
use crate::maps::FastMap;
use crate::pods::{Host, Pod};
use crate::stock::Stock;
use crate::telemetry::{GaugeGuard, HandshakeLabels, SideLabels, Telemetry};

/// Streams on one tunnel before the next is opened.
const STREAMS_PER_TUNNEL: usize = 1024;
/// A tunnel without streams is closed after this.
const IDLE: Duration = Duration::from_secs(300);
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Keys from which on those without a tunnel are forgotten, sessions included.
const MAX_UNUSED: usize = 4096;

/// What a tunnel is shared by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who dials.
    pub caller: Identity,
    /// Who must answer.
    pub callee: Identity,
    /// The node's or, for HBONE, the pod's address and port.
    pub address: SocketAddr,
    /// Which protocol.
    pub kind: Kind,
    /// HBONE only: the pod the socket belongs to, since the callee judges its address.
    pub source: Option<Arc<str>>,
}

/// Whose sockets a tunnel is dialled with.
#[derive(Clone, Debug)]
pub enum Dialer {
    /// The node's.
    Node(Arc<Host>),
    /// A pod's: HBONE.
    Pod(Arc<Pod>),
}

impl Dialer {
    fn stock(&self) -> &Stock {
        match self {
            Self::Node(host) => &host.stock,
            Self::Pod(pod) => &pod.stock,
        }
    }
}

/// Tunnels of one worker.
#[derive(Debug)]
pub struct Pool {
    entries: Mutex<FastMap<Key, Entry>>,
    identities: Arc<Identities>,
    telemetry: Arc<Telemetry>,
    /// Streams of this side.
    streams: Gauge,
}

#[derive(Debug, Default)]
struct Entry {
    tunnels: Vec<Arc<Tunnel>>,
    dialing: Option<watch::Receiver<Outcome>>,
    tls: Option<Tls>,
}

/// `None` while the dial is under way.
type Outcome = Option<Result<(), Refusal>>;

#[derive(Clone, Debug)]
struct Tls {
    config: Arc<ClientConfig>,
    generations: (u64, u64),
}

#[derive(Debug)]
struct Tunnel {
    send: SendRequest<Bytes>,
    streams: AtomicUsize,
    closed: AtomicBool,
    /// It was given up since the peer did not answer. Set before its streams hear of its end.
    silent: AtomicBool,
    generations: (u64, u64),
    valid_until: SystemTime,
    large_heads: bool,
    idle_since: Mutex<Instant>,
}

/// A place for one stream on a tunnel.
#[derive(Debug)]
pub struct Slot {
    /// Ready to open the stream.
    pub send: SendRequest<Bytes>,
    tunnel: Arc<Tunnel>,
    _open: GaugeGuard,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.tunnel.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            *self.tunnel.idle_since.lock() = Instant::now();
        }
    }
}

/// What the pool does next for a caller.
enum Step {
    Use(Arc<Tunnel>),
    Wait(watch::Receiver<Outcome>),
}

impl Pool {
    /// An empty pool.
    pub fn new(identities: Arc<Identities>, telemetry: Arc<Telemetry>) -> Arc<Self> {
        let streams = telemetry
            .streams
            .get_or_create(&SideLabels { side: "client" })
            .clone();
        Arc::new(Self {
            entries: Mutex::default(),
            identities,
            streams,
            telemetry,
        })
    }

    /// A place on a tunnel for `key`, dialled with a socket of `dialer` if there is none.
    pub async fn slot(self: &Arc<Self>, key: &Key, dialer: &Dialer) -> Result<Slot, ProxyError> {
        let mut dial_again = true;
        // A tunnel that turns out to be closing costs another round.
        for _ in 0..4 {
            let tunnel = match self.step(key, dialer)? {
                Step::Use(tunnel) => tunnel,
                Step::Wait(mut outcome) => {
                    let ended = outcome
                        .wait_for(Option::is_some)
                        .await
                        .map(|outcome| *outcome);
                    match ended {
                        // It was answered by a process that was about to end: the next one is there.
                        Ok(Some(Err(refusal)))
                            if refusal.is_lost() && std::mem::take(&mut dial_again) =>
                        {
                            continue;
                        }
                        Ok(Some(Err(refusal))) => return Err(refusal.error),
                        Ok(_) => continue,
                        Err(_dial_task_died) => return Err(ProxyError::Internal),
                    }
                }
            };
            tunnel.streams.fetch_add(1, Ordering::Relaxed);
            let slot = Slot {
                send: tunnel.send.clone(),
                tunnel,
                _open: GaugeGuard::new(&self.streams),
            };
            match slot.send.clone().ready().await {
                Ok(send) => return Ok(Slot::with_sender(slot, send)),
                Err(_going_away) => slot.tunnel.closed.store(true, Ordering::Relaxed),
            }
        }
        Err(ProxyError::TunnelReset)
    }

    fn step(self: &Arc<Self>, key: &Key, dialer: &Dialer) -> Result<Step, ProxyError> {
        let local = self
            .identities
            .get(&key.caller)
            .ok_or(ProxyError::NoCertificate)?;
        let trust = self.identities.trust().ok_or(ProxyError::NotReady)?;
        let now = SystemTime::now();
        if local.not_after <= now {
            return Err(ProxyError::CertificateExpired);
        }
        let generations = (local.generation, trust.generation);
        let mut entries = self.entries.lock();
        if entries.len() >= MAX_UNUSED && !entries.contains_key(key) {
            entries.retain(|_, entry| !entry.tunnels.is_empty() || entry.dialing.is_some());
        }
        let entry = entries.entry(key.clone()).or_default();
        entry.tunnels.retain(|t| {
            t.generations == generations && t.valid_until > now && !t.closed.load(Ordering::Relaxed)
        });
        let free = entry
            .tunnels
            .iter()
            .find(|t| t.streams.load(Ordering::Relaxed) < t.share());
        if let Some(tunnel) = free {
            return Ok(Step::Use(Arc::clone(tunnel)));
        }
        if let Some(dialing) = &entry.dialing {
            return Ok(Step::Wait(dialing.clone()));
        }
        let tls = match &entry.tls {
            Some(tls) if tls.generations == generations => tls.clone(),
            _ => {
                let config = client_config(&local, &trust, &key.callee, key.kind).map_err(|error| {
                    tracing::error!(caller = %key.caller, %error, "no TLS configuration for this identity");
                    ProxyError::Internal
                })?;
                entry
                    .tls
                    .insert(Tls {
                        config: Arc::new(config),
                        generations,
                    })
                    .clone()
            }
        };
        let (done, outcome) = watch::channel(None);
        entry.dialing = Some(outcome.clone());
        drop(entries);
        tokio::spawn(Arc::clone(self).open(key.clone(), dialer.clone(), local, trust, tls, done));
        Ok(Step::Wait(outcome))
    }

    async fn open(
        self: Arc<Self>,
        key: Key,
        dialer: Dialer,
        local: Arc<LocalIdentity>,
        trust: Arc<Trust>,
        tls: Tls,
        done: watch::Sender<Outcome>,
    ) {
        let dialed = dial(
            dialer.stock(),
            key.address,
            Arc::clone(&tls.config),
            &key.callee,
            &trust,
        )
        .await;
        let result = match &dialed {
            Ok(d) if d.peer.resumed => "resumed",
            Ok(_) => "ok",
            Err(refusal) => refusal.result,
        };
        self.telemetry
            .handshakes
            .get_or_create(&HandshakeLabels {
                side: "client",
                result,
            })
            .inc();
        match dialed {
            Err(refusal) => {
                tracing::warn!(
                    caller = %key.caller, callee = %key.callee, address = %key.address, reason = refusal.result,
                    "tunnel could not be opened: {}", refusal.error
                );
                self.forget_dial(&key, None);
                done.send_replace(Some(Err(refusal)));
            }
            Ok(Dialed {
                send,
                connection,
                ping,
                peer,
            }) => {
                let tunnel = Arc::new(Tunnel {
                    send,
                    streams: AtomicUsize::new(0),
                    closed: AtomicBool::new(false),
                    silent: AtomicBool::new(false),
                    generations: tls.generations,
                    valid_until: peer.not_after.min(local.not_after),
                    large_heads: peer.large_heads,
                    idle_since: Mutex::new(Instant::now()),
                });
                self.forget_dial(&key, Some(Arc::clone(&tunnel)));
                done.send_replace(Some(Ok(())));
                drop(done);
                tracing::debug!(caller = %key.caller, callee = %key.callee, address = %key.address, result, "tunnel open");
                self.drive(&key, &tunnel, connection, ping).await;
            }
        }
    }

    fn forget_dial(&self, key: &Key, opened: Option<Arc<Tunnel>>) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(key) {
            entry.dialing = None;
            entry.tunnels.extend(opened);
            if entry.tunnels.is_empty() {
                // Nothing is kept for peers that cannot be reached: not even sessions.
                entries.remove(key);
            }
        }
    }

    /// Runs the tunnel until it ends, goes unanswered, or has been idle for long.
    async fn drive(
        &self,
        key: &Key,
        tunnel: &Arc<Tunnel>,
        connection: Driving,
        mut ping: h2::PingPong,
    ) {
        let open = self
            .telemetry
            .tunnels
            .get_or_create(&SideLabels { side: "client" })
            .clone();
        let _open = GaugeGuard::new(&open);
        let mut connection = std::pin::pin!(connection);
        let watched = async {
            let mut ticks = tokio::time::interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
            loop {
                ticks.tick().await;
                let idle = tunnel.streams.load(Ordering::Relaxed) == 0;
                let stale = tunnel.closed.load(Ordering::Relaxed) || self.is_stale(key, tunnel);
                if idle && (stale || tunnel.idle_since.lock().elapsed() >= IDLE) {
                    return "idle";
                }
                match tokio::time::timeout(PING_TIMEOUT, ping.ping(h2::Ping::opaque())).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(_)) => return "failed",
                    Err(_silent) => {
                        tunnel.silent.store(true, Ordering::Relaxed);
                        return "unanswered";
                    }
                }
            }
        };
        let reason = tokio::select! {
            ended = connection.as_mut() => match ended {
                Ok(()) => "closed",
                Err(error) => {
                    tracing::debug!(callee = %key.callee, address = %key.address, %error, "tunnel ended");
                    "failed"
                }
            },
            reason = watched => reason,
        };
        tunnel.closed.store(true, Ordering::Relaxed);
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(key) {
            entry.tunnels.retain(|t| !Arc::ptr_eq(t, tunnel));
            // After an idle tunnel the sessions are kept: the next one is resumed. A peer that failed has
            // most likely forgotten them.
            if entry.tunnels.is_empty() && entry.dialing.is_none() && reason != "idle" {
                entries.remove(key);
            }
        }
    }

    fn is_stale(&self, key: &Key, tunnel: &Tunnel) -> bool {
        let current = self
            .identities
            .get(&key.caller)
            .zip(self.identities.trust());
        current
            .is_none_or(|(local, trust)| tunnel.generations != (local.generation, trust.generation))
    }
}

impl Tunnel {
    /// Streams it may carry: our own bound, or the peer's if that is lower.
    fn share(&self) -> usize {
        self.send
            .current_max_send_streams()
            .clamp(1, STREAMS_PER_TUNNEL)
    }
}

impl Slot {
    /// Whether the tunnel was given up since its peer did not answer.
    pub fn is_silent(&self) -> bool {
        self.tunnel.silent.load(Ordering::Relaxed)
    }

    /// Whether the peer takes large heads before the body.
    pub fn large_heads(&self) -> bool {
        self.tunnel.large_heads
    }

    /// Takes the sender that is ready; the place stays taken until the slot drops.
    pub fn take_sender(&mut self) -> SendRequest<Bytes> {
        std::mem::replace(&mut self.send, self.tunnel.send.clone())
    }

    fn with_sender(mut self, send: SendRequest<Bytes>) -> Self {
        self.send = send;
        self
    }
}
