//! Line 3, where requests go: weights and the shares of backends that cannot be used, mirrors, timeouts and
//! retries. Each row names its GEP or field.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use warren_tests::http::{RequestReport, admin, count, curl, requests, try_curl};
use warren_tests::lab::PodRef;
use warren_tests::routes::{CLIENT, http_route, path, routed, routed_lab, wait_for_route};
use warren_tests::scenario::scenario;
use warren_tests::wait::wait_until;

const V1: PodRef<'_> = ("demo", "v1");
const V2: PodRef<'_> = ("demo", "v2");

#[test]
fn weights_and_shares() {
    scenario(Duration::from_secs(240), |s| {
        // Front, backends (name, weight), share of v1, v2, 500 and 503.
        let rows: &[(&str, &str, Value, [f64; 4])] = &[
            (
                "seventy",
                "HTTPBackendRef.weight",
                json!([{"name": "v1", "port": 80, "weight": 70}, {"name": "v2", "port": 80, "weight": 30}]),
                [0.7, 0.3, 0., 0.],
            ),
            (
                "even",
                "HTTPBackendRef.weight is 1 unless set",
                json!([{"name": "v1", "port": 80}, {"name": "v2", "port": 80}]),
                [0.5, 0.5, 0., 0.],
            ),
            (
                "zero",
                "HTTPBackendRef.weight 0",
                json!([{"name": "v1", "port": 80, "weight": 0}, {"name": "v2", "port": 80, "weight": 1}]),
                [0., 1., 0., 0.],
            ),
            (
                "zero-missing",
                "weight 0 of a missing backend",
                json!([{"name": "v1", "port": 80, "weight": 1}, {"name": "missing", "port": 80, "weight": 0}]),
                [1., 0., 0., 0.],
            ),
            (
                "share-500",
                "500 for the share of a missing backend, not renormalised",
                json!([{"name": "v1", "port": 80, "weight": 3}, {"name": "missing", "port": 80, "weight": 1}]),
                [0.75, 0., 0.25, 0.],
            ),
            (
                "kind-500",
                "500 for the share of an unknown kind",
                json!([{"name": "v1", "port": 80}, {"name": "x", "group": "example.org", "kind": "Bucket"}]),
                [0.5, 0., 0.5, 0.],
            ),
            (
                "protocol-500",
                "500 for a backend whose appProtocol is not HTTP",
                json!([{"name": "v1", "port": 80}, {"name": "postgres", "port": 80}]),
                [0.5, 0., 0.5, 0.],
            ),
            (
                "port-500",
                "500 for a port that the backend has not",
                json!([{"name": "v1", "port": 81}]),
                [0., 0., 1., 0.],
            ),
            (
                "all-500",
                "500 for all if no backend can be used",
                json!([{"name": "missing", "port": 80}, {"name": "gone", "port": 80}]),
                [0., 0., 1., 0.],
            ),
            (
                "share-503",
                "503 for the share of a Service without endpoints",
                json!([{"name": "v1", "port": 80, "weight": 1}, {"name": "hollow", "port": 80, "weight": 1}]),
                [0.5, 0., 0., 0.5],
            ),
            (
                "all-503",
                "503 if the only backend has no endpoints",
                json!([{"name": "hollow", "port": 80}]),
                [0., 0., 0., 1.],
            ),
            (
                "none-500",
                "500 for a rule without backends and filters",
                json!([]),
                [0., 0., 1., 0.],
            ),
        ];
        let names: Vec<&str> = rows.iter().map(|r| r.0).collect();
        let lab = routed_lab(s, &names);
        let routes: Vec<Value> = rows
            .iter()
            .map(|(name, _, backends, _)| {
                http_route("demo", name, name, &json!([{"backendRefs": backends}]))
            })
            .collect();
        lab.apply(&routes).expect_ok();
        for (name, shows, _, shares) in rows {
            wait_for_route(&lab, CLIENT, name, name);
            // What is all or nothing needs fewer.
            let total = if shares.contains(&1.) { "500" } else { "10000" };
            let url = format!("http://{name}/");
            for version in [&["--connections", "8"][..], &["--connections", "4", "--h2"]] {
                let report = requests(&lab, CLIENT, &[&[&url, "--total", total], version].concat());
                assert!(report.failed.is_empty(), "{name}: {report:#?}");
                for (what, share, wanted) in [
                    ("v1", report.server_share("v1"), shares[0]),
                    ("v2", report.server_share("v2"), shares[1]),
                    ("500", report.status_share(500), shares[2]),
                    ("503", report.status_share(503), shares[3]),
                ] {
                    close_to(
                        &format!("{name} ({shows}) {version:?}: {what}"),
                        share,
                        wanted,
                        &report,
                    );
                    if wanted == 0. {
                        assert_eq!(share, 0., "{name} ({shows}): {what}: {report:#?}");
                    }
                }
            }
        }
        let cause = |name: &str| {
            curl(&lab, CLIENT, &[&format!("http://{name}/")]).field("warren-proxy-error")
        };
        assert_eq!(cause("all-500").as_deref(), Some("invalid_backend"));
        assert_eq!(cause("all-503").as_deref(), Some("no_endpoint"));
    });
}

