//! Limits on requests: in flight and pending at the caller's node, a rate for each caller at the callee's.
//!
//! In flight: a request takes a place or waits for one, first come first served, in a queue of bounded
//! length and for a bounded time. A full Service is said to be full at once instead of being waited for
//! by everyone.
//!
//! Rate: the generic cell rate algorithm (ITU-T I.371). One number for each rate: the time at which the
//! bucket would be full again. It needs no timer, and a bucket that is full is the same as none, so
//! entries can be dropped without forgetting anything.

use std::sync::Arc;

use http::HeaderMap;
use mesh_api::errors::ProxyError;

use crate::budget::{Account, Charge, Resource};

mod in_flight;
mod rate;

pub use in_flight::{InFlight, Overload, Permit};
pub(crate) use rate::{Gcra, nanos};
pub use rate::{Limited, RateLimiter, Rates};

/// A head below this is part of what a request costs in any case.
pub const MOST_UNCHARGED: usize = 4096;
/// What a header takes beside its bytes.
const HEADER: usize = 64;

/// Charges the head of a request while it is in flight, if it is large.
pub fn charge_head(
    account: &Arc<Account>,
    headers: &HeaderMap,
) -> Result<Option<Charge>, ProxyError> {
    let of = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + HEADER);
    let length: usize = of.sum();
    if length < MOST_UNCHARGED {
        return Ok(None);
    }
    let mut charge = account.open_charge(Resource::BufferedBytes);
    charge.add(length)?;
    Ok(Some(charge))
}
