//! What the access log and a trace tell of a request. Put together only where one of them wants it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{Method, StatusCode, Version, header};
use mesh_api::errors::ProxyError;

use crate::flow::request_failed;
use crate::telemetry::access_log::RequestRecord;
use crate::telemetry::http::{Outcome, RequestLabels};
use crate::telemetry::trace::Trace;
use crate::worker::Context;

/// A request as it came, and what became known of it on its way.
pub struct Story {
    context: Arc<Context>,
    /// What it counts under.
    pub labels: RequestLabels,
    /// The endpoint, or where the caller wanted to go.
    pub destination: SocketAddr,
    /// Tries after the first.
    pub retries: u32,
    source: SocketAddr,
    version: Version,
    method: Method,
    authority: String,
    path: String,
    started: Instant,
    /// None: told.
    trace: Option<Trace>,
}

impl std::fmt::Debug for Story {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Story")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Story {
    /// Begins the request's span, which its headers then name, and its story if anyone wants to hear it.
    pub fn begin(
        context: &Arc<Context>,
        parts: &mut Parts,
        labels: &RequestLabels,
        (source, destination): (SocketAddr, SocketAddr),
    ) -> Option<Box<Self>> {
        let trace = context.telemetry.tracer.begin(&mut parts.headers);
        if !trace.is_recorded() && !context.access_log.is_on() {
            return None;
        }
        let authority = match parts.uri.authority() {
            Some(authority) => authority.as_str(),
            None => parts
                .headers
                .get(header::HOST)
                .and_then(|host| host.to_str().ok())
                .unwrap_or_default(),
        };
        let path = parts.uri.path_and_query().map_or("", |path| path.as_str());
        Some(Box::new(Self {
            context: Arc::clone(context),
            labels: labels.clone(),
            destination,
            retries: 0,
            source,
            version: parts.version,
            method: parts.method.clone(),
            authority: authority.to_owned(),
            path: path.to_owned(),
            started: Instant::now(),
            trace: Some(trace),
        }))
    }

    /// Tells it.
    pub fn end(mut self, outcome: Outcome) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: Outcome) {
        let Some(trace) = self.trace.take() else {
            return;
        };
        let labels = &self.labels;
        let record = RequestRecord {
            reporter: labels.reporter,
            source_address: self.source,
            destination_address: self.destination,
            source: &labels.source,
            destination: &labels.destination,
            service: labels.service.as_deref(),
            route: labels.route.as_deref(),
            backend: labels.backend.as_deref(),
            protocol: labels.protocol,
            version: self.version,
            method: &self.method,
            authority: &self.authority,
            path: &self.path,
            outcome,
            retries: self.retries,
            duration: self.started.elapsed(),
            trace_id: trace.id(),
        };
        self.context.access_log.write_request(&record);
        request_failed(&record);
        trace.finish(&record);
    }
}

impl Drop for Story {
    /// A request whose client went away before there was an answer.
    fn drop(&mut self) {
        self.tell(Outcome {
            error: Some(ProxyError::Cancelled),
            ..Outcome::default()
        });
    }
}

/// Logs a refusal of which nobody wants the whole story.
pub(super) fn failed(
    labels: &RequestLabels,
    (source, destination): (SocketAddr, SocketAddr),
    status: StatusCode,
    error: ProxyError,
) {
    request_failed(&RequestRecord {
        reporter: labels.reporter,
        source_address: source,
        destination_address: destination,
        source: &labels.source,
        destination: &labels.destination,
        service: labels.service.as_deref(),
        route: labels.route.as_deref(),
        backend: labels.backend.as_deref(),
        protocol: labels.protocol,
        version: Version::HTTP_11,
        method: &Method::GET,
        authority: "",
        path: "",
        outcome: Outcome {
            status: status.as_u16(),
            error: Some(error),
            ..Outcome::default()
        },
        retries: 0,
        duration: Duration::ZERO,
        trace_id: None,
    });
}
