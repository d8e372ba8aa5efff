//! What an operator sees of discovery.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use crate::table::{Kind, Table};

pub(super) struct Metrics {
    connected: Gauge,
    messages: Family<MessageLabels, Counter>,
    reconnects: Counter,
    ever_opened: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MessageLabels {
    r#type: &'static str,
    result: &'static str,
}

impl Metrics {
    /// Adds the metrics to a registry whose prefix is `warren`.
    pub(super) fn register(registry: &mut Registry, table: &Arc<Table>) -> Self {
        let metrics = Self {
            connected: Gauge::default(),
            messages: Family::default(),
            reconnects: Counter::default(),
            ever_opened: false,
        };
        registry.register(
            "xds_connected",
            "Whether a discovery stream to the controller is open",
            metrics.connected.clone(),
        );
        registry.register(
            "xds_messages",
            "Responses of the controller by type and whether all of their resources were valid",
            metrics.messages.clone(),
        );
        registry.register(
            "xds_reconnects",
            "Discovery streams opened after the first",
            metrics.reconnects.clone(),
        );
        registry.register_collector(Box::new(Resources(Arc::clone(table))));
        metrics
    }

    pub(super) fn message(&self, type_url: &str, valid: bool) {
        let labels = MessageLabels {
            r#type: Kind::of(type_url).map_or("unknown", Kind::name),
            result: if valid { "ack" } else { "nack" },
        };
        self.messages.get_or_create(&labels).inc();
    }

    pub(super) fn opened(&mut self) {
        self.connected.set(1);
        if std::mem::replace(&mut self.ever_opened, true) {
            self.reconnects.inc();
        }
    }

    pub(super) fn closed(&self) {
        self.connected.set(0);
    }
}

/// Resources held, counted when asked for.
struct Resources(Arc<Table>);

impl std::fmt::Debug for Resources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resources")
    }
}

impl Collector for Resources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "xds_resources",
            "Resources held, by type",
            None,
            ConstGauge::<i64>::new(0).metric_type(),
        )?;
        for kind in Kind::ALL {
            let count = self.0.count(kind);
            let labels = [("type", kind.name())];
            ConstGauge::new(count as i64).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
