//! Which TrafficPolicy counts: several for one target, a route's beside its Service's, and what is always that of the
//! Service a request goes to (`docs/reference/traffic-policy.md`). And what the limits of time bound.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use warren_tests::http::{Answer, HTTP, RAW, count, curl, requests, try_curl};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, service, service_of};
use warren_tests::routes::{CLIENT, front, http_route, wait_for_route};
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::wait::wait_until;

const SERVERS: [PodRef<'_>; 3] = [("demo", "a"), ("demo", "b"), ("demo", "c")];

fn lab(s: &Scenario, fronts: &[&str]) -> Lab {
    let mut manifests = vec![meshed_namespace("demo"), account("demo", "web")];
    manifests.extend([
        account("demo", "client"),
        Pod::idle("demo", "client", "node-1"),
    ]);
    for ((_, name), node) in SERVERS.iter().zip(["node-1", "node-2", "node-2"]) {
        let pod = Pod::http("demo", name, node).account("web");
        manifests.push(pod.label("app", "web").label("only", name).build());
    }
    manifests.push(service("demo", "web", &[(80, HTTP)]));
    manifests.extend(fronts.iter().map(|name| front("demo", name, "web")));
    s.lab(2, &manifests)
}

fn policy(name: &str, target: Value, mut spec: Value) -> Value {
    spec["targetRefs"] = json!([target]);
    json!({"apiVersion": "warren-mesh.io/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {"name": name, "namespace": "demo"}, "spec": spec})
}

fn of_service(name: &str) -> Value {
    json!({"kind": "Service", "name": name})
}

fn by_user() -> Value {
    json!({"loadBalancing": {"type": "RingHash", "hashKey": {"type": "Header", "name": "x-user"}}})
}

/// Whether each of some users is always served by the same server, and not all by one.
fn kept_apart(lab: &Lab, url: &str) -> bool {
    let mut all = BTreeSet::new();
    for user in 0..12 {
        let header = format!("x-user: u{user}");
        let args = [
            url,
            "--total",
            "30",
            "--connections",
            "3",
            "--header",
            &header,
        ];
        let report = requests(lab, CLIENT, &args);
        report.expect_no_failure(url);
        if report.servers.len() != 1 {
            return false;
        }
        all.extend(report.servers.into_keys());
    }
    all.len() == 3
}

#[test]
fn several_policies_for_one_target_count_field_by_field() {
    scenario(Duration::from_secs(120), |s| {
        let lab = lab(s, &["both", "port"]);
        let port = json!({"kind": "Service", "name": "port", "sectionName": "p80"});
        lab.apply(&[
            policy(
                "a",
                of_service("both"),
                json!({"timeouts": {"request": "300ms"}}),
            ),
            policy("b", of_service("both"), by_user()),
            policy("c", of_service("port"), by_user()),
            policy("d", port, json!({"timeouts": {"request": "300ms"}})),
        ])
        .expect_ok();
        for front in ["both", "port"] {
            let url = format!("http://{front}/");
            wait_until(
                "the time limit of one policy",
                Duration::from_secs(10),
                || {
                    let slow = curl(&lab, CLIENT, &[&url, "-H", "x-control: delay=3000"]);
                    match slow.field("warren-proxy-error").as_deref() {
                        Some("request_timeout") => Ok(()),
                        _ => Err(format!("{slow:?}")),
                    }
                },
            );
            assert!(
                kept_apart(&lab, &url),
                "{front}: the balancing of the other"
            );
        }
    });
}

#[test]
fn a_rules_policy_and_that_of_the_service_behind() {
    scenario(Duration::from_secs(120), |s| {
        let lab = lab(s, &["front", "plain"]);
        let route = |name: &str, service: &str, rule: Value| {
            let mut rule = rule;
            rule["backendRefs"] = json!([{"name": "web", "port": 80}]);
            http_route("demo", name, service, &json!([rule]))
        };
        let of_route =
            json!({"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "ruled"});
        lab.apply(&[
            route("ruled", "front", json!({})),
            policy("ruled", of_route, by_user()),
            route("again", "plain", json!({"retry": {"attempts": 3, "codes": [503]}})),
            json!({"apiVersion": "gateway.networking.x-k8s.io/v1alpha1", "kind": "XBackendTrafficPolicy",
                "metadata": {"name": "web", "namespace": "demo"},
                "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}],
                    "retryConstraint": {"budget": {"percent": 0, "interval": "10s"},
                        "minRetryRate": {"count": 1, "interval": "1h"}}}}),
        ])
        .expect_ok();
        wait_for_route(&lab, CLIENT, "front", "ruled");
        wait_for_route(&lab, CLIENT, "plain", "again");
        wait_until(
            "balancing by the rule's policy",
            Duration::from_secs(10),
            || match kept_apart(&lab, "http://front/") {
                true => Ok(()),
                false => Err("not yet"),
            },
        );
        // One retry in an hour, and then no answer of the app's (GEP-3388), whichever Service was called.
        let cause = |_: usize| {
            let answer = curl(
                &lab,
                CLIENT,
                &["http://plain/", "-H", "x-control: fail=100"],
            );
            assert_eq!(answer.status(), 503, "{answer:#?}");
            answer.field("warren-proxy-error")
        };
        let causes: Vec<_> = (0..5).map(cause).collect();
        let over = causes
            .iter()
            .filter(|c| c.as_deref() == Some("retry_budget"));
        assert!(
            over.count() >= 4,
            "retryConstraint of the backend: {causes:?}"
        );
    });
}

#[test]
fn what_limits_of_time_bound() {
    scenario(Duration::from_secs(120), |s| {
        let lab = lab(s, &["still", "try", "heads"]);
        let retried = json!({"timeouts": {"responseHeaders": "400ms"}});
        lab.apply(&[
            policy(
                "still",
                of_service("still"),
                json!({"timeouts": {"idle": "400ms"}}),
            ),
            policy(
                "try",
                of_service("try"),
                json!({"timeouts": {"perTry": "400ms"}}),
            ),
            policy("heads", of_service("heads"), retried),
        ])
        .expect_ok();
        let slow = ["-H", "x-control: delay=5000"];
        for (front, cause) in [
            ("still", "idle_timeout"),
            ("try", "try_timeout"),
            ("heads", "response_headers_timeout"),
        ] {
            let url = format!("http://{front}/");
            wait_until(cause, Duration::from_secs(10), || {
                let answer = curl(&lab, CLIENT, &[&[url.as_str()], &slow[..]].concat());
                match (answer.status(), answer.field("warren-proxy-error")) {
                    (504, Some(named)) if named == cause => Ok(()),
                    _ => Err(format!("{answer:?}")),
                }
            });
        }
        // A try ends with its answer, the head alone does not end it.
        let args = ["http://try/", "-H", "x-control: size=160000&slow=100"];
        let started = Instant::now();
        let cut = try_curl(&lab, CLIENT, &args).unwrap_err();
        assert!(started.elapsed() < Duration::from_millis(1400), "{cut}");
        // A request that is sent slowly moves, and the head is due from its end on.
        for front in ["still", "heads"] {
            let script = format!(
                "(for i in 1 2 3 4 5 6 7 8; do echo part; sleep 0.2; done) | curl -q -sS -i --max-time 20 -T - http://{front}/"
            );
            let sent = lab.exec_within(CLIENT, &["sh", "-c", &script], Duration::from_secs(30));
            let answer = Answer::parse(&sent.stdout);
            assert_eq!(answer.status(), 200, "{front}: {sent}");
            assert_eq!(answer.seen()["body"], json!(40), "{front}: {answer:#?}");
        }
    });
}

#[test]
fn the_time_to_connect_to_an_app_is_bounded_on_either_node() {
    scenario(Duration::from_secs(120), |s| {
        let lab = lab(s, &[]);
        for (front, pod) in [("near", SERVERS[0]), ("far", SERVERS[1])] {
            let mut only = service_of("demo", front, &[(80, RAW, Some("http"))]);
            only["spec"]["selector"] = json!({"only": pod.1});
            let connect = json!({"timeouts": {"connect": "300ms"}});
            lab.apply(&[only, policy(front, of_service(front), connect)])
                .expect_ok();
            let silent = format!(
                "add table inet silent
                 add chain inet silent input {{ type filter hook input priority 0; }}
                 add rule inet silent input tcp dport {RAW} drop"
            );
            lab.exec(pod, &["nft", &silent]).expect_ok();
            let url = format!("http://{front}/");
            // Three tries of 10 s unless it is bounded.
            wait_until("the time to connect", Duration::from_secs(30), || {
                let answer = try_curl(&lab, CLIENT, &[&url, "--max-time", "4"])?;
                match (answer.status(), answer.field("warren-proxy-error")) {
                    (504, Some(cause)) if cause == "connect_timeout" => Ok(()),
                    _ => Err(format!("{answer:?}")),
                }
            });
            lab.exec(pod, &["nft", "delete table inet silent"])
                .expect_ok();
            assert_eq!(curl(&lab, CLIENT, &[&url]).status(), 200, "{front}");
        }
    });
}

#[test]
fn a_kept_connection_that_closes_is_no_reason_to_leave_an_endpoint() {
    scenario(Duration::from_secs(120), |s| {
        let lab = lab(s, &["kept"]);
        lab.apply(&[policy("kept", of_service("kept"), by_user())])
            .expect_ok();
        let url = "http://kept/";
        // One after the other, so that no server is left more than one connection.
        let served_by = |user: u32| {
            let header = format!("x-user: u{user}");
            curl(&lab, CLIENT, &[url, "-H", &header]).server()
        };
        wait_until("balancing by user", Duration::from_secs(20), || {
            let served = [(); 3].map(|()| (0..12).map(served_by).collect::<Vec<_>>());
            match served.windows(2).all(|pass| pass[0] == pass[1]) {
                true => Ok(()),
                false => Err(format!("{served:?}")),
            }
        });
        let counts = || SERVERS.map(|server| count(&lab, server));
        let mut seen = BTreeSet::new();
        for user in 0..12 {
            let header = format!("x-user: u{user}");
            let args = [url, "-H", &header];
            for more in [&[][..], &["-X", "PUT", "-d", "content"]] {
                let served = curl(&lab, CLIENT, &args);
                assert_eq!(served.status(), 200, "{served:#?}");
                let before = counts();
                // The app closes the connection that the request before has left, and the fresh one.
                let close = ["-H", "x-control: close=1"];
                let answer = curl(&lab, CLIENT, &[&args[..], more, &close].concat());
                let cause = answer.field("warren-proxy-error");
                let expected = (502, Some("upstream_reset"));
                assert_eq!((answer.status(), cause.as_deref()), expected);
                for ((was, is), (_, name)) in before.iter().zip(counts()).zip(SERVERS) {
                    let twice = if name == served.server() { 2 } else { 0 };
                    assert_eq!(is - was, twice, "{name}, {more:?} of {header}");
                }
                seen.insert(served.server());
            }
        }
        assert_eq!(seen.len(), 3, "near and far: {seen:?}");
    });
}
