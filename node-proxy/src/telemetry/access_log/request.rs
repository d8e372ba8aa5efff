//! One request as a line, and as the source of its span.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_api::errors::ProxyError;

use super::{now, party};
use crate::telemetry::http::{Outcome, Protocol};
use crate::telemetry::trace::TraceId;
use crate::telemetry::{Party, Reporter};

/// All that is told of a request that has ended.
#[derive(Debug)]
pub struct RequestRecord<'a> {
    /// Which half this node is.
    pub reporter: Reporter,
    /// The caller's address.
    pub source_address: SocketAddr,
    /// The endpoint, or where the caller wanted to go if none was picked.
    pub destination_address: SocketAddr,
    /// Caller.
    pub source: &'a Party,
    /// Callee.
    pub destination: &'a Party,
    /// `name.namespace`
    pub service: Option<&'a str>,
    /// `namespace/name`
    pub route: Option<&'a str>,
    /// `name.namespace:port`
    pub backend: Option<&'a str>,
    /// What the caller speaks.
    pub protocol: Protocol,
    /// Version of HTTP that the caller speaks.
    pub version: http::Version,
    /// The method.
    pub method: &'a http::Method,
    /// `Host` or `:authority`, empty without.
    pub authority: &'a str,
    /// The request's target as the caller sent it, with its query.
    pub path: &'a str,
    /// How it ended.
    pub outcome: Outcome,
    /// Tries after the first.
    pub retries: u32,
    /// From the request's headers to the response's end.
    pub duration: Duration,
    /// The trace it belongs to.
    pub trace_id: Option<TraceId>,
}

/// Longest path that is written, in bytes.
pub(in crate::telemetry) const MAX_PATH: usize = 2048;
/// Longest authority and method that are written, in bytes. A DNS name has at most 253.
pub(in crate::telemetry) const MAX_NAME: usize = 256;

impl RequestRecord<'_> {
    /// The path without its query, and not too long.
    pub(in crate::telemetry) fn plain_path(&self) -> Cow<'_, str> {
        let end = self.path.find('?').unwrap_or(self.path.len());
        bounded(&self.path[..end], MAX_PATH)
    }

    pub(super) fn text(&self, query: bool) -> String {
        let mut line = format!(
            "{} access direction={} protocol={} src.addr={} src.workload={} src.namespace={} src.identity={} \
             dst.addr={} dst.workload={} dst.namespace={} dst.identity={} dst.service={} route={} backend={} \
             method={} path={:?} authority={:?} status={} bytes_sent={} bytes_received={} duration_ms={:.3} \
             retries={}",
            now(),
            self.direction(),
            self.protocol.name(),
            self.source_address,
            self.source.workload(),
            self.source.namespace(),
            self.source.principal(),
            self.destination_address,
            self.destination.workload(),
            self.destination.namespace(),
            self.destination.principal(),
            self.service.unwrap_or("unknown"),
            self.route.unwrap_or("-"),
            self.backend.unwrap_or("-"),
            bounded(self.method.as_str(), MAX_NAME),
            self.path(query),
            bounded(self.authority, MAX_NAME),
            self.outcome.status,
            self.outcome.request_bytes,
            self.outcome.response_bytes,
            self.duration.as_secs_f64() * 1e3,
            self.retries,
        );
        if let Some(code) = self.outcome.grpc_status {
            line.push_str(&format!(" grpc_status={code}"));
        }
        if let Some(error) = self.outcome.error {
            line.push_str(&format!(" error={}", error.name()));
        }
        if let Some(trace) = self.trace_id {
            line.push_str(&format!(" trace_id={trace}"));
        }
        line
    }

    pub(super) fn json(&self, query: bool) -> String {
        serde_json::json!({
            "time": now(),
            "direction": self.direction(),
            "protocol": self.protocol.name(),
            "sourceAddress": self.source_address,
            "source": party(self.source),
            "destinationAddress": self.destination_address,
            "destination": party(self.destination),
            "service": self.service.unwrap_or("unknown"),
            "route": self.route,
            "backend": self.backend,
            "method": bounded(self.method.as_str(), MAX_NAME),
            "path": self.path(query),
            "authority": bounded(self.authority, MAX_NAME),
            "status": self.outcome.status,
            "grpcStatus": self.outcome.grpc_status,
            "bytesSent": self.outcome.request_bytes,
            "bytesReceived": self.outcome.response_bytes,
            "durationMs": self.duration.as_secs_f64() * 1e3,
            "retries": self.retries,
            "error": self.outcome.error.map(ProxyError::name),
            "traceId": self.trace_id.map(|id| id.to_string()),
        })
        .to_string()
    }

    /// `outbound` at the caller's node, `inbound` at the callee's.
    pub fn direction(&self) -> &'static str {
        match self.reporter {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        }
    }

    fn path(&self, query: bool) -> Cow<'_, str> {
        if query {
            bounded(self.path, MAX_PATH)
        } else {
            self.plain_path()
        }
    }
}

