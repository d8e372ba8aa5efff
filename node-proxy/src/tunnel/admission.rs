//! Bounds what strangers may hold of this process: handshakes that are under way, before anybody has
//! proved anything.
//!
//! A handshake costs a descriptor and a buffer for up to its time-out, and everybody who can reach port
//! 15008 can begin one. So one address may have only so many at a time, and all together only a part of the
//! descriptors. Over the bound a connection is reset at once.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Handshakes of one address at a time. A node that has just started dials a tunnel for each pair of identities.
const PER_PEER: usize = 1024;
/// Of the descriptors of this process: all handshakes together.
const SHARE: u64 = 4;

/// Counts handshakes. Shared by all workers.
#[derive(Debug)]
pub struct Handshakes {
    under_way: Mutex<UnderWay>,
    per_peer: usize,
    total: usize,
}

#[derive(Debug, Default)]
struct UnderWay {
    by_peer: HashMap<IpAddr, usize>,
    total: usize,
}

/// One handshake, until dropped.
#[derive(Debug)]
pub struct Turn {
    handshakes: Arc<Handshakes>,
    peer: IpAddr,
}

impl Handshakes {
    /// For a process that may have this many descriptors.
    pub fn new(descriptors: u64) -> Arc<Self> {
        let total = usize::try_from(descriptors / SHARE).unwrap_or(usize::MAX);
        Self::bounded(PER_PEER.min(total), total)
    }

    fn bounded(per_peer: usize, total: usize) -> Arc<Self> {
        Arc::new(Self {
            under_way: Mutex::default(),
            per_peer,
            total,
        })
    }

    /// `None`: that address, or all together, have too many under way.
    pub fn begin(self: &Arc<Self>, peer: IpAddr) -> Option<Turn> {
        let mut under_way = self.under_way.lock();
        if under_way.total >= self.total {
            return None;
        }
        let of_peer = under_way.by_peer.entry(peer).or_default();
        if *of_peer >= self.per_peer {
            return None;
        }
        *of_peer += 1;
        under_way.total += 1;
        Some(Turn {
            handshakes: Arc::clone(self),
            peer,
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut under_way = self.handshakes.under_way.lock();
        under_way.total -= 1;
        if let Some(of_peer) = under_way.by_peer.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                under_way.by_peer.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_the_turns_of_others_and_gives_its_own_back() {
        let handshakes = Handshakes::bounded(2, 3);
        let [first, second, third]: [IpAddr; 3] =
            ["10.0.0.1", "10.0.0.2", "fd00::3"].map(|a| a.parse().unwrap());
        let held = [handshakes.begin(first), handshakes.begin(first)].map(Option::unwrap);
        assert!(handshakes.begin(first).is_none(), "over its own bound");
        let other = handshakes.begin(second).unwrap();
        assert!(handshakes.begin(third).is_none(), "over the common bound");
        drop(held);
        assert!(handshakes.begin(third).is_some());
        drop(other);
        let under_way = handshakes.under_way.lock();
        assert_eq!((under_way.total, under_way.by_peer.len()), (0, 0));
    }
}
