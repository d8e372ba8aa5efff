//! The `warren` command: what a person types. The lab is a whole mesh on one machine; everything else is about a cluster.

mod args;
mod cluster;
mod error;
mod lab;

use std::process::ExitCode;

use clap::Parser;

/// Reads the command line and does what it says. Errors go to standard error, one sentence a line.
pub fn main() -> ExitCode {
    let args::Warren { command } = args::Warren::parse();
    let done = match command {
        args::Command::Lab { command } => lab::run(command),
        args::Command::Install(options) => cluster::install::run(&options),
        args::Command::Check(options) => cluster::run(cluster::check::run(options)),
        args::Command::Stat(options) => cluster::run(cluster::stat::run(options)),
        args::Command::Uninstall(options) => cluster::run(cluster::uninstall::run(options)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("warren: {error}");
        ExitCode::FAILURE
    })
}
