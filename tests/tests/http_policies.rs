//! TrafficPolicy and session persistence against the running proxy: balancing by hash, sessions, retries
//! and timeouts without a route, limits, rates, faults (`docs/reference/traffic-policy.md`).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use warren_tests::http::{HTTP, admin, curl, requests};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, namespace, service};
use warren_tests::routes::{CLIENT, front, http_route, wait_for_route};
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::wait::wait_until;

const OTHER: PodRef<'_> = ("demo", "other");
const SERVERS: [PodRef<'_>; 3] = [("demo", "a"), ("demo", "b"), ("demo", "c")];

/// Two clients on node 1, three servers on both nodes behind every front; a TrafficPolicy for each front.
fn lab_with(s: &Scenario, policies: &[(&str, Value)]) -> Lab {
    let mut manifests = vec![meshed_namespace("demo"), account("demo", "web")];
    for name in ["client", "other"] {
        manifests.extend([account("demo", name), Pod::idle("demo", name, "node-1")]);
    }
    for ((_, name), node) in SERVERS.iter().zip(["node-1", "node-2", "node-2"]) {
        let pod = Pod::http("demo", name, node).account("web");
        manifests.push(pod.label("app", "web").build());
    }
    manifests.push(service("demo", "web", &[(80, HTTP)]));
    for (name, spec) in policies {
        manifests.push(front("demo", name, "web"));
        let mut spec = spec.clone();
        spec["targetRefs"] = json!([{"kind": "Service", "name": name}]);
        manifests.push(
            json!({"apiVersion": "warren-mesh.io/v1alpha1", "kind": "TrafficPolicy",
            "metadata": {"name": name, "namespace": "demo"}, "spec": spec}),
        );
    }
    s.lab(2, &manifests)
}

#[test]
fn hashes_and_sessions() {
    scenario(Duration::from_secs(120), |s| {
        let hash = |key: Value| json!({"loadBalancing": {"type": "RingHash", "hashKey": key}});
        let lab = lab_with(
            s,
            &[
                ("header", hash(json!({"type": "Header", "name": "x-user"}))),
                ("cookie", hash(json!({"type": "Cookie", "name": "user"}))),
                ("source", hash(json!({"type": "SourceIP"}))),
                ("sticky", json!({"loadBalancing": {"type": "Random"}})),
            ],
        );
        let servers = |front: &str, header: &str| {
            let url = format!("http://{front}/");
            let args = [
                url.as_str(),
                "--total",
                "100",
                "--connections",
                "4",
                "--header",
                header,
            ];
            let report = requests(&lab, CLIENT, &args);
            report.expect_no_failure(front);
            report.servers.into_keys().collect::<BTreeSet<_>>()
        };
        for (front, header) in [("header", "x-user: "), ("cookie", "cookie: user=")] {
            let mut all = BTreeSet::new();
            for user in 0..12 {
                let served = servers(front, &format!("{header}u{user}"));
                assert_eq!(
                    served.len(),
                    1,
                    "{front}: user {user} was served by {served:?}"
                );
                all.extend(served);
            }
            assert_eq!(
                all.len(),
                3,
                "{front}: twelve users are spread over {all:?}"
            );
        }
        assert_eq!(
            servers("source", "x: y").len(),
            1,
            "one caller, one endpoint"
        );

        for (kind, name, more) in [
            ("Cookie", "mine", json!({})),
            ("Header", "x-mine", json!({})),
            (
                "Cookie",
                "long",
                json!({"absoluteTimeout": "1h", "cookieConfig": {"lifetimeType": "Permanent"}}),
            ),
        ] {
            let mut session = json!({"sessionName": name, "type": kind});
            for (key, value) in more.as_object().into_iter().flatten() {
                session[key] = value.clone();
            }
            let route = http_route(
                "demo",
                &format!("s-{name}"),
                "sticky",
                &json!([{
                "matches": [{"path": {"type": "PathPrefix", "value": format!("/{name}")}}],
                "backendRefs": [{"name": "web", "port": 80}], "sessionPersistence": session}]),
            );
            lab.apply(&[route]).expect_ok();
            wait_for_route(&lab, CLIENT, "sticky", &format!("s-{name}"));
            let url = format!("http://sticky/{name}");
            let first = curl(&lab, CLIENT, &[&url]);
            let field = if kind == "Cookie" { "set-cookie" } else { name };
            let given = first
                .field(field)
                .unwrap_or_else(|| panic!("no {field}: {first:#?}"));
            assert_eq!(
                given.to_lowercase().contains("max-age=3600"),
                name == "long",
                "{given}"
            );
            let again = match kind {
                "Cookie" => format!("cookie: {}", given.split(';').next().unwrap_or_default()),
                _ => format!("{name}: {given}"),
            };
            for _ in 0..12 {
                let answer = curl(&lab, CLIENT, &[&url, "-H", &again]);
                assert_eq!(answer.server(), first.server(), "GEP-1619 {kind}: {again}");
            }
        }

        // The sessions of the Service that serves, where the rule has none of its own.
        let policy = json!({
            "apiVersion": "gateway.networking.x-k8s.io/v1alpha1", "kind": "XBackendTrafficPolicy",
            "metadata": {"name": "web", "namespace": "demo"},
            "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}],
                "sessionPersistence": {"sessionName": "of-service", "type": "Cookie"}}});
        let plain = json!([{"matches": [{"path": {"type": "PathPrefix", "value": "/plain"}}],
            "backendRefs": [{"name": "web", "port": 80}]}]);
        lab.apply(&[policy, http_route("demo", "s-plain", "sticky", &plain)])
            .expect_ok();
        let cookie = wait_until("a session of the Service", Duration::from_secs(10), || {
            let answer = curl(&lab, CLIENT, &["http://sticky/plain"]);
            let given = answer.field("set-cookie");
            given.ok_or_else(|| format!("{answer:?}"))
        });
        assert!(cookie.starts_with("of-service="), "GEP-1619: {cookie}");
        assert!(!cookie.contains("Path"), "GEP-1619, Path: {cookie}");
        let own = curl(&lab, CLIENT, &["http://sticky/mine"]);
        let given = own.field("set-cookie").unwrap_or_default();
        assert!(given.starts_with("mine="), "the rule's wins: {given}");
        assert!(given.contains("; Path=/mine;"), "GEP-1619, Path: {given}");

        // They go before weights: a session stays with one of two Services that keep sessions.
        let mut manifests = Vec::new();
        for name in ["left", "right"] {
            manifests.push(front("demo", name, "web"));
            manifests.push(json!({
                "apiVersion": "gateway.networking.x-k8s.io/v1alpha1", "kind": "XBackendTrafficPolicy",
                "metadata": {"name": name, "namespace": "demo"},
                "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": name}],
                    "sessionPersistence": {"sessionName": name, "type": "Cookie"}}}));
        }
        let split = json!([{"matches": [{"path": {"type": "PathPrefix", "value": "/split"}}],
            "backendRefs": [{"name": "left", "port": 80, "weight": 50}, {"name": "right", "port": 80, "weight": 50}]}]);
        manifests.push(http_route("demo", "s-split", "sticky", &split));
        lab.apply(&manifests).expect_ok();
        for name in ["left", "right"] {
            let (given, first) = wait_until(
                &format!("a session of {name}"),
                Duration::from_secs(10),
                || {
                    let answer = curl(&lab, CLIENT, &["http://sticky/split"]);
                    let given = answer.field("set-cookie").unwrap_or_default();
                    match given.starts_with(&format!("{name}=")) {
                        true => Ok((given, answer)),
                        false => Err(format!("{answer:?}")),
                    }
                },
            );
            let again = format!("cookie: {}", given.split(';').next().unwrap_or_default());
            for _ in 0..12 {
                let answer = curl(&lab, CLIENT, &["http://sticky/split", "-H", &again]);
                assert_eq!(answer.server(), first.server(), "GEP-1619: {again}");
                let given = answer.field("set-cookie");
                assert_eq!(given, None, "no other session begins: {again}");
            }
        }
    });
}

