//! Rates: GCRA for all callers together and for each of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_api::identity::Identity;
use parking_lot::Mutex;

use crate::http::policy::{Rate, RateLimit};

/// Callers that are told apart. More than a node's callers of one pod can be; those beyond share a rate.
const MAX_CALLERS: usize = 4096;

/// What the callers of one pod's port used up. Lives on when the policy changes.
#[derive(Debug)]
pub struct RateLimiter {
    start: Instant,
    total: Gcra,
    /// Callers without an identity, and those for which there is no entry left.
    others: Gcra,
    callers: Mutex<HashMap<Identity, Arc<Gcra>>>,
}

/// Over the rate. Answered with 429 or `RESOURCE_EXHAUSTED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("over the rate limit")]
pub struct Limited {
    /// When a request would be let through.
    pub retry_after: Duration,
}

impl Limited {
    /// Value of `Retry-After`: whole seconds, at least 1.
    pub fn retry_after_seconds(&self) -> u64 {
        let whole = self.retry_after.as_secs();
        let more = u64::from(self.retry_after.subsec_nanos() > 0);
        (whole + more).max(1)
    }
}

/// What callers used up at one pod, by the Service they addressed.
#[derive(Debug, Default)]
pub struct Rates(Mutex<HashMap<Arc<str>, Arc<RateLimiter>>>);

impl Rates {
    /// That of one Service port. Only ports that exist are asked for, so there are few.
    pub fn of(&self, port: &Arc<str>, now: Instant) -> Arc<RateLimiter> {
        let mut limiters = self.0.lock();
        let limiter = limiters
            .entry(Arc::clone(port))
            .or_insert_with(|| Arc::new(RateLimiter::new(now)));
        Arc::clone(limiter)
    }
}

impl RateLimiter {
    /// Nothing used up. `now` is the earliest time it is asked about.
    pub fn new(now: Instant) -> Self {
        Self {
            start: now,
            total: Gcra::default(),
            others: Gcra::default(),
            callers: Mutex::default(),
        }
    }

    /// Takes a request into account, or refuses it; a refused one uses up nothing. `caller`: the verified
    /// identity, `None` for callers outside the mesh.
    pub fn check(
        &self,
        limit: &RateLimit,
        caller: Option<&Identity>,
        now: Instant,
    ) -> Result<(), Limited> {
        let now = nanos(now.saturating_duration_since(self.start));
        let own = limit.of(caller).map(|rate| (self.entry(caller, now), rate));
        if let Some((entry, rate)) = &own {
            entry.of(self).take(rate, now)?;
        }
        if let Some(rate) = &limit.total
            && let Err(limited) = self.total.take(rate, now)
        {
            if let Some((entry, rate)) = &own {
                entry.of(self).give_back(rate);
            }
            return Err(limited);
        }
        Ok(())
    }

    /// Takes back a request that passed here but went no further.
    pub fn give_back(&self, limit: &RateLimit, caller: Option<&Identity>, now: Instant) {
        let now = nanos(now.saturating_duration_since(self.start));
        if let Some(rate) = limit.of(caller) {
            self.entry(caller, now).of(self).give_back(&rate);
        }
        if let Some(rate) = &limit.total {
            self.total.give_back(rate);
        }
    }

    fn entry(&self, caller: Option<&Identity>, now: u64) -> Entry {
        let Some(caller) = caller else {
            return Entry::Others;
        };
        let mut callers = self.callers.lock();
        if let Some(entry) = callers.get(caller) {
            return Entry::Caller(Arc::clone(entry));
        }
        if callers.len() >= MAX_CALLERS {
            callers.retain(|_, entry| !entry.is_idle(now));
        }
        if callers.len() >= MAX_CALLERS {
            return Entry::Others;
        }
        let entry = Arc::default();
        callers.insert(caller.clone(), Arc::clone(&entry));
        Entry::Caller(entry)
    }

    /// Callers with an entry.
    pub fn callers(&self) -> usize {
        self.callers.lock().len()
    }
}

enum Entry {
    Caller(Arc<Gcra>),
    Others,
}

impl Entry {
    fn of<'a>(&'a self, limiter: &'a RateLimiter) -> &'a Gcra {
        match self {
            Self::Caller(entry) => entry,
            Self::Others => &limiter.others,
        }
    }
}

/// Nanoseconds after the limiter's start at which nothing would be used up: I.371's theoretical arrival
/// time.
#[derive(Debug, Default)]
pub(crate) struct Gcra(AtomicU64);

impl Gcra {
    /// `now`: nanoseconds on the same clock at each call.
    pub(crate) fn take(&self, rate: &Rate, now: u64) -> Result<(), Limited> {
        let Some(spacing) = spacing(rate) else {
            return Err(Limited {
                retry_after: rate.interval,
            });
        };
        let tolerance = spacing.saturating_mul(u64::from(rate.burst.max(1)));
        let most = now.saturating_add(tolerance);
        let mut wait = 0;
        let take = |full_at: u64| {
            // More than all is used up only by a slower rate that was in force before.
            let full_at = full_at.min(most);
            let next = full_at.max(now).saturating_add(spacing);
            wait = next.saturating_sub(most);
            Some(if wait == 0 { next } else { full_at })
        };
        // The closure never refuses.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        match wait {
            0 => Ok(()),
            wait => Err(Limited {
                retry_after: Duration::from_nanos(wait),
            }),
        }
    }

    fn give_back(&self, rate: &Rate) {
        if let Some(spacing) = spacing(rate) {
            let back = |full_at: u64| Some(full_at.saturating_sub(spacing));
            // The closure never refuses.
            let _ = self
                .0
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
        }
    }

    fn is_idle(&self, now: u64) -> bool {
        self.0.load(Ordering::Relaxed) <= now
    }
}

/// Time between two requests at the rate. `None`: no request at all.
fn spacing(rate: &Rate) -> Option<u64> {
    (rate.requests > 0).then(|| (nanos(rate.interval) / u64::from(rate.requests)).max(1))
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
