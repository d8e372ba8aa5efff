//! Metrics of connections and tunnels, and the access log.
//!
//! Metric names and labels are documented in `docs/reference/metrics.md`. Label sets are bounded by
//! construction: workloads, Services and reasons, never addresses or ports.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use parking_lot::Mutex;
use prometheus_client::encoding::{
    EncodeLabel, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder,
};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub mod access_log;
pub mod budgets;
pub mod http;
pub mod trace;

/// Which half of a connection this series is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The caller's node.
    Source,
    /// The callee's node.
    Destination,
}

impl EncodeLabelValue for Reporter {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        })
    }
}

/// How the bytes travel between the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Security {
    /// Through a tunnel, or inside one proxy between two pods of known identity.
    MutualTls,
    /// As the app sent them.
    Plaintext,
}

impl EncodeLabelValue for Security {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Security::MutualTls => "mutual_tls",
            Security::Plaintext => "plaintext",
        })
    }
}

/// One end of a connection, as far as it is known. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Party {
    /// Controller of the pod (Deployment, ...), else the pod. `None` outside the mesh.
    pub workload: Option<Arc<str>>,
    /// What it has proved, or what its node knows of its own pod.
    pub identity: Option<Identity>,
}

impl Party {
    /// An end outside the mesh.
    pub fn unknown() -> Self {
        Self::default()
    }

    /// A pod of the mesh.
    pub fn meshed(owner: &Arc<str>, identity: &Identity) -> Self {
        Self {
            workload: Some(Arc::clone(owner)),
            identity: Some(identity.clone()),
        }
    }

    /// Label value.
    pub fn workload(&self) -> &str {
        self.workload.as_deref().unwrap_or(UNKNOWN)
    }

    /// Label value.
    pub fn namespace(&self) -> &str {
        self.identity.as_ref().map_or(UNKNOWN, Identity::namespace)
    }

    /// Label value: the SPIFFE URI.
    pub fn principal(&self) -> &str {
        self.identity.as_ref().map_or(UNKNOWN, Identity::as_str)
    }
}

const UNKNOWN: &str = "unknown";

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
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self {
            reporter,
            source,
            destination,
            service,
            security,
        } = self;
        ("reporter", *reporter).encode(encoder.encode_label())?;
        ("source_workload", source.workload()).encode(encoder.encode_label())?;
        ("source_namespace", source.namespace()).encode(encoder.encode_label())?;
        ("source_principal", source.principal()).encode(encoder.encode_label())?;
        ("destination_workload", destination.workload()).encode(encoder.encode_label())?;
        ("destination_namespace", destination.namespace()).encode(encoder.encode_label())?;
        ("destination_principal", destination.principal()).encode(encoder.encode_label())?;
        ("destination_service", service.as_deref().unwrap_or(UNKNOWN))
            .encode(encoder.encode_label())?;
        ("security", *security).encode(encoder.encode_label())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FailedLabels {
    connection: TcpLabels,
    reason: &'static str,
}

impl EncodeLabelSet for FailedLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self { connection, reason } = self;
        connection.encode(encoder)?;
        ("reason", *reason).encode(encoder.encode_label())
    }
}

/// Labels of handshakes: which side this node was, and how it ended (`ok`, `resumed` or a reason).
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandshakeLabels {
    /// `client` or `server`
    pub side: &'static str,
    /// `ok`, `resumed`, or the reason of a refusal
    pub result: &'static str,
}

/// Labels with only the side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SideLabels {
    /// `client` or `server`
    pub side: &'static str,
}

/// Labels with only a reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// See `docs/reference/metrics.md`.
    pub reason: &'static str,
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
    closed: Counter,
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.closed.inc();
    }
}

/// All metrics of the process.
#[derive(Debug)]
pub struct Telemetry {
    registry: Mutex<Registry>,
    opened: Family<TcpLabels, Counter>,
    closed: Family<TcpLabels, Counter>,
    sent: Family<TcpLabels, Counter>,
    received: Family<TcpLabels, Counter>,
    failed: Family<FailedLabels, Counter>,
    /// Handshakes of tunnels.
    pub handshakes: Family<HandshakeLabels, Counter>,
    /// Tunnels that are open.
    pub tunnels: Family<SideLabels, Gauge>,
    /// Streams in tunnels that are open.
    pub streams: Family<SideLabels, Gauge>,
    /// Plaintext between meshed pods that was let through, by reason.
    pub plaintext_allowed: Family<ReasonLabels, Counter>,
    /// Connections that could not be accepted.
    pub accept_errors: Family<ReasonLabels, Counter>,
    /// Lines of the access log that were dropped because the reader is too slow.
    pub access_log_dropped: Counter<u64, AtomicU64>,
}

