//! The data plane: one process a node that carries the traffic of all opted-in pods on it.

pub mod balance;
pub mod budget;
pub mod identity;
pub mod pods;
pub mod process;
pub mod stock;
pub mod table;
