//! A workload that does its worst over HTTP/1 from inside a pod until it is told to stop: connections without end, huge
//! headers, bodies that hardly move. It asks at a fixed rate at most: who is refused at once, or served
//! faster, asks no more often, so that two paths can be compared under the same load.
//! Prints `noisy` when it is under way and a JSON report ([`NoiseReport`]) at the end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use warren_tests::load::{NOISE_BODIES, NOISE_CONNECTIONS, NOISE_HEADS, Noise, NoiseReport};

#[derive(Parser)]
struct Args {
    /// host:port of a `mesh-http`
    #[arg(long)]
    target: String,
    /// What it does; several at once
    #[arg(long, required = true)]
    kind: Vec<Kind>,
    /// Connections that are held open at once; then the oldest makes room
    #[arg(long, default_value_t = 6000)]
    connections: usize,
    /// Bodies end by a reset: else a server has for minutes what nobody takes
    #[arg(long)]
    reset: bool,
    /// Of connections and heads in a second, for machines on which all of them are too many
    #[arg(long, default_value_t = 1.0)]
    share: f64,
    /// Ends when this file exists
    #[arg(long)]
    stop: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// One request on each connection, which is then held
    Connections,
    /// Heads of 60 KiB, now and then of more than any limit
    Headers,
    /// Uploads and downloads that trickle, and such that are not read at all
    Bodies,
}

/// Between two connections, or two heads, of one of those that send them. At the rates of `warren_tests::load`, which
/// are about what the generator's share of a processor is enough for where nothing is between it and its app.
const EVERY: Duration = Duration::from_millis(50);
/// Until all of it is under way. A hundred bodies of a sort so begin 20.2 ms one after another; with 20 they would
/// all move at the same moment ([`TRICKLE`]), a burst every 20 ms.
const START: Duration = Duration::from_millis(2020);
/// Heads on a connection before one that is more than any limit.
const SERIES: usize = 8;
/// How long a body takes, if it is not ended before: longer than a proxy's patience.
const BODY: Duration = Duration::from_secs(8);
/// Between two pieces of a body that trickles.
const TRICKLE: Duration = Duration::from_millis(20);
/// Until the first of an answer has come.
const FIRST: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(10);
const LARGE: &str = "size=16777216";

type Report = Rc<RefCell<NoiseReport>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let mut found = args.target.to_socket_addrs()?;
    let target = found.next().ok_or("the target has no address")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = Report::default();
    let done = Rc::clone(&report);
    let begin = std::time::Instant::now();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut tasks = JoinSet::new();
        for kind in &args.kind {
            match kind {
                Kind::Connections => connections(&mut tasks, &args, target, &report),
                Kind::Headers => headers(&mut tasks, &args, target, &report),
                Kind::Bodies => bodies(&mut tasks, &args, target, &report),
            }
        }
        println!("noisy");
        while !args.stop.exists() {
            sleep(Duration::from_millis(50)).await;
        }
        tasks.shutdown().await;
    });
    done.borrow_mut().seconds = begin.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&*done.borrow())?);
    Ok(())
}

/// How many there are at once for so many a second, each every [`EVERY`].
const fn at_once(a_second: u64) -> usize {
    (a_second * EVERY.as_millis() as u64 / 1000) as usize
}

/// Does something `slots` times in each `every`, spread evenly; `slot` makes what one of them does again and again. What
/// takes longer is not done twice at once.
fn repeat<F, G>(
    tasks: &mut JoinSet<()>,
    counted: Counted,
    (slots, every): (usize, Duration),
    slot: impl Fn() -> F,
) where
    F: Fn() -> G + 'static,
    G: Future<Output = io::Result<()>> + 'static,
{
    let begin = Instant::now();
    for number in 0..slots {
        let offset = every.min(START).mul_f64(number as f64 / slots as f64);
        let (counted, once) = (counted.clone(), slot());
        tasks.spawn_local(async move {
            let mut ticks = interval_at(begin + offset, every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                counted.update(|noise| noise.begun += 1);
                // That it is refused is expected; it is not counted as done.
                let _ = once().await;
            }
        });
    }
}

/// Where one kind of noise is counted.
#[derive(Clone)]
struct Counted {
    report: Report,
    of: fn(&mut NoiseReport) -> &mut Noise,
}

impl Counted {
    fn new(report: &Report, of: fn(&mut NoiseReport) -> &mut Noise) -> Self {
        let report = Rc::clone(report);
        Self { report, of }
    }

    fn update(&self, update: impl FnOnce(&mut Noise)) {
        update((self.of)(&mut self.report.borrow_mut()));
    }

    fn done(&self) {
        self.update(|noise| noise.done += 1);
    }
}

/// A connection that is closed without waiting: who closes thousands of connections in order has no port left before long.
async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(target).await?;
    stream.set_zero_linger()?;
    Ok(stream)
}

fn connections(tasks: &mut JoinSet<()>, args: &Args, target: SocketAddr, report: &Report) {
    let held = Rc::new(RefCell::new(VecDeque::new()));
    let most = args.connections;
    let counted = Counted::new(report, |report| &mut report.connections);
    let pace = (at_once(NOISE_CONNECTIONS), EVERY.div_f64(args.share));
    repeat(tasks, counted.clone(), pace, || {
        let (held, counted) = (Rc::clone(&held), counted.clone());
        move || {
            let (held, counted) = (Rc::clone(&held), counted.clone());
            async move {
                let mut stream = connect(target).await?;
                ask(&mut stream, "").await?;
                counted.done();
                let mut held = held.borrow_mut();
                held.push_back(stream);
                let mut report = counted.report.borrow_mut();
                report.most_held = report.most_held.max(held.len() as u64);
                if held.len() > most {
                    held.pop_front();
                }
                Ok(())
            }
        }
    });
}

