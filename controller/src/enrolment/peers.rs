//! The other replicas: how far the nodes that they serve are known to be.
//!
//! What a replica says of itself is in its Lease. It counts as long as that is renewed, by this
//! process's clock: a replica that died takes no part in "every node knows" after [`LEASE`].

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::LEASE;

/// What a replica says of the nodes it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// They hold everything up to this version of the pods.
    pub acknowledged: u64,
    /// They trust at least these roots: the hash of a bundle.
    pub trusted: String,
    /// Changes with every renewal.
    pub renewal: String,
}

/// All other replicas, by name.
#[derive(Debug, Default)]
pub struct Peers {
    known: BTreeMap<String, (Peer, Instant)>,
}

impl Peers {
    /// Takes what another replica says.
    pub fn heard(&mut self, name: &str, peer: Peer, now: Instant) {
        match self.known.get_mut(name) {
            // Listed again: that is no sign of life.
            Some((known, _)) if *known == peer => {}
            Some((known, at)) => {
                *known = peer;
                *at = now;
            }
            None => {
                tracing::info!(replica = name, "another replica serves nodes as well");
                self.known.insert(name.into(), (peer, now));
            }
        }
    }

    /// A replica took leave.
    pub fn left(&mut self, name: &str) {
        self.known.remove(name);
    }

    /// Forgets the silent. True: there were some.
    pub fn expire(&mut self, now: Instant) -> bool {
        let before = self.known.len();
        self.known.retain(|name, (_, heard)| {
            let alive = now < *heard + LEASE;
            if !alive {
                tracing::warn!(replica = name, "is silent and no longer waited for");
            }
            alive
        });
        self.known.len() != before
    }

    /// Whether the nodes of all others hold this version of the pods.
    pub fn all_hold(&self, version: u64, now: Instant) -> bool {
        self.alive(now).all(|peer| peer.acknowledged >= version)
    }

    /// Whether the nodes of all others trust this bundle.
    pub fn all_trust(&self, bundle: &str, now: Instant) -> bool {
        self.alive(now).all(|peer| peer.trusted == bundle)
    }

    fn alive(&self, now: Instant) -> impl Iterator<Item = &Peer> {
        let alive = self
            .known
            .values()
            .filter(move |(_, heard)| now < *heard + LEASE);
        alive.map(|(peer, _)| peer)
    }
}
