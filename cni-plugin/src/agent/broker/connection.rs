//! One connection of a proxy: a half that receives, and a half that sends what the proxy does not know
//! yet.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::names::address_to_bytes;
use mesh_api::proto::broker::{
    Ack, AddPod, Drain, Family, Hello, HostListeners, NeedSockets, Offer, PodDrained, Ready,
    RemovePod, Resume, SnapshotEnd, Sockets, ToAgent, ToProxy, Welcome, to_agent, to_proxy,
};
use mesh_api::seqpacket::{Connection, MAX_FDS};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{Broker, Listeners, Work};
use crate::agent::sockets::Place;

/// Serves a proxy until it goes.
pub(super) async fn serve(broker: &Broker, connection: Connection, proxy_uid: u32) {
    let (pid, uid) = match connection.peer() {
        Ok(peer) => (peer.pid, peer.uid),
        Err(error) => {
            tracing::warn!(%error, "broker: a peer without credentials");
            return;
        }
    };
    if uid != proxy_uid {
        tracing::warn!(
            pid,
            uid,
            expected = proxy_uid,
            "broker: refused a process of another user"
        );
        return;
    }
    match converse(broker, &connection).await {
        Ok(()) => tracing::info!(pid, "broker: a proxy has disconnected"),
        Err(error) => tracing::warn!(pid, %error, "broker: connection of a proxy ended"),
    }
}

async fn converse(broker: &Broker, connection: &Connection) -> io::Result<()> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let first = tokio::time::timeout(HELLO_TIMEOUT, connection.receive::<ToAgent>());
    let (message, _) = match first.await.map_err(|_| invalid("no Hello came"))?? {
        Some(first) => first,
        None => return Ok(()),
    };
    let Some(to_agent::Body::Hello(hello)) = message.body else {
        return Err(invalid("the first message was not Hello"));
    };
    let Hello {
        instance,
        version,
        held_pods,
        holds_host_listeners,
    } = hello;
    let held: HashSet<String> = held_pods.into_iter().collect();
    let registered = broker.register(&instance, &held, holds_host_listeners);
    let (id, awaited) = registered.ok_or_else(|| invalid("too many proxies are connected"))?;
    let registration = Registration { broker, id };
    tracing::info!(
        instance,
        version,
        held = held.len(),
        awaited = awaited.len(),
        "broker: a proxy has connected"
    );

    let (replies, to_reply) = mpsc::channel(REPLIES);
    let sent: Mutex<HashMap<u64, Asked>> = Mutex::default();
    let mut sender = Sender {
        broker,
        connection,
        id,
        sent: &sent,
        next_id: 1,
        known: HashMap::new(),
        offered: held,
        sent_listeners: HashMap::new(),
        host: None,
        snapshot_ended: false,
        told_to_drain: false,
    };
    let mut want_pods: Vec<String> = awaited.into_iter().collect();
    let before = want_pods.len();
    want_pods.retain(|uid| !uid.is_empty());
    let welcome = Welcome {
        want_host_listeners: want_pods.len() != before,
        want_pods,
    };
    sender
        .ask(to_proxy::Body::Welcome(welcome), None, Asked::Other)
        .await?;
    sender.reply(ack(message.id, Ok(())), vec![]).await?;

    let receiver = Receiver {
        broker,
        connection,
        id,
        sent: &sent,
        replies,
    };
    let ended = tokio::select! {
        ended = receiver.run() => ended,
        failed = sender.run(to_reply) => failed,
    };
    drop(registration);
    ended
}

/// What a message was about whose acknowledgement is awaited.
enum Asked {
    AddPod(String, u64),
    RemovePod(String, u64),
    Other,
}

/// Takes the proxy out of the broker's state.
struct Registration<'a> {
    broker: &'a Broker,
    id: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.broker.change(|state, _| {
            state.proxies.remove(&self.id);
            // It may be back in a moment, with connections that are still captured.
            state.settled = tokio::time::Instant::now() + super::SETTLE;
        });
    }
}

struct Receiver<'a> {
    broker: &'a Broker,
    connection: &'a Connection,
    id: u64,
    sent: &'a Mutex<HashMap<u64, Asked>>,
    /// The sending half writes them.
    replies: mpsc::Sender<(to_proxy::Body, Vec<OwnedFd>)>,
}

