//! HTTP/2 connections to apps, with prior knowledge.
//!
//! One dial per key at a time; whoever needs the connection waits for it. A connection is left when the app
//! sends GOAWAY or it fails, and another one is dialled when every one carries as many streams as the app
//! takes. An extended CONNECT is sent to an app that has said that it takes it (RFC 8441 3); a new connection's SETTINGS
//! are waited for.

use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use h2::Ping;
use h2::client::SendRequest;
use h2::ext::Protocol;
use http::header::{self, HeaderMap};
use http::request::Parts;
use http::uri::{Authority, Scheme, Uri};
use http::{Method, Response, Version};
use mesh_api::errors::ProxyError;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, interval, timeout};

use super::{AppError, AppKey, Holding, IDLE, Key, Pool, SWEEP, State, connect};
use crate::http::BoxedRequest;
use crate::http::body::{Body, ExchangeError, exchange};
use crate::http::h1::remove_hop_by_hop;
use crate::turns::Paced;

/// Windows of a stream and of a connection: what a caller that does not read can make the proxy hold.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
const SEND_BUFFER: usize = 256 * 1024;
const MAX_HEADER_LIST: u32 = 64 * 1024;
/// Streams on one connection before the next is opened.
const MOST_STREAMS: usize = 256;
/// Connections of one key; beyond, requests wait for a stream.
const MOST_CONNECTIONS: usize = 32;
/// Connections that turn out to be closing before a request gives up.
const ATTEMPTS: usize = 3;

/// The connections of one key.
#[derive(Debug, Default)]
pub(super) struct Shared {
    connections: Vec<Arc<Connection>>,
    dialing: Option<Dialing>,
}

#[derive(Debug)]
struct Dialing {
    outcome: watch::Receiver<Option<Result<(), ProxyError>>>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Connection {
    send: SendRequest<Bytes>,
    streams: AtomicUsize,
    closed: AtomicBool,
    /// It has been of use.
    answered: AtomicBool,
    idle_since: Mutex<Instant>,
    driver: Option<AbortHandle>,
    /// Somebody must know what the app's SETTINGS say.
    asked: Notify,
    /// Whether they have come, or never will.
    told: watch::Sender<bool>,
}

/// A place for one stream.
struct Place(Arc<Connection>);

impl Shared {
    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.dialing.is_none()
    }

    /// The connection with the fewest streams, if it takes one more or there may be no other.
    fn free(&mut self) -> Option<Place> {
        self.connections
            .retain(|connection| !connection.closed.load(Ordering::Relaxed));
        let load = |connection: &&Arc<Connection>| connection.streams.load(Ordering::Relaxed);
        let least = self.connections.iter().min_by_key(load)?;
        let room = load(&least) < least.share();
        (room || self.connections.len() >= MOST_CONNECTIONS).then(|| Place::on(least))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(dialing) = &self.dialing {
            dialing.task.abort();
        }
        for connection in &self.connections {
            if let Some(driver) = &connection.driver {
                driver.abort();
            }
        }
    }
}

impl Connection {
    fn new(send: SendRequest<Bytes>, driver: Option<AbortHandle>) -> Self {
        Self {
            send,
            streams: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
            driver,
            asked: Notify::new(),
            told: watch::Sender::new(false),
        }
    }

    fn share(&self) -> usize {
        self.send.current_max_send_streams().clamp(1, MOST_STREAMS)
    }

    /// Waits until the connection takes a request. None: it is an extended CONNECT, and the app takes none, or has not
    /// said so `within` that time.
    async fn ready(
        &self,
        extended: bool,
        within: Duration,
    ) -> Result<Option<SendRequest<Bytes>>, h2::Error> {
        let taken = !extended || self.takes_extended_connect(within).await;
        let ready = self.send.clone().ready().await?;
        Ok(taken.then_some(ready))
    }

    /// Learns from how a request on it ended.
    fn judge(
        &self,
        sent: Result<Response<Body>, ExchangeError>,
    ) -> Result<Response<Body>, AppError> {
        let error = match sent {
            Ok(response) => {
                self.answered.store(true, Ordering::Relaxed);
                return Ok(response);
            }
            Err(error) => error,
        };
        if let ExchangeError::Connection(_) | ExchangeError::Unusable(_) = &error {
            self.closed.store(true, Ordering::Relaxed);
        }
        let kept = self.answered.load(Ordering::Relaxed);
        match &error {
            ExchangeError::Connection(cause) if cause.is_io() && kept => {
                Err(AppError::ClosedIdle(None))
            }
            _ => Err(AppError::Http2(error)),
        }
    }

    async fn takes_extended_connect(&self, within: Duration) -> bool {
        if !self.send.is_extended_connect_protocol_enabled() {
            let mut told = self.told.subscribe();
            self.asked.notify_one();
            // What is not said in time is a no, for this request.
            let _ = timeout(within, told.wait_for(|told| *told)).await;
        }
        self.send.is_extended_connect_protocol_enabled()
    }
}

