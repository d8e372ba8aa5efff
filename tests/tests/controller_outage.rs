//! Line 8: with the controller stopped, existing and new connections go on, first-time callers included;
//! a restarted proxy and a restarted agent too, from what the node keeps.

use std::time::Duration;

use nix::sys::signal::Signal;
use warren_tests::lab::{Lab, PodRef, signal};
use warren_tests::load::{HoldReport, LoadReport, Running, attempt};
use warren_tests::manifest::{CLIENT, ECHO, Pod, WHO, account, near_and_far};
use warren_tests::scenario::scenario;
use warren_tests::wait::{let_run, wait_for, wait_until};

#[test]
fn nodes_go_on_without_the_controller() {
    scenario(Duration::from_secs(180), |s| {
        let mut manifests = near_and_far();
        let newcomers: [PodRef<'_>; 3] = [("demo", "first"), ("demo", "second"), ("demo", "third")];
        for (namespace, name) in newcomers {
            manifests.push(account(namespace, name));
            manifests.push(Pod::idle(namespace, name, "node-1"));
        }
        let lab = s.lab(2, &manifests);
        let target = format!("far:{ECHO}");
        let held = Running::hold(
            s,
            &lab,
            CLIENT,
            &target,
            (20, 1),
            Some(Duration::from_millis(100)),
        );
        let load = Running::load(s, &lab, CLIENT, &target, 50);

        // First stopped, not ended: whoever asks gets no answer, which is worse than a refusal.
        let outage = Outage::begin(&lab);
        served(&lab, newcomers[0], "a caller that never called before");
        served(&lab, CLIENT, "a caller that did");
        let_run(Duration::from_secs(2));
        held.stop::<HoldReport>()
            .expect_unbroken("held across the controller's end");
        load.stop::<LoadReport>()
            .expect_no_failure("new connections across the controller's end");

        restarts(&lab, "node-1", newcomers[1]);
        drop(outage);
        let outage = lab.keep_away(&["controller"], true);
        restarts(&lab, "node-2", newcomers[2]);
        drop(outage);

        // It is back: what changes now arrives.
        lab.apply(&[
            account("demo", "late"),
            Pod::echo("demo", "late", "node-2").build(),
        ])
        .expect_ok();
        wait_until(
            "a pod made after the outage",
            Duration::from_secs(60),
            || {
                let pod = lab
                    .pods()
                    .into_iter()
                    .find(|p| p.name == "late" && !p.ips.is_empty());
                let target = format!("{}:{WHO}", pod.ok_or("no pod yet")?.v4());
                let answer = attempt(&lab, CLIENT, &["who", &target]);
                if answer["error"].is_null() {
                    Ok(())
                } else {
                    Err(answer.to_string())
                }
            },
        );
    });
}

/// Restarts everything of a node; after each step a caller is served that never called before.
#[track_caller]
fn restarts(lab: &Lab, node: &str, newcomer: PodRef<'_>) {
    let worker = lab.worker(node);
    signal(worker, Signal::SIGKILL);
    wait_for("another worker", Duration::from_secs(10), || {
        lab.worker(node) != worker
    });
    served(
        lab,
        newcomer,
        &format!("a first-time caller after {node}'s worker was killed"),
    );
    for (which, what) in [
        ("--proxy", "proxy was restarted"),
        ("--agent", "agent was restarted"),
        ("--proxy", "proxy was restarted with the new agent"),
    ] {
        restart(lab, node, which);
        served(lab, newcomer, &format!("after {node}'s {what}"));
    }
}

/// The controller answers nobody until this drops.
struct Outage(u32);

impl Outage {
    #[track_caller]
    fn begin(lab: &Lab) -> Self {
        let controller = lab.controller();
        signal(controller, Signal::SIGSTOP);
        Self(controller)
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGCONT);
    }
}

/// A connection to the other node's server and to the same node's, each through the mesh.
#[track_caller]
fn served(lab: &Lab, caller: PodRef<'_>, what: &str) {
    let ips: Vec<String> = lab
        .pod(caller)
        .ips
        .iter()
        .map(ToString::to_string)
        .collect();
    for server in ["far", "near"] {
        let answer = attempt(lab, caller, &["who", &format!("{server}:{WHO}")]);
        assert!(
            ips.iter().any(|ip| answer["ip"] == **ip),
            "{what}, to {server}: {answer}"
        );
    }
}

#[track_caller]
fn restart(lab: &Lab, node: &str, which: &str) {
    let pid = || {
        let node = lab.node(node);
        if which == "--agent" {
            node.agent_pid
        } else {
            node.supervisor
        }
    };
    let before = pid();
    lab.restart(&[&format!("node/{node}"), which]);
    wait_for("the restarted process", Duration::from_secs(40), || {
        let now = pid();
        now != before && now != 0
    });
}
