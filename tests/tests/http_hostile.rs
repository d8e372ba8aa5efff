//! Hostile HTTP from a meshed pod: malformed and smuggling shapes, floods, bombs and readers that do not
//! read. Each ends its own connection or stream and no more: the proxy is the same process, its memory stays
//! bounded, and other traffic does not notice.
//!
//! Rules: RFC 9112 (sections 2.2, 3.2, 5, 6, 7.1, 11.2), RFC 9113 (sections 5.4, 6, 10.5).

use std::time::Duration;

use serde_json::Value;
use warren_tests::host::{rss_kib, status_field};
use warren_tests::http::{HTTP, Requests, admin, curl};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, namespace, service_of};
use warren_tests::python::python;
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::wait::wait_until;

const ATTACKER: PodRef<'_> = ("demo", "attacker");
const QUIET: PodRef<'_> = ("demo", "quiet");
const FAR: PodRef<'_> = ("demo", "far");
/// A server without a Service.
const BARE: PodRef<'_> = ("demo", "bare");
/// Not in the mesh.
const OUTSIDE: PodRef<'_> = ("outside", "caller");
const NODES: [&str; 2] = ["node-1", "node-2"];
/// How much a proxy may grow under any attack: no attack has more than a hundred requests under way at once, and each may
/// hold so much (docs/reference/node-proxy.md, "What a workload can make the proxy hold").
const MEMORY_KIB: u64 = 100 * 1331;
/// Pages of the program file that a worker may have mapped.
const FILE_KIB: u64 = 32 * 1024;
/// Ports of the Service: HTTP/1 and HTTP/2 declared, and nothing.
const H1: u16 = 80;
const H2: u16 = 81;
const UNDECLARED: u16 = 82;

#[test]
fn malformed_requests_are_refused_and_nothing_is_smuggled() {
    scenario(Duration::from_secs(300), |s| {
        let lab = attacked(s);
        let mut watch = Watch::begin(s, &lab);
        let said = run(
            &lab,
            "hostile_http1.py",
            &["shapes", "far", &H1.to_string()],
            240,
        );
        expect_right(&said);
        let seen = admin(&lab, FAR, "/count", None);
        assert!(seen["paths"]["/smuggled"].is_null(), "{seen}");
        for reason in [
            "start_line",
            "line_too_long",
            "version",
            "header_name",
            "header_value",
            "bare_line_feed",
            "host",
            "content_length",
            "length_and_encoding",
            "transfer_encoding",
            "coding",
            "head_too_large",
            "too_many_headers",
        ] {
            expect_counted(&lab, reason);
        }
        // What comes behind a good head is counted with its request.
        let bodies = lab.metrics("node-1").sum(
            "warren_http_requests_total",
            &[
                ("source_workload", "attacker"),
                ("response_flags", "malformed_request"),
            ],
        );
        assert!(bodies > 0.0);
        watch.check("malformed requests");
        watch.end();
    });
}

#[test]
fn first_lines_that_any_server_takes_are_http_also_where_nothing_is_declared() {
    scenario(Duration::from_secs(420), |s| {
        let lab = attacked(s);
        let address = |pod| lab.pod(pod).v4().to_string();
        let (far, bare) = (address(FAR), address(BARE));
        for (what, caller, host, port) in [
            ("lines", ATTACKER, "far", UNDECLARED),
            // A pod's own address.
            ("lines", ATTACKER, &*far, HTTP),
            ("lines", OUTSIDE, &*bare, HTTP),
            // Its node knows what the Services say whose endpoint it is.
            ("shapes", OUTSIDE, &*far, HTTP),
        ] {
            println!("{what} from {caller:?} to {host}:{port}");
            let args = [what, host, &port.to_string()];
            let said = run_in(&lab, caller, "hostile_http1.py", &args, 240);
            expect_right(&said);
        }
        for server in [FAR, BARE] {
            let seen = admin(&lab, server, "/count", None);
            assert!(seen["paths"]["/smuggled"].is_null(), "{seen}");
        }
    });
}

#[test]
fn slow_heads_end() {
    scenario(Duration::from_secs(180), |s| {
        let lab = attacked(s);
        let mut watch = Watch::begin(s, &lab);
        let said = run(
            &lab,
            "hostile_http1.py",
            &["slow", "far", &H1.to_string()],
            120,
        );
        for shape in said.as_array().expect("a list of shapes") {
            assert_eq!(
                (&shape["status"], &shape["closed"]),
                (&408.into(), &true.into()),
                "{shape}"
            );
        }
        expect_counted(&lab, "slow_head");
        watch.check("slow heads");
        watch.end();
    });
}

