//! `warren_controller_*`.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Label `role`: proxy or agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Role {
    /// proxy or agent
    pub role: &'static str,
}

/// Label `type`: the last part of a resource's type URL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Type {
    /// Such as Workload.
    pub r#type: &'static str,
}

/// Labels of rejected pushes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Nack {
    /// Such as Workload.
    pub r#type: &'static str,
    /// Who rejected it.
    pub node: String,
}

/// Label `phase` of an enrolment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PhaseLabel {
    /// Such as enforced.
    pub phase: &'static str,
}

/// Label `kind` of a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// node or workload
    pub kind: &'static str,
}

/// Labels of a refused certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Refusal {
    /// node or workload
    pub kind: &'static str,
    /// Such as token.
    pub reason: &'static str,
}

/// Label `result`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// Such as ok.
    pub result: &'static str,
}

/// Label `kind` of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    /// Such as Pod.
    pub kind: String,
}

/// Label `node`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NodeLabel {
    /// Node name.
    pub node: String,
}

/// Every metric of the process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    /// Open discovery streams.
    pub streams: Family<Role, Gauge>,
    /// Responses sent.
    pub pushes: Family<Type, Counter>,
    /// Resources sent, removals included.
    pub pushed_resources: Family<Type, Counter>,
    /// Responses acknowledged.
    pub acks: Family<Type, Counter>,
    /// Responses rejected.
    pub nacks: Family<Nack, Counter>,
    /// Resources that exist.
    pub resources: Family<Type, Gauge>,
    /// Number of the newest snapshot.
    pub snapshot: Gauge,
    /// Pods by phase of enrolment.
    pub pods: Family<PhaseLabel, Gauge>,
    /// Pods whose agent failed to enrol them.
    pub enrolment_failures: Gauge,
    /// Whether a node's agent says it can enrol pods.
    pub node_ready: Family<NodeLabel, Gauge>,
    /// Reports taken.
    pub node_reports: Family<NodeLabel, Counter>,
    /// Certificates signed.
    pub issued: Family<Kind, Counter>,
    /// Certificates refused.
    pub refused: Family<Refusal, Counter>,
    /// TLS handshakes by result.
    pub handshakes: Family<Outcome, Counter>,
    /// Mistakes in manifests at this moment.
    pub manifest_mistakes: Gauge,
    /// Reloads of the manifests.
    pub reloads: Family<Outcome, Counter>,
    /// End of validity of the signing root.
    pub root_expiry: Gauge<f64, AtomicU64>,
    /// Roots in the trust bundle.
    pub trusted_roots: Gauge,
    /// Failed writes of the enrolment state.
    pub store_failures: Counter,
    /// Watches of the API server that failed.
    pub watch_failures: Family<KindLabel, Counter>,
    /// NetworkPolicies that do not hold between pods of the mesh; at the leader.
    pub network_policies: Gauge,
    /// Whether this replica writes status.
    pub leader: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::new(Mutex::new(Registry::with_prefix("warren_controller"))),
            streams: Family::default(),
            pushes: Family::default(),
            pushed_resources: Family::default(),
            acks: Family::default(),
            nacks: Family::default(),
            resources: Family::default(),
            snapshot: Gauge::default(),
            pods: Family::default(),
            enrolment_failures: Gauge::default(),
            node_ready: Family::default(),
            node_reports: Family::default(),
            issued: Family::default(),
            refused: Family::default(),
            handshakes: Family::default(),
            manifest_mistakes: Gauge::default(),
            reloads: Family::default(),
            root_expiry: Gauge::default(),
            trusted_roots: Gauge::default(),
            store_failures: Counter::default(),
            watch_failures: Family::default(),
            network_policies: Gauge::default(),
            leader: Gauge::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    /// The Prometheus text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if text::encode(&mut text, &self.registry.lock()).is_err() {
            tracing::error!("metrics could not be written; please report it");
        }
        text
    }

    fn register(&self) {
        let Self {
            registry,
            streams,
            pushes,
            pushed_resources,
            acks,
            nacks,
            resources,
            snapshot,
            pods,
            enrolment_failures,
            node_ready,
            node_reports,
            issued,
            refused,
            handshakes,
            manifest_mistakes,
            reloads,
            root_expiry,
            trusted_roots,
            store_failures,
            watch_failures,
            network_policies,
            leader,
        } = self;
        let mut r = registry.lock();
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "Version of the process", version);
        r.register("streams", "Open discovery streams", streams.clone());
        r.register("pushes", "Responses sent", pushes.clone());
        let help = "Resources sent, removals included";
        r.register("pushed_resources", help, pushed_resources.clone());
        r.register("acks", "Responses acknowledged by nodes", acks.clone());
        r.register("nacks", "Responses rejected by nodes", nacks.clone());
        r.register("resources", "Resources that exist", resources.clone());
        r.register(
            "snapshot",
            "Number of the newest snapshot",
            snapshot.clone(),
        );
        r.register("pods", "Pods by phase of enrolment", pods.clone());
        let help = "Pods whose agent reports that it failed to enrol them";
        r.register("enrolment_failures", help, enrolment_failures.clone());
        let help = "1 if the node's agent says it can enrol pods";
        r.register("node_ready", help, node_ready.clone());
        r.register(
            "node_reports",
            "Reports taken from agents",
            node_reports.clone(),
        );
        r.register("certificates_issued", "Certificates signed", issued.clone());
        r.register(
            "certificates_refused",
            "Certificates refused",
            refused.clone(),
        );
        r.register(
            "tls_handshakes",
            "TLS handshakes by result",
            handshakes.clone(),
        );
        let help = "Mistakes in manifests at this moment";
        r.register("manifest_mistakes", help, manifest_mistakes.clone());
        r.register(
            "manifest_reloads",
            "Readings of the manifests",
            reloads.clone(),
        );
        let help = "End of validity of the signing root, seconds since the epoch";
        r.register(
            "root_not_after_timestamp_seconds",
            help,
            root_expiry.clone(),
        );
        r.register(
            "trusted_roots",
            "Roots in the trust bundle",
            trusted_roots.clone(),
        );
        let help = "Writes of the enrolment state that failed";
        r.register("store_failures", help, store_failures.clone());
        let help = "Watches of the API server that failed and were taken up again";
        r.register("watch_failures", help, watch_failures.clone());
        let help = "NetworkPolicies that do not hold between pods of the mesh; at the leader";
        r.register("network_policies", help, network_policies.clone());
        let help = "1 if this replica writes status, taints and the trust bundle";
        r.register("leader", help, leader.clone());
    }
}
