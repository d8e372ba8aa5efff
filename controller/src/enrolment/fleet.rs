//! Which nodes are there, and what each of them is known to know.
//!
//! A node counts as long as one of its proxies holds a stream or held one within [`LEASE`]. One that holds a
//! stream and leaves a push unanswered for as long stops counting too, so that a stuck proxy
//! cannot hold up the mesh; what it does not know makes it refuse, not leak.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::identity::NodeRole;
use tokio::time::Instant;

/// How long a silent node is waited for.
pub const LEASE: Duration = Duration::from_secs(15);

/// Names one discovery stream for as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

/// How far a stream is. Numbers are those of snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Everything up to here was handed to the client; `None`: it has not subscribed to anything.
    pub handed: Option<u64>,
    /// The client holds the table (proxies: Workload, agents: NodePod) up to here.
    pub acked: u64,
    /// The client holds the MeshConfig up to here; `None`: it has not subscribed to it.
    pub mesh_acked: Option<u64>,
    /// Names whose newest version the client has rejected.
    pub rejected: BTreeSet<Arc<str>>,
    /// A push of the table waits for its answer.
    pub waiting: bool,
}

#[derive(Debug)]
struct Stream {
    node: String,
    role: NodeRole,
    progress: Progress,
    /// Since when it owes an answer; a new stream owes its first.
    behind_since: Option<Instant>,
}

/// All streams, and the nodes that had one.
#[derive(Debug, Default)]
pub struct Fleet {
    next: u64,
    streams: BTreeMap<StreamId, Stream>,
    /// The agents' streams by node.
    agents: BTreeMap<String, BTreeSet<StreamId>>,
    away: BTreeMap<String, Instant>,
    handed: Counted,
    acked: Counted,
    mesh_acked: Counted,
}

/// Snapshots, and how many streams are at each: the one furthest behind without a look at every stream.
#[derive(Debug, Default)]
struct Counted(BTreeMap<u64, usize>);

/// What the proxies that count know together, at one moment.
#[derive(Debug)]
pub struct Known<'a> {
    /// Every one of them holds the table up to here.
    acked: u64,
    rejected: BTreeSet<&'a str>,
}

impl Fleet {
    /// Nodes that an earlier process knew: each has the length of a lease to come back.
    pub fn expect(&mut self, nodes: impl IntoIterator<Item = String>, now: Instant) {
        self.away.extend(nodes.into_iter().map(|n| (n, now)));
    }

    /// A stream opened.
    pub fn open(&mut self, node: &str, role: NodeRole, now: Instant) -> StreamId {
        let id = StreamId(self.next);
        self.next += 1;
        match role {
            NodeRole::Proxy => {
                self.away.remove(node);
                self.acked.add(0);
            }
            NodeRole::Agent => {
                self.agents.entry(node.into()).or_default().insert(id);
            }
        }
        let stream = Stream {
            node: node.into(),
            role,
            progress: Progress::default(),
            behind_since: Some(now),
        };
        self.streams.insert(id, stream);
        id
    }

    /// A stream ended.
    pub fn close(&mut self, id: StreamId, now: Instant) {
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        self.handed.move_on(stream.progress.handed, None);
        self.mesh_acked.move_on(stream.progress.mesh_acked, None);
        match stream.role {
            NodeRole::Proxy => self.acked.move_on(Some(stream.progress.acked), None),
            NodeRole::Agent => {
                if let Some(agents) = self.agents.get_mut(&stream.node) {
                    agents.remove(&id);
                    if agents.is_empty() {
                        self.agents.remove(&stream.node);
                    }
                }
            }
        }
        if stream.role == NodeRole::Proxy && self.proxies_of(&stream.node).next().is_none() {
            self.away.insert(stream.node, now);
        }
    }

