//! Endpoints of a Service port, and the choice among them.
//!
//! Everything known of an endpoint (open work, expected latency, failures, whether it is ejected) is shared
//! by all threads, by TCP and by HTTP, and lives as long as the endpoint does. Readers never wait: the set
//! is an immutable snapshot, estimates are atomics.
//!
//! A request goes to the endpoints nearest to it that can take it: those whose hints name its node, then
//! its zone, then all (KEP-2433, KEP-4444; as kube-proxy, hints count only if every endpoint has them).
//! `internalTrafficPolicy: Local` is no preference but a bound. Among them the policy's algorithm
//! chooses (`choose`), over estimates of latency (`load`), without the ejected (`breaker`).
//!
//! Never more than the policy's share is ejected; where the endpoints that can be reached are fewer than
//! those the share was taken of, and more of them are ejected than it allows, ejection is ignored.

mod breaker;
mod choose;
mod clock;
mod hash;
mod load;
mod near;
mod pick;
mod policy;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rand::Rng;
use serde::Serialize;

use breaker::Circuit;
use choose::{Candidates, Choice};
use load::{Load, Typical};
use near::Family;
pub use pick::{Outcome, Pick};
pub use policy::{Algorithm, Breaker, HashKey, Policy};

/// What an EndpointSlice says of one endpoint of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Where it listens.
    pub address: SocketAddr,
    /// May take new connections.
    pub ready: bool,
    /// Answers, ready or terminating.
    pub serving: bool,
    /// Is going away.
    pub terminating: bool,
    /// Node it runs on; empty if unknown.
    pub node: Arc<str>,
    /// Zone it runs in; empty if unknown.
    pub zone: Arc<str>,
    /// Zones whose callers should prefer it (`hints.forZones`).
    pub for_zones: Vec<Arc<str>>,
    /// Nodes whose callers should prefer it (`hints.forNodes`).
    pub for_nodes: Vec<Arc<str>>,
}

/// An endpoint and its load as this node sees it. Lives on across updates of the set.
#[derive(Debug)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    pending: AtomicUsize,
    load: Load,
    circuit: Circuit,
    /// Its part in rendezvous hashing.
    seed: u64,
    /// When it joined the set; `None` if the set began with it.
    since: Option<u64>,
    set: Weak<Shared>,
}

impl Endpoint {
    /// Connections and requests to it that are being opened or are open, from this node.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    /// What is known of it, for the config dump.
    pub fn snapshot(&self, now: Instant) -> EndpointSnapshot {
        let now = clock::micros(now);
        let typical = self.set.upgrade().map_or(0.0, |set| set.typical.get());
        let micros = self.load.latency(typical, now);
        EndpointSnapshot {
            address: self.address,
            pending: self.pending(),
            latency_ms: f64::from(micros) / 1e3,
            failure_share: f64::from(self.load.failures(now)),
            state: match self.circuit.ejected_until() {
                None => EndpointState::Ready,
                Some(until) if until > now => EndpointState::Ejected {
                    for_ms: (until - now) / 1000,
                },
                Some(_) => EndpointState::Probation,
            },
        }
    }
}

/// What is known of an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSnapshot {
    /// Where it listens.
    pub address: SocketAddr,
    /// Connections and requests that are open from this node.
    pub pending: usize,
    /// Expected latency to an answer's headers. 0: no answer yet, of any endpoint.
    pub latency_ms: f64,
    /// Share of failures, averaged over the last seconds.
    pub failure_share: f64,
    /// What its circuit breaker says.
    #[serde(flatten)]
    pub state: EndpointState,
}

/// What an endpoint's circuit breaker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum EndpointState {
    /// It takes requests.
    Ready,
    /// It takes none, or one that is tried is on its way.
    #[serde(rename_all = "camelCase")]
    Ejected {
        /// Milliseconds until it may be tried.
        for_ms: u64,
    },
    /// It is tried by the next request that may.
    Probation,
}

/// Raises an endpoint's load until dropped.
#[derive(Debug)]
pub struct Pending(Arc<Endpoint>);

impl Pending {
    fn new(endpoint: &Arc<Endpoint>) -> Self {
        endpoint.pending.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(endpoint))
    }

    /// Where the endpoint listens.
    pub fn address(&self) -> SocketAddr {
        self.0.address
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a pick depends on.
#[derive(Clone, Copy, Debug)]
pub struct PickContext<'a> {
    /// The Service's policy, or the rule's.
    pub policy: &'a Policy,
    /// Family of the destination.
    pub v6: bool,
    /// Endpoints that failed this request already. A retry never goes to an ejected endpoint.
    pub tried: &'a [SocketAddr],
    /// Hash of the policy's key, from [`HashKey::of`].
    pub hash: Option<u64>,
    /// The endpoint of the request's session: taken if it is there, not ejected and not tried.
    pub session: Option<SocketAddr>,
    /// This node.
    pub node: &'a str,
    /// This node's zone; empty if unknown.
    pub zone: &'a str,
    /// `internalTrafficPolicy: Local`: endpoints of this node or none.
    pub local_only: bool,
    /// Now.
    pub now: Instant,
}

