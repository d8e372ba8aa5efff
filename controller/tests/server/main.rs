//! A real controller on loopback ports, and nodes that speak to it over real TLS.
//!
//! One crate, as each costs a link of everything. Nothing here sleeps: every test waits for a condition.

#![allow(clippy::unwrap_used)]

mod certificates;
mod client;
mod common;
mod discovery;
mod enrolment;
mod process;
mod rotation;
