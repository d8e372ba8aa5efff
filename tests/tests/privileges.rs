//! Line 3: `CapEff` of every proxy is zero, its uid is not 0, its seccomp mode is 2; and a proxy that
//! finds itself with privileges does not start.

use std::process::Command;
use std::time::Duration;

use warren_tests::host::{command_line, family, status_field};
use warren_tests::manifest::near_and_far;
use warren_tests::process::run;
use warren_tests::scenario::{binary, scenario};

#[test]
fn proxies_have_no_privileges_and_refuse_any() {
    scenario(Duration::from_secs(90), |s| {
        let lab = s.lab(2, &near_and_far());
        for node in lab.nodes() {
            lab.worker(&node.name);
            let processes = family(node.supervisor);
            assert!(
                processes.len() >= 2,
                "a supervisor and a worker: {processes:?}"
            );
            for pid in processes {
                let who = format!("{} {pid} {}", node.name, command_line(pid));
                for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    assert_eq!(status_field(pid, set), "0000000000000000", "{set} of {who}");
                }
                for ids in ["Uid", "Gid"] {
                    let ids = status_field(pid, ids);
                    assert!(ids.split_whitespace().all(|id| id != "0"), "{who}: {ids}");
                }
                assert_eq!(status_field(pid, "NoNewPrivs"), "1", "{who}");
                assert_eq!(status_field(pid, "Seccomp"), "2", "{who}");
            }
            let log = lab.logs(&[&format!("node/{}", node.name)]);
            assert!(
                log.contains("seccomp"),
                "{} does not say at start what it gave up:\n{log}",
                node.name
            );
        }

        // The same configuration, with privileges.
        let proxy = command_line(lab.node("node-1").supervisor);
        let mut words = proxy.split(' ').skip_while(|w| *w != "--config");
        let config = words
            .nth(1)
            .unwrap_or_else(|| panic!("no --config in {proxy:?}"));
        let proxy = binary("warren-node-proxy").display().to_string();
        let mut as_root = Command::new(&proxy);
        expect_refusal(&mut as_root, config, "uid 0");
        let mut with_capability = Command::new("setpriv");
        with_capability.args(["--reuid=65532", "--regid=65532", "--clear-groups"]);
        with_capability.args(["--inh-caps=+net_admin", "--ambient-caps=+net_admin", &proxy]);
        expect_refusal(&mut with_capability, config, "capabilit");
    });
}

fn expect_refusal(command: &mut Command, config: &str, reason: &str) {
    let done = run(command.args(["--config", config]), Duration::from_secs(10));
    assert!(!done.ok(), "a privileged proxy started: {done}");
    let said = done.stdout.clone() + &done.stderr;
    assert!(said.contains(reason), "it does not say {reason:?}: {done}");
}
