//! One connection to an agent, from Hello to its end.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt, unfold};
use mesh_api::names::address_from_bytes;
use mesh_api::proto::broker::{
    Ack, AddPod, Family, Hello, HostListeners, NeedSockets, Offer, PodDrained, Ready, Sockets,
    ToAgent, ToProxy, Welcome, to_agent, to_proxy,
};
use mesh_api::seqpacket::Connection;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::messages::{Outgoing, received_kind, sent_kind};
use super::{Broker, Metrics, OUTGOING, Stage};
use crate::pods::Pod;
use crate::process::lifecycle::Phase;
use crate::stock::Want;

/// How often stocks adapt their levels and ask again for what was refused.
const TICK: Duration = Duration::from_millis(500);

/// How long a process that has just started waits for the certificates of all pods before it serves those
/// whose certificates are there.
const GATE_PATIENCE: Duration = Duration::from_secs(3);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("the agent closed it")]
    Closed,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the agent does not read: {OUTGOING} messages wait")]
    Stuck,
}

struct Session<'a> {
    broker: &'a Broker,
    outgoing: mpsc::Sender<Outgoing>,
    next_id: u64,
    /// What was sent and not answered yet.
    unanswered: HashMap<u64, Expected>,
    /// Acknowledgements that wait for a pod to be served.
    acks: FuturesUnordered<BoxFuture<'static, (u64, Result<(), String>)>>,
    /// Pods that were removed and still have captured connections.
    draining: FuturesUnordered<BoxFuture<'static, Arc<Pod>>>,
    snapshot: Snapshot,
    /// Ends when everything the snapshot named is served.
    completion: Option<BoxFuture<'static, ()>>,
    complete: bool,
    said_ready: bool,
    welcomed: bool,
}

/// Pods named since Welcome.
#[derive(Default)]
struct Snapshot {
    named: HashSet<Arc<str>>,
    stages: Vec<watch::Receiver<Stage>>,
}

