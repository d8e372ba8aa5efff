//! A pick: the way to an endpoint, and back with what became of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::Rng;

use super::breaker::{Change, Now, Probe};
use super::choose::{Candidates, Choice};
use super::policy::{Algorithm, Breaker};
use super::{Endpoint, Pending, PickContext, Shared, clock, hash};

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether the endpoint did what it is there for. A 4xx is a success, a 5xx, a connection that
    /// failed and a timeout are not.
    pub success: bool,
    /// From the start of the try to the answer's headers, or to the failure. Not to the end of the
    /// body: a stream may live for days.
    pub latency: Duration,
}

/// A chosen endpoint. Counts as open work until dropped, so it is kept until the answer's body has ended.
/// Dropped without [`Pick::record`]: the request was cancelled, nothing is learned but that.
#[derive(Debug)]
pub struct Pick {
    pending: Pending,
    breaker: Option<Breaker>,
    probe: Option<Probe>,
    answered: bool,
}

impl Pick {
    /// Where the endpoint listens.
    pub fn address(&self) -> SocketAddr {
        self.endpoint().address
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.pending.0
    }

    /// Whether the request tries an ejected endpoint.
    pub fn is_probe(&self) -> bool {
        self.probe.is_some()
    }

    /// The answer's headers are there, and whether it is a success is not known yet (gRPC tells with
    /// its trailers). [`Pick::record`] then takes no notice of the latency any more.
    pub fn answered(&mut self, latency: Duration, now: Instant) {
        self.learn_latency(latency, false, clock::micros(now));
    }

    /// What became of the request; at most once.
    pub fn record(&mut self, outcome: Outcome, now: Instant) {
        let now = clock::micros(now);
        let Outcome { success, latency } = outcome;
        if !self.answered {
            self.learn_latency(latency, !success, now);
        }
        self.endpoint().load.judged(!success, now);
        let (probe, breaker) = (self.probe.take(), self.breaker.take());
        let Some(breaker) = breaker else { return };
        let endpoint = self.endpoint();
        let Some(set) = endpoint.set.upgrade() else {
            return;
        };
        let at = Now {
            micros: now,
            picks: set.picks.load(Ordering::Relaxed),
        };
        let change = endpoint
            .circuit
            .record(&breaker, success, probe.as_ref(), &at, |eject| {
                set.try_eject(endpoint, &breaker, eject)
            });
        match change {
            Change::None => {}
            Change::Ejected => {
                tracing::info!(endpoint = %endpoint.address, "circuit breaker opened");
            }
            Change::Closed => {
                set.restored();
                tracing::info!(endpoint = %endpoint.address, "circuit breaker closed");
            }
        }
    }

    fn learn_latency(&mut self, latency: Duration, failed: bool, now: u64) {
        self.answered = true;
        let endpoint = self.endpoint();
        endpoint.load.answered(latency, failed, now);
        if !failed && let Some(set) = endpoint.set.upgrade() {
            set.typical.answered(latency);
        }
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        if let Some(probe) = self.probe.take()
            && let Some(set) = self.endpoint().set.upgrade()
        {
            let now = Now {
                micros: clock::micros(Instant::now()),
                picks: set.picks.load(Ordering::Relaxed),
            };
            self.endpoint().circuit.abandon(&probe, &now);
        }
    }
}

impl Shared {
    pub(super) fn pick(&self, context: &PickContext<'_>, rng: &mut impl Rng) -> Option<Pick> {
        let usable = self.usable.load();
        let family = usable.family(context.v6);
        let near = (context.local_only || family.hinted())
            .then(|| family.near(context.node, context.zone));
        let reach = match &near {
            Some(near) if context.local_only => &near.local[..],
            _ => family.all(),
        };
        let preferred = match &near {
            Some(near) if !context.local_only => &near.preferred[..],
            _ => &[],
        };
        let breaker = context.policy.breaker.as_ref();
        let search = Search {
            context,
            now: Now {
                micros: clock::micros(context.now),
                picks: breaker.map_or(0, |_| self.picks.fetch_add(1, Ordering::Relaxed) + 1),
            },
            breaker: breaker.filter(|_| self.ejected.load(Ordering::Relaxed) > 0),
            shared: self,
        };
        let (endpoint, probe) = search.run(reach, preferred, rng)?;
        Some(Pick {
            pending: Pending::new(endpoint),
            breaker: context.policy.breaker,
            probe,
            answered: false,
        })
    }

