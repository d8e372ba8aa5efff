//! Enrolment of pods: the one change that all nodes must agree on, as a state machine per pod.
//!
//! ```text
//! Off ──wanted──▶ Wanted ──agent: READY──▶ Tunnel ──all proxies acked──▶ Enforced
//!  ▲                                         │  ▲                           │
//!  │                                unwanted │  │ wanted                    │ unwanted
//!  │                                         ▼  │                           │
//!  │                                        Leaving ◀───────────────────────┘
//!  │                                         │ all proxies acked
//!  │ agent acked, reports the pod no more    ▼
//!  └──────────────────────────────────── Withdrawn ──wanted──▶ Rejoining ──READY──▶ Tunnel
//! ```
//!
//! Every phase is a pair of what the table of all nodes says of the pod ([`Record::published`]) and what
//! its own agent is told ([`Record::enrolled`]). Plaintext is refused only in Enforced, so only when
//! every node knows; capture is taken away only in Withdrawn, so only when no node opens a tunnel to it.
//!
//! Invariants: a phase changes only in [`Enrolment::step`], which notes the number of the snapshot that
//! publishes it; acknowledgements of older snapshots do not count. Nothing a node reports moves a pod
//! that is bound elsewhere. Absence from a report never takes a pod out of the table: an agent that
//! restarts reports less than it serves for a moment.

mod fleet;
mod peers;
mod recording;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::proto::control::{NodeReport, PodState};
use mesh_api::proto::mesh::EnrolmentState;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

pub use fleet::{Fleet, Known, LEASE, Progress, StreamId};
pub use peers::{Peer, Peers};
pub use recording::{Recorded, Recording, Write};
pub(crate) use store::replace;
pub use store::{Store, StoreError, Stored};

use crate::model::{Model, Pod};

/// Where a pod is on its way into or out of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Not meshed.
    Off,
    /// Its agent is asked to capture it.
    Wanted,
    /// Captured; callers may use a tunnel.
    Tunnel,
    /// Every node knows: plaintext is refused.
    Enforced,
    /// To leave: nodes are told to open no new tunnel stream to it.
    Leaving,
    /// Every node knows that it leaves: its agent is asked to let go.
    Withdrawn,
    /// Wanted again while its agent was letting go.
    Rejoining,
}

impl Phase {
    /// Every phase, for metrics.
    pub const ALL: [Phase; 7] = [
        Phase::Off,
        Phase::Wanted,
        Phase::Tunnel,
        Phase::Enforced,
        Phase::Leaving,
        Phase::Withdrawn,
        Phase::Rejoining,
    ];

    /// Label value in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Off => "off",
            Phase::Wanted => "wanted",
            Phase::Tunnel => "tunnel",
            Phase::Enforced => "enforced",
            Phase::Leaving => "leaving",
            Phase::Withdrawn => "withdrawn",
            Phase::Rejoining => "rejoining",
        }
    }
}

/// What is known of one pod's enrolment.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The node it is bound to.
    pub node: String,
    /// Addresses its agent recorded at CNI ADD. Empty: none yet, `status.podIPs` count.
    pub addresses: Vec<IpAddr>,
    /// Where it is.
    pub phase: Phase,
    /// Why its agent could not enrol it, by its last report.
    pub failure: Option<String>,
    /// The snapshot that published the phase.
    since: u64,
    /// In a cluster: replicas that have read this far have published it as well.
    version: u64,
    /// Its agent reported it READY in this phase.
    ready: bool,
    /// Its agent reported in this phase and no longer named it.
    gone: bool,
}

impl Record {
    /// What the table of all nodes says; `None`: the pod is not in it.
    pub fn published(&self) -> Option<EnrolmentState> {
        match self.phase {
            Phase::Off | Phase::Wanted => None,
            Phase::Tunnel => Some(EnrolmentState::Tunnel),
            Phase::Enforced => Some(EnrolmentState::Enforced),
            Phase::Leaving | Phase::Withdrawn | Phase::Rejoining => Some(EnrolmentState::Leaving),
        }
    }

    /// What the pod's agent is told.
    pub fn enrolled(&self) -> bool {
        match self.phase {
            Phase::Off | Phase::Withdrawn => false,
            Phase::Wanted | Phase::Tunnel | Phase::Enforced | Phase::Leaving | Phase::Rejoining => {
                true
            }
        }
    }
}

/// Why a pod cannot be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The controller knows no such pod on that node (yet).
    #[error("no pod {namespace}/{name} with UID {uid} is bound to node {node} (yet)")]
    NotFound {
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        name: String,
        /// UID the agent gave.
        uid: String,
        /// The node that asked.
        node: String,
    },
    /// Another node's pod has the address.
    #[error(
        "address {address} belongs to pod {other} on node {node}; two nodes hand out the same addresses"
    )]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// Who has it.
        other: String,
        /// Where that pod is.
        node: String,
    },
    /// It is not on record yet, so that nobody may be told of it.
    #[error("the addresses could not be recorded in time")]
    NotRecorded,
}

