//! Series of metrics that are bounded in number and end when they are no longer used.
//!
//! Prometheus-client's `Family` keeps what it has ever seen. A node meets new workloads for as long as it
//! lives, so the proxy keeps its own series of traffic: at most `limit` label sets; what exceeds them is
//! counted under `other`, so that sums stay right; a series ends when it has not been used for `expiry`.
//!
//! Invariants:
//! - a series that someone holds a handle on does not end, so nothing that is counted gets lost;
//! - looking a series up takes one shard's lock; using it takes none.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Reporter;

/// How many series there may be, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Most series of a counter or gauge, beside `other`.
    pub series: usize,
    /// Most label sets of histograms, beside `other`.
    pub histograms: usize,
    /// After so much time without use a series ends.
    pub expiry: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            series: 10_000,
            histograms: 1_000,
            expiry: Duration::from_secs(15 * 60),
        }
    }
}

/// Series by label set.
#[derive(Debug)]
pub(super) struct Series<L, M> {
    shards: [Mutex<HashMap<L, Entry<M>>>; SHARDS],
    hasher: RandomState,
    limit: usize,
    expiry: Duration,
    len: AtomicUsize,
    other: [Arc<M>; 2],
    epoch: Instant,
    swept: AtomicU64,
}

/// A metric that may have been used by someone who holds no handle on it any more.
pub(super) trait Metric {
    /// Whether it was used after `since`, as far as it knows itself.
    fn used_since(&self, _since: Instant) -> bool {
        false
    }
}

#[derive(Debug)]
struct Entry<M> {
    metric: Arc<M>,
    used: Instant,
}

/// Contention is one lookup a connection, so a few are enough.
const SHARDS: usize = 16;
/// A full map looks for what has ended at most that often.
const SWEEP_WHEN_FULL: Duration = Duration::from_secs(10);

impl<L: Hash + Eq + Clone, M: Metric> Series<L, M> {
    /// `other` makes the metric for what exceeds the limit, one for each reporter.
    pub(super) fn new(limit: usize, expiry: Duration, other: impl Fn(Reporter) -> M) -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
            limit,
            expiry,
            len: AtomicUsize::new(0),
            other: Reporter::ALL.map(|reporter| Arc::new(other(reporter))),
            epoch: Instant::now(),
            swept: AtomicU64::new(0),
        }
    }

    /// The series of these labels; the reporter's `other` if there are too many.
    pub(super) fn get(
        &self,
        labels: &L,
        reporter: Reporter,
        now: Instant,
        make: impl FnOnce() -> M,
    ) -> Arc<M> {
        let shard = self.shard(labels);
        if let Some(entry) = shard.lock().get_mut(labels) {
            entry.used = now;
            return Arc::clone(&entry.metric);
        }
        if self.len.load(Ordering::Relaxed) >= self.limit {
            self.sweep_if_due(now);
        }
        let mut shard = shard.lock();
        if let Some(entry) = shard.get_mut(labels) {
            entry.used = now;
            return Arc::clone(&entry.metric);
        }
        if !take(&self.len, self.limit) {
            return self.other(reporter);
        }
        let metric = Arc::new(make());
        let entry = Entry {
            metric: Arc::clone(&metric),
            used: now,
        };
        shard.insert(labels.clone(), entry);
        metric
    }

    /// What exceeds the limit.
    pub(super) fn other(&self, reporter: Reporter) -> Arc<M> {
        Arc::clone(&self.other[reporter as usize])
    }

    /// Ends what nobody holds and nobody has used for the expiry.
    pub(super) fn sweep(&self, now: Instant) {
        let Some(since) = now.checked_sub(self.expiry) else {
            return;
        };
        for shard in &self.shards {
            let mut shard = shard.lock();
            let due = |entry: &mut Entry<M>| {
                if Arc::strong_count(&entry.metric) > 1 {
                    entry.used = entry.used.max(now);
                }
                entry.used <= since && !entry.metric.used_since(since)
            };
            let due: Vec<L> = shard
                .iter_mut()
                .filter_map(|(labels, entry)| due(entry).then(|| labels.clone()))
                .collect();
            for labels in due {
                let Some(entry) = shard.remove(&labels) else {
                    continue;
                };
                // A weak handle may have become a strong one meanwhile.
                match Arc::try_unwrap(entry.metric) {
                    Ok(_) => {
                        self.len.fetch_sub(1, Ordering::Relaxed);
                    }
                    Err(metric) => {
                        shard.insert(labels, Entry { metric, used: now });
                    }
                }
            }
        }
    }

    /// All series, without `other`. Labels and handles are copied first: encoding holds no lock.
    pub(super) fn all(&self) -> Vec<(L, Arc<M>)> {
        let mut all = Vec::with_capacity(self.len.load(Ordering::Relaxed));
        for shard in &self.shards {
            let shard = shard.lock();
            all.extend(
                shard
                    .iter()
                    .map(|(labels, entry)| (labels.clone(), Arc::clone(&entry.metric))),
            );
        }
        all
    }

    fn shard(&self, labels: &L) -> &Mutex<HashMap<L, Entry<M>>> {
        // The high bits: the maps use the low ones.
        let hash = self.hasher.hash_one(labels) >> 60;
        &self.shards[hash as usize % SHARDS]
    }

    fn sweep_if_due(&self, now: Instant) {
        let now_ms = now.duration_since(self.epoch).as_millis() as u64;
        let before = self.swept.load(Ordering::Relaxed);
        let due =
            before == 0 || now_ms.saturating_sub(before) >= SWEEP_WHEN_FULL.as_millis() as u64;
        let won = || {
            let order = Ordering::Relaxed;
            self.swept
                .compare_exchange(before, now_ms.max(1), order, order)
                .is_ok()
        };
        if due && won() {
            self.sweep(now);
        }
    }
}

