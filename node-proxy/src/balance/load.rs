//! How long an endpoint is expected to take: peak EWMA of latency (as Finagle's balancer), and a share of
//! failures that counts as latency.
//!
//! - A latency above the estimate replaces it (the peak), one below draws it down with time constant
//!   [`DECAY`]. Without samples it decays towards what is typical for the set, never below: an endpoint
//!   that was slow is tried again as one of many, not as the best. A slow endpoint whose estimate is
//!   a hundred times the typical one is drawn again after some 5 s, and one good answer brings it back.
//! - A failed answer does not lower the estimate, however fast it came. Failures are averaged with the same
//!   constant; at a share `f` of them an endpoint counts as `f` times [`FAILURE_PENALTY`] typical
//!   latencies slower. One failure moves the average by [`FAILURE_STEP`] at most, so that a service with
//!   one failure in a hundred does not lose an endpoint for seconds at each of them.
//! - A new endpoint is expected to be typical: neither flooded nor starved.
//! - cost = (latency + penalty) x (pending + 1).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Time constant of all averages. Linkerd's and Finagle's 10 s keep a recovered endpoint away for a minute.
pub(super) const DECAY: Duration = Duration::from_millis(1500);
/// An endpoint that only fails is expected to take this many typical latencies longer.
pub(super) const FAILURE_PENALTY: f32 = 100.0;
/// The largest change of the share of failures by one of them.
const FAILURE_STEP: f32 = 0.25;
/// Differences below this are noise of the proxy and its host; microseconds.
const FLOOR: f32 = 500.0;
/// Weight of one answer in what is typical.
const TYPICAL_WEIGHT: f32 = 1.0 / 32.0;

/// The estimates of one endpoint. All operations are lock-free.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Microseconds.
    latency: Average,
    /// 0 to 1.
    failures: Average,
}

impl Load {
    /// What the next request is expected to cost.
    pub(super) fn cost(&self, pending: usize, typical: f32, now: u64) -> f32 {
        let typical = typical.max(FLOOR);
        let expected =
            self.latency(typical, now).max(FLOOR) + self.failures(now) * FAILURE_PENALTY * typical;
        #[expect(clippy::cast_precision_loss, reason = "no one has 2^24 requests open")]
        let pending = pending as f32;
        expected * (pending + 1.0)
    }

    /// Expected latency in microseconds.
    pub(super) fn latency(&self, typical: f32, now: u64) -> f32 {
        let Some((value, age)) = self.latency.get(now) else {
            return typical;
        };
        if value > typical {
            typical + (value - typical) * kept(age)
        } else {
            value
        }
    }

    /// Share of failures, 0 to 1.
    pub(super) fn failures(&self, now: u64) -> f32 {
        self.failures
            .get(now)
            .filter(|(value, _)| *value > 0.0)
            .map_or(0.0, |(value, age)| value * kept(age))
    }

    /// Takes the latency of an answer into account. Of one that failed only a peak counts.
    pub(super) fn answered(&self, latency: Duration, failed: bool, now: u64) {
        let sample = latency.as_secs_f32() * 1e6;
        self.latency.update(now, |before| match before {
            None => (!failed).then_some(sample),
            Some((value, _)) if sample >= value => Some(sample),
            Some(_) if failed => None,
            Some((value, age)) => {
                let kept = kept(age);
                Some(sample * (1.0 - kept) + value * kept)
            }
        });
    }

    /// Takes success or failure into account.
    pub(super) fn judged(&self, failed: bool, now: u64) {
        self.failures.update(now, |before| {
            let (value, age) = before.unwrap_or((0.0, u64::MAX));
            let kept = kept(age);
            let decayed = value * kept;
            if failed {
                Some(decayed + ((1.0 - kept) * (1.0 - decayed)).min(FAILURE_STEP))
            } else {
                (value > 0.0).then_some(decayed)
            }
        });
    }
}

/// The typical latency of a set, in microseconds. Every answer moves it by 3 % at most when it is
/// slower: slow endpoints must not raise what others are measured by.
#[derive(Debug, Default)]
pub(super) struct Typical(AtomicU32);

impl Typical {
    /// 0: not known yet.
    pub(super) fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Takes a successful answer into account.
    pub(super) fn answered(&self, latency: Duration) {
        let sample = latency.as_secs_f32() * 1e6;
        // A lost update of another thread is one sample of many.
        let before = self.get();
        let after = if before > 0.0 {
            before + (sample.min(2.0 * before) - before) * TYPICAL_WEIGHT
        } else {
            sample.max(1.0)
        };
        self.0.store(after.to_bits(), Ordering::Relaxed);
    }
}

/// What is left of a value after `age` microseconds.
fn kept(age: u64) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "long ages leave nothing")]
    let age = age as f32;
    (-age / (DECAY.as_secs_f32() * 1e6)).exp()
}

/// A value and when it was set, in one atomic. The time is kept in ticks of 64 us and wraps after three
/// days; a value that was not touched for longer looks younger than it is until the next one.
#[derive(Debug, Default)]
struct Average(AtomicU64);

const TICK: u64 = 64;

impl Average {
    /// The value and its age in microseconds.
    fn get(&self, now: u64) -> Option<(f32, u64)> {
        Self::unpack(self.0.load(Ordering::Relaxed), now)
    }

    fn update(&self, now: u64, new: impl Fn(Option<(f32, u64)>) -> Option<f32>) {
        // `Err`: nothing to change.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |packed| {
                // At least a tick, so that samples in the same one count.
                let before = Self::unpack(packed, now).map(|(value, age)| (value, age.max(TICK)));
                new(before).map(|value| Self::pack(value, now))
            });
    }

    /// Bit 63, the sign of the value, is set: 0 is "no value".
    fn pack(value: f32, now: u64) -> u64 {
        let bits = value.max(0.0).to_bits() | SET;
        u64::from(bits) << 32 | u64::from(tick(now))
    }

    fn unpack(packed: u64, now: u64) -> Option<(f32, u64)> {
        let bits = (packed >> 32) as u32;
        if bits & SET == 0 {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the lower half is the tick"
        )]
        let age = tick(now).wrapping_sub(packed as u32);
        // Another thread's later sample: no age.
        let age = if age > u32::MAX / 2 { 0 } else { age };
        Some((f32::from_bits(bits & !SET), u64::from(age) * TICK))
    }
}

const SET: u32 = 1 << 31;

#[expect(clippy::cast_possible_truncation, reason = "ticks wrap")]
const fn tick(now: u64) -> u32 {
    (now / TICK) as u32
}