fn headers(tasks: &mut JoinSet<()>, args: &Args, target: SocketAddr, report: &Report) {
    let of = |count: usize| -> Rc<str> {
        let value = "x".repeat(600);
        let head: String = (0..count)
            .map(|n| format!("x-noise-{n}: {value}\r\n"))
            .collect();
        head.into()
    };
    let (huge, too_huge) = (of(95), of(160));
    let counted = Counted::new(report, |report| &mut report.heads);
    let pace = (at_once(NOISE_HEADS), EVERY.div_f64(args.share));
    repeat(tasks, counted.clone(), pace, || {
        let (huge, too_huge) = (Rc::clone(&huge), Rc::clone(&too_huge));
        let (series, counted) = (Series::default(), counted.clone());
        move || {
            let (huge, too_huge) = (Rc::clone(&huge), Rc::clone(&too_huge));
            let (series, counted) = (Rc::clone(&series), counted.clone());
            async move {
                let begun = series.take();
                let (mut stream, seen) = match begun {
                    Some(begun) => begun,
                    None => (connect(target).await?, 0),
                };
                if seen == SERIES {
                    // Refused, and the connection closed.
                    ask(&mut stream, &too_huge).await?;
                    counted.done();
                    return Ok(());
                }
                ask(&mut stream, &huge).await?;
                counted.done();
                series.replace(Some((stream, seen + 1)));
                Ok(())
            }
        }
    });
}

/// A connection that sends huge heads, and how many it has sent.
type Series = Rc<RefCell<Option<(TcpStream, usize)>>>;

/// As many of each sort.
fn bodies(tasks: &mut JoinSet<()>, args: &Args, target: SocketAddr, report: &Report) {
    let counted = Counted::new(report, |report| &mut report.bodies);
    let down = Body::new(target, args.reset, "GET", &format!("/?{LARGE}"), "");
    let up = Body::new(target, args.reset, "POST", "/", UPLOAD);
    // To an app that does not read.
    let unread = format!("x-control: read=3600000\r\n{UPLOAD}");
    let unread = Body::new(target, args.reset, "POST", "/", &unread);
    endless(tasks, &counted, &up, trickle_up);
    endless(tasks, &counted, &down, trickle_down);
    endless(tasks, &counted, &unread, unread_up);
    endless(tasks, &counted, &down, unread_down);
}

const UPLOAD: &str = "content-length: 1000000000\r\n";

/// How a body begins.
struct Body {
    target: SocketAddr,
    reset: bool,
    head: String,
}

impl Body {
    fn new(target: SocketAddr, reset: bool, method: &str, path: &str, headers: &str) -> Rc<Self> {
        let head = head(method, path, headers);
        Rc::new(Self {
            target,
            reset,
            head,
        })
    }

    async fn begin(&self) -> io::Result<TcpStream> {
        let mut stream = match self.reset {
            true => connect(self.target).await?,
            false => TcpStream::connect(self.target).await?,
        };
        stream.write_all(self.head.as_bytes()).await?;
        Ok(stream)
    }
}

fn endless<F: Future<Output = io::Result<()>>>(
    tasks: &mut JoinSet<()>,
    counted: &Counted,
    body: &Rc<Body>,
    go_on: impl Fn(TcpStream) -> F + Copy + 'static,
) {
    const SORTS: u64 = 4;
    let count = (NOISE_BODIES / SORTS) as usize;
    repeat(tasks, counted.clone(), (count, BODY), || {
        let (counted, body) = (counted.clone(), Rc::clone(body));
        move || {
            let (counted, body) = (counted.clone(), Rc::clone(&body));
            async move {
                let stream = timeout(PATIENCE, body.begin()).await??;
                counted.done();
                // None ends by itself.
                if let Ok(ended) = timeout(BODY, go_on(stream)).await {
                    counted.update(|noise| noise.done -= 1);
                    return ended;
                }
                Ok(())
            }
        }
    });
}

async fn trickle_up(mut stream: TcpStream) -> io::Result<()> {
    loop {
        stream.write_all(&[b'x'; 64]).await?;
        sleep(TRICKLE).await;
    }
}

async fn trickle_down(mut stream: TcpStream) -> io::Result<()> {
    let mut some = [0; 4096];
    while stream.read(&mut some).await? > 0 {
        sleep(TRICKLE).await;
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

async fn unread_up(mut stream: TcpStream) -> io::Result<()> {
    let some = [b'x'; 64 * 1024];
    loop {
        stream.write_all(&some).await?;
    }
}

async fn unread_down(stream: TcpStream) -> io::Result<()> {
    // Nothing is read, so its end is not found by reading: a refusal is shorter than what waits here otherwise.
    let mut first = vec![0; 32 * 1024];
    loop {
        sleep(FIRST).await;
        if stream.peek(&mut first).await? < first.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
}

fn head(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: noise\r\n{headers}\r\n")
}

/// A small request, unless its headers are large, with an answer that is read.
async fn ask(stream: &mut TcpStream, headers: &str) -> io::Result<()> {
    let exchange = async {
        let head = head("GET", "/?size=10", headers);
        stream.write_all(head.as_bytes()).await?;
        let mut answer = [0; 4096];
        if stream.read(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    };
    timeout(PATIENCE, exchange)
        .await
        .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}
