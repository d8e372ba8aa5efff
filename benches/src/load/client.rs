//! The client: one task per connection on one thread.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{BULK_BUFFER, Case, DOWNLOAD, Latencies, Outcome, Plan, UPLOAD, http2};

/// Runs the plan. Prints `start` when the measured time begins. Ends by itself, stalled or not, except
/// for [`Case::Idle`], which ends with standard input.
pub async fn run(target: SocketAddr, plan: &Plan) -> Outcome {
    let limit = match plan.case {
        Case::Idle => Duration::MAX,
        _ => plan.warm_up + plan.duration + STALLED,
    };
    match tokio::time::timeout(limit, run_case(target, plan)).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome {
            seconds: plan.duration.as_secs_f64(),
            errors: 1,
            first_error: Some(format!(
                "stalled: no end {} s after it was due",
                STALLED.as_secs()
            )),
            ..Outcome::default()
        },
    }
}

async fn run_case(target: SocketAddr, plan: &Plan) -> Outcome {
    match plan.case {
        Case::Bulk | Case::BulkDown => bulk(target, plan).await,
        Case::Requests | Case::Http1 => {
            gather(plan, |window| closed_loop(Connection::open(target), window)).await
        }
        Case::Http2 | Case::Grpc => {
            let grpc = plan.case == Case::Grpc;
            gather(plan, |window| {
                closed_loop(http2::Connection::open(target, grpc), window)
            })
            .await
        }
        Case::Connect => gather(plan, |window| connect_loop(target, window)).await,
        Case::Open => open_loop(target, plan).await,
        Case::Idle => idle(target, plan).await,
    }
}

/// The measured time.
#[derive(Clone, Copy)]
struct Window {
    start: Instant,
    end: Instant,
}

/// What one task saw.
#[derive(Default)]
struct Seen {
    latencies: Latencies,
    errors: u64,
    first_error: Option<String>,
}

impl Seen {
    fn error(&mut self, error: impl std::fmt::Display) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| error.to_string());
    }

    fn merge(&mut self, other: Seen) {
        self.latencies.merge(other.latencies);
        self.errors += other.errors;
        if self.first_error.is_none() {
            self.first_error = other.first_error;
        }
    }

    fn outcome(self, seconds: f64) -> Outcome {
        Outcome {
            seconds,
            requests: self.latencies.len() as u64,
            bytes: 0,
            errors: self.errors,
            first_error: self.first_error,
            latency: self.latencies.quantiles(),
        }
    }
}

/// Starts `plan.connections` tasks and announces the measured time.
async fn gather<F>(plan: &Plan, task: impl Fn(Window) -> F) -> Outcome
where
    F: Future<Output = Seen> + Send + 'static,
{
    let start = Instant::now() + plan.warm_up;
    let window = Window {
        start,
        end: start + plan.duration,
    };
    let mut tasks = JoinSet::new();
    for _ in 0..plan.connections {
        tasks.spawn(task(window));
    }
    tokio::time::sleep_until(window.start.into()).await;
    announce_start();
    let mut all = Seen::default();
    while let Some(seen) = tasks.join_next().await {
        match seen {
            Ok(seen) => all.merge(seen),
            Err(panic) => all.error(panic),
        }
    }
    all.outcome(plan.duration.as_secs_f64())
}

