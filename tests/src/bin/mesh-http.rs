//! The HTTP server of the tests, HTTP/1 and HTTP/2 with prior knowledge on one port. It answers what it
//! saw as JSON, and misbehaves as the request's header `x-control` (or its query, or the defaults set on
//! the admin port) asks for: see [`Control`].
//!
//! Ports: [`HTTP`] as said; [`RAW`] HTTP/1 read by hand, which answers the request's bytes as they came;
//! [`ADMIN`] counts, `POST /control` sets defaults, `POST /reset` counts from zero.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use futures::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::json;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use warren_tests::http::{ADMIN, HTTP, RAW};

#[derive(Clone, Parser)]
struct Args {
    /// How it names itself; the host's name by default
    #[arg(long)]
    name: Option<String>,
    /// What every request is answered with, as in `x-control`
    #[arg(long, default_value = "")]
    control: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let name = args.name.unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname");
        host.unwrap_or_default().trim().to_owned()
    });
    let state = Arc::new(State {
        name,
        defaults: Mutex::new(args.control),
        ..State::default()
    });
    let (main, raw, admin) = (listen(HTTP)?, listen(RAW)?, listen(ADMIN)?);
    large();
    println!("listening");
    let (end, ended) = watch::channel(false);
    tokio::spawn(accept(raw, Arc::clone(&state), ended.clone(), serve_raw));
    tokio::spawn(accept(
        admin,
        Arc::clone(&state),
        ended.clone(),
        serve_admin,
    ));
    let serving = tokio::spawn(accept(main, Arc::clone(&state), ended, serve_http));
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    term.recv().await;
    // Requests in flight are answered, connections are closed in order, then this ends.
    end.send_replace(true);
    serving.await?;
    Ok(())
}

#[derive(Default)]
struct State {
    name: String,
    requests: AtomicU64,
    in_flight: AtomicU64,
    most_in_flight: AtomicU64,
    connections: AtomicU64,
    paths: Mutex<BTreeMap<String, u64>>,
    defaults: Mutex<String>,
}

/// What a request asks for, as `key=value&...`.
#[derive(Clone, Debug, Default)]
struct Control {
    /// `delay=MS`: before the answer's head, by a timer that goes off up to a millisecond later, also with 0.
    delay_ms: Option<u64>,
    /// `read=MS`: before each piece of the request's body is read.
    read_ms: u64,
    /// `fail=PERCENT`: of all requests, evenly spread, are answered with `status`.
    fail: u64,
    /// `first=N`: the first requests of each path and query are answered with `status`.
    first: u64,
    /// `status=CODE` of failures; 503 unless set.
    status: Option<u16>,
    /// `code=CODE` of the other answers.
    code: Option<u16>,
    /// `retry-after=SECONDS` beside a failure.
    retry_after: Option<u64>,
    /// `size=BYTES`: the body is that large (at most 16 MiB) instead of JSON.
    size: Option<usize>,
    /// `slow=MS`: between the sixteen pieces of the body.
    slow_ms: Option<u64>,
    /// `header=BYTES`: a header of the answer that is that large.
    header: usize,
    /// `trailers=1`
    trailers: bool,
    /// `close=1`: closes (resets the stream) without an answer.
    close: bool,
    /// `abort=1`: ends the connection in the middle of the body.
    abort: bool,
}

