//! Which endpoints are near a caller.
//!
//! A proxy has one node and one zone, so what is near is worked out once for each snapshot and kept in it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::{Endpoint, EndpointSpec};

/// The endpoints of one address family.
#[derive(Debug, Default)]
pub(super) struct Family {
    ready: Vec<Member>,
    /// Serving while terminating: used only where there is no ready one.
    draining: Vec<Member>,
    all: Vec<Arc<Endpoint>>,
    hinted: bool,
    near: ArcSwapOption<Near>,
}

#[derive(Debug)]
struct Member {
    spec: EndpointSpec,
    endpoint: Arc<Endpoint>,
}

/// What is near a node.
#[derive(Debug)]
pub(super) struct Near {
    node: Box<str>,
    zone: Box<str>,
    /// Nearest first. Not all of them together are all endpoints.
    pub(super) preferred: Vec<Vec<Arc<Endpoint>>>,
    /// Those of the node.
    pub(super) local: Vec<Arc<Endpoint>>,
}

impl Family {
    pub(super) fn add(&mut self, spec: EndpointSpec, endpoint: Arc<Endpoint>) {
        if spec.ready {
            &mut self.ready
        } else {
            &mut self.draining
        }
        .push(Member { spec, endpoint });
    }

    /// To be called after the last [`Self::add`]. `any_ready`: of either family.
    pub(super) fn complete(&mut self, any_ready: bool) {
        let used = if any_ready {
            &self.ready
        } else {
            &self.draining
        };
        self.all = used.iter().map(|m| Arc::clone(&m.endpoint)).collect();
        self.hinted = all_have(used, |spec| &spec.for_zones) || all_have(used, |s| &s.for_nodes);
    }

    /// Those that may be used by anyone.
    pub(super) fn all(&self) -> &[Arc<Endpoint>] {
        &self.all
    }

    /// Whether there is more to say than [`Self::all`].
    pub(super) fn hinted(&self) -> bool {
        self.hinted
    }

    /// Used or not.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.ready.iter().chain(&self.draining).map(|m| &m.endpoint)
    }

    pub(super) fn near(&self, node: &str, zone: &str) -> Arc<Near> {
        if let Some(near) = &*self.near.load()
            && *near.node == *node
            && *near.zone == *zone
        {
            return Arc::clone(near);
        }
        let near = Arc::new(self.work_out(node, zone));
        self.near.store(Some(Arc::clone(&near)));
        near
    }

    fn work_out(&self, node: &str, zone: &str) -> Near {
        let used = if self.ready.is_empty() {
            &self.draining
        } else {
            &self.ready
        };
        let of_node = |members: &[Member]| -> Vec<Arc<Endpoint>> {
            endpoints(members, |spec| !node.is_empty() && *spec.node == *node)
        };
        let mut local = of_node(&self.ready);
        if local.is_empty() {
            local = of_node(&self.draining);
        }
        let mut preferred = Vec::new();
        if all_have(used, |spec| &spec.for_nodes) {
            preferred.push(endpoints(used, |s| {
                s.for_nodes.iter().any(|n| **n == *node)
            }));
        }
        if all_have(used, |spec| &spec.for_zones) {
            preferred.push(endpoints(used, |s| {
                s.for_zones.iter().any(|z| **z == *zone)
            }));
        }
        Near {
            node: node.into(),
            zone: zone.into(),
            preferred,
            local,
        }
    }
}

fn endpoints(members: &[Member], wanted: impl Fn(&EndpointSpec) -> bool) -> Vec<Arc<Endpoint>> {
    members
        .iter()
        .filter(|m| wanted(&m.spec))
        .map(|m| Arc::clone(&m.endpoint))
        .collect()
}

/// kube-proxy: one endpoint without hints, and nobody's are used.
fn all_have(members: &[Member], hints: impl Fn(&EndpointSpec) -> &Vec<Arc<str>>) -> bool {
    !members.is_empty() && members.iter().all(|m| !hints(&m.spec).is_empty())
}
