//! The node's pods: what the runtime says (CNI) and what the controller says, brought together.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh_api::names::{SYSTEM_NAMESPACE, address_from_bytes, address_to_bytes};
use mesh_api::proto::cni;
use mesh_api::proto::control::{NodeReport, PodReport, PodState, RegisterPodRequest};
use mesh_api::proto::mesh::NodePod;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::broker::Broker;
use super::control::{Control, RegisterError};
use super::enrol::{Pod, Tools};
use super::netns::{Netns, NetnsRecord};
use super::record::{Phase, PodRecord, Store, StoreError, is_uid};
use super::report::Reporter;
use super::rules::MeshMark;
use super::running::Running;
use crate::plugin::{CniError, Code};

/// Everything the agent knows. Shared by the tasks that serve the plugin, the controller and proxies.
pub struct Node {
    control: Arc<dyn Control>,
    tools: Tools,
    exclude_namespaces: HashSet<String>,
    pods: Mutex<HashMap<String, Pod>>,
    /// Which namespaces opted in; outlives the controller's absence.
    namespaces: Mutex<BTreeMap<String, bool>>,
    /// Pods that are to be in the mesh and were not added through the plugin, by UID: they run already, or are about
    /// to be added.
    missing: Mutex<HashMap<String, NodePod>>,
    /// Told when one is.
    missed: Notify,
    running: Running,
    /// Why the plugin is not in the chain, if it is not.
    chain: watch::Receiver<Option<String>>,
    leaving: AtomicBool,
    reporter: Reporter,
}

impl Node {
    /// Takes up the pods on record whose namespaces still exist.
    pub fn start(
        control: Arc<dyn Control>,
        broker: Arc<Broker>,
        store: Store,
        mark: MeshMark,
        exclude_namespaces: &[String],
        running: Running,
        chain: watch::Receiver<Option<String>>,
    ) -> Result<Arc<Self>, StoreError> {
        let tools = Tools {
            mark,
            broker,
            store: store.clone(),
            changed: Arc::new(Notify::new()),
        };
        let mut pods = HashMap::new();
        for record in store.pods()? {
            match record.netns.open() {
                Ok(netns) => {
                    let pod = Pod::start(tools.clone(), netns, record.clone());
                    pods.insert(record.uid, pod);
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!(uid = record.uid, name = record.name, %error, "a pod's network namespace cannot be opened; it is not looked after");
                }
                Err(error) => {
                    tracing::info!(uid = record.uid, name = record.name, %error, "a pod has gone while the agent was away");
                    store.remove(&record.uid)?;
                }
            }
        }
        tracing::info!(pods = pods.len(), "pods on record");
        Ok(Arc::new(Self {
            control,
            tools,
            exclude_namespaces: exclude_namespaces.iter().cloned().collect(),
            pods: Mutex::new(pods),
            namespaces: Mutex::new(store.namespaces()?),
            missing: Mutex::default(),
            missed: Notify::new(),
            running,
            chain,
            leaving: AtomicBool::new(false),
            reporter: Reporter::default(),
        }))
    }