impl Control {
    fn read(&mut self, text: &str) {
        for (key, value) in text.split('&').filter_map(|pair| pair.split_once('=')) {
            let number = value.parse::<u64>().ok();
            match key {
                "delay" => self.delay_ms = number,
                "read" => self.read_ms = number.unwrap_or_default(),
                "fail" => self.fail = number.unwrap_or_default(),
                "first" => self.first = number.unwrap_or_default(),
                "status" => self.status = value.parse().ok(),
                "code" => self.code = value.parse().ok(),
                "retry-after" => self.retry_after = number,
                "size" => self.size = value.parse().ok(),
                "slow" => self.slow_ms = number,
                "header" => self.header = value.parse().unwrap_or_default(),
                "trailers" => self.trailers = number == Some(1),
                "close" => self.close = number == Some(1),
                "abort" => self.abort = number == Some(1),
                _ => {}
            }
        }
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

async fn accept<F>(
    listener: TcpListener,
    state: Arc<State>,
    mut ended: watch::Receiver<bool>,
    serve: fn(TcpStream, SocketAddr, Arc<State>, watch::Receiver<bool>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ended.wait_for(|e| *e) => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                // Only for latency: nothing is lost without.
                let _ = stream.set_nodelay(true);
                connections.spawn(serve(stream, peer, Arc::clone(&state), ended.clone()));
            }
            Err(e) => {
                eprintln!("accept: {e}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve_http(
    stream: TcpStream,
    peer: SocketAddr,
    state: Arc<State>,
    mut ended: watch::Receiver<bool>,
) {
    state.connections.fetch_add(1, Ordering::Relaxed);
    let Ok(socket) = SockRef::from(&stream).try_clone() else {
        eprintln!("a connection could not be watched: out of descriptors?");
        return;
    };
    let socket = Arc::new(socket);
    let service =
        service_fn(|request| answer(Arc::clone(&state), peer, Arc::clone(&socket), request));
    let builder = auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ending = AtomicBool::new(false);
    loop {
        tokio::select! {
            // A peer that goes away is no news here.
            _ = connection.as_mut() => return,
            _ = ended.wait_for(|e| *e), if !ending.load(Ordering::Relaxed) => {
                ending.store(true, Ordering::Relaxed);
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Ends when the connection has failed.
async fn failed(socket: &Socket) -> std::io::Error {
    let watched = async {
        let stream = TcpStream::from_std(socket.try_clone()?.into())?;
        stream.ready(Interest::ERROR).await?;
        stream.take_error()
    };
    match watched.await {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => std::io::ErrorKind::ConnectionReset.into(),
    }
}

async fn answer(
    state: Arc<State>,
    peer: SocketAddr,
    socket: Arc<Socket>,
    request: Request<Incoming>,
) -> Result<Response<BoxBody<Bytes, Error>>, Error> {
    let number = state.requests.fetch_add(1, Ordering::Relaxed);
    let now = state.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
    state.most_in_flight.fetch_max(now, Ordering::Relaxed);
    let _done = InFlight(&state);
    let (parts, mut body) = request.into_parts();
    let path = parts
        .uri
        .path_and_query()
        .map_or("", |p| p.as_str())
        .to_owned();
    let nth = {
        let mut paths = state.paths.lock().unwrap_or_else(PoisonError::into_inner);
        // Bounded: tests use few paths.
        if paths.len() > 4096 {
            paths.clear();
        }
        let nth = paths.entry(path.clone()).or_default();
        *nth += 1;
        *nth
    };
    let mut control = Control::default();
    control.read(
        &state
            .defaults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone(),
    );
    control.read(parts.uri.query().unwrap_or_default());
    if let Some(asked) = parts.headers.get("x-control").and_then(|v| v.to_str().ok()) {
        control.read(asked);
    }

    let (mut length, mut digest) = (0u64, 0xcbf2_9ce4_8422_2325_u64);
    let mut trailers = BTreeMap::new();
    loop {
        if control.read_ms > 0 && !body.is_end_stream() {
            // Who does not read does not hear of a reset, and would keep what has come.
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(control.read_ms)) => {}
                reset = failed(&socket) => return Err(reset.into()),
            }
        }
        let Some(frame) = body.frame().await else {
            break;
        };
        match frame?.into_data() {
            Ok(data) => {
                length += data.len() as u64;
                for byte in &data {
                    digest = (digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
                }
            }
            Err(frame) => {
                if let Ok(map) = frame.into_trailers() {
                    trailers = fields(&map).into_iter().map(|[k, v]| (k, v)).collect();
                }
            }
        }
    }
    if let Some(delay) = control.delay_ms {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    if control.close {
        return Err("asked to close".into());
    }
    let share = (number + 1) * control.fail / 100 != number * control.fail / 100;
    let failing = nth <= control.first || share;
    let status = if failing {
        control.status.unwrap_or(503)
    } else {
        control.code.unwrap_or(200)
    };
    let seen = json!({
        "name": state.name, "version": version(parts.version), "method": parts.method.as_str(),
        "path": path, "authority": parts.uri.authority().map(|a| a.as_str()),
        "headers": fields(&parts.headers), "trailers": trailers, "peer": peer.to_string(),
        "body": length, "digest": format!("{digest:016x}"), "nth": nth,
    });
    let payload = match control.size {
        Some(size) => large().slice(..size.min(LARGEST)),
        None => Bytes::from(format!("{seen}\n")),
    };
    // HTTP/2 leaves it to the server not to send what these answers cannot have.
    let bodiless = parts.method == hyper::Method::HEAD || [204, 304].contains(&status);
    let length = payload.len();
    let body = if bodiless {
        Empty::new().map_err(|never| match never {}).boxed()
    } else {
        stream_of(payload, &control)
    };
    let mut response = Response::new(body);
    if parts.method == hyper::Method::HEAD {
        response
            .headers_mut()
            .insert("content-length", HeaderValue::from(length));
    }
    *response.status_mut() = StatusCode::from_u16(status)?;
    let headers = response.headers_mut();
    headers.insert("x-server", HeaderValue::from_str(&state.name)?);
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    if control.header > 0 {
        let value = HeaderValue::try_from("h".repeat(control.header))?;
        headers.insert("x-large", value);
    }
    if let (true, Some(seconds)) = (failing, control.retry_after) {
        headers.insert("retry-after", HeaderValue::from(seconds));
    }
    Ok(response)
}

/// What large bodies are made of: once, since it takes a while.
fn large() -> &'static Bytes {
    static LARGE: OnceLock<Bytes> = OnceLock::new();
    LARGE.get_or_init(|| Bytes::from((0..LARGEST).map(|i| (i % 251) as u8).collect::<Vec<_>>()))
}

const LARGEST: usize = 16 << 20;

/// The answer's body: whole, or in pieces if something is to happen between or after them.
fn stream_of(payload: Bytes, control: &Control) -> BoxBody<Bytes, Error> {
    if control.slow_ms.is_none() && !control.trailers && !control.abort {
        return Full::new(payload).map_err(|never| match never {}).boxed();
    }
    let pause = Duration::from_millis(control.slow_ms.unwrap_or_default());
    let piece = payload.len().div_ceil(16).max(1);
    let (trailers, abort) = (control.trailers, control.abort);
    let total = payload.len();
    let steps = stream::unfold((payload, false), move |(mut rest, over)| async move {
        if over {
            return None;
        }
        if rest.is_empty() {
            let mut map = HeaderMap::new();
            map.insert("x-trailer", HeaderValue::from_static("at the end"));
            return trailers.then(|| (Ok(Frame::trailers(map)), (rest, true)));
        }
        tokio::time::sleep(pause).await;
        if abort && rest.len() * 2 < total {
            return Some((Err(Error::from("asked to abort")), (rest, true)));
        }
        let next = rest.split_to(piece.min(rest.len()));
        Some((Ok(Frame::data(next)), (rest, false)))
    });
    BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(Box::pin(steps)))))
}

/// [`BoxBody`] wants `Sync`, which a stream of `async` blocks is not; only one ever polls it.
struct SyncStream<S>(Mutex<std::pin::Pin<Box<S>>>);

impl<S: futures::Stream> futures::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.as_mut().poll_next(context)
    }
}

/// HTTP/1 by hand, for what a library hides: the spelling of names, interim answers, broken answers.
/// Paths: `/early` answers 103 before 200, `/close` nothing, `/short` less than it promised.
async fn serve_raw(
    stream: TcpStream,
    _peer: SocketAddr,
    state: Arc<State>,
    _ended: watch::Receiver<bool>,
) {
    if let Err(e) = raw(stream, &state).await {
        println!("raw: {e}");
    }
}

async fn raw(mut stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        let Some(end) = read_until(&mut stream, &mut bytes, b"\r\n\r\n").await? else {
            return Ok(());
        };
        state.requests.fetch_add(1, Ordering::Relaxed);
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        bytes.drain(..end);
        let lower = head.to_ascii_lowercase();
        let length = lower.split("\r\ncontent-length:").nth(1);
        let length = length.and_then(|l| l.lines().next()?.trim().parse().ok());
        let body: Vec<u8> = if lower.contains("\r\ntransfer-encoding:") {
            let end = read_until(&mut stream, &mut bytes, b"0\r\n\r\n").await?;
            bytes.drain(..end.unwrap_or(bytes.len())).collect()
        } else {
            let length: usize = length.unwrap_or(0);
            while bytes.len() < length {
                if stream.read_buf(&mut bytes).await? == 0 {
                    return Ok(());
                }
            }
            bytes.drain(..length).collect()
        };
        let path = head.split(' ').nth(1).unwrap_or_default();
        let seen =
            json!({"name": state.name, "head": head, "body": String::from_utf8_lossy(&body)});
        let seen = seen.to_string();
        let fields = "X-oDD-Case: Kept\r\nx-repeated: 1\r\nX-Repeated: 2\r\nContent-Type: application/json\r\n";
        let full = format!("{fields}Content-Length: {}\r\n\r\n{seen}", seen.len());
        let answer = match path {
            "/close" => return Ok(()),
            "/early" => format!(
                "HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\nHTTP/1.1 200 OK\r\n{full}"
            ),
            "/short" => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nnot all of it".into(),
            _ => format!("HTTP/1.1 200 OK\r\n{full}"),
        };
        stream.write_all(answer.as_bytes()).await?;
        if path == "/short" {
            return stream.shutdown().await;
        }
    }
}

/// Reads until the bytes hold `mark`; where it ends. `None`: the peer closed first.
async fn read_until(
    stream: &mut TcpStream,
    bytes: &mut Vec<u8>,
    mark: &[u8],
) -> std::io::Result<Option<usize>> {
    loop {
        if let Some(at) = bytes.windows(mark.len()).position(|w| w == mark) {
            return Ok(Some(at + mark.len()));
        }
        if bytes.len() > 1 << 20 || stream.read_buf(bytes).await? == 0 {
            return Ok(None);
        }
    }
}

async fn serve_admin(
    stream: TcpStream,
    _peer: SocketAddr,
    state: Arc<State>,
    _ended: watch::Receiver<bool>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(administer(&state, request).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    // A peer that goes away is no news here.
    let _ = builder
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn administer(state: &State, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let body = request
        .into_body()
        .collect()
        .await
        .map(|b| b.to_bytes())
        .unwrap_or_default();
    match path.as_str() {
        "/control" => {
            let text = String::from_utf8_lossy(&body).into_owned();
            *state
                .defaults
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = text;
        }
        "/reset" => {
            state.requests.store(0, Ordering::Relaxed);
            state.most_in_flight.store(0, Ordering::Relaxed);
            state.connections.store(0, Ordering::Relaxed);
            state
                .paths
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
        _ => {}
    }
    let count = json!({
        "name": state.name,
        "requests": state.requests.load(Ordering::Relaxed),
        "most_in_flight": state.most_in_flight.load(Ordering::Relaxed),
        "connections": state.connections.load(Ordering::Relaxed),
        "paths": *state.paths.lock().unwrap_or_else(PoisonError::into_inner),
    });
    Response::new(Full::from(format!("{count}\n")))
}

/// Lowers the count when the answer's head is made, or the caller has gone.
struct InFlight<'a>(&'a State);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_11 => "1.1",
        Version::HTTP_2 => "2",
        _ => "other",
    }
}

fn fields(map: &HeaderMap) -> Vec<[String; 2]> {
    map.iter()
        .map(|(k, v)| {
            [
                k.to_string(),
                String::from_utf8_lossy(v.as_bytes()).into_owned(),
            ]
        })
        .collect()
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    TcpListener::from_std(socket.into())
}
