//! `warren-bench fleet`: the control plane at scale. The real controller, as a process of its own, on a directory of
//! manifests; and in this process the proxies and agents of all nodes, as far as they speak to it: real
//! TLS, certificates for bootstrap tokens, discovery streams and reports, with the clients that proxies and agents use.
//!
//! Correctness is asserted all the way: every proxy ends up with exactly what it subscribed to, all in the same
//! versions; a change reaches every node that holds the resource and no other; no stream breaks, no report fails.

mod controller;
mod node;
mod report;
mod watch;
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mesh_api::identity::NodeRole;
use mesh_api::proto::Resource;
use mesh_api::proto::mesh::{EndpointSlice, EnrolmentState, Workload};
use prost::Message;
use serde::Serialize;

use self::controller::{Controller, Usage};
use self::node::{Access, Held, Node, Shared};
pub use self::report::Report;
use self::report::{Changes, Stage};
use self::watch::{Key, Wanted};
pub use self::world::Size;
use self::world::{Edit, World};
use crate::harness::{Error, io};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// How large the mesh is.
    pub size: Size,
    /// What proxies subscribe to.
    pub state: State,
    /// Edits of an endpoint.
    pub endpoint_changes: usize,
    /// Pods that are replaced.
    pub pod_changes: usize,
    /// How long the fleet is watched doing nothing.
    pub idle: Duration,
    /// Directory of `warren-controller`.
    pub binaries: PathBuf,
    /// Where manifests, configuration and log go.
    pub work: PathBuf,
}

/// What proxies subscribe to, beside the table of all meshed pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// What node proxies do: the Services of namespaces with a pod on the node, and on demand, by address, those that
    /// its pods call.
    Proxy,
    /// Only those that its pods call.
    Demand,
    /// Every Service.
    Full,
}

/// Runs it. The controller has ended when this returns.
pub async fn run(options: &Options) -> Result<Report, Error> {
    let work = &options.work;
    // What an earlier run left there may be of another mesh.
    match fs::remove_dir_all(work) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(io(format!("remove {}", work.display()))(e));
        }
        _ => {}
    }
    let mut world = World::new(options.size, &work.join("manifests"));
    world.write()?;
    let started = Instant::now();
    let controller = Controller::start(&options.binaries, work, &world, START_LIMIT)?;
    let mut run = Run {
        options,
        report: Report::new(options),
        before: Before::default(),
        controller,
        shared: Arc::default(),
        nodes: Vec::new(),
        interests: Vec::new(),
    };
    run.stage("manifests read", started)?;
    run.connect(&world).await?;
    run.rest().await?;
    run.change_endpoints(&mut world).await?;
    run.replace_pods(&mut world).await?;
    run.verify(&world)?;
    run.report.complaints = run.controller.complaints();
    Ok(run.report)
}

struct Run<'a> {
    options: &'a Options,
    report: Report,
    before: Before,
    controller: Controller,
    shared: Arc<Shared>,
    nodes: Vec<Node>,
    /// By node: the Services that it is to hold.
    interests: Vec<BTreeSet<usize>>,
}

/// Counts at the end of the stage before.
#[derive(Default)]
struct Before {
    cpu_seconds: f64,
    bytes: u64,
    resources: u64,
    messages: u64,
    reports: u64,
}