#[test]
fn limits_and_rates() {
    scenario(Duration::from_secs(120), |s| {
        let lab = lab_with(
            s,
            &[
                (
                    "flight",
                    json!({"limits": {"maxInFlight": 6, "maxPending": 2, "pendingTimeout": "50ms"}}),
                ),
                (
                    "rate",
                    json!({"rateLimit": {"perCaller": {"requests": 20, "burst": 5},
                    "overrides": [{"serviceAccount": {"name": "other"}, "rate": {"requests": 1000}}]}}),
                ),
                ("none", json!({"timeouts": {"connect": "5s"}})),
            ],
        );
        // In flight: what is over it waits briefly, then fails at once; the servers never see it.
        let args = [
            "http://flight/",
            "--connections",
            "40",
            "--seconds",
            "3",
            "--header",
            "x-control: delay=200",
        ];
        let report = requests(&lab, CLIENT, &args);
        // Six of 200 ms each in 3 s, and those that were in flight at the end.
        assert!(
            (45..=96).contains(&report.ok),
            "what the limit allows is served, and no more: {report:#?}"
        );
        let refused = report
            .statuses
            .get(&429)
            .or(report.statuses.get(&503))
            .copied();
        assert!(
            refused > Some(100) && report.failed.is_empty(),
            "the others fail fast: {report:#?}"
        );

        // Rates are judged for each pod and caller: three pods of 20 a second and a burst of 5.
        let args = ["http://rate/", "--rate", "200", "--seconds", "5"];
        let report = requests(&lab, CLIENT, &args);
        println!("rate: {:?}", report.statuses);
        assert_eq!(
            report.statuses.keys().copied().collect::<Vec<_>>(),
            [200, 429],
            "{report:#?}"
        );
        let allowed = 3. * (20. * 5. + 5.);
        assert!(
            (report.ok as f64) < allowed * 1.15,
            "{} of at most {allowed}",
            report.ok
        );
        assert!(
            report.ok as f64 > allowed * 0.5,
            "{} of {allowed}",
            report.ok
        );
        let limited = (0..200)
            .map(|_| curl(&lab, CLIENT, &["http://rate/"]))
            .find(|answer| answer.status() == 429);
        if let Some(answer) = limited {
            let after = answer
                .field("retry-after")
                .and_then(|v| v.parse::<u64>().ok());
            assert!(after.is_some_and(|s| (1..=5).contains(&s)), "{answer:#?}");
        }
        let report = requests(
            &lab,
            OTHER,
            &["http://rate/", "--rate", "200", "--seconds", "3"],
        );
        report.expect_no_failure("the override of another caller");
        let report = requests(
            &lab,
            CLIENT,
            &["http://none/", "--rate", "200", "--seconds", "2"],
        );
        report.expect_no_failure("the rate is the policy's Service's alone");
    });
}

