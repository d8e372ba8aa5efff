//! HTTP between the pods of the mesh: routed, balanced, retried and timed at the caller's node; judged,
//! limited and delivered at the callee's.
//!
//! ```text
//! outbound ── opening (which protocol?) ── connection ── caller ── attempt ──┬─ tunnel ── wire
//!                                                                            ├─ callee (same node)
//! inbound ─── opening ─────────────────── connection ── callee ── apps       └─ apps (outside the mesh)
//! tunnel::serve ── wire ─────────────────────────────── callee ── apps
//! ```

use http::request::Parts;
use http::{HeaderMap, Request, Version};

use self::body::Body;
use crate::telemetry::http::Protocol;

pub mod answer;
pub mod apps;
pub mod attempt;
pub mod body;
pub mod callee;
pub mod caller;
pub mod connection;
pub mod detect;
pub mod fault;
pub mod frames;
pub mod h1;
pub mod limits;
mod mirror;
pub mod opening;
pub mod policy;
pub mod retry;
pub mod route;
mod story;
pub mod upgrade;
pub mod watched;
pub mod wire;

/// A request on its way. It passes through many futures, each of which would have room for its head, and is moved with
/// them: so the head is boxed.
#[derive(Debug)]
pub struct BoxedRequest {
    /// All but the body.
    pub head: Box<Parts>,
    /// The body.
    pub body: Body,
}

impl From<Request<Body>> for BoxedRequest {
    fn from(request: Request<Body>) -> Self {
        let (head, body) = request.into_parts();
        let head = Box::new(head);
        Self { head, body }
    }
}

/// Bytes of names and values.
fn size(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum()
}

/// What a request counts as.
fn protocol(head: &Parts, grpc: bool) -> Protocol {
    match (head.version, grpc) {
        (Version::HTTP_2, true) => Protocol::Grpc,
        (Version::HTTP_2, false) => Protocol::Http2,
        _ => Protocol::Http1,
    }
}