/// The endpoints of one Service port that may be used now, by address family.
#[derive(Debug, Default)]
pub struct EndpointSet {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    usable: ArcSwap<Usable>,
    typical: Typical,
    /// Picks so far under a policy with a breaker.
    picks: AtomicU64,
    turn: AtomicUsize,
    /// How many endpoints are ejected. Written under the lock; read alone to skip looking for one to try.
    ejected: AtomicUsize,
    ejecting: Mutex<()>,
}

#[derive(Debug, Default)]
struct Usable {
    v4: Family,
    v6: Family,
}

impl EndpointSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the endpoints; those that stay keep their load. Ready ones are used; if there is none,
    /// those that still serve while terminating, as kube-proxy does (KEP-1669).
    pub fn set(&self, specs: Vec<EndpointSpec>) {
        self.set_at(specs, Instant::now());
    }

    fn set_at(&self, specs: Vec<EndpointSpec>, now: Instant) {
        let before = self.shared.usable.load_full();
        let known: HashMap<_, _> = before.endpoints().map(|e| (e.address, e)).collect();
        let since = (!known.is_empty()).then(|| clock::micros(now));
        let mut listed = HashSet::new();
        let mut after = Usable::default();
        let any_ready = specs.iter().any(|spec| spec.ready);
        for spec in specs {
            let draining = spec.serving && spec.terminating;
            if !(spec.ready || draining) || !listed.insert(spec.address) {
                continue;
            }
            let endpoint = known.get(&spec.address).map_or_else(
                || Arc::new(Endpoint::new(spec.address, since, &self.shared)),
                |known| Arc::clone(known),
            );
            after.family_mut(spec.address.is_ipv6()).add(spec, endpoint);
        }
        after.v4.complete(any_ready);
        after.v6.complete(any_ready);
        let ejecting = self.shared.ejecting.lock();
        let ejected = after.endpoints().filter(|e| !e.circuit.is_closed()).count();
        self.shared.ejected.store(ejected, Ordering::Relaxed);
        self.shared.usable.store(Arc::new(after));
        drop(ejecting);
    }

    /// Picks an endpoint of a family for a TCP connection, none of `tried`. `None`: there is no other.
    pub fn pick(&self, v6: bool, tried: &[SocketAddr]) -> Option<Pending> {
        let usable = self.shared.usable.load();
        let endpoints = Candidates::untried(usable.family(v6).all(), tried);
        let choice = Choice {
            algorithm: Algorithm::LeastRequest,
            hash: None,
            slow_start: None,
            typical: 0.0,
            now: 0,
        };
        let endpoint = choice.among(&endpoints, || 0, &mut rand::rng())?;
        Some(Pending::new(endpoint))
    }

    /// Picks an endpoint for a request. `None`: there is none, or none that was not tried and may be used.
    pub fn pick_with(&self, context: &PickContext<'_>) -> Option<Pick> {
        self.pick_by(context, &mut rand::rng())
    }

    fn pick_by(&self, context: &PickContext<'_>, rng: &mut impl Rng) -> Option<Pick> {
        self.shared.pick(context, rng)
    }

    /// Usable endpoints of both families, for the config dump.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let usable = self.shared.usable.load();
        [&usable.v4, &usable.v6]
            .into_iter()
            .flat_map(|family| family.all())
            .cloned()
            .collect()
    }

    /// What is known of them.
    pub fn snapshot(&self, now: Instant) -> Vec<EndpointSnapshot> {
        self.endpoints().iter().map(|e| e.snapshot(now)).collect()
    }

    /// Latency that is typical for the set. `None`: no answer yet.
    pub fn typical_latency(&self) -> Option<Duration> {
        let micros = self.shared.typical.get();
        (micros > 0.0).then(|| Duration::from_secs_f32(micros / 1e6))
    }
}

impl Endpoint {
    fn new(address: SocketAddr, since: Option<u64>, set: &Arc<Shared>) -> Self {
        Self {
            address,
            pending: AtomicUsize::new(0),
            load: Load::default(),
            circuit: Circuit::default(),
            seed: hash::seed(address),
            since,
            set: Arc::downgrade(set),
        }
    }
}

impl Usable {
    fn family(&self, v6: bool) -> &Family {
        if v6 { &self.v6 } else { &self.v4 }
    }

    fn family_mut(&mut self, v6: bool) -> &mut Family {
        if v6 { &mut self.v6 } else { &mut self.v4 }
    }

    fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.v4.endpoints().chain(self.v6.endpoints())
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
