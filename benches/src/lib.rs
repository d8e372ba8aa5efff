//! The side-by-side end-to-end benchmark: the same load through no proxy, through Warren and through
//! a pair of Envoys, in namespaces on one machine, in one run.
//!
//! [`fleet`] is another: the control plane with a thousand nodes.
//!
//! [`load`] is the client and the server that make the load; [`harness`] builds the three arms,
//! runs the cases interleaved and reports. What is measured, and how the arms are kept alike, is in
//! `benches/README.md`.

pub mod fleet;
pub mod harness;
pub mod load;
