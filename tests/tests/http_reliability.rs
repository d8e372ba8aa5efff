//! Lines 4 and 5: endpoints that are slow, fail, die, are cut off or are replaced, under load; and retries
//! that do not multiply an outage.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use warren_tests::http::{HTTP, RequestReport, Requests, admin, count, requests};
use warren_tests::lab::{Lab, PodRef, in_namespace, signal};
use warren_tests::manifest::{Pod, account, meshed_namespace, service};
use warren_tests::process::run;
use warren_tests::scenario::{Scenario, binary, scenario};
use warren_tests::wait::{let_run, wait_until};

const CLIENT: PodRef<'_> = ("demo", "client");
const SLOW: PodRef<'_> = ("demo", "slow");
const FAILING: PodRef<'_> = ("demo", "failing");
/// Requests a second that two cores carry with the generator, proxies and servers on them.
const RATE: &str = "300";

/// A TrafficPolicy for a Service.
fn policy(service: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec["targetRefs"] = json!([{"kind": "Service", "name": service}]);
    json!({"apiVersion": "warren-mesh.io/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {"name": service, "namespace": "demo"}, "spec": spec})
}

#[test]
fn slow_and_failing_endpoints() {
    scenario(Duration::from_secs(300), |s| {
        let mut manifests = vec![
            meshed_namespace("demo"),
            account("demo", "client"),
            account("demo", "web"),
        ];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        for (name, node) in [
            ("good", "node-2"),
            ("slow", "node-2"),
            ("failing", "node-1"),
        ] {
            manifests.push(
                Pod::http("demo", name, node)
                    .account("web")
                    .label("app", "web")
                    .build(),
            );
        }
        // The same endpoints under three policies.
        for name in ["robin", "default", "breaker"] {
            let mut front = service("demo", name, &[(80, HTTP)]);
            front["spec"]["selector"] = json!({"app": "web"});
            manifests.push(front);
        }
        manifests.push(policy(
            "robin",
            json!({"loadBalancing": {"type": "RoundRobin"}, "retry": {"attempts": 0}}),
        ));
        manifests.push(policy(
            "breaker",
            json!({"circuitBreaking": {
            "consecutiveFailures": 3, "minSuccessPercent": 80, "minRequests": 10, "window": "10s",
            "baseEjection": "3s", "maxEjection": "5s", "maxEjectedPercent": 50}}),
        ));
        let lab = s.lab(2, &manifests);
        let make_bad = |lab: &Lab| {
            for pod in [("demo", "good"), FAILING] {
                admin(lab, pod, "/control", Some("delay=2"));
            }
            admin(lab, SLOW, "/control", Some("delay=200"));
            admin(lab, FAILING, "/control", Some("delay=2&fail=50&status=500"));
        };
        make_bad(&lab);
        let measure = |front: &str| {
            let url = format!("http://{front}/");
            // What is learned and ejected at first is not measured.
            requests(&lab, CLIENT, &[&url, "--rate", RATE, "--seconds", "3"]);
            let report = requests(&lab, CLIENT, &[&url, "--rate", RATE, "--seconds", "8"]);
            println!(
                "{front}: p50 {:.1} ms, p99 {:.1} ms, failed {:.4}, servers {:?}, lag {:.1} ms",
                report.p50_ms,
                report.p99_ms,
                report.failed_share(),
                report.servers,
                report.lag_ms
            );
            assert!(report.failed.is_empty(), "{front}: {report:#?}");
            report
        };
        let robin = measure("robin");
        assert!(
            robin.failed_share() > 0.1 && robin.p99_ms > 190.,
            "the endpoints are bad: {robin:#?}"
        );
        let default = measure("default");
        assert!(
            default.p99_ms <= robin.p99_ms / 5.,
            "p99 {} against {}",
            default.p99_ms,
            robin.p99_ms
        );
        assert!(
            default.failed_share() <= robin.failed_share(),
            "a failure counts as a latency penalty: {default:#?}"
        );
        let breaker = measure("breaker");
        assert!(
            breaker.failed_share() <= robin.failed_share() / 5.,
            "{breaker:#?}"
        );
        assert!(breaker.server_share("failing") <= 0.01, "{breaker:#?}");

        // Back to normal within 10 s of recovery, with either.
        for front in ["default", "breaker"] {
            make_bad(&lab);
            let url = format!("http://{front}/");
            requests(&lab, CLIENT, &[&url, "--rate", RATE, "--seconds", "3"]);
            let load = Requests::start(s, &lab, CLIENT, &[&url, "--rate", RATE]);
            for pod in [SLOW, FAILING] {
                admin(&lab, pod, "/control", Some("delay=2"));
            }
            let_run(Duration::from_secs(13));
            let report = load.stop();
            // Whole seconds from the tenth on.
            let late = &report.timeline[10..report.timeline.len() - 1];
            for server in ["slow", "failing", "good"] {
                let served: u64 = late
                    .iter()
                    .filter_map(|second| second.get(&format!("{server} 200")))
                    .sum();
                let all: u64 = late.iter().flat_map(|second| second.values()).sum();
                let share = served as f64 / all.max(1) as f64;
                assert!(
                    share > 0.15,
                    "{front}: {server} serves {share:.3} of the requests 10 s after recovery: {:?}",
                    report.timeline
                );
            }
            let failed: u64 = late
                .iter()
                .flatten()
                .filter(|(what, _)| !what.ends_with(" 200"))
                .map(|(_, n)| n)
                .sum();
            assert_eq!(failed, 0, "{front}: {:?}", report.timeline);
        }
    });
}

#[test]
fn a_rolling_restart_fails_no_request() {
    scenario(Duration::from_secs(200), |s| {
        let lab = deployment(s);
        for (what, more) in [
            ("HTTP/1", &[][..]),
            ("HTTP/2", &["--h2", "--connections", "4"]),
        ] {
            let load = Requests::start(
                s,
                &lab,
                CLIENT,
                &[&["http://web/", "--rate", "500"], more].concat(),
            );
            let old: Vec<String> = web_pods(&lab);
            // So that every old one has served, and below every new one.
            let_run(Duration::from_secs(2));
            let mut restart = Command::new(binary("warren"));
            restart.args(["lab", "rollout", "restart", "--name", lab.name()]);
            restart.args(["-n", "demo", "deploy/web"]);
            run(&mut restart, Duration::from_secs(90)).expect_ok();
            wait_until(
                "all endpoints to be replaced",
                Duration::from_secs(60),
                || {
                    let now = web_pods(&lab);
                    let done = now.len() == 3 && now.iter().all(|pod| !old.contains(pod));
                    if done {
                        Ok(())
                    } else {
                        Err(format!("{now:?}"))
                    }
                },
            );
            let_run(Duration::from_secs(2));
            let report = load.stop();
            print("rolling restart", &report);
            report.expect_no_failure(&format!("a rolling restart of all endpoints, {what}"));
            assert!(
                report.servers.len() >= 6,
                "old and new ones served: {:?}",
                report.servers
            );
        }
    });
}

#[test]
fn endpoints_that_die_or_are_cut_off() {
    scenario(Duration::from_secs(200), |s| {
        let lab = deployment(s);
        let load = Requests::start(
            s,
            &lab,
            CLIENT,
            &["http://web/", "--rate", "500", "--deadline-ms", "5000"],
        );
        let_run(Duration::from_secs(1));
        let victim = lab
            .pods()
            .into_iter()
            .find(|p| p.name.starts_with("web") && p.node == "node-2");
        signal(
            victim
                .and_then(|p| p.pid)
                .expect("an endpoint on node 2 has a process"),
            Signal::SIGKILL,
        );
        let_run(Duration::from_secs(4));
        let report = load.stop();
        print("an endpoint killed", &report);
        // What it had in hand when it died cannot be known to be repeatable after its answer began.
        assert!(
            report.failed_share() < 0.01,
            "an endpoint killed: {report:#?}"
        );

        // A node without network: the others serve on, and what was lost is bounded.
        wait_until("three endpoints", Duration::from_secs(30), || {
            let report = requests(&lab, CLIENT, &["http://web/", "--total", "300"]);
            if report.servers.len() == 3 {
                Ok(())
            } else {
                Err(format!("{:?}", report.servers))
            }
        });
        let node = lab.node("node-2").netns;
        let link = |state: &str| {
            let mut ip: Command = in_namespace(&node, "ip");
            run(
                ip.args(["link", "set", "eth0", state]),
                Duration::from_secs(5),
            )
            .expect_ok();
        };
        let load = Requests::start(
            s,
            &lab,
            CLIENT,
            &["http://web/", "--rate", "200", "--deadline-ms", "15000"],
        );
        let_run(Duration::from_secs(1));
        link("down");
        let_run(Duration::from_secs(15));
        let during = requests(
            &lab,
            CLIENT,
            &[
                "http://web/",
                "--rate",
                "100",
                "--seconds",
                "3",
                "--deadline-ms",
                "15000",
            ],
        );
        link("up");
        let report = load.stop();
        print("a node cut off", &report);
        print("15 s after it was cut off", &during);
        assert!(report.failed_share() < 0.5, "a node cut off: {report:#?}");
        assert!(
            during.ok * 10 > during.started * 9,
            "the endpoints that are left serve: {during:#?}"
        );
    });
}

#[test]
fn retries_stay_within_their_budget() {
    scenario(Duration::from_secs(150), |s| {
        let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        for (name, node) in [("one", "node-1"), ("two", "node-2")] {
            manifests.push(account("demo", name));
            manifests.push(Pod::http("demo", name, node).label("app", "web").build());
        }
        let mut fronts = Vec::new();
        for name in ["storm", "constrained"] {
            let mut front = service("demo", name, &[(80, HTTP)]);
            front["spec"]["selector"] = json!({"app": "web"});
            fronts.push(front);
        }
        manifests.extend(fronts);
        let retry = json!({"retry": {"attempts": 3, "statusCodes": [503], "backoff": {"base": "5ms", "max": "20ms"}}});
        manifests.push(policy("storm", retry.clone()));
        manifests.push(policy("constrained", retry));
        manifests.push(json!({"apiVersion": "gateway.networking.x-k8s.io/v1alpha1", "kind": "XBackendTrafficPolicy",
            "metadata": {"name": "constrained", "namespace": "demo"}, "spec": {
                "targetRefs": [{"group": "", "kind": "Service", "name": "constrained"}],
                "retryConstraint": {"budget": {"percent": 10, "interval": "10s"}, "minRetryRate": {"count": 5, "interval": "1s"}}}}));
        let lab = s.lab(2, &manifests);
        let pods = [("demo", "one"), ("demo", "two")];
        let outage = |front: &str| {
            let url = format!("http://{front}/");
            for pod in pods {
                admin(&lab, pod, "/control", Some("fail=100&status=503"));
                admin(&lab, pod, "/reset", Some(""));
            }
            let args = [url.as_str(), "--rate", "400", "--seconds", "8"];
            let report = requests(&lab, CLIENT, &args);
            let arrived: u64 = pods.iter().map(|pod| count(&lab, *pod)).sum();
            let factor = arrived as f64 / report.started as f64;
            println!(
                "{front}: {} requests, {arrived} arrived: {factor:.3}",
                report.started
            );
            assert!(factor > 1.02, "{front}: retries happen at all: {factor:.3}");
            let share = report.status_share(503);
            assert_eq!(
                share, 1.0,
                "{front}: the original answer, or 503: {report:#?}"
            );
            factor
        };
        // The budget's share, and its floor of 10 and 5 a second.
        let (storm, constrained) = (outage("storm"), outage("constrained"));
        assert!(
            storm < 1.25,
            "{storm:.3} of the load arrived at a failing service"
        );
        assert!(
            constrained < 1.15,
            "{constrained:.3} with a retryConstraint of 10 %"
        );
        // After a healthy time its requests are in the window, too: a fifth of those more, once.
        for pod in pods {
            admin(&lab, pod, "/control", Some(""));
        }
        let healthy = requests(
            &lab,
            CLIENT,
            &["http://storm/", "--rate", "400", "--seconds", "3"],
        );
        healthy.expect_no_failure("storm");
        let storm = outage("storm");
        assert!(
            storm < 1.25 + 0.2 * 10. / 8.,
            "{storm:.3} after a healthy time"
        );
    });
}

/// A Deployment `web` of three on both nodes, and a client on node 1.
fn deployment(s: &Scenario) -> Lab {
    let Value::Object(pod) = Pod::http("demo", "web", "node-1").build() else {
        panic!("a manifest is an object");
    };
    let mut spec = pod["spec"].clone();
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("nodeName");
        spec.insert("terminationGracePeriodSeconds".into(), json!(10));
    }
    // Each names itself after its pod.
    if let Some(command) = spec["containers"][0]["command"].as_array_mut() {
        command.truncate(1);
    }
    s.lab(
        2,
        &[
            meshed_namespace("demo"),
            account("demo", "client"),
            account("demo", "web"),
            Pod::idle("demo", "client", "node-1"),
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "demo"},
                "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
                    "template": {"metadata": {"labels": {"app": "web"}}, "spec": spec}}}),
            service("demo", "web", &[(80, HTTP)]),
        ],
    )
}

fn web_pods(lab: &Lab) -> Vec<String> {
    let pods = lab.pods().into_iter();
    pods.map(|p| p.name)
        .filter(|name| name.starts_with("web"))
        .collect()
}

fn print(what: &str, report: &RequestReport) {
    println!(
        "{what}: {} requests, {} not answered with success ({:.5}), p50 {:.1} ms, p99 {:.1} ms, slowest {:.1} ms, lag {:.1} ms; {:?} {:?}",
        report.started,
        report.started - report.ok,
        report.failed_share(),
        report.p50_ms,
        report.p99_ms,
        report.slowest_ms,
        report.lag_ms,
        report.statuses,
        report.failures,
    );
}
