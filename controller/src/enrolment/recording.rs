//! Enrolment in a cluster: the record is an annotation of the pod, and the API server the only one who knows.
//!
//! A replica decides over the pods of the nodes whose agents it serves, and only proposes: it writes the
//! annotation, and takes the move for done when the annotation comes back with the pods. So every replica
//! publishes a phase only after all others can see it, and a restart finds what was published. Where "every
//! node knows" is asked for, the nodes of the other replicas count as well ([`Peers`]).
//!
//! The phases that no other node hears of (`off`, `wanted`) are not recorded; every replica finds them by
//! itself. An admission policy keeps others from writing the annotation; where there is none, an address counts only
//! as far as the pod's status does not contradict it, nor that of another pod.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Enrolment, Fleet, Peers, Phase, RegisterError};
use crate::model::{Model, Pod};

/// The content of the annotation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Recorded {
    /// What its agent registered at CNI ADD.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Absent: no other node has heard of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
}

/// An annotation to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Of the pod.
    pub uid: Arc<str>,
    /// Of the pod.
    pub namespace: String,
    /// Of the pod.
    pub name: String,
    /// What it is to say.
    pub recorded: Recorded,
}

/// What was proposed and has not come back.
#[derive(Debug, Default)]
pub struct Recording {
    open: BTreeMap<Arc<str>, Proposal>,
}

#[derive(Debug)]
struct Proposal {
    write: Write,
    sent: Option<Instant>,
}

impl Recording {
    /// Takes what is to be written now; each is taken again if it does not come back.
    pub fn unsent(&mut self, now: Instant) -> Vec<Write> {
        let mut writes = Vec::new();
        for proposal in self.open.values_mut() {
            if proposal.sent.is_none_or(|sent| now >= sent + RESEND) {
                proposal.sent = Some(now);
                writes.push(proposal.write.clone());
            }
        }
        writes
    }

    /// A write cannot be done: what it was for is to be judged anew.
    pub fn give_up(&mut self, write: &Write) {
        if self.open.get(&write.uid).is_some_and(|p| p.write == *write) {
            self.open.remove(&write.uid);
        }
    }

    fn propose(&mut self, pod: &Pod, change: impl FnOnce(&mut Recorded)) {
        let open = self.open.get(&pod.uid);
        let before = open.map_or(&pod.recorded, |p| &p.write.recorded);
        let mut recorded = before.clone();
        change(&mut recorded);
        if recorded == *before {
            return;
        }
        let write = Write {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            recorded,
        };
        self.open
            .insert(pod.uid.clone(), Proposal { write, sent: None });
    }

    fn came_back(&mut self, model: &Model) {
        self.open.retain(|uid, proposal| {
            let pod = model.pods.get(uid);
            pod.is_some_and(|pod| pod.recorded != proposal.write.recorded)
        });
    }
}

impl Enrolment {
    /// Proposes the addresses of a pod of `node`, and to take them from other pods of that node.
    pub fn propose_addresses(
        &self,
        model: &Model,
        recording: &mut Recording,
        node: &str,
        uid: &str,
        name: (&str, &str),
        addresses: &[IpAddr],
    ) -> Result<(), RegisterError> {
        let pod = self.may_register(model, node, uid, name, addresses)?;
        let others = model
            .pods
            .values()
            .filter(|p| p.node == node && *p.uid != *uid);
        for other in others {
            if other
                .recorded
                .addresses
                .iter()
                .any(|a| addresses.contains(a))
            {
                recording.propose(other, |r| r.addresses.retain(|a| !addresses.contains(a)));
            }
        }
        recording.propose(pod, |r| r.addresses = addresses.to_vec());
        Ok(())
    }

    /// Takes over what is recorded at the pods. `version` is how far they were read. True: something moved.
    pub fn mirror(
        &mut self,
        model: &Model,
        recording: &mut Recording,
        (seq, version): (u64, u64),
    ) -> bool {
        recording.came_back(model);
        let mut moved = self.follow(model);
        let in_status = addresses_in_status(model);
        for (uid, pod) in &model.pods {
            let mut addresses = pod.recorded.addresses.clone();
            addresses.retain(|address| {
                let is_its_own = match pod.addresses.is_empty() {
                    true => in_status.get(address).is_none_or(|other| *other == uid),
                    false => pod.addresses.contains(address),
                };
                if !is_its_own {
                    tracing::debug!(%address, uid = &**uid, "is recorded but not the pod's");
                }
                is_its_own
            });
            let record = self.record_of(pod);
            if record.addresses != addresses {
                record.addresses = addresses;
                moved = true;
            }
            if on_record(record.phase) != pod.recorded.phase {
                record.enter(pod, pod.recorded.phase.unwrap_or(Phase::Off), seq);
                record.version = version;
                moved = true;
            }
        }
        moved
    }

    /// Like [`step`](Self::step) where moves are recorded in a cluster: those that others must see first are
    /// proposed. True: something moved at once.
    pub fn propose(
        &mut self,
        model: &Model,
        recording: &mut Recording,
        (fleet, peers): (&Fleet, &Peers),
        seq: u64,
        now: Instant,
    ) -> bool {
        let (mut moved, mut awaits_acks) = (self.follow(model), false);
        let known = fleet.known(now);
        for (uid, pod, record) in self.with_pods(model) {
            let decides = fleet.has_agent(&pod.node);
            let next = record.next(pod, || {
                decides
                    && known.as_ref().is_some_and(|k| k.hold(uid, record.since))
                    && peers.all_hold(record.version, now)
            });
            // Also of one that is enforced or withdrawn in a moment: what it proposes may not come back.
            awaits_acks |= record.awaits_acks();
            if next == record.phase {
                continue;
            }
            if on_record(next) == on_record(record.phase) {
                record.enter(pod, next, seq);
                awaits_acks |= record.awaits_acks();
                moved = true;
            } else if decides {
                recording.propose(pod, |r| r.phase = on_record(next));
            }
        }
        self.awaits_acks = awaits_acks;
        moved
    }
}

/// The phase as it is recorded.
fn on_record(phase: Phase) -> Option<Phase> {
    match phase {
        Phase::Off | Phase::Wanted => None,
        Phase::Tunnel | Phase::Enforced | Phase::Leaving | Phase::Withdrawn | Phase::Rejoining => {
            Some(phase)
        }
    }
}

fn addresses_in_status(model: &Model) -> HashMap<IpAddr, &Arc<str>> {
    let of_pod = |pod: &'_ Arc<Pod>| pod.addresses.clone();
    let pairs = model.pods.iter();
    pairs
        .flat_map(|(uid, pod)| of_pod(pod).into_iter().map(move |a| (a, uid)))
        .collect()
}

/// After this a write that did not come back is done again.
const RESEND: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
