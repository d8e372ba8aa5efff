//! Traces of requests: who decides that a request is traced, what is passed on, and what becomes of spans.
//!
//! A request that comes with a sampled W3C `traceparent` gets a span, whose id is passed on as the parent; one
//! with an unsampled `traceparent` is passed on as it is. For requests with neither, a share of
//! `tracing.sampleRatio` begins a trace here; the others are told so (`traceparent` with the sampled flag off), so
//! that the callee's node does not decide anew. Without `tracing.endpoint` headers are not touched at all, and
//! with a ratio of 0 no trace begins here.
//!
//! Spans follow the OpenTelemetry semantic conventions for HTTP and RPC and are sent over OTLP/gRPC in batches by
//! one task (`export`). Their queue is bounded; what does not fit is dropped and counted.

use std::time::{Instant, SystemTime};

use http::HeaderMap;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;

use super::access_log::RequestRecord;
use crate::config::Tracing;

mod context;
mod export;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod span;

pub use context::{SpanId, TraceId};
use context::{TRACEPARENT, TRACESTATE, TraceContext};
pub(crate) use export::endpoint;
pub use export::{Exporter, Exporting};
use export::{Metrics, QUEUE};
use span::Finished;

/// Begins the spans of requests.
#[derive(Debug)]
pub struct Tracer {
    spans: Option<mpsc::Sender<Finished>>,
    /// Traces begin for ids whose random part is below: 0 to 2^56.
    threshold: u64,
    metrics: Metrics,
}

impl Tracer {
    /// No traces.
    pub fn off() -> Self {
        Self {
            spans: None,
            threshold: 0,
            metrics: Metrics::default(),
        }
    }

    /// As configured. The exporter must be run, if there is one.
    pub fn new(config: &Tracing, node: &str) -> (Self, Option<Exporter>) {
        let Some(endpoint) = config.endpoint.as_deref().and_then(endpoint) else {
            return (Self::off(), None);
        };
        let (spans, queue) = mpsc::channel(QUEUE);
        let metrics = Metrics::default();
        let exporter = Exporter::new(endpoint, node.to_owned(), queue, metrics.clone());
        let tracer = Self {
            spans: Some(spans),
            // Saturates; the configuration was checked to be 0 to 1.
            threshold: (config.sample_ratio * context::RANDOM_RANGE as f64) as u64,
            metrics,
        };
        (tracer, Some(exporter))
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// Decides whether a request is traced and makes its headers say so to the next hop. Once for each
    /// request: all its tries carry the same headers.
    pub fn begin(&self, headers: &mut HeaderMap) -> Trace {
        let incoming = TraceContext::of(headers);
        let Some(spans) = &self.spans else {
            return Trace::untraced(incoming);
        };
        let parent = incoming.map(|context| context.span_id);
        let context = match incoming {
            Some(context) if context.is_sampled() => context.child(),
            Some(_) => return Trace::untraced(incoming),
            None if self.threshold == 0 => return Trace::untraced(None),
            None => TraceContext::begin(self.threshold),
        };
        // The state belongs to the trace that it came with (Trace Context, 3.3.1).
        let state = context::state(headers).filter(|_| parent.is_some());
        if state.is_none() {
            headers.remove(TRACESTATE);
        }
        headers.insert(TRACEPARENT, context.header());
        if !context.is_sampled() {
            return Trace::untraced(Some(context));
        }
        Trace {
            id: Some(context.trace_id),
            open: Some(Box::new(Open {
                context,
                parent,
                state: state.unwrap_or_default(),
                began: SystemTime::now(),
                started: Instant::now(),
                spans: spans.clone(),
                metrics: self.metrics.clone(),
            })),
        }
    }
}

/// The trace a request belongs to, and its span if it is recorded. Dropped without [`finish`](Self::finish) the
/// span is not sent.
#[derive(Debug)]
pub struct Trace {
    id: Option<TraceId>,
    open: Option<Box<Open>>,
}

impl Trace {
    fn untraced(context: Option<TraceContext>) -> Self {
        Self {
            id: context.map(|context| context.trace_id),
            open: None,
        }
    }

    /// For the access log; also of a trace that is not recorded here.
    pub fn id(&self) -> Option<TraceId> {
        self.id
    }

    /// Whether [`finish`](Self::finish) has anything to do, so that no record need be put together.
    pub fn is_recorded(&self) -> bool {
        self.open.is_some()
    }

    /// The request has ended.
    pub fn finish(self, record: &RequestRecord<'_>) {
        let Some(open) = self.open else { return };
        // Begin and duration, not begin and end: the clock may be set in between.
        let ended = open.began + open.started.elapsed();
        let finished = span::finish(&open, ended, record);
        if open.spans.try_send(finished).is_err() {
            open.metrics.queue_full.inc();
        }
    }
}

/// A span that has begun.
#[derive(Debug)]
struct Open {
    context: TraceContext,
    parent: Option<SpanId>,
    state: String,
    began: SystemTime,
    started: Instant,
    spans: mpsc::Sender<Finished>,
    metrics: Metrics,
}

#[cfg(test)]
mod tests;