impl Receiver<'_> {
    async fn run(&self) -> io::Result<()> {
        while let Some((message, fds)) = self.connection.receive::<ToAgent>().await? {
            let ToAgent { id, body } = message;
            let reply = match body {
                Some(to_agent::Body::Ack(answer)) => {
                    self.acknowledged(answer);
                    continue;
                }
                Some(to_agent::Body::NeedSockets(request)) => self.make_sockets(id, request).await,
                Some(other) => (ack(id, self.handle(other, fds)), vec![]),
                None => (
                    ack(id, Err("this agent does not know that message".into())),
                    vec![],
                ),
            };
            if self.replies.send(reply).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn handle(&self, body: to_agent::Body, fds: Vec<OwnedFd>) -> Result<(), String> {
        match body {
            to_agent::Body::Offer(Offer { pod_uid, listeners }) => {
                let adopted = self.broker.adopt(self.id, &pod_uid, &listeners, fds);
                match &adopted {
                    Ok(()) => tracing::info!(pod = pod_uid, "listeners taken back from a proxy"),
                    Err(error) => {
                        tracing::warn!(pod = pod_uid, error, "offered listeners are refused")
                    }
                }
                self.change(|proxy| {
                    proxy.awaited.remove(&pod_uid);
                });
                adopted
            }
            to_agent::Body::Ready(Ready {}) => {
                self.change(|proxy| proxy.ready = true);
                Ok(())
            }
            to_agent::Body::PodDrained(PodDrained { uid }) => {
                // One that answers an earlier RemovePod says nothing about the present one.
                self.change(|proxy| {
                    if proxy.removed.contains_key(&uid) {
                        proxy.drained.insert(uid);
                    }
                });
                Ok(())
            }
            to_agent::Body::Hello(_) => Err("Hello came twice".into()),
            // Handled by the caller.
            to_agent::Body::Ack(_) | to_agent::Body::NeedSockets(_) => Ok(()),
        }
    }

    fn acknowledged(&self, Ack { of, error }: Ack) {
        match self.sent.lock().remove(&of) {
            Some(Asked::AddPod(uid, generation)) => {
                let result = if error.is_empty() { Ok(()) } else { Err(error) };
                self.change(|proxy| {
                    proxy.served.insert(uid, (generation, result));
                });
            }
            // Also on error: it was received, which is what counts.
            Some(Asked::RemovePod(uid, generation)) => self.broker.change(|state, _| {
                let current = state.pods.get(&uid).map(|entry| entry.generation);
                if let Some(proxy) = state.proxies.get_mut(&self.id)
                    && current == Some(generation)
                {
                    proxy.removed.insert(uid, generation);
                }
            }),
            Some(Asked::Other) if !error.is_empty() => {
                tracing::warn!(error, "broker: a proxy could not do what it was asked to");
            }
            Some(Asked::Other) => {}
            None => tracing::warn!(of, "broker: an acknowledgement of nothing that was sent"),
        }
    }

    async fn make_sockets(&self, of: u64, request: NeedSockets) -> (to_proxy::Body, Vec<OwnedFd>) {
        let family = request.family();
        let NeedSockets {
            pod_uid,
            family: _,
            count,
        } = request;
        let refused = |error: String| (to_proxy::Body::Sockets(Sockets { of, error }), vec![]);
        let count = count as usize;
        if !(1..=MAX_FDS).contains(&count) || family == Family::Unspecified {
            return refused(format!(
                "asked for {count} sockets of family {}",
                family.as_str_name()
            ));
        }
        let place = if pod_uid.is_empty() {
            Place::Host
        } else {
            match self.broker.state.lock().pods.get(&pod_uid) {
                Some(entry) => Place::Pod(entry.netns.clone()),
                None => return refused(format!("pod {pod_uid} is not known here")),
            }
        };
        let (sockets, error) = self.broker.sockets.dial(place, family, count).await;
        let error = error.map(|e| e.to_string()).unwrap_or_default();
        (to_proxy::Body::Sockets(Sockets { of, error }), sockets)
    }

    fn change(&self, edit: impl FnOnce(&mut super::Proxy)) {
        self.broker
            .change(|state, _| state.proxies.get_mut(&self.id).map(edit));
    }
}

/// What the proxy knows of a pod.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Known {
    generation: u64,
    serving: bool,
}

