//! Connections to apps, kept for the next request.
//!
//! The app sees its caller's address, so connections are shared only between requests of one caller address
//! to one address of one pod. An HTTP/1 connection is owned by the exchange it carries and comes back with
//! the end of the answer; HTTP/2 connections are shared, each driven by a task that this pool ends.
//!
//! Invariants:
//! - The connection that was used last is taken first, so that those not needed age and close.
//! - A connection whose end is known is never taken; one that ends in the moment it is taken is reported as
//!   [`AppError::ClosedIdle`], with the request where it can be sent again as it was.
//! - What is idle is bounded by pod, and closed after [`IDLE`]: there is no more of it than requests were in
//!   flight at once. Every connection is charged to its pod from its socket on.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::{Response, Version};
use mesh_api::errors::ProxyError;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::{Instant, interval, timeout};

use self::h2c::Shared;
use super::BoxedRequest;
use super::body::{Body, ExchangeError};
use super::h1::{Client, FailedSend, Home, Limits, SendError};
use crate::budget::{Account, Charge};
use crate::deliver;
use crate::maps::FastMap;
use crate::pods::Pod;
use crate::telemetry::{OpenConnection, TcpLabels, Telemetry};

mod h2c;
#[cfg(test)]
mod tests;

/// An unused connection is closed after this.
const IDLE: Duration = Duration::from_secs(60);
/// How often unused connections are looked through.
const SWEEP: Duration = Duration::from_secs(5);
/// Unused connections kept for a pod. Fewer than its callers need at once would make each wave of requests
/// open connections anew.
const MOST_IDLE: usize = if cfg!(test) { 8 } else { 4096 };
/// Headers of a response; apps send more than their clients.
const MOST_RESPONSE_HEADERS: usize = 256;

/// The connections of one worker.
#[derive(Debug)]
pub struct Apps {
    shared: Arc<Pool>,
    connect_timeout: Duration,
}

/// What a connection is shared by.
#[derive(Clone, Debug)]
pub struct AppKey {
    /// The pod whose socket it is: the app's, or the caller's for what is outside the mesh.
    pub pod: Arc<Pod>,
    /// Whom the app sees as its peer. None: the pod itself, as it goes to the outside.
    pub from: Option<IpAddr>,
    /// Where to.
    pub to: SocketAddr,
    /// HTTP/2: with prior knowledge. Anything else: HTTP/1.
    pub version: Version,
    /// What a connection counts as in the TCP metrics. `None`: it is counted elsewhere.
    pub counted: Option<Counted>,
    /// Whether it is for one of the node's probes, which may go beyond the pod's limit of sockets.
    pub probe: bool,
}

/// What a connection counts as: that of the request it was opened for.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Where it is counted.
    pub telemetry: Arc<Telemetry>,
    /// Under what.
    pub labels: TcpLabels,
}

impl Counted {
    fn open(&self) -> OpenConnection {
        self.telemetry.open(&self.labels)
    }
}

/// What is held for as long as a connection is open: its charge, and its place in the metrics.
#[derive(Debug)]
pub struct Holding {
    charge: Charge,
    #[expect(dead_code, reason = "held, not read")]
    open: Option<OpenConnection>,
}

impl Holding {
    /// Whom the connection is charged to.
    pub fn account(&self) -> &Arc<Account> {
        self.charge.account()
    }
}

/// Why a request got no answer from an app.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// No connection to the app.
    #[error("no connection: {0}")]
    Connect(ProxyError, Option<BoxedRequest>),
    /// A connection that had been used before closed before any byte of an answer. The request comes back
    /// if nothing of its body is lost; whether it may be sent again is for its method to say.
    #[error("the app closed a kept connection")]
    ClosedIdle(Option<BoxedRequest>),
    /// HTTP/1: the app closed a new connection, or broke off within the head of its answer, or sent what is
    /// not HTTP.
    #[error("{0}")]
    Http1(SendError),
    /// HTTP/2.
    #[error("{0}")]
    Http2(ExchangeError),
}

#[derive(Debug)]
struct Pool {
    state: Mutex<State>,
    limits: Arc<Limits>,
}

#[derive(Debug, Default)]
struct State {
    shelves: FastMap<Key, Shelf>,
    /// HTTP/1 connections that are not in use, by the pod's UID.
    idle_of_pod: FastMap<Arc<str>, usize>,
    sweeper: Option<AbortHandle>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    pod: Arc<str>,
    from: Option<IpAddr>,
    to: SocketAddr,
    http2: bool,
    // Who waits for the same connection is refused together with who opens it.
    probe: bool,
}

impl From<&AppKey> for Key {
    fn from(key: &AppKey) -> Self {
        Self {
            pod: Arc::clone(&key.pod.uid),
            from: key.from,
            to: key.to,
            http2: key.version == Version::HTTP_2,
            probe: key.probe,
        }
    }
}

#[derive(Default)]
struct Shelf {
    /// The one used last is at the end.
    idle: Vec<(Client, Instant)>,
    shared: Shared,
    /// Made once: where this key's connections come back to.
    home: Option<Home>,
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shelf")
            .field("idle", &self.idle.len())
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

impl Default for Apps {
    fn default() -> Self {
        Self::new(deliver::CONNECT_TIMEOUT)
    }
}

impl Apps {
    /// Without connections. A connection must be there within `connect_timeout`;
    /// [`deliver::CONNECT_TIMEOUT`] at most.
    pub fn new(connect_timeout: Duration) -> Self {
        let limits = Limits {
            headers: MOST_RESPONSE_HEADERS,
            ..Limits::default()
        };
        Self {
            shared: Arc::new(Pool {
                state: Mutex::default(),
                limits: Arc::new(limits),
            }),
            connect_timeout,
        }
    }

