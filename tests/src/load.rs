//! Reports of the clients that run inside pods: [`mesh-load`](bin/mesh-load.rs) and
//! [`mesh-hold`](bin/mesh-hold.rs).

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::cgroup::CpuGroup;
use crate::lab::{Lab, PodRef};
use crate::process::Background;
use crate::scenario::{Scenario, binary};
use crate::wait::wait_until;

/// What became of the connections of a load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Connections tried.
    pub started: u64,
    /// Connected, answered correctly, closed in order.
    pub ok: u64,
    /// `connect` was refused.
    pub refused: u64,
    /// `connect` failed otherwise.
    pub unreachable: u64,
    /// Connected, then reset or closed before the whole answer.
    pub cut: u64,
    /// Not done within the deadline.
    pub timed_out: u64,
    /// Another answer than what was sent.
    pub wrong: u64,
    /// Longest `connect`.
    pub slowest_connect_ms: f64,
    /// Longest wait from `connect` to the whole answer, among those that got it.
    pub slowest_ms: f64,
    /// Median of the same.
    pub median_ms: f64,
    /// 99th percentile of the same.
    pub p99_ms: f64,
    /// The generator's own delay against its schedule: how far its numbers can be trusted.
    pub lag_ms: f64,
    /// The first failures, with the time since the start.
    pub failures: Vec<String>,
    /// Begin and end of the connections that were cut, in milliseconds since the epoch.
    pub cuts: Vec<(f64, f64)>,
}

impl LoadReport {
    /// Connections that were not served.
    pub fn failed(&self) -> u64 {
        self.started - self.ok
    }

    /// Panics unless every connection was served.
    #[track_caller]
    pub fn expect_no_failure(&self, what: &str) {
        assert!(self.started > 0, "{what}: no connection was tried");
        assert_eq!(self.failed(), 0, "{what}: {self:#?}");
    }

    /// Panics if a connection was refused, failed to connect or waited for more than `longest`, or if
    /// one was cut that was not open at one of the `kills`.
    #[track_caller]
    pub fn expect_no_refusal(&self, what: &str, longest: Duration, kills: &[SystemTime]) {
        assert!(self.started > 0, "{what}: no connection was tried");
        assert_eq!(
            self.refused + self.unreachable,
            0,
            "{what}: refused: {self:#?}"
        );
        assert_eq!(self.timed_out + self.wrong, 0, "{what}: {self:#?}");
        let kills: Vec<f64> = kills.iter().map(|at| epoch_ms(*at)).collect();
        let was_open = |(begin, end): &(f64, f64)| {
            kills
                .iter()
                .any(|kill| *begin < kill + DYING_MS && end + 1.0 > *kill)
        };
        let others: Vec<_> = self.cuts.iter().filter(|cut| !was_open(cut)).collect();
        assert!(
            others.is_empty(),
            "{what}: cut at {others:?}, killed at {kills:?}: {self:#?}"
        );
        let longest = longest.as_secs_f64() * 1e3;
        assert!(
            self.slowest_ms < longest,
            "{what}: waited longer than {longest} ms: {self:#?}"
        );
    }
}

/// From SIGKILL until a process accepts nothing more.
const DYING_MS: f64 = 30.0;

/// Milliseconds since the epoch.
pub fn epoch_ms(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
        * 1e3
}

/// What became of connections that were held.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HoldReport {
    /// Connections that were opened and answered.
    pub held: u64,
    /// Connections that could not be opened.
    pub failed: u64,
    /// Connections that broke while they were held.
    pub broken: u64,
    /// Lines exchanged after the opening.
    pub ticks: u64,
    /// Longest wait for an answer to one of them.
    pub slowest_tick_ms: f64,
    /// The first failures.
    pub failures: Vec<String>,
}

impl HoldReport {
    /// Panics unless every connection was opened and none broke.
    #[track_caller]
    pub fn expect_unbroken(&self, what: &str) {
        assert!(
            self.held > 0 && self.failed == 0 && self.broken == 0,
            "{what}: {self:#?}"
        );
    }
}

/// Connections that a `mesh-noise` opens in a second.
pub const NOISE_CONNECTIONS: u64 = 1280;
/// Huge heads that it sends in a second.
pub const NOISE_HEADS: u64 = 320;
/// Slow bodies that it has under way at once.
pub const NOISE_BODIES: u64 = 400;

/// What a `mesh-noise` did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NoiseReport {
    /// Connections with a request each.
    pub connections: Noise,
    /// Most of them that were held at once.
    pub most_held: u64,
    /// Huge heads.
    pub heads: Noise,
    /// Slow bodies.
    pub bodies: Noise,
    /// How long it was at it.
    pub seconds: f64,
}

