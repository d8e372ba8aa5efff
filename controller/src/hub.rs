//! Where everything meets: objects, reports, acknowledgements and roots come in, snapshots go out.
//!
//! All changes happen under one lock, in memory, and end in `Hub::advance`: enrolment moves as far as it
//! can, what moved is written to disk (or, in a cluster, has come back from the API server), and a snapshot is
//! published. Readers hold a snapshot and
//! never wait for a writer. The lock is never held over an await.

mod cluster;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::identity::{Identity, NodeRole};
use mesh_api::names::address_from_bytes;
use mesh_api::proto::control::{NodeReport, RegisterPodRequest};
use mesh_api::proto::mesh::NodePod;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::enrolment::{
    Enrolment, Fleet, Peers, Phase, Progress, Recording, RegisterError, Store, StoreError, Stored,
    StreamId,
};
use crate::metrics::{Metrics, NodeLabel, PhaseLabel, Role, Type};
use crate::model::{self, Condition, Model, ObjectStatus, Settings};
use crate::providers::Objects;
use crate::resources::{self, Builder, Snapshot};

/// The state of the control plane. Shared behind an `Arc`.
#[derive(Debug)]
pub struct Hub {
    core: Mutex<Core>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    /// Bumped whenever a stream got further or ended.
    progress: watch::Sender<u64>,
    /// There may be something to write to the API server.
    to_record: Notify,
    readiness: watch::Sender<BTreeMap<String, bool>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Core {
    settings: Settings,
    objects: Objects,
    model: Arc<Model>,
    enrolment: Enrolment,
    fleet: Fleet,
    keeper: Keeper,
    bundle: Vec<Vec<u8>>,
    /// The snapshot that told the nodes of it.
    bundle_since: u64,
    snapshot: Arc<Snapshot>,
    builder: Builder,
    /// The newest snapshot that a report of a node may have caused, by node.
    caused: HashMap<String, u64>,
    warnings: Vec<String>,
    /// Something that must survive the process is not on disk yet.
    unwritten: bool,
}

/// Where enrolment is kept.
#[derive(Debug)]
pub enum Keeper {
    /// In a file of this process, and what an earlier one kept there.
    File(Store, Stored),
    /// At the pods, where all replicas see it.
    Cluster(Cluster),
}

/// What is known of a cluster.
#[derive(Debug, Default)]
pub struct Cluster {
    recording: Recording,
    peers: Peers,
    /// How far the pods were read.
    version: u64,
    /// How far they were read when a snapshot was made, the newest last.
    versions: VecDeque<(u64, u64)>,
    /// There is a model that was not looked at for what is recorded.
    unmirrored: bool,
}

/// What the hub starts from.
#[derive(Debug)]
pub struct Start {
    /// What is set for the whole mesh.
    pub settings: Settings,
    /// The first reading of the provider: enrolled pods that are not in it are taken for gone.
    pub objects: Objects,
    /// Roots to trust, DER.
    pub bundle: Vec<Vec<u8>>,
    /// Where enrolment is kept.
    pub keeper: Keeper,
}

impl Hub {
    /// Builds and publishes the first snapshot.
    pub fn new(start: Start, metrics: Metrics) -> Arc<Self> {
        let Start {
            settings,
            objects,
            bundle,
            keeper,
        } = start;
        let now = Instant::now();
        let model = model::build(&objects, &settings);
        tell_statuses(&[], &model.statuses);
        let mut fleet = Fleet::default();
        let enrolment = match &keeper {
            Keeper::File(_, stored) => {
                fleet.expect(stored.nodes.iter().cloned(), now);
                Enrolment::restore(stored)
            }
            Keeper::Cluster(_) => {
                fleet.expect(cluster::nodes_that_took_part(&model), now);
                Enrolment::default()
            }
        };
        let core = Core {
            model: Arc::new(model),
            enrolment,
            settings,
            objects,
            fleet,
            keeper,
            bundle,
            bundle_since: 1,
            snapshot: Arc::default(),
            builder: Builder::default(),
            caused: HashMap::new(),
            warnings: Vec::new(),
            unwritten: true,
        };
        let hub = Self {
            core: Mutex::new(core),
            snapshots: watch::Sender::default(),
            progress: watch::Sender::default(),
            to_record: Notify::new(),
            readiness: watch::Sender::default(),
            metrics,
        };
        hub.advance(&mut hub.core.lock(), true);
        Arc::new(hub)
    }

