//! What an operator sees of the certificates.

use std::sync::{Arc, Weak};
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::{Identities, State};

#[derive(Default)]
pub(super) struct Metrics {
    issues: Family<ResultLabel, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl Metrics {
    pub(super) fn issued(&self, result: &'static str) {
        self.issues.get_or_create(&ResultLabel { result }).inc();
    }
}

impl Identities {
    /// Adds the metrics of certificates to a registry whose prefix is `warren`.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        registry.register(
            "certificate_issues",
            "Requests for workload certificates by result",
            self.metrics.issues.clone(),
        );
        registry.register_collector(Box::new(Certificates(Arc::downgrade(self))));
    }
}

/// Read when asked for, because a certificate expires without anybody doing anything.
#[derive(Debug)]
struct Certificates(Weak<Identities>);

impl Collector for Certificates {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(all) = self.0.upgrade() else {
            return Ok(());
        };
        let wanted: Vec<_> = all.wanted.lock().keys().cloned().collect();
        let states: Vec<State> = wanted.iter().map(|identity| all.state(identity)).collect();

        let gauge = ConstGauge::<i64>::new(0);
        let mut family = encoder.encode_descriptor(
            "certificates",
            "Workload certificates of this node by state",
            None,
            gauge.metric_type(),
        )?;
        for state in State::ALL {
            let count = states.iter().filter(|s| **s == state).count() as i64;
            ConstGauge::new(count).encode(family.encode_family(&[("state", state.name())])?)?;
        }

        let mut family = encoder.encode_descriptor(
            "certificate_expiry_timestamp_seconds",
            "When the certificate of an identity ends, in seconds since the epoch",
            None,
            gauge.metric_type(),
        )?;
        for identity in &wanted {
            if let Some(held) = all.get(identity) {
                let labels = [("identity", identity.as_str())];
                ConstGauge::new(unix(held.not_after)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// Seconds since the epoch.
pub(super) fn unix(time: SystemTime) -> i64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identities").finish_non_exhaustive()
    }
}
