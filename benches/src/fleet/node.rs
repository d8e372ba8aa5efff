//! The clients of one node: what its proxy and its agent say to the controller, over connections of their own, with
//! the code that proxy and agent use for it. Instead of serving traffic they note what they were sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mesh_api::client::delta::{self, Sink, Subscriptions, Update};
use mesh_api::client::{ClientConfig, Controller};
use mesh_api::proto::Resource;
use mesh_api::proto::control::enrolment_client::EnrolmentClient;
use mesh_api::proto::control::{NodeReport, PodReport, PodState};
use mesh_api::proto::mesh::{
    BackendTrafficPolicy, EndpointSlice, MeshConfig, NodePod, Route, Service, TrafficPolicy,
    Workload,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::watch::Watches;
use super::world::{number_of_service, number_of_uid};

/// What all clients share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) watches: Watches,
    /// Resources and removals that proxies were sent.
    pub(super) resources: AtomicU64,
    /// Messages that proxies and agents were sent.
    pub(super) messages: AtomicU64,
    /// Reports that were answered.
    pub(super) reports: AtomicU64,
    /// Reports that failed.
    pub(super) failed_reports: AtomicU64,
    /// Streams that are open.
    pub(super) streams: AtomicUsize,
    /// Streams that ended.
    pub(super) ended: AtomicU64,
    /// A proxy took something.
    pub(super) progress: Notify,
}