#[test]
fn rates_bind_every_caller() {
    scenario(Duration::from_secs(120), |s| {
        let rate = json!({"rateLimit": {"perCaller": {"requests": 20, "burst": 5}}});
        let lab = lab_with(s, &[("rate", rate)]);
        let outside = ("plain", "outside");
        lab.apply(&[
            namespace("plain", &[]),
            account("plain", "outside"),
            Pod::idle("plain", "outside", "node-1"),
        ])
        .expect_ok();
        wait_until("the pod outside the mesh", Duration::from_secs(20), || {
            let pods = lab.pods();
            let there = pods
                .iter()
                .any(|pod| pod.name == "outside" && pod.pid.is_some());
            if there { Ok(()) } else { Err("not there yet") }
        });
        let limited = |from: PodRef<'_>, to: &str, pods: f64| {
            let args = [to, "--rate", "200", "--seconds", "3"];
            let report = requests(&lab, from, &args);
            let what = format!("{from:?} to {to}: {:?}", report.statuses);
            println!("{what}");
            assert!(report.failed.is_empty(), "{what}: {report:#?}");
            let (allowed, ok) = (20. * 3. + 5., report.ok as f64);
            assert!(ok < pods * allowed * 1.15, "{pods} of {allowed}: {what}");
            assert!(ok > allowed * 0.5, "at least one of {allowed}: {what}");
            assert_eq!(report.ok + report.causes["rate_limited"], report.started);
        };
        // Around the Service: by the pods' own addresses, on either node.
        for server in &SERVERS[..2] {
            let url = format!("http://{}:{HTTP}/", lab.pod(*server).v4());
            limited(CLIENT, &url, 1.);
            limited(outside, &url, 1.);
        }
        // Its endpoint is chosen for each connection, of which there may be several.
        let service = lab.service_ips(("demo", "rate"));
        let v4 = service.iter().find(|ip| ip.is_ipv4());
        let url = format!("http://{}/", v4.expect("the Service has an IPv4 address"));
        limited(outside, &url, 3.);
        // Another Service of the same pods may be called as before.
        let report = requests(
            &lab,
            CLIENT,
            &["http://web/", "--rate", "200", "--seconds", "2"],
        );
        report.expect_no_failure("a Service without a policy");
    });
}

