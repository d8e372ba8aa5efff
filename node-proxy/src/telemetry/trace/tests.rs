use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderValue;
use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use super::*;
use crate::telemetry::http::{Outcome, Protocol};
use crate::telemetry::{Bounds, Party, Reporter, Telemetry};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

fn tracer(sample_ratio: f64) -> (Tracer, Exporter) {
    let config = Tracing {
        endpoint: Some("http://127.0.0.1:1".into()),
        sample_ratio,
    };
    let (tracer, exporter) = Tracer::new(&config, "node-1");
    (tracer, exporter.unwrap())
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let pair = |(name, value): &(&'static str, &'static str)| {
        let name = http::HeaderName::from_static(name);
        (name, HeaderValue::from_static(value))
    };
    pairs.iter().map(pair).collect()
}

fn party(name: &str) -> Party {
    let identity = Identity::new("cluster.local", "demo", name).unwrap();
    Party::meshed(&name.into(), &identity)
}

fn record<'a>(source: &'a Party, destination: &'a Party) -> RequestRecord<'a> {
    RequestRecord {
        reporter: Reporter::Source,
        source_address: "10.1.0.4:40000".parse().unwrap(),
        destination_address: "10.1.1.5:8080".parse().unwrap(),
        source,
        destination,
        service: Some("web.demo"),
        route: None,
        backend: None,
        protocol: Protocol::Http1,
        version: http::Version::HTTP_11,
        method: &http::Method::GET,
        authority: "web:80",
        path: "/a/b?c=d",
        outcome: Outcome {
            status: 200,
            ..Outcome::default()
        },
        retries: 0,
        duration: Duration::from_millis(3),
        trace_id: None,
    }
}

#[test]
fn without_a_collector_headers_are_not_touched() {
    for sent in [
        headers(&[]),
        headers(&[("traceparent", PARENT), ("tracestate", "not valid")]),
        headers(&[("traceparent", "not valid")]),
    ] {
        let mut passed = sent.clone();
        let trace = Tracer::off().begin(&mut passed);
        assert_eq!(passed, sent);
        assert!(!trace.is_recorded());
    }
    let trace = Tracer::off().begin(&mut headers(&[("traceparent", PARENT)]));
    assert_eq!(trace.id().unwrap().to_string(), PARENT[3..35]);
}

#[test]
fn a_sampled_request_gets_a_span_and_passes_its_id_on() {
    let (tracer, _exporter) = tracer(0.0);
    let mut passed = headers(&[("traceparent", PARENT), ("tracestate", "rojo=1")]);
    let trace = tracer.begin(&mut passed);
    assert!(trace.is_recorded());
    let parent = passed["traceparent"].to_str().unwrap();
    assert_eq!(parent[..36], PARENT[..36]);
    assert_ne!(parent[36..52], PARENT[36..52]);
    assert_eq!(parent[52..], PARENT[52..]);
    assert_eq!(passed["tracestate"], "rojo=1");
}

#[test]
fn an_unsampled_request_is_passed_on_as_it_is() {
    let (tracer, _exporter) = tracer(1.0);
    let sent = headers(&[("traceparent", UNSAMPLED), ("tracestate", "rojo=1")]);
    let mut passed = sent.clone();
    let trace = tracer.begin(&mut passed);
    assert_eq!(passed, sent);
    assert!(!trace.is_recorded());
    assert!(trace.id().is_some());
}

#[test]
fn a_state_that_is_not_valid_is_not_passed_on() {
    let (tracer, _exporter) = tracer(0.0);
    let mut passed = headers(&[("traceparent", PARENT), ("tracestate", "rojo")]);
    assert!(tracer.begin(&mut passed).is_recorded());
    assert!(!passed.contains_key("tracestate"));
}

#[test]
fn a_new_trace_begins_where_there_is_no_valid_one() {
    let (tracer, _exporter) = tracer(1.0);
    for mut passed in [
        headers(&[]),
        headers(&[("traceparent", "00-junk"), ("tracestate", "rojo=1")]),
    ] {
        let trace = tracer.begin(&mut passed);
        assert!(trace.is_recorded());
        let begun = TraceContext::of(&passed).unwrap();
        assert!(begun.is_sampled());
        assert_eq!(trace.id(), Some(begun.trace_id));
        assert!(!passed.contains_key("tracestate"));
    }
}

