//! The circuit breaker of one endpoint.
//!
//! Closed: outcomes are judged. Failures in a row eject; so does a success rate below the threshold, over
//! the window or over the last [`RECENT`] requests in it, since after a long time of health an average
//! over the window is slow to notice.
//!
//! Ejected: nothing is sent until the ejection is over *and* the set has served a hundred times the requests
//! that the endpoint got since its last ejection, which keeps its share below 1 % at any rate
//! (at most [`PATIENCE`] longer: below a request in three seconds a share means nothing). Then one
//! real request at a time is sent to it. [`PROBATION`] successes in a row close the breaker, so that an
//! endpoint that fails half its requests is let back once in 32 attempts; a failure ejects for twice as
//! long. A request that tries an endpoint and hears nothing for the longest ejection makes room
//! for another.
//!
//! The gate is one atomic, read for every pick; the rest is behind a lock that is held for a few dozen
//! instructions when an answer is recorded.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;

use super::policy::Breaker;

/// Requests over which a fall of the success rate is noticed at once.
const RECENT: u32 = 20;
/// Successes in a row that close the breaker.
const PROBATION: u32 = 5;
/// Requests of the set for one that reaches an ejected endpoint.
const SHARE: u64 = 100;
/// How much longer than its ejection an endpoint waits for [`SHARE`].
const PATIENCE: Duration = Duration::from_secs(300);
/// Of the first ejection only so many failures count towards [`SHARE`], so that an endpoint that failed for
/// a moment is back within 10 s at a hundred requests a second.
const FIRST_DEBT: u32 = 5;
/// The same for those that follow.
const DEBT: u32 = 20;
/// Ejections are shortened by up to this share, so that the nodes do not return at the same time.
const JITTER: f64 = 0.25;
const BUCKETS: u64 = 10;

/// An endpoint's breaker.
#[derive(Debug, Default)]
pub(super) struct Circuit {
    /// 0: closed. Otherwise the time before which nothing is sent.
    gate: AtomicU64,
    /// Requests of the set before which nothing is sent.
    due: AtomicU64,
    history: Mutex<History>,
}

#[derive(Debug, Default)]
struct History {
    consecutive: u32,
    buckets: [Bucket; BUCKETS as usize],
    /// The last outcomes, newest lowest; a set bit is a failure.
    recent: u64,
    /// Ejections since it was last healthy for a while.
    ejections: u32,
    closed_at: u64,
    /// Successes of this probation.
    passed: u32,
    /// Requests that reached it since the ejection.
    reached: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    epoch: u64,
    ok: u32,
    failed: u32,
}

/// The right to try an ejected endpoint with one request.
#[derive(Debug)]
pub(super) struct Probe {
    lease: u64,
}

/// What a set knows when an outcome is recorded.
pub(super) struct Now {
    pub(super) micros: u64,
    /// Picks of the set so far.
    pub(super) picks: u64,
}

/// What an outcome changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Ejected,
    Closed,
}

impl Circuit {
    pub(super) fn is_closed(&self) -> bool {
        self.gate.load(Ordering::Relaxed) == 0
    }

    /// When the endpoint may be tried again, in microseconds; `None` while closed.
    pub(super) fn ejected_until(&self) -> Option<u64> {
        match self.gate.load(Ordering::Relaxed) {
            0 => None,
            until => Some(until),
        }
    }

    /// Takes the right to try the endpoint, if it is due and no one else has it.
    pub(super) fn try_probe(&self, breaker: &Breaker, now: &Now) -> Option<Probe> {
        let until = self.gate.load(Ordering::Relaxed);
        if until == 0 || now.micros < until {
            return None;
        }
        let waited = now.micros - until >= micros(PATIENCE);
        if now.picks < self.due.load(Ordering::Relaxed) && !waited {
            return None;
        }
        let lease = now.micros + micros(breaker.max_ejection).max(1);
        self.gate
            .compare_exchange(until, lease, Ordering::Relaxed, Ordering::Relaxed)
            .ok()
            .map(|_| Probe { lease })
    }

    /// Gives back the right: the request ended without an answer, and so without a verdict. It counts as
    /// one that reached the endpoint.
    pub(super) fn abandon(&self, probe: &Probe, now: &Now) {
        let mut history = self.history.lock();
        if self.gate.load(Ordering::Relaxed) != probe.lease {
            return;
        }
        history.reached += 1;
        self.due.store(now.picks + SHARE, Ordering::Relaxed);
        // Past, yet not closed; patience begins anew.
        self.gate.store(now.micros.max(1), Ordering::Relaxed);
    }

