//! New connections at a steady rate, whatever becomes of the earlier ones (an open loop), each a line
//! sent and echoed. Runs inside a pod; prints `serving` after the first success and a JSON report at
//! the end.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use warren_tests::load::{LoadReport, epoch_ms};

#[derive(Parser)]
struct Args {
    /// host:port of an echo server
    #[arg(long)]
    target: String,
    /// New connections a second
    #[arg(long)]
    rate: u32,
    /// Time within which a connection must be done
    #[arg(long, default_value_t = 10_000)]
    deadline_ms: u64,
    /// Ends when this file exists
    #[arg(long)]
    stop: PathBuf,
    /// Ends after this time at the latest
    #[arg(long, default_value_t = 600)]
    seconds: u64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let target = args
        .target
        .to_socket_addrs()?
        .next()
        .ok_or("the target has no address")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = tokio::task::LocalSet::new().block_on(&runtime, generate(&args, target));
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

#[derive(Default)]
struct Tally {
    report: LoadReport,
    waits: Vec<f64>,
}

async fn generate(args: &Args, target: SocketAddr) -> LoadReport {
    let tally = Rc::new(RefCell::new(Tally::default()));
    let deadline = Duration::from_millis(args.deadline_ms);
    let begin = Instant::now();
    let end = begin + Duration::from_secs(args.seconds);
    let mut schedule = interval(Duration::from_secs(1) / args.rate.max(1));
    schedule.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut running = tokio::task::JoinSet::new();
    let mut count = 0u64;
    loop {
        let due = schedule.tick().await;
        // Looked for ten times a second, whatever the rate.
        if count.is_multiple_of(u64::from(args.rate / 10).max(1))
            && (args.stop.exists() || Instant::now() >= end)
        {
            break;
        }
        let tally = Rc::clone(&tally);
        running.spawn_local(async move {
            let started = Instant::now();
            let outcome = match timeout(deadline, exchange(target, count)).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::Failed(Failure::TimedOut, "not done within the deadline".into()),
            };
            tally
                .borrow_mut()
                .count(&outcome, started, started - due, begin);
        });
        count += 1;
        while running.try_join_next().is_some() {}
    }
    while running.join_next().await.is_some() {}
    let mut tally = tally.borrow_mut();
    tally.waits.sort_by(f64::total_cmp);
    let rank = |waits: &[f64], of: f64| {
        waits
            .get((waits.len() as f64 * of) as usize)
            .copied()
            .unwrap_or_default()
    };
    tally.report.median_ms = rank(&tally.waits, 0.5);
    tally.report.p99_ms = rank(&tally.waits, 0.99);
    tally.report.clone()
}

enum Outcome {
    Ok { connect: Duration },
    Failed(Failure, String),
}

#[derive(Clone, Copy, Debug)]
enum Failure {
    Refused,
    Unreachable,
    Cut,
    TimedOut,
    Wrong,
}

async fn exchange(target: SocketAddr, number: u64) -> Outcome {
    let started = Instant::now();
    let mut stream = match TcpStream::connect(target).await {
        Ok(stream) => stream,
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            return Outcome::Failed(Failure::Refused, e.to_string());
        }
        Err(e) => return Outcome::Failed(Failure::Unreachable, e.to_string()),
    };
    let connect = started.elapsed();
    let line = format!("connection {number}\n");
    match talk(&mut stream, line.as_bytes()).await {
        Ok(answer) if answer == line.as_bytes() => Outcome::Ok { connect },
        Ok(answer) if line.as_bytes().starts_with(&answer) => Outcome::Failed(
            Failure::Cut,
            format!("closed after {} bytes of the answer", answer.len()),
        ),
        Ok(answer) => Outcome::Failed(
            Failure::Wrong,
            String::from_utf8_lossy(&answer).into_owned(),
        ),
        Err(e) => Outcome::Failed(Failure::Cut, e.to_string()),
    }
}

/// Sends a line, ends the sending half, reads to the end.
async fn talk(stream: &mut TcpStream, line: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.set_nodelay(true)?;
    stream.write_all(line).await?;
    let mut answer = vec![0; line.len()];
    stream.read_exact(&mut answer).await?;
    stream.shutdown().await?;
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

impl Tally {
    fn count(&mut self, outcome: &Outcome, started: Instant, lag: Duration, begin: Instant) {
        let report = &mut self.report;
        report.started += 1;
        report.lag_ms = report.lag_ms.max(ms(lag));
        match outcome {
            Outcome::Ok { connect } => {
                let wait = ms(started.elapsed());
                self.waits.push(wait);
                report.ok += 1;
                report.slowest_ms = report.slowest_ms.max(wait);
                report.slowest_connect_ms = report.slowest_connect_ms.max(ms(*connect));
                if report.ok == 1 {
                    println!("serving");
                }
            }
            Outcome::Failed(failure, why) => {
                *match failure {
                    Failure::Refused => &mut report.refused,
                    Failure::Unreachable => &mut report.unreachable,
                    Failure::Cut => &mut report.cut,
                    Failure::TimedOut => &mut report.timed_out,
                    Failure::Wrong => &mut report.wrong,
                } += 1;
                if matches!(failure, Failure::Cut) {
                    let end = SystemTime::now();
                    let begin = end - started.elapsed();
                    report.cuts.push((epoch_ms(begin), epoch_ms(end)));
                }
                if report.failures.len() < 20 {
                    let at = started.duration_since(begin).as_secs_f64();
                    report
                        .failures
                        .push(format!("{at:.3} s: {failure:?}: {why}"));
                }
            }
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
