//! Health and metrics for the kubelet and Prometheus.
//!
//! Ready means that this process can carry traffic now: it has the table, the trust bundle, every pod's
//! certificate and listeners, and it accepts. It stays ready without controller or agent, since nodes go on
//! with what they have.

use std::sync::Arc;

use http::{Method, StatusCode};
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::broker;
use crate::identity::Identities;
use crate::process::http::{Answer, Handler, answer, text};
use crate::process::lifecycle::{Lifecycle, Phase};
use crate::process::metrics::ProcessCollector;
use crate::table::Table;
use crate::telemetry::Telemetry;

/// What readiness depends on.
#[derive(Clone)]
pub struct Health {
    /// Loaded or not.
    pub table: watch::Receiver<bool>,
    /// Has the trust bundle.
    pub identities: Arc<Identities>,
    /// Pods and listeners.
    pub broker: watch::Receiver<broker::State>,
    /// Accepting or not.
    pub lifecycle: Arc<Lifecycle>,
}

impl Health {
    /// Reads all of them.
    pub fn new(
        table: &Table,
        identities: &Arc<Identities>,
        broker: watch::Receiver<broker::State>,
        lifecycle: &Arc<Lifecycle>,
    ) -> Self {
        Self {
            table: table.loaded(),
            identities: Arc::clone(identities),
            broker,
            lifecycle: Arc::clone(lifecycle),
        }
    }

    /// Why the process cannot carry new traffic; empty if it can.
    pub fn missing(&self) -> Vec<&'static str> {
        let broker = *self.broker.borrow();
        let accepts = match self.lifecycle.phase() {
            Phase::Serving => "",
            Phase::Drained => "drained: a newer proxy accepts, or an operator asked for it",
            Phase::Terminating { .. } => "terminating",
        };
        let conditions = [
            (*self.table.borrow(), "no table has been loaded"),
            (
                self.identities.trust().is_some(),
                "no trust bundle has been received",
            ),
            (
                broker.ready || broker.connected,
                "the agent has not been reached",
            ),
            (
                broker.ready,
                "pods' certificates or listeners are not all there",
            ),
            (accepts.is_empty(), accepts),
        ];
        conditions
            .into_iter()
            .filter(|(good, _)| !good)
            .map(|(_, reason)| reason)
            .collect()
    }

    /// 200 or 503 with the reasons.
    pub fn ready(&self) -> Answer {
        let missing = self.missing();
        if missing.is_empty() {
            text(StatusCode::OK, "ready\n")
        } else {
            text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not ready: {}\n", missing.join("; ")),
            )
        }
    }

    /// Answers on the health port.
    pub fn handler(self) -> Handler {
        Arc::new(
            move |request| match (request.method(), request.uri().path()) {
                // That it answers shows that the process's main loop turns.
                (&Method::GET, "/healthz/live") => text(StatusCode::OK, "live\n"),
                (&Method::GET, "/healthz/ready") => self.ready(),
                _ => text(
                    StatusCode::NOT_FOUND,
                    "GET /healthz/live or /healthz/ready\n",
                ),
            },
        )
    }
}

/// All metrics: those of the data plane under `warren_`, and `process_*` beside them.
pub struct Metrics {
    telemetry: Arc<Telemetry>,
    process: Registry,
}

impl Metrics {
    /// The process counts as started now.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        let mut process = Registry::default();
        process.register_collector(Box::new(ProcessCollector::new()));
        Self { telemetry, process }
    }

    /// The OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = self.telemetry.encode();
        // Two registries, one text: only the last may end it.
        if let Some(length) = text.strip_suffix("# EOF\n").map(str::len) {
            text.truncate(length);
        }
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.process);
        text
    }

    /// 200 with the text.
    pub fn answer(&self) -> Answer {
        answer(
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            self.encode(),
        )
    }

    /// Answers on the metrics port.
    pub fn handler(self: Arc<Self>) -> Handler {
        Arc::new(
            move |request| match (request.method(), request.uri().path()) {
                (&Method::GET, "/metrics") => self.answer(),
                _ => text(StatusCode::NOT_FOUND, "GET /metrics\n"),
            },
        )
    }
}
