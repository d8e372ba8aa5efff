//! Requests as OpenMetrics families.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeLabelValue, EncodeMetric,
    LabelSetEncoder, LabelValueEncoder, MetricEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::{
    HttpTelemetry, MethodClass, OutcomeKey, Protocol, RequestLabels, Totals, TotalsLabels,
};
use crate::telemetry::{Other, Reporter, UNKNOWN, encode_parties};

impl Collector for HttpTelemetry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.sweep(Instant::now());
        self.encode_requests(&mut encoder)?;
        let totals = self.totals.all();
        for family in &TOTALS {
            self.encode_totals(&mut encoder, family, &totals)?;
        }
        Ok(())
    }
}

impl HttpTelemetry {
    fn encode_requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = encoder.encode_descriptor(
            "http_requests",
            "Requests that have ended",
            None,
            MetricType::Counter,
        )?;
        for (request, meter) in self.meters.all() {
            for counted in meter.outcomes.read().iter() {
                let labels = CounterLabels {
                    request: &request,
                    outcome: counted.key,
                };
                counter(&counted.count, family.encode_family(&labels)?)?;
            }
        }
        for reporter in Reporter::ALL {
            let other = &self.budget.other[reporter as usize];
            if other.load(Ordering::Relaxed) > 0 {
                let names = REQUEST_NAMES;
                let labels = Other { reporter, names };
                counter(other, family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_totals(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        family: &Family,
        totals: &[(TotalsLabels, Arc<Totals>)],
    ) -> fmt::Result {
        let Family {
            name,
            help,
            metric_type,
            callers_only,
            encode,
        } = family;
        let mut family = encoder.encode_descriptor(name, help, None, *metric_type)?;
        let told = |reporter| !callers_only || reporter == Reporter::Source;
        for (labels, totals) in totals {
            if told(labels.reporter) {
                encode(totals, family.encode_family(labels)?)?;
            }
        }
        for reporter in Reporter::ALL {
            let other = self.totals.other(reporter);
            if told(reporter) && other.is_used() {
                let names = TOTALS_NAMES;
                encode(&other, family.encode_family(&Other { reporter, names })?)?;
            }
        }
        Ok(())
    }
}

/// One family of what [`Totals`] holds.
struct Family {
    name: &'static str,
    help: &'static str,
    metric_type: MetricType,
    /// Only the caller's node tries again.
    callers_only: bool,
    encode: fn(&Totals, MetricEncoder<'_>) -> fmt::Result,
}

const TOTALS: [Family; 7] = [
    Family {
        name: "http_requests_in_flight",
        help: "Requests that are being carried",
        metric_type: MetricType::Gauge,
        callers_only: false,
        encode: |t, e| ConstGauge::new(t.in_flight.load(Ordering::Relaxed)).encode(e),
    },
    Family {
        name: "http_request_duration_seconds",
        help: "From the request's headers to the end of the response",
        metric_type: MetricType::Histogram,
        callers_only: false,
        encode: |t, e| t.duration.encode(e),
    },
    Family {
        name: "http_response_duration_seconds",
        help: "From the response's headers to its end",
        metric_type: MetricType::Histogram,
        callers_only: false,
        encode: |t, e| t.response_duration.encode(e),
    },
    Family {
        name: "http_request_bytes",
        help: "Sizes of request bodies",
        metric_type: MetricType::Histogram,
        callers_only: false,
        encode: |t, e| t.request_bytes.encode(e),
    },
    Family {
        name: "http_response_bytes",
        help: "Sizes of response bodies",
        metric_type: MetricType::Histogram,
        callers_only: false,
        encode: |t, e| t.response_bytes.encode(e),
    },
    Family {
        name: "http_retries",
        help: "Tries after the first",
        metric_type: MetricType::Counter,
        callers_only: true,
        encode: |t, e| counter(&t.retries, e),
    },
    Family {
        name: "http_retry_budget_exhausted",
        help: "Retries that were due and not made, because the budget was used up",
        metric_type: MetricType::Counter,
        callers_only: true,
        encode: |t, e| counter(&t.retry_budget_exhausted, e),
    },
];

fn counter(count: &AtomicU64, encoder: MetricEncoder<'_>) -> fmt::Result {
    ConstCounter::new(count.load(Ordering::Relaxed)).encode(encoder)
}

struct CounterLabels<'a> {
    request: &'a RequestLabels,
    outcome: OutcomeKey,
}

/// In the order they are encoded in, after `reporter`.
const REQUEST_NAMES: &[&str] = &[
    "source_workload",
    "source_namespace",
    "source_principal",
    "destination_workload",
    "destination_namespace",
    "destination_principal",
    "destination_service",
    "route",
    "backend",
    "protocol",
    "security",
    "method",
    "status",
    "grpc_status",
    "response_flags",
];
const TOTALS_NAMES: &[&str] = &[
    "source_workload",
    "source_namespace",
    "destination_workload",
    "destination_namespace",
    "destination_service",
    "route",
];

impl EncodeLabelSet for CounterLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let RequestLabels {
            reporter,
            source,
            destination,
            service,
            route,
            backend,
            protocol,
            security,
        } = self.request;
        let OutcomeKey {
            method,
            status,
            grpc_status,
            error,
        } = self.outcome;
        encode_parties(*reporter, source, destination, service.as_deref(), encoder)?;
        ("route", route.as_deref().unwrap_or("")).encode(encoder.encode_label())?;
        ("backend", backend.as_deref().unwrap_or("")).encode(encoder.encode_label())?;
        ("protocol", *protocol).encode(encoder.encode_label())?;
        ("security", *security).encode(encoder.encode_label())?;
        ("method", method).encode(encoder.encode_label())?;
        ("status", u32::from(status)).encode(encoder.encode_label())?;
        match grpc_status {
            Some(code) => ("grpc_status", u32::from(code)).encode(encoder.encode_label())?,
            None => ("grpc_status", "").encode(encoder.encode_label())?,
        }
        ("response_flags", error.map_or("", |e| e.name())).encode(encoder.encode_label())
    }
}

impl EncodeLabelSet for TotalsLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Self {
            reporter,
            source_workload,
            source_namespace,
            destination_workload,
            destination_namespace,
            service,
            route,
        } = self;
        ("reporter", *reporter).encode(encoder.encode_label())?;
        (
            "source_workload",
            source_workload.as_deref().unwrap_or(UNKNOWN),
        )
            .encode(encoder.encode_label())?;
        ("source_namespace", source_namespace.as_str()).encode(encoder.encode_label())?;
        (
            "destination_workload",
            destination_workload.as_deref().unwrap_or(UNKNOWN),
        )
            .encode(encoder.encode_label())?;
        ("destination_namespace", destination_namespace.as_str()).encode(encoder.encode_label())?;
        ("destination_service", service.as_deref().unwrap_or(UNKNOWN))
            .encode(encoder.encode_label())?;
        ("route", route.as_deref().unwrap_or("")).encode(encoder.encode_label())
    }
}

impl EncodeLabelValue for Protocol {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.name().encode(encoder)
    }
}

impl EncodeLabelValue for MethodClass {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        let name = match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
            Self::Patch => "PATCH",
            Self::Options => "OPTIONS",
            Self::Other => "other",
        };
        name.encode(encoder)
    }
}
