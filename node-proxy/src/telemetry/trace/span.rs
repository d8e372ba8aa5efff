//! A request's span in OTLP, after the OpenTelemetry semantic conventions for HTTP and RPC spans.
//!
//! The caller's node makes a CLIENT span and the callee's node a SERVER span. A span's resource is the
//! workload whose side it tells of, so that trace viewers draw workloads and not proxies.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_api::identity::Identity;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};

use super::Open;
use crate::telemetry::access_log::{MAX_NAME, RequestRecord, bounded};
use crate::telemetry::http::Protocol;
use crate::telemetry::{Party, Reporter};

/// A span on its way to the collector.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) resource: Workload,
    pub(super) span: Span,
}

/// What a span tells of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Workload {
    name: Option<Arc<str>>,
    identity: Option<Identity>,
}

impl Workload {
    /// Attributes of the resource.
    pub(super) fn attributes(&self, node: &str) -> Vec<KeyValue> {
        let party = Party {
            workload: self.name.clone(),
            identity: self.identity.clone(),
        };
        vec![
            text("service.name", party.workload()),
            text("service.namespace", party.namespace()),
            text("k8s.namespace.name", party.namespace()),
            text("k8s.node.name", node),
        ]
    }
}

pub(super) fn finish(open: &Open, ended: SystemTime, record: &RequestRecord<'_>) -> Finished {
    let (kind, own) = match record.reporter {
        Reporter::Source => (SpanKind::Client, record.source),
        Reporter::Destination => (SpanKind::Server, record.destination),
    };
    let failure = failure(record);
    let span = Span {
        trace_id: open.context.trace_id.to_vec(),
        span_id: open.context.span_id.to_vec(),
        trace_state: open.state.clone(),
        parent_span_id: open.parent.map_or_else(Vec::new, |id| id.to_vec()),
        // Bits 8 and 9: it is known that the parent, where there is one, is of another process.
        flags: u32::from(open.context.flags()) | 1 << 8 | u32::from(open.parent.is_some()) << 9,
        name: name(record),
        kind: kind.into(),
        start_time_unix_nano: nanos(open.began),
        end_time_unix_nano: nanos(ended),
        attributes: attributes(record, failure.as_deref()),
        status: Some(Status {
            code: match failure {
                Some(_) => StatusCode::Error.into(),
                None => StatusCode::Unset.into(),
            },
            // Not repeated where an attribute says it.
            message: String::new(),
        }),
        ..Span::default()
    };
    Finished {
        resource: Workload {
            name: own.workload.clone(),
            identity: own.identity.clone(),
        },
        span,
    }
}

/// `{method}`, or `{service}/{method}` of gRPC: a path would make a name for every object.
fn name(record: &RequestRecord<'_>) -> String {
    match record.protocol {
        Protocol::Grpc => record.plain_path().trim_start_matches('/').to_owned(),
        Protocol::Http1 | Protocol::Http2 => method(record).to_owned(),
    }
}

/// `error.type`: what makes the span one of an error. A response with 4xx is an error of its caller only, and
/// so are the statuses of gRPC that a server answers a wrong request with.
fn failure(record: &RequestRecord<'_>) -> Option<String> {
    let outcome = &record.outcome;
    let client = record.reporter == Reporter::Source;
    // A fault that only delayed a request did not fail it.
    if let Some(error) = outcome.error.filter(|e| e.status() >= 400) {
        return Some(error.name().to_owned());
    }
    if let Some(code) = outcome.grpc_status {
        // UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS
        let servers = [2, 4, 12, 13, 14, 15].contains(&code);
        return (code != 0 && (client || servers)).then(|| code.to_string());
    }
    let least = if client { 400 } else { 500 };
    (outcome.status >= least).then(|| outcome.status.to_string())
}

fn attributes(record: &RequestRecord<'_>, failure: Option<&str>) -> Vec<KeyValue> {
    let outcome = &record.outcome;
    let path = record.plain_path();
    let (host, port) = host_and_port(record.authority);
    let method_name = method(record);
    let mut all = vec![
        text("http.request.method", method_name),
        text("server.address", &bounded(host, MAX_NAME)),
        number("server.port", port.unwrap_or(80).into()),
        text("network.protocol.version", version(record.version)),
        number("http.request.body.size", signed(outcome.request_bytes)),
        number("http.response.body.size", signed(outcome.response_bytes)),
    ];
    match record.reporter {
        Reporter::Source => {
            let authority = bounded(record.authority, MAX_NAME);
            all.push(text("url.full", &format!("http://{authority}{path}")));
            let peer = record.destination_address;
            all.push(text("network.peer.address", &peer.ip().to_string()));
            all.push(number("network.peer.port", peer.port().into()));
        }
        Reporter::Destination => {
            all.push(text("url.path", &path));
            all.push(text("url.scheme", "http"));
            let peer = record.source_address.ip().to_string();
            all.push(text("client.address", &peer));
        }
    }
    if method_name == OTHER_METHOD {
        let original = bounded(record.method.as_str(), MAX_NAME);
        all.push(text("http.request.method_original", &original));
    }
    if outcome.status != 0 {
        all.push(number("http.response.status_code", outcome.status.into()));
    }
    if record.retries > 0 {
        all.push(number("http.request.resend_count", record.retries.into()));
    }
    if record.protocol == Protocol::Grpc {
        all.push(text("rpc.system", "grpc"));
        if let Some((service, method)) = path.trim_start_matches('/').split_once('/') {
            all.push(text("rpc.service", service));
            all.push(text("rpc.method", method));
        }
        if let Some(code) = outcome.grpc_status {
            all.push(number("rpc.grpc.status_code", code.into()));
        }
    }
    if let Some(failure) = failure {
        all.push(text("error.type", failure));
    }
    if let Some(error) = outcome.error {
        all.push(text("warren.response_flags", error.name()));
    }
    all.push(text("warren.source.workload", record.source.workload()));
    all.push(text("warren.source.principal", record.source.principal()));
    all.push(text(
        "warren.destination.workload",
        record.destination.workload(),
    ));
    all.push(text(
        "warren.destination.principal",
        record.destination.principal(),
    ));
    for (key, value) in [
        ("warren.service", record.service),
        ("warren.route", record.route),
        ("warren.backend", record.backend),
    ] {
        all.extend(value.map(|value| text(key, value)));
    }
    all
}

/// Methods the conventions know; any other is `_OTHER`.
fn method<'a>(record: &'a RequestRecord<'_>) -> &'a str {
    const KNOWN: [&str; 9] = [
        "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE",
    ];
    let method = record.method.as_str();
    if KNOWN.contains(&method) {
        method
    } else {
        OTHER_METHOD
    }
}

const OTHER_METHOD: &str = "_OTHER";

fn host_and_port(authority: &str) -> (&str, Option<u16>) {
    // A colon within brackets is part of an IPv6 address.
    let split = authority
        .rsplit_once(':')
        .filter(|(_, port)| !port.contains(']'));
    match split {
        Some((host, port)) => (host, port.parse().ok()),
        None => (authority, None),
    }
}

fn version(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_10 => "1.0",
        http::Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

fn nanos(time: SystemTime) -> u64 {
    // 584 years after 1970.
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

fn number(key: &str, value: i64) -> KeyValue {
    attribute(key, Value::IntValue(value))
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}
