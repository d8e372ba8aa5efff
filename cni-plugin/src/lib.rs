//! The CNI plugin and the node agent, one binary.
//!
//! [`plugin`] is what the container runtime executes: it tells the agent about a pod and waits for its
//! answer. [`agent`] is the daemon that enters pods' network namespaces, programs the capture rules
//! and hands sockets to the proxies. Everything on a node that needs a capability is here, and
//! nothing here parses bytes that come from a pod.

pub mod agent;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod plugin;
#[allow(unsafe_code)]
mod sys;
