//! Sends HTTP requests from inside a pod and prints a JSON report ([`RequestReport`]): a closed loop of
//! `--connections`, or an open loop of `--rate` requests a second whatever becomes of the earlier ones.
//! Prints `serving` after the first answer.

use std::cell::RefCell;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use warren_tests::http::RequestReport;

#[derive(Parser)]
struct Args {
    /// http://host:port/path; several take turns, all at the first one's host and port
    #[arg(required = true)]
    urls: Vec<String>,
    /// Closed loop: this many connections, each with one request at a time
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Open loop: requests a second
    #[arg(long)]
    rate: Option<u32>,
    /// HTTP/2 with prior knowledge; in an open loop over `--connections` connections
    #[arg(long)]
    h2: bool,
    /// A new connection for every request
    #[arg(long)]
    no_keep_alive: bool,
    /// Ends after this many requests
    #[arg(long)]
    total: Option<u64>,
    /// Ends after this time at the latest
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
    /// Ends when this file exists
    #[arg(long)]
    stop: Option<PathBuf>,
    #[arg(long, default_value = "GET")]
    method: Method,
    /// `name: value`
    #[arg(long)]
    header: Vec<String>,
    /// Bytes of the request's body
    #[arg(long, default_value_t = 0)]
    body: usize,
    /// Time within which a request must be answered
    #[arg(long, default_value_t = 10_000)]
    deadline_ms: u64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let uris: Vec<Uri> = args
        .urls
        .iter()
        .map(|u| u.parse())
        .collect::<Result<_, _>>()?;
    let first = uris[0].authority().ok_or("the URL has no host")?;
    let target = (
        first.host().trim_matches(['[', ']']),
        first.port_u16().unwrap_or(80),
    );
    let target = target
        .to_socket_addrs()?
        .next()
        .ok_or("the host has no address")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let load = Rc::new(Load {
        body: Bytes::from(vec![b'x'; args.body]),
        end: Instant::now() + Duration::from_secs_f64(args.seconds),
        begin: Instant::now(),
        target,
        uris,
        args,
        tally: RefCell::default(),
        idle: RefCell::default(),
    });
    let report = tokio::task::LocalSet::new().block_on(&runtime, generate(load));
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

struct Load {
    args: Args,
    uris: Vec<Uri>,
    target: SocketAddr,
    body: Bytes,
    begin: Instant,
    end: Instant,
    tally: RefCell<Tally>,
    /// Open loop: connections that wait for a request.
    idle: RefCell<Vec<Connection>>,
}

#[derive(Default)]
struct Tally {
    report: RequestReport,
    waits: Vec<f64>,
    stopped: bool,
}

enum Connection {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

/// Why a request has no answer.
enum Failure {
    /// The server's GOAWAY says that it did not process it.
    LeftOut,
    Other(String),
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self::Other(why)
    }
}

fn is_left_out(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    source
        .and_then(|e| e.downcast_ref::<h2::Error>())
        .is_some_and(|e| {
            e.is_go_away() && e.is_remote() && e.reason() == Some(h2::Reason::NO_ERROR)
        })
}

async fn generate(load: Rc<Load>) -> RequestReport {
    let mut running = tokio::task::JoinSet::new();
    if let Some(rate) = load.args.rate {
        let mut schedule = interval(Duration::from_secs(1) / rate.max(1));
        schedule.set_missed_tick_behavior(MissedTickBehavior::Burst);
        loop {
            let due = schedule.tick().await;
            let Some(number) = load.next() else { break };
            let load = Rc::clone(&load);
            let lag = Instant::now() - due;
            running.spawn_local(async move {
                let connection = load.take_idle();
                let connection = load.request(number, connection, lag).await;
                if let Some(connection) = connection {
                    load.idle.borrow_mut().push(connection);
                }
            });
            while running.try_join_next().is_some() {}
        }
    } else {
        for _ in 0..load.args.connections {
            let load = Rc::clone(&load);
            running.spawn_local(async move {
                let mut connection = None;
                while let Some(number) = load.next() {
                    connection = load.request(number, connection, Duration::ZERO).await;
                }
            });
        }
    }
    while running.join_next().await.is_some() {}
    let mut tally = load.tally.borrow_mut();
    tally.waits.sort_by(f64::total_cmp);
    let rank = |of: f64| {
        let at = (tally.waits.len() as f64 * of) as usize;
        tally.waits.get(at).copied().unwrap_or_default()
    };
    let (p50, p99) = (rank(0.5), rank(0.99));
    let report = &mut tally.report;
    (report.p50_ms, report.p99_ms) = (p50, p99);
    report.seconds = load.begin.elapsed().as_secs_f64();
    report.clone()
}

impl Load {
    /// The number of the next request; `None` when it is time to end.
    fn next(&self) -> Option<u64> {
        let mut tally = self.tally.borrow_mut();
        let number = tally.report.started;
        // Looked for now and then, since it is a system call.
        if number.is_multiple_of(20) && self.args.stop.as_ref().is_some_and(|f| f.exists()) {
            tally.stopped = true;
        }
        let enough = self.args.total.is_some_and(|total| number >= total);
        if tally.stopped || enough || Instant::now() >= self.end {
            return None;
        }
        tally.report.started += 1;
        Some(number)
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.idle.borrow_mut();
        if self.args.h2 && idle.len() < self.args.connections {
            return None;
        }
        if self.args.h2 {
            (!idle.is_empty()).then(|| idle.remove(0))
        } else {
            idle.pop()
        }
    }