    /// Ejects an endpoint if its family may lose one more.
    fn try_eject(&self, endpoint: &Endpoint, breaker: &Breaker, eject: &dyn Fn()) -> bool {
        let _ejecting = self.ejecting.lock();
        let usable = self.usable.load();
        let all = usable.family(endpoint.address.is_ipv6()).all();
        let ejected = all.iter().filter(|e| !e.circuit.is_closed()).count();
        let is_used = all.iter().any(|e| std::ptr::eq(&raw const **e, endpoint));
        if !is_used || ejected >= breaker.allowed(all.len()) {
            return false;
        }
        eject();
        self.ejected.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn restored(&self) {
        let _ejecting = self.ejecting.lock();
        let ejected = self
            .usable
            .load()
            .endpoints()
            .filter(|e| !e.circuit.is_closed())
            .count();
        self.ejected.store(ejected, Ordering::Relaxed);
    }
}

/// One search for an endpoint.
struct Search<'a> {
    context: &'a PickContext<'a>,
    now: Now,
    /// `None` also where nothing is ejected.
    breaker: Option<&'a Breaker>,
    shared: &'a Shared,
}

impl Search<'_> {
    fn run<'e>(
        &self,
        reach: &'e [Arc<Endpoint>],
        preferred: &'e [Vec<Arc<Endpoint>>],
        rng: &mut impl Rng,
    ) -> Option<(&'e Arc<Endpoint>, Option<Probe>)> {
        let tried = self.context.tried;
        if let Some(session) = self.context.session
            && !tried.contains(&session)
            && let Some(endpoint) = reach.iter().find(|e| e.address == session)
            && self.is_open(endpoint)
        {
            return Some((endpoint, None));
        }
        let by_key =
            self.context.policy.algorithm == Algorithm::RingHash && self.context.hash.is_some();
        if let Some(breaker) = self.breaker
            && tried.is_empty()
            && !by_key
            && let Some((endpoint, probe)) = self.probe(breaker, reach.iter())
        {
            return Some((endpoint, Some(probe)));
        }
        for tier in preferred.iter().map(|tier| &tier[..]).chain([reach]) {
            let mut candidates = Candidates::untried(tier, tried);
            if by_key && let Some(found) = self.probe_by_key(&candidates) {
                return Some(found);
            }
            if self.breaker.is_some() {
                candidates = candidates.only(|e| self.is_open(e));
            }
            if let Some(endpoint) = self.choose(&candidates, rng) {
                return Some((endpoint, None));
            }
        }
        // Nothing is open. More ejected than the share allows of what can be reached: it is ignored.
        let breaker = self.breaker?;
        let ejected = reach.iter().filter(|e| !e.circuit.is_closed()).count();
        if ejected <= breaker.allowed(reach.len()) {
            return None;
        }
        let endpoint = self.choose(&Candidates::untried(reach, tried), rng)?;
        Some((endpoint, None))
    }

    fn is_open(&self, endpoint: &Endpoint) -> bool {
        self.breaker.is_none() || endpoint.circuit.is_closed()
    }

    fn probe<'e>(
        &self,
        breaker: &Breaker,
        endpoints: impl Iterator<Item = &'e Arc<Endpoint>>,
    ) -> Option<(&'e Arc<Endpoint>, Probe)> {
        endpoints
            .filter_map(|e| Some((e, e.circuit.try_probe(breaker, &self.now)?)))
            .next()
    }

    /// A key stays with its endpoint: an ejected one is tried only by a request whose key is its own.
    fn probe_by_key<'e>(
        &self,
        candidates: &Candidates<'e>,
    ) -> Option<(&'e Arc<Endpoint>, Option<Probe>)> {
        let (breaker, key) = (self.breaker?, self.context.hash?);
        if !self.context.tried.is_empty() {
            return None;
        }
        let own = candidates.iter().max_by_key(|e| hash::score(key, e.seed))?;
        let probe = own.circuit.try_probe(breaker, &self.now)?;
        Some((own, Some(probe)))
    }

    fn choose<'e>(
        &self,
        candidates: &Candidates<'e>,
        rng: &mut impl Rng,
    ) -> Option<&'e Arc<Endpoint>> {
        let policy = self.context.policy;
        let choice = Choice {
            algorithm: policy.algorithm,
            hash: self.context.hash,
            slow_start: policy.slow_start,
            typical: self.shared.typical.get(),
            now: self.now.micros,
        };
        let turn = || self.shared.turn.fetch_add(1, Ordering::Relaxed);
        choice.among(candidates, turn, rng)
    }
}