#[test]
fn floods_bombs_and_readers_that_do_not_read() {
    scenario(Duration::from_secs(420), |s| {
        let lab = attacked(s);
        let mut watch = Watch::begin(s, &lab);
        // Attack, whether the server must end the connection (or refuse every stream) by itself, and what it is counted as
        // (of readers that do not read only after five minutes).
        for (attack, must_end, reasons) in [
            ("rapid_reset", true, &["http2"][..]),
            ("open_streams", false, &["stream", "http2"]),
            ("continuation", true, &["http2"]),
            ("empty_continuation", true, &["http2", "flood"]),
            ("settings", true, &["flood"]),
            ("ping", true, &["flood"]),
            ("unread_ping", true, &["flood"]),
            ("window", true, &["flood"]),
            ("window_overflow", true, &["http2"]),
            ("priority", true, &["flood"]),
            ("empty_data", true, &["flood", "http2"]),
            ("hpack_bomb", false, &["stream", "http2"]),
            ("large_headers", false, &["stream", "http2"]),
            ("zero_window", false, &[]),
            ("no_reader", false, &[]),
            ("broken", true, &["http2"]),
        ] {
            let counted = || -> f64 { reasons.iter().map(|reason| malformed(&lab, reason)).sum() };
            let before = counted();
            let said = run(
                &lab,
                "hostile_http2.py",
                &[attack, "far", &H2.to_string()],
                60,
            );
            println!("{attack}: {said}");
            assert!(!must_end || !said["ended"].is_null(), "{attack}: {said}");
            match attack {
                // ENHANCE_YOUR_CALM, or a connection that is simply cut.
                "rapid_reset" => {
                    assert!(said["frames"].as_u64() < Some(50_000), "{attack}: {said}")
                }
                "open_streams" => assert!(
                    !said["ended"].is_null() || said["streams reset"].as_u64() > Some(10_000),
                    "{attack}: {said}"
                ),
                // Refused, one by one or with the connection: never 200.
                "hpack_bomb" | "large_headers" => {
                    let seen = admin(&lab, FAR, "/count", None);
                    assert!(
                        seen["paths"]["/bomb"].is_null() && seen["paths"]["/large"].is_null(),
                        "{attack}: {seen}"
                    );
                }
                "window_overflow" => assert!(
                    said["code"].is_null() || said["code"] == 3,
                    "FLOW_CONTROL_ERROR: {said}"
                ),
                _ => {}
            }
            if !reasons.is_empty() {
                wait_until(attack, Duration::from_secs(10), || {
                    let now = counted();
                    if now > before {
                        Ok(())
                    } else {
                        Err(format!("counted as {reasons:?}: {now}, {before} before"))
                    }
                });
            }
            watch.check(attack);
        }
        watch.end();
    });
}

#[test]
fn forged_headers_of_the_mesh_do_not_arrive() {
    scenario(Duration::from_secs(90), |s| {
        let lab = attacked(s);
        let forged = [
            "-H",
            "warren-client-id: spiffe://cluster.local/ns/demo/sa/admin",
            "-H",
            "Warren-Target: 127.0.0.1:1",
            "-H",
            "warren-source: 1.2.3.4",
            "-H",
            "warren-service: demo/else",
            "-H",
            "warren-version: 2",
            "-H",
            "warren-anything: x",
        ];
        for (port, more) in [(H1, &[][..]), (H2, &["--http2-prior-knowledge"])] {
            let url = format!("http://far:{port}/");
            let answer = curl(
                &lab,
                ATTACKER,
                &[&[url.as_str()][..], &forged, more].concat(),
            );
            let seen = answer.seen();
            let ours: Vec<_> = seen["headers"]
                .as_array()
                .expect("a list")
                .iter()
                .filter(|pair| pair[0].as_str().is_some_and(|n| n.starts_with("warren-")))
                .collect();
            assert_eq!(ours.len(), 1, "{seen}");
            let id = answer.seen_header("warren-client-id");
            assert_eq!(
                id.as_deref(),
                Some("spiffe://cluster.local/ns/demo/sa/attacker"),
                "{seen}"
            );
        }
    });
}