impl Run<'_> {
    /// Ends a stage that began at `began`.
    fn stage(&mut self, name: &'static str, began: Instant) -> Result<(), Error> {
        let seconds = began.elapsed().as_secs_f64();
        let Usage {
            rss_mib,
            peak_rss_mib,
            cpu_seconds,
        } = self.controller.usage()?;
        let now = Before {
            cpu_seconds,
            bytes: self.controller.bytes_sent()?,
            resources: self.shared.resources.load(Ordering::Relaxed),
            messages: self.shared.messages.load(Ordering::Relaxed),
            reports: self.shared.reports.load(Ordering::Relaxed),
        };
        let nodes = self.options.size.nodes as f64;
        let stage = Stage {
            name,
            seconds,
            cpu_seconds: now.cpu_seconds - self.before.cpu_seconds,
            rss_mib,
            peak_rss_mib,
            bytes_per_node: (now.bytes.saturating_sub(self.before.bytes)) as f64 / nodes,
            resources_per_node: (now.resources - self.before.resources) as f64 / nodes,
            messages_per_node: (now.messages - self.before.messages) as f64 / nodes,
            reports: now.reports - self.before.reports,
        };
        eprintln!("{}", stage.line());
        self.report.stages.push(stage);
        self.before = now;
        Ok(())
    }

    /// All nodes connect at once, with nothing in hand, until each proxy holds what it is to hold.
    async fn connect(&mut self, world: &World) -> Result<(), Error> {
        let began = Instant::now();
        let all: BTreeSet<usize> = (0..world.size.services).collect();
        for number in 0..world.size.nodes {
            let used = &world.used[number];
            let addresses = used
                .iter()
                .map(|service| format!("address/{}", world.service_address(*service)));
            let (names, interest): (BTreeSet<String>, BTreeSet<usize>) = match self.options.state {
                State::Demand => (addresses.collect(), used.clone()),
                State::Full => (
                    all.iter()
                        .map(|service| world.service_key(*service))
                        .collect(),
                    all.clone(),
                ),
                State::Proxy => {
                    let near = world.namespaces_on(number);
                    let near = all.iter().filter(|s| {
                        world.size.services <= COMPLETE
                            || near.contains(&(*s % world.size.namespaces))
                    });
                    let names = addresses.chain(["*".to_owned()]).collect();
                    (names, used.iter().chain(near).copied().collect())
                }
            };
            let access = Access {
                proxy: self.controller.client(number, NodeRole::Proxy),
                agent: self.controller.client(number, NodeRole::Agent),
                services: names,
            };
            self.nodes.push(Node::start(number, access, &self.shared));
            self.interests.push(interest);
        }
        let deadline = tokio::time::Instant::now() + CONNECT_LIMIT;
        let workloads = world.present().count();
        let mut pending: Vec<usize> = (0..self.nodes.len()).collect();
        while !pending.is_empty() {
            let progress = self.shared.progress.notified();
            pending.retain(|number| {
                let held = self.nodes[*number].held.lock();
                !holds(&held, workloads, self.interests[*number].len())
            });
            // Looking at every node costs: not for every message.
            tokio::time::sleep(Duration::from_millis(20)).await;
            if !pending.is_empty() && tokio::time::timeout_at(deadline, progress).await.is_err() {
                return Err(Error::Other(format!(
                    "after {CONNECT_LIMIT:?} {} of {} proxies do not hold all they subscribed to, node {} first",
                    pending.len(),
                    self.nodes.len(),
                    pending[0]
                )));
            }
        }
        self.stage("all nodes have the first table", began)
    }

    /// Nothing changes; agents report.
    async fn rest(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        tokio::time::sleep(self.options.idle).await;
        self.stage("idle", began)
    }

    async fn change_endpoints(&mut self, world: &mut World) -> Result<(), Error> {
        let began = Instant::now();
        let mut changes = Changes::new("endpoint");
        for _ in 0..self.options.endpoint_changes {
            let (service, edit, address) = world.change_endpoint()?;
            let interested: Vec<usize> = (0..self.nodes.len())
                .filter(|node| self.interests[*node].contains(&service))
                .collect();
            let address = mesh_api::names::address_to_bytes(address);
            let wanted: Wanted = Box::new(move |content| {
                let slice = content.and_then(|c| EndpointSlice::decode(c).ok());
                slice.is_some_and(|s| {
                    let unready = s.endpoints.iter().filter(|e| !e.ready);
                    unready.map(|e| &e.address).eq([&address])
                })
            });
            let key = (EndpointSlice::TYPE_URL, service);
            for taken in self.change(edit, [(key, wanted)], &interested).await? {
                changes.push(&taken);
            }
        }
        self.report.changes.push(changes);
        self.stage("endpoint changes", began)
    }

    /// A pod goes and another comes: out of the table, into it, and enforced once every node knows.
    async fn replace_pods(&mut self, world: &mut World) -> Result<(), Error> {
        let began = Instant::now();
        let mut changes = ["pod gone", "new pod reachable", "new pod enforced"].map(Changes::new);
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        let state = |content: Option<&[u8]>| {
            let workload = content.and_then(|c| Workload::decode(c).ok());
            workload.map(|w| w.state())
        };
        for _ in 0..self.options.pod_changes {
            let (old, new, edit) = world.replace_pod()?;
            let key = |number| (Workload::TYPE_URL, number);
            let gone: Wanted = Box::new(|content| content.is_none());
            let there: Wanted = Box::new(move |content| state(content).is_some());
            let enforced: Wanted =
                Box::new(move |content| state(content) == Some(EnrolmentState::Enforced));
            let watched = [(key(old), gone), (key(new), there), (key(new), enforced)];
            let taken = self.change(edit, watched, &all).await?;
            for (changes, taken) in changes.iter_mut().zip(&taken) {
                changes.push(taken);
            }
        }
        self.report.changes.extend(changes);
        self.stage("pods replaced", began)
    }

    /// Makes an edit, and waits until these nodes have all that comes of it: for each, when each node had it.
    async fn change(
        &self,
        edit: Edit,
        watched: impl IntoIterator<Item = (Key, Wanted)>,
        nodes: &[usize],
    ) -> Result<Vec<Vec<Duration>>, Error> {
        let what = format!("{edit}");
        let watches = &self.shared.watches;
        let watching: Vec<_> = watched
            .into_iter()
            .map(|(key, wanted)| watches.start(key, format!("{what}: {key:?}"), wanted))
            .collect();
        edit.make()?;
        let mut taken = Vec::new();
        for watching in watching {
            taken.push(watching.all(nodes, CHANGE_LIMIT).await?);
        }
        Ok(taken)
    }

    /// Every proxy holds what it is to hold, in one version, and nothing broke on the way.
    fn verify(&self, world: &World) -> Result<(), Error> {
        let pods: BTreeSet<usize> = world.present().map(|(number, _)| number).collect();
        let first = self
            .nodes
            .first()
            .map(|node| node.held.lock().workloads.clone());
        let first = first.unwrap_or_default();
        let mut of_slices = vec![0; world.size.services];
        for (number, node) in self.nodes.iter().enumerate() {
            let held = node.held.lock();
            let wrong =
                |what: &str| Error::Other(format!("node {number} does not hold the right {what}"));
            if numbers(&held.workloads) != pods || held.workloads != first {
                return Err(wrong("table of pods"));
            }
            let interest = &self.interests[number];
            if numbers(&held.services) != *interest || numbers(&held.slices) != *interest {
                return Err(wrong("Services"));
            }
            for service in interest {
                let version = held.slices[*service];
                if of_slices[*service] != 0 && of_slices[*service] != version {
                    return Err(wrong("endpoints"));
                }
                of_slices[*service] = version;
            }
        }
        let broken = self.shared.ended.load(Ordering::Relaxed);
        let failed = self.shared.failed_reports.load(Ordering::Relaxed);
        let open = self.shared.streams.load(Ordering::Relaxed);
        if broken + failed > 0 || open != 2 * self.nodes.len() {
            return Err(Error::Other(format!(
                "{broken} streams ended, {failed} reports failed, {open} of {} streams are open",
                2 * self.nodes.len()
            )));
        }
        Ok(())
    }
}

fn holds(held: &Held, workloads: usize, services: usize) -> bool {
    let count = |table: &[u64]| table.iter().filter(|v| **v != 0).count();
    held.mesh != 0
        && count(&held.services) == services
        && count(&held.slices) == services
        && count(&held.workloads) == workloads
}

fn numbers(table: &[u64]) -> BTreeSet<usize> {
    let held = table
        .iter()
        .enumerate()
        .filter(|(_, version)| **version != 0);
    held.map(|(number, _)| number).collect()
}

/// Up to this many Services a controller sends them all to every node (`ALL_SERVICES` there).
const COMPLETE: usize = 1000;
const START_LIMIT: Duration = Duration::from_secs(180);
const CONNECT_LIMIT: Duration = Duration::from_secs(400);
const CHANGE_LIMIT: Duration = Duration::from_secs(60);
