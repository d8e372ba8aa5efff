//! What the agent has given this process, whichever agent it was and whether or not it is there now.
//!
//! A pod goes through stages: waiting for the table and its certificate, then served, then (removed by the
//! agent) leaving, until its last captured connection has ended. The stage is a watch, so that an
//! acknowledgement can wait for it on one connection and be forgotten with it.
//!
//! A process that has just started accepts nothing, neither for pods nor tunnels, before it has the
//! certificates of all pods: what comes first may be for the pod that is ready last. Connections wait in
//! the listeners' queues meanwhile. The gate opens once and stays open.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::proto::broker::Listener;
use mesh_api::proto::mesh::NodePod;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::messages::Listeners;
use crate::budget::Limits;
use crate::identity::Identities;
use crate::pods::{Host, Pod, PodInfo, Pods};
use crate::stock::{Stock, Supply};
use crate::table::Table;
use crate::worker::{PodListeners, Workers};

const POD_LISTENERS: [Listener; 3] = [Listener::Outbound, Listener::Inbound, Listener::Hbone];
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);
const HOST_LISTENERS: [Listener; 2] = [Listener::TunnelV4, Listener::TunnelV6];

/// Pods, listeners and what serves them.
pub struct Roster {
    /// What pods are made of.
    pub parts: Parts,
    state: Mutex<RosterState>,
    gate: watch::Sender<bool>,
}

/// The rest of the process, as far as a pod needs it.
#[derive(Clone)]
pub struct Parts {
    /// Where pods are found by the data path.
    pub pods: Arc<Pods>,
    /// The node itself.
    pub host: Arc<Host>,
    /// What all stocks share.
    pub supply: Arc<Supply>,
    /// Nothing is accepted before it is loaded.
    pub table: Arc<Table>,
    /// Keys and certificates.
    pub identities: Arc<Identities>,
    /// Who accepts.
    pub workers: Arc<Workers>,
    /// Bounds for each pod, resolved.
    pub limits: Limits,
}

#[derive(Default)]
struct RosterState {
    entries: HashMap<Arc<str>, Entry>,
    /// Removed by the agent, with connections that still need its rules, or not yet reported as drained.
    leaving: HashMap<Arc<str>, Arc<Pod>>,
    host: Listeners,
}

struct Entry {
    listeners: Listeners,
    /// What the agent said last. The starting task reads it, so that an update in between is not lost.
    info: PodInfo,
    stage: watch::Sender<Stage>,
    start: AbortHandle,
}

/// How far a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waits for the table or the certificate.
    Starting,
    /// Could be served; waits for the others of the first snapshot.
    Certified,
    /// Connections are accepted.
    Served,
    /// It cannot be served, for this reason.
    Failed(String),
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.start.abort();
    }
}

