//! Holds many connections open, spread over processes because of the descriptor limit. Each exchanges
//! a line at the start and at the end, and one every `--tick-ms` if that is set. Prints `held <n>` when
//! all are open and a JSON report at the end.

use std::io::{BufRead, BufReader as StdBufReader};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use warren_tests::load::HoldReport;

#[derive(Clone, Parser)]
struct Args {
    /// host:port of an echo server
    #[arg(long)]
    target: String,
    /// Connections, in all
    #[arg(long)]
    connections: u64,
    /// Processes they are spread over
    #[arg(long, default_value_t = 1)]
    processes: u64,
    /// Interval of the lines exchanged; 0: idle
    #[arg(long, default_value_t = 0)]
    tick_ms: u64,
    /// Ends when this file exists
    #[arg(long)]
    stop: PathBuf,
}

const LINE: &[u8] = b"still there?\n";
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let report = if args.processes > 1 {
        spread(&args)?
    } else {
        alone(&args)?
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

fn spread(args: &Args) -> Result<HoldReport, Box<dyn std::error::Error>> {
    let mut children = Vec::new();
    for i in 0..args.processes {
        let share =
            args.connections / args.processes + u64::from(i < args.connections % args.processes);
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--target",
                &args.target,
                "--connections",
                &share.to_string(),
            ])
            .args(["--tick-ms", &args.tick_ms.to_string()])
            .arg("--stop")
            .arg(&args.stop)
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = StdBufReader::new(child.stdout.take().ok_or("no pipe")?).lines();
        children.push((child, lines));
    }
    let mut sum = HoldReport::default();
    for (_, lines) in &mut children {
        let line = lines.next().ok_or("a process ended early")??;
        sum.held += line
            .strip_prefix("held ")
            .ok_or("an unknown line")?
            .parse::<u64>()?;
    }
    println!("held {}", sum.held);
    sum.held = 0;
    for (mut child, mut lines) in children {
        let part: HoldReport = serde_json::from_str(&lines.next().ok_or("no report")??)?;
        sum.held += part.held;
        sum.failed += part.failed;
        sum.broken += part.broken;
        sum.ticks += part.ticks;
        sum.slowest_tick_ms = sum.slowest_tick_ms.max(part.slowest_tick_ms);
        sum.failures.extend(part.failures);
        child.wait()?;
    }
    sum.failures.truncate(20);
    Ok(sum)
}

fn alone(args: &Args) -> Result<HoldReport, Box<dyn std::error::Error>> {
    let target = args
        .target
        .to_socket_addrs()?
        .next()
        .ok_or("the target has no address")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(tokio::task::LocalSet::new().block_on(&runtime, hold(args, target)))
}

async fn hold(args: &Args, target: SocketAddr) -> HoldReport {
    let opening = Rc::new(Semaphore::new(64));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..args.connections {
        let opening = Rc::clone(&opening);
        tasks.spawn_local(async move {
            let _permit = opening.acquire().await;
            let mut stream = TcpStream::connect(target).await?;
            exchange(&mut stream).await?;
            Ok::<_, std::io::Error>(stream)
        });
    }
    let mut report = HoldReport::default();
    let mut streams = Vec::new();
    while let Some(done) = tasks.join_next().await {
        match done.map_err(std::io::Error::other).and_then(|r| r) {
            Ok(stream) => streams.push(stream),
            Err(e) => {
                report.failed += 1;
                note(&mut report, format!("open: {e}"));
            }
        }
    }
    report.held = streams.len() as u64;
    println!("held {}", report.held);
    let (stop, stopped) = watch::channel(false);
    let tick = (args.tick_ms > 0).then(|| Duration::from_millis(args.tick_ms));
    let mut held = tokio::task::JoinSet::new();
    for stream in streams {
        held.spawn_local(keep(stream, tick, stopped.clone()));
    }
    while !args.stop.exists() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The receivers live in the tasks; without tasks there is nobody to tell.
    let _ = stop.send(true);
    while let Some(done) = held.join_next().await {
        match done {
            Ok((ticks, slowest, end)) => {
                report.ticks += ticks;
                report.slowest_tick_ms = report.slowest_tick_ms.max(slowest.as_secs_f64() * 1e3);
                if let Err(e) = end {
                    report.broken += 1;
                    note(&mut report, format!("after {ticks} lines: {e}"));
                }
            }
            Err(e) => note(&mut report, e.to_string()),
        }
    }
    report
}

async fn keep(
    mut stream: TcpStream,
    tick: Option<Duration>,
    mut stopped: watch::Receiver<bool>,
) -> (u64, Duration, std::io::Result<()>) {
    let (mut ticks, mut slowest) = (0, Duration::ZERO);
    loop {
        let last = match tick {
            Some(tick) => timeout(tick, stopped.wait_for(|s| *s)).await.is_ok(),
            None => {
                // An error means that nobody is left to stop it: the end as well.
                let _ = stopped.wait_for(|s| *s).await;
                true
            }
        };
        let started = Instant::now();
        if let Err(e) = exchange(&mut stream).await {
            return (ticks, slowest, Err(e));
        }
        ticks += 1;
        slowest = slowest.max(started.elapsed());
        if last {
            return (ticks, slowest, Ok(()));
        }
    }
}

async fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    let talk = async {
        stream.write_all(LINE).await?;
        let mut answer = [0; LINE.len()];
        stream.read_exact(&mut answer).await?;
        if answer == *LINE {
            Ok(())
        } else {
            Err(std::io::Error::other("another answer than what was sent"))
        }
    };
    timeout(ANSWER_WITHIN, talk)
        .await
        .map_err(|_| std::io::Error::other("no answer in time"))?
}

fn note(report: &mut HoldReport, failure: String) {
    if report.failures.len() < 20 {
        report.failures.push(failure);
    }
}
