//! `warren-controller --config FILE`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use warren_controller::config::{Config, LogFormat};
use warren_controller::run::Controller;

/// Warren's control plane: watches what users wrote, tells the nodes, signs certificates.
#[derive(Parser)]
#[command(name = "warren-controller", version)]
struct Arguments {
    /// The configuration file (YAML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config: Config = match mesh_api::config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    start_log(&config);
    // Two connections of every node.
    if let Err(error) = mesh_api::descriptors::raise_limit() {
        tracing::warn!("the limit of open files was not raised: {error}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(run(&config)),
        Err(error) => fail(&error),
    }
}

async fn run(config: &Config) -> ExitCode {
    let signals = signal(SignalKind::terminate())
        .and_then(|terminate| Ok((terminate, signal(SignalKind::interrupt())?)));
    let (mut terminate, mut interrupt) = match signals {
        Ok(signals) => signals,
        Err(error) => return fail(&error),
    };
    let started = tokio::select! {
        _ = terminate.recv() => return ExitCode::SUCCESS,
        _ = interrupt.recv() => return ExitCode::SUCCESS,
        started = Controller::start(config) => started,
    };
    let mut controller = match started {
        Ok(controller) => controller,
        Err(error) => return fail(&error),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        error = controller.failed() => return fail(&error),
    }
    tracing::info!("stopping");
    controller.stop().await;
    ExitCode::SUCCESS
}

fn start_log(config: &Config) {
    // Checked with the configuration.
    let filter = EnvFilter::builder().parse_lossy(&config.log);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A log that nobody reads any more must not end the process.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("warren-controller: {error}");
    ExitCode::FAILURE
}