#[test]
fn the_decision_against_a_trace_is_passed_on() {
    let (mut tracer, _exporter) = tracer(1.0);
    // As good as never, and not never.
    tracer.threshold = 1;
    let mut passed = headers(&[]);
    assert!(!tracer.begin(&mut passed).is_recorded());
    assert!(!TraceContext::of(&passed).unwrap().is_sampled());

    tracer.threshold = 0;
    let mut passed = headers(&[]);
    assert!(tracer.begin(&mut passed).id().is_none());
    assert!(passed.is_empty());
}

#[tokio::test]
async fn what_does_not_fit_the_queue_is_dropped_and_counted() {
    let (tracer, _exporter) = tracer(1.0);
    let telemetry = Telemetry::with(Bounds::default(), tracer);
    let (source, destination) = (party("client"), party("web"));
    for _ in 0..QUEUE + 3 {
        let trace = telemetry.tracer.begin(&mut HeaderMap::new());
        trace.finish(&record(&source, &destination));
    }
    let text = telemetry.encode();
    let line = r#"warren_trace_spans_dropped_total{reason="queue_full"} 3"#;
    assert!(text.contains(line), "{text}");
}

#[test]
fn errors_are_those_of_the_conventions() {
    let (source, destination) = (party("client"), party("web"));
    let failed = |reporter, outcome| {
        let (tracer, _exporter) = tracer(1.0);
        let trace = tracer.begin(&mut HeaderMap::new());
        let record = RequestRecord {
            reporter,
            outcome,
            ..record(&source, &destination)
        };
        let span = span::finish(&trace.open.unwrap(), SystemTime::now(), &record).span;
        assert_eq!(
            span.status.unwrap().code == 2,
            text(&span.attributes, "error.type").is_some()
        );
        text(&span.attributes, "error.type")
    };
    let status = |status| Outcome {
        status,
        ..Outcome::default()
    };
    let grpc = |code| Outcome {
        grpc_status: Some(code),
        ..status(200)
    };
    let flag = |code, error| Outcome {
        error: Some(error),
        ..status(code)
    };
    let (client, server) = (Reporter::Source, Reporter::Destination);
    assert_eq!(failed(client, status(200)), None);
    assert_eq!(failed(client, status(404)).as_deref(), Some("404"));
    assert_eq!(failed(server, status(404)), None);
    assert_eq!(failed(server, status(500)).as_deref(), Some("500"));
    assert_eq!(failed(client, grpc(0)), None);
    assert_eq!(failed(client, grpc(5)).as_deref(), Some("5"));
    assert_eq!(failed(server, grpc(5)), None);
    assert_eq!(failed(server, grpc(14)).as_deref(), Some("14"));
    let cancelled = flag(0, ProxyError::Cancelled);
    assert_eq!(failed(server, cancelled).as_deref(), Some("cancelled"));
    assert_eq!(failed(client, flag(200, ProxyError::FaultDelay)), None);
}

#[test]
fn endpoints_are_plain_http_with_a_port() {
    assert!(endpoint("http://collector.observability:4317").is_some());
    assert!(endpoint("http://[::1]:4317/").is_some());
    for text in [
        "",
        "collector:4317",
        "http://collector",
        "https://collector:4317",
        "http://collector:4317/v1/traces",
    ] {
        assert!(endpoint(text).is_none(), "{text}");
    }
}

