//! `warren-node-proxy`: the supervisor, and the worker it starts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use warren_node_proxy::process::run;
use warren_node_proxy::supervisor;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Warren's data plane on a node.
///
/// Starts a worker that carries the traffic, and starts it again when it dies. Must run without
/// capabilities and not as root.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/warren/node-proxy.yaml"
    )]
    config: PathBuf,
    /// Run although root or with capabilities. For experiments.
    #[arg(long)]
    allow_privileged: bool,
    /// Be the worker of the supervisor with this process id (0: of none).
    #[arg(long, hide = true, value_name = "PID")]
    worker: Option<u32>,
}

fn main() -> ExitCode {
    let Arguments {
        config,
        allow_privileged,
        worker,
    } = Arguments::parse();
    let result = match worker {
        Some(pid) => match run::worker(&config, pid, allow_privileged) {
            Ok(()) => Ok(0),
            Err(error) => Err((error.code(), error.to_string())),
        },
        None => supervisor::run(&supervisor::Options {
            config,
            allow_privileged,
        })
        .map_err(|error| (error.code(), error.to_string())),
    };
    let (code, message) = match result {
        Ok(code) => return code.into(),
        Err(failed) => failed,
    };
    eprintln!("warren-node-proxy: {message}");
    code.into()
}
