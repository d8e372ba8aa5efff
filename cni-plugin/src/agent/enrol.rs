//! One pod's way into the mesh and out of it.
//!
//! In: listeners, then a proxy that accepts on them and holds the certificate, then the rules. Out: the
//! rules are swapped for ones that match nothing, the proxies stop accepting, and when the last captured
//! connection has ended everything is removed. The controller turns [`NodePod::enrolled`] only when
//! all nodes know, so no caller is refused on the way.
//!
//! A task per pod works towards what is wanted, tries again what failed, and starts over when something
//! else is wanted meanwhile. It writes the pod's [`Phase`] before it changes the namespace, so a
//! restarted agent takes up where the earlier one stopped. Nothing here waits for the controller.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::names::{INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT};
use mesh_api::proto::control::PodState;
use mesh_api::proto::mesh::NodePod;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::broker::{Broker, Listeners};
use super::netns::Netns;
use super::record::{Phase, PodRecord, Store};
use super::rules::{self, MeshMark, Ruleset};

/// A handle on a pod's task. The task ends with it.
#[derive(Debug)]
pub struct Pod {
    wanted: watch::Sender<Wanted>,
    status: watch::Receiver<Status>,
    task: tokio::task::JoinHandle<()>,
}

/// What the pod is to be.
#[derive(Clone, Debug, Default, PartialEq)]
struct Wanted {
    /// The controller's word. `None`: not known yet.
    pod: Option<NodePod>,
    registered: bool,
    /// The node is leaving the mesh.
    leave: bool,
}

/// How far the pod is.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// What is kept on disk.
    pub record: PodRecord,
    /// Nothing is left to do for this word of the controller.
    pub done: Option<NodePod>,
    /// What is being waited for, or why the last attempt failed.
    pub reason: String,
    /// The last attempt failed.
    pub failed: bool,
}

/// What a pod's task works with.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The node's mark.
    pub mark: MeshMark,
    /// Where proxies are told.
    pub broker: Arc<Broker>,
    /// Where records are kept.
    pub store: Store,
    /// Told when the node's report may have changed.
    pub changed: Arc<Notify>,
}

impl Pod {
    /// Starts the task. `netns`: the pod's namespace, open.
    pub fn start(tools: Tools, netns: Netns, record: PodRecord) -> Self {
        let wanted = Wanted {
            pod: record.pod.clone(),
            registered: record.registered,
            leave: false,
        };
        // Before the task runs: a proxy that connects now is told to keep the pod.
        match (record.phase, &record.pod) {
            (Phase::Enrolled, Some(pod)) => {
                tools.broker.serve(&netns, pod.clone(), None);
            }
            (Phase::Leaving, _) => tools.broker.leave(&record.uid, &netns),
            _ => {}
        }
        let (wanted, wishes) = watch::channel(wanted);
        let (status, follow) = watch::channel(Status {
            record: record.clone(),
            done: None,
            reason: String::new(),
            failed: false,
        });
        let task = Task {
            tools,
            netns,
            record,
            wishes,
            status,
            listeners: None,
        };
        Self {
            wanted,
            status: follow,
            task: tokio::spawn(task.run()),
        }
    }

    /// The controller's word about the pod.
    pub fn set(&self, pod: NodePod, registered: bool) {
        self.wanted.send_if_modified(|wanted| {
            let wish = Wanted {
                pod: Some(pod),
                registered: wanted.registered || registered,
                leave: wanted.leave,
            };
            let changed = *wanted != wish;
            *wanted = wish;
            changed
        });
    }

    /// Out of the mesh, whatever the controller says.
    pub fn leave(&self) {
        self.wanted.send_modify(|wanted| wanted.leave = true);
    }

