//! Metrics of connections, requests and tunnels, the access log, and traces.
//!
//! Metric names and labels are documented in `docs/reference/metrics.md`. Label sets are bounded by
//! construction: workloads, Services, routes and reasons, never addresses, ports or paths; and their number
//! has a limit (see `series`).

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

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
mod histogram;
pub mod http;
mod series;
mod tcp;
pub mod trace;

pub use series::Bounds;
pub use tcp::{Meter, OpenConnection, TcpLabels};

/// Which half of a connection this series is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The caller's node.
    Source,
    /// The callee's node.
    Destination,
}

impl Reporter {
    /// Both.
    const ALL: [Reporter; 2] = [Reporter::Source, Reporter::Destination];
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

    /// A pod of the mesh, as the table has it.
    pub fn of(workload: &crate::table::Workload) -> Self {
        Self::meshed(&workload.owner, &workload.identity)
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

/// The labels that tell whose traffic a series is about.
fn encode_parties(
    reporter: Reporter,
    source: &Party,
    destination: &Party,
    service: Option<&str>,
    encoder: &mut LabelSetEncoder<'_>,
) -> fmt::Result {
    ("reporter", reporter).encode(encoder.encode_label())?;
    ("source_workload", source.workload()).encode(encoder.encode_label())?;
    ("source_namespace", source.namespace()).encode(encoder.encode_label())?;
    ("source_principal", source.principal()).encode(encoder.encode_label())?;
    ("destination_workload", destination.workload()).encode(encoder.encode_label())?;
    ("destination_namespace", destination.namespace()).encode(encoder.encode_label())?;
    ("destination_principal", destination.principal()).encode(encoder.encode_label())?;
    ("destination_service", service.unwrap_or(UNKNOWN)).encode(encoder.encode_label())
}

const UNKNOWN: &str = "unknown";

/// Labels of what exceeds the limit of a family: the reporter, and `other` for all else.
#[derive(Debug)]
struct Other {
    reporter: Reporter,
    names: &'static [&'static str],
}

impl EncodeLabelSet for Other {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self { reporter, names } = self;
        ("reporter", *reporter).encode(encoder.encode_label())?;
        for name in *names {
            (*name, "other").encode(encoder.encode_label())?;
        }
        Ok(())
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

/// All metrics of the process.
#[derive(Debug)]
pub struct Telemetry {
    registry: Mutex<Registry>,
    tcp: Arc<tcp::Tcp>,
    /// Requests.
    pub http: Arc<http::HttpTelemetry>,
    /// Traces of requests.
    pub tracer: trace::Tracer,
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
        Self::with(Bounds::default(), trace::Tracer::off())
    }

    /// As [`Self::new`], with other bounds for the number of series, and with traces.
    pub fn with(bounds: Bounds, tracer: trace::Tracer) -> Arc<Self> {
        let mut registry = Registry::with_prefix("warren");
        let telemetry = Self {
            tcp: Arc::new(tcp::Tcp::new(bounds)),
            http: http::HttpTelemetry::new(bounds),
            tracer,
            handshakes: Family::default(),
            tunnels: Family::default(),
            streams: Family::default(),
            plaintext_allowed: Family::default(),
            accept_errors: Family::default(),
            access_log_dropped: Counter::default(),
            registry: Mutex::new(Registry::default()),
        };
        let r = &mut registry;
        r.register_collector(Box::new(Arc::clone(&telemetry.tcp)));
        r.register_collector(Box::new(Arc::clone(&telemetry.http)));
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
        telemetry.tracer.register(r);
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
        self.tcp.open(labels, Instant::now())
    }

    /// Counts a connection that was refused or not established.
    pub fn fail(&self, labels: &TcpLabels, error: ProxyError) {
        self.tcp.fail(labels, error, Instant::now());
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
mod tests;