/// What fits, with a sign where something was cut off.
pub(in crate::telemetry) fn bounded(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return Cow::Borrowed(text);
    }
    let cut = (0..=most).rev().find(|i| text.is_char_boundary(*i));
    Cow::Owned(format!("{}…", &text[..cut.unwrap_or(0)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::identity::Identity;

    fn with_record(
        edit: impl FnOnce(&mut RequestRecord<'_>),
        check: impl FnOnce(&RequestRecord<'_>),
    ) {
        let identity = Identity::new("cluster.local", "demo", "client").unwrap();
        let source = Party::meshed(&"client".into(), &identity);
        let mut record = RequestRecord {
            reporter: Reporter::Source,
            source_address: "10.1.0.4:40000".parse().unwrap(),
            destination_address: "10.1.1.5:8080".parse().unwrap(),
            source: &source,
            destination: &Party::unknown(),
            service: Some("web.demo"),
            route: Some("demo/web"),
            backend: Some("web-v2.demo:80"),
            protocol: Protocol::Http1,
            version: http::Version::HTTP_11,
            method: &http::Method::GET,
            authority: "web:80",
            path: "/login?token=secret",
            outcome: Outcome {
                status: 503,
                error: Some(ProxyError::NoEndpoint),
                request_bytes: 3,
                response_bytes: 7,
                ..Outcome::default()
            },
            retries: 2,
            duration: Duration::from_micros(1_500),
            trace_id: Some(TraceId::from([0xab; 16])),
        };
        edit(&mut record);
        check(&record);
    }

    #[test]
    fn a_line_has_all_fields_and_no_query() {
        with_record(
            |_| {},
            |record| {
                let mut line: serde_json::Value =
                    serde_json::from_str(&record.json(false)).unwrap();
                assert!(line["time"].take().as_str().unwrap().ends_with('Z'));
                let party = |workload: &str, namespace: &str, identity: &str| serde_json::json!({"workload": workload, "namespace": namespace, "identity": identity});
                assert_eq!(
                    line,
                    serde_json::json!({
                        "time": null, "direction": "outbound", "protocol": "http1",
                        "sourceAddress": "10.1.0.4:40000",
                        "source": party("client", "demo", "spiffe://cluster.local/ns/demo/sa/client"),
                        "destinationAddress": "10.1.1.5:8080",
                        "destination": party("unknown", "unknown", "unknown"),
                        "service": "web.demo", "route": "demo/web", "backend": "web-v2.demo:80",
                        "method": "GET", "path": "/login", "authority": "web:80",
                        "status": 503, "grpcStatus": null, "bytesSent": 3, "bytesReceived": 7,
                        "durationMs": 1.5, "retries": 2, "error": "no_endpoint",
                        "traceId": "abababababababababababababababab",
                    })
                );
                let text = record.text(false);
                assert!(text.contains(r#" path="/login" "#), "{text}");
                assert!(
                    text.ends_with(" error=no_endpoint trace_id=abababababababababababababababab")
                );
                assert!(record.json(true).contains("token=secret"));
            },
        );
    }

    #[test]
    fn what_comes_from_the_wire_can_neither_break_a_line_nor_fill_the_disk() {
        let path = format!("/ä\"\n{}", "x".repeat(10_000));
        with_record(
            |_| {},
            |record| {
                let record = RequestRecord {
                    path: &path,
                    authority: "a b\n",
                    ..*record
                };
                for line in [record.text(true), record.json(true)] {
                    assert!(!line.contains('\n'), "{line}");
                    assert!(line.len() < MAX_PATH + 1_000, "{}", line.len());
                }
            },
        );
        assert_eq!(bounded("ää", 3), "ä…");
    }
}