impl Telemetry {
    /// Registers everything under the prefix `warren`.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("warren");
        let telemetry = Self {
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            failed: Family::default(),
            handshakes: Family::default(),
            tunnels: Family::default(),
            streams: Family::default(),
            plaintext_allowed: Family::default(),
            accept_errors: Family::default(),
            access_log_dropped: Counter::default(),
            registry: Mutex::new(Registry::default()),
        };
        let r = &mut registry;
        r.register(
            "tcp_connections_opened",
            "Connections established",
            telemetry.opened.clone(),
        );
        r.register(
            "tcp_connections_closed",
            "Established connections that have ended",
            telemetry.closed.clone(),
        );
        r.register(
            "tcp_connections_failed",
            "Connections refused or not established, by reason",
            telemetry.failed.clone(),
        );
        r.register(
            "tcp_sent_bytes",
            "Bytes from the source to the destination",
            telemetry.sent.clone(),
        );
        r.register(
            "tcp_received_bytes",
            "Bytes from the destination to the source",
            telemetry.received.clone(),
        );
        r.register(
            "tunnel_handshakes",
            "TLS handshakes of tunnels, by side and result",
            telemetry.handshakes.clone(),
        );
        r.register(
            "tunnels_open",
            "Tunnels that are open, by side",
            telemetry.tunnels.clone(),
        );
        r.register(
            "tunnel_streams_open",
            "Streams in tunnels that are open, by side",
            telemetry.streams.clone(),
        );
        r.register(
            "plaintext_allowed",
            "Plaintext connections between meshed pods that were let through, by reason",
            telemetry.plaintext_allowed.clone(),
        );
        r.register(
            "accept_errors",
            "Connections that could not be accepted, by reason",
            telemetry.accept_errors.clone(),
        );
        r.register(
            "access_log_dropped",
            "Access log lines dropped",
            telemetry.access_log_dropped.clone(),
        );
        r.register(
            "build",
            "Version of the proxy",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        Arc::new(Self {
            registry: Mutex::new(registry),
            ..telemetry
        })
    }

    /// Lets another module register its metrics.
    pub fn register<M>(&self, register: impl FnOnce(&mut Registry) -> M) -> M {
        register(&mut self.registry.lock())
    }

    /// The OpenMetrics text of everything.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, &self.registry.lock()).is_err() {
            // Writing to a String cannot fail; an encoder's own error would be a fault in a label type.
            let _ = writeln!(text, "# encoding failed");
        }
        text
    }

    /// Counts a connection as opened, and as closed when the result drops.
    pub fn open(&self, labels: &TcpLabels) -> OpenConnection {
        self.opened.get_or_create(labels).inc();
        OpenConnection {
            sent: Meter::new(self.sent.get_or_create(labels).clone()),
            received: Meter::new(self.received.get_or_create(labels).clone()),
            closed: self.closed.get_or_create(labels).clone(),
        }
    }

    /// Counts a connection that was refused or not established.
    pub fn fail(&self, labels: &TcpLabels, error: ProxyError) {
        let labels = FailedLabels {
            connection: labels.clone(),
            reason: error.name(),
        };
        self.failed.get_or_create(&labels).inc();
    }
}

/// Raises a gauge until dropped.
#[derive(Debug)]
pub struct GaugeGuard(Gauge);

impl GaugeGuard {
    /// Raises `gauge` by one.
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_counted_once_opened_and_once_closed() {
        let telemetry = Telemetry::new();
        let id = Identity::new("cluster.local", "demo", "client").unwrap();
        let source = Party::meshed(&"client".into(), &id);
        let labels = TcpLabels {
            reporter: Reporter::Source,
            source,
            destination: Party::unknown(),
            service: Some("web.demo".into()),
            security: Security::MutualTls,
        };
        let open = telemetry.open(&labels);
        open.sent.add(5);
        telemetry.fail(&labels, ProxyError::NoEndpoint);
        let before = telemetry.encode();
        drop(open);
        let after = telemetry.encode();
        let line = |text: &str, name: &str| {
            text.lines()
                .find(|l| l.starts_with(name) && l.contains(r#"source_workload="client""#))
                .map(str::to_owned)
        };
        assert!(
            line(&before, "warren_tcp_connections_opened_total")
                .unwrap()
                .ends_with(" 1")
        );
        assert!(
            line(&before, "warren_tcp_connections_closed_total")
                .unwrap()
                .ends_with(" 0")
        );
        assert!(
            line(&after, "warren_tcp_connections_closed_total")
                .unwrap()
                .ends_with(" 1")
        );
        assert!(
            line(&after, "warren_tcp_sent_bytes_total")
                .unwrap()
                .ends_with(" 5")
        );
        assert!(
            line(&after, "warren_tcp_connections_failed_total")
                .unwrap()
                .contains(r#"reason="no_endpoint""#)
        );
    }
}