    /// One request; the connection if it can be used again.
    async fn request(
        &self,
        number: u64,
        connection: Option<Connection>,
        lag: Duration,
    ) -> Option<Connection> {
        let started = Instant::now();
        let deadline = Duration::from_millis(self.args.deadline_ms);
        let usable = connection.filter(|c| match c {
            Connection::One(sender) => !sender.is_closed(),
            Connection::Two(sender) => !sender.is_closed(),
        });
        let outcome = timeout(deadline, self.exchange(number, usable)).await;
        let mut tally = self.tally.borrow_mut();
        let wait = started.elapsed().as_secs_f64() * 1e3;
        let second = self.begin.elapsed().as_secs() as usize;
        let report = &mut tally.report;
        report.lag_ms = report.lag_ms.max(lag.as_secs_f64() * 1e3);
        let (what, connection) = match outcome {
            Ok(Ok((response, connection))) => {
                let status = response.status();
                *report.statuses.entry(status.as_u16()).or_default() += 1;
                let text = |name: &str| {
                    let value = response.headers().get(name).and_then(|v| v.to_str().ok());
                    value.unwrap_or_default().to_owned()
                };
                let server = text("x-server");
                if status.is_success() {
                    report.ok += 1;
                    if report.ok == 1 {
                        println!("serving");
                    }
                } else {
                    let cause = text("warren-proxy-error");
                    if !cause.is_empty() {
                        *report.causes.entry(cause).or_default() += 1;
                    }
                }
                *report.servers.entry(server.clone()).or_default() += 1;
                (format!("{server} {}", status.as_u16()), connection)
            }
            Ok(Err(why)) => (failed(report, second, &why), None),
            Err(_) => (
                failed(report, second, "not answered within the deadline"),
                None,
            ),
        };
        while report.timeline.len() <= second {
            report.timeline.push(Default::default());
        }
        *report.timeline[second].entry(what).or_default() += 1;
        report.slowest_ms = report.slowest_ms.max(wait);
        tally.waits.push(wait);
        connection.filter(|_| !self.args.no_keep_alive)
    }

    /// What a server's GOAWAY left out was not processed, and is asked again (RFC 9113, section 6.8).
    async fn exchange(
        &self,
        number: u64,
        connection: Option<Connection>,
    ) -> Result<(Response<()>, Option<Connection>), String> {
        match self.attempt(number, connection).await {
            Err(Failure::LeftOut) => self.attempt(number, None).await,
            result => result,
        }
        .map_err(|failure| match failure {
            Failure::LeftOut => "left out by GOAWAY twice".into(),
            Failure::Other(why) => why,
        })
    }

    async fn attempt(
        &self,
        number: u64,
        connection: Option<Connection>,
    ) -> Result<(Response<()>, Option<Connection>), Failure> {
        let mut connection = match connection {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let uri = &self.uris[number as usize % self.uris.len()];
        let mut request = Request::builder().method(self.args.method.clone());
        for header in &self.args.header {
            let (name, value) = header.split_once(':').unwrap_or((header, ""));
            request = request.header(name.trim(), value.trim());
        }
        let authority = uri.authority().map_or("", |a| a.as_str());
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        let body = Full::new(self.body.clone());
        let response = match &mut connection {
            Connection::One(sender) => {
                let request = request.uri(path).header("host", authority).body(body);
                sender
                    .ready()
                    .await
                    .map_err(|e| format!("connection: {e:?}"))?;
                sender
                    .send_request(request.map_err(|e| e.to_string())?)
                    .await
            }
            Connection::Two(sender) => {
                let request = request.uri(uri.clone()).body(body);
                sender
                    .ready()
                    .await
                    .map_err(|e| format!("connection: {e:?}"))?;
                sender
                    .send_request(request.map_err(|e| e.to_string())?)
                    .await
            }
        };
        let response = response.map_err(|e| {
            if is_left_out(&e) {
                Failure::LeftOut
            } else {
                Failure::Other(format!("answer: {e:?}"))
            }
        });
        let (parts, mut body) = response?.into_parts();
        while let Some(frame) = body.frame().await {
            frame.map_err(|e| format!("body: {e:?}"))?;
        }
        // Whether the server closes after it is known a moment after the body's end.
        let usable = match &mut connection {
            Connection::One(sender) => sender.ready().await.is_ok(),
            Connection::Two(sender) => sender.ready().await.is_ok(),
        };
        Ok((
            Response::from_parts(parts, ()),
            usable.then_some(connection),
        ))
    }

    async fn connect(&self) -> Result<Connection, String> {
        self.tally.borrow_mut().report.connects += 1;
        let stream = TcpStream::connect(self.target)
            .await
            .map_err(|e| format!("connect: {e}"))?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let io = TokioIo::new(stream);
        if self.args.h2 {
            let made = http2::handshake(TokioExecutor::new(), io).await;
            let (sender, driver) = made.map_err(|e| format!("connect: {e:?}"))?;
            tokio::task::spawn_local(driver);
            Ok(Connection::Two(sender))
        } else {
            let made = http1::handshake(io).await;
            let (sender, driver) = made.map_err(|e| format!("connect: {e:?}"))?;
            tokio::task::spawn_local(driver);
            Ok(Connection::One(sender))
        }
    }
}

/// Counts a request without an answer by the step it failed at.
fn failed(report: &mut RequestReport, second: usize, why: &str) -> String {
    let kind = why.split_once(':').map_or(why, |(kind, _)| kind).to_owned();
    *report.failed.entry(kind.clone()).or_default() += 1;
    if report.failures.len() < 20 {
        report.failures.push(format!("{second} s: {why}"));
    }
    format!("failed {kind}")
}