#[test]
fn mirrors() {
    const REQUESTS: u64 = 10_000;
    // 2 %, more than four standard deviations.
    const ROUGHLY: f64 = 200.;
    scenario(Duration::from_secs(120), |s| {
        let lab = routed_lab(s, &["mirror"]);
        let mirror = |prefix: &str, more: Value| {
            let mut mirror = json!({"backendRef": {"name": "v2", "port": 80}});
            for (key, value) in more.as_object().into_iter().flatten() {
                mirror[key] = value.clone();
            }
            json!({"matches": [path("PathPrefix", prefix)], "backendRefs": [{"name": "v1", "port": 80}],
                "filters": [{"type": "RequestMirror", "requestMirror": mirror}]})
        };
        routed(
            &lab,
            "mirror",
            json!([
                mirror("/all", json!({})),
                mirror("/percent", json!({"percent": 20})),
                mirror(
                    "/fraction",
                    json!({"fraction": {"numerator": 1, "denominator": 4}})
                ),
                mirror("/none", json!({"percent": 0})),
                mirror(
                    "/missing",
                    json!({"backendRef": {"name": "missing", "port": 80}})
                ),
            ]),
        );
        for (prefix, shows, share) in [
            ("/all", "HTTPRequestMirrorFilter", 1.0),
            (
                "/percent",
                "HTTPRequestMirrorFilter.percent (GEP-3171)",
                0.2,
            ),
            (
                "/fraction",
                "HTTPRequestMirrorFilter.fraction (GEP-3171)",
                0.25,
            ),
            ("/none", "HTTPRequestMirrorFilter.percent 0", 0.0),
            ("/missing", "a mirror that is not there is left out", 0.0),
        ] {
            for pod in [V1, V2] {
                admin(&lab, pod, "/reset", Some(""));
            }
            let url = format!("http://mirror{prefix}");
            let report = requests(
                &lab,
                CLIENT,
                &[
                    &url,
                    "--total",
                    &REQUESTS.to_string(),
                    "--connections",
                    "4",
                    "--method",
                    "POST",
                    "--body",
                    "100",
                ],
            );
            report.expect_no_failure(shows);
            assert_eq!(
                report.server_share("v1"),
                1.0,
                "answers come from the backend alone: {report:#?}"
            );
            assert_eq!(count(&lab, V1), REQUESTS, "{shows}");
            let wanted = REQUESTS as f64 * share;
            // Until no more come: a late one would be counted as the next row's.
            let mut last = f64::NAN;
            wait_until(
                &format!("{wanted} mirrored requests ({shows})"),
                Duration::from_secs(10),
                || {
                    let got = count(&lab, V2) as f64;
                    let settled = std::mem::replace(&mut last, got) == got;
                    let bound = if share > 0. { ROUGHLY } else { 0. };
                    let close = settled && (got - wanted).abs() <= bound;
                    if close { Ok(()) } else { Err(format!("{got}")) }
                },
            );
        }
    });
}

