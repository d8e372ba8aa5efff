//! The data plane: one process a node that carries the traffic of all opted-in pods on it.

pub mod accept;
pub mod admin;
pub mod authorize;
pub mod balance;
pub mod broker;
pub mod budget;
pub mod config;
pub mod connections;
pub mod deliver;
pub mod discovery;
pub mod flow;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod health;
pub mod http;
pub mod identity;
pub mod inbound;
pub mod maps;
pub mod memory;
pub mod outbound;
pub mod pods;
pub mod probe;
pub mod process;
pub mod resolve;
pub mod seccomp;
pub mod slices;
pub mod stock;
pub mod supervisor;
pub mod table;
pub mod tcp;
pub mod telemetry;
#[cfg(test)]
mod testing;
pub mod tunnel;
pub mod turns;
pub mod worker;