    /// Sends a request to an app and waits for the head of the answer, without limit of time once it is
    /// connected. Dropping the future, or the answer's body before its end, gives the request up.
    pub fn send(
        &self,
        key: &AppKey,
        request: BoxedRequest,
    ) -> impl Future<Output = Result<Response<Body>, AppError>> {
        self.send_within(key, request, None)
    }

    /// As [`Apps::send`], with another connect timeout if there is one.
    pub async fn send_within(
        &self,
        key: &AppKey,
        request: BoxedRequest,
        connect_timeout: Option<Duration>,
    ) -> Result<Response<Body>, AppError> {
        let connect_timeout = connect_timeout.unwrap_or(self.connect_timeout);
        if key.version == Version::HTTP_2 {
            return Box::pin(h2c::send(&self.shared, key, request, connect_timeout)).await;
        }
        let shelf = Key::from(key);
        let (kept, home) = self.shared.take(&shelf);
        let client = match kept {
            Some(client) => client,
            None => match Box::pin(connect(key, connect_timeout)).await {
                Ok((stream, holding)) => {
                    Client::with(stream, Some(holding), Arc::clone(&self.shared.limits))
                }
                Err(error) => return Err(AppError::Connect(error, Some(request))),
            },
        };
        client.send(request, Some(home)).await.map_err(|failed| {
            let FailedSend {
                error,
                reused,
                answered,
                request,
            } = failed;
            match error {
                SendError::Closed | SendError::Io(_) if reused && !answered => {
                    AppError::ClosedIdle(request)
                }
                error => AppError::Http1(error),
            }
        })
    }

    /// Connections that are not in use.
    pub fn idle(&self) -> usize {
        let state = self.shared.state.lock();
        state.shelves.values().map(|shelf| shelf.idle.len()).sum()
    }
}

impl Pool {
    /// A connection that is still open, and where it is to come back to.
    fn take(self: &Arc<Self>, key: &Key) -> (Option<Client>, Home) {
        let mut state = self.state.lock();
        let State {
            shelves,
            idle_of_pod,
            sweeper,
        } = &mut *state;
        let shelf = shelves.entry(key.clone()).or_default();
        self.start_sweeper(sweeper);
        let home = shelf.home.get_or_insert_with(|| self.home(key.clone()));
        let home = Arc::clone(home);
        while let Some((mut client, _since)) = shelf.idle.pop() {
            count_down(idle_of_pod, &key.pod, 1);
            if client.is_idle() {
                return (Some(client), home);
            }
        }
        (None, home)
    }

    fn home(self: &Arc<Self>, key: Key) -> Home {
        let pool = Arc::downgrade(self);
        Arc::new(move |client| {
            if let Some(pool) = pool.upgrade() {
                pool.put(&key, client);
            }
        })
    }

    /// Keeps a connection, if there is room for it.
    fn put(self: &Arc<Self>, key: &Key, client: Client) {
        let mut state = self.state.lock();
        let State {
            shelves,
            idle_of_pod,
            ..
        } = &mut *state;
        let Some(shelf) = shelves.get_mut(key) else {
            return;
        };
        let of_pod = idle_of_pod.entry(Arc::clone(&key.pod)).or_default();
        if *of_pod >= MOST_IDLE {
            return;
        }
        *of_pod += 1;
        shelf.idle.push((client, Instant::now()));
    }

    /// A shelf that is there is looked through until it is empty.
    fn start_sweeper(self: &Arc<Self>, sweeper: &mut Option<AbortHandle>) {
        if sweeper.is_none() {
            let sweeping = tokio::spawn(sweep(Arc::downgrade(self)));
            *sweeper = Some(sweeping.abort_handle());
        }
    }

    /// Closes what was not used for long or has been closed by the app. Whether anything is left.
    fn sweep(&self) -> bool {
        let mut state = self.state.lock();
        let State {
            shelves,
            idle_of_pod,
            sweeper,
        } = &mut *state;
        shelves.retain(|key, shelf| {
            let before = shelf.idle.len();
            shelf
                .idle
                .retain_mut(|(client, since)| since.elapsed() < IDLE && client.is_idle());
            count_down(idle_of_pod, &key.pod, before - shelf.idle.len());
            let lent = shelf
                .home
                .as_ref()
                .is_some_and(|home| Arc::strong_count(home) > 1);
            !shelf.idle.is_empty() || lent || !shelf.shared.is_empty()
        });
        if shelves.is_empty() {
            *sweeper = None;
        }
        !shelves.is_empty()
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(sweeper) = &self.sweeper {
            sweeper.abort();
        }
    }
}

async fn sweep(pool: Weak<Pool>) {
    let mut ticks = interval(SWEEP);
    loop {
        ticks.tick().await;
        match pool.upgrade() {
            Some(pool) if pool.sweep() => {}
            _ => return,
        }
    }
}

fn count_down(counts: &mut FastMap<Arc<str>, usize>, pod: &Arc<str>, by: usize) {
    if by > 0
        && let Some(count) = counts.get_mut(pod)
    {
        *count = count.saturating_sub(by);
        if *count == 0 {
            counts.remove(pod);
        }
    }
}

async fn connect(key: &AppKey, within: Duration) -> Result<(TcpStream, Holding), ProxyError> {
    let opening = async {
        match key.from {
            Some(from) => deliver::to_app_for(&key.pod, from, key.to, key.probe).await,
            None => deliver::to_outside(&key.pod, key.to).await,
        }
    };
    match timeout(within, opening).await {
        Ok(delivered) => {
            let (stream, charge) = delivered?.into_stream();
            let open = key.counted.as_ref().map(Counted::open);
            Ok((stream, Holding { charge, open }))
        }
        Err(_late) => Err(ProxyError::ConnectTimeout),
    }
}
