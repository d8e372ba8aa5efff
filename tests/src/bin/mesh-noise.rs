//! A workload that does its worst over HTTP/1 from inside a pod, as much as its processor time allows, until it is
//! told to stop: connections without end, huge headers, bodies that hardly move. What ends is begun again.
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
use tokio::time::{sleep, timeout};
use warren_tests::load::NoiseReport;

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
    /// Bodies of each sort that are under way at once
    #[arg(long, default_value_t = 100)]
    bodies: usize,
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

/// Connections that are being opened at once.
const OPENING: usize = 64;
/// Connections with huge headers.
const HEADERS: usize = 16;
/// Between two pieces of a body that trickles.
const TRICKLE: Duration = Duration::from_millis(20);
/// A moment before what failed is begun again: the pod's own processor is not the target.
const AGAIN: Duration = Duration::from_millis(5);
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
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut tasks = JoinSet::new();
        for kind in &args.kind {
            match kind {
                Kind::Connections => connections(&mut tasks, &args, target, &report),
                Kind::Headers => headers(&mut tasks, target, &report),
                Kind::Bodies => bodies(&mut tasks, &args, target, &report),
            }
        }
        println!("noisy");
        while !args.stop.exists() {
            sleep(Duration::from_millis(50)).await;
        }
        tasks.shutdown().await;
    });
    println!("{}", serde_json::to_string(&*done.borrow())?);
    Ok(())
}

/// Does it again and again.
fn repeat<F: Future<Output = io::Result<()>> + 'static>(
    tasks: &mut JoinSet<()>,
    report: &Report,
    mut once: impl FnMut() -> F + 'static,
) {
    let report = Rc::clone(report);
    tasks.spawn_local(async move {
        loop {
            if once().await.is_err() {
                report.borrow_mut().failed += 1;
                sleep(AGAIN).await;
            }
        }
    });
}

fn connections(tasks: &mut JoinSet<()>, args: &Args, target: SocketAddr, report: &Report) {
    let held = Rc::new(RefCell::new(VecDeque::new()));
    let most = args.connections;
    for _ in 0..OPENING {
        let (held, counted) = (Rc::clone(&held), Rc::clone(report));
        repeat(tasks, report, move || {
            let (held, counted) = (Rc::clone(&held), Rc::clone(&counted));
            async move {
                let mut stream = TcpStream::connect(target).await?;
                ask(&mut stream, "").await?;
                let mut held = held.borrow_mut();
                held.push_back(stream);
                let mut report = counted.borrow_mut();
                report.connections += 1;
                report.most_held = report.most_held.max(held.len() as u64);
                if held.len() > most {
                    held.pop_front();
                }
                Ok(())
            }
        });
    }
}

fn headers(tasks: &mut JoinSet<()>, target: SocketAddr, report: &Report) {
    let of = |count: usize| -> String {
        let value = "x".repeat(600);
        (0..count)
            .map(|n| format!("x-noise-{n}: {value}\r\n"))
            .collect()
    };
    let (huge, too_huge) = (Rc::new(of(95)), Rc::new(of(160)));
    for _ in 0..HEADERS {
        let (huge, too_huge) = (Rc::clone(&huge), Rc::clone(&too_huge));
        let counted = Rc::clone(report);
        repeat(tasks, report, move || {
            let (huge, too_huge) = (Rc::clone(&huge), Rc::clone(&too_huge));
            let counted = Rc::clone(&counted);
            async move {
                let mut stream = TcpStream::connect(target).await?;
                for _ in 0..8 {
                    ask(&mut stream, &huge).await?;
                    counted.borrow_mut().heads += 1;
                }
                // Refused, and the connection closed.
                ask(&mut stream, &too_huge).await
            }
        });
    }
}

fn bodies(tasks: &mut JoinSet<()>, args: &Args, target: SocketAddr, report: &Report) {
    for _ in 0..args.bodies {
        let counted = [0; 4].map(|_| Rc::clone(report));
        let [a, b, c, d] = counted;
        repeat(tasks, report, move || trickle_up(target, Rc::clone(&a)));
        repeat(tasks, report, move || trickle_down(target, Rc::clone(&b)));
        repeat(tasks, report, move || unread_up(target, Rc::clone(&c)));
        repeat(tasks, report, move || unread_down(target, Rc::clone(&d)));
    }
}

const UPLOAD: &str = "content-length: 1000000000\r\n";

async fn trickle_up(target: SocketAddr, report: Report) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    send_head(&mut stream, "POST", "/", UPLOAD).await?;
    report.borrow_mut().bodies += 1;
    loop {
        stream.write_all(&[b'x'; 64]).await?;
        sleep(TRICKLE).await;
    }
}

async fn trickle_down(target: SocketAddr, report: Report) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    send_head(&mut stream, "GET", &format!("/?{LARGE}"), "").await?;
    report.borrow_mut().bodies += 1;
    let mut some = [0; 4096];
    while stream.read(&mut some).await? > 0 {
        sleep(TRICKLE).await;
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// To an app that does not read.
async fn unread_up(target: SocketAddr, report: Report) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    let headers = format!("x-control: read=3600000\r\n{UPLOAD}");
    send_head(&mut stream, "POST", "/", &headers).await?;
    report.borrow_mut().bodies += 1;
    let some = [b'x'; 64 * 1024];
    loop {
        stream.write_all(&some).await?;
    }
}

async fn unread_down(target: SocketAddr, report: Report) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    send_head(&mut stream, "GET", &format!("/?{LARGE}"), "").await?;
    report.borrow_mut().bodies += 1;
    // Nothing is read, so its end is not found by reading.
    loop {
        sleep(TRICKLE * 10).await;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
}

async fn send_head(
    stream: &mut TcpStream,
    method: &str,
    path: &str,
    headers: &str,
) -> io::Result<()> {
    let head = format!("{method} {path} HTTP/1.1\r\nhost: noise\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await
}

/// A small request, unless its headers are large, with an answer that is read.
async fn ask(stream: &mut TcpStream, headers: &str) -> io::Result<()> {
    let exchange = async {
        send_head(stream, "GET", "/?size=10", headers).await?;
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
