//! What Warren's processes say to each other: protobuf messages, identities, names and ports, the
//! table of errors, what both sides say of routes (headers that cannot be changed, web origins), and
//! the few mechanisms that both ends of a conversation must do alike (packets with descriptors,
//! verification of SPIFFE peers, the controller's client).

pub mod client;
pub mod config;
pub mod descriptors;
pub mod errors;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod headers;
pub mod identity;
pub mod names;
pub mod origin;
pub mod proto;
pub mod seqpacket;
pub mod tls;

// Tests that other crates share name this crate as those do.
#[cfg(test)]
extern crate self as mesh_api;