impl Shared {
    fn opened(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    fn closed(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// One node.
pub(super) struct Node {
    pub(super) held: Arc<Mutex<Held>>,
    _keep: watch::Sender<Subscriptions>,
    _tasks: JoinSet<()>,
}

/// What a proxy holds: versions by number; 0: not held.
pub(super) struct Held {
    pub(super) workloads: Vec<u64>,
    pub(super) services: Vec<u64>,
    pub(super) slices: Vec<u64>,
    pub(super) mesh: u64,
}

/// Where and how to connect.
pub(super) struct Access {
    pub(super) proxy: ClientConfig,
    pub(super) agent: ClientConfig,
    /// Names of the Services to subscribe to.
    pub(super) services: BTreeSet<String>,
}

impl Node {
    /// Connects. Keeps connecting until dropped.
    pub(super) fn start(number: usize, access: Access, shared: &Arc<Shared>) -> Self {
        let Access {
            proxy,
            agent,
            services,
        } = access;
        let all = || BTreeSet::from(["*".to_owned()]);
        let (keep, subscriptions) = watch::channel(Subscriptions::from([
            (MeshConfig::TYPE_URL, BTreeSet::from(["mesh".to_owned()])),
            (Workload::TYPE_URL, all()),
            (Service::TYPE_URL, services),
            (EndpointSlice::TYPE_URL, all()),
            (Route::TYPE_URL, all()),
            (BackendTrafficPolicy::TYPE_URL, all()),
            (TrafficPolicy::TYPE_URL, all()),
        ]));
        let held = Arc::new(Mutex::new(Held {
            workloads: Vec::new(),
            services: Vec::new(),
            slices: Vec::new(),
            mesh: 0,
        }));
        let sink = Proxy {
            number,
            held: held.clone(),
            shared: shared.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(delta::run(Controller::start(proxy), subscriptions, sink));
        tasks.spawn(self::agent(agent, shared.clone()));
        Self {
            held,
            _keep: keep,
            _tasks: tasks,
        }
    }
}

impl Held {
    fn slot(&mut self, type_url: &str, name: &str) -> Option<(usize, &mut u64)> {
        let (table, number) = match type_url {
            Workload::TYPE_URL => (&mut self.workloads, number_of_uid(name)?),
            Service::TYPE_URL => (&mut self.services, number_of_service(name)?),
            EndpointSlice::TYPE_URL => (&mut self.slices, number_of_service(name)?),
            MeshConfig::TYPE_URL => return Some((0, &mut self.mesh)),
            _ => return None,
        };
        if number >= MOST {
            return None;
        }
        if table.len() <= number {
            table.resize(number + 1, 0);
        }
        Some((number, &mut table[number]))
    }
}

/// A proxy's stream.
struct Proxy {
    number: usize,
    held: Arc<Mutex<Held>>,
    shared: Arc<Shared>,
}

impl Sink for Proxy {
    /// A stream that ended is counted, and the next one begins from nothing: the run fails then anyway.
    fn known(&self, _type_url: &str) -> HashMap<String, String> {
        HashMap::new()
    }

    fn apply(
        &mut self,
        type_url: &str,
        upserts: Vec<Update>,
        removed: Vec<String>,
    ) -> Result<(), String> {
        let count = upserts.len() + removed.len();
        self.shared.messages.fetch_add(1, Ordering::Relaxed);
        self.shared
            .resources
            .fetch_add(count as u64, Ordering::Relaxed);
        let Some(type_url) = TYPES.into_iter().find(|known| *known == type_url) else {
            return match count {
                0 => Ok(()),
                _ => Err(format!("{type_url}: the mesh has none")),
            };
        };
        let mut held = self.held.lock();
        for Update {
            name,
            version,
            value,
            ..
        } in upserts
        {
            let version = u64::from_str_radix(&version, 16)
                .map_err(|e| format!("{name}: version {version:?}: {e}"))?;
            let Some((number, slot)) = held.slot(type_url, &name) else {
                return Err(format!("{name}: the mesh has no such {type_url}"));
            };
            *slot = version;
            self.taken((type_url, number), Some(&value));
        }
        for name in removed {
            let Some((number, slot)) = held.slot(type_url, &name) else {
                return Err(format!("{name}: the mesh had no such {type_url}"));
            };
            *slot = 0;
            self.taken((type_url, number), None);
        }
        drop(held);
        self.shared.progress.notify_one();
        Ok(())
    }

    fn opened(&mut self) {
        self.shared.opened();
    }

    fn closed(&mut self) {
        self.shared.closed();
    }
}

impl Proxy {
    fn taken(&self, key: super::watch::Key, content: Option<&Bytes>) {
        let content = content.map(|c| &**c);
        self.shared.watches.taken(self.number, key, content);
    }
}

/// An agent: every pod that is to be enrolled is at once.
async fn agent(config: ClientConfig, shared: Arc<Shared>) {
    let controller = Controller::start(config);
    let all = || BTreeSet::from(["*".to_owned()]);
    let (_keep, subscriptions) = watch::channel(Subscriptions::from([
        (NodePod::TYPE_URL, all()),
        (MeshConfig::TYPE_URL, all()),
    ]));
    let (pods, changes) = watch::channel(None);
    let sink = Agent {
        pods,
        shared: shared.clone(),
    };
    tokio::join!(
        delta::run(controller.clone(), subscriptions, sink),
        report(controller, changes, shared),
    );
}

/// An agent's stream: what its pods are to be, once that is known.
struct Agent {
    pods: watch::Sender<Option<BTreeMap<String, bool>>>,
    shared: Arc<Shared>,
}

impl Sink for Agent {
    fn known(&self, _type_url: &str) -> HashMap<String, String> {
        HashMap::new()
    }

    fn apply(
        &mut self,
        type_url: &str,
        upserts: Vec<Update>,
        removed: Vec<String>,
    ) -> Result<(), String> {
        self.shared.messages.fetch_add(1, Ordering::Relaxed);
        if type_url != NodePod::TYPE_URL {
            return Ok(());
        }
        let read = upserts.into_iter().map(|update| {
            let pod = NodePod::decode(update.value).map_err(|e| format!("{}: {e}", update.name))?;
            Ok((update.name, pod.enrolled))
        });
        let read: Vec<(String, bool)> = read.collect::<Result<_, String>>()?;
        self.pods.send_modify(|pods| {
            let pods = pods.get_or_insert_default();
            pods.extend(read);
            pods.retain(|name, _| !removed.contains(name));
        });
        Ok(())
    }

    fn opened(&mut self) {
        self.shared.opened();
    }

    fn closed(&mut self) {
        self.shared.closed();
    }
}

/// Reports on every change and every five seconds, as agents do.
async fn report(
    controller: Controller,
    mut pods: watch::Receiver<Option<BTreeMap<String, bool>>>,
    shared: Arc<Shared>,
) {
    loop {
        let known = pods.borrow_and_update().clone();
        if let Some(known) = known {
            let enrolled = known.into_iter().filter(|(_, enrolled)| *enrolled);
            let report = NodeReport {
                pods: enrolled
                    .map(|(uid, _)| PodReport {
                        uid,
                        state: PodState::Ready.into(),
                        reason: String::new(),
                    })
                    .collect(),
                ready: true,
                ..Default::default()
            };
            let mut client = EnrolmentClient::new(controller.channel().await);
            let done = tokio::time::timeout(REPORT_TIMEOUT, client.report(report)).await;
            let count = match done {
                Ok(Ok(_)) => &shared.reports,
                _ => &shared.failed_reports,
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
        // An error of the time limit is the next report's turn; one of the channel ends with the stream.
        let _ = tokio::time::timeout(REPORT_EVERY, pods.changed()).await;
    }
}

/// What proxies of this mesh are sent.
const TYPES: [&str; 4] = [
    MeshConfig::TYPE_URL,
    Workload::TYPE_URL,
    Service::TYPE_URL,
    EndpointSlice::TYPE_URL,
];
const REPORT_EVERY: Duration = Duration::from_secs(5);
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Numbers beyond this are not of this mesh.
const MOST: usize = 1 << 20;
