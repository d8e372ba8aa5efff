//! Sends spans to a collector over OTLP/gRPC (OTLP 1.x, "OTLP/gRPC").
//!
//! One task: it collects a batch, sends it, and tries again with growing pauses what the collector calls
//! temporary. Traffic never waits for it: while it is held up, its queue fills, and what does not fit is counted.

use std::collections::HashMap;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::span::{Finished, Workload};

/// Spans that wait for the exporter: some 4 MiB.
pub(super) const QUEUE: usize = 2048;
/// Spans of one message; of ordinary size they are a fifth of the 4 MiB that collectors accept.
const BATCH: usize = 512;
/// How long the first span of a batch waits for more.
const DELAY: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(10);
/// First pause between tries; doubles.
const PAUSE: Duration = Duration::from_secs(1);
const TRIES: u32 = 5;
/// What the end of the process waits for.
const FLUSH: Duration = Duration::from_secs(2);

/// The address of a collector: `http://host:port`.
pub(crate) fn endpoint(text: &str) -> Option<Endpoint> {
    let uri: http::Uri = text.parse().ok()?;
    let bare = uri.path() == "/" && uri.query().is_none();
    let usable = uri.scheme_str() == Some("http") && uri.port_u16().is_some() && bare;
    let endpoint = || {
        Endpoint::from(uri)
            .timeout(TIMEOUT)
            .connect_timeout(TIMEOUT)
    };
    usable.then(endpoint)
}

/// What becomes of spans.
#[derive(Clone, Debug)]
pub(super) struct Metrics {
    exported: Counter,
    dropped: Family<Reason, Counter>,
    /// Of `dropped`. On the way of requests, so it is looked up once.
    pub(super) queue_full: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let dropped = Family::<Reason, Counter>::default();
        let queue_full = Reason {
            reason: "queue_full",
        };
        Self {
            exported: Counter::default(),
            queue_full: dropped.get_or_create_owned(&queue_full),
            dropped,
        }
    }
}

impl Metrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "trace_spans_exported",
            "Spans the collector has accepted",
            self.exported.clone(),
        );
        registry.register(
            "trace_spans_dropped",
            "Spans that reached no collector, by reason",
            self.dropped.clone(),
        );
    }

    fn drop(&self, reason: &'static str, spans: u64) {
        self.dropped.get_or_create(&Reason { reason }).inc_by(spans);
    }
}

/// The sending half; see [`Exporting::start`].
#[derive(Debug)]
pub struct Exporter {
    endpoint: Endpoint,
    node: String,
    queue: mpsc::Receiver<Finished>,
    metrics: Metrics,
}

/// An exporter that runs.
#[derive(Debug)]
pub struct Exporting {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Exporting {
    /// Starts the task. Needs a tokio runtime.
    pub fn start(exporter: Exporter) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(exporter.run(stop.clone()));
        Self { stop, task }
    }

    /// Sends what waits, for at most 2 s, and ends.
    pub async fn flush(mut self) {
        self.stop.cancel();
        if timeout(FLUSH, &mut self.task).await.is_err() {
            tracing::warn!("the trace collector did not take the last spans in time");
            self.task.abort();
        }
    }
}

impl Exporter {
    pub(super) fn new(
        endpoint: Endpoint,
        node: String,
        queue: mpsc::Receiver<Finished>,
        metrics: Metrics,
    ) -> Self {
        Self {
            endpoint,
            node,
            queue,
            metrics,
        }
    }

    async fn run(mut self, stop: CancellationToken) {
        let mut client = TraceServiceClient::new(self.endpoint.connect_lazy());
        let mut batch = Vec::with_capacity(BATCH);
        while self.collect(&mut batch, &stop).await {
            self.send(&mut client, &mut batch, &stop).await;
        }
        self.queue.close();
        while self.queue.recv_many(&mut batch, BATCH).await > 0 {
            self.send(&mut client, &mut batch, &stop).await;
        }
    }

    /// Fills the batch; `false` when it is time to end.
    async fn collect(&mut self, batch: &mut Vec<Finished>, stop: &CancellationToken) -> bool {
        let received = tokio::select! {
            received = self.queue.recv_many(batch, BATCH) => received,
            () = stop.cancelled() => 0,
        };
        if received == 0 {
            return false;
        }
        let due = sleep(DELAY);
        tokio::pin!(due);
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            tokio::select! {
                received = self.queue.recv_many(batch, room) => if received == 0 { break },
                () = &mut due => break,
                () = stop.cancelled() => break,
            }
        }
        true
    }

    async fn send(
        &self,
        client: &mut TraceServiceClient<Channel>,
        batch: &mut Vec<Finished>,
        stop: &CancellationToken,
    ) {
        let spans = batch.len() as u64;
        let request = request(batch.drain(..), &self.node);
        let mut pause = PAUSE;
        for attempt in 1.. {
            let status = match client.export(request.clone()).await {
                Ok(response) => {
                    let partial = response.into_inner().partial_success;
                    let rejected = partial.map_or(0, |p| p.rejected_spans.max(0) as u64);
                    self.metrics.exported.inc_by(spans.saturating_sub(rejected));
                    if rejected > 0 {
                        self.metrics.drop("rejected", rejected.min(spans));
                    }
                    return;
                }
                Err(status) => status,
            };
            if attempt == TRIES || !is_temporary(status.code()) || stop.is_cancelled() {
                tracing::warn!(
                    spans, code = ?status.code(), error = status.message(),
                    "spans not exported; is tracing.endpoint an OTLP/gRPC collector?"
                );
                self.metrics.drop("export_failed", spans);
                return;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => {}
            }
            pause *= 2;
        }
    }
}

/// The list of the OTLP specification; RESOURCE_EXHAUSTED would need RetryInfo.
fn is_temporary(code: Code) -> bool {
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
    )
}

fn request(batch: impl Iterator<Item = Finished>, node: &str) -> ExportTraceServiceRequest {
    let mut by_workload: HashMap<Workload, Vec<Span>> = HashMap::new();
    for Finished { resource, span } in batch {
        by_workload.entry(resource).or_default().push(span);
    }
    let scope = InstrumentationScope {
        name: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let resource_spans = by_workload
        .into_iter()
        .map(|(workload, spans)| ResourceSpans {
            resource: Some(Resource {
                attributes: workload.attributes(node),
                ..Resource::default()
            }),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope.clone()),
                spans,
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        })
        .collect();
    ExportTraceServiceRequest { resource_spans }
}
