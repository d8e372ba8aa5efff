//! `warren-cni`: the CNI plugin when a runtime calls it, otherwise the agent and its tools.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use warren_cni::{agent, plugin};

fn main() -> ExitCode {
    // The CNI specification, "Parameters": a runtime passes environment variables and no arguments.
    if std::env::args_os().len() <= 1 && std::env::var_os("CNI_COMMAND").is_some() {
        return plugin::main();
    }
    let result = match Arguments::parse().command {
        Command::Agent { config } => agent::main(&config),
        Command::Status { config, alive } => agent::status(&config, alive),
        Command::Uninstall { config, deadline } => {
            agent::uninstall(&config, Duration::from_secs(deadline))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("warren-cni: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Warren's CNI plugin and node agent. Without arguments and with CNI_COMMAND set it is the plugin.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node agent.
    Agent {
        /// Configuration file (docs/reference/cni.md).
        #[arg(long)]
        config: PathBuf,
    },
    /// Print the state of the agent that runs here, as JSON. Exits with 1 if there is none or it is not ready.
    Status {
        /// The agent's configuration file.
        #[arg(long)]
        config: PathBuf,
        /// Only ask whether it answers, not whether it is ready.
        #[arg(long)]
        alive: bool,
    },
    /// Take every pod of this node out of the mesh, then remove the plugin from the CNI chain.
    Uninstall {
        /// The agent's configuration file.
        #[arg(long)]
        config: PathBuf,
        /// Seconds that captured connections get to end.
        #[arg(long, default_value_t = 30)]
        deadline: u64,
    },
}