impl Place {
    fn on(connection: &Arc<Connection>) -> Self {
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.0.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            *self.0.idle_since.lock() = Instant::now();
        }
    }
}

/// Sends a request over a connection of the key's.
pub(super) async fn send(
    pool: &Arc<Pool>,
    key: &AppKey,
    mut request: BoxedRequest,
    connect_timeout: Duration,
) -> Result<Response<Body>, AppError> {
    let shelf = Key::from(key);
    let extended = request.head.extensions.get::<Protocol>().is_some();
    let mut gone = 0;
    // Others may take all places of a connection that was waited for: then the next is dialled, as long as there may
    // be one more.
    for _ in 0..MOST_CONNECTIONS + ATTEMPTS {
        let place = match step(pool, key, &shelf, connect_timeout) {
            Step::Use(place) => place,
            Step::Wait(mut outcome) => {
                // The dial's own time limit is that of whoever began it.
                let dialled = timeout(connect_timeout, outcome.wait_for(Option::is_some)).await;
                let error = match dialled.map(|outcome| outcome.map(|outcome| *outcome)) {
                    Ok(Ok(Some(Err(error)))) => error,
                    Ok(Ok(_)) => continue,
                    Ok(Err(_dial_was_dropped)) => ProxyError::Internal,
                    Err(_late) => ProxyError::ConnectTimeout,
                };
                return Err(AppError::Connect(error, Some(request)));
            }
        };
        match place.0.ready(extended, connect_timeout).await {
            Ok(None) => {
                let error = match *place.0.told.borrow() {
                    true => ProxyError::UnsupportedProtocol,
                    false => ProxyError::ConnectTimeout,
                };
                return Err(AppError::Connect(error, Some(request)));
            }
            Ok(Some(mut ready)) => {
                for_http2(&mut request.head);
                let connection = Arc::clone(&place.0);
                let sent = exchange(
                    &mut ready,
                    request,
                    Some(Box::new(place)),
                    Arc::clone(&key.pod.account),
                )
                .await;
                return connection.judge(sent);
            }
            Err(_going_away) => {
                place.0.closed.store(true, Ordering::Relaxed);
                gone += 1;
                if gone == ATTEMPTS {
                    break;
                }
            }
        }
    }
    let error = ProxyError::ConnectFailed;
    Err(AppError::Connect(error, Some(request)))
}

enum Step {
    Use(Place),
    Wait(watch::Receiver<Option<Result<(), ProxyError>>>),
}

fn step(pool: &Arc<Pool>, key: &AppKey, shelf: &Key, connect_timeout: Duration) -> Step {
    let mut state = pool.state.lock();
    let State {
        shelves, sweeper, ..
    } = &mut *state;
    let shared = &mut shelves.entry(shelf.clone()).or_default().shared;
    pool.start_sweeper(sweeper);
    if let Some(place) = shared.free() {
        return Step::Use(place);
    }
    if let Some(dialing) = &shared.dialing {
        return Step::Wait(dialing.outcome.clone());
    }
    let (done, outcome) = watch::channel(None);
    let dial = dial(
        Arc::downgrade(pool),
        key.clone(),
        shelf.clone(),
        connect_timeout,
        done,
    );
    let task = tokio::spawn(dial).abort_handle();
    shared.dialing = Some(Dialing {
        outcome: outcome.clone(),
        task,
    });
    Step::Wait(outcome)
}

/// Opens a connection, then drives it until it ends or has been idle for long.
async fn dial(
    pool: Weak<Pool>,
    key: AppKey,
    shelf: Key,
    within: Duration,
    done: watch::Sender<Option<Result<(), ProxyError>>>,
) {
    let opened = timeout(within, async {
        let (stream, holding) = connect(&key, within).await?;
        let (send, driving) = handshake(stream)
            .await
            .map_err(|_| ProxyError::ConnectFailed)?;
        Ok((send, driving, holding))
    });
    let opened = opened.await.unwrap_or(Err(ProxyError::ConnectTimeout));
    drop(key);
    let opened = match opened {
        Ok((send, driving, holding)) => shelve(&pool, &shelf, Some(send))
            .map(|connection| (connection, driving, holding))
            .ok_or(ProxyError::Internal),
        Err(error) => {
            shelve(&pool, &shelf, None);
            Err(error)
        }
    };
    let (connection, driving, holding) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            done.send_replace(Some(Err(error)));
            return;
        }
    };
    done.send_replace(Some(Ok(())));
    drop(done);
    drive(driving, holding, &connection).await;
    connection.closed.store(true, Ordering::Relaxed);
    connection.told.send_replace(true);
    if let Some(pool) = pool.upgrade() {
        let mut state = pool.state.lock();
        if let Some(shelf) = state.shelves.get_mut(&shelf) {
            let connections = &mut shelf.shared.connections;
            connections.retain(|other| !Arc::ptr_eq(other, &connection));
        }
    }
}

