//! The process behind a lab. It owns every other process of the lab, holds what an API server would hold, and
//! answers requests on a unix socket.
//!
//! One thread, on purpose: processes die with the thread that started them (see `processes`), and namespaces
//! are entered by the thread. All tasks are local to it, so shared state is plain cells.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinSet, LocalSet};

use super::cluster::{Cluster, Key, PodRecord};
use super::component::Component;
use super::mesh::{self, Node};
use super::names::{LabName, Paths};
use super::plan::Plan;
use super::{deployments, network, pods, processes, publish, requests};
use crate::args::ConfigPart;
use crate::error::{Context, Result};

/// What a lab is started with; written by `up`, read by the daemon and by other labs' `up`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spec {
    pub(crate) slot: u8,
    pub(crate) nodes: u8,
    /// Nodes are in them by turns.
    #[serde(default)]
    pub(crate) zones: Vec<String>,
    pub(crate) mesh: bool,
    pub(crate) mode: String,
    pub(crate) trust_domain: String,
    pub(crate) workers: u16,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) programs: Programs,
    pub(crate) overlays: Vec<(ConfigPart, serde_json::Value)>,
}

/// Where the programs of the mesh are.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Programs {
    pub(crate) controller: PathBuf,
    pub(crate) agent: PathBuf,
    pub(crate) proxy: PathBuf,
}

/// A running lab.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) name: LabName,
    pub(crate) paths: Paths,
    pub(crate) spec: Spec,
    pub(crate) programs: Programs,
    pub(crate) plan: Plan,
    pub(crate) nodes: Vec<Node>,
    pub(crate) controller: RefCell<Option<Component>>,
    pub(crate) cluster: RefCell<Cluster>,
    /// Why the mesh cannot be started.
    pub(crate) trouble: RefCell<Option<String>>,
    /// Counts changes; [`publish`] follows.
    pub(crate) changes: watch::Sender<u64>,
    /// The last change that everybody was told of.
    pub(crate) publications: watch::Sender<u64>,
    /// Bounds how many sandboxes are made at once.
    pub(crate) attach_slots: Semaphore,
    tasks: RefCell<JoinSet<()>>,
    next_node: RefCell<usize>,
}

/// Runs the daemon until it is told to end.
pub(crate) fn main(name: &LabName) -> Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    // Away from the terminal's signals. Fails only for the leader of a group, which a child is not.
    let _ = nix::unistd::setsid();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the daemon's runtime")?;
    LocalSet::new().block_on(&runtime, serve(name))
}

async fn serve(name: &LabName) -> Result<()> {
    let paths = name.paths();
    let text = std::fs::read_to_string(paths.spec()).context(paths.spec().display())?;
    let spec: Spec = serde_json::from_str(&text).context(paths.spec().display())?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let lab = Rc::new(Lab::new(name.clone(), paths, spec));
    let manifests = lab.paths.manifests();
    std::fs::create_dir_all(&manifests).context(manifests.display())?;
    network::build(&lab).await?;
    let listener = UnixListener::bind(lab.paths.socket()).context(lab.paths.socket().display())?;
    let mut tasks = JoinSet::new();
    tasks.spawn_local(publish::run(Rc::clone(&lab)));
    tasks.spawn_local(reconcile(Rc::clone(&lab)));
    tasks.spawn_local(mesh::run(Rc::clone(&lab)));
    tasks.spawn_local(requests::listen(Rc::clone(&lab), listener));
    tracing::info!(lab = %name, nodes = lab.nodes.len(), mesh = lab.spec.mesh, "started");
    tokio::select! {
        _ = terminate.recv() => {}
        // They run for ever; one that ends has failed.
        Some(ended) = tasks.join_next() => tracing::error!(?ended, "a task ended"),
    }
    tracing::info!("ending");
    drop(tasks);
    lab.end().await;
    Ok(())
}

/// Keeps Deployments at their number of pods.
async fn reconcile(lab: Rc<Lab>) {
    let mut changes = lab.changes.subscribe();
    while changes.changed().await.is_ok() {
        lab.reconcile();
        // Joined here, so that ended pods leave nothing behind.
        while lab.tasks.borrow_mut().try_join_next().is_some() {}
    }
}

impl Lab {
    fn new(name: LabName, paths: Paths, spec: Spec) -> Self {
        let plan = Plan::new(spec.slot);
        let nodes: Vec<Node> = (1..=spec.nodes)
            .map(|number| Node::new(&name, plan, number))
            .collect();
        let mut cluster = Cluster::new();
        // No zones: none turns.
        let zones = spec.zones.iter().cycle();
        cluster.zones = nodes
            .iter()
            .map(|node| node.name.clone())
            .zip(zones.cloned())
            .collect();
        Self {
            nodes,
            name,
            paths,
            programs: spec.programs.clone(),
            spec,
            plan,
            controller: RefCell::default(),
            cluster: RefCell::new(cluster),
            trouble: RefCell::default(),
            changes: watch::Sender::new(1),
            publications: watch::Sender::new(0),
            attach_slots: Semaphore::new(ATTACH_AT_ONCE),
            tasks: RefCell::default(),
            next_node: RefCell::default(),
        }
    }

    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// Says that something is not as it was.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Waits until everything up to now has been told to everybody.
    pub(crate) async fn published(&self) {
        let now = *self.changes.borrow();
        let mut publications = self.publications.subscribe();
        // Fails only when the lab ends.
        let _ = publications.wait_for(|done| *done >= now).await;
    }

