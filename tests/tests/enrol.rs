//! Line 5: a connection opened before enrolment keeps working through enrol and un-enrol; one opened
//! during enrolment survives un-enrolment; nobody is refused meanwhile; no trace is left at the end.

use std::time::Duration;

use warren_tests::lab::{Lab, PodRef, in_namespace};
use warren_tests::load::{HoldReport, LoadReport, Running, attempt};
use warren_tests::manifest::{ECHO, Pod, WHO, account, echo_service, meshed_namespace, namespace};
use warren_tests::process::run;
use warren_tests::scenario::scenario;
use warren_tests::wait::{let_run, wait_until};

const CLIENT: PodRef<'_> = ("callers", "client");
const SERVER: PodRef<'_> = ("callees", "server");
const TICK: Option<Duration> = Some(Duration::from_millis(20));
const SETTLING: Duration = Duration::from_secs(20);
const MUTUAL_TLS: &[(&str, &str)] = &[("security", "mutual_tls")];
const SERVER_NAME: &str = "server.callees";

#[test]
fn connections_survive_enrolment_and_the_end_of_it() {
    scenario(Duration::from_secs(180), |s| {
        let lab = s.lab(
            2,
            &[
                namespace("callers", &[]),
                namespace("callees", &[]),
                account("callers", "client"),
                account("callees", "server"),
                Pod::idle("callers", "client", "node-1"),
                Pod::echo("callees", "server", "node-2").build(),
                echo_service("callees", "server"),
            ],
        );
        let target = format!("{SERVER_NAME}:{ECHO}");
        let hold = |what: &str| {
            eprintln!("opening connections {what}");
            Running::hold(s, &lab, CLIENT, &target, (3, 1), TICK)
        };
        let before = hold("before enrolment");
        let load = Running::load(s, &lab, CLIENT, &target, 50);

        // The callee first, then the caller: first an un-meshed caller, then a meshed one.
        lab.apply(&[meshed_namespace("callees")]).expect_ok();
        lab.wait_for_mesh(SERVER, "enrolled");
        let half = hold("to a meshed server from outside");
        lab.apply(&[meshed_namespace("callers")]).expect_ok();
        lab.wait_for_mesh(CLIENT, "enrolled");
        wait_until("tunnels in use", SETTLING, || grows(&lab, MUTUAL_TLS, true));
        who(&lab);
        let during = hold("during enrolment");

        // Out again in the same order: a meshed caller, a callee that leaves.
        lab.apply(&[namespace("callees", &[])]).expect_ok();
        wait_until("plaintext to the callee", SETTLING, || {
            grows(&lab, MUTUAL_TLS, false)
        });
        lab.apply(&[namespace("callers", &[])]).expect_ok();
        wait_until("no capture any more", SETTLING, || grows(&lab, &[], false));
        who(&lab);
        let after = hold("after enrolment");

        load.stop::<LoadReport>()
            .expect_no_failure("new connections through enrol and un-enrol");
        for (what, held) in [
            ("before", before),
            ("half-way", half),
            ("during", during),
            ("after", after),
        ] {
            let report: HoldReport = held.stop();
            assert_eq!(
                (report.held, report.failed, report.broken),
                (3, 0, 0),
                "opened {what}: {report:#?}"
            );
        }
        for pod in [CLIENT, SERVER] {
            lab.wait_for_mesh(pod, "none");
            wait_for_no_trace(&lab, pod);
        }
    });
}

/// The server sees the client's own address, whatever is in between.
#[track_caller]
fn who(lab: &Lab) {
    let answer = attempt(lab, CLIENT, &["who", &format!("{SERVER_NAME}:{WHO}")]);
    let ips: Vec<String> = lab
        .pod(CLIENT)
        .ips
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        ips.iter().any(|ip| answer["ip"] == **ip),
        "{answer}, not one of {ips:?}"
    );
}

/// Whether the load's connections are counted by the caller's proxy, or not any more.
fn grows(lab: &Lab, more: &[(&str, &str)], wanted: bool) -> Result<(), String> {
    let labels = [
        &[("reporter", "source"), ("source_workload", "client")],
        more,
    ]
    .concat();
    let counted = || {
        let metrics = lab.metrics("node-1");
        metrics.sum("warren_tcp_connections_opened_total", &labels)
    };
    let before = counted();
    let_run(Duration::from_millis(500));
    let grown = counted() - before;
    if (grown > 0.0) == wanted {
        Ok(())
    } else {
        Err(format!("{grown} connections in half a second"))
    }
}

/// No capture rule, ip rule, route or listener of the mesh in the pod's namespace.
#[track_caller]
fn wait_for_no_trace(lab: &Lab, pod: PodRef<'_>) {
    let netns = lab.pod(pod).netns;
    wait_until(
        &format!("no trace in {pod:?}"),
        Duration::from_secs(20),
        || {
            let look = |program: &str, args: &str| {
                run(
                    in_namespace(&netns, program).args(args.split(' ')),
                    Duration::from_secs(5),
                )
                .stdout
            };
            let mut found = look("nft", "list ruleset");
            for family in ["-4", "-6"] {
                let rules = look("ip", &format!("{family} rule show"));
                found.extend(
                    rules
                        .lines()
                        .filter(|l| l.contains("lookup 100") || l.contains("fwmark")),
                );
                found += &look("ip", &format!("{family} route show table 100"));
            }
            let listeners = look("ss", "-Htln");
            found.extend(listeners.lines().filter(|l| {
                [":15001 ", ":15006 ", ":15008 "]
                    .iter()
                    .any(|p| l.contains(p))
            }));
            if found.trim().is_empty() {
                Ok(())
            } else {
                Err(found)
            }
        },
    );
}
