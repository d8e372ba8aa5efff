//! Spans of both nodes reach a collector over OTLP and belong to the caller's trace.

use std::time::Duration;

use warren_tests::http::{HTTP, curl};
use warren_tests::lab::Options;
use warren_tests::manifest::{Pod, account, meshed_namespace, namespace, service};
use warren_tests::python::{interpreter, peer};
use warren_tests::scenario::scenario;
use warren_tests::wait::wait_until;

const CLIENT: (&str, &str) = ("demo", "client");
const COLLECTOR: u16 = 4317;
/// A cluster IP that the lab gives nobody by itself.
const ADDRESS: &str = "10.96.200.1";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[test]
fn spans_of_both_nodes_join_the_callers_trace() {
    scenario(Duration::from_secs(120), |s| {
        let collector = [
            interpreter().display().to_string(),
            peer("otlp_collector.py").display().to_string(),
        ];
        let collector: Vec<&str> = collector.iter().map(String::as_str).collect();
        let mut front = service("tools", "collector", &[(COLLECTOR, COLLECTOR)]);
        front["spec"]["clusterIP"] = ADDRESS.into();
        front["spec"]["ipFamilyPolicy"] = "SingleStack".into();
        let manifests = [
            meshed_namespace("demo"),
            namespace("tools", &[]),
            account("demo", "client"),
            account("demo", "web"),
            account("tools", "collector"),
            Pod::new("tools", "collector", "node-1")
                .command(&collector)
                .ready_tcp(COLLECTOR)
                .build(),
            front,
            Pod::idle("demo", "client", "node-1"),
            Pod::http("demo", "web", "node-2").build(),
            service("demo", "web", &[(80, HTTP)]),
        ];
        let tracing = format!("tracing:\n  endpoint: http://{ADDRESS}:{COLLECTOR}\n");
        let overlay = format!("proxy={}", s.file("proxy.yaml", &tracing).display());
        let options = Options {
            ca: None,
            args: vec!["--config".into(), overlay],
        };
        let lab = s.lab_with(2, &manifests, &options);
        let sampled = format!("traceparent: 00-{TRACE}-00f067aa0ba902b7-01");
        let answer = curl(&lab, CLIENT, &["http://web/", "-H", &sampled]);
        assert_eq!(answer.status(), 200);
        let unsampled = "traceparent: 00-11111111111111111111111111111111-00f067aa0ba902b7-00";
        curl(&lab, CLIENT, &["http://web/", "-H", unsampled]);

        let spans = wait_until("a span of each node", Duration::from_secs(30), || {
            let log = lab.logs(&["-n", "tools", "collector"]);
            let spans: Vec<Vec<String>> = log
                .lines()
                .filter(|line| line.contains("span "))
                .map(|line| {
                    line.split_whitespace()
                        .skip_while(|w| *w != "span")
                        .map(str::to_owned)
                        .collect()
                })
                .collect();
            match spans.len() {
                2.. => Ok(spans),
                _ => Err(log),
            }
        });
        let of = |kind: &str| {
            let mut found = spans.iter().filter(|span| span[4] == kind);
            let span = found
                .next()
                .unwrap_or_else(|| panic!("no kind {kind}: {spans:?}"));
            assert!(found.next().is_none(), "one each: {spans:?}");
            assert_eq!(span[1], TRACE, "{spans:?}");
            span
        };
        // SPAN_KIND_CLIENT and SPAN_KIND_SERVER of opentelemetry-proto.
        let (caller, callee) = (of("3"), of("2"));
        assert_eq!(
            caller[3], "00f067aa0ba902b7",
            "the caller's own span: {spans:?}"
        );
        assert_eq!(callee[3], caller[2], "child of the other node's: {spans:?}");
        assert_eq!((caller[5].as_str(), callee[5].as_str()), ("client", "web"));
    });
}
