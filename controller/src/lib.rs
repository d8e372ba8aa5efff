//! Warren's control plane: providers -> model -> per-node resources -> nodes; and the CA.
//!
//! The way of an edit, door to door: a provider ([`providers`]) reads what users wrote; [`model`] is built
//! from it by pure functions; [`resources`] turns the model into what each node must know.

pub mod providers;
