//! The client side of incremental xDS: subscribe, take updates, acknowledge or reject, resume.
//!
//! The protocol is that of the public xDS API ("Incremental xDS"). A stream begins with one request
//! per type that names what is subscribed and the versions that are held, so that nothing known is
//! sent again. Each response is answered by its nonce: accepted, or rejected with the reason, in which
//! case its good resources are in force nevertheless. The server answers the first request of a type for
//! which the client holds nothing even when there is nothing. A response whose
//! `system_version_info` ends with [`MORE`] is not all there is: the next one goes on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::backoff::Backoff;
use super::{Controller, Link, MAX_MESSAGE};
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status,
};

/// Type URL -> names; `*` is the wildcard.
pub type Subscriptions = BTreeMap<&'static str, BTreeSet<String>>;

/// A resource that is new or changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// Its own name.
    pub name: String,
    /// Hash of its content.
    pub version: String,
    /// Other names it was asked for by.
    pub aliases: Vec<String>,
    /// The encoded message, without the `Any` around it.
    pub value: bytes::Bytes,
}

/// Where resources go. Called on the task that runs [`run`]; must not block.
pub trait Sink: Send + 'static {
    /// Names and versions of the resources of a type that are held.
    fn known(&self, type_url: &str) -> HashMap<String, String>;

    /// Takes one response. `Err` is the text of the rejection; whatever was good is in force. A name
    /// in `removed` may be one that was asked for and does not exist.
    fn apply(
        &mut self,
        type_url: &str,
        upserts: Vec<Update>,
        removed: Vec<String>,
    ) -> Result<(), String>;

    /// What was applied last makes the resources of the type complete as of now.
    fn complete(&mut self, type_url: &str) {
        let _ = type_url;
    }

    /// A stream is open; its first requests are sent.
    fn opened(&mut self) {}

    /// The stream has ended.
    fn closed(&mut self) {}
}

/// Keeps a stream open for ever and feeds `sink`. Returns when the sender of `subscriptions` is gone.
pub async fn run(
    controller: Controller,
    mut subscriptions: watch::Receiver<Subscriptions>,
    mut sink: impl Sink,
) {
    let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
    loop {
        let link = tokio::select! {
            link = controller.link() => link,
            () = gone(&mut subscriptions) => return,
        };
        let began = Instant::now();
        let end = stream(&controller, link, &mut subscriptions, &mut sink).await;
        if began.elapsed() > PROVEN {
            backoff.reset();
        }
        match end {
            End::Unsubscribed => return,
            // Nothing is wrong: the node certificate was renewed.
            End::Replaced => continue,
            End::Failed(status) => {
                let delay = backoff.delay();
                tracing::info!(code = %status.code(), reason = status.message(), ?delay, "discovery stream ended, retrying");
                if status.code() == Code::Unauthenticated {
                    controller.certificate_refused();
                }
                tokio::time::sleep(delay).await;
            }
        }
    }
}

enum End {
    Unsubscribed,
    Replaced,
    Failed(tonic::Status),
}

async fn stream(
    controller: &Controller,
    link: Link,
    subscriptions: &mut watch::Receiver<Subscriptions>,
    sink: &mut impl Sink,
) -> End {
    let mut links = controller.links();
    let wanted = subscriptions.borrow_and_update().clone();
    // Room for the first request of every type: the server may answer the call only after them.
    let (requests, outgoing) = mpsc::channel(REQUESTS + wanted.len());
    let mut requests = Requests {
        node: controller.shared.config.node.clone(),
        sent: Subscriptions::new(),
        requests,
    };
    if let Err(status) = requests.subscribe(wanted, sink).await {
        return End::Failed(status);
    }
    let mut client = AggregatedDiscoveryServiceClient::new(link.channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let call = client.delta_aggregated_resources(ReceiverStream::new(outgoing));
    let mut incoming = match tokio::time::timeout(OPEN_TIMEOUT, call).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return End::Failed(status),
        Err(_) => return End::Failed(tonic::Status::deadline_exceeded("no answer in time")),
    };

    let mut sink = Opened::new(sink);
    loop {
        tokio::select! {
            message = incoming.message() => {
                let result = match message {
                    Ok(Some(response)) => requests.answer(sink.take(response)).await,
                    Ok(None) => Err(tonic::Status::unavailable("closed by the controller")),
                    Err(status) => Err(status),
                };
                if let Err(status) = result {
                    return End::Failed(status);
                }
            }
            changed = subscriptions.changed() => {
                if changed.is_err() {
                    return End::Unsubscribed;
                }
                let wanted = subscriptions.borrow_and_update().clone();
                if let Err(status) = requests.subscribe(wanted, sink.0).await {
                    return End::Failed(status);
                }
            }
            () = replaced(&mut links, link.generation) => return End::Replaced,
        }
    }
}