/// All records.
#[derive(Debug, Default)]
pub struct Enrolment {
    records: BTreeMap<Arc<str>, Record>,
    /// The UIDs of each node's records.
    of_node: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// A pod was in a phase that ends with acknowledgements when all were looked at last.
    awaits_acks: bool,
}

impl Enrolment {
    /// Takes up where an earlier process stopped.
    pub fn restore(stored: &Stored) -> Self {
        let mut enrolment = Self {
            awaits_acks: true,
            ..Self::default()
        };
        for (uid, pod) in &stored.pods {
            let record = Record {
                node: pod.node.clone(),
                addresses: pod.addresses.clone(),
                phase: pod.phase,
                failure: None,
                since: 0,
                version: 0,
                ready: false,
                gone: false,
            };
            let uid = Arc::<str>::from(uid.as_str());
            let of_node = enrolment.of_node.entry(pod.node.clone()).or_default();
            of_node.insert(uid.clone());
            enrolment.records.insert(uid, record);
        }
        enrolment
    }

    /// What must survive the process.
    pub fn to_store(&self) -> BTreeMap<String, store::StoredPod> {
        let kept = |r: &&Record| r.phase != Phase::Off || !r.addresses.is_empty();
        let stored = |(uid, r): (&Arc<str>, &Record)| {
            let pod = store::StoredPod {
                node: r.node.clone(),
                addresses: r.addresses.clone(),
                phase: r.phase,
            };
            (uid.to_string(), pod)
        };
        let records = self.records.iter().filter(|(_, r)| kept(r));
        records.map(stored).collect()
    }

    /// The record of a pod.
    pub fn record(&self, uid: &str) -> Option<&Record> {
        self.records.get(uid)
    }

    /// All records by UID.
    pub fn records(&self) -> impl Iterator<Item = (&Arc<str>, &Record)> {
        self.records.iter()
    }

    /// Whether an acknowledgement could move a pod.
    pub fn awaits_acks(&self) -> bool {
        self.awaits_acks
    }

    /// Records the addresses of a pod of `node`. A later registration of an address on the same node
    /// takes it from the earlier pod, whose network namespace is gone by then.
    pub fn register(
        &mut self,
        model: &Model,
        node: &str,
        uid: &str,
        (namespace, name): (&str, &str),
        addresses: Vec<IpAddr>,
    ) -> Result<(), RegisterError> {
        let pod = self.may_register(model, node, uid, (namespace, name), &addresses)?;
        for (other, record) in &mut self.records {
            if **other != *uid {
                record.addresses.retain(|a| !addresses.contains(a));
            }
        }
        self.record_of(pod).addresses = addresses;
        Ok(())
    }