    pub(crate) fn new_uid(&self) -> String {
        let hex = random_hex(16);
        format!(
            "{}-{}-{}-{}-{}",
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..]
        )
    }

    /// Adds a pod and starts its life. Its manifest has a namespace and a name.
    pub(crate) fn create_pod(self: &Rc<Self>, mut pod: PodRecord) {
        let uid = self.new_uid();
        let metadata = &mut pod.manifest.metadata;
        metadata.uid = Some(uid.clone());
        let key: Key = (
            metadata.namespace.clone().unwrap_or_default(),
            metadata.name.clone().unwrap_or_default(),
        );
        let spec = pod.manifest.spec.get_or_insert_default();
        if spec.node_name.as_deref().unwrap_or_default().is_empty() {
            spec.node_name = Some(self.choose_node(spec.node_selector.as_ref()));
        }
        let stop = pod.stop.subscribe();
        self.cluster.borrow_mut().pods.insert(key.clone(), pod);
        self.tasks
            .borrow_mut()
            .spawn_local(pods::run(Rc::clone(self), key, uid, stop));
        self.changed();
    }

    /// Round-robin, among those that the selector's host name allows.
    fn choose_node(&self, selector: Option<&BTreeMap<String, String>>) -> String {
        if let Some(name) = selector.and_then(|s| s.get("kubernetes.io/hostname"))
            && self.node(name).is_some()
        {
            return name.clone();
        }
        let mut next = self.next_node.borrow_mut();
        let node = &self.nodes[*next % self.nodes.len()];
        *next += 1;
        node.name.clone()
    }

    /// Asks a pod to end; the first to ask says how fast.
    pub(crate) fn delete_pod(&self, key: &Key, grace: Duration) {
        if let Some(pod) = self.cluster.borrow().pods.get(key) {
            pod.stop
                .send_if_modified(|stop| stop.is_none() && stop.replace(grace).is_none());
        }
    }

    /// Makes and deletes pods of Deployments.
    pub(crate) fn reconcile(self: &Rc<Self>) {
        let (mut create, mut delete) = (Vec::new(), Vec::new());
        {
            let cluster = self.cluster.borrow();
            for (key, record) in &cluster.deployments {
                let manifest = &record.manifest;
                let template = deployments::template(manifest, record.restarted.as_deref());
                let hash = deployments::template_hash(&template);
                let step = deployments::next_step(
                    deployments::replicas(manifest),
                    &hash,
                    deployments::recreates(manifest),
                    &cluster.owned(key),
                );
                let owner = (key.1.clone(), hash);
                let pods = (0..step.create).map(|_| deployments::pod_of(key, &owner, &template));
                create.extend(pods);
                delete.extend(step.delete.into_iter().map(|name| (key.0.clone(), name)));
            }
            // Pods of Deployments that are gone.
            for (key, pod) in &cluster.pods {
                let Some((owner, _)) = &pod.owner else {
                    continue;
                };
                if !cluster
                    .deployments
                    .contains_key(&(key.0.clone(), owner.clone()))
                {
                    delete.push(key.clone());
                }
            }
        }
        for pod in create {
            self.create_pod(pod);
        }
        for key in delete {
            let grace = self.grace(&key);
            self.delete_pod(&key, grace);
        }
    }

    /// A pod's own grace period.
    pub(crate) fn grace(&self, key: &Key) -> Duration {
        let cluster = self.cluster.borrow();
        let spec = cluster.pods.get(key).and_then(|p| p.spec());
        let seconds = spec.and_then(|s| s.termination_grace_period_seconds);
        Duration::from_secs(seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(30))
    }

    /// Processes of the mesh itself.
    pub(crate) fn component_pids(&self) -> BTreeSet<u32> {
        let mut pids: BTreeSet<u32> = [std::process::id()].into();
        pids.extend(self.controller.borrow().as_ref().and_then(Component::pid));
        for node in &self.nodes {
            pids.extend(node.agent.borrow().as_ref().and_then(Component::pid));
            for proxy in node.proxies.borrow().iter() {
                pids.extend(proxy.component.pid());
            }
        }
        let workers: Vec<u32> = pids
            .iter()
            .flat_map(|pid| processes::children(*pid))
            .collect();
        pids.extend(workers);
        pids
    }

    /// Ends all processes of the lab, and gives apps a moment to end by themselves.
    async fn end(&self) {
        // First, so that nothing is started again.
        self.tasks.borrow_mut().abort_all();
        if let Some(controller) = &*self.controller.borrow() {
            controller.stop();
        }
        for node in &self.nodes {
            if let Some(agent) = &*node.agent.borrow() {
                agent.stop();
            }
            for proxy in node.proxies.borrow().iter() {
                proxy.component.stop();
            }
        }
        let apps: Vec<u32> = self
            .cluster
            .borrow()
            .pods
            .values()
            .filter_map(|p| p.life.pid)
            .collect();
        for pid in &apps {
            processes::signal(*pid, Signal::SIGTERM);
        }
        // What does not listen dies with this process.
        let deadline = tokio::time::Instant::now() + END_GRACE;
        let alive = |pid: &u32| processes::is_running(*pid);
        while tokio::time::Instant::now() < deadline && apps.iter().any(alive) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Random characters, two a byte.
pub(crate) fn random_hex(bytes: usize) -> String {
    (0..bytes)
        .map(|_| format!("{:02x}", rand::random::<u8>()))
        .collect()
}

/// More would only fight for the same two locks: host-local's and the network's.
const ATTACH_AT_ONCE: usize = 8;
/// How long apps may take to end with the lab.
const END_GRACE: Duration = Duration::from_secs(2);