/// A connection that carries one request at a time.
pub(super) trait Carry {
    /// Sends one and returns when its answer is whole.
    fn request(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

impl Carry for Connection {
    async fn request(&mut self) -> io::Result<()> {
        self.exchange(REQUEST).await
    }
}

async fn closed_loop(open: impl Future<Output = io::Result<impl Carry>>, window: Window) -> Seen {
    let mut seen = Seen::default();
    let mut connection = match open.await {
        Ok(connection) => connection,
        Err(e) => {
            seen.error(e);
            return seen;
        }
    };
    loop {
        let sent = Instant::now();
        if sent >= window.end {
            return seen;
        }
        if let Err(e) = connection.request().await {
            seen.error(e);
            return seen;
        }
        if sent >= window.start {
            seen.latencies.push(sent.elapsed());
        }
    }
}

async fn connect_loop(target: SocketAddr, window: Window) -> Seen {
    let mut seen = Seen::default();
    loop {
        let began = Instant::now();
        if began >= window.end {
            return seen;
        }
        let result = async {
            let mut connection = Connection::open(target).await?;
            connection.exchange(REQUEST_CLOSE).await?;
            connection.closed_by_peer().await
        };
        match result.await {
            Ok(()) if began >= window.start => seen.latencies.push(began.elapsed()),
            Ok(()) => {}
            Err(e) => {
                seen.error(e);
                // A server that is gone must not be hammered.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// A thread of its own keeps the time: the runtime's timer has a resolution of 1 ms.
async fn open_loop(target: SocketAddr, plan: &Plan) -> Outcome {
    let mut queues = Vec::new();
    let mut tasks = JoinSet::new();
    let start = Instant::now() + plan.warm_up;
    for _ in 0..plan.connections {
        let (queue, due) = mpsc::channel(OPEN_LOOP_QUEUE);
        queues.push(queue);
        tasks.spawn(answer_due(target, due, start));
    }
    let (rate, end) = (f64::from(plan.rate), start + plan.duration);
    let began = Instant::now();
    let pacer = tokio::task::spawn_blocking(move || {
        let mut missed = 0u64;
        for (index, queue) in (0u64..).zip(queues.iter().cycle()) {
            let due = began + Duration::from_secs_f64(index as f64 / rate);
            if due >= end {
                break;
            }
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            missed += u64::from(queue.try_send(due).is_err());
        }
        missed
    });
    tokio::time::sleep_until(start.into()).await;
    announce_start();
    let mut all = Seen::default();
    match pacer.await {
        Ok(0) => {}
        Ok(missed) => {
            all.errors += missed;
            all.first_error = Some(format!("{missed} requests found no room in the queue"));
        }
        Err(panic) => all.error(panic),
    }
    while let Some(seen) = tasks.join_next().await {
        match seen {
            Ok(seen) => all.merge(seen),
            Err(panic) => all.error(panic),
        }
    }
    all.outcome(plan.duration.as_secs_f64())
}

async fn answer_due(target: SocketAddr, mut due: mpsc::Receiver<Instant>, start: Instant) -> Seen {
    let mut seen = Seen::default();
    let mut connection = match Connection::open(target).await {
        Ok(connection) => connection,
        Err(e) => {
            seen.error(e);
            return seen;
        }
    };
    while let Some(due) = due.recv().await {
        if let Err(e) = connection.request().await {
            seen.error(e);
            return seen;
        }
        if due >= start {
            seen.latencies.push(due.elapsed());
        }
    }
    seen
}

async fn bulk(target: SocketAddr, plan: &Plan) -> Outcome {
    let mut bytes = 0;
    let result = bulk_stream(target, plan, &mut bytes).await;
    Outcome {
        seconds: plan.duration.as_secs_f64(),
        bytes,
        errors: u64::from(result.is_err()),
        first_error: result.err().map(|e| e.to_string()),
        ..Outcome::default()
    }
}

async fn bulk_stream(target: SocketAddr, plan: &Plan, bytes: &mut u64) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    let upload = plan.case == Case::Bulk;
    stream
        .write_all(&[if upload { UPLOAD } else { DOWNLOAD }])
        .await?;
    let mut buffer = vec![0; BULK_BUFFER];
    let start = Instant::now() + plan.warm_up;
    let end = start + plan.duration;
    let mut announced = false;
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        if now >= start && !announced {
            announce_start();
            announced = true;
        }
        let length = if upload {
            stream.write(&buffer).await?
        } else {
            stream.read(&mut buffer).await?
        };
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if announced {
            *bytes += length as u64;
        }
    }
    Ok(())
}

/// Holds the connections until standard input ends.
async fn idle(target: SocketAddr, plan: &Plan) -> Outcome {
    let mut seen = Seen::default();
    let mut held = Vec::with_capacity(plan.connections);
    let began = Instant::now();
    for _ in 0..plan.connections {
        let opened = async {
            let mut connection = Connection::open(target).await?;
            connection.request().await?;
            Ok::<_, io::Error>(connection)
        };
        match opened.await {
            Ok(connection) => held.push(connection),
            Err(e) => seen.error(e),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    announce_start();
    let _ =
        tokio::task::spawn_blocking(|| io::copy(&mut io::stdin().lock(), &mut io::sink())).await;
    Outcome {
        requests: held.len() as u64,
        ..seen.outcome(seconds)
    }
}

struct Connection {
    stream: TcpStream,
}

impl Connection {
    async fn open(target: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(target).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream })
    }

    async fn exchange(&mut self, request: &[u8]) -> io::Result<()> {
        self.stream.write_all(request).await?;
        let mut buffer = [0; 1024];
        let mut length = 0;
        loop {
            match self.stream.read(&mut buffer[length..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => length += more,
            }
            match response_length(&buffer[..length])? {
                Some(whole) if length == whole => return Ok(()),
                Some(whole) if length > whole || whole > buffer.len() => {
                    return Err(io::Error::other("bytes after the response, or too many"));
                }
                _ => {}
            }
        }
    }

    async fn closed_by_peer(&mut self) -> io::Result<()> {
        match self.stream.read(&mut [0]).await? {
            0 => Ok(()),
            _ => Err(io::Error::other("bytes after the response")),
        }
    }
}

/// Length of head and body once the head is complete. A proxy's headers differ from answer to answer.
fn response_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = &bytes[..end];
    if !head.starts_with(b"HTTP/1.1 200") {
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or(head);
        return Err(io::Error::other(format!(
            "answer: {}",
            String::from_utf8_lossy(line)
        )));
    }
    let body = head
        .split(|byte| *byte == b'\n')
        .find_map(|line| {
            let (name, value) = line.split_at_checked(LENGTH.len())?;
            name.eq_ignore_ascii_case(LENGTH).then_some(value)
        })
        .and_then(|value| str::from_utf8(value).ok()?.trim().parse::<usize>().ok())
        .ok_or_else(|| io::Error::other("answer without Content-Length"))?;
    Ok(Some(end + 4 + body))
}

fn announce_start() {
    let mut out = io::stdout().lock();
    // Whoever reads has gone away only when the run has been ended.
    let _ = writeln!(out, "start").and_then(|()| out.flush());
}

const REQUEST: &[u8] =
    b"GET /bench HTTP/1.1\r\nHost: server.bench\r\nUser-Agent: warren-bench\r\n\r\n";
const REQUEST_CLOSE: &[u8] =
    b"GET /bench HTTP/1.1\r\nHost: server.bench\r\nUser-Agent: warren-bench\r\nConnection: close\r\n\r\n";
const LENGTH: &[u8] = b"content-length:";
/// How long after its time a run may still wait for answers.
const STALLED: Duration = Duration::from_secs(10);
/// Requests that may wait for one connection of the open loop before they count as errors.
const OPEN_LOOP_QUEUE: usize = 4096;
