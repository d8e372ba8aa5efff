//! The live connections of the process, for the admin socket.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use slab::Slab;

/// One live connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// Pod of this node it belongs to.
    pub pod: Arc<str>,
    /// The caller's address.
    pub source: SocketAddr,
    /// Where the caller wanted to go.
    pub destination: SocketAddr,
    /// When it was accepted.
    pub since: Instant,
}

/// A row of the dump.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    direction: &'static str,
    pod: String,
    source: SocketAddr,
    destination: SocketAddr,
    age_ms: u128,
}

/// All live connections. Locked once when a connection starts and once when it ends.
#[derive(Debug, Default)]
pub struct Connections {
    live: Mutex<Slab<Connection>>,
}

/// Lists a connection until dropped.
#[derive(Debug)]
pub struct Listed {
    connections: Arc<Connections>,
    key: usize,
}

impl Connections {
    /// Lists a connection.
    pub fn list(self: &Arc<Self>, connection: Connection) -> Listed {
        let key = self.live.lock().insert(connection);
        Listed {
            connections: Arc::clone(self),
            key,
        }
    }

    /// How many are live.
    pub fn len(&self) -> usize {
        self.live.lock().len()
    }

    /// Whether none is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of all.
    pub fn rows(&self) -> Vec<Row> {
        let now = Instant::now();
        let live: Vec<Connection> = self.live.lock().iter().map(|(_, c)| c.clone()).collect();
        live.into_iter()
            .map(
                |Connection {
                     direction,
                     pod,
                     source,
                     destination,
                     since,
                 }| Row {
                    direction,
                    pod: pod.to_string(),
                    source,
                    destination,
                    age_ms: now
                        .checked_duration_since(since)
                        .unwrap_or(Duration::ZERO)
                        .as_millis(),
                },
            )
            .collect()
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut live = self.connections.live.lock();
        live.remove(self.key);
        if live.is_empty() {
            // A burst should not be paid for ever.
            live.shrink_to_fit();
        }
    }
}
