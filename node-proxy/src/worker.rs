//! The threads that carry traffic.
//!
//! Each worker is a thread with a single-threaded runtime of its own and owns the connections it accepts:
//! tasks that wake each other stay on one core, and what many callers write reaches a tunnel before its
//! one task runs, so that many requests share a record and a system call. A pod's listeners belong to one
//! worker; connections to the node's tunnel listener are dealt out in turn.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use mesh_api::identity::Identity;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::accept::{self, Capture};
use crate::connections::{Connection, Connections, Listed, Row};
use crate::http::apps::Apps;
use crate::identity::Identities;
use crate::memory;
use crate::pods::{Host, Pod, Pods};
use crate::process::descriptor_limit;
use crate::slices;
use crate::table::Table;
use crate::telemetry::Telemetry;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::budgets::Budgets;
use crate::telemetry::http::MeterCache;
use crate::tunnel::admission::Handshakes;
use crate::tunnel::pool::Pool;
use crate::tunnel::tls::ServerConfigs;
use crate::turns::Turns;

/// Sockets that are served before tunnels send what came from them. More per record and system call cost less,
/// but then the two nodes wait for each other: each works through a batch while the other has none (docs/performance.md,
/// "HTTP").
const EVENTS: usize = 16;

/// What every connection may look at.
pub struct Context {
    /// Name of this node.
    pub node: Arc<str>,
    /// The mesh.
    pub table: Arc<Table>,
    /// Keys and certificates of this node's workloads.
    pub identities: Arc<Identities>,
    /// The enrolled pods of this node.
    pub pods: Arc<Pods>,
    /// The node itself.
    pub host: Arc<Host>,
    /// Metrics.
    pub telemetry: Arc<Telemetry>,
    /// Where connections are logged.
    pub access_log: AccessLog,
    /// TLS configurations of the tunnel's server side.
    pub server_configs: ServerConfigs,
    /// Live connections.
    pub connections: Arc<Connections>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// One thread's share.
#[derive(Debug)]
pub struct Worker {
    /// Shared by all workers.
    pub context: Arc<Context>,
    /// Tunnels dialled by this worker.
    pub pool: Arc<Pool>,
    /// Connections of this worker to apps that speak HTTP.
    pub apps: Apps,
    /// Meters of requests to apps of this node.
    pub meters: Mutex<MeterCache>,
    /// Of callers with tunnels to this worker.
    turns: Mutex<HashMap<Identity, Weak<Turns>>>,
    /// Tunnels that are being accepted by any worker.
    pub handshakes: Arc<Handshakes>,
    handle: Handle,
    tasks: TaskTracker,
    sources: TaskTracker,
    draining: watch::Receiver<bool>,
}

/// Descriptors of a pod's listeners.
#[derive(Debug)]
pub struct PodListeners {
    /// 15001
    pub outbound: OwnedFd,
    /// 15006
    pub inbound: OwnedFd,
    /// 15008
    pub hbone: OwnedFd,
}

/// All worker threads.
#[derive(Debug)]
pub struct Workers {
    context: Arc<Context>,
    workers: Vec<Arc<Worker>>,
    /// Connections and streams.
    tasks: TaskTracker,
    /// What they come from: listeners that accept, and tunnels.
    sources: TaskTracker,
    draining: watch::Sender<bool>,
    homes: Mutex<HashMap<Arc<str>, Home>>,
    tunnel_listeners: Mutex<CancellationToken>,
    next: AtomicUsize,
    // Worker threads end when this is dropped.
    _stop: Vec<oneshot::Sender<()>>,
}

/// The worker that accepts for a pod.
#[derive(Debug)]
struct Home {
    worker: usize,
    stop: CancellationToken,
}

impl Worker {
    /// Runs a connection on this worker; counted until it ends.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(connection, &self.handle);
    }

    /// The turns of a caller, in all its tunnels.
    pub fn turns_of(&self, caller: &Identity) -> Arc<Turns> {
        let mut all = self.turns.lock();
        if let Some(turns) = all.get(caller).and_then(Weak::upgrade) {
            return turns;
        }
        // As often as somebody new comes, those are forgotten who have gone.
        all.retain(|_, turns| turns.strong_count() > 0);
        let turns = Arc::default();
        all.insert(caller.clone(), Arc::downgrade(&turns));
        turns
    }

    /// Runs a tunnel: a drain waits until its peer knows that it takes no more streams.
    pub fn spawn_tunnel(&self, tunnel: impl Future<Output = ()> + Send + 'static) {
        self.sources.spawn_on(tunnel, &self.handle);
    }

    /// To be held while connections are accepted.
    pub fn accepting(&self) -> TaskTrackerToken {
        self.sources.token()
    }

    /// Runs something that a drain does not wait for.
    pub fn spawn_untracked(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }

    /// Whether the process is being replaced or ended.
    pub fn draining(&self) -> watch::Receiver<bool> {
        self.draining.clone()
    }

