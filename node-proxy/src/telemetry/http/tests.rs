use std::sync::Arc;

use super::*;
use crate::telemetry::Telemetry;
use crate::telemetry::trace::Tracer;

fn party(name: &str) -> Party {
    let identity = Identity::new("cluster.local", "demo", name).unwrap();
    Party::meshed(&name.into(), &identity)
}

fn labels(source: &str) -> RequestLabels {
    RequestLabels {
        reporter: Reporter::Source,
        source: party(source),
        destination: party("web"),
        service: Some("web.demo".into()),
        route: Some("demo/web".into()),
        backend: Some("web-v2.demo:80".into()),
        protocol: Protocol::Http1,
        security: Security::MutualTls,
    }
}

fn telemetry(series: usize, histograms: usize) -> Arc<Telemetry> {
    let bounds = Bounds {
        series,
        histograms,
        expiry: Duration::from_secs(900),
    };
    Telemetry::with(bounds, Tracer::off())
}

fn status(status: u16) -> Outcome {
    Outcome {
        status,
        ..Outcome::default()
    }
}

fn lines<'a>(text: &'a str, family: &str) -> Vec<&'a str> {
    let of = |line: &&str| line.starts_with(&format!("{family}{{"));
    text.lines().filter(of).collect()
}

const PARTIES: &str = r#"reporter="source",source_workload="client",source_namespace="demo",source_principal="spiffe://cluster.local/ns/demo/sa/client",destination_workload="web",destination_namespace="demo",destination_principal="spiffe://cluster.local/ns/demo/sa/web",destination_service="web.demo",route="demo/web",backend="web-v2.demo:80",protocol="http1",security="mutual_tls""#;
const FEWER: &str = r#"reporter="source",source_workload="client",source_namespace="demo",destination_workload="web",destination_namespace="demo",destination_service="web.demo",route="demo/web""#;

