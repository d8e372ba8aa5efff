//! Maps that each request asks several times: with a faster hasher than the standard library's.
//!
//! It is seeded anew in each process, but makes no promise against somebody who can choose keys and see how long each takes.
//! The keys here are addresses, identities and names from the controller; what a workload can add to them is bounded.

use std::collections::HashMap;

use dashmap::DashMap;
use foldhash::fast::RandomState;

/// A map behind a lock, or of one thread.
pub type FastMap<K, V> = HashMap<K, V, RandomState>;
/// A map that all threads read.
pub type SharedMap<K, V> = DashMap<K, V, RandomState>;