/// One kind of noise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// What was tried.
    pub begun: u64,
    /// Connections and heads that were answered, bodies that are under way; the rest was refused, reset or waits.
    pub done: u64,
}

/// A client in a pod that runs until it is told to stop.
#[derive(Debug)]
pub struct Running {
    process: Background,
    stop: PathBuf,
}

impl Running {
    /// New connections at a steady rate, each a line sent and echoed. Returns once the first was served.
    #[track_caller]
    pub fn load(s: &Scenario, lab: &Lab, pod: PodRef<'_>, target: &str, rate: u32) -> Self {
        Self::start(
            s,
            lab,
            pod,
            "mesh-load",
            &["--target", target, "--rate", &rate.to_string()],
            "serving",
        )
    }

    /// Holds `connections` open from `processes` processes, each connection exchanging a line every
    /// `tick` (none: idle until the end). Returns once all are open.
    #[track_caller]
    pub fn hold(
        s: &Scenario,
        lab: &Lab,
        pod: PodRef<'_>,
        target: &str,
        (connections, processes): (u64, u64),
        tick: Option<Duration>,
    ) -> Self {
        let tick = tick.map_or(0, |t| t.as_millis());
        Self::start(
            s,
            lab,
            pod,
            "mesh-hold",
            &[
                "--target",
                target,
                "--connections",
                &connections.to_string(),
                "--processes",
                &processes.to_string(),
                "--tick-ms",
                &tick.to_string(),
            ],
            "held",
        )
    }

    /// A `mesh-noise` with these arguments, its processor time bounded by `group`.
    #[track_caller]
    pub fn noise(
        s: &Scenario,
        lab: &Lab,
        pod: PodRef<'_>,
        group: &CpuGroup,
        args: &[&str],
    ) -> Self {
        let stop = s.fresh_path("stop");
        let program = binary("mesh-noise").display().to_string();
        let stop_text = stop.display().to_string();
        let command = [&[program.as_str(), "--stop", &stop_text], args].concat();
        Self::exec(lab, pod, &group.around(&command), stop, "noisy")
    }

    #[track_caller]
    fn start(
        s: &Scenario,
        lab: &Lab,
        pod: PodRef<'_>,
        program: &str,
        args: &[&str],
        ready: &str,
    ) -> Self {
        let stop = s.fresh_path("stop");
        let program = binary(program).display().to_string();
        let stop_text = stop.display().to_string();
        let mut command = vec![program.as_str()];
        command.extend_from_slice(args);
        command.extend_from_slice(&["--stop", &stop_text]);
        Self::exec(lab, pod, &command, stop, ready)
    }

    #[track_caller]
    fn exec<C: AsRef<str>>(
        lab: &Lab,
        pod: PodRef<'_>,
        command: &[C],
        stop: PathBuf,
        ready: &str,
    ) -> Self {
        let command: Vec<&str> = command.iter().map(AsRef::as_ref).collect();
        let mut process = lab.exec_background(pod, &command);
        process.wait_for_line(Duration::from_secs(60), |line| line.starts_with(ready));
        Self { process, stop }
    }

    /// Whether it has not ended by itself.
    pub fn running(&mut self) -> bool {
        self.process.running()
    }

    /// Lets it end and returns its report.
    #[track_caller]
    pub fn stop<R: for<'a> Deserialize<'a>>(self) -> R {
        std::fs::write(&self.stop, "").expect("the scenario's directory can be written");
        let done = self.process.finish(Duration::from_secs(60)).expect_ok();
        let line = done.stdout.lines().rfind(|l| l.starts_with('{'));
        let line = line.unwrap_or_else(|| panic!("no report: {done}"));
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }
}

/// Runs a `mesh-try` experiment in a pod and returns its JSON answer.
#[track_caller]
pub fn attempt(lab: &Lab, pod: PodRef<'_>, args: &[&str]) -> serde_json::Value {
    let program = binary("mesh-try").display().to_string();
    let mut command = vec![program.as_str()];
    command.extend_from_slice(args);
    let done = lab
        .exec_within(pod, &command, Duration::from_secs(60))
        .expect_ok();
    serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
}

/// Repeats a `mesh-try` experiment until `wanted` holds of its answer.
#[track_caller]
pub fn attempt_until(
    lab: &Lab,
    pod: PodRef<'_>,
    args: &[&str],
    what: &str,
    wanted: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    wait_until(what, Duration::from_secs(20), || {
        let answer = attempt(lab, pod, args);
        if wanted(&answer) {
            Ok(answer)
        } else {
            Err(answer)
        }
    })
}
