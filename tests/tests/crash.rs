//! Line 4: a proxy that dies, or is replaced, refuses no connection; neither does a mesh whose agents
//! are away.

use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use warren_tests::lab::{Lab, signal};
use warren_tests::load::{HoldReport, LoadReport, Running};
use warren_tests::long;
use warren_tests::manifest::{CLIENT, ECHO, near_and_far};
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::wait::{let_run, wait_for};

/// New connections a second, as the line asks for.
const RATE: u32 = 200;
const TICK: Option<Duration> = Some(Duration::from_millis(50));
/// Load before the first event, so that pools and stocks are as under way.
const SETTLE: Duration = Duration::from_secs(3);

#[test]
fn a_killed_worker_refuses_no_connection() {
    scenario(Duration::from_secs(180), |s| {
        let lab = s.lab(2, &near_and_far());
        for (node, target) in [("node-1", "far"), ("node-2", "far"), ("node-1", "near")] {
            let (report, killed) = under_load(s, &lab, target, || kill_worker(&lab, node));
            let what = format!("worker of {node} killed, load to {target}");
            report.expect_no_refusal(&what, Duration::from_secs(1), &[killed]);
        }
        // The supervisor too: whoever starts it again takes longer, but nobody is refused.
        let (report, killed) = under_load(s, &lab, "far", || {
            let supervisor = lab.node("node-1").supervisor;
            let killed = SystemTime::now();
            signal(supervisor, Signal::SIGKILL);
            wait_for("another proxy", Duration::from_secs(20), || {
                let now = lab.node("node-1").supervisor;
                now != supervisor && now != 0
            });
            killed
        });
        report.expect_no_refusal("proxy of node-1 killed", Duration::from_secs(5), &[killed]);
    });
}

#[test]
fn five_kills_of_the_worker_in_a_minute_refuse_no_connection() {
    let (interval, longest) = if long() {
        (Duration::from_secs(11), Duration::from_secs(1))
    } else {
        // Faster than the line asks for, so that the supervisor's back-off shows: at most 2 s of it.
        (Duration::from_secs(3), Duration::from_secs(3))
    };
    scenario(Duration::from_secs(180), |s| {
        let lab = s.lab(2, &near_and_far());
        let (report, kills) = under_load(s, &lab, "far", || {
            let mut kills = vec![kill_worker(&lab, "node-2")];
            while kills.len() < 5 {
                let_run(interval);
                kills.push(kill_worker(&lab, "node-2"));
            }
            kills
        });
        report.expect_no_refusal("five kills of node-2's worker", longest, &kills);
    });
}

#[test]
fn replaced_proxies_and_absent_agents_fail_no_connection() {
    let away = Duration::from_secs(if long() { 60 } else { 15 });
    scenario(away + Duration::from_secs(200), |s| {
        let lab = s.lab(2, &near_and_far());
        for (node, target) in [("node-1", "far"), ("node-2", "far"), ("node-1", "near")] {
            let held = Running::hold(s, &lab, CLIENT, &format!("{target}:{ECHO}"), (5, 1), TICK);
            let (report, ()) = under_load(s, &lab, target, || replace_proxy(&lab, node));
            // Longer than this test, they live until the drain deadline.
            held.stop::<HoldReport>()
                .expect_unbroken("held while the proxy was replaced");
            report.expect_no_failure(&format!("proxy of {node} replaced, load to {target}"));
        }
        for node in ["node-1", "node-2"] {
            let part = format!("node/{node}");
            let agent = lab.node(node).agent_pid;
            let (report, ()) = under_load(s, &lab, "far", || {
                {
                    let _absent = lab.keep_away(&[&part, "--agent"], true);
                    let_run(away);
                }
                wait_for("a new agent", Duration::from_secs(30), || {
                    let now = lab.node(node).agent_pid;
                    now != agent && now != 0
                });
                replace_proxy(&lab, node);
            });
            report.expect_no_failure(&format!(
                "agent of {node} away for {away:?}, then the proxy replaced"
            ));
        }
    });
}

/// Runs `event` under load from the client to a server; the load goes on until connections opened after
/// the event have been served for a while.
fn under_load<T>(
    s: &Scenario,
    lab: &Lab,
    target: &str,
    event: impl FnOnce() -> T,
) -> (LoadReport, T) {
    let load = Running::load(s, lab, CLIENT, &format!("{target}:{ECHO}"), RATE);
    let_run(SETTLE);
    let happened = event();
    let_run(SETTLE);
    (load.stop(), happened)
}

fn kill_worker(lab: &Lab, node: &str) -> SystemTime {
    let worker = lab.worker(node);
    let killed = SystemTime::now();
    signal(worker, Signal::SIGKILL);
    wait_for("another worker", Duration::from_secs(10), || {
        lab.worker(node) != worker
    });
    killed
}

fn replace_proxy(lab: &Lab, node: &str) {
    let before = lab.node(node).supervisor;
    lab.restart(&[&format!("node/{node}"), "--proxy"]);
    wait_for("another proxy", Duration::from_secs(40), || {
        let now = lab.node(node).supervisor;
        now != before && now != 0
    });
}