#[test]
fn a_request_is_counted_with_all_labels_and_measured_with_fewer() {
    let telemetry = telemetry(10, 10);
    let meter = telemetry.http.meter(&labels("client"));
    let mut request = meter.start(&http::Method::GET);
    let gauge = format!("warren_http_requests_in_flight{{{FEWER}}}");
    assert!(telemetry.encode().contains(&format!("{gauge} 1\n")));
    request.retried();
    request.retry_budget_exhausted();
    request.headers();
    request.finish(Outcome {
        status: 503,
        grpc_status: Some(14),
        error: Some(ProxyError::RetryBudget),
        request_bytes: 65,
        response_bytes: 0,
    });
    let text = telemetry.encode();
    let counted = format!(
        r#"warren_http_requests_total{{{PARTIES},method="GET",status="503",grpc_status="14",response_flags="retry_budget"}} 1"#
    );
    for line in [
        counted,
        format!("{gauge} 0"),
        format!("warren_http_retries_total{{{FEWER}}} 1"),
        format!("warren_http_retry_budget_exhausted_total{{{FEWER}}} 1"),
        format!("warren_http_request_duration_seconds_count{{{FEWER}}} 1"),
        format!("warren_http_response_duration_seconds_count{{{FEWER}}} 1"),
        format!("warren_http_request_bytes_sum{{{FEWER}}} 65.0"),
        format!(r#"warren_http_request_bytes_bucket{{le="64.0",{FEWER}}} 0"#),
        format!(r#"warren_http_request_bytes_bucket{{le="256.0",{FEWER}}} 1"#),
        format!(r#"warren_http_response_bytes_bucket{{le="0.0",{FEWER}}} 1"#),
        format!(r#"warren_http_request_duration_seconds_bucket{{le="+Inf",{FEWER}}} 1"#),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in {text}");
    }
    assert_eq!(
        lines(&text, "warren_http_request_duration_seconds_bucket").len(),
        17
    );
    assert_eq!(lines(&text, "warren_http_request_bytes_bucket").len(), 13);
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn labels_without_a_value_are_empty_or_unknown() {
    let telemetry = telemetry(10, 10);
    let labels = RequestLabels {
        reporter: Reporter::Destination,
        source: Party::unknown(),
        destination: Party::unknown(),
        service: None,
        route: None,
        backend: None,
        protocol: Protocol::Grpc,
        security: Security::Plaintext,
    };
    let purge = http::Method::from_bytes(b"PURGE").unwrap();
    telemetry
        .http
        .meter(&labels)
        .start(&purge)
        .finish(status(200));
    let text = telemetry.encode();
    assert_eq!(
        lines(&text, "warren_http_requests_total"),
        [
            r#"warren_http_requests_total{reporter="destination",source_workload="unknown",source_namespace="unknown",source_principal="unknown",destination_workload="unknown",destination_namespace="unknown",destination_principal="unknown",destination_service="unknown",route="",backend="",protocol="grpc",security="plaintext",method="other",status="200",grpc_status="",response_flags=""} 1"#
        ]
    );
    assert!(
        lines(&text, "warren_http_retries_total").is_empty(),
        "only callers retry"
    );
}

#[test]
fn a_request_that_is_dropped_is_counted_as_cancelled() {
    let telemetry = telemetry(10, 10);
    drop(
        telemetry
            .http
            .meter(&labels("client"))
            .start(&http::Method::POST),
    );
    let text = telemetry.encode();
    let line = r#"method="POST",status="0",grpc_status="",response_flags="cancelled"} 1"#;
    assert!(
        lines(&text, "warren_http_requests_total")[0].ends_with(line),
        "{text}"
    );
    assert!(lines(&text, "warren_http_requests_in_flight")[0].ends_with(" 0"));
}

#[test]
fn a_request_whose_labels_become_known_is_in_one_gauge() {
    let telemetry = telemetry(10, 10);
    let before = telemetry.http.meter(&labels("before"));
    let after = telemetry.http.meter(&labels("after"));
    let mut request = before.start_at(&http::Method::GET, Instant::now());
    request.move_to(&after);
    request.move_to(&after);
    let gauge = |workload: &str| {
        let text = telemetry.encode();
        let label = format!(r#"source_workload="{workload}""#);
        let lines = lines(&text, "warren_http_requests_in_flight");
        let line = lines.iter().find(|line| line.contains(&label)).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!((gauge("before"), gauge("after")), ("0".into(), "1".into()));
    request.finish(status(200));
    assert_eq!((gauge("before"), gauge("after")), ("0".into(), "0".into()));
    let text = telemetry.encode();
    let counted = lines(&text, "warren_http_requests_total");
    assert_eq!(counted.len(), 1);
    assert!(counted[0].contains(r#"source_workload="after""#));
}

#[test]
fn what_exceeds_the_limits_is_counted_as_other() {
    let telemetry = telemetry(3, 1);
    let first = telemetry.http.meter(&labels("a"));
    for code in [200, 201, 202, 203, 204] {
        first.start(&http::Method::GET).finish(status(code));
    }
    for source in ["b", "c", "d"] {
        let meter = telemetry.http.meter(&labels(source));
        meter.start(&http::Method::GET).finish(status(200));
    }
    let text = telemetry.encode();
    let counted = lines(&text, "warren_http_requests_total");
    assert_eq!(counted.len(), 4, "{counted:?}");
    let other = counted
        .iter()
        .find(|l| l.contains(r#"source_workload="other""#));
    let other = other.unwrap();
    assert!(other.starts_with(r#"warren_http_requests_total{reporter="source","#));
    assert!(other.ends_with(r#"response_flags="other"} 5"#), "{other}");
    // The same label names, whatever the values.
    let names = |line: &str| -> Vec<String> {
        let name = |part: &str| part.split('=').next().unwrap().to_owned();
        let inner = line.split(['{', '}']).nth(1).unwrap();
        inner.split("\",").map(name).collect()
    };
    assert!(counted.iter().all(|line| names(line) == names(other)));
    let durations = lines(&text, "warren_http_request_duration_seconds_count");
    assert_eq!(durations.len(), 2, "{durations:?}");
    assert!(
        durations
            .iter()
            .any(|l| l.contains(r#"route="other""#) && l.ends_with(" 3"))
    );
    assert_eq!(names(durations[0]), names(durations[1]));
}

#[test]
fn one_meter_cannot_use_up_all_series() {
    let telemetry = telemetry(1000, 10);
    let meter = telemetry.http.meter(&labels("client"));
    for code in 0..500 {
        meter.start(&http::Method::GET).finish(status(100 + code));
    }
    let text = telemetry.encode();
    let counted = lines(&text, "warren_http_requests_total");
    assert_eq!(counted.len(), MAX_OUTCOMES + 1);
    let total: u64 = counted
        .iter()
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert_eq!(total, 500);
}

fn key(status: u16) -> OutcomeKey {
    OutcomeKey {
        method: MethodClass::Get,
        status,
        grpc_status: None,
        error: None,
    }
}

#[test]
fn series_end_when_they_are_not_used() {
    let telemetry = telemetry(2, 2);
    let http = &telemetry.http;
    let at = |seconds| http.epoch + Duration::from_secs(seconds);
    let weak = {
        let meter = http.meter_at(&labels("client"), at(0));
        meter.count(key(200), at(0));
        meter.count(key(503), at(0));
        Arc::downgrade(&meter)
    };
    // Used through a cache, which asks the map for nothing.
    weak.upgrade().unwrap().count(key(200), at(600));
    http.sweep(at(910));
    let meter = weak.upgrade().expect("used 310 s ago");
    let left: Vec<_> = meter.outcomes.read().iter().map(|c| c.key).collect();
    assert_eq!(left, [key(200)], "an outcome ends by itself");
    assert_eq!(http.totals.all().len(), 1);
    http.sweep(at(5000));
    drop(meter);
    assert!(
        weak.upgrade().is_some(),
        "held by a request until a moment ago"
    );

    http.sweep(at(5899));
    assert!(weak.upgrade().is_some());
    http.sweep(at(5901));
    assert!(weak.upgrade().is_none());
    assert!(http.totals.all().is_empty());
    assert_eq!(http.budget.series.load(Ordering::Relaxed), 0);
    let meter = http.meter_at(&labels("another"), at(5902));
    meter.count(key(200), at(5902));
    meter.count(key(503), at(5902));
    assert_eq!(meter.outcomes.read().len(), 2, "there is room again");
}

#[test]
fn a_meter_that_makes_room_for_another_gives_its_series_back() {
    let telemetry = telemetry(1, 1);
    let http = &telemetry.http;
    let later = http.epoch + Duration::from_secs(1000);
    http.meter_at(&labels("a"), http.epoch)
        .count(key(200), http.epoch);
    let meter = http.meter_at(&labels("b"), later);
    meter.count(key(200), later);
    assert_eq!(meter.outcomes.read().len(), 1);
}

#[test]
fn a_cache_finds_meters_by_pointer_and_keeps_none() {
    let telemetry = telemetry(100, 100);
    let http = &telemetry.http;
    let mut cache = MeterCache::default();
    let labels_a = labels("a");
    let first = cache.get(http, &labels_a);
    assert!(Arc::ptr_eq(&first, &cache.get(http, &labels_a.clone())));
    assert_eq!(cache.entries.len(), 1);
    assert!(labels_a.is_same(&labels_a.clone()));
    assert!(!labels_a.is_same(&labels("a")), "other objects");
    assert!(
        Arc::ptr_eq(&first, &cache.get(http, &labels("a"))),
        "and equal"
    );

    let changes: [fn(&mut RequestLabels); 8] = [
        |l| l.reporter = Reporter::Destination,
        |l| l.source = party("x"),
        |l| l.destination = party("x"),
        |l| l.service = None,
        |l| l.route = Some("demo/x".into()),
        |l| l.backend = None,
        |l| l.protocol = Protocol::Grpc,
        |l| l.security = Security::Plaintext,
    ];
    for change in changes {
        let mut labels = labels_a.clone();
        change(&mut labels);
        assert!(
            !Arc::ptr_eq(&first, &cache.get(http, &labels)),
            "{labels:?}"
        );
    }
    for number in 0..CACHED {
        cache.get(http, &labels(&format!("w{number}")));
    }
    assert_eq!(cache.entries.len(), CACHED);

    drop(first);
    let end = http.epoch + Duration::from_secs(3600);
    http.sweep(end);
    assert!(http.meters.all().is_empty());
    assert!(cache.get(http, &labels_a).outcomes.read().is_empty());
}

#[test]
fn durations_are_in_the_bucket_whose_bound_they_do_not_exceed() {
    let telemetry = telemetry(10, 10);
    let meter = telemetry.http.meter(&labels("client"));
    let record = |nanos| meter.totals.duration.record(Duration::from_nanos(nanos));
    record(500_000);
    record(500_001);
    record(60_000_000_000);
    record(60_000_000_001);
    let text = telemetry.encode();
    let bucket = |le: &str| {
        let label = format!(r#"le="{le}""#);
        let lines = lines(&text, "warren_http_request_duration_seconds_bucket");
        let line = lines.iter().find(|line| line.contains(&label)).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(bucket("0.0005"), "1");
    assert_eq!(bucket("0.001"), "2");
    assert_eq!(bucket("30.0"), "2");
    assert_eq!(bucket("60.0"), "3");
    assert_eq!(bucket("+Inf"), "4");
}
