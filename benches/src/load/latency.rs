//! Latencies of one run, kept whole: a run has at most some hundred thousand, and a histogram's
//! rounding would need explaining.

use std::time::Duration;

use super::Quantiles;

/// Durations in nanoseconds, saturating at some 4 s.
#[derive(Default)]
pub struct Latencies(Vec<u32>);

impl Latencies {
    /// Records one.
    pub fn push(&mut self, latency: Duration) {
        self.0
            .push(u32::try_from(latency.as_nanos()).unwrap_or(u32::MAX));
    }

    /// Takes over those of another task.
    pub fn merge(&mut self, mut other: Latencies) {
        self.0.append(&mut other.0);
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `None` without a single one.
    pub fn quantiles(mut self) -> Option<Quantiles> {
        if self.0.is_empty() {
            return None;
        }
        self.0.sort_unstable();
        let at = |q: f64| {
            // Nearest rank: the smallest value that at least q of all do not exceed.
            let rank = (q * self.0.len() as f64).ceil() as usize;
            f64::from(self.0[rank.clamp(1, self.0.len()) - 1]) / 1000.0
        };
        Some(Quantiles {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_rank_in_microseconds() {
        let mut latencies = Latencies::default();
        for us in (1..=100).rev() {
            latencies.push(Duration::from_micros(us));
        }
        let quantiles = latencies.quantiles().expect("100 values");
        assert_eq!(quantiles.p50, 50.0);
        assert_eq!(quantiles.p99, 99.0);
        assert_eq!(quantiles.p999, 100.0);
        assert_eq!(quantiles.max, 100.0);
    }

    #[test]
    fn none_without_values() {
        assert_eq!(Latencies::default().quantiles(), None);
    }
}