struct Sender<'a> {
    broker: &'a Broker,
    connection: &'a Connection,
    id: u64,
    sent: &'a Mutex<HashMap<u64, Asked>>,
    next_id: u64,
    known: HashMap<String, Known>,
    /// Pods whose listeners the proxy had when it connected.
    offered: HashSet<String>,
    /// Listeners that the proxy got here, by pod; the node's under the empty name.
    sent_listeners: HashMap<String, u64>,
    /// Generation of the host entry that was sent.
    host: Option<u64>,
    snapshot_ended: bool,
    told_to_drain: bool,
}

/// One message that is due.
enum Due {
    Pod {
        uid: String,
        generation: u64,
        body: to_proxy::Body,
        listeners: Option<Arc<Listeners>>,
    },
    Host {
        generation: u64,
        body: to_proxy::Body,
        listeners: Option<Arc<Listeners>>,
    },
    SnapshotEnd,
    Accept(bool),
}

impl Sender<'_> {
    async fn run(
        &mut self,
        mut replies: mpsc::Receiver<(to_proxy::Body, Vec<OwnedFd>)>,
    ) -> io::Result<()> {
        let offers_due = tokio::time::Instant::now() + OFFER_TIMEOUT;
        let mut changed = self.broker.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let overdue = tokio::time::Instant::now() >= offers_due;
            for due in self.due(overdue) {
                self.send_due(due).await?;
                // Replies do not wait for a long snapshot.
                while let Ok((body, fds)) = replies.try_recv() {
                    self.reply(body, fds).await?;
                }
            }
            tokio::select! {
                // Cannot fail: the broker holds the sender.
                _ = changed.changed() => {}
                reply = replies.recv() => match reply {
                    Some((body, fds)) => self.reply(body, fds).await?,
                    None => return Ok(()),
                },
                () = tokio::time::sleep_until(offers_due), if !self.snapshot_ended && !overdue => {}
            }
        }
    }

    /// What the proxy does not know yet. Nothing before it has offered what was asked for.
    fn due(&mut self, offers_overdue: bool) -> Vec<Due> {
        let state = self.broker.state.lock();
        let Some(proxy) = state.proxies.get(&self.id) else {
            return Vec::new();
        };
        if !self.snapshot_ended && !proxy.awaited.is_empty() && !offers_overdue {
            return Vec::new();
        }
        let mut due = Vec::new();
        // A proxy that drains takes no new pods.
        let accepts = !proxy.drain;
        for (uid, entry) in &state.pods {
            let known = self.known.get(uid).copied();
            if known.is_some_and(|known| known.generation == entry.generation) {
                continue;
            }
            let generation = entry.generation;
            match &entry.work {
                Work::Serve { pod, listeners } => {
                    let held =
                        known.is_some_and(|known| known.serving) || self.offered.contains(uid);
                    if !held && (!accepts || listeners.is_none()) {
                        continue;
                    }
                    let listeners = self.new_to_it(proxy, uid, listeners.as_ref());
                    let add = AddPod {
                        pod: Some((**pod).clone()),
                        listeners: listeners
                            .as_deref()
                            .map(Listeners::kinds)
                            .unwrap_or_default(),
                    };
                    due.push(Due::Pod {
                        uid: uid.clone(),
                        generation,
                        body: to_proxy::Body::AddPod(add),
                        listeners,
                    });
                }
                Work::Leave => due.push(remove(uid, generation)),
            }
        }
        for (uid, known) in &self.known {
            if known.serving && !state.pods.contains_key(uid) {
                due.push(remove(uid, 0));
            }
        }
        let host = &state.host;
        if self.host != Some(host.generation) && host.listeners.is_some() {
            let listeners = self.new_to_it(proxy, "", host.listeners.as_ref());
            let message = HostListeners {
                listeners: listeners
                    .as_deref()
                    .map(Listeners::kinds)
                    .unwrap_or_default(),
                host_addresses: (host.interface_addresses.iter())
                    .map(|address| address_to_bytes(*address).to_vec())
                    .collect(),
            };
            due.push(Due::Host {
                generation: host.generation,
                body: to_proxy::Body::HostListeners(message),
                listeners,
            });
        }
        if !self.snapshot_ended {
            due.push(Due::SnapshotEnd);
        }
        // After the snapshot: it ends what an earlier agent said about draining.
        if proxy.drain != self.told_to_drain {
            due.push(Due::Accept(!proxy.drain));
        }
        due
    }

    /// The listeners, unless the proxy has these very ones.
    fn new_to_it(
        &self,
        proxy: &super::Proxy,
        uid: &str,
        listeners: Option<&Arc<Listeners>>,
    ) -> Option<Arc<Listeners>> {
        let has = [proxy.adopted.get(uid), self.sent_listeners.get(uid)];
        let listeners = listeners.filter(|listeners| !has.contains(&Some(&listeners.id)));
        listeners.cloned()
    }

    async fn send_due(&mut self, due: Due) -> io::Result<()> {
        match due {
            Due::Pod {
                uid,
                generation,
                body,
                listeners,
            } => {
                let serving = matches!(body, to_proxy::Body::AddPod(_));
                let asked = match serving {
                    true => Asked::AddPod(uid.clone(), generation),
                    false => Asked::RemovePod(uid.clone(), generation),
                };
                self.ask(body, listeners.as_deref(), asked).await?;
                if let Some(listeners) = listeners {
                    self.sent_listeners.insert(uid.clone(), listeners.id);
                }
                if !serving {
                    self.sent_listeners.remove(&uid);
                    self.offered.remove(&uid);
                    self.broker.change(|state, _| {
                        let proxy = state.proxies.get_mut(&self.id);
                        proxy.map(|proxy| proxy.adopted.remove(&uid))
                    });
                }
                self.known.insert(
                    uid.clone(),
                    Known {
                        generation,
                        serving,
                    },
                );
                if generation == 0 {
                    self.known.remove(&uid);
                }
                Ok(())
            }
            Due::Host {
                generation,
                body,
                listeners,
            } => {
                self.ask(body, listeners.as_deref(), Asked::Other).await?;
                self.host = Some(generation);
                if let Some(listeners) = listeners {
                    self.sent_listeners.insert(String::new(), listeners.id);
                }
                Ok(())
            }
            Due::SnapshotEnd => {
                self.snapshot_ended = true;
                let body = to_proxy::Body::SnapshotEnd(SnapshotEnd {});
                self.ask(body, None, Asked::Other).await
            }
            Due::Accept(accept) => {
                self.told_to_drain = !accept;
                let body = match accept {
                    true => to_proxy::Body::Resume(Resume {}),
                    false => to_proxy::Body::Drain(Drain {}),
                };
                self.ask(body, None, Asked::Other).await
            }
        }
    }

    async fn ask(
        &mut self,
        body: to_proxy::Body,
        listeners: Option<&Listeners>,
        asked: Asked,
    ) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        {
            let mut sent = self.sent.lock();
            if sent.len() >= UNANSWERED {
                return Err(io::Error::other("it does not acknowledge"));
            }
            sent.insert(id, asked);
        }
        let sockets = listeners.map(|l| l.sockets.as_slice()).unwrap_or_default();
        let fds: Vec<BorrowedFd<'_>> = sockets.iter().map(|s| s.fd.as_fd()).collect();
        self.write(
            &ToProxy {
                id,
                body: Some(body),
            },
            &fds,
        )
        .await
    }

    async fn reply(&mut self, body: to_proxy::Body, fds: Vec<OwnedFd>) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let id = self.next_id;
        self.next_id += 1;
        self.write(
            &ToProxy {
                id,
                body: Some(body),
            },
            &fds,
        )
        .await
    }

    async fn write(&self, message: &ToProxy, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        tokio::time::timeout(WRITE_TIMEOUT, self.connection.send(message, fds))
            .await
            .unwrap_or_else(|_| Err(io::Error::other("it does not read")))
    }
}

fn remove(uid: &str, generation: u64) -> Due {
    Due::Pod {
        uid: uid.to_owned(),
        generation,
        body: to_proxy::Body::RemovePod(RemovePod {
            uid: uid.to_owned(),
        }),
        listeners: None,
    }
}

fn ack(of: u64, result: Result<(), String>) -> to_proxy::Body {
    let error = result.err().unwrap_or_default();
    to_proxy::Body::Ack(Ack { of, error })
}

/// Replies that wait for the sending half.
const REPLIES: usize = 64;
/// Requests a proxy may owe an answer: more than a node has pods, which wait for certificates.
const UNANSWERED: usize = 4096;
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A proxy that says it holds listeners and does not offer them is not waited for longer.
const OFFER_TIMEOUT: Duration = Duration::from_secs(3);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
