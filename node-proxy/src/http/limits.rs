//! Limits on requests: in flight and pending at the caller's node, a rate for each caller at the callee's.
//!
//! In flight: a request takes a place or waits for one, first come first served, in a queue of bounded
//! length and for a bounded time. A full Service is said to be full at once instead of being waited for
//! by everyone.
//!
//! Rate: the generic cell rate algorithm (ITU-T I.371). One number for each rate: the time at which the
//! bucket would be full again. It needs no timer, and a bucket that is full is the same as none, so
//! entries can be dropped without forgetting anything.

mod in_flight;
mod rate;

pub use in_flight::{InFlight, Overload, Permit};
pub(crate) use rate::{Gcra, nanos};
pub use rate::{Limited, RateLimiter, Rates};
