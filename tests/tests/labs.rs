//! The lab itself: two side by side, clean-up after a crash, manifests with mistakes.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use warren_tests::lab::{Lab, signal};
use warren_tests::load::attempt;
use warren_tests::manifest::{CLIENT, Pod, WHO, account, documents, near_and_far};
use warren_tests::process::run;
use warren_tests::scenario::{binary, scenario};
use warren_tests::wait::wait_until;

#[test]
fn two_labs_side_by_side_do_not_meet() {
    scenario(Duration::from_secs(150), |s| {
        let one = s.lab(2, &near_and_far());
        let two = s.lab(2, &near_and_far());
        for lab in [&one, &two] {
            served(lab);
        }
        let opened = |lab: &Lab| {
            lab.metrics("node-1").sum(
                "warren_tcp_connections_opened_total",
                &[("reporter", "source")],
            )
        };
        let before = opened(&two);
        served(&one);
        assert_eq!(opened(&two), before, "the other lab's proxy saw it");
        one.down();
        served(&two);
    });
}

#[test]
fn a_lab_whose_daemon_was_killed_goes_down_completely() {
    scenario(Duration::from_secs(120), |s| {
        let lab = s.lab(2, &near_and_far());
        served(&lab);
        signal(lab.daemon(), Signal::SIGKILL);
        lab.down();
        // What is left is looked for at the end of the scenario.
    });
}

#[test]
fn mistakes_are_reported_and_the_last_good_state_stays() {
    scenario(Duration::from_secs(120), |s| {
        let lab = s.lab(2, &near_and_far());
        let good = documents(&[
            account("demo", "added"),
            Pod::echo("demo", "added", "node-2").build(),
        ]);
        for (what, bad, named) in [
            (
                "a field of the wrong type",
                "apiVersion: v1\nkind: Service\nmetadata: {name: far, namespace: demo}\nspec:\n  selector: {app: far}\n  ports:\n  - port: eighty\n",
                "port",
            ),
            ("no YAML at all", "kind: [Service\n", "line"),
            (
                "an unknown kind",
                "apiVersion: v1\nkind: Sevrice\nmetadata: {name: x}\n",
                "Sevrice",
            ),
        ] {
            let done = lab.apply_text(bad);
            assert!(!done.ok(), "{what} was applied: {done}");
            let said = done.stdout.clone() + &done.stderr;
            assert!(
                said.contains("apply.yaml") && said.contains(named),
                "{what}: it names neither file nor {named}: {done}"
            );
            served(&lab);
        }
        // One mistake does not hold back the rest, once the rest is given alone.
        lab.apply_text(&good).expect_ok();
        wait_until("the added pod", Duration::from_secs(30), || {
            let pod = lab
                .pods()
                .into_iter()
                .find(|p| p.name == "added" && !p.ips.is_empty());
            let target = format!("{}:{WHO}", pod.ok_or("no pod yet")?.v4());
            let answer = attempt(&lab, CLIENT, &["who", &target]);
            if answer["error"].is_null() {
                Ok(())
            } else {
                Err(answer.to_string())
            }
        });
    });
}

#[test]
fn without_root_the_lab_says_so_in_one_sentence() {
    scenario(Duration::from_secs(20), |s| {
        let manifests = s.file("mesh.yaml", &documents(&near_and_far()));
        // The target directory may be closed to other users: the program is run from a copy.
        let program = s.fresh_path("warren");
        std::fs::copy(binary("warren"), &program).expect("the program can be copied");
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
            .arg(&program);
        let done = run(
            command.args(["lab", "up", "-f"]).arg(&manifests),
            Duration::from_secs(10),
        );
        assert!(!done.ok(), "{done}");
        let said = done.stderr.trim();
        assert!(said.contains("root") && said.lines().count() == 1, "{done}");
    });
}

#[track_caller]
fn served(lab: &Lab) {
    for server in ["near", "far"] {
        let answer = attempt(lab, CLIENT, &["who", &format!("{server}:{WHO}")]);
        assert!(
            answer["error"].is_null(),
            "{}: {server}: {answer}",
            lab.name()
        );
    }
}