    /// Waits until nothing is left to do for what is wanted at that moment, and says what that is.
    pub fn settled(&self) -> impl Future<Output = Option<NodePod>> + Send + 'static {
        let mut status = self.status.clone();
        let wanted = self.wanted.clone();
        async move {
            let settled =
                |status: &Status| status.done.is_some() && status.done == wanted.borrow().pod;
            // Fails when the task has ended: the pod was deleted.
            status
                .wait_for(settled)
                .await
                .ok()
                .and_then(|status| status.done.clone())
        }
    }

    /// How far it is.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Status {
    /// What the controller is told. `None`: the pod is not in the mesh.
    pub fn report(&self) -> Option<(PodState, String)> {
        let wanted = self.record.pod.as_ref().is_some_and(|pod| pod.enrolled);
        let captured = (self.record.applied.as_ref()).is_some_and(|applied| applied.captures());
        match self.record.phase {
            // Until the rules have been swapped.
            Phase::Leaving if captured => Some((PodState::Ready, String::new())),
            Phase::Leaving => Some((PodState::Leaving, self.reason.clone())),
            // With its rules in force it is served, by proxies that come and go.
            Phase::Enrolled if captured && !self.failed => Some((PodState::Ready, String::new())),
            _ if wanted && self.failed => Some((PodState::Failed, self.reason.clone())),
            _ => None,
        }
    }
}

struct Task {
    tools: Tools,
    netns: Netns,
    record: PodRecord,
    wishes: watch::Receiver<Wanted>,
    status: watch::Sender<Status>,
    listeners: Option<Arc<Listeners>>,
}

