//! One run of one case on one arm: the client's outcome and what the proxies spent meanwhile.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde::Serialize;

use super::arm::{Arm, ArmName, FIRST_CORE};
use super::process::{self, MachineTime, in_namespace};
use super::{Error, Options, io};
use crate::load::{Case, Outcome, Plan};

/// One run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Run {
    pub(super) arm: ArmName,
    pub(super) case: Case,
    pub(super) connections: usize,
    pub(super) routes: usize,
    pub(super) repetition: u32,
    /// CPU time the host gave to others during the run.
    pub(super) steal_percent: f64,
    /// CPU time of each proxy in seconds: the caller's, the callee's.
    pub(super) proxy_cpu_seconds: Vec<f64>,
    pub(super) outcome: Outcome,
}

impl Run {
    /// Gigabits per second of a bulk case.
    pub(super) fn gbit_per_second(&self) -> f64 {
        self.outcome.bytes as f64 * 8e-9 / self.outcome.seconds
    }

    pub(super) fn requests_per_second(&self) -> f64 {
        self.outcome.requests as f64 / self.outcome.seconds
    }

    /// Of both proxies together.
    pub(super) fn cpu_us_per_request(&self) -> f64 {
        1e6 * self.proxy_cpu_seconds.iter().sum::<f64>() / self.outcome.requests as f64
    }

    /// Of both proxies together.
    pub(super) fn cpu_seconds_per_gigabyte(&self) -> f64 {
        1e9 * self.proxy_cpu_seconds.iter().sum::<f64>() / self.outcome.bytes as f64
    }

    pub(super) fn line(&self) -> String {
        let name = format!(
            "{} {}: ",
            self.arm,
            label(self.case, self.connections, self.routes)
        );
        let steal = format!(" (steal {:.1} %)", self.steal_percent);
        let errors = match &self.outcome.first_error {
            Some(error) => format!(", {} errors, first: {error}", self.outcome.errors),
            None => String::new(),
        };
        let value = match (self.case, self.outcome.latency) {
            (Case::Bulk | Case::BulkDown, _) => format!("{:.2} Gbit/s", self.gbit_per_second()),
            (_, Some(latency)) => {
                let cpu = match self.proxy_cpu_seconds.is_empty() {
                    true => String::new(),
                    false => format!(", CPU {:.1} us each", self.cpu_us_per_request()),
                };
                format!(
                    "{:.0}/s, p50 {:.0} us, p99 {:.0} us{cpu}",
                    self.requests_per_second(),
                    latency.p50,
                    latency.p99,
                )
            }
            (_, None) => "nothing".into(),
        };
        name + &value + &errors + &steal
    }
}

/// Resident memory of an arm's proxies.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Memory {
    pub(super) arm: ArmName,
    /// Before any connection, each proxy with its children.
    pub(super) idle_kib: Vec<u64>,
    /// The same, shared pages in parts.
    pub(super) idle_pss_kib: Vec<u64>,
    pub(super) with_connections: Vec<WithConnections>,
}

/// Memory while idle connections stand.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WithConnections {
    pub(super) connections: u64,
    pub(super) errors: u64,
    pub(super) kib: Vec<u64>,
}

/// How a case is called in tables.
pub(super) fn label(case: Case, connections: usize, routes: usize) -> String {
    let http = |protocol: &str| {
        let attached = match routes {
            0 => String::new(),
            1 => ", 1 route".into(),
            many => format!(", {many} routes"),
        };
        format!("{protocol}, {connections} conn{attached}")
    };
    match case {
        Case::Http1 => http("HTTP/1.1"),
        Case::Http2 => http("HTTP/2"),
        Case::Grpc => http("gRPC"),
        Case::Bulk => "bulk, client to server".into(),
        Case::BulkDown => "bulk, server to client".into(),
        Case::Requests => format!("keep-alive, {connections} conn"),
        Case::Open => format!("open loop, {connections} conn"),
        Case::Connect => format!("new connection each, {connections} at once"),
        Case::Idle => format!("{connections} idle conn"),
    }
}

