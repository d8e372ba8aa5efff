//! Serves the CNI plugin: one request a connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::proto::cni::{Check, Del, Gc, Request, Response, Status, Uninstall, request::Body};
use mesh_api::seqpacket::{Connection, Listener};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::node::Node;
use crate::plugin::{CniError, Code};

/// Accepts plugins for ever. `uninstall`: where a request to leave the mesh goes.
pub(super) async fn listen(
    socket: &Path,
    node: Arc<Node>,
    uninstall: mpsc::Sender<()>,
) -> io::Result<()> {
    let listener = Listener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => {
                // Out of descriptors, most likely, which passes; whoever asks waits in the queue.
                tracing::error!(%error, "CNI: a request cannot be accepted");
                tokio::time::sleep(super::RETRY).await;
                continue;
            }
        };
        // Never closed. Who finds no slot waits in the socket's queue.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return Ok(());
        };
        let node = Arc::clone(&node);
        let uninstall = uninstall.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(&connection, &node, &uninstall).await {
                tracing::warn!(%error, "CNI: a request was not answered");
            }
            drop(slot);
        });
    }
}

async fn serve(
    connection: &Connection,
    node: &Node,
    uninstall: &mpsc::Sender<()>,
) -> io::Result<()> {
    let peer = connection.peer()?;
    if peer.uid != 0 {
        return Err(io::Error::other(format!(
            "process {} of user {} is not a container runtime",
            peer.pid, peer.uid
        )));
    }
    let received = tokio::time::timeout(REQUEST_TIMEOUT, connection.receive::<Request>());
    let Some((request, fds)) = received.await.map_err(|_| io::ErrorKind::TimedOut)?? else {
        return Ok(());
    };
    if let Some(Body::Status(Status {})) = request.body {
        let response = Response {
            report: node.status().to_string(),
            ..Response::default()
        };
        return connection.send(&response, &[]).await;
    }
    let result = handle(node, uninstall, request, fds).await;
    let response = match result {
        // Not the default: that is no byte long, and an empty packet is the end of the connection.
        Ok(()) => Response {
            message: "done".into(),
            ..Response::default()
        },
        Err(error) => {
            tracing::warn!(%error, "CNI: answered with an error");
            let (code, message, details) = error.into_parts();
            Response {
                code,
                message,
                details,
                report: String::new(),
            }
        }
    };
    connection.send(&response, &[]).await
}

async fn handle(
    node: &Node,
    uninstall: &mpsc::Sender<()>,
    request: Request,
    mut fds: Vec<OwnedFd>,
) -> Result<(), CniError> {
    match request.body {
        Some(Body::Add(add)) => {
            let none = || {
                CniError::new(
                    Code::Environment,
                    "ADD without a network namespace",
                    "one is expected",
                )
            };
            let netns = fds.pop().ok_or_else(none)?;
            node.add(add, netns).await
        }
        Some(Body::Del(Del { container_id, uid })) => {
            node.delete(&container_id, &uid);
            Ok(())
        }
        Some(Body::Check(Check { container_id, uid })) => node.check(&container_id, &uid).await,
        Some(Body::Gc(Gc {
            valid_container_ids,
        })) => {
            node.collect(&valid_container_ids);
            Ok(())
        }
        Some(Body::Uninstall(Uninstall { deadline_seconds })) => {
            let deadline = Instant::now() + Duration::from_secs(deadline_seconds);
            // Out of the chain first: a pod that starts now is not asked about. Waits until it is done.
            let _ = uninstall.send(()).await;
            uninstall.closed().await;
            match node.leave(deadline).await {
                true => Ok(()),
                false => Err(CniError::new(
                    Code::TryAgain,
                    "captured connections did not end by the deadline",
                    "they were cut",
                )),
            }
        }
        // Answered by the caller.
        Some(Body::Status(Status {})) => Ok(()),
        None => Err(CniError::new(
            Code::Decode,
            "the agent does not know that request",
            "plugin and agent are of different versions; the agent replaces the plugin when it starts",
        )),
    }
}

/// Requests that are worked on at once.
const CONNECTIONS: usize = 128;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