/// Why a step ended early.
enum Stop {
    /// Something else is wanted now.
    Changed,
    Failed(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Task {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let wanted = self.wishes.borrow_and_update().clone();
            let result = self.work(&wanted).await;
            match result {
                Ok(()) => {
                    pause = FIRST_PAUSE;
                    self.tell(wanted.pod, String::new(), false);
                    if self.wishes.changed().await.is_err() {
                        return;
                    }
                }
                Err(Stop::Changed) if self.wishes.has_changed().is_ok() => {}
                // The handle is gone.
                Err(Stop::Changed) => return,
                Err(Stop::Failed(error)) => {
                    let PodRecord {
                        uid,
                        namespace,
                        name,
                        ..
                    } = &self.record;
                    tracing::warn!(uid, namespace, name, %error, "pod: attempt failed, trying again");
                    self.tell(None, error.to_string(), true);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        changed = self.wishes.changed() => if changed.is_err() { return },
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn work(&mut self, wanted: &Wanted) -> Result<(), Stop> {
        if self.record.pod != wanted.pod || self.record.registered != wanted.registered {
            self.record.pod.clone_from(&wanted.pod);
            self.record.registered = wanted.registered;
            self.keep()?;
        }
        match &wanted.pod {
            Some(pod) if pod.enrolled && !wanted.leave => self.enrol(pod).await,
            _ => self.leave().await,
        }
    }

    async fn enrol(&mut self, pod: &NodePod) -> Result<(), Stop> {
        let capture = Ruleset::capturing(self.tools.mark, pod).map_err(io::Error::other)?;
        if self.record.phase != Phase::Enrolled {
            self.record.phase = Phase::Enrolled;
            self.keep()?;
            tracing::info!(
                namespace = pod.namespace,
                name = pod.name,
                "pod: joining the mesh"
            );
        }
        let generation = self.serve(pod).await?;
        let applied = self.record.applied.as_ref();
        // A pod that is captured already stays so, whether or not a proxy is there now. One that
        // is not starts to be when a proxy serves it.
        if !applied.is_some_and(|applied| applied.captures()) {
            let status = self.status.clone();
            let waiting = |reason: String| {
                status.send_if_modified(|status| {
                    let changed = status.reason != reason;
                    status.reason = reason;
                    changed
                });
            };
            let broker = Arc::clone(&self.tools.broker);
            let served = broker.served(&pod.uid, generation, waiting);
            unless_changed(&mut self.wishes, served).await?;
        }
        let before = self.record.applied.clone();
        self.record.applied = Some(capture.apply(&self.netns, before).await?);
        self.keep()?;
        Ok(())
    }

    /// Has proxies serve the pod. Returns what to wait for.
    async fn serve(&mut self, pod: &NodePod) -> Result<u64, Stop> {
        let broker = Arc::clone(&self.tools.broker);
        if let Some(listeners) = &self.listeners {
            return Ok(broker.serve(&self.netns, pod.clone(), Some(Arc::clone(listeners))));
        }
        broker.serve_unless_adopted(&self.netns, pod);
        let patience = Instant::now() + GIVEN_BACK;
        let listeners = loop {
            match broker.open_listeners(&self.netns).await {
                Ok(listeners) => break listeners,
                // A proxy holds those of an earlier agent.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    let adopted = tokio::time::timeout(super::RETRY, broker.adopted(&pod.uid));
                    if let Ok(listeners) = unless_changed(&mut self.wishes, adopted).await? {
                        break listeners;
                    }
                    if Instant::now() >= patience {
                        return Err(Stop::Failed(ports_taken()));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.listeners = Some(Arc::clone(&listeners));
        Ok(broker.serve(&self.netns, pod.clone(), Some(listeners)))
    }

    async fn leave(&mut self) -> Result<(), Stop> {
        if self.record.phase == Phase::Direct {
            return Ok(());
        }
        let uid = self.record.uid.clone();
        // An agent that died may have put rules in force without recording it.
        if self.record.applied.is_some() || rules::present(&self.netns).await? {
            let released = Ruleset::released(self.tools.mark);
            let fresh = self.record.phase == Phase::Enrolled;
            self.record.phase = Phase::Leaving;
            self.keep()?;
            let before = self.record.applied.clone();
            self.record.applied = Some(released.apply(&self.netns, before).await?);
            self.keep()?;
            self.tell(None, "captured connections still run".into(), false);
            if fresh {
                let PodRecord {
                    namespace, name, ..
                } = &self.record;
                tracing::info!(namespace, name, "pod: leaving the mesh");
                // Connections whose first packet was captured just now are still to be accepted.
                unless_changed(&mut self.wishes, tokio::time::sleep(HANDSHAKE)).await?;
            }
            self.tools.broker.leave(&uid, &self.netns);
            let broker = Arc::clone(&self.tools.broker);
            unless_changed(&mut self.wishes, broker.drained(&uid)).await?;
        }
        rules::remove(&self.netns).await?;
        self.tools.broker.forget(&uid);
        self.listeners = None;
        self.record.applied = None;
        self.record.phase = Phase::Direct;
        self.keep()?;
        let PodRecord {
            namespace, name, ..
        } = &self.record;
        tracing::info!(namespace, name, "pod: has left the mesh");
        Ok(())
    }

    fn keep(&mut self) -> io::Result<()> {
        self.tools
            .store
            .put(&self.record)
            .map_err(io::Error::other)?;
        let record = self.record.clone();
        self.status.send_if_modified(|status| {
            let changed = status.record != record;
            status.record = record;
            changed
        });
        self.tools.changed.notify_one();
        Ok(())
    }

    fn tell(&self, done: Option<NodePod>, reason: String, failed: bool) {
        self.status.send_replace(Status {
            record: self.record.clone(),
            done,
            reason,
            failed,
        });
        self.tools.changed.notify_one();
    }
}

/// No proxy has given listeners back, so somebody else has the ports.
fn ports_taken() -> io::Error {
    io::Error::other(format!(
        "a process of the pod listens on port {OUTBOUND_PORT}, {INBOUND_PORT} or {TUNNEL_PORT}, which the mesh \
         needs, or a node proxy does not give its listeners back"
    ))
}

async fn unless_changed<T>(
    wishes: &mut watch::Receiver<Wanted>,
    work: impl Future<Output = T>,
) -> Result<T, Stop> {
    tokio::select! {
        // Also when the handle is gone: the task is about to end.
        _ = wishes.changed() => Err(Stop::Changed),
        done = work => Ok(done),
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longer than a proxy needs to come back and offer what it holds.
const GIVEN_BACK: Duration = Duration::from_secs(6);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longer than a handshake takes inside a cluster.
const HANDSHAKE: Duration = Duration::from_secs(1);