pub(super) fn run(arm: &Arm, plan: &Plan, repetition: u32) -> Result<Run, Error> {
    let mut client = Client::start(arm, plan)?;
    let (machine, cpu) = (MachineTime::now(), cpu(arm));
    let outcome = client.outcome()?;
    let spent = self::cpu(arm)
        .iter()
        .zip(cpu)
        .map(|(after, before)| after.saturating_sub(before) as f64 / 1e9)
        .collect();
    Ok(Run {
        arm: arm.name,
        case: plan.case,
        connections: plan.connections,
        routes: plan.routes,
        repetition,
        steal_percent: MachineTime::now().steal_percent_since(machine),
        proxy_cpu_seconds: spent,
        outcome,
    })
}

/// Measured first, while the proxies are fresh: memory freed after load would hide what a connection
/// costs.
pub(super) fn memory(arm: &Arm, options: &Options) -> Result<Memory, Error> {
    let rss = || {
        arm.proxies
            .iter()
            .map(|pids| process::rss_kib(pids))
            .collect::<Vec<_>>()
    };
    let idle_kib = rss();
    let pss = |pids: &Vec<u32>| process::pss_kib(pids);
    let idle_pss_kib = arm.proxies.iter().map(pss).collect();
    let mut with_connections = Vec::new();
    // Without a proxy there is nothing to measure.
    let counts = if arm.proxies.is_empty() {
        &[]
    } else {
        options.idle.as_slice()
    };
    for &connections in counts {
        let plan = Plan {
            case: Case::Idle,
            connections,
            routes: 0,
            rate: 0,
            warm_up: Duration::ZERO,
            duration: Duration::ZERO,
        };
        let mut client = Client::start(arm, &plan)?;
        let kib = rss();
        client.0.stdin.take();
        let outcome = client.outcome()?;
        if let Some(error) = &outcome.first_error {
            eprintln!("{} idle connections failed, first: {error}", outcome.errors);
        }
        with_connections.push(WithConnections {
            connections: outcome.requests,
            errors: outcome.errors,
            kib,
        });
    }
    Ok(Memory {
        arm: arm.name,
        idle_kib,
        idle_pss_kib,
        with_connections,
    })
}

fn cpu(arm: &Arm) -> Vec<u64> {
    arm.proxies
        .iter()
        .map(|pids| process::cpu_nanos(pids))
        .collect()
}

/// The client's process; killed when dropped early.
struct Client(Child, BufReader<ChildStdout>);

impl Client {
    /// Returns when the client says that the measured time begins.
    fn start(arm: &Arm, plan: &Plan) -> Result<Self, Error> {
        let this = std::env::current_exe().map_err(io("find this program"))?;
        let mut command = in_namespace(&arm.client, FIRST_CORE, &this);
        arguments(&mut command, arm, plan);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(io("start the client"))?;
        let Some(output) = child.stdout.take() else {
            return Err(Error::Other("the client has no output".into()));
        };
        let mut client = Client(child, BufReader::new(output));
        match client.line()?.trim() {
            "start" => Ok(client),
            other => Err(Error::Other(format!(
                "the client of {} {} did not start: {other}",
                arm.name,
                label(plan.case, plan.connections, plan.routes)
            ))),
        }
    }

    fn outcome(&mut self) -> Result<Outcome, Error> {
        let line = self.line()?;
        serde_json::from_str(&line)
            .map_err(|e| Error::Other(format!("the client's outcome `{line}`: {e}")))
    }

    fn line(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        self.1
            .read_line(&mut line)
            .map_err(io("read the client's output"))?;
        Ok(line)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn arguments(command: &mut Command, arm: &Arm, plan: &Plan) {
    command
        .arg("load")
        .args(["--target", &arm.target(plan).to_string()])
        .args(["--case", &serde_name(plan.case)])
        .args(["--connections", &plan.connections.to_string()])
        .args(["--rate", &plan.rate.to_string()])
        .args(["--warm-up", &plan.warm_up.as_secs_f64().to_string()])
        .args(["--seconds", &plan.duration.as_secs_f64().to_string()]);
}

fn serde_name(case: Case) -> String {
    use clap::ValueEnum as _;
    case.to_possible_value()
        .map(|v| v.get_name().to_owned())
        .unwrap_or_default()
}