/// What an answer is about.
enum Expected {
    Ack(&'static str),
    Drained(Arc<str>),
    Sockets(Want, usize),
}

/// Runs until the connection ends; says why it did, and whether the agent had spoken at all.
pub(super) async fn run(broker: &Broker, connection: &Connection) -> (SessionError, bool) {
    let (outgoing, to_send) = mpsc::channel(OUTGOING);
    let mut session = Session {
        broker,
        outgoing,
        next_id: 1,
        unanswered: HashMap::new(),
        acks: FuturesUnordered::new(),
        draining: FuturesUnordered::new(),
        snapshot: Snapshot::default(),
        completion: None,
        complete: false,
        said_ready: false,
        welcomed: false,
    };
    let error = match session.converse(connection, to_send).await {
        Ok(never) => match never {},
        Err(error) => error,
    };
    // If the agent dies in the middle of its snapshot, what it did name is served.
    broker.roster.open_gate();
    (error, session.welcomed)
}

impl Session<'_> {
    async fn converse(
        &mut self,
        connection: &Connection,
        to_send: mpsc::Receiver<Outgoing>,
    ) -> Result<Infallible, SessionError> {
        self.greet()?;
        // Both live across turns of the loop, so that no packet is lost when another branch is taken; and
        // apart, so that receiving goes on while the agent does not read.
        let mut sending = pin!(send_all(connection, to_send, &self.broker.metrics));
        let mut incoming = pin!(unfold(connection, |connection| async move {
            Some((connection.receive::<ToProxy>().await, connection))
        }));
        let mut phase = self.broker.lifecycle.subscribe();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // In this order, so that Ready follows the acknowledgements of the pods it is about. Nothing above
                // another is ready again and again, but for what the agent sends: that comes last.
                biased;
                error = &mut sending => return Err(error),
                Some((id, result)) = self.acks.next() => self.acknowledge(id, result)?,
                Some(pod) = self.draining.next() => self.report_drained(&pod)?,
                () = ended(&mut self.completion) => {
                    self.completion = None;
                    self.complete = true;
                    self.say_ready()?;
                }
                wants = self.broker.supply.wants() => self.ask(wants)?,
                // Never fails: the broker holds the lifecycle.
                _ = phase.changed() => self.say_ready()?,
                _ = tick.tick() => self.broker.roster.tick(),
                Some(received) = incoming.next() => match received? {
                    Some((message, descriptors)) => self.handle(message, descriptors)?,
                    None => return Err(SessionError::Closed),
                },
            }
        }
    }

    fn greet(&mut self) -> Result<(), SessionError> {
        let roster = &self.broker.roster;
        let hello = Hello {
            instance: self.broker.instance.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            held_pods: roster.held(),
            holds_host_listeners: roster.holds_host_listeners(),
        };
        for pod in roster.leaving() {
            self.await_drained(pod);
        }
        self.request(to_agent::Body::Hello(hello), vec![], Expected::Ack("Hello"))
    }

    fn handle(&mut self, message: ToProxy, descriptors: Vec<OwnedFd>) -> Result<(), SessionError> {
        let ToProxy { id, body } = message;
        let Some(body) = body else {
            self.broker.metrics.message("received", "unknown");
            return self.acknowledge(id, Err("this proxy does not know that message".into()));
        };
        self.broker
            .metrics
            .message("received", received_kind(&body));
        match body {
            to_proxy::Body::Ack(ack) => self.acknowledged(ack),
            to_proxy::Body::Sockets(sockets) => self.sockets(sockets, descriptors),
            to_proxy::Body::Welcome(welcome) => {
                self.acknowledge(id, Ok(()))?;
                return self.welcome(welcome);
            }
            to_proxy::Body::AddPod(add) => return self.add_pod(id, add, descriptors),
            to_proxy::Body::RemovePod(remove) => {
                self.acknowledge(id, Ok(()))?;
                return match self.broker.roster.remove(&remove.uid) {
                    Some(pod) => {
                        self.await_drained(pod);
                        Ok(())
                    }
                    None => self.send_drained(&remove.uid),
                };
            }
            to_proxy::Body::HostListeners(listeners) => {
                let result = self.host_listeners(listeners, descriptors);
                self.acknowledge(id, result)?;
                return self.say_ready();
            }
            to_proxy::Body::SnapshotEnd(_) => {
                self.snapshot_end();
                return self.acknowledge(id, Ok(()));
            }
            to_proxy::Body::Drain(_) => {
                if self.broker.lifecycle.drain() {
                    self.broker.drained_by_agent.store(true, Ordering::Relaxed);
                    tracing::info!("a newer proxy is ready: accepting no more");
                }
                return self.acknowledge(id, Ok(()));
            }
            to_proxy::Body::Resume(_) => {
                if self.broker.lifecycle.resume() {
                    self.broker.drained_by_agent.store(false, Ordering::Relaxed);
                    tracing::info!("the newer proxy is gone: accepting again");
                }
                return self.acknowledge(id, Ok(()));
            }
        }
        Ok(())
    }

    fn welcome(&mut self, welcome: Welcome) -> Result<(), SessionError> {
        self.welcomed = true;
        let host = welcome.want_host_listeners.then(String::new);
        for uid in welcome.want_pods.into_iter().chain(host) {
            let Some(listeners) = self.broker.roster.offer(&uid) else {
                tracing::warn!(pod = uid, "the agent asks for listeners that are not held");
                continue;
            };
            let offer = Offer {
                pod_uid: uid,
                listeners: listeners.kinds(),
            };
            self.request(
                to_agent::Body::Offer(offer),
                listeners.descriptors(),
                Expected::Ack("Offer"),
            )?;
        }
        Ok(())
    }

    fn add_pod(
        &mut self,
        id: u64,
        add: AddPod,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), SessionError> {
        let Some(pod) = add.pod else {
            return self.acknowledge(id, Err("AddPod without a pod".into()));
        };
        // Named in any case: a fault in the message is no reason to stop serving the pod.
        self.snapshot.named.insert(pod.uid.as_str().into());
        match self.broker.roster.add(&pod, &add.listeners, descriptors) {
            Ok(stage) => {
                if !self.complete {
                    self.snapshot.stages.push(stage.clone());
                }
                self.acks
                    .push(Box::pin(async move { (id, served(stage).await) }));
                Ok(())
            }
            Err(error) => {
                tracing::error!(pod = pod.uid, error, "the agent's AddPod cannot be used");
                self.acknowledge(id, Err(error))
            }
        }
    }

    fn host_listeners(
        &mut self,
        message: HostListeners,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let HostListeners {
            listeners,
            host_addresses,
        } = message;
        let address = |bytes: &Vec<u8>| {
            address_from_bytes(bytes)
                .ok_or_else(|| format!("a host address of {} bytes", bytes.len()))
        };
        let addresses = host_addresses
            .iter()
            .map(address)
            .collect::<Result<_, _>>()?;
        self.broker
            .roster
            .set_host(&listeners, descriptors, addresses)
    }

    fn snapshot_end(&mut self) {
        let Snapshot { named, stages } = std::mem::take(&mut self.snapshot);
        for pod in self.broker.roster.retain(&named) {
            tracing::info!(pod = %pod.uid, "no longer known to the agent: leaving");
            self.await_drained(pod);
        }
        // A Drain holds for the connection it came on.
        if self.broker.drained_by_agent.swap(false, Ordering::Relaxed)
            && self.broker.lifecycle.resume()
        {
            tracing::info!(
                "a new connection to the agent: accepting again until it says otherwise"
            );
        }
        let roster = Arc::clone(&self.broker.roster);
        self.completion = Some(Box::pin(async move {
            let mut loaded = roster.parts.table.loaded();
            // Fails only when the table is gone, with the process.
            let _ = loaded.wait_for(|loaded| *loaded).await;
            let certified = async {
                for stage in &stages {
                    let mut stage = stage.clone();
                    // A pod that is removed or cannot be served does not hold up the others.
                    let _ = stage.wait_for(|stage| *stage != Stage::Starting).await;
                }
            };
            if tokio::time::timeout(GATE_PATIENCE, certified)
                .await
                .is_err()
            {
                let waiting = roster.waiting();
                tracing::warn!(
                    ?waiting,
                    "not every certificate is there: accepting for the others"
                );
            }
            roster.open_gate();
            for stage in stages {
                let _ = served(stage).await;
            }
            // All pods of the node are known now: keys of others need not be kept.
            roster.parts.identities.wipe_unwanted();
        }));
    }

    fn say_ready(&mut self) -> Result<(), SessionError> {
        if !self.complete || !self.broker.roster.holds_host_listeners() {
            return Ok(());
        }
        self.broker
            .state
            .send_if_modified(|state| !std::mem::replace(&mut state.ready, true));
        if self.said_ready || self.broker.lifecycle.phase() != Phase::Serving {
            return Ok(());
        }
        self.said_ready = true;
        tracing::info!("ready: table, certificates and listeners are there");
        self.request(
            to_agent::Body::Ready(Ready {}),
            vec![],
            Expected::Ack("Ready"),
        )
    }

    fn ask(&mut self, wants: Vec<Want>) -> Result<(), SessionError> {
        for want in wants {
            let roster = &self.broker.roster;
            let open = |stock: &crate::stock::Stock| stock.open_request(want.v6);
            let Some(count) = roster.with_stock(&want.owner, open).flatten() else {
                continue;
            };
            let request = NeedSockets {
                pod_uid: want.owner.to_string(),
                family: if want.v6 { Family::V6 } else { Family::V4 }.into(),
                count,
            };
            self.request(
                to_agent::Body::NeedSockets(request),
                vec![],
                Expected::Sockets(want, count as usize),
            )?;
        }
        Ok(())
    }

    fn sockets(&mut self, sockets: Sockets, descriptors: Vec<OwnedFd>) {
        let Sockets { of, error } = sockets;
        let Some(Expected::Sockets(want, count)) = self.unanswered.remove(&of) else {
            tracing::warn!(of, "sockets that were not asked for");
            return;
        };
        self.broker.metrics.request(match descriptors.len() {
            0 => "refused",
            came if came < count => "partial",
            _ => "ok",
        });
        if !error.is_empty() {
            tracing::warn!(pod = %want.owner, error, came = descriptors.len(), asked = count, "sockets");
        }
        self.broker
            .roster
            .with_stock(&want.owner, |stock| stock.fill(want.v6, descriptors));
    }

    fn acknowledged(&mut self, ack: Ack) {
        let Ack { of, error } = ack;
        match self.unanswered.remove(&of) {
            None => tracing::warn!(of, "an acknowledgement of nothing that was sent"),
            Some(Expected::Ack(what)) if !error.is_empty() => {
                tracing::warn!(what, error, "the agent could not do it");
            }
            Some(Expected::Ack(_)) => {}
            Some(Expected::Drained(uid)) => self.broker.roster.reported_drained(&uid),
            Some(Expected::Sockets(want, _)) => {
                tracing::warn!(pod = %want.owner, error, "sockets were refused");
                self.broker.metrics.request("refused");
                self.broker
                    .roster
                    .with_stock(&want.owner, |stock| stock.fill(want.v6, vec![]));
            }
        }
    }

    fn await_drained(&mut self, pod: Arc<Pod>) {
        self.draining.push(Box::pin(async move {
            pod.captured.none().await;
            pod
        }));
    }

    fn report_drained(&mut self, pod: &Arc<Pod>) -> Result<(), SessionError> {
        // It may have come back meanwhile.
        if self
            .broker
            .roster
            .leaving()
            .iter()
            .any(|leaving| Arc::ptr_eq(leaving, pod))
        {
            self.send_drained(&pod.uid)?;
        }
        Ok(())
    }

    fn send_drained(&mut self, uid: &str) -> Result<(), SessionError> {
        let body = to_agent::Body::PodDrained(PodDrained { uid: uid.into() });
        self.request(body, vec![], Expected::Drained(uid.into()))
    }

    fn acknowledge(&mut self, of: u64, result: Result<(), String>) -> Result<(), SessionError> {
        let error = result.err().unwrap_or_default();
        self.send(
            ToAgent {
                id: 0,
                body: Some(to_agent::Body::Ack(Ack { of, error })),
            },
            vec![],
        )
    }

    fn request(
        &mut self,
        body: to_agent::Body,
        descriptors: Vec<Arc<OwnedFd>>,
        expected: Expected,
    ) -> Result<(), SessionError> {
        let id = self.next_id;
        self.next_id += 1;
        self.unanswered.insert(id, expected);
        self.send(
            ToAgent {
                id,
                body: Some(body),
            },
            descriptors,
        )
    }

    fn send(
        &mut self,
        message: ToAgent,
        descriptors: Vec<Arc<OwnedFd>>,
    ) -> Result<(), SessionError> {
        let outgoing = Outgoing {
            message,
            descriptors,
        };
        self.outgoing
            .try_send(outgoing)
            .map_err(|_| SessionError::Stuck)
    }
}

async fn send_all(
    connection: &Connection,
    mut queue: mpsc::Receiver<Outgoing>,
    metrics: &Metrics,
) -> SessionError {
    while let Some(outgoing) = queue.recv().await {
        if let Err(error) = connection
            .send(&outgoing.message, &outgoing.borrowed())
            .await
        {
            return error.into();
        }
        if let Some(body) = &outgoing.message.body {
            metrics.message("sent", sent_kind(body));
        }
    }
    SessionError::Closed
}

/// Waits until the pod is served or cannot be.
async fn served(mut stage: watch::Receiver<Stage>) -> Result<(), String> {
    let settled = |stage: &Stage| matches!(stage, Stage::Served | Stage::Failed(_));
    match stage.wait_for(settled).await.as_deref() {
        Ok(Stage::Failed(reason)) => Err(reason.clone()),
        Ok(_served) => Ok(()),
        Err(_gone) => Err("the pod was removed or replaced meanwhile".into()),
    }
}

/// Never ends while there is nothing to wait for.
async fn ended(future: &mut Option<BoxFuture<'static, ()>>) {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
