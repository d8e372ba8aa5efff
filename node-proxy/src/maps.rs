//! Maps that each request asks several times: with a faster hasher than the standard library's.
//!
//! It is seeded anew in each process, but makes no promise against somebody who chooses keys: the keys are what the
//! controller and the node say, addresses and identities.

use std::collections::HashMap;

use dashmap::DashMap;
use foldhash::fast::RandomState;

/// A map behind a lock, or of one thread.
pub type FastMap<K, V> = HashMap<K, V, RandomState>;
/// A map that all threads read.
pub type SharedMap<K, V> = DashMap<K, V, RandomState>;
