//! The accounts of the pods of this node as metrics, read when they are asked for: the series of a pod
//! end with the pod.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::budget::Resource;
use crate::pods::Pods;

/// Encodes the accounts of all pods.
#[derive(Debug)]
pub struct Budgets(pub Arc<Pods>);

impl Collector for Budgets {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let accounts: Vec<_> = self
            .0
            .all()
            .into_iter()
            .map(|pod| Arc::clone(&pod.account))
            .collect();
        let labels = |account: &crate::budget::Account, resource: Resource| {
            [
                ("namespace", account.namespace().to_string()),
                ("pod", account.pod().to_string()),
                ("resource", resource.name().to_owned()),
            ]
        };
        let number = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let each = || {
            accounts
                .iter()
                .flat_map(|a| Resource::ALL.map(|resource| (a, resource)))
        };

        let gauge = ConstGauge::new(0i64).metric_type();
        let mut used =
            encoder.encode_descriptor("workload_used", "What a pod consumes now", None, gauge)?;
        for (account, resource) in each() {
            let labels = labels(account, resource);
            let family = used.encode_family(&labels)?;
            ConstGauge::new(number(account.used(resource))).encode(family)?;
        }
        let mut limit = encoder.encode_descriptor(
            "workload_limit",
            "The bound of what a pod may consume",
            None,
            gauge,
        )?;
        for (account, resource) in each() {
            let labels = labels(account, resource);
            let family = limit.encode_family(&labels)?;
            ConstGauge::new(number(account.limit(resource))).encode(family)?;
        }
        let counter = ConstCounter::new(0u64).metric_type();
        let mut refusals = encoder.encode_descriptor(
            "workload_refusals",
            "How often a pod met its bound",
            None,
            counter,
        )?;
        for (account, resource) in each() {
            let labels = labels(account, resource);
            let family = refusals.encode_family(&labels)?;
            ConstCounter::new(account.refused(resource)).encode(family)?;
        }
        let mut malformed = encoder.encode_descriptor(
            "workload_malformed",
            "What a pod sent that is no valid HTTP or an attack, by reason",
            None,
            counter,
        )?;
        for account in &accounts {
            for (reason, count) in account.malformed_counts() {
                let labels = [
                    ("namespace", account.namespace().to_string()),
                    ("pod", account.pod().to_string()),
                    ("reason", reason.to_owned()),
                ];
                let family = malformed.encode_family(&labels)?;
                ConstCounter::new(count).encode(family)?;
            }
        }
        Ok(())
    }
}