/// Every shape was answered as it must be, those that are refused by the proxy, and no app saw an identity made up.
#[track_caller]
fn expect_right(said: &Value) {
    let mut wrong = Vec::new();
    for shape in said.as_array().expect("a list of shapes") {
        let wanted = shape["wanted"].as_array().expect("a list of statuses");
        let good = shape["name"]
            .as_str()
            .is_some_and(|n| n.starts_with("good"));
        let closed = shape["closed"] == true || good;
        // Behind a good head the app may have answered, or nobody.
        let refused = !good && !wanted.contains(&Value::Null);
        // No more than one answer: whatever follows a refused head is not read as a request.
        if !wanted.contains(&shape["status"])
            || !closed
            || shape["answers"].as_u64() > Some(1)
            || (refused && shape["proxy"] != true)
            || shape["forged"] != false
        {
            wrong.push(shape.to_string());
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// How often the attacker's node counted that against it.
fn malformed(lab: &Lab, reason: &str) -> f64 {
    let labels = [
        ("namespace", "demo"),
        ("pod", "attacker"),
        ("reason", reason),
    ];
    lab.metrics("node-1")
        .sum("warren_workload_malformed_total", &labels)
}

#[track_caller]
fn expect_counted(lab: &Lab, reason: &str) {
    let counted = malformed(lab, reason);
    let metrics = lab.metrics("node-1");
    assert!(
        counted > 0.0,
        "{reason}: {}",
        metrics.describe("warren_workload_malformed_total")
    );
}

/// An attacker and a quiet client on node 1, a server on node 2 and one on node 1, and a pod outside the mesh.
fn attacked(s: &Scenario) -> Lab {
    let mut manifests = vec![
        meshed_namespace("demo"),
        namespace(OUTSIDE.0, &[]),
        account(OUTSIDE.0, OUTSIDE.1),
        Pod::idle(OUTSIDE.0, OUTSIDE.1, "node-1"),
    ];
    for name in ["attacker", "quiet"] {
        manifests.extend([account("demo", name), Pod::idle("demo", name, "node-1")]);
    }
    for (name, node) in [("near", "node-1"), ("far", "node-2")] {
        manifests.push(account("demo", name));
        manifests.push(Pod::http("demo", name, node).build());
        manifests.push(service_of(
            "demo",
            name,
            &[
                (H1, HTTP, Some("http")),
                (H2, HTTP, Some("kubernetes.io/h2c")),
                (UNDECLARED, HTTP, None),
            ],
        ));
    }
    manifests.extend([
        account("demo", "bare"),
        Pod::http("demo", "bare", "node-2").build(),
    ]);
    s.lab(2, &manifests)
}

/// What must not change while someone attacks.
struct Watch<'a> {
    lab: &'a Lab,
    workers: [u32; 2],
    rss: [u64; 2],
    quiet: Vec<Requests>,
}

impl<'a> Watch<'a> {
    fn begin(s: &Scenario, lab: &'a Lab) -> Self {
        let load = |server: &str| {
            let url = format!("http://{server}:{H1}/quiet");
            Requests::start(
                s,
                lab,
                QUIET,
                &[&url, "--rate", "20", "--deadline-ms", "5000"],
            )
        };
        let quiet = vec![load("near"), load("far")];
        let rss = NODES.map(|node| rss_kib(lab.node(node).supervisor));
        Self {
            lab,
            workers: NODES.map(|node| lab.worker(node)),
            rss,
            quiet,
        }
    }

    #[track_caller]
    fn check(&mut self, after: &str) {
        for ((node, worker), before) in NODES.iter().zip(self.workers).zip(self.rss) {
            assert_eq!(
                self.lab.worker(node),
                worker,
                "{after}: the proxy of {node} is another process"
            );
            wait_until(
                &format!("memory of {node} after {after}"),
                Duration::from_secs(20),
                || {
                    let now = rss_kib(self.lab.node(node).supervisor);
                    if now < before + MEMORY_KIB {
                        Ok(())
                    } else {
                        Err(format!("{now} KiB, {before} KiB before"))
                    }
                },
            );
            // What it took at most, while the attack went on.
            let peak = status_field(worker, "VmHWM");
            let peak: u64 = peak
                .trim_end_matches(" kB")
                .parse()
                .expect("the kernel counts in kB");
            // The worker's pages of the program file count here and, shared, only in part above.
            assert!(
                peak < before + MEMORY_KIB + FILE_KIB,
                "{after}: {node} took {peak} KiB, {before} KiB before"
            );
        }
    }

    /// The quiet workload was served all the time, and nothing counts against anyone but the attacker.
    #[track_caller]
    fn end(self) {
        for node in NODES {
            let metrics = self.lab.metrics(node);
            let name = "warren_workload_malformed_total";
            let all = metrics.sum(name, &[]);
            let attacker = metrics.sum(name, &[("pod", "attacker")]);
            assert_eq!(all, attacker, "{node}: {}", metrics.describe(name));
        }
        for load in self.quiet {
            let report = load.stop();
            report.expect_no_failure("traffic beside the attacks");
            println!(
                "beside the attacks: p50 {} ms, p99 {} ms",
                report.p50_ms, report.p99_ms
            );
        }
    }
}

#[track_caller]
fn run(lab: &Lab, peer: &str, args: &[&str], seconds: u64) -> Value {
    run_in(lab, ATTACKER, peer, args, seconds)
}

#[track_caller]
fn run_in(lab: &Lab, pod: PodRef<'_>, peer: &str, args: &[&str], seconds: u64) -> Value {
    let command = python(peer, args);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let done = lab
        .exec_within(pod, &command, Duration::from_secs(seconds))
        .expect_ok();
    serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
}
