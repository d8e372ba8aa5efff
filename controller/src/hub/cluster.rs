//! The hub where enrolment is kept at the pods: what is to be written, and what the other replicas know.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::proto::control::RegisterPodRequest;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Cluster, Core, Hub, Keeper, RECORD_WAIT};
use crate::enrolment::{Enrolment, Fleet, Peer, RegisterError, Write};
use crate::model::Model;
use crate::providers::Objects;

impl Cluster {
    /// What was read so far, before the first snapshot.
    pub fn new(version: u64) -> Self {
        Self {
            version,
            unmirrored: true,
            ..Self::default()
        }
    }

    pub(super) fn tick(&mut self, now: Instant) {
        self.peers.expire(now);
    }

    pub(super) fn step(
        &mut self,
        enrolment: &mut Enrolment,
        (model, fleet): (&Model, &Fleet),
        seq: u64,
        now: Instant,
    ) -> bool {
        let at = (seq, self.version);
        let mirrored = std::mem::take(&mut self.unmirrored)
            && enrolment.mirror(model, &mut self.recording, at);
        let others = (fleet, &self.peers);
        let moved = enrolment.propose(model, &mut self.recording, others, seq, now);
        mirrored || moved
    }

    /// The pods as they were read last are those of this snapshot.
    fn published(&mut self, seq: u64) {
        match self.versions.back_mut() {
            Some((newest, version)) if *newest == seq => *version = self.version,
            _ => self.versions.push_back((seq, self.version)),
        }
        if self.versions.len() > VERSIONS {
            self.versions.pop_front();
        }
    }

    /// How far the pods had been read for a snapshot.
    fn version_of(&self, seq: u64) -> u64 {
        let older = self.versions.iter().rev().find(|(of, _)| *of <= seq);
        older.map_or(0, |(_, version)| *version)
    }
}

impl Hub {
    /// The users' objects changed, or were found unchanged, up to this version.
    pub fn set_read(&self, objects: Option<Objects>, version: u64) {
        if let Keeper::Cluster(cluster) = &mut self.core.lock().keeper {
            cluster.version = version;
            cluster.unmirrored |= objects.is_some();
        }
        if let Some(objects) = objects {
            self.set_objects(objects);
        }
        let mut core = self.core.lock();
        let seq = core.snapshot.seq;
        if let Keeper::Cluster(cluster) = &mut core.keeper {
            cluster.published(seq);
        }
    }

    /// Waits until something may have to be recorded.
    pub async fn to_record(&self) {
        self.to_record.notified().await;
    }

    /// What is to be recorded now.
    pub fn unrecorded(&self) -> Vec<Write> {
        match &mut self.core.lock().keeper {
            Keeper::Cluster(cluster) => cluster.recording.unsent(Instant::now()),
            Keeper::File(..) => Vec::new(),
        }
    }

    /// The API server refused a write.
    pub fn not_recorded(&self, write: &Write) {
        if let Keeper::Cluster(cluster) = &mut self.core.lock().keeper {
            cluster.recording.give_up(write);
        }
    }

    /// Another replica says how far its nodes are; absent: it is gone.
    pub fn heard_of_replica(&self, name: &str, peer: Option<Peer>) {
        let mut core = self.core.lock();
        if let Keeper::Cluster(cluster) = &mut core.keeper {
            match peer {
                Some(peer) => cluster.peers.heard(name, peer, Instant::now()),
                None => cluster.peers.left(name),
            }
            if core.enrolment.awaits_acks() {
                self.advance(&mut core, false);
            }
        }
        drop(core);
        self.progress.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// How far all nodes that this replica serves are: the version of the pods, and whether a pod waits for
    /// that.
    pub fn acknowledged(&self) -> (u64, bool) {
        let core = self.core.lock();
        let Keeper::Cluster(cluster) = &core.keeper else {
            return (0, false);
        };
        let seq = core.fleet.acknowledged(core.snapshot.seq, Instant::now());
        let version = seq.map_or(0, |seq| cluster.version_of(seq));
        (version, core.enrolment.awaits_acks())
    }

    /// The hash of the bundle that all nodes of this replica hold; empty if one does not yet.
    pub fn trusted(&self) -> String {
        let core = self.core.lock();
        let held = core.fleet.all_hold_mesh(core.bundle_since, Instant::now());
        if held {
            hash(&core.bundle)
        } else {
            String::new()
        }
    }

    /// The users' objects as they were read last.
    pub fn objects(&self) -> Objects {
        self.core.lock().objects.clone()
    }

    /// Pods whose agent could not enrol them: namespace, name, UID and the reason.
    pub fn failures(&self) -> Vec<(String, String, Arc<str>, String)> {
        let core = self.core.lock();
        let failed = core.enrolment.records().filter_map(|(uid, record)| {
            let pod = core.model.pods.get(uid)?;
            let reason = record.failure.clone()?;
            Some((pod.namespace.clone(), pod.name.clone(), uid.clone(), reason))
        });
        failed.collect()
    }

    /// What the agents that this replica serves said last: whether they can enrol pods, by node.
    pub fn readiness(&self) -> BTreeMap<String, bool> {
        let mut nodes = self.readiness.borrow().clone();
        let core = self.core.lock();
        nodes.retain(|node, _| core.fleet.has_agent(node));
        nodes
    }

    /// Changes when an agent says something else than before.
    pub fn readiness_changes(&self) -> watch::Receiver<BTreeMap<String, bool>> {
        self.readiness.subscribe()
    }

    pub(super) async fn record_addresses(
        &self,
        node: &str,
        request: &RegisterPodRequest,
        addresses: Vec<IpAddr>,
    ) -> Result<(), RegisterError> {
        let name = (request.namespace.as_str(), request.name.as_str());
        let uid = request.uid.as_str();
        {
            let mut core = self.core.lock();
            let Core {
                model,
                enrolment,
                keeper,
                ..
            } = &mut *core;
            let recording = match keeper {
                Keeper::File(..) => {
                    enrolment.register(model, node, uid, name, addresses)?;
                    core.unwritten = true;
                    self.advance(&mut core, true);
                    return Ok(());
                }
                Keeper::Cluster(cluster) => &mut cluster.recording,
            };
            enrolment.propose_addresses(model, recording, node, uid, name, &addresses)?;
        }
        self.to_record.notify_one();
        let recorded = self.when(|core| {
            let pod = core.model.pods.get(uid);
            pod.is_none_or(|pod| pod.recorded.addresses == addresses)
                .then_some(())
        });
        let recorded = tokio::time::timeout(RECORD_WAIT, recorded).await;
        recorded.map_err(|_| RegisterError::NotRecorded)
    }
}

impl Core {
    /// Whether the nodes of all other replicas hold the bundle.
    pub(super) fn others_trust(&self, now: Instant) -> bool {
        match &self.keeper {
            Keeper::Cluster(cluster) => cluster.peers.all_trust(&hash(&self.bundle), now),
            Keeper::File(..) => true,
        }
    }
}

fn hash(bundle: &[Vec<u8>]) -> String {
    let mut digest = Sha256::new();
    for der in bundle {
        digest.update(der);
    }
    digest.finalize()[..16]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Nodes with a pod that others have heard of: their proxies are about to come back.
pub(super) fn nodes_that_took_part(model: &Model) -> BTreeSet<String> {
    let known = model.pods.values().filter(|p| p.recorded.phase.is_some());
    known.map(|p| p.node.clone()).collect()
}

/// Snapshots whose version is remembered. A node that is further behind holds up "every node knows" until it
/// has caught up or its lease has run out.
const VERSIONS: usize = 4096;
