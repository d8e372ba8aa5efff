//! Metrics of connections.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mesh_api::errors::ProxyError;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;

use super::series::{Bounds, Metric, Series};
use super::{Other, Party, Reporter, Security, encode_parties};

/// Labels of the TCP series.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Which half this is.
    pub reporter: Reporter,
    /// The caller.
    pub source: Party,
    /// The callee.
    pub destination: Party,
    /// `name.namespace`; `None` when no Service was addressed.
    pub service: Option<Arc<str>>,
    /// How the bytes travel.
    pub security: Security,
}

impl EncodeLabelSet for TcpLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Self {
            reporter,
            source,
            destination,
            service,
            security,
        } = self;
        encode_parties(*reporter, source, destination, service.as_deref(), encoder)?;
        ("security", *security).encode(encoder.encode_label())
    }
}

const NAMES: &[&str] = &[
    "source_workload",
    "source_namespace",
    "source_principal",
    "destination_workload",
    "destination_namespace",
    "destination_principal",
    "destination_service",
    "security",
];
const FAILED_NAMES: &[&str] = &[
    "source_workload",
    "source_namespace",
    "source_principal",
    "destination_workload",
    "destination_namespace",
    "destination_principal",
    "destination_service",
    "security",
    "reason",
];

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FailedLabels {
    connection: TcpLabels,
    error: ProxyError,
}

impl EncodeLabelSet for FailedLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Self { connection, error } = self;
        connection.encode(encoder)?;
        ("reason", error.name()).encode(encoder.encode_label())
    }
}

/// Bytes of one direction of one connection, counted into its series as well.
#[derive(Debug, Default)]
pub struct Meter {
    series: Counter,
    own: AtomicU64,
}

impl Meter {
    /// A meter that counts into `series`.
    pub fn new(series: Counter) -> Self {
        Self {
            series,
            own: AtomicU64::new(0),
        }
    }

    /// Counts `bytes`.
    pub fn add(&self, bytes: usize) {
        self.series.inc_by(bytes as u64);
        self.own.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes of this connection.
    pub fn get(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }
}

/// An established connection: counted as opened when made and as closed when dropped.
#[derive(Debug)]
pub struct OpenConnection {
    /// Bytes from the source to the destination.
    pub sent: Meter,
    /// Bytes from the destination to the source.
    pub received: Meter,
    // Keeps the series, too.
    series: Arc<TcpSeries>,
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.series.closed.inc();
    }
}

/// What is counted for one label set.
#[derive(Debug, Default)]
struct TcpSeries {
    opened: Counter,
    closed: Counter,
    sent: Counter,
    received: Counter,
}

impl Metric for TcpSeries {}
impl Metric for Counter {}

/// All TCP series.
#[derive(Debug)]
pub(super) struct Tcp {
    connections: Series<TcpLabels, TcpSeries>,
    failed: Series<FailedLabels, Counter>,
}

impl Tcp {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            connections: Series::new(bounds.series, bounds.expiry, |_| TcpSeries::default()),
            failed: Series::new(bounds.series, bounds.expiry, |_| Counter::default()),
        }
    }

    pub(super) fn open(&self, labels: &TcpLabels, now: Instant) -> OpenConnection {
        let series = self
            .connections
            .get(labels, labels.reporter, now, TcpSeries::default);
        series.opened.inc();
        OpenConnection {
            sent: Meter::new(series.sent.clone()),
            received: Meter::new(series.received.clone()),
            series,
        }
    }

    pub(super) fn fail(&self, labels: &TcpLabels, error: ProxyError, now: Instant) {
        let labels = FailedLabels {
            connection: labels.clone(),
            error,
        };
        let reporter = labels.connection.reporter;
        self.failed
            .get(&labels, reporter, now, Counter::default)
            .inc();
    }

    pub(super) fn sweep(&self, now: Instant) {
        self.connections.sweep(now);
        self.failed.sweep(now);
    }
}

/// A family of TCP series: name, help, what of it.
type Column = (&'static str, &'static str, fn(&TcpSeries) -> &Counter);

const COLUMNS: [Column; 4] = [
    ("tcp_connections_opened", "Connections established", |s| {
        &s.opened
    }),
    (
        "tcp_connections_closed",
        "Established connections that have ended",
        |s| &s.closed,
    ),
    (
        "tcp_sent_bytes",
        "Bytes from the source to the destination",
        |s| &s.sent,
    ),
    (
        "tcp_received_bytes",
        "Bytes from the destination to the source",
        |s| &s.received,
    ),
];

impl Collector for Tcp {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.sweep(Instant::now());
        let all = self.connections.all();
        for (name, help, value) in COLUMNS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in &all {
                value(series).encode(family.encode_family(labels)?)?;
            }
            for reporter in Reporter::ALL {
                let other = self.connections.other(reporter);
                encode_other(&mut family, reporter, NAMES, value(&other))?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "tcp_connections_failed",
            "Connections refused or not established, by reason",
            None,
            MetricType::Counter,
        )?;
        for (labels, count) in &self.failed.all() {
            count.encode(family.encode_family(labels)?)?;
        }
        for reporter in Reporter::ALL {
            let other = self.failed.other(reporter);
            encode_other(&mut family, reporter, FAILED_NAMES, &other)?;
        }
        Ok(())
    }
}

fn encode_other(
    family: &mut MetricEncoder<'_>,
    reporter: Reporter,
    names: &'static [&'static str],
    count: &Counter,
) -> fmt::Result {
    if count.get() == 0 {
        return Ok(());
    }
    let labels = Other { reporter, names };
    count.encode(family.encode_family(&labels)?)
}