/// The requests of one stream.
struct Requests {
    node: String,
    /// What the server was told.
    sent: Subscriptions,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
}

impl Requests {
    /// Tells the server the difference between what it was told and `wanted`.
    async fn subscribe(
        &mut self,
        wanted: Subscriptions,
        sink: &impl Sink,
    ) -> Result<(), tonic::Status> {
        for (type_url, names) in wanted {
            let first = !self.sent.contains_key(type_url);
            let sent = self.sent.entry(type_url).or_default();
            let subscribe: Vec<String> = names.difference(sent).cloned().collect();
            let unsubscribe: Vec<String> = sent.difference(&names).cloned().collect();
            if subscribe.is_empty() && unsubscribe.is_empty() {
                continue;
            }
            *sent = names;
            let request = DeltaDiscoveryRequest {
                node: Some(Node {
                    id: self.node.clone(),
                }),
                type_url: type_url.into(),
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                initial_resource_versions: if first {
                    sink.known(type_url)
                } else {
                    HashMap::new()
                },
                ..Default::default()
            };
            self.send(request).await?;
        }
        Ok(())
    }

    async fn answer(&mut self, answer: Answer) -> Result<(), tonic::Status> {
        let request = DeltaDiscoveryRequest {
            type_url: answer.type_url,
            response_nonce: answer.nonce,
            error_detail: answer.rejected.map(|message| Status {
                code: Code::InvalidArgument.into(),
                message,
            }),
            ..Default::default()
        };
        self.send(request).await
    }

    async fn send(&mut self, request: DeltaDiscoveryRequest) -> Result<(), tonic::Status> {
        self.requests
            .send(request)
            .await
            .map_err(|_| tonic::Status::unavailable("the stream takes no more requests"))
    }
}

struct Answer {
    type_url: String,
    nonce: String,
    rejected: Option<String>,
}

/// The sink while a stream is open.
struct Opened<'a, S: Sink>(&'a mut S);

impl<'a, S: Sink> Opened<'a, S> {
    fn new(sink: &'a mut S) -> Self {
        sink.opened();
        Self(sink)
    }

    fn take(&mut self, response: DeltaDiscoveryResponse) -> Answer {
        let DeltaDiscoveryResponse {
            resources,
            type_url,
            nonce,
            removed_resources,
            system_version_info,
        } = response;
        let mut missing = Vec::new();
        let mut updates = Vec::with_capacity(resources.len());
        for resource in resources {
            let Resource {
                version,
                resource,
                name,
                aliases,
            } = resource;
            match resource {
                Some(any) if any.type_url == type_url => updates.push(Update {
                    name,
                    version,
                    aliases,
                    value: any.value.into(),
                }),
                Some(any) => missing.push(format!("{name}: is a {}", any.type_url)),
                None => missing.push(format!("{name}: has no content")),
            }
        }
        let applied = self.0.apply(&type_url, updates, removed_resources);
        if !system_version_info.ends_with(MORE) {
            self.0.complete(&type_url);
        }
        let rejected = match (missing.is_empty(), applied) {
            (true, Ok(())) => None,
            (true, Err(e)) => Some(e),
            (false, Ok(())) => Some(missing.join("; ")),
            (false, Err(e)) => Some(format!("{}; {e}", missing.join("; "))),
        };
        Answer {
            type_url,
            nonce,
            rejected,
        }
    }
}

impl<S: Sink> Drop for Opened<'_, S> {
    fn drop(&mut self) {
        self.0.closed();
    }
}

/// Waits until the connection is another one. While there is none the stream itself tells.
async fn replaced(links: &mut watch::Receiver<Option<Link>>, generation: u64) {
    let other = |link: &Option<Link>| link.as_ref().is_some_and(|l| l.generation != generation);
    if links.wait_for(other).await.is_err() {
        std::future::pending().await
    }
}

/// Waits until nobody subscribes any more.
async fn gone(subscriptions: &mut watch::Receiver<Subscriptions>) {
    while subscriptions.changed().await.is_ok() {}
}

/// Last character of `system_version_info` of a response that does not hold everything.
pub const MORE: char = '+';
/// Requests that wait to be sent.
const REQUESTS: usize = 16;
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(15);
const PROVEN: Duration = Duration::from_secs(5);
