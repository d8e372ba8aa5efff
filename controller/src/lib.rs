//! Warren's control plane: what users wrote -> what each node must know; and the certificate authority.
//!
//! The way of an edit, door to door: a provider ([`providers`]) reads the users' objects; [`model`] is built
//! from them by pure functions; [`enrolment`] decides how far each pod is on its way into the mesh;
//! [`resources`] turns both into what nodes are sent; [`hub`] publishes it; [`serve`] carries it to the
//! nodes and their answers back. [`ca`] signs certificates for what is bound to a node.

pub mod ca;
pub mod config;
pub mod enrolment;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod hub;
pub mod metrics;
pub mod model;
pub mod providers;
pub mod resources;
pub mod run;
pub mod serve;
pub mod watch;
mod web;
