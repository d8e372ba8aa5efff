//! Rendezvous hashing (Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996).
//!
//! Every endpoint scores a key, the highest score wins. Unlike a ring of points it needs no memory, is
//! exactly even, and takes a key only from an endpoint that left or is left out. It costs about a
//! nanosecond an endpoint. Every node and every start of a proxy must come to the same answer, so
//! nothing here is seeded.

use std::net::{IpAddr, SocketAddr};

/// The hash of a key: FNV-1a, its bits mixed.
pub(super) fn of(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash)
}

/// What stands for an endpoint in its scores.
pub(super) fn seed(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => of(&ip.octets()),
        IpAddr::V6(ip) => of(&ip.octets()),
    };
    mix(ip ^ u64::from(address.port()))
}

/// An endpoint's score for a key.
pub(super) fn score(key: u64, seed: u64) -> u64 {
    mix(key ^ seed)
}

/// The finalizer of SplitMix64: every bit of the input changes half of the output's.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