impl Roster {
    /// Holds nothing.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            state: Mutex::default(),
            gate: watch::Sender::new(false),
        })
    }

    /// UIDs of the pods whose listeners are held.
    pub(super) fn held(&self) -> Vec<String> {
        self.state
            .lock()
            .entries
            .keys()
            .map(|uid| uid.to_string())
            .collect()
    }

    /// The node's tunnel listeners are held.
    pub fn holds_host_listeners(&self) -> bool {
        !self.state.lock().host.is_empty()
    }

    /// Pods that are not served yet, or cannot be, with the reason.
    pub fn waiting(&self) -> Vec<(Arc<str>, Stage)> {
        let state = self.state.lock();
        let stages = state
            .entries
            .iter()
            .map(|(uid, entry)| (Arc::clone(uid), entry.stage.borrow().clone()));
        stages
            .filter(|(_, stage)| *stage != Stage::Served)
            .collect()
    }

    /// Listeners of a pod, or the node's for an empty UID, to offer to an agent that lacks them.
    pub(super) fn offer(&self, uid: &str) -> Option<Listeners> {
        let state = self.state.lock();
        let listeners = if uid.is_empty() {
            Some(&state.host)
        } else {
            state.entries.get(uid).map(|entry| &entry.listeners)
        };
        listeners.filter(|listeners| !listeners.is_empty()).cloned()
    }

    /// Lets pods and tunnels be accepted.
    pub(super) fn open_gate(&self) {
        self.gate.send_replace(true);
    }

    /// Starts to serve a pod, or takes in what has changed of it.
    pub(super) fn add(
        self: &Arc<Self>,
        pod: &NodePod,
        kinds: &[i32],
        fds: Vec<OwnedFd>,
    ) -> Result<watch::Receiver<Stage>, String> {
        let info = PodInfo::from_proto(pod).map_err(|e| e.to_string())?;
        let uid: Arc<str> = pod.uid.as_str().into();
        let listeners = Listeners::pair(kinds, fds, &POD_LISTENERS)?;
        let mut state = self.state.lock();
        let state = &mut *state;
        if let Some(entry) = state.entries.get_mut(&uid).filter(|_| listeners.is_empty()) {
            if let Some(pod) = self.parts.pods.by_uid(&uid) {
                self.parts.pods.update(&pod, info.clone());
            }
            entry.info = info;
            let failed = matches!(&*entry.stage.borrow(), Stage::Failed(_));
            if failed {
                entry.stage.send_replace(Stage::Starting);
                entry.start = self.start(&uid, None);
            }
            return Ok(entry.stage.subscribe());
        }
        for kind in POD_LISTENERS {
            listeners
                .duplicate(kind)
                .map_err(|e| format!("pod {}/{}: {e}", info.namespace, info.name))?;
        }
        // Another pod object would count its connections apart from those that have not ended yet.
        let earlier = state
            .leaving
            .remove(&uid)
            .or_else(|| self.parts.pods.by_uid(&uid));
        if let Some(pod) = &earlier {
            self.parts.pods.update(pod, info.clone());
        }
        let (stage, receiver) = watch::channel(Stage::Starting);
        let start = self.start(&uid, earlier);
        let entry = Entry {
            listeners,
            info,
            stage,
            start,
        };
        // An entry with older listeners ends here; its starting task, if any, with it.
        state.entries.insert(uid, entry);
        Ok(receiver)
    }

    /// Stops accepting for a pod. Returns it if this process still has it, for [`Pod::captured`].
    pub(super) fn remove(&self, uid: &str) -> Option<Arc<Pod>> {
        let mut state = self.state.lock();
        state.entries.remove(uid);
        let Some(pod) = self.parts.pods.by_uid(uid) else {
            return state.leaving.get(uid).cloned();
        };
        self.parts.workers.remove_pod(uid);
        self.parts.pods.remove(&pod);
        state.leaving.insert(Arc::clone(&pod.uid), Arc::clone(&pod));
        Some(pod)
    }

    /// Stops accepting for all pods but these.
    pub(super) fn retain(&self, named: &HashSet<Arc<str>>) -> Vec<Arc<Pod>> {
        let gone: Vec<Arc<str>> = self
            .state
            .lock()
            .entries
            .keys()
            .filter(|uid| !named.contains(*uid))
            .cloned()
            .collect();
        gone.iter().filter_map(|uid| self.remove(uid)).collect()
    }

    /// Pods that the agent has removed and that were not reported as drained.
    pub(super) fn leaving(&self) -> Vec<Arc<Pod>> {
        self.state.lock().leaving.values().cloned().collect()
    }

    /// The agent knows that the pod is drained.
    pub(super) fn reported_drained(&self, uid: &str) {
        self.state.lock().leaving.remove(uid);
    }

    /// Takes in the node's listeners and addresses. Accepting starts when the table is loaded.
    pub(super) fn set_host(
        self: &Arc<Self>,
        kinds: &[i32],
        fds: Vec<OwnedFd>,
        addresses: Vec<IpAddr>,
    ) -> Result<(), String> {
        let listeners = Listeners::pair(kinds, fds, &HOST_LISTENERS)?;
        self.parts.host.set_addresses(addresses);
        if listeners.is_empty() {
            return if self.holds_host_listeners() {
                Ok(())
            } else {
                Err("no tunnel listener came, and none is held".into())
            };
        }
        let duplicates = listeners.duplicates()?;
        self.state.lock().host = listeners;
        let (mut loaded, mut gate) = (self.parts.table.loaded(), self.gate.subscribe());
        let workers = Arc::clone(&self.parts.workers);
        tokio::spawn(async move {
            // Both fail only when the process ends.
            let is_loaded = loaded.wait_for(|is| *is).await.is_ok();
            let is_open = gate.wait_for(|is| *is).await.is_ok();
            if is_loaded && is_open {
                workers.set_tunnel_listeners(duplicates);
            }
        });
        Ok(())
    }

    /// Calls `with` on the stock of a pod, or the node's for an empty UID.
    pub(super) fn with_stock<T>(&self, owner: &str, with: impl FnOnce(&Stock) -> T) -> Option<T> {
        if owner.is_empty() {
            return Some(with(&self.parts.host.stock));
        }
        let leaving = || self.state.lock().leaving.get(owner).cloned();
        let pod = self.parts.pods.by_uid(owner).or_else(leaving)?;
        Some(with(&pod.stock))
    }

    /// Requests for sockets that were under way are lost with the connection.
    pub(super) fn forget_requests(&self) {
        self.parts.host.stock.forget_requests();
        for pod in self.parts.pods.all().into_iter().chain(self.leaving()) {
            pod.stock.forget_requests();
        }
    }

    /// Lets every stock adapt its level.
    pub(super) fn tick(&self) {
        self.parts.host.stock.tick();
        self.parts.pods.tick();
    }

    fn start(self: &Arc<Self>, uid: &Arc<str>, earlier: Option<Arc<Pod>>) -> AbortHandle {
        let (roster, uid) = (Arc::clone(self), Arc::clone(uid));
        // Owned by the entry, which aborts it.
        tokio::spawn(async move {
            let stage = match roster.serve(&uid, earlier).await {
                Ok(()) => Stage::Served,
                Err(reason) => {
                    tracing::error!(pod = %uid, reason, "the pod cannot be served");
                    Stage::Failed(reason)
                }
            };
            roster.reached(&uid, stage);
        })
        .abort_handle()
    }

    fn reached(&self, uid: &str, stage: Stage) {
        if let Some(entry) = self.state.lock().entries.get(uid) {
            entry.stage.send_replace(stage);
        }
    }

    async fn serve(&self, uid: &Arc<str>, earlier: Option<Arc<Pod>>) -> Result<(), String> {
        let parts = &self.parts;
        let mut loaded = parts.table.loaded();
        loaded
            .wait_for(|loaded| *loaded)
            .await
            .map_err(|_| "the table is gone".to_owned())?;
        let pod = match earlier {
            Some(pod) => pod,
            None => {
                let state = self.state.lock();
                let Some(entry) = state.entries.get(uid) else {
                    return Ok(());
                };
                let info = entry.info.clone();
                let identity = info
                    .identity(&parts.table.mesh().trust_domain)
                    .map_err(|e| e.to_string())?;
                Pod::new(
                    Arc::clone(uid),
                    info,
                    identity,
                    &parts.identities,
                    &parts.supply,
                    &parts.limits,
                )
            }
        };
        parts.pods.add(&pod);
        parts.identities.ready(&pod.identity).await;
        parts.pods.serve(&pod);
        self.reached(uid, Stage::Certified);
        let mut gate = self.gate.subscribe();
        gate.wait_for(|open| *open)
            .await
            .map_err(|_| "the process ends".to_owned())?;
        // Fails when the process is out of descriptors, which passes.
        while let Err(reason) = self.accept(uid, &pod) {
            tracing::warn!(pod = %uid, reason, "the pod cannot be served yet; trying again");
            tokio::time::sleep(ACCEPT_AGAIN).await;
        }
        Ok(())
    }

    fn accept(&self, uid: &str, pod: &Arc<Pod>) -> Result<(), String> {
        let state = self.state.lock();
        let Some(entry) = state.entries.get(uid) else {
            return Ok(());
        };
        let listeners = PodListeners {
            outbound: entry.listeners.duplicate(Listener::Outbound)?,
            inbound: entry.listeners.duplicate(Listener::Inbound)?,
            hbone: entry.listeners.duplicate(Listener::Hbone)?,
        };
        self.parts.workers.add_pod(Arc::clone(pod), listeners);
        let info = pod.info.load();
        let name = format_args!("{}/{}", info.namespace, info.name);
        tracing::info!(pod = %name, identity = %pod.identity, "serving");
        Ok(())
    }
}