    /// A stream got further. True: with it, the one that was furthest behind in something did, or it
    /// rejects something else than before.
    pub fn progress(&mut self, id: StreamId, progress: Progress, now: Instant) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        let least = [&self.handed, &self.acked, &self.mesh_acked].map(Counted::least);
        let old = &stream.progress;
        let rejects = old.rejected != progress.rejected;
        self.handed.move_on(old.handed, progress.handed);
        self.mesh_acked.move_on(old.mesh_acked, progress.mesh_acked);
        if stream.role == NodeRole::Proxy {
            self.acked.move_on(Some(old.acked), Some(progress.acked));
        }
        let further = progress.acked > stream.progress.acked;
        stream.behind_since = match (progress.waiting || progress.acked == 0, stream.behind_since) {
            (false, _) => None,
            (true, Some(since)) if !further => Some(since),
            (true, _) => Some(now),
        };
        stream.progress = progress;
        rejects || least != [&self.handed, &self.acked, &self.mesh_acked].map(Counted::least)
    }

    /// Forgets nodes whose lease ran out. True: there were some.
    pub fn expire(&mut self, now: Instant) -> bool {
        let before = self.away.len();
        self.away.retain(|node, since| {
            let expired = now.duration_since(*since) >= LEASE;
            if expired {
                tracing::warn!(
                    node,
                    "no proxy of the node came back; it is no longer waited for"
                );
            }
            !expired
        });
        self.away.len() != before
    }

    /// What every proxy that counts knows; `None`: one has not come back.
    pub fn known(&self, now: Instant) -> Option<Known<'_>> {
        let counting = self.counting(now)?;
        let mut known = Known {
            acked: u64::MAX,
            rejected: BTreeSet::new(),
        };
        for stream in counting {
            known.acked = known.acked.min(stream.progress.acked);
            known
                .rejected
                .extend(stream.progress.rejected.iter().map(|uid| &**uid));
        }
        Some(known)
    }

    /// Whether an agent of the node has a stream.
    pub fn has_agent(&self, node: &str) -> bool {
        self.agents.contains_key(node)
    }

    /// The newest snapshot that every proxy that counts holds; `None`: one has not come back.
    pub fn acknowledged(&self, newest: u64, now: Instant) -> Option<u64> {
        let counting = self.counting(now)?;
        Some(counting.map(|s| s.progress.acked).min().unwrap_or(newest))
    }

    /// Whether an agent of the node holds snapshot `seq`.
    pub fn agent_acked(&self, node: &str, seq: u64) -> bool {
        let mut agents = self.agents.get(node).into_iter().flatten();
        agents.any(|id| {
            let stream = self.streams.get(id);
            stream.is_some_and(|s| s.progress.acked >= seq.max(1))
        })
    }

    /// Whether every node holds the MeshConfig of snapshot `seq`, as far as it counts.
    pub fn all_hold_mesh(&self, seq: u64, now: Instant) -> bool {
        let away = self.away.values().any(|s| now.duration_since(*s) < LEASE);
        !away
            && self.streams.values().all(|s| {
                let stuck = s
                    .behind_since
                    .is_some_and(|t| now.duration_since(t) >= LEASE);
                match s.progress.mesh_acked {
                    Some(acked) => acked >= seq || stuck,
                    // An agent may do with the file it was given.
                    None => s.role == NodeRole::Agent || stuck,
                }
            })
    }

    /// Whether every stream has been handed snapshot `seq`.
    pub fn all_handed(&self, seq: u64) -> bool {
        self.handed.least().is_none_or(|handed| handed >= seq)
    }

    /// Nodes whose proxies count, connected or away.
    pub fn nodes(&self) -> BTreeSet<String> {
        let connected = self.proxies().map(|s| s.node.clone());
        connected.chain(self.away.keys().cloned()).collect()
    }

    /// Every stream: node, role, progress.
    pub fn streams(&self) -> impl Iterator<Item = (&str, NodeRole, &Progress)> {
        self.streams
            .values()
            .map(|s| (s.node.as_str(), s.role, &s.progress))
    }

    /// The proxies that are neither away nor stuck; `None`: one is away.
    fn counting(&self, now: Instant) -> Option<impl Iterator<Item = &Stream>> {
        let away = self.away.values().any(|s| now.duration_since(*s) < LEASE);
        let is_stuck = move |stream: &Stream| {
            let behind = stream.behind_since;
            behind.is_some_and(|since| now.duration_since(since) >= LEASE)
        };
        (!away).then(|| self.proxies().filter(move |s| !is_stuck(s)))
    }

    fn proxies(&self) -> impl Iterator<Item = &Stream> {
        self.streams.values().filter(|s| s.role == NodeRole::Proxy)
    }

    fn proxies_of(&self, node: &str) -> impl Iterator<Item = &Stream> {
        self.proxies().filter(move |s| s.node == node)
    }
}

impl Known<'_> {
    /// Whether all of them hold snapshot `seq` and have not rejected `uid`. What a stuck one has rejected
    /// does not count.
    pub fn hold(&self, uid: &str, seq: u64) -> bool {
        self.acked >= seq.max(1) && !self.rejected.contains(uid)
    }
}

impl Counted {
    fn add(&mut self, at: u64) {
        *self.0.entry(at).or_default() += 1;
    }

    fn move_on(&mut self, from: Option<u64>, to: Option<u64>) {
        if from == to {
            return;
        }
        if let Some(from) = from
            && let Some(count) = self.0.get_mut(&from)
        {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&from);
            }
        }
        if let Some(to) = to {
            self.add(to);
        }
    }

    fn least(&self) -> Option<u64> {
        self.0.keys().next().copied()
    }
}
