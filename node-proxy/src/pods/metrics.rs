//! How many pods there are, and how many sockets are ready for them; read when asked for.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

use super::{Host, Pods};

/// Encodes both.
#[derive(Debug)]
pub struct PodsCollector {
    pods: Arc<Pods>,
    host: Arc<Host>,
}

impl PodsCollector {
    /// Of these.
    pub fn new(pods: &Arc<Pods>, host: &Arc<Host>) -> Self {
        Self {
            pods: Arc::clone(pods),
            host: Arc::clone(host),
        }
    }
}

impl Collector for PodsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let pods = self.pods.all();
        let gauge = ConstGauge::new(0i64).metric_type();
        let number = |value: usize| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        number(pods.len()).encode(encoder.encode_descriptor(
            "pods",
            "Enrolled pods of this node",
            None,
            gauge,
        )?)?;
        let help = "Sockets that are ready in all stocks, by address family";
        let mut available =
            encoder.encode_descriptor("broker_sockets_available", help, None, gauge)?;
        for (family, v6) in [("ipv4", false), ("ipv6", true)] {
            let stocks = pods.iter().map(|pod| &pod.stock).chain([&self.host.stock]);
            let sum = stocks.map(|stock| stock.available(v6)).sum();
            number(sum).encode(available.encode_family(&[("family", family)])?)?;
        }
        Ok(())
    }
}