    /// The newest snapshot, and those that follow.
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.subscribe()
    }

    /// Changes whenever a stream got further or ended.
    pub fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    /// What the process counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The mesh as the objects describe it now.
    pub fn model(&self) -> Arc<Model> {
        self.core.lock().model.clone()
    }

    /// The users' objects changed.
    pub fn set_objects(&self, objects: Objects) {
        let mut core = self.core.lock();
        if same(&core.objects, &objects) {
            return;
        }
        let old = (&core.objects, &*core.model);
        let model = Arc::new(model::rebuild(&objects, &core.settings, old));
        tell_statuses(&core.model.statuses, &model.statuses);
        core.model = model;
        core.objects = objects;
        self.advance(&mut core, true);
    }

    /// The trusted roots changed. Returns the snapshot that tells the nodes.
    pub fn set_bundle(&self, bundle: Vec<Vec<u8>>) -> u64 {
        let mut core = self.core.lock();
        if core.bundle != bundle {
            core.bundle = bundle;
            self.advance(&mut core, true);
            core.bundle_since = core.snapshot.seq;
        }
        core.snapshot.seq
    }

    /// Waits until every node that counts holds the MeshConfig of snapshot `seq`.
    pub async fn mesh_config_held(&self, seq: u64) {
        self.when(|core| {
            let now = Instant::now();
            let held = core.fleet.all_hold_mesh(seq, now) && core.others_trust(now);
            held.then_some(())
        })
        .await;
    }