#[tokio::test]
async fn spans_reach_a_collector() {
    let mut collector =
        Collector::start(vec![Err(Status::unavailable("starting")), Ok(0), Ok(1)]).await;
    let config = Tracing {
        endpoint: Some(format!("http://{}", collector.address)),
        sample_ratio: 1.0,
    };
    let (tracer, exporter) = Tracer::new(&config, "node-1");
    let telemetry = Telemetry::with(Bounds::default(), tracer);
    // Not paused, as the collector is on a real socket: the first pause is a second of real time.
    let exporting = Exporting::start(exporter.unwrap());

    let (source, destination) = (party("client"), party("web"));
    let mut sent = headers(&[("traceparent", PARENT), ("tracestate", "rojo=1")]);
    let trace = telemetry.tracer.begin(&mut sent);
    let span_id = sent["traceparent"].to_str().unwrap()[36..52].to_owned();
    trace.finish(&RequestRecord {
        outcome: Outcome {
            status: 503,
            error: Some(ProxyError::NoEndpoint),
            ..Outcome::default()
        },
        retries: 1,
        ..record(&source, &destination)
    });
    let server_side = telemetry.tracer.begin(&mut HeaderMap::new());
    server_side.finish(&RequestRecord {
        reporter: Reporter::Destination,
        protocol: Protocol::Grpc,
        version: http::Version::HTTP_2,
        path: "/shop.Cart/Add",
        outcome: Outcome {
            status: 200,
            grpc_status: Some(0),
            ..Outcome::default()
        },
        ..record(&source, &destination)
    });

    let received = collector.next().await;
    assert_eq!(received.len(), 2, "one resource for each workload");
    let of = |workload: &str| {
        let name = |r: &&ResourceSpans| {
            let attributes = &r.resource.as_ref().unwrap().attributes;
            assert_eq!(
                text(attributes, "service.namespace").as_deref(),
                Some("demo")
            );
            assert_eq!(text(attributes, "k8s.node.name").as_deref(), Some("node-1"));
            text(attributes, "service.name").as_deref() == Some(workload)
        };
        received.iter().find(name).unwrap().scope_spans[0].spans[0].clone()
    };
    let span: Span = of("client");
    assert_eq!(hex(&span.trace_id), PARENT[3..35]);
    assert_eq!(hex(&span.parent_span_id), PARENT[36..52]);
    assert_eq!(hex(&span.span_id), span_id);
    assert_eq!(span.trace_state, "rojo=1");
    assert_eq!((span.name.as_str(), span.kind), ("GET", 3));
    assert_eq!(span.status.as_ref().unwrap().code, 2);
    assert!(span.start_time_unix_nano > 0 && span.end_time_unix_nano >= span.start_time_unix_nano);
    for (key, value) in [
        ("http.request.method", "GET"),
        ("http.response.status_code", "503"),
        ("http.request.resend_count", "1"),
        ("url.full", "http://web:80/a/b"),
        ("server.address", "web"),
        ("server.port", "80"),
        ("network.protocol.version", "1.1"),
        ("network.peer.address", "10.1.1.5"),
        ("error.type", "no_endpoint"),
        ("warren.service", "web.demo"),
        (
            "warren.source.principal",
            "spiffe://cluster.local/ns/demo/sa/client",
        ),
    ] {
        assert_eq!(text(&span.attributes, key).as_deref(), Some(value), "{key}");
    }
    let span = of("web");
    assert_eq!((span.name.as_str(), span.kind), ("shop.Cart/Add", 2));
    assert!(span.parent_span_id.is_empty());
    assert_eq!(
        text(&span.attributes, "rpc.service").as_deref(),
        Some("shop.Cart")
    );
    assert_eq!(
        text(&span.attributes, "client.address").as_deref(),
        Some("10.1.0.4")
    );

    // What waits at the end is sent then.
    let trace = telemetry.tracer.begin(&mut HeaderMap::new());
    trace.finish(&record(&source, &destination));
    exporting.flush().await;
    collector.next().await;
    let metrics = telemetry.encode();
    for line in [
        "warren_trace_spans_exported_total 2",
        r#"warren_trace_spans_dropped_total{reason="rejected"} 1"#,
        r#"warren_trace_spans_dropped_total{reason="queue_full"} 0"#,
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

/// An OTLP collector that answers as told: `Ok(rejected spans)`, or a status.
struct Collector {
    address: SocketAddr,
    received: mpsc::Receiver<Vec<ResourceSpans>>,
}

impl Collector {
    async fn start(answers: Vec<Result<i64, Status>>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, received) = mpsc::channel(16);
        let service = TraceServiceServer::new(Answers {
            answers: parking_lot::Mutex::new(answers.into_iter().collect()),
            sender,
        });
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self { address, received }
    }

    async fn next(&mut self) -> Vec<ResourceSpans> {
        let received = tokio::time::timeout(Duration::from_secs(30), self.received.recv());
        received.await.expect("nothing was exported").unwrap()
    }
}

struct Answers {
    answers: parking_lot::Mutex<std::collections::VecDeque<Result<i64, Status>>>,
    sender: mpsc::Sender<Vec<ResourceSpans>>,
}

#[tonic::async_trait]
impl TraceService for Answers {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let answer = self.answers.lock().pop_front().unwrap();
        let rejected_spans = answer?;
        self.sender
            .try_send(request.into_inner().resource_spans)
            .unwrap();
        let partial_success = (rejected_spans > 0).then(|| ExportTracePartialSuccess {
            rejected_spans,
            error_message: String::new(),
        });
        Ok(Response::new(ExportTraceServiceResponse {
            partial_success,
        }))
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let attribute = attributes.iter().find(|a| a.key == key)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        other => panic!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
