//! HTTP between the pods of the mesh: routed, balanced, retried and timed at the caller's node; judged,
//! limited and delivered at the callee's.

pub mod apps;
pub mod body;
pub mod detect;
pub mod fault;
pub mod h1;
pub mod limits;
pub mod policy;
pub mod retry;
pub mod route;