    /// Reports, registers pods that were added in the controller's absence, finds pods that were there before the
    /// plugin, and forgets pods that went without a DEL. For ever.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(
            self.reporter.run(&self),
            self.register_late(),
            self.find_running(),
            self.collect_leftovers(),
            self.report_chain(),
        );
    }

    /// CNI ADD. Answers when the pod may start.
    pub async fn add(&self, request: cni::Add, netns: OwnedFd) -> Result<(), CniError> {
        let deadline = Instant::now() + ADD_BOUND;
        let cni::Add {
            container_id,
            uid,
            namespace,
            name,
            netns: path,
            ifname: _,
            addresses,
        } = request;
        if self.excluded(&namespace) || self.leaving() {
            return Ok(());
        }
        if !is_uid(&uid) {
            return Err(CniError::new(
                Code::Environment,
                format!("K8S_POD_UID {uid:?} of pod {namespace}/{name}"),
                "letters, digits, `-`, `_` and `.` are expected",
            ));
        }
        let again = |why: String| {
            CniError::new(
                Code::TryAgain,
                format!("pod {namespace}/{name} cannot be enrolled in the mesh now"),
                why,
            )
        };
        let netns = Netns::from_fd(netns).map_err(|e| again(e.to_string()))?;
        if netns.id() == self.host_id().map_err(|e| again(e.to_string()))? {
            return Ok(());
        }
        let addresses: Option<Vec<IpAddr>> = addresses
            .iter()
            .map(|bytes| address_from_bytes(bytes))
            .collect();
        // The runtime's path need not lead there in the agent's own mount namespace, where `netnsDir` is mounted.
        let place = NetnsRecord {
            path: (self.running.lasting(&netns)).unwrap_or_else(|| path.into()),
            id: netns.id(),
        };
        let found = place.open().map(drop);
        let record = PodRecord {
            container_id,
            netns: place,
            addresses: addresses.ok_or_else(|| again("a malformed address".into()))?,
            registered: false,
            pod: None,
            phase: Phase::Direct,
            applied: None,
            uid: uid.clone(),
            namespace: namespace.clone(),
            name: name.clone(),
        };
        self.record(record.clone(), netns)
            .map_err(|e| again(e.to_string()))?;

        let Some(word) = self
            .ask(&record, deadline)
            .await
            .map_err(|e| again(e.to_string()))?
        else {
            tracing::info!(
                namespace,
                name,
                "pod: starts outside the mesh; the controller is away and its namespace did not opt in"
            );
            return Ok(());
        };
        if let (true, Err(error)) = (word.enrolled, found) {
            // It would be lost with this agent.
            return Err(again(format!(
                "its network namespace cannot be found again ({error}); is cni.netnsDir where the runtime has them?"
            )));
        }
        let settled = {
            let pods = self.pods.lock();
            let gone = || again("the runtime deleted it meanwhile".into());
            let pod = pods.get(&uid).ok_or_else(gone)?;
            pod.set(word, true);
            pod.settled()
        };
        let settled = match tokio::time::timeout_at(deadline, settled).await {
            Ok(Some(settled)) => settled,
            Ok(None) => return Err(again("the runtime deleted it meanwhile".into())),
            Err(_) => return Err(again(self.reason(&uid))),
        };
        if settled.enrolled && !self.leaving() {
            // Other nodes must know of it before it speaks.
            let reported = tokio::time::timeout_at(deadline, self.reporter.delivered());
            let failed = |_| again("the controller did not take this node's report in time".into());
            reported.await.map_err(failed)?;
        }
        Ok(())
    }

    /// CNI DEL. Deleting what is not there is no error.
    pub fn delete(&self, container_id: &str, uid: &str) {
        let found = {
            let pods = self.pods.lock();
            let of_container =
                |pod: &Pod| pod.status().borrow().record.container_id == container_id;
            match pods.get(uid) {
                Some(pod) if of_container(pod) => Some(uid.to_owned()),
                // A newer sandbox of the same pod stays.
                Some(_) => None,
                None => (pods.iter())
                    .find(|(_, pod)| of_container(pod))
                    .map(|(uid, _)| uid.clone()),
            }
        };
        if let Some(uid) = found {
            self.forget(&uid, "the runtime deleted it");
        }
    }

    /// CNI CHECK: what is wrong with the pod's rules.
    pub async fn check(&self, container_id: &str, uid: &str) -> Result<(), CniError> {
        let missing = |what: String| {
            CniError::new(
                Code::RulesMissing,
                format!("pod {uid} is not captured as it should be"),
                what,
            )
        };
        let Some(record) = self
            .record_of(uid)
            .filter(|r| r.container_id == container_id)
        else {
            // Added while there was no plugin in the chain: nothing was promised.
            return Ok(());
        };
        if !record.pod.as_ref().is_some_and(|pod| pod.enrolled) {
            return Ok(());
        }
        let Some(applied) = record.applied else {
            return Err(missing(self.reason(uid)));
        };
        let netns = record.netns.open().map_err(|e| missing(e.to_string()))?;
        match applied.missing(&netns).await {
            Ok(None) => Ok(()),
            Ok(Some(what)) => Err(missing(what)),
            Err(error) => Err(missing(error.to_string())),
        }
    }

    /// CNI GC: forgets pods that are not among the valid ones and whose namespace is gone. The list
    /// may be of another network than the pods', so it alone is not believed.
    pub fn collect(&self, valid_container_ids: &[String]) {
        for record in self.records() {
            if !valid_container_ids.contains(&record.container_id) && record.netns.is_gone() {
                self.forget(&record.uid, "the runtime no longer knows it");
            }
        }
    }

    /// The controller's word about a pod of this node.
    pub fn pod_changed(&self, word: NodePod) {
        self.learn(&word);
        if let Some(pod) = self.pods.lock().get(&word.uid) {
            pod.set(word, false);
        } else if word.enrolled && !self.excluded(&word.namespace) {
            self.missing.lock().insert(word.uid.clone(), word);
            self.missed.notify_one();
        } else {
            self.missing.lock().remove(&word.uid);
        }
    }

    /// The controller no longer speaks of the pod. What it was stays until the runtime deletes it.
    pub fn pod_removed(&self, uid: &str) {
        self.missing.lock().remove(uid);
    }

    /// Takes every pod out of the mesh. True: none is left; false: the deadline came first, and what
    /// was left is cut.
    pub async fn leave(&self, deadline: Instant) -> bool {
        self.leaving.store(true, Ordering::Relaxed);
        let statuses: Vec<_> = {
            let pods = self.pods.lock();
            pods.values().for_each(Pod::leave);
            pods.values().map(Pod::status).collect()
        };
        let all = async {
            for mut status in statuses {
                // Fails when the pod was deleted meanwhile.
                let _ = status
                    .wait_for(|status| status.record.phase == Phase::Direct)
                    .await;
            }
        };
        if tokio::time::timeout_at(deadline, all).await.is_ok() {
            return true;
        }
        for record in self
            .records()
            .into_iter()
            .filter(|r| r.phase != Phase::Direct)
        {
            self.pods.lock().remove(&record.uid);
            let removed = match record.netns.open() {
                Ok(netns) => super::rules::remove(&netns).await,
                Err(error) => Err(error),
            };
            tracing::warn!(
                namespace = record.namespace,
                name = record.name,
                ?removed,
                "pod: its captured connections were cut at the deadline"
            );
            if let Err(error) = self.tools.store.remove(&record.uid) {
                tracing::warn!(%error, "pod: its record stays");
            }
        }
        false
    }

    /// The state of the node, as the controller is told.
    pub fn report(&self, host_addresses: &[IpAddr]) -> NodeReport {
        let mut pods: Vec<PodReport> = (self.pods.lock().iter())
            .filter_map(|(uid, pod)| {
                let (state, reason) = pod.status().borrow().report()?;
                Some(PodReport {
                    uid: uid.clone(),
                    state: PodState::into(state),
                    reason,
                })
            })
            .collect();
        pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        let problems = self.problems();
        NodeReport {
            pods,
            host_addresses: (host_addresses.iter())
                .map(|address| address_to_bytes(*address).to_vec())
                .collect(),
            ready: problems.is_empty(),
            reason: problems.join("; "),
        }
    }

    /// The state of the agent, for people and scripts.
    pub fn status(&self) -> serde_json::Value {
        let problems = self.problems();
        let missing: Vec<_> = (self.missing.lock().values())
            .take(STATUS_PODS)
            .map(|pod| format!("{}/{}", pod.namespace, pod.name))
            .collect();
        let pods = self.pods.lock();
        let (mut direct, mut enrolled, mut leaving) = (0, 0, 0);
        let mut unsettled = Vec::new();
        for (uid, pod) in &*pods {
            let status = pod.status().borrow().clone();
            let record = &status.record;
            match record.phase {
                Phase::Direct => direct += 1,
                Phase::Enrolled => enrolled += 1,
                Phase::Leaving => leaving += 1,
            }
            if status.done.is_none() || status.done != record.pod {
                unsettled.push(serde_json::json!({
                    "uid": uid,
                    "namespace": record.namespace,
                    "name": record.name,
                    "registered": record.registered,
                    "phase": record.phase,
                    "failed": status.failed,
                    "reason": status.reason,
                }));
            }
        }
        // One packet has room for these and not for any number.
        unsettled.truncate(STATUS_PODS);
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "ready": problems.is_empty(),
            "problems": problems,
            "controllerConnected": *self.control.connected().borrow(),
            "leavingTheMesh": self.leaving(),
            "proxies": self.tools.broker.proxies(),
            "pods": {"direct": direct, "enrolled": enrolled, "leaving": leaving},
            "unsettled": unsettled,
            "notFound": missing,
        })
    }

    /// The seam to the controller.
    pub(super) fn control(&self) -> &dyn Control {
        &*self.control
    }

    pub(super) fn broker(&self) -> &Broker {
        &self.tools.broker
    }

    /// Told when the report may have changed.
    pub(super) fn changed(&self) -> &Notify {
        &self.tools.changed
    }

    /// Whether the node has been told to leave the mesh.
    pub fn leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    fn excluded(&self, namespace: &str) -> bool {
        namespace == SYSTEM_NAMESPACE || self.exclude_namespaces.contains(namespace)
    }

    /// Why pods cannot be enrolled.
    fn problems(&self) -> Vec<String> {
        let proxy = (!self.tools.broker.is_ready()).then(|| "no node proxy is ready".to_owned());
        proxy
            .into_iter()
            .chain(self.chain.borrow().clone())
            .collect()
    }

    fn host_id(&self) -> io::Result<super::netns::NetnsId> {
        Netns::host().map(|netns| netns.id())
    }

    /// Keeps the pod on disk before anything is done for it.
    fn record(&self, record: PodRecord, netns: Netns) -> Result<(), StoreError> {
        let mut pods = self.pods.lock();
        if let Some(pod) = pods.get(&record.uid)
            && pod.status().borrow().record.netns == record.netns
            && pod.status().borrow().record.container_id == record.container_id
        {
            // A repeated ADD, or one for another interface of the same pod.
            return Ok(());
        }
        self.tools.store.put(&record)?;
        let uid = record.uid.clone();
        // The task of an earlier sandbox of this pod ends here.
        pods.remove(&uid);
        self.tools.broker.forget(&uid);
        pods.insert(uid, Pod::start(self.tools.clone(), netns, record));
        Ok(())
    }

    /// Asks the controller what the pod is to be. `None`: it is away, and the pod may start outside
    /// the mesh.
    async fn ask(
        &self,
        record: &PodRecord,
        deadline: Instant,
    ) -> Result<Option<NodePod>, RegisterError> {
        loop {
            let asked =
                tokio::time::timeout_at(deadline, self.control.register(request(record))).await;
            let error = match asked {
                Ok(Ok(word)) => {
                    self.learn(&word);
                    return Ok(Some(word));
                }
                Ok(Err(error)) => error,
                Err(_) => RegisterError::Away("it did not answer in time".into()),
            };
            match &error {
                RegisterError::Refused(_) => return Err(error),
                RegisterError::Away(_)
                    if self.namespaces.lock().get(&record.namespace) == Some(&false) =>
                {
                    return Ok(None);
                }
                RegisterError::Away(_) | RegisterError::NotFound(_) => {}
            }
            if Instant::now() + super::RETRY >= deadline {
                return Err(error);
            }
            tokio::time::sleep(super::RETRY).await;
        }
    }

    /// Remembers which namespaces opted in.
    fn learn(&self, word: &NodePod) {
        let opted_in = word.namespace_opted_in;
        let mut namespaces = self.namespaces.lock();
        if namespaces.insert(word.namespace.clone(), opted_in) != Some(opted_in)
            && let Err(error) = self.tools.store.put_namespaces(&namespaces)
        {
            tracing::warn!(%error, "which namespaces opted in is not kept");
        }
    }

    async fn register_late(&self) {
        let mut connected = self.control.connected();
        loop {
            for record in self
                .records()
                .into_iter()
                .filter(|record| !record.registered)
            {
                match self.control.register(request(&record)).await {
                    Ok(word) => {
                        self.learn(&word);
                        if let Some(pod) = self.pods.lock().get(&record.uid) {
                            pod.set(word, true);
                        }
                    }
                    Err(error) => {
                        tracing::debug!(uid = record.uid, %error, "pod: not registered yet");
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(REGISTER_INTERVAL) => {}
                changed = connected.changed() => if changed.is_err() {
                    tokio::time::sleep(REGISTER_INTERVAL).await;
                }
            }
        }
    }

    /// Finds pods that the runtime added before the plugin was in its chain. One that is not there yet is looked for
    /// again: it is about to be added, and then it is not missing any more.
    async fn find_running(&self) {
        let mut pause = FIND_PAUSE;
        loop {
            let uids: HashSet<String> = {
                let pods = self.pods.lock();
                let mut missing = self.missing.lock();
                missing.retain(|uid, _| !pods.contains_key(uid));
                missing.keys().cloned().collect()
            };
            if uids.is_empty() {
                self.missed.notified().await;
                continue;
            }
            let running = self.running.clone();
            let search = move || Ok::<_, io::Error>(running.find(&uids, &Netns::host()?));
            let found = tokio::task::spawn_blocking(search).await;
            let found = found.map_err(io::Error::other).and_then(|found| found);
            match found {
                Ok(found) => {
                    for (uid, netns) in found {
                        if let Err(error) = self.adopt(&uid, netns) {
                            tracing::warn!(uid, %error, "pod: it runs and cannot be enrolled; trying again");
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "pods that run cannot be looked for"),
            }
            let more = tokio::time::timeout(pause, self.missed.notified()).await;
            pause = match more {
                Ok(()) => FIND_PAUSE,
                Err(_) => (pause * 2).min(LONGEST_FIND_PAUSE),
            };
        }
    }

    /// Takes up a pod that runs, unless the runtime adds it at this moment.
    fn adopt(&self, uid: &str, netns: NetnsRecord) -> io::Result<()> {
        let open = netns.open()?;
        let mut pods = self.pods.lock();
        if pods.contains_key(uid) || self.leaving() {
            return Ok(());
        }
        // Not wanted any more: nothing to do.
        let Some(word) = self.missing.lock().remove(uid) else {
            return Ok(());
        };
        let addresses = (word.addresses.iter()).filter_map(|bytes| address_from_bytes(bytes));
        let record = PodRecord {
            uid: uid.to_owned(),
            namespace: word.namespace.clone(),
            name: word.name.clone(),
            // Of a sandbox whose ADD was not seen; its namespace tells when it is gone.
            container_id: String::new(),
            netns,
            addresses: addresses.collect(),
            registered: true,
            pod: Some(word),
            phase: Phase::Direct,
            applied: None,
        };
        self.tools.store.put(&record).map_err(io::Error::other)?;
        tracing::info!(
            namespace = record.namespace,
            name = record.name,
            netns = %record.netns.path.display(),
            "pod: it runs already"
        );
        pods.insert(uid.to_owned(), Pod::start(self.tools.clone(), open, record));
        Ok(())
    }

    /// What the chain is like is part of the report.
    async fn report_chain(&self) {
        let mut chain = self.chain.clone();
        while chain.changed().await.is_ok() {
            self.tools.changed.notify_one();
        }
    }

    async fn collect_leftovers(&self) {
        loop {
            tokio::time::sleep(COLLECT_INTERVAL).await;
            for record in self.records() {
                if record.netns.is_gone() {
                    self.forget(&record.uid, "its network namespace is gone");
                }
            }
        }
    }

    fn forget(&self, uid: &str, why: &str) {
        if self.pods.lock().remove(uid).is_none() {
            return;
        }
        tracing::info!(uid, why, "pod: forgotten");
        self.tools.broker.forget(uid);
        if let Err(error) = self.tools.store.remove(uid) {
            tracing::warn!(%error, "pod: its record stays");
        }
        self.tools.changed.notify_one();
    }

    fn records(&self) -> Vec<PodRecord> {
        (self.pods.lock().values())
            .map(|pod| pod.status().borrow().record.clone())
            .collect()
    }

    fn record_of(&self, uid: &str) -> Option<PodRecord> {
        let pods = self.pods.lock();
        pods.get(uid)
            .map(|pod| pod.status().borrow().record.clone())
    }

    fn reason(&self, uid: &str) -> String {
        let pods = self.pods.lock();
        let reason = pods
            .get(uid)
            .map(|pod| pod.status().borrow().reason.clone());
        reason
            .filter(|reason| !reason.is_empty())
            .unwrap_or_else(|| "it was not done in time".into())
    }
}

fn request(record: &PodRecord) -> RegisterPodRequest {
    RegisterPodRequest {
        uid: record.uid.clone(),
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        addresses: (record.addresses.iter())
            .map(|address| address_to_bytes(*address).to_vec())
            .collect(),
    }
}

/// What ADD may take; the plugin waits a second longer.
const ADD_BOUND: Duration = Duration::from_secs(9);
/// Pods that a status names.
const STATUS_PODS: usize = 50;
const REGISTER_INTERVAL: Duration = Duration::from_secs(5);
/// Between two looks at all processes of the node.
const FIND_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_FIND_PAUSE: Duration = Duration::from_secs(30);
const COLLECT_INTERVAL: Duration = Duration::from_secs(30);
