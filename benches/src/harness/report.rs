//! What came out: every run, medians, and ratios to the yardstick beside the aims.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::arm::{Arm, ArmName};
use super::measure::{Memory, Run, label};
use super::{Error, Options, io};
use crate::load::Case;

/// The whole result.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub(super) machine: BTreeMap<&'static str, String>,
    pub(super) settings: BTreeMap<&'static str, String>,
    pub(super) facts: Vec<(String, String)>,
    pub(super) memory: Vec<Memory>,
    pub(super) runs: Vec<Run>,
}

impl Report {
    pub(super) fn new(options: &Options, arms: &[Arm]) -> Self {
        let names: Vec<_> = arms.iter().map(|arm| arm.name.to_string()).collect();
        Report {
            machine: machine(),
            settings: BTreeMap::from([
                ("arms", names.join(", ")),
                ("seconds", options.duration.as_secs_f64().to_string()),
                ("warmUpSeconds", options.warm_up.as_secs_f64().to_string()),
                ("repetitions", options.repetitions.to_string()),
                ("openLoopRate", options.rate.to_string()),
                (
                    "pinning",
                    "client and first proxy: core 0; second proxy and server: core 1".into(),
                ),
                ("congestionControl", "reno".into()),
            ]),
            facts: Vec::new(),
            memory: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// Every run and the medians, as JSON.
    pub fn write(&self, file: &Path) -> Result<(), Error> {
        #[derive(Serialize)]
        struct Whole<'a> {
            #[serde(flatten)]
            report: &'a Report,
            medians: Vec<Median>,
            aims: Vec<Aim>,
        }
        let whole = Whole {
            report: self,
            medians: self.medians(),
            aims: self.aims(),
        };
        let text = serde_json::to_string_pretty(&whole)
            .map_err(|e| Error::Other(format!("the report: {e}")))?;
        std::fs::write(file, text).map_err(io(format!("write {}", file.display())))
    }

    /// Connections or requests that failed, over all runs.
    pub fn errors(&self) -> u64 {
        let idle = self
            .memory
            .iter()
            .flat_map(|m| &m.with_connections)
            .map(|w| w.errors);
        self.runs
            .iter()
            .map(|run| run.outcome.errors)
            .chain(idle)
            .sum()
    }

    /// The tables for a person.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for (name, value) in self.machine.iter().chain(&self.settings) {
            let _ = writeln!(out, "{name}: {value}");
        }
        for (name, value) in &self.facts {
            let _ = writeln!(out, "{name}: {value}");
        }
        let _ = writeln!(
            out,
            "\n{:<34} {:<16} {:>9} {:>9} {:>9} {:>9} {:>10} {:>11} {:>7}",
            "medians",
            "arm",
            "Gbit/s",
            "req/s",
            "p50 us",
            "p99 us",
            "CPU us/req",
            "CPU s/GB",
            "runs"
        );
        for median in self.medians() {
            let cell = |value: Option<f64>, digits: usize| {
                value.map_or("-".into(), |v| format!("{v:.digits$}"))
            };
            let _ = writeln!(
                out,
                "{:<34} {:<16} {:>9} {:>9} {:>9} {:>9} {:>10} {:>11} {:>7}",
                median.case,
                median.arm.to_string(),
                cell(median.gbit_per_second, 2),
                cell(median.requests_per_second, 0),
                cell(median.p50_us, 0),
                cell(median.p99_us, 0),
                cell(median.cpu_us_per_request, 1),
                cell(median.cpu_seconds_per_gigabyte, 2),
                format!("{}/{}", median.quiet_runs, median.runs),
            );
        }
        let _ = writeln!(
            out,
            "runs: used/made; a run with over {QUIET_STEAL_PERCENT} % stolen CPU time is not used while half of them remain\n\n\
             {:<16} {:>6} {:>14} {:>14} {:>18}",
            "memory", "conns", "first KiB", "second KiB", "KiB per conn"
        );
        for memory in &self.memory {
            for (connections, kib) in memory.rows() {
                let cell = |index: usize| kib.get(index).map_or("-".into(), ToString::to_string);
                let each = memory.kib_per_connection(connections);
                let _ = writeln!(
                    out,
                    "{:<16} {:>6} {:>14} {:>14} {:>18}",
                    memory.arm.to_string(),
                    connections,
                    cell(0),
                    cell(1),
                    each.map_or("-".into(), |each| format!("{each:.1}")),
                );
            }
        }
        let aims = self.aims();
        if !aims.is_empty() {
            let _ = writeln!(out, "\n{:<52} {:>9} {:>9}", "aim", "wanted", "is");
            for aim in aims {
                let _ = writeln!(
                    out,
                    "{:<52} {:>9} {:>9.2}  {}",
                    aim.what,
                    format!("{} {}", if aim.at_most { "<=" } else { ">=" }, aim.wanted),
                    aim.is,
                    if aim.met() { "met" } else { "MISSED" }
                );
            }
        }
        out
    }

    fn medians(&self) -> Vec<Median> {
        let mut groups: BTreeMap<(Case, usize, usize, ArmName), Vec<&Run>> = BTreeMap::new();
        for run in &self.runs {
            groups
                .entry((run.case, run.connections, run.routes, run.arm))
                .or_default()
                .push(run);
        }
        groups
            .into_iter()
            .map(|((case, connections, routes, arm), runs)| {
                Median::of(arm, label(case, connections, routes), &runs)
            })
            .collect()
    }

    fn aims(&self) -> Vec<Aim> {
        let medians = self.medians();
        let find_routed = |arm: ArmName, case: Case, connections: usize, routes: usize| {
            medians
                .iter()
                .find(|m| m.arm == arm && m.case == label(case, connections, routes))
        };
        let find = |arm, case, connections| find_routed(arm, case, connections, 0);
        let cpu = |arm: ArmName, routes: usize| {
            find_routed(arm, Case::Http1, 64, routes)?.cpu_us_per_request
        };
        let hundred_routes = || Some(cpu(ArmName::Warren, 100)? / cpu(ArmName::Warren, 0)?);
        let ratio = |case: Case, connections: usize, value: fn(&Median) -> Option<f64>| {
            let warren = value(find(ArmName::Warren, case, connections)?)?;
            Some(warren / value(find(ArmName::Envoy, case, connections)?)?)
        };
        let memory = self.memory.iter().find(|m| m.arm == ArmName::Warren);
        let idle = memory
            .and_then(|m| m.idle_kib.iter().max())
            .map(|&kib| kib as f64 / 1024.0);
        let each =
            memory.and_then(|m| m.kib_per_connection(m.with_connections.last()?.connections));
        [
            (
                "CPU per request, 64 keep-alive, Warren / Envoy",
                true,
                0.4,
                ratio(Case::Requests, 64, |m| m.cpu_us_per_request),
            ),
            (
                "requests/s, 64 keep-alive, Warren / Envoy",
                false,
                1.5,
                ratio(Case::Requests, 64, |m| m.requests_per_second),
            ),
            (
                "bulk throughput, client to server, Warren / Envoy",
                false,
                1.0,
                ratio(Case::Bulk, 1, |m| m.gbit_per_second),
            ),
            (
                "bulk throughput, server to client, Warren / Envoy",
                false,
                1.0,
                ratio(Case::BulkDown, 1, |m| m.gbit_per_second),
            ),
            (
                "new connections/s, Warren / Envoy",
                false,
                5.0,
                ratio(Case::Connect, 16, |m| m.requests_per_second),
            ),
            (
                "CPU per HTTP/1.1 request, 64 conn, Warren / Envoy",
                true,
                0.4,
                ratio(Case::Http1, 64, |m| m.cpu_us_per_request),
            ),
            (
                "HTTP/1.1 requests/s, 64 conn, Warren / Envoy",
                false,
                2.5,
                ratio(Case::Http1, 64, |m| m.requests_per_second),
            ),
            (
                "HTTP/1.1 p50, 64 conn, Warren / Envoy",
                true,
                0.4,
                ratio(Case::Http1, 64, |m| m.p50_us),
            ),
            (
                "CPU per HTTP/1.1 request, 100 routes / none",
                true,
                1.05,
                hundred_routes(),
            ),
            (
                "CPU us per HTTP/1.1 request on one node",
                true,
                25.0,
                cpu(ArmName::WarrenSameNode, 0),
            ),
            ("idle RSS of a Warren proxy, MiB", true, 12.0, idle),
            ("KiB per idle connection of a Warren proxy", true, 6.0, each),
        ]
        .into_iter()
        .filter_map(|(what, at_most, wanted, is)| {
            Some(Aim {
                what,
                at_most,
                wanted,
                is: is?,
            })
        })
        .collect()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Median {
    arm: ArmName,
    case: String,
    runs: usize,
    quiet_runs: usize,
    gbit_per_second: Option<f64>,
    requests_per_second: Option<f64>,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    cpu_us_per_request: Option<f64>,
    cpu_seconds_per_gigabyte: Option<f64>,
}

impl Median {
    fn of(arm: ArmName, case: String, runs: &[&Run]) -> Self {
        let quiet: Vec<&Run> = runs
            .iter()
            .copied()
            .filter(|run| run.steal_percent <= QUIET_STEAL_PERCENT)
            .collect();
        let used = if quiet.len() * 2 >= runs.len() {
            &quiet
        } else {
            runs
        };
        let over = |value: &dyn Fn(&Run) -> Option<f64>| {
            median(
                used.iter()
                    .filter_map(|run| value(run))
                    .filter(|v| v.is_finite())
                    .collect(),
            )
        };
        let bulk = |run: &Run| matches!(run.case, Case::Bulk | Case::BulkDown);
        let proxied = |run: &Run| !run.proxy_cpu_seconds.is_empty();
        Median {
            arm,
            case,
            runs: runs.len(),
            quiet_runs: used.len(),
            gbit_per_second: over(&|run| bulk(run).then(|| run.gbit_per_second())),
            requests_per_second: over(&|run| (!bulk(run)).then(|| run.requests_per_second())),
            p50_us: over(&|run| Some(run.outcome.latency?.p50)),
            p99_us: over(&|run| Some(run.outcome.latency?.p99)),
            cpu_us_per_request: over(&|run| {
                (!bulk(run) && proxied(run)).then(|| run.cpu_us_per_request())
            }),
            cpu_seconds_per_gigabyte: over(&|run| {
                (bulk(run) && proxied(run)).then(|| run.cpu_seconds_per_gigabyte())
            }),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Aim {
    what: &'static str,
    at_most: bool,
    wanted: f64,
    is: f64,
}

impl Aim {
    fn met(&self) -> bool {
        if self.at_most {
            self.is <= self.wanted
        } else {
            self.is >= self.wanted
        }
    }
}

impl Memory {
    fn rows(&self) -> impl Iterator<Item = (u64, &[u64])> {
        let with = self
            .with_connections
            .iter()
            .map(|w| (w.connections, w.kib.as_slice()));
        std::iter::once((0, self.idle_kib.as_slice())).chain(with)
    }

    /// What each of so many connections added to the proxy that grew most.
    fn kib_per_connection(&self, connections: u64) -> Option<f64> {
        let with = self
            .with_connections
            .iter()
            .find(|w| w.connections == connections && w.connections > 0)?;
        let growth = with
            .kib
            .iter()
            .zip(&self.idle_kib)
            .map(|(with, idle)| with.saturating_sub(*idle))
            .max()?;
        Some(growth as f64 / connections as f64)
    }
}

/// Where the numbers are from.
pub(crate) fn machine() -> BTreeMap<&'static str, String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    BTreeMap::from([
        ("loadAverageBefore", load_average()),
        (
            "kernel",
            read("/proc/sys/kernel/osrelease").trim().to_owned(),
        ),
        ("cpu", cpu.map_or("", |(_, name)| name).to_owned()),
        (
            "cores",
            std::thread::available_parallelism()
                .map_or(0, usize::from)
                .to_string(),
        ),
    ])
}

/// Other work on the machine spoils every number, and steal does not show it.
pub(super) fn warn_if_busy() {
    let load = load_average();
    if load.parse::<f64>().is_ok_and(|load| load > 0.5) {
        eprintln!("warning: load average {load}; measure on an idle machine");
    }
}

/// Of the last minute.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Stolen CPU time up to which a run counts as undisturbed.
const QUIET_STEAL_PERCENT: f64 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