#[test]
fn timeouts_retries_and_faults() {
    scenario(Duration::from_secs(120), |s| {
        let fault = |more: Value| json!({"faultInjection": more});
        let lab = lab_with(
            s,
            &[
                ("request", json!({"timeouts": {"request": "300ms"}})),
                ("heads", json!({"timeouts": {"responseHeaders": "300ms"}})),
                (
                    "again",
                    json!({"retry": {"attempts": 3, "statusCodes": [500], "backoff": {"base": "5ms", "max": "10ms"}}}),
                ),
                (
                    "abort",
                    fault(json!({"abort": {"httpStatus": 418, "percent": 20}})),
                ),
                (
                    "delay",
                    fault(json!({"delay": {"duration": "400ms", "percent": 100}})),
                ),
            ],
        );
        for (front, cause) in [
            ("request", "request_timeout"),
            ("heads", "response_headers_timeout"),
        ] {
            let url = format!("http://{front}/");
            let slow = curl(&lab, CLIENT, &[&url, "-H", "x-control: delay=5000"]);
            assert_eq!(slow.status(), 504, "{front}: {slow:#?}");
            assert_eq!(
                slow.field("warren-proxy-error").as_deref(),
                Some(cause),
                "{slow:#?}"
            );
            assert_eq!(curl(&lab, CLIENT, &[&url]).status(), 200, "{front}");
        }
        // Each server fails its first request; there are three, and as many retries.
        for pod in SERVERS {
            admin(&lab, pod, "/reset", Some(""));
        }
        let answer = curl(
            &lab,
            CLIENT,
            &["http://again/once", "-H", "x-control: first=1&status=500"],
        );
        assert_eq!(
            answer.status(),
            200,
            "retry.statusCodes without a route: {answer:#?}"
        );
        let posted = [
            "http://again/post",
            "-d",
            "a body to send again",
            "-H",
            "x-control: first=1&status=500",
        ];
        let answer = curl(&lab, CLIENT, &posted);
        assert_eq!(
            (answer.status(), &answer.seen()["body"]),
            (200, &json!(20)),
            "the body is sent again: {answer:#?}"
        );

        let report = requests(
            &lab,
            CLIENT,
            &["http://abort/", "--total", "10000", "--connections", "8"],
        );
        let share = report.status_share(418);
        assert!(
            (share - 0.2).abs() <= 0.02,
            "faultInjection.abort: {share}: {report:#?}"
        );
        let started = Instant::now();
        assert_eq!(curl(&lab, CLIENT, &["http://delay/"]).status(), 200);
        let took = started.elapsed();
        assert!(
            took >= Duration::from_millis(400) && took < Duration::from_secs(3),
            "faultInjection.delay: {took:?}"
        );
    });
}