#[test]
fn timeouts_and_retries() {
    scenario(Duration::from_secs(150), |s| {
        let lab = routed_lab(s, &["times", "again"]);
        let rule = |prefix: &str, more: Value| {
            let mut rule = json!({"matches": [path("PathPrefix", prefix)], "backendRefs": [{"name": "v1", "port": 80}, {"name": "v2", "port": 80}]});
            for (key, value) in more.as_object().into_iter().flatten() {
                rule[key] = value.clone();
            }
            rule
        };
        routed(
            &lab,
            "times",
            json!([
                rule("/request", json!({"timeouts": {"request": "300ms"}})),
                rule("/try", json!({"timeouts": {"backendRequest": "300ms"}})),
                rule("/off", json!({"timeouts": {"request": "0s"}})),
            ]),
        );
        routed(
            &lab,
            "again",
            json!([
                rule(
                    "/one",
                    json!({"retry": {"codes": [500, 503], "attempts": 1}})
                ),
                rule(
                    "/two",
                    json!({"retry": {"codes": [500, 503], "attempts": 2, "backoff": "200ms"}})
                ),
                rule(
                    "/bounded",
                    json!({"retry": {"codes": [503], "attempts": 5, "backoff": "400ms"}, "timeouts": {"request": "1s"}})
                ),
                rule("/never", json!({})),
            ]),
        );
        // Front and path, control, status, least and most time in ms, what it shows.
        let rows: &[(&str, &str, u16, u64, u64, &str)] = &[
            (
                "times/request",
                "delay=3000",
                504,
                300,
                1500,
                "HTTPRouteTimeouts.request (GEP-1742)",
            ),
            (
                "times/request",
                "delay=20",
                200,
                20,
                300,
                "within the timeout",
            ),
            (
                "times/request",
                "slow=60&size=160000",
                200,
                0,
                3000,
                "a body may end after its answer began, or be cut",
            ),
            (
                "times/try",
                "delay=3000",
                504,
                300,
                1500,
                "HTTPRouteTimeouts.backendRequest (GEP-1742)",
            ),
            (
                "times/off",
                "delay=900",
                200,
                900,
                3000,
                "0s is no timeout (GEP-2257)",
            ),
            (
                "again/one",
                "first=1&status=503",
                200,
                0,
                1500,
                "HTTPRouteRetry.codes (GEP-1731)",
            ),
            (
                "again/one",
                "first=1&status=500",
                200,
                0,
                1500,
                "HTTPRouteRetry.codes, another one",
            ),
            (
                "again/one",
                "first=9&status=503",
                503,
                0,
                1500,
                "HTTPRouteRetry.attempts: the last answer is given back",
            ),
            (
                "again/one",
                "first=1&status=502",
                502,
                0,
                1500,
                "a code that is not listed",
            ),
            (
                "again/two",
                "first=2&status=503",
                200,
                400,
                3000,
                "HTTPRouteRetry.backoff: never earlier",
            ),
            (
                "again/bounded",
                "first=9&status=503",
                0,
                0,
                1900,
                "timeouts.request bounds the retries, too",
            ),
            (
                "again/never",
                "first=1&status=503",
                503,
                0,
                500,
                "no retry of an answer without a policy",
            ),
        ];
        for (at, (target, control, status, least, most, shows)) in rows.iter().enumerate() {
            // Both servers count by path and query: each row has its own, and starts at both.
            let url = format!(
                "http://{}/{}?row={at}",
                target.split('/').next().unwrap_or_default(),
                target.split('/').nth(1).unwrap_or_default()
            );
            for pod in [V1, V2] {
                admin(&lab, pod, "/reset", Some(""));
            }
            let started = Instant::now();
            let cut_is_right = control.contains("slow");
            let answer = try_curl(
                &lab,
                CLIENT,
                &[&url, "-H", &format!("x-control: {control}")],
            );
            let took = started.elapsed().as_millis() as u64;
            match answer {
                Ok(answer) => {
                    let right = match status {
                        0 => [503, 504].contains(&answer.status()),
                        status => answer.status() == *status,
                    };
                    assert!(right, "{shows}: {url} {control}: {answer:#?}");
                }
                Err(_) if cut_is_right => {}
                Err(e) => panic!("{shows}: {url} {control}: {e}"),
            }
            // Starting the client takes a while, too.
            assert!(
                took >= *least && took <= most + 700,
                "{shows}: {url} {control}: {took} ms"
            );
        }
    });
}

#[track_caller]
fn close_to(what: &str, share: f64, wanted: f64, report: &RequestReport) {
    assert!(
        (share - wanted).abs() <= 0.02,
        "{what}: {share:.4}, not {wanted:.4}: {report:#?}"
    );
}
