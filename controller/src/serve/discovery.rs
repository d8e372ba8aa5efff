//! Discovery streams: one task per stream joins a [`Session`] to the transport.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use mesh_api::identity::{NodeIdentity, NodeRole};
use mesh_api::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use mesh_api::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::peer::node_of;
use super::session::{Answer, Session, Violation};
use crate::hub::{Hub, StreamGuard};
use crate::metrics::{Nack, Type};

/// Serves discovery streams.
pub(super) struct DiscoveryService {
    pub(super) hub: Arc<Hub>,
    /// Turns true when the controller stops.
    pub(super) stop: watch::Receiver<bool>,
    /// Who may be sent first tables.
    pub(super) turns: Arc<Semaphore>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for DiscoveryService {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let node = node_of(&request, None)?;
        let (outbound, responses) = mpsc::channel(BUFFER);
        let guard = self.hub.open_stream(&node.node, node.role);
        let stream = Stream {
            hub: self.hub.clone(),
            session: Session::new(&node.node, node.role),
            node,
            guard,
            outbound,
            stop: self.stop.clone(),
            turn: Turn::new(self.turns.clone()),
        };
        // Ends with its transport: reading fails then. Its guard goes with it.
        tokio::spawn(stream.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

struct Stream {
    hub: Arc<Hub>,
    session: Session,
    node: Arc<NodeIdentity>,
    guard: StreamGuard,
    outbound: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    stop: watch::Receiver<bool>,
    turn: Turn,
}

/// A stream's turn to be sent its first tables. When a thousand nodes come at once, those served first have
/// it early, and what is under way to the others does not fill the memory.
struct Turn {
    turns: Arc<Semaphore>,
    /// Kept while the stream waits, as its place in the queue.
    waiting: Option<BoxFuture<'static, Result<OwnedSemaphorePermit, AcquireError>>>,
    held: Option<OwnedSemaphorePermit>,
    /// A client that reads slowly must not keep the others waiting: from then on it goes on beside them.
    ends: Option<Instant>,
}

impl Turn {
    fn new(turns: Arc<Semaphore>) -> Self {
        Self {
            turns,
            waiting: None,
            held: None,
            ends: None,
        }
    }

    /// Whether first tables may be sent now; `has_one`: there is one to send.
    fn may_send(&mut self, has_one: bool) -> bool {
        if !has_one {
            (self.waiting, self.held, self.ends) = (None, None, None);
        } else if self.ends.is_none() && self.waiting.is_none() {
            self.waiting = Some(Box::pin(self.turns.clone().acquire_owned()));
        }
        self.waiting.is_none()
    }

    /// Waits until it begins or ends. Cancel safe.
    async fn changes(&mut self) {
        if let Some(waiting) = &mut self.waiting {
            // The semaphore is never closed.
            self.held = waiting.await.ok();
            self.waiting = None;
            self.ends = Some(Instant::now() + TURN);
            return;
        }
        match self.ends.filter(|_| self.held.is_some()) {
            Some(end) => {
                tokio::time::sleep_until(end).await;
                self.held = None;
            }
            None => std::future::pending().await,
        }
    }
}

impl Stream {
    async fn run(mut self, inbound: Streaming<DeltaDiscoveryRequest>) {
        let NodeIdentity { node, role, .. } = &*self.node.clone();
        tracing::info!(node, %role, "discovery stream opened");
        match self.exchange(inbound).await {
            Ok(()) => tracing::info!(node, %role, "discovery stream closed"),
            Err(status) => {
                let reason = status.message();
                tracing::info!(node, %role, reason, "discovery stream ended");
                // A client that is gone does not hear it.
                let _ = self.outbound.try_send(Err(status));
            }
        }
    }

    async fn exchange(
        &mut self,
        mut inbound: Streaming<DeltaDiscoveryRequest>,
    ) -> Result<(), Status> {
        let (mut snapshots, mut stop) = (self.hub.snapshots(), self.stop.clone());
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let may_send = self.turn.may_send(self.session.has_first_tables_to_send());
            self.session.hold_back(!may_send);
            self.send(&snapshot)?;
            self.guard.progress(self.session.progress());
            tokio::select! {
                // The hub lives as long as `self`.
                _ = snapshots.changed() => {}
                () = self.turn.changes() => {}
                () = stopped(&mut stop) => {
                    return Err(Status::unavailable("the controller is stopping"));
                }
                request = inbound.message() => match request? {
                    None => return Ok(()),
                    Some(request) => self.take(request)?,
                },
                () = self.outbound.closed() => return Ok(()),
            }
        }
    }

    fn send(&mut self, snapshot: &Arc<crate::resources::Snapshot>) -> Result<(), Status> {
        for (kind, response) in self.session.responses(snapshot) {
            let metrics = self.hub.metrics();
            let label = Type {
                r#type: kind.name(),
            };
            metrics.pushes.get_or_create_owned(&label).inc();
            let count = response.resources.len() + response.removed_resources.len();
            metrics
                .pushed_resources
                .get_or_create_owned(&label)
                .inc_by(count as u64);
            tracing::debug!(
                node = self.node.node, role = %self.node.role, r#type = kind.name(),
                resources = response.resources.len(), removed = response.removed_resources.len(),
                nonce = response.nonce, "push"
            );
            // One response a type is in flight, so the buffer cannot be full unless the client
            // answers what it has not read.
            self.outbound.try_send(Ok(response)).map_err(|_| {
                Status::resource_exhausted("responses are answered before they are read")
            })?;
        }
        Ok(())
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let claimed = request
            .node
            .as_ref()
            .map(|n| n.id.as_str())
            .unwrap_or_default();
        if !claimed.is_empty() && claimed != self.node.node {
            return Err(Status::permission_denied(format!(
                "the certificate is that of node {}, not of {claimed}",
                self.node.node
            )));
        }
        let answer = self
            .session
            .request(request)
            .map_err(|violation| match violation {
                Violation::Role { .. } => Status::permission_denied(violation.to_string()),
                Violation::TooManyNames => Status::resource_exhausted(violation.to_string()),
            })?;
        let metrics = self.hub.metrics();
        match answer {
            None => {}
            Some(Answer::Ack(kind)) => {
                metrics
                    .acks
                    .get_or_create_owned(&Type {
                        r#type: kind.name(),
                    })
                    .inc();
            }
            Some(Answer::Nack {
                kind,
                message,
                names,
            }) => {
                let label = Nack {
                    r#type: kind.name(),
                    node: self.node.node.clone(),
                };
                metrics.nacks.get_or_create_owned(&label).inc();
                let role: NodeRole = self.node.role;
                tracing::warn!(
                    node = self.node.node, %role, r#type = kind.name(), ?names,
                    "node rejected resources: {message}"
                );
            }
        }
        Ok(())
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the controller was dropped.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Streams that are sent first tables at the same time.
pub(super) const TURNS: usize = 16;
/// How long the others wait for one of them.
const TURN: Duration = Duration::from_secs(10);
/// One response per type may be in flight.
const BUFFER: usize = 8;