    /// Puts a connection on the list of live ones.
    pub fn list(
        &self,
        direction: &'static str,
        pod: &Pod,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Listed {
        self.context.connections.list(Connection {
            direction,
            pod: Arc::clone(pod.account.pod()),
            source,
            destination,
            since: std::time::Instant::now(),
        })
    }
}

impl Workers {
    /// Starts `count` threads.
    pub fn start(count: usize, context: Context) -> io::Result<Arc<Self>> {
        let context = Arc::new(context);
        let budgets = Budgets(Arc::clone(&context.pods));
        context
            .telemetry
            .register(|registry| registry.register_collector(Box::new(budgets)));
        let (tasks, sources) = (TaskTracker::new(), TaskTracker::new());
        let (draining, drain) = watch::channel(false);
        let handshakes = Handshakes::new(descriptor_limit());
        let mut workers = Vec::new();
        let mut stop = Vec::new();
        for number in 0..count.max(1) {
            let (stopped, stopping) = oneshot::channel();
            workers.push(Arc::new(Worker {
                pool: Pool::new(
                    Arc::clone(&context.identities),
                    Arc::clone(&context.telemetry),
                ),
                apps: Apps::default(),
                meters: Mutex::default(),
                turns: Mutex::default(),
                handshakes: Arc::clone(&handshakes),
                context: Arc::clone(&context),
                handle: start_thread(number, stopping)?,
                tasks: tasks.clone(),
                sources: sources.clone(),
                draining: drain.clone(),
            }));
            stop.push(stopped);
            let tasks = tasks.clone();
            workers[number].spawn_untracked(memory::reclaim(move || tasks.len()));
        }
        Ok(Arc::new(Self {
            context,
            workers,
            tasks,
            sources,
            draining,
            homes: Mutex::default(),
            tunnel_listeners: Mutex::default(),
            next: AtomicUsize::new(0),
            _stop: stop,
        }))
    }

    /// Accepts for a pod from now on, on the worker with the fewest pods.
    pub fn add_pod(&self, pod: Arc<Pod>, listeners: PodListeners) {
        let stop = CancellationToken::new();
        let worker = {
            let mut homes = self.homes.lock();
            let load = |w: usize| homes.values().filter(|home| home.worker == w).count();
            let worker = (0..self.workers.len())
                .min_by_key(|w| load(*w))
                .unwrap_or(0);
            let before = homes.insert(
                Arc::clone(&pod.uid),
                Home {
                    worker,
                    stop: stop.clone(),
                },
            );
            if let Some(before) = before {
                before.stop.cancel();
            }
            &self.workers[worker]
        };
        let PodListeners {
            outbound,
            inbound,
            hbone,
        } = listeners;
        for (capture, listener) in [
            (Capture::Outbound(Arc::clone(&pod)), outbound),
            (Capture::Inbound(Arc::clone(&pod)), inbound),
            (Capture::Hbone(pod), hbone),
        ] {
            worker.spawn_untracked(accept::run(
                vec![Arc::clone(worker)],
                capture,
                listener,
                stop.clone(),
            ));
        }
    }

    /// Stops accepting for a pod; its connections live on.
    pub fn remove_pod(&self, uid: &str) {
        if let Some(home) = self.homes.lock().remove(uid) {
            home.stop.cancel();
        }
        let pods = &self.context.pods;
        let local: Vec<_> = pods
            .all()
            .into_iter()
            .filter(|p| *p.uid != *uid)
            .map(|p| p.identity.clone())
            .collect();
        self.context
            .server_configs
            .retain(|identity| local.contains(identity));
    }

    /// Accepts tunnels on these listeners from now on, instead of any before.
    pub fn set_tunnel_listeners(&self, listeners: Vec<OwnedFd>) {
        let stop = CancellationToken::new();
        std::mem::replace(&mut *self.tunnel_listeners.lock(), stop.clone()).cancel();
        for listener in listeners {
            let first = self.next.fetch_add(1, Ordering::Relaxed) % self.workers.len();
            let worker = &self.workers[first];
            worker.spawn_untracked(accept::run(
                self.workers.clone(),
                Capture::Tunnel,
                listener,
                stop.clone(),
            ));
        }
    }

    /// Leaves new connections to a newer process; tells peers to open their next streams there.
    pub fn stop_accepting(&self) {
        self.draining.send_replace(true);
    }

    /// The newer process has died: accepts again.
    pub fn resume_accepting(&self) {
        self.draining.send_replace(false);
    }

    /// Ends when nothing is accepted any more and all connections have ended, or at the deadline.
    pub async fn drain(&self, deadline: Instant) {
        self.sources.close();
        self.tasks.close();
        // In this order: a stream may begin until its tunnel has ended.
        let all = async {
            self.sources.wait().await;
            self.tasks.wait().await;
        };
        let ended = tokio::time::timeout_at(deadline, all).await;
        if ended.is_err() {
            tracing::warn!(
                connections = self.context.connections.len(),
                tunnels = self.sources.len(),
                "drain deadline: ending what is left"
            );
        }
    }

    /// How many connections are live.
    pub fn live(&self) -> usize {
        self.tasks.len()
    }

    /// Live connections, for the admin socket.
    pub fn connections(&self) -> Vec<Row> {
        self.context.connections.rows()
    }
}

fn start_thread(number: usize, stopping: oneshot::Receiver<()>) -> io::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_unpark(slices::look)
        .max_io_events_per_tick(EVENTS)
        .build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            // Ends, too, when the sender is dropped.
            let _ = runtime.block_on(stopping);
            runtime.shutdown_background();
        })?;
    Ok(handle)
}

#[cfg(test)]
mod tests;
