//! The agent's side of the controller: registering pods, reporting, and what the controller says about
//! this node's pods.
//!
//! [`Control`] is a seam: the tests of the agent run without a controller.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use mesh_api::client::{Controller, delta};
use mesh_api::proto::Resource;
use mesh_api::proto::control::enrolment_client::EnrolmentClient;
use mesh_api::proto::control::{NodeReport, RegisterPodRequest};
use mesh_api::proto::mesh::{MeshConfig, NodePod};
use mesh_api::seqpacket::MAX_BYTES;
use prost::Message;
use tokio::sync::watch;
use tonic::Code;

use super::node::Node;

/// What the agent asks of the controller.
pub trait Control: Send + Sync + 'static {
    /// Tells the controller the addresses of a pod and asks what the pod is to be.
    fn register(
        &self,
        request: RegisterPodRequest,
    ) -> BoxFuture<'_, Result<NodePod, RegisterError>>;

    /// Sends the state of the node. Done when all connected nodes have been told what follows from it.
    fn report(&self, report: NodeReport) -> BoxFuture<'_, Result<(), String>>;

    /// Whether the controller can be asked now.
    fn connected(&self) -> watch::Receiver<bool>;
}

/// Why a pod is not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The controller cannot be reached.
    #[error("the controller is away: {0}")]
    Away(String),
    /// It knows no such pod on this node, or not yet.
    #[error("the controller knows no such pod on this node: {0}")]
    NotFound(String),
    /// It refuses.
    #[error("the controller refused: {0}")]
    Refused(String),
}

impl Control for Controller {
    fn register(
        &self,
        request: RegisterPodRequest,
    ) -> BoxFuture<'_, Result<NodePod, RegisterError>> {
        Box::pin(async move {
            let mut client = client(self).await.map_err(RegisterError::Away)?;
            let answer = client.register_pod(timed(request)).await;
            let answer = answer.map_err(|status| {
                let text = format!("{}: {}", status.code(), status.message());
                match status.code() {
                    Code::NotFound => RegisterError::NotFound(text),
                    Code::Unavailable
                    | Code::DeadlineExceeded
                    | Code::Cancelled
                    | Code::Unknown => RegisterError::Away(text),
                    _ => RegisterError::Refused(text),
                }
            })?;
            let pod = answer.into_inner().pod;
            let pod =
                pod.ok_or_else(|| RegisterError::Refused("its answer holds no pod".into()))?;
            fits(pod.encoded_len()).map_err(RegisterError::Refused)?;
            Ok(pod)
        })
    }

    fn report(&self, report: NodeReport) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            let mut client = client(self).await?;
            match client.report(timed(report)).await {
                Ok(_) => Ok(()),
                Err(status) => Err(format!("{}: {}", status.code(), status.message())),
            }
        })
    }

    fn connected(&self) -> watch::Receiver<bool> {
        Controller::connected(self)
    }
}

/// Follows what the controller says about this node's pods, for ever.
pub async fn follow(controller: Controller, node: Arc<Node>) {
    let all = || ["*".to_owned()].into();
    let subscriptions =
        delta::Subscriptions::from([(NodePod::TYPE_URL, all()), (MeshConfig::TYPE_URL, all())]);
    // Dropped with this future: the stream ends with it.
    let (_keep, subscriptions) = watch::channel(subscriptions);
    let sink = Sink {
        controller: controller.clone(),
        node,
        versions: HashMap::new(),
    };
    delta::run(controller, subscriptions, sink).await;
}

struct Sink {
    controller: Controller,
    node: Arc<Node>,
    /// By type: names and versions that were taken.
    versions: HashMap<String, HashMap<String, String>>,
}

impl delta::Sink for Sink {
    fn known(&self, type_url: &str) -> HashMap<String, String> {
        self.versions.get(type_url).cloned().unwrap_or_default()
    }

    fn apply(
        &mut self,
        type_url: &str,
        upserts: Vec<delta::Update>,
        removed: Vec<String>,
    ) -> Result<(), String> {
        let mut errors = Vec::new();
        let versions = self.versions.entry(type_url.to_owned()).or_default();
        for delta::Update {
            name,
            version,
            value,
            aliases: _,
        } in upserts
        {
            let taken = match type_url {
                NodePod::TYPE_URL => {
                    if let Err(error) = fits(value.len()) {
                        errors.push(format!("{name}: {error}"));
                        continue;
                    }
                    NodePod::decode(value).map(|pod| self.node.pod_changed(pod))
                }
                MeshConfig::TYPE_URL => MeshConfig::decode(value).map(|config| {
                    self.controller.set_trust_bundle(
                        config.trust_bundle.iter().map(|der| der.to_vec()).collect(),
                    )
                }),
                _ => continue,
            };
            match taken {
                Ok(()) => {
                    versions.insert(name, version);
                }
                Err(error) => errors.push(format!("{name}: {error}")),
            }
        }
        // What a pod was that the controller no longer speaks of stays until the runtime deletes it.
        for name in removed {
            versions.remove(&name);
            if type_url == NodePod::TYPE_URL {
                self.node.pod_removed(&name);
            }
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors.join("; "))
        }
    }
}

/// A pod travels to the node proxies in one packet. One that does not fit must not end their connections, on which
/// all other pods depend: what was said of it before stays.
fn fits(length: usize) -> Result<(), String> {
    match length {
        0..=LONGEST_POD => Ok(()),
        _ => Err(format!(
            "the pod's record has {length} bytes, and a packet room for {LONGEST_POD}: are its annotations too long?"
        )),
    }
}

async fn client(
    controller: &Controller,
) -> Result<EnrolmentClient<tonic::transport::Channel>, String> {
    if !*Controller::connected(controller).borrow() {
        return Err("no connection".into());
    }
    let channel = tokio::time::timeout(CALL_TIMEOUT, controller.channel()).await;
    channel
        .map(EnrolmentClient::new)
        .map_err(|_| "no connection".into())
}

fn timed<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// What is left of a packet beside the other fields of AddPod.
const LONGEST_POD: usize = MAX_BYTES - 1024;
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
