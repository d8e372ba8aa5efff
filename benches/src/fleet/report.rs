//! What came out of the simulation.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::{Options, Size, State};
use crate::harness::{Error, io, machine};

/// The whole result.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    machine: BTreeMap<&'static str, String>,
    size: Size,
    state: State,
    pub(super) stages: Vec<Stage>,
    pub(super) changes: Vec<Changes>,
    /// The first warnings and errors of the controller's log.
    pub(super) complaints: Vec<String>,
}

/// What the controller used in one stage, and what the nodes were sent.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Stage {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    /// Of the controller, within the stage.
    pub(super) cpu_seconds: f64,
    /// At its end.
    pub(super) rss_mib: f64,
    /// So far.
    pub(super) peak_rss_mib: f64,
    /// As TCP counts them, for proxy and agent together.
    pub(super) bytes_per_node: f64,
    /// Resources and removals, to its proxy.
    pub(super) resources_per_node: f64,
    /// To proxy and agent together.
    pub(super) messages_per_node: f64,
    /// That were answered.
    pub(super) reports: u64,
}

/// How long changes of one sort took, from the edit of the manifest.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Changes {
    what: &'static str,
    /// How many nodes a change concerned.
    mean_nodes: f64,
    /// Until the first node had it, in milliseconds.
    first_ms: Spread,
    /// Until the last node had it.
    last_ms: Spread,
    each_first_ms: Vec<f64>,
    each_last_ms: Vec<f64>,
}

#[derive(Clone, Copy, Default, Serialize)]
struct Spread {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Report {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            machine: machine(),
            size: options.size,
            state: options.state,
            stages: Vec::new(),
            changes: Vec::new(),
            complaints: Vec::new(),
        }
    }

    /// As JSON.
    pub fn write(&self, file: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::Other(format!("the report: {e}")))?;
        std::fs::write(file, text).map_err(io(format!("write {}", file.display())))
    }

    /// The tables for a person.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let Size {
            nodes,
            pods,
            services,
            namespaces,
            used,
        } = self.size;
        let _ = writeln!(
            out,
            "{nodes} nodes, {pods} pods, {services} Services in {namespaces} namespaces; \
             each node's pods call {used} of them; state: {:?}\n",
            self.state
        );
        for stage in &self.stages {
            let _ = writeln!(out, "{}", stage.line());
        }
        let _ = writeln!(
            out,
            "\n{:<20} {:>6} {:>8} {:>21} {:>30}",
            "change", "count", "nodes", "first has it, ms", "last has it, ms"
        );
        let _ = writeln!(
            out,
            "{:<20} {:>6} {:>8} {:>10} {:>10} {:>10} {:>9} {:>9}",
            "", "", "", "p50", "p99", "p50", "p99", "max"
        );
        for changes in &self.changes {
            let (first, last) = (changes.first_ms, changes.last_ms);
            let _ = writeln!(
                out,
                "{:<20} {:>6} {:>8.0} {:>10.0} {:>10.0} {:>10.0} {:>9.0} {:>9.0}",
                changes.what,
                changes.each_last_ms.len(),
                changes.mean_nodes,
                first.p50,
                first.p99,
                last.p50,
                last.p99,
                last.max,
            );
        }
        for complaint in &self.complaints {
            let _ = writeln!(out, "controller: {complaint}");
        }
        out
    }
}

impl Stage {
    pub(super) fn line(&self) -> String {
        format!(
            "{:<31} {:>7.1} s, controller: {:>7.2} CPU s, RSS {:>6.0} MiB, peak {:>6.0}; \
             a node: {:>9.1} KiB, {:>8.1} resources, {:>6.1} messages; {} reports",
            self.name,
            self.seconds,
            self.cpu_seconds,
            self.rss_mib,
            self.peak_rss_mib,
            self.bytes_per_node / 1024.0,
            self.resources_per_node,
            self.messages_per_node,
            self.reports
        )
    }
}

impl Changes {
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            mean_nodes: 0.0,
            first_ms: Spread::default(),
            last_ms: Spread::default(),
            each_last_ms: Vec::new(),
            each_first_ms: Vec::new(),
        }
    }

    /// Adds one change: when each node had it. A change that concerns no node is not counted.
    pub(super) fn push(&mut self, taken: &[Duration]) {
        let (Some(first), Some(last)) = (taken.iter().min(), taken.iter().max()) else {
            return;
        };
        let before = self.each_last_ms.len() as f64;
        self.mean_nodes = (self.mean_nodes * before + taken.len() as f64) / (before + 1.0);
        let ms = |time: &Duration| time.as_secs_f64() * 1000.0;
        self.each_first_ms.push(ms(first));
        self.each_last_ms.push(ms(last));
        self.first_ms = Spread::of(&self.each_first_ms);
        self.last_ms = Spread::of(&self.each_last_ms);
    }
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        // Nearest rank: the smallest value that at least q of all do not exceed.
        let at = |q: f64| {
            let rank = (q * sorted.len() as f64).ceil() as usize;
            sorted[rank.clamp(1, sorted.len()) - 1]
        };
        if sorted.is_empty() {
            return Self::default();
        }
        Self {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_node_counts() {
        let mut changes = Changes::new("x");
        for last in 1..=200 {
            let taken = [Duration::from_millis(last), Duration::from_micros(500)];
            changes.push(&taken);
        }
        changes.push(&[]);
        assert_eq!(changes.each_last_ms.len(), 200);
        assert_eq!(changes.mean_nodes, 2.0);
        assert_eq!(changes.first_ms.p99, 0.5);
        let Spread { p50, p99, max } = changes.last_ms;
        assert_eq!((p50, p99, max), (100.0, 198.0, 200.0));
    }
}
