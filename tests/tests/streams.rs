//! What a connection through the mesh keeps of a plain one: half-close, reset, back-pressure; what it
//! adds: another endpoint after a failed connect, and limits that hit one workload alone.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;
use warren_tests::host::rss_kib;
use warren_tests::lab::Options;
use warren_tests::load::{HoldReport, Running, attempt};
use warren_tests::manifest::{
    BLAST, CLIENT, CLOSED, COUNT, ECHO, FAR, NEAR, Pod, RESET, account, echo_service, near_and_far,
};
use warren_tests::scenario::{binary, scenario};
use warren_tests::wait::{let_run, wait_until};

const FAILED: &str = "warren_tcp_connections_failed_total";

#[test]
fn ends_of_connections_are_carried_through() {
    scenario(Duration::from_secs(120), |s| {
        let lab = s.lab(2, &near_and_far());
        for server in [NEAR, FAR] {
            let mut addresses: Vec<IpAddr> = lab.pod(server).ips;
            addresses.extend(lab.service_ips(server));
            for ip in addresses {
                let attempt = |what: &str, port: u16, more: &[&str]| -> Value {
                    let target = SocketAddr::new(ip, port).to_string();
                    attempt(&lab, CLIENT, &[&[what, &target], more].concat())
                };
                let half = attempt("half-close", COUNT, &["3000000"]);
                assert_eq!(
                    half["answer"], "3000000 bytes",
                    "half-close at {ip}: {half}"
                );
                let reset = attempt("reset", RESET, &[]);
                assert_eq!(
                    reset["end"], "reset",
                    "a reset by the server at {ip}: {reset}"
                );
                assert_eq!(attempt("abort", ECHO, &[])["sent"], true);
                let closed = attempt("who", CLOSED, &[]);
                let kind = closed["kind"].as_str().unwrap_or_default();
                assert!(
                    ["ConnectionReset", "ConnectionRefused"].contains(&kind),
                    "a closed port at {ip}: {closed}"
                );
                let blast = attempt("blast", BLAST, &["20000000"]);
                assert_eq!(
                    (&blast["bytes"], &blast["correct"]),
                    (&20_000_000.into(), &true.into()),
                    "{ip}: {blast}"
                );
            }
            // The server noticed the resets as resets: one an address, of both families.
            wait_until(
                "the server to see the client's resets",
                Duration::from_secs(10),
                || {
                    let log = lab.logs(&["-n", server.0, server.1]);
                    let seen = log.matches(&format!("port {ECHO} broke")).count();
                    if seen >= 4 && log.contains("ConnectionReset") {
                        Ok(())
                    } else {
                        Err(format!("{seen} of 4:\n{log}"))
                    }
                },
            );
        }
        let refused = [("reason", "connect_refused")];
        assert!(
            lab.metrics("node-1").sum(FAILED, &refused) >= 8.0,
            "{}",
            lab.metrics("node-1").describe(FAILED)
        );
    });
}

#[test]
fn a_reader_that_does_not_read_costs_little() {
    scenario(Duration::from_secs(90), |s| {
        let lab = s.lab(2, &near_and_far());
        for server in ["far", "near"] {
            let target = format!("{server}:{BLAST}");
            let program = binary("mesh-try").display().to_string();
            let usage = || ["node-1", "node-2"].map(|node| rss_kib(lab.node(node).supervisor));
            let before = usage();
            let mut readers: Vec<_> = (0..8)
                .map(|_| {
                    lab.exec_background(
                        CLIENT,
                        &[&program, "blast", &target, "30000000", "--pause-ms", "3000"],
                    )
                })
                .collect();
            let_run(Duration::from_secs(2));
            assert!(readers.iter_mut().all(|r| r.running()), "the readers pause");
            let during = usage();
            println!("{server}: 8 readers that do not read: {before:?} KiB -> {during:?} KiB");
            for (before, during) in before.iter().zip(&during) {
                assert!(
                    during.saturating_sub(*before) < 32 << 10,
                    "{server}: {before} -> {during} KiB"
                );
            }
            for reader in readers {
                let done = reader.finish(Duration::from_secs(40)).expect_ok();
                let answer: Value = serde_json::from_str(done.stdout.trim()).unwrap_or_default();
                assert_eq!(
                    (&answer["bytes"], &answer["correct"]),
                    (&30_000_000.into(), &true.into()),
                    "{done}"
                );
            }
        }
    });
}

#[test]
fn a_failed_connect_tries_another_endpoint() {
    scenario(Duration::from_secs(90), |s| {
        let mut manifests = near_and_far();
        manifests.extend([account("demo", "duo"), echo_service("demo", "duo")]);
        // One endpoint serves; on the others, ready as they are, nothing listens.
        manifests.push(Pod::echo("demo", "duo", "node-2").build());
        for (name, node) in [("deaf-1", "node-1"), ("deaf-2", "node-2")] {
            manifests.push(
                Pod::new("demo", name, node)
                    .account("duo")
                    .label("app", "duo")
                    .build(),
            );
        }
        let lab = s.lab(2, &manifests);
        for round in 0..20 {
            for ip in lab.service_ips(("demo", "duo")) {
                let target = SocketAddr::new(ip, COUNT).to_string();
                let answer = attempt(&lab, CLIENT, &["half-close", &target, "1000"]);
                assert_eq!(
                    answer["answer"], "1000 bytes",
                    "round {round}, {ip}: {answer}"
                );
            }
        }
    });
}

#[test]
fn limits_hit_one_workload_alone() {
    scenario(Duration::from_secs(90), |s| {
        let mut manifests = near_and_far();
        manifests.extend([
            account("demo", "modest"),
            Pod::idle("demo", "modest", "node-1"),
        ]);
        let limits = s.file("proxy.yaml", "limits:\n  connections: 100\n");
        let overlay = format!("proxy={}", limits.display());
        let options = Options {
            ca: None,
            args: vec!["--config".into(), overlay],
        };
        let lab = s.lab_with(2, &manifests, &options);
        let target = format!("far:{ECHO}");
        let modest = Running::hold(
            s,
            &lab,
            ("demo", "modest"),
            // Not the same server: its limit of streams is hit as well.
            &format!("near:{ECHO}"),
            (50, 1),
            Some(Duration::from_millis(100)),
        );
        let greedy: HoldReport = {
            let held = Running::hold(s, &lab, CLIENT, &target, (300, 1), None);
            let limited = lab.metrics("node-1");
            let labels = [
                ("reporter", "source"),
                ("source_workload", "client"),
                ("reason", "workload_limit"),
            ];
            assert!(
                limited.sum(FAILED, &labels) >= 200.0,
                "{}",
                limited.describe(FAILED)
            );
            held.stop()
        };
        assert_eq!(
            (greedy.held, greedy.failed, greedy.broken),
            (100, 200, 0),
            "{greedy:#?}"
        );
        modest
            .stop::<HoldReport>()
            .expect_unbroken("the other workload");
        lab.wait_for_log(&["node/node-1"], "workload_limit");
        // What was given back can be used again.
        let again = Running::hold(s, &lab, CLIENT, &target, (100, 1), None);
        again
            .stop::<HoldReport>()
            .expect_unbroken("within the limit again");
    });
}