/// Raises a count unless it has reached its limit.
pub(super) fn take(count: &AtomicUsize, limit: usize) -> bool {
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < limit).then_some(n + 1)
        })
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Metric for AtomicU64 {}

    fn series(limit: usize) -> Series<u32, AtomicU64> {
        Series::new(limit, Duration::from_secs(900), |_| AtomicU64::new(0))
    }

    fn get(series: &Series<u32, AtomicU64>, labels: u32, now: Instant) -> Arc<AtomicU64> {
        series.get(&labels, Reporter::Source, now, || AtomicU64::new(0))
    }

    #[test]
    fn what_exceeds_the_limit_is_counted_as_other() {
        let series = series(2);
        let now = Instant::now();
        let first = get(&series, 1, now);
        get(&series, 2, now);
        let third = get(&series, 3, now);
        assert!(Arc::ptr_eq(&third, &series.other(Reporter::Source)));
        assert!(!Arc::ptr_eq(&third, &series.other(Reporter::Destination)));
        assert!(Arc::ptr_eq(&first, &get(&series, 1, now)));
        assert_eq!(series.all().len(), 2);
    }

    #[test]
    fn what_is_unused_ends_and_makes_room() {
        let series = series(2);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        get(&series, 1, start);
        let held = get(&series, 2, start);
        series.sweep(at(899));
        assert_eq!(series.all().len(), 2);
        series.sweep(at(900));
        let left: Vec<_> = series.all().into_iter().map(|(labels, _)| labels).collect();
        assert_eq!(left, [2], "held ones stay");
        drop(held);
        // The last sweep found it in use.
        series.sweep(at(1799));
        assert_eq!(series.all().len(), 1);
        series.sweep(at(1800));
        assert_eq!(series.all().len(), 0);
        for labels in 10..12 {
            let metric = get(&series, labels, at(1800));
            assert!(!Arc::ptr_eq(&metric, &series.other(Reporter::Source)));
        }
    }

    #[test]
    fn the_time_without_use_begins_when_the_handle_goes() {
        let series = series(2);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let held = get(&series, 1, start);
        series.sweep(at(500));
        drop(held);
        series.sweep(at(1399));
        assert_eq!(series.all().len(), 1);
        series.sweep(at(1400));
        assert_eq!(series.all().len(), 0);
    }

    #[test]
    fn a_full_map_makes_room_without_being_asked() {
        let series = series(1);
        let start = Instant::now();
        get(&series, 1, start);
        let later = start + Duration::from_secs(1000);
        let metric = get(&series, 2, later);
        assert!(!Arc::ptr_eq(&metric, &series.other(Reporter::Source)));
    }

    #[test]
    fn a_weak_handle_keeps_nothing() {
        let series = series(4);
        let start = Instant::now();
        let weak = Arc::downgrade(&get(&series, 1, start));
        series.sweep(start + Duration::from_secs(900));
        assert!(weak.upgrade().is_none());
    }
}