    /// Judges an outcome. `eject` is asked whether one more may be ejected and must then call what it is
    /// given, under the lock that guards the number of those ejected.
    pub(super) fn record(
        &self,
        breaker: &Breaker,
        success: bool,
        probe: Option<&Probe>,
        now: &Now,
        eject: impl FnOnce(&dyn Fn()) -> bool,
    ) -> Change {
        let mut history = self.history.lock();
        let gate = self.gate.load(Ordering::Relaxed);
        if gate == 0 {
            history.count(breaker, success, now.micros);
            if success || !history.is_bad(breaker) {
                return Change::None;
            }
            let again = history.ejections > 0
                && now.micros - history.closed_at.min(now.micros)
                    < micros(breaker.max_ejection.max(breaker.window) * 2);
            let ejections = if again { history.ejections + 1 } else { 1 };
            let until = now.micros + ejection(breaker, ejections);
            if !eject(&|| self.gate.store(until, Ordering::Relaxed)) {
                return Change::None;
            }
            let debt = history.total().min(if again { DEBT } else { FIRST_DEBT });
            self.due
                .store(now.picks + SHARE * u64::from(debt), Ordering::Relaxed);
            *history = History {
                ejections,
                ..History::default()
            };
            return Change::Ejected;
        }
        // What was sent before the ejection says nothing new; nor does a probe whose time is over.
        if probe.is_none_or(|probe| probe.lease != gate) {
            return Change::None;
        }
        history.reached += 1;
        if success {
            history.passed += 1;
            if history.passed >= PROBATION {
                *history = History {
                    ejections: history.ejections,
                    closed_at: now.micros,
                    ..History::default()
                };
                self.gate.store(0, Ordering::Relaxed);
                return Change::Closed;
            }
            self.due.store(0, Ordering::Relaxed);
            self.gate.store(now.micros.max(1), Ordering::Relaxed);
        } else {
            let reached = history.reached.min(DEBT);
            let ejections = history.ejections + 1;
            *history = History {
                ejections,
                ..History::default()
            };
            self.due
                .store(now.picks + SHARE * u64::from(reached), Ordering::Relaxed);
            self.gate
                .store(now.micros + ejection(breaker, ejections), Ordering::Relaxed);
        }
        Change::None
    }
}

impl History {
    fn count(&mut self, breaker: &Breaker, success: bool, now: u64) {
        let epoch = now / (micros(breaker.window) / BUCKETS).max(1);
        // Those of before the window stay out of every sum.
        for bucket in &mut self.buckets {
            // Later ones are of another length of window.
            if bucket.epoch + BUCKETS <= epoch || bucket.epoch > epoch {
                *bucket = Bucket::default();
            }
        }
        let bucket = &mut self.buckets[(epoch % BUCKETS) as usize];
        bucket.epoch = epoch;
        self.recent <<= 1;
        if success {
            bucket.ok += 1;
            self.consecutive = 0;
        } else {
            bucket.failed += 1;
            self.consecutive += 1;
            self.recent |= 1;
        }
    }

    fn total(&self) -> u32 {
        self.buckets.iter().map(|b| b.ok + b.failed).sum()
    }

    fn is_bad(&self, breaker: &Breaker) -> bool {
        if breaker.consecutive_failures > 0 && self.consecutive >= breaker.consecutive_failures {
            return true;
        }
        let Some(min) = breaker.min_success_percent else {
            return false;
        };
        let below = |failed: u32, total: u32| {
            u64::from(total - failed) * 100 < u64::from(min) * u64::from(total)
        };
        let total = self.total();
        if total < breaker.min_requests {
            return false;
        }
        let failed = self.buckets.iter().map(|b| b.failed).sum();
        if below(failed, total) {
            return true;
        }
        let recent = RECENT.max(breaker.min_requests);
        if recent > u64::BITS || total < recent {
            return false;
        }
        below((self.recent << (u64::BITS - recent)).count_ones(), recent)
    }
}

/// How long the `ejections`th ejection in a row lasts, in microseconds.
fn ejection(breaker: &Breaker, ejections: u32) -> u64 {
    let doubled = breaker
        .base_ejection
        .checked_mul(1 << (ejections - 1).min(30))
        .unwrap_or(breaker.max_ejection)
        .min(breaker.max_ejection);
    micros(doubled.mul_f64(1.0 - JITTER * rand::rng().random::<f64>())).max(1)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests;