    /// Time passed: leases may have run out.
    pub fn tick(&self) {
        let mut core = self.core.lock();
        let now = Instant::now();
        core.unwritten |= core.fleet.expire(now);
        if let Keeper::Cluster(cluster) = &mut core.keeper {
            cluster.tick(now);
        }
        self.advance(&mut core, false);
        drop(core);
        self.progress.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Whether a pod that is bound to `node` has this identity now.
    pub fn identity_on_node(&self, identity: &Identity, node: &str) -> bool {
        let model = self.model();
        model
            .pods
            .values()
            .any(|p| p.node == node && p.identity == *identity)
    }

    /// Records a pod's addresses. Waits a moment for a pod that the provider has not shown yet.
    pub async fn register(
        &self,
        node: &str,
        request: &RegisterPodRequest,
    ) -> Result<NodePod, RegisterError> {
        let known = self.when(|core| {
            let pod = core.model.pods.get(request.uid.as_str())?;
            (pod.node == node).then_some(())
        });
        // Unknown in the end: the attempt below says so.
        let _ = tokio::time::timeout(REGISTER_WAIT, known).await;
        let addresses = request.addresses.iter();
        let addresses = addresses.filter_map(|a| address_from_bytes(a)).collect();
        self.record_addresses(node, request, addresses).await?;
        let core = self.core.lock();
        let record = core.enrolment.record(&request.uid);
        let pod = core.model.pods.get(request.uid.as_str());
        // It was there a moment ago, but may be gone by now.
        pod.map(|pod| resources::node_pod_of(&core.model, pod, record))
            .ok_or_else(|| RegisterError::NotFound {
                namespace: request.namespace.clone(),
                name: request.name.clone(),
                uid: request.uid.clone(),
                node: node.into(),
            })
    }

    /// Takes a node's report and returns once what it causes was handed to every connected node, or
    /// after a bounded wait for those that do not read.
    pub async fn report(&self, node: &str, report: &NodeReport) {
        let label = NodeLabel { node: node.into() };
        self.metrics.node_reports.get_or_create(&label).inc();
        self.metrics
            .node_ready
            .get_or_create(&label)
            .set(report.ready.into());
        self.readiness.send_if_modified(|nodes| {
            nodes.insert(node.into(), report.ready) != Some(report.ready)
        });
        let seq = {
            let mut core = self.core.lock();
            let Core {
                enrolment, fleet, ..
            } = &mut *core;
            let (news, strangers) = enrolment.report(node, report, fleet);
            for uid in strangers {
                tracing::debug!(
                    node,
                    uid,
                    "report names a pod that is not bound to the node"
                );
            }
            // Nearly all reports repeat the one before, and there are many.
            if news {
                self.count_failures(&core);
                self.advance(&mut core, false);
                let seq = core.snapshot.seq;
                core.caused.insert(node.into(), seq);
            }
            core.caused.get(node).copied().unwrap_or(0)
        };
        let handed = self.when(|core| core.fleet.all_handed(seq).then_some(()));
        if tokio::time::timeout(HAND_OUT_WAIT, handed).await.is_err() {
            tracing::warn!(
                node,
                seq,
                "report answered before every node took the change"
            );
        }
    }

    /// Takes a new stream into account until the guard is dropped.
    pub fn open_stream(self: &Arc<Self>, node: &str, role: NodeRole) -> StreamGuard {
        let mut core = self.core.lock();
        // One more to wait for moves no pod; the clock writes down that there is another node.
        let id = core.fleet.open(node, role, Instant::now());
        core.unwritten = true;
        let gauge = self.metrics.streams.get_or_create_owned(&role_label(role));
        gauge.inc();
        StreamGuard {
            hub: self.clone(),
            id,
            role,
        }
    }

    /// A view of the state for people: enrolment and streams.
    pub fn status(&self) -> serde_json::Value {
        let core = self.core.lock();
        let pods = core.enrolment.records().filter_map(|(uid, record)| {
            let pod = core.model.pods.get(uid)?;
            Some(serde_json::json!({
                "namespace": pod.namespace, "name": pod.name, "uid": **uid, "node": pod.node,
                "identity": pod.identity.as_str(), "phase": record.phase,
                "addresses": record.addresses, "failure": record.failure,
            }))
        });
        let streams = core.fleet.streams().map(|(node, role, progress)| {
            serde_json::json!({
                "node": node, "role": role.to_string(), "acked": progress.acked,
                "handed": progress.handed, "rejected": progress.rejected.iter().map(|n| &**n).collect::<Vec<_>>(),
            })
        });
        serde_json::json!({
            "snapshot": core.snapshot.seq,
            "pods": pods.collect::<Vec<_>>(),
            "streams": streams.collect::<Vec<_>>(),
            "nodes": core.fleet.nodes(),
            "warnings": core.warnings,
            "routes": statuses_of(&core.model, |kind| kind.ends_with("Route")),
            "policies": statuses_of(&core.model, |kind| kind.ends_with("Policy")),
        })
    }

    /// Waits until `ready` gives something; looked at whenever snapshots or streams move.
    async fn when<T>(&self, mut ready: impl FnMut(&Core) -> Option<T>) -> T {
        let mut snapshots = self.snapshots.subscribe();
        let mut progress = self.progress.subscribe();
        loop {
            if let Some(value) = ready(&self.core.lock()) {
                return value;
            }
            // Both senders live as long as `self`.
            tokio::select! {
                _ = snapshots.changed() => {}
                _ = progress.changed() => {}
            }
        }
    }

    fn advance(&self, core: &mut Core, mut changed: bool) {
        let now = Instant::now();
        // Each round moves every pod at most one phase on; without nodes to wait for there are a few.
        loop {
            let seq = core.snapshot.seq + 1;
            let moved = core.step(seq, now);
            if !moved && !changed {
                break;
            }
            core.unwritten |= moved;
            changed = false;
            let Core {
                builder,
                model,
                enrolment,
                bundle,
                snapshot,
                ..
            } = core;
            let next = builder.build(model, enrolment, bundle, snapshot);
            core.snapshot = Arc::new(next);
        }
        // On disk before anyone hears of it.
        if core.unwritten {
            match core.keep() {
                Ok(()) => core.unwritten = false,
                Err(error) => {
                    tracing::error!("{error}; a restart of the controller would enrol pods anew");
                    self.metrics.store_failures.inc();
                }
            }
        }
        if let Keeper::Cluster(_) = core.keeper {
            self.to_record.notify_one();
        }
        if self.snapshots.borrow().seq != core.snapshot.seq {
            self.tell_warnings(core);
            self.count(core);
            self.snapshots.send_replace(core.snapshot.clone());
        }
    }

    fn tell_warnings(&self, core: &mut Core) {
        let of_model = core.model.warnings.iter().map(ToString::to_string);
        let all = of_model.chain(core.snapshot.warnings.iter().cloned());
        let mut warnings: Vec<String> = all.collect();
        warnings.sort();
        warnings.dedup();
        for warning in warnings.iter().filter(|w| !core.warnings.contains(w)) {
            tracing::warn!("{warning}");
        }
        core.warnings = warnings;
    }

    fn count(&self, core: &Core) {
        let snapshot = &core.snapshot;
        self.metrics.snapshot.set(snapshot.seq as i64);
        for (r#type, count) in [
            ("Workload", snapshot.workloads.len()),
            (
                "NodePod",
                snapshot.node_pods.values().map(|t| t.len()).sum(),
            ),
            ("Service", snapshot.services.len()),
            ("EndpointSlice", snapshot.slices.len()),
            ("Route", snapshot.routes.len()),
            (
                "BackendTrafficPolicy",
                snapshot.backend_traffic_policies.len(),
            ),
            ("TrafficPolicy", snapshot.traffic_policies.len()),
        ] {
            let gauge = self.metrics.resources.get_or_create_owned(&Type { r#type });
            gauge.set(count as i64);
        }
        let mut counts = Phase::ALL.map(|phase| (phase, 0u64));
        for (_, record) in core.enrolment.records() {
            let of_phase = counts.iter_mut().find(|(phase, _)| *phase == record.phase);
            if let Some((_, count)) = of_phase {
                *count += 1;
            }
        }
        for (phase, count) in counts {
            let label = PhaseLabel {
                phase: phase.name(),
            };
            self.metrics
                .pods
                .get_or_create_owned(&label)
                .set(count as i64);
        }
        self.metrics.trusted_roots.set(core.bundle.len() as i64);
        // One of a pod that is gone is none any more.
        self.count_failures(core);
    }

    fn count_failures(&self, core: &Core) {
        let records = core.enrolment.records();
        let failed = records.filter(|(_, r)| r.failure.is_some()).count();
        self.metrics.enrolment_failures.set(failed as i64);
    }
}

impl Core {
    fn step(&mut self, seq: u64, now: Instant) -> bool {
        let (model, fleet) = (&self.model, &self.fleet);
        match &mut self.keeper {
            Keeper::File(..) => self.enrolment.step(model, fleet, seq, now),
            Keeper::Cluster(cluster) => cluster.step(&mut self.enrolment, (model, fleet), seq, now),
        }
    }

    fn keep(&mut self) -> Result<(), StoreError> {
        match &mut self.keeper {
            Keeper::File(store, _) => store.write(Stored {
                nodes: self.fleet.nodes(),
                pods: self.enrolment.to_store(),
            }),
            Keeper::Cluster(_) => Ok(()),
        }
    }
}

/// Whether nothing changed. Nearly all objects are the very same ones, which is seen without reading them.
fn same(old: &Objects, new: &Objects) -> bool {
    fn all<K: Ord, V: PartialEq>(old: &BTreeMap<K, Arc<V>>, new: &BTreeMap<K, Arc<V>>) -> bool {
        let mut pairs = old.iter().zip(new);
        old.len() == new.len()
            && pairs.all(|((a, x), (b, y))| a == b && (Arc::ptr_eq(x, y) || x == y))
    }
    let Objects {
        namespaces,
        nodes,
        pods,
        services,
        slices,
        http_routes,
        grpc_routes,
        tls_routes,
        tcp_routes,
        backend_traffic_policies,
        traffic_policies,
    } = new;
    all(&old.namespaces, namespaces)
        && all(&old.nodes, nodes)
        && all(&old.pods, pods)
        && all(&old.services, services)
        && all(&old.slices, slices)
        && all(&old.http_routes, http_routes)
        && all(&old.grpc_routes, grpc_routes)
        && all(&old.tls_routes, tls_routes)
        && all(&old.tcp_routes, tcp_routes)
        && all(&old.backend_traffic_policies, backend_traffic_policies)
        && all(&old.traffic_policies, traffic_policies)
}

fn statuses_of(model: &Model, wanted: impl Fn(&str) -> bool) -> Vec<&ObjectStatus> {
    let statuses = model.statuses.iter();
    statuses.filter(|s| wanted(s.kind)).collect()
}

/// Logs what is to be said of routes and policies, as far as it is another than before.
fn tell_statuses(old: &[ObjectStatus], new: &[ObjectStatus]) {
    let old: HashMap<String, &ObjectStatus> = old.iter().map(|s| (s.key(), s)).collect();
    for status in new {
        let key = status.key();
        let before = old.get(&key);
        if before.is_some_and(|b| b.parents == status.parents) {
            continue;
        }
        if status.is_good() {
            tracing::info!("{key}: accepted");
            continue;
        }
        for parent in &status.parents {
            let name = &parent.parent_ref.name;
            for Condition {
                kind,
                status,
                reason,
                message,
            } in &parent.conditions
            {
                if !message.is_empty() {
                    tracing::warn!("{key}: {name}: {kind}={status} ({reason}): {message}");
                }
            }
        }
    }
}

/// A stream that counts; dropped, its node's lease starts to run.
#[derive(Debug)]
pub struct StreamGuard {
    hub: Arc<Hub>,
    id: StreamId,
    role: NodeRole,
}

impl StreamGuard {
    /// The stream got further.
    pub fn progress(&self, progress: Progress) {
        {
            let mut core = self.hub.core.lock();
            // Unless it was the last one to get there, nobody waits for this.
            if !core.fleet.progress(self.id, progress, Instant::now()) {
                return;
            }
            if core.enrolment.awaits_acks() {
                self.hub.advance(&mut core, false);
            }
        }
        self.hub.progress.send_modify(|n| *n = n.wrapping_add(1));
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        {
            let mut core = self.hub.core.lock();
            core.fleet.close(self.id, Instant::now());
            if core.enrolment.awaits_acks() {
                self.hub.advance(&mut core, false);
            }
        }
        let label = role_label(self.role);
        self.hub.metrics.streams.get_or_create_owned(&label).dec();
        self.hub.progress.send_modify(|n| *n = n.wrapping_add(1));
    }
}

fn role_label(role: NodeRole) -> Role {
    Role {
        role: match role {
            NodeRole::Proxy => "proxy",
            NodeRole::Agent => "agent",
        },
    }
}

/// How long a registration waits for its pod to be shown by the provider.
const REGISTER_WAIT: Duration = Duration::from_secs(2);
/// How long a registration waits for the API server to have it.
const RECORD_WAIT: Duration = Duration::from_secs(5);
/// How long a report waits for slow nodes. CNI ADD has ten seconds for everything.
const HAND_OUT_WAIT: Duration = Duration::from_secs(3);
