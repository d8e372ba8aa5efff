//! Names of the messages, and listeners as they travel.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use mesh_api::proto::broker::{Listener, ToAgent, to_agent, to_proxy};

/// A message to send and the descriptors that go with it.
pub(super) struct Outgoing {
    pub(super) message: ToAgent,
    pub(super) descriptors: Vec<Arc<OwnedFd>>,
}

impl Outgoing {
    pub(super) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.descriptors.iter().map(|fd| fd.as_fd()).collect()
    }
}

/// Listeners and their kinds, in the order in which they travel.
#[derive(Clone, Debug, Default)]
pub(super) struct Listeners(Vec<(Listener, Arc<OwnedFd>)>);

impl Listeners {
    /// Pairs kinds and descriptors. Every kind must be one of `expected`, at most once.
    pub(super) fn pair(
        kinds: &[i32],
        descriptors: Vec<OwnedFd>,
        expected: &[Listener],
    ) -> Result<Self, String> {
        if kinds.len() != descriptors.len() {
            return Err(format!(
                "{} listeners are named and {} came",
                kinds.len(),
                descriptors.len()
            ));
        }
        let mut paired: Vec<(Listener, Arc<OwnedFd>)> = Vec::with_capacity(kinds.len());
        for (kind, descriptor) in kinds.iter().zip(descriptors) {
            let known = Listener::try_from(*kind)
                .ok()
                .filter(|kind| expected.contains(kind));
            let Some(kind) = known else {
                return Err(format!("a listener of kind {kind} does not belong here"));
            };
            if paired.iter().any(|(other, _)| *other == kind) {
                return Err(format!("{} came twice", kind.as_str_name()));
            }
            if !is_listening(&descriptor) {
                return Err(format!("{} is not a listening socket", kind.as_str_name()));
            }
            paired.push((kind, Arc::new(descriptor)));
        }
        Ok(Self(paired))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn kinds(&self) -> Vec<i32> {
        self.0.iter().map(|(kind, _)| *kind as i32).collect()
    }

    pub(super) fn descriptors(&self) -> Vec<Arc<OwnedFd>> {
        self.0
            .iter()
            .map(|(_, descriptor)| Arc::clone(descriptor))
            .collect()
    }

    /// A duplicate of the listener of that kind.
    pub(super) fn duplicate(&self, kind: Listener) -> Result<OwnedFd, String> {
        let found = self.0.iter().find(|(other, _)| *other == kind);
        let (_, descriptor) = found.ok_or_else(|| format!("{} is missing", kind.as_str_name()))?;
        descriptor
            .try_clone()
            .map_err(|e| format!("duplicating {}: {e}", kind.as_str_name()))
    }

    /// Duplicates of all.
    pub(super) fn duplicates(&self) -> Result<Vec<OwnedFd>, String> {
        self.0
            .iter()
            .map(|(kind, _)| self.duplicate(*kind))
            .collect()
    }
}

fn is_listening(descriptor: &OwnedFd) -> bool {
    socket2::SockRef::from(descriptor)
        .is_listener()
        .unwrap_or(false)
}

/// Value of the metric label `kind`.
pub(super) fn received_kind(body: &to_proxy::Body) -> &'static str {
    use to_proxy::Body;
    match body {
        Body::Ack(_) => "ack",
        Body::Welcome(_) => "welcome",
        Body::AddPod(_) => "add_pod",
        Body::RemovePod(_) => "remove_pod",
        Body::HostListeners(_) => "host_listeners",
        Body::SnapshotEnd(_) => "snapshot_end",
        Body::Sockets(_) => "sockets",
        Body::Drain(_) => "drain",
        Body::Resume(_) => "resume",
    }
}

/// Value of the metric label `kind`.
pub(super) fn sent_kind(body: &to_agent::Body) -> &'static str {
    use to_agent::Body;
    match body {
        Body::Ack(_) => "ack",
        Body::Hello(_) => "hello",
        Body::Offer(_) => "offer",
        Body::NeedSockets(_) => "need_sockets",
        Body::Ready(_) => "ready",
        Body::PodDrained(_) => "pod_drained",
    }
}
