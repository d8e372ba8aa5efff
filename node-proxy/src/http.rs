//! HTTP between the pods of the mesh: routed, balanced, retried and timed at the caller's node; judged,
//! limited and delivered at the callee's.
//!
//! ```text
//! outbound ── opening (which protocol?) ── connection ── caller ── attempt ──┬─ tunnel ── wire
//!                                                                            ├─ callee (same node)
//! inbound ─── opening ─────────────────── connection ── callee ── apps       └─ apps (outside the mesh)
//! tunnel::serve ── wire ─────────────────────────────── callee ── apps
//! ```

use http::{HeaderMap, Request, Version};

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

/// Bytes of names and values.
fn size(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum()
}

/// What a request counts as.
fn protocol<B>(request: &Request<B>, grpc: bool) -> Protocol {
    match (request.version(), grpc) {
        (Version::HTTP_2, true) => Protocol::Grpc,
        (Version::HTTP_2, false) => Protocol::Http2,
        _ => Protocol::Http1,
    }
}
