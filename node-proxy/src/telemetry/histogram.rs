//! Histograms with fixed bounds and atomic buckets: recording takes two additions and no lock, where
//! prometheus-client's `Histogram` takes a mutex.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

/// Upper bounds of durations, in microseconds: 0.5 ms to 60 s.
pub(super) const DURATIONS: [u64; 16] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// Upper bounds of sizes, in bytes: powers of 4 from 64 to 64 MiB. Empty bodies are in a bucket of their own.
pub(super) const SIZES: [u64; 12] = [
    0,
    1 << 6,
    1 << 8,
    1 << 10,
    1 << 12,
    1 << 14,
    1 << 16,
    1 << 18,
    1 << 20,
    1 << 22,
    1 << 24,
    1 << 26,
];

/// Durations, exposed in seconds.
#[derive(Debug)]
pub(super) struct Durations(Buckets<{ DURATIONS.len() + 1 }>);

/// Sizes, in bytes.
#[derive(Debug)]
pub(super) struct Sizes(Buckets<{ SIZES.len() + 1 }>);

/// One bucket for each bound, and one for what exceeds the last.
#[derive(Debug)]
struct Buckets<const N: usize> {
    counts: [AtomicU64; N],
    sum: AtomicU64,
}

impl Default for Durations {
    fn default() -> Self {
        Self(Buckets::new())
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self(Buckets::new())
    }
}

impl Durations {
    /// Exact to the microsecond: their sum then fits 64 bits for as long as anybody waits.
    pub(super) fn record(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        // What is a fraction over a bound is not within it.
        let exceeds = u64::from(!duration.subsec_nanos().is_multiple_of(1_000));
        let bucket = DURATIONS.partition_point(|bound| *bound < micros.saturating_add(exceeds));
        self.0.record(bucket, micros);
    }

    pub(super) fn is_empty(&self) -> bool {
        let count = |c: &AtomicU64| c.load(Ordering::Relaxed);
        self.0.counts.iter().all(|c| count(c) == 0)
    }

    pub(super) fn encode(&self, encoder: MetricEncoder<'_>) -> std::fmt::Result {
        self.0.encode(encoder, &DURATIONS, 1e6)
    }
}

impl Sizes {
    pub(super) fn record(&self, bytes: u64) {
        let bucket = SIZES.partition_point(|bound| *bound < bytes);
        self.0.record(bucket, bytes);
    }

    pub(super) fn encode(&self, encoder: MetricEncoder<'_>) -> std::fmt::Result {
        self.0.encode(encoder, &SIZES, 1.0)
    }
}

impl<const N: usize> Buckets<N> {
    fn new() -> Self {
        Self {
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            sum: AtomicU64::new(0),
        }
    }

    fn record(&self, bucket: usize, value: u64) {
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    fn encode(
        &self,
        mut encoder: MetricEncoder<'_>,
        bounds: &[u64],
        unit: f64,
    ) -> std::fmt::Result {
        let counts: [u64; N] = std::array::from_fn(|i| self.counts[i].load(Ordering::Relaxed));
        let upper = |i: usize| {
            bounds
                .get(i)
                .map_or(f64::INFINITY, |bound| *bound as f64 / unit)
        };
        // The encoder adds the buckets up.
        let buckets: [(f64, u64); N] = std::array::from_fn(|i| (upper(i), counts[i]));
        let sum = self.sum.load(Ordering::Relaxed) as f64 / unit;
        encoder.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
    }
}
