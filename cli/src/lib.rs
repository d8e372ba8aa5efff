//! The `warren` command: what a person types. So far that is the lab, a whole mesh on one machine.

mod args;
mod error;
mod lab;

use std::process::ExitCode;

use clap::Parser;

/// Reads the command line and does what it says. Errors go to standard error, one sentence a line.
pub fn main() -> ExitCode {
    let args::Warren { command } = args::Warren::parse();
    let done = match command {
        args::Command::Lab { command } => lab::run(command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("warren: {error}");
        ExitCode::FAILURE
    })
}