    /// Whether a pod of `node` may have these addresses.
    fn may_register<'m>(
        &self,
        model: &'m Model,
        node: &str,
        uid: &str,
        (namespace, name): (&str, &str),
        addresses: &[IpAddr],
    ) -> Result<&'m Arc<Pod>, RegisterError> {
        let pod = model
            .pods
            .get(uid)
            .filter(|p| p.node == node && p.namespace == namespace && p.name == name);
        let Some(pod) = pod else {
            return Err(RegisterError::NotFound {
                namespace: namespace.into(),
                name: name.into(),
                uid: uid.into(),
                node: node.into(),
            });
        };
        for (other, record) in &self.records {
            let taken = record.addresses.iter().find(|a| addresses.contains(a));
            if let Some(address) = taken
                && record.node != node
                && **other != *uid
            {
                let named = |p: &Arc<Pod>| format!("{}/{}", p.namespace, p.name);
                return Err(RegisterError::AddressTaken {
                    address: *address,
                    other: model.pods.get(other).map_or(other.to_string(), named),
                    node: record.node.clone(),
                });
            }
        }
        Ok(pod)
    }

    /// Takes a node's report. Returns whether a pod may move because of it, or another has failed, and the UIDs it
    /// named that are not pods of that node.
    pub fn report(
        &mut self,
        node: &str,
        report: &NodeReport,
        fleet: &Fleet,
    ) -> (bool, Vec<String>) {
        let mut named = BTreeMap::new();
        let mut strangers = Vec::new();
        for pod in &report.pods {
            match self.records.get(pod.uid.as_str()) {
                Some(record) if record.node == node => {
                    named.insert(pod.uid.as_str(), pod);
                }
                _ => strangers.push(pod.uid.clone()),
            }
        }
        let mut news = false;
        for uid in self.of_node.get(node).into_iter().flatten() {
            let Some(record) = self.records.get_mut(uid) else {
                continue;
            };
            let before = (record.failure.take(), record.ready, record.gone);
            let pod = named.get(&**uid);
            let state = pod.map(|p| p.state());
            record.failure = pod
                .filter(|p| p.state() == PodState::Failed)
                .map(|p| p.reason.clone());
            // While the agent may not know yet what it is asked, its report is about the past.
            let knows = fleet.agent_acked(node, record.since);
            record.ready =
                state == Some(PodState::Ready) && (knows || record.phase != Phase::Rejoining);
            record.gone = state.is_none() && knows;
            news |= before.0 != record.failure
                || match record.phase {
                    Phase::Wanted | Phase::Rejoining => before.1 != record.ready,
                    Phase::Withdrawn => before.2 != record.gone,
                    // What a report says of the others moves none of them.
                    Phase::Off | Phase::Tunnel | Phase::Enforced | Phase::Leaving => false,
                };
        }
        (news, strangers)
    }

    /// Moves every pod one step as far as the model, the reports and the acknowledgements allow. `seq` is
    /// the number of the snapshot that will publish the result. True: something moved.
    pub fn step(&mut self, model: &Model, fleet: &Fleet, seq: u64, now: Instant) -> bool {
        let mut moved = self.follow(model);
        let known = fleet.known(now);
        let mut awaits_acks = false;
        for (uid, pod, record) in self.with_pods(model) {
            let all_know = || known.as_ref().is_some_and(|k| k.hold(uid, record.since));
            let next = record.next(pod, all_know);
            if next != record.phase {
                record.enter(pod, next, seq);
                moved = true;
            }
            awaits_acks |= record.awaits_acks();
        }
        self.awaits_acks = awaits_acks;
        moved
    }

    /// Forgets the pods that are gone, and takes in new ones. True: some are gone.
    fn follow(&mut self, model: &Model) -> bool {
        let mut pairs = self.records.iter().zip(&model.pods);
        let same = self.records.len() == model.pods.len()
            && pairs.all(|((uid, record), (other, pod))| uid == other && record.node == pod.node);
        if same {
            return false;
        }
        let before = self.records.len();
        self.records.retain(|uid, record| {
            let bound = model.pods.get(uid).is_some_and(|p| p.node == record.node);
            if !bound {
                tracing::info!(uid = %uid, node = record.node, "pod is gone");
                if let Some(uids) = self.of_node.get_mut(&record.node) {
                    uids.remove(uid);
                    if uids.is_empty() {
                        self.of_node.remove(&record.node);
                    }
                }
            }
            bound
        });
        let gone = self.records.len() != before;
        for pod in model.pods.values() {
            self.record_of(pod);
        }
        gone
    }

    /// Every pod with its record, once they [follow](Self::follow) the model: without looking each of them up.
    fn with_pods<'a>(
        &'a mut self,
        model: &'a Model,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Arc<Pod>, &'a mut Record)> {
        let pairs = self.records.values_mut().zip(&model.pods);
        pairs.map(|(record, (uid, pod))| (uid, pod, record))
    }

    fn record_of(&mut self, pod: &Pod) -> &mut Record {
        let Self {
            records, of_node, ..
        } = self;
        records.entry(pod.uid.clone()).or_insert_with(|| {
            let of_node = of_node.entry(pod.node.clone()).or_default();
            of_node.insert(pod.uid.clone());
            Record::new(&pod.node)
        })
    }
}

impl Record {
    fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            addresses: Vec::new(),
            phase: Phase::Off,
            failure: None,
            since: 0,
            version: 0,
            ready: false,
            gone: false,
        }
    }

    fn awaits_acks(&self) -> bool {
        matches!(self.phase, Phase::Tunnel | Phase::Leaving)
    }

    fn enter(&mut self, pod: &Pod, phase: Phase, seq: u64) {
        tracing::info!(
            pod = %format_args!("{}/{}", pod.namespace, pod.name),
            node = pod.node, from = self.phase.name(), to = phase.name(),
            "enrolment"
        );
        self.phase = phase;
        self.since = seq;
        self.ready = false;
        self.gone = false;
    }

    /// Where the pod goes from here.
    fn next(&self, pod: &Pod, all_know: impl Fn() -> bool) -> Phase {
        let wanted = pod.to_be_captured();
        match self.phase {
            Phase::Off if wanted => Phase::Wanted,
            Phase::Wanted if !wanted => Phase::Off,
            Phase::Wanted | Phase::Rejoining if wanted && self.ready => Phase::Tunnel,
            Phase::Tunnel | Phase::Enforced if !wanted => Phase::Leaving,
            Phase::Tunnel if all_know() => Phase::Enforced,
            Phase::Leaving if wanted => Phase::Tunnel,
            Phase::Leaving if all_know() => Phase::Withdrawn,
            Phase::Withdrawn if wanted => Phase::Rejoining,
            Phase::Withdrawn if self.gone => Phase::Off,
            Phase::Rejoining if !wanted => Phase::Withdrawn,
            same => same,
        }
    }
}

#[cfg(test)]
mod tests;
