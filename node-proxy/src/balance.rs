//! Endpoints of a Service port, and the choice among them.
//!
//! Power of two choices over pending connections: two endpoints are drawn at random and the one with
//! less open work is taken. It needs no scan, spreads evenly, and avoids the herd that "least of all"
//! causes (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use rand::Rng;

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
}

/// An endpoint and its load as this node sees it. Lives on across updates of the set.
#[derive(Debug)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    pending: AtomicUsize,
}

impl Endpoint {
    /// Connections to it that are being opened or are open, from this node.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }
}

/// Raises an endpoint's load until dropped.
#[derive(Debug)]
pub struct Pending(Arc<Endpoint>);

impl Pending {
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

/// The endpoints of one Service port that may be used now, by address family.
#[derive(Debug, Default)]
pub struct EndpointSet {
    usable: ArcSwap<Usable>,
}

#[derive(Debug, Default)]
struct Usable {
    v4: Vec<Arc<Endpoint>>,
    v6: Vec<Arc<Endpoint>>,
}

impl EndpointSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the endpoints; those that stay keep their load. Ready ones are used; if there is none,
    /// those that still serve while terminating, as kube-proxy does (KEP-1669).
    pub fn set(&self, specs: Vec<EndpointSpec>) {
        let before = self.usable.load_full();
        let any_ready = specs.iter().any(|s| s.ready);
        let known: HashMap<_, _> = before
            .v4
            .iter()
            .chain(&before.v6)
            .map(|e| (e.address, e))
            .collect();
        let mut listed = HashSet::new();
        let mut after = Usable::default();
        for spec in specs {
            let wanted = if any_ready {
                spec.ready
            } else {
                spec.serving && spec.terminating
            };
            if !wanted {
                continue;
            }
            if !listed.insert(spec.address) {
                continue;
            }
            let endpoint = known.get(&spec.address).map_or_else(
                || {
                    Arc::new(Endpoint {
                        address: spec.address,
                        pending: AtomicUsize::new(0),
                    })
                },
                |known| Arc::clone(known),
            );
            if spec.address.is_ipv6() {
                &mut after.v6
            } else {
                &mut after.v4
            }
            .push(endpoint);
        }
        self.usable.store(Arc::new(after));
    }

    /// Picks an endpoint of a family, none of `tried`. `None`: there is no other.
    pub fn pick(&self, v6: bool, tried: &[SocketAddr]) -> Option<Pending> {
        let usable = self.usable.load();
        let all = usable.family(v6);
        let endpoint = if tried.is_empty() {
            two_choices(all)?
        } else {
            let rest: Vec<_> = all
                .iter()
                .filter(|e| !tried.contains(&e.address))
                .cloned()
                .collect();
            two_choices(&rest)?
        };
        endpoint.pending.fetch_add(1, Ordering::Relaxed);
        Some(Pending(endpoint))
    }

    /// Usable endpoints of both families, for the config dump.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let usable = self.usable.load();
        usable.v4.iter().chain(&usable.v6).cloned().collect()
    }
}

impl Usable {
    fn family(&self, v6: bool) -> &[Arc<Endpoint>] {
        if v6 { &self.v6 } else { &self.v4 }
    }
}

fn two_choices(endpoints: &[Arc<Endpoint>]) -> Option<Arc<Endpoint>> {
    let count = endpoints.len();
    if count < 2 {
        return endpoints.first().cloned();
    }
    let mut rng = rand::rng();
    let first = rng.random_range(0..count);
    // Drawn from the others, so that the two differ.
    let second = (first + rng.random_range(1..count)) % count;
    let (first, second) = (&endpoints[first], &endpoints[second]);
    Some(Arc::clone(if second.pending() < first.pending() {
        second
    } else {
        first
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(address: &str, ready: bool) -> EndpointSpec {
        EndpointSpec {
            address: address.parse().unwrap(),
            ready,
            serving: true,
            terminating: !ready,
            node: "".into(),
            zone: "".into(),
        }
    }

    #[test]
    fn the_less_loaded_of_two_is_taken() {
        let set = EndpointSet::new();
        set.set(vec![spec("10.0.0.1:80", true), spec("10.0.0.2:80", true)]);
        // With two endpoints both are always drawn, so the loads can differ by one at most.
        let held: Vec<_> = (0..100).map(|_| set.pick(false, &[]).unwrap()).collect();
        let loads: Vec<_> = set.endpoints().iter().map(|e| e.pending()).collect();
        assert_eq!(loads, [50, 50]);
        drop(held);
        assert!(set.endpoints().iter().all(|e| e.pending() == 0));
    }

    #[test]
    fn load_survives_updates_and_removed_endpoints_are_not_picked() {
        let set = EndpointSet::new();
        set.set(vec![spec("10.0.0.1:80", true)]);
        let held = set.pick(false, &[]).unwrap();
        set.set(vec![spec("10.0.0.1:80", true), spec("10.0.0.2:80", true)]);
        assert_eq!(
            set.pick(false, &[]).unwrap().address(),
            "10.0.0.2:80".parse().unwrap()
        );
        set.set(vec![spec("10.0.0.2:80", true)]);
        assert_eq!(
            set.pick(false, &[]).unwrap().address(),
            "10.0.0.2:80".parse().unwrap()
        );
        drop(held);
    }

    #[test]
    fn another_endpoint_after_a_failed_one() {
        let set = EndpointSet::new();
        set.set(vec![spec("10.0.0.1:80", true), spec("10.0.0.2:80", true)]);
        let tried = ["10.0.0.1:80".parse().unwrap()];
        for _ in 0..20 {
            assert_eq!(
                set.pick(false, &tried).unwrap().address(),
                "10.0.0.2:80".parse().unwrap()
            );
        }
        assert!(set.pick(true, &[]).is_none(), "no endpoint of that family");
    }

    #[test]
    fn terminating_endpoints_serve_only_when_none_is_ready() {
        let set = EndpointSet::new();
        set.set(vec![spec("10.0.0.1:80", false), spec("10.0.0.2:80", true)]);
        assert_eq!(set.endpoints().len(), 1);
        set.set(vec![spec("10.0.0.1:80", false)]);
        assert_eq!(set.endpoints().len(), 1);
    }
}
