//! The retry budget of a Service: retries are a share of its requests, so that an outage is not met with a
//! multiple of the load that caused it (GEP-3388; Finagle's `RetryBudget`).
//!
//! Requests and retries are counted in ten buckets of the interval. A floor lets a Service with few
//! requests retry at all. It is a floor and no bonus: what it grants counts like any other retry, so that
//! at a high rate the share alone decides.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::http::limits::{Gcra, nanos};
use crate::http::policy::{Budget, Rate};

const BUCKETS: usize = 10;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What a Service's budget is reckoned from. Lock-free: threads that ask at the same moment may overdraw it
/// by one each.
#[derive(Debug, Default)]
pub struct BudgetState {
    requests: Window,
    retries: Window,
    floor: Gcra,
}

impl BudgetState {
    /// Counts a request, not its retries.
    pub fn request(&self, budget: &Budget, now: Instant) {
        self.requests.add(epoch(budget, now));
    }

    /// Takes a retry. `false`: over budget.
    #[must_use]
    pub fn try_retry(&self, budget: &Budget, now: Instant) -> bool {
        let epoch = epoch(budget, now);
        let floor = Rate {
            requests: budget.floor,
            interval: budget.floor_interval,
            burst: budget.floor,
        };
        let allowed = self.floor.take(&floor, since_start(now)).is_ok() || {
            let share = self.requests.sum(epoch) * u64::from(budget.percent) / 100;
            self.retries.sum(epoch) < share
        };
        if allowed {
            self.retries.add(epoch);
        }
        allowed
    }

    /// Requests and retries of the budget's interval.
    pub fn counts(&self, budget: &Budget, now: Instant) -> (u64, u64) {
        let epoch = epoch(budget, now);
        (self.requests.sum(epoch), self.retries.sum(epoch))
    }
}

/// Number of the bucket that is filled now. A policy with another interval numbers them otherwise, and
/// begins with an empty window.
fn epoch(budget: &Budget, now: Instant) -> u32 {
    let width = (nanos(budget.interval) / BUCKETS as u64).max(1);
    // Far apart for different widths, so that the buckets of one are never taken for those of another.
    #[expect(clippy::cast_possible_truncation, reason = "epochs wrap")]
    let epoch = (since_start(now) / width)
        .wrapping_add(width.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
    epoch
}

fn since_start(now: Instant) -> u64 {
    nanos(now.saturating_duration_since(*START))
}

/// Counts of the last buckets; each with the epoch it belongs to in its upper half.
#[derive(Debug, Default)]
struct Window([AtomicU64; BUCKETS]);

impl Window {
    fn add(&self, epoch: u32) {
        let bucket = &self.0[epoch as usize % BUCKETS];
        let fresh = u64::from(epoch) << 32;
        // The closure never refuses.
        let _ = bucket.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |packed| {
            let (of, count) = unpack(packed);
            let count = if of == epoch { count } else { 0 };
            Some(fresh | u64::from(count.saturating_add(1)))
        });
    }

    fn sum(&self, epoch: u32) -> u64 {
        self.0
            .iter()
            .map(|bucket| unpack(bucket.load(Ordering::Relaxed)))
            .filter(|(of, _)| (epoch.wrapping_sub(*of) as usize) < BUCKETS)
            .map(|(_, count)| u64::from(count))
            .sum()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the lower half is the count"
)]
const fn unpack(packed: u64) -> (u32, u32) {
    ((packed >> 32) as u32, packed as u32)
}
