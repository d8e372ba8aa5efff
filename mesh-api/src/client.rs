//! The controller's client: how a node's process gets its certificate and stays connected.
//!
//! One task per process. It makes a key, has it certified for a freshly read token over TLS that
//! authenticates the controller only, and then holds one mutually authenticated HTTP/2 connection.
//! The certificate is renewed at half its life with a token read anew; a renewal opens a new
//! connection before the old one is let go. Everything is retried for ever.
//!
//! Invariants:
//! - the token is sent only over a connection whose server proved the controller's name;
//! - a [`Channel`] that was handed out belongs to exactly one connection: when that has ended, its
//!   calls fail and [`Controller::channel`] waits for the next one;
//! - the node's key is on no disk but `credentials_dir`, which must be a tmpfs.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::identity::NodeRole;

pub mod backoff;
mod connect;
pub mod credentials;
pub mod delta;
mod session;

pub use connect::ClientError;

/// Largest message taken from the controller: a first table of some 500,000 workloads.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Where the controller is and what this process proves itself with.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `host:port` of the controller's gRPC service.
    pub address: String,
    /// PEM file with the roots for first contact.
    pub trust_bundle: PathBuf,
    /// File with the token, read anew at each use.
    pub token_file: PathBuf,
    /// This node's name.
    pub node: String,
    /// Which process of the node this is.
    pub role: NodeRole,
    /// A directory on a tmpfs where key and certificate are kept, so that a restarted process needs
    /// no new ones while they are valid. `None`: in memory only.
    pub credentials_dir: Option<PathBuf>,
}

/// A handle on the connection to the controller. The connection is closed with the last handle.
#[derive(Clone)]
pub struct Controller {
    shared: Arc<Shared>,
    _task: Arc<Task>,
}

impl Controller {
    /// Starts the task that keeps the connection. Needs a tokio runtime.
    pub fn start(config: ClientConfig) -> Controller {
        let shared = Arc::new(Shared {
            config,
            bundle: ArcSwapOption::empty(),
            link: watch::Sender::new(None),
            connected: watch::Sender::new(false),
            refused: Notify::new(),
        });
        let task = tokio::spawn(session::run(shared.clone()));
        Controller {
            shared,
            _task: Arc::new(Task(task)),
        }
    }

    /// The channel of the present connection; waits while there is none.
    pub async fn channel(&self) -> Channel {
        self.link().await.channel
    }

    /// Whether there is a connection.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.shared.connected.subscribe()
    }

    /// Replaces the roots the controller is verified against, from the next connection on. DER. A
    /// bundle with a malformed certificate or without any is refused with a log line.
    pub fn set_trust_bundle(&self, der: Vec<Vec<u8>>) {
        self.shared.set_bundle(der);
    }

    /// The present connection; waits while there is none.
    pub(crate) async fn link(&self) -> Link {
        let mut links = self.shared.link.subscribe();
        loop {
            if let Some(link) = links.borrow_and_update().clone() {
                return link;
            }
            // Cannot fail: `self.shared` owns the sender.
            let _ = links.changed().await;
        }
    }

    /// Present and future connections.
    pub(crate) fn links(&self) -> watch::Receiver<Option<Link>> {
        self.shared.link.subscribe()
    }

    /// The controller did not accept the certificate of the present connection: get a new one.
    pub(crate) fn certificate_refused(&self) {
        self.shared.refused.notify_one();
    }
}

/// One connection.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) channel: Channel,
    /// Counts the connections of this process.
    pub(crate) generation: u64,
}

struct Shared {
    config: ClientConfig,
    /// Roots learnt from the controller, DER. Before that the file's are used.
    bundle: ArcSwapOption<Vec<Vec<u8>>>,
    link: watch::Sender<Option<Link>>,
    connected: watch::Sender<bool>,
    refused: Notify,
}

impl Shared {
    fn publish(&self, link: Option<Link>) {
        self.connected.send_if_modified(|connected| {
            let changed = *connected != link.is_some();
            *connected = link.is_some();
            changed
        });
        self.link.send_replace(link);
    }

    fn set_bundle(&self, der: Vec<Vec<u8>>) {
        match crate::tls::roots(der.iter().map(Vec::as_slice)) {
            Ok(_) => self.bundle.store(Some(Arc::new(der))),
            Err(e) => {
                tracing::error!(error = %e, "trust bundle from the controller refused, keeping the last good one");
            }
        }
    }
}

/// Ends the task with the last handle.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