/// Ends the dial: puts the new connection where requests find it. None without one, or when the pool has
/// ended.
fn shelve(
    pool: &Weak<Pool>,
    shelf: &Key,
    send: Option<SendRequest<Bytes>>,
) -> Option<Arc<Connection>> {
    let pool = pool.upgrade()?;
    let mut state = pool.state.lock();
    let shared = &mut state.shelves.get_mut(shelf)?.shared;
    let dialing = shared.dialing.take();
    let driver = dialing.map(|dialing| dialing.task);
    let connection = Arc::new(Connection::new(send?, driver));
    shared.connections.push(Arc::clone(&connection));
    Some(connection)
}

type Driving = h2::client::Connection<Paced<TcpStream>, Bytes>;

async fn handshake(stream: TcpStream) -> Result<(SendRequest<Bytes>, Driving), h2::Error> {
    h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        .handshake(Paced::new(stream))
        .await
}

async fn drive(mut driving: Driving, holding: Holding, connection: &Connection) {
    let idle = async {
        let mut ticks = interval(SWEEP);
        loop {
            ticks.tick().await;
            let unused = connection.streams.load(Ordering::Relaxed) == 0;
            let left = connection.closed.load(Ordering::Relaxed);
            if unused && (left || connection.idle_since.lock().elapsed() >= IDLE) {
                return;
            }
        }
    };
    let mut pings = driving.ping_pong();
    let settings = async {
        connection.asked.notified().await;
        // SETTINGS are the first that an app sends (RFC 9113 3.4): they are here when it answers anything.
        if let Some(pings) = &mut pings
            && pings.ping(Ping::opaque()).await.is_ok()
        {
            connection.told.send_replace(true);
        }
        pending::<()>().await;
    };
    tokio::select! {
        // Its reason reaches every stream.
        _ended = &mut driving => {}
        () = idle => {}
        () = settings => {}
    }
    drop(holding);
}

/// What an HTTP/2 app expects of a request that may have come over HTTP/1 (RFC 9113 8.2.2, 8.3.1).
fn for_http2(parts: &mut Parts) {
    remove_hop_by_hop(&mut parts.headers);
    if parts.uri.scheme().is_none()
        && parts.method != Method::CONNECT
        && let Some(uri) = absolute(&parts.uri, &parts.headers)
    {
        parts.uri = uri;
    }
    if parts.uri.authority().is_some() {
        parts.headers.remove(header::HOST);
        parts.version = Version::HTTP_2;
    } else {
        // h2 takes a target without authority only from HTTP/1.
        parts.version = Version::HTTP_11;
    }
}

/// The target with the authority that Host names.
fn absolute(uri: &Uri, headers: &HeaderMap) -> Option<Uri> {
    let host = headers.get(header::HOST)?;
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::try_from(host.as_bytes()).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::*;
    use crate::budget::{Account, Limits, Resource};

    /// A connection to an app that says nothing before it is told to.
    async fn connected(takes: bool) -> (Arc<Connection>, oneshot::Sender<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (far, _) = listener.accept().await.unwrap();
        let (go, told) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            if takes {
                builder.enable_connect_protocol();
            }
            // A test that never tells it to ends it.
            if told.await.is_ok() {
                let mut server = builder.handshake::<_, Bytes>(far).await.unwrap();
                while server.accept().await.is_some() {}
            }
        });
        let (send, driving) = handshake(near.unwrap()).await.unwrap();
        let connection = Arc::new(Connection::new(send, None));
        let account = Account::new("demo".into(), "web".into(), &Limits::default());
        let holding = Holding {
            charge: account.open_charge(Resource::Socket),
            open: None,
        };
        let driven = Arc::clone(&connection);
        tokio::spawn(async move { drive(driving, holding, &driven).await });
        (connection, go)
    }

    #[tokio::test]
    async fn an_extended_connect_is_sent_only_to_apps_that_take_it() {
        let within = Duration::from_secs(10);
        for takes in [true, false] {
            let (connection, go) = connected(takes).await;
            assert!(connection.ready(false, within).await.unwrap().is_some());
            let mut ready = Box::pin(connection.ready(true, within));
            for _ in 0..20 {
                assert!(futures::poll!(&mut ready).is_pending(), "not known yet");
                tokio::task::yield_now().await;
            }
            go.send(()).unwrap();
            assert_eq!(ready.await.unwrap().is_some(), takes);
            // From now on it is known.
            let known = connection.ready(true, Duration::ZERO).await;
            assert_eq!(known.unwrap().is_some(), takes);
            assert!(connection.ready(false, within).await.unwrap().is_some());
        }
        let (connection, _silent) = connected(true).await;
        let late = connection.ready(true, Duration::from_millis(10)).await;
        assert!(late.unwrap().is_none());
    }
}
