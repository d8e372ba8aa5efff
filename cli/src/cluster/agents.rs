//! The agents of a cluster's nodes, asked by running `warren-cni` in their pods.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{AttachParams, ListParams};
use kube::{Api, Client};
use mesh_api::names::SYSTEM_NAMESPACE;
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use crate::error::{Context, Error, Result};

/// One node's agent.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    pods: Api<Pod>,
    pod: String,
    pub(super) node: String,
}

/// What `warren-cni status` prints, as far as it is needed here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Status {
    pub(super) controller_connected: bool,
    pub(super) pods: Pods,
}

/// How many of a node's pods are how far.
#[derive(Debug, Deserialize)]
pub(super) struct Pods {
    pub(super) enrolled: usize,
    pub(super) leaving: usize,
}

impl Pods {
    /// Those that are in the mesh, or on their way out of it.
    pub(super) fn captured(&self) -> usize {
        self.enrolled + self.leaving
    }
}

/// The agents that run, and the nodes where none does.
pub(super) async fn find(client: &Client) -> Result<(Vec<Agent>, Vec<String>)> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let labelled = ListParams::default().labels("app.kubernetes.io/name=warren-cni");
    let found = pods.list(&labelled).await.context("the agents' pods")?;
    let running = |pod: &Pod| {
        let status = pod.status.as_ref()?;
        let containers = status.container_statuses.as_deref()?;
        let runs = containers.iter().any(|container| {
            container
                .state
                .as_ref()
                .is_some_and(|s| s.running.is_some())
        });
        runs.then(|| pod.spec.as_ref()?.node_name.clone())?
    };
    let agents: Vec<Agent> = (found.iter())
        .filter_map(|pod| {
            Some(Agent {
                pods: pods.clone(),
                pod: pod.metadata.name.clone()?,
                node: running(pod)?,
            })
        })
        .collect();
    let nodes: Api<Node> = Api::all(client.clone());
    let nodes = nodes.list(&ListParams::default()).await.context("nodes")?;
    let without = (nodes.into_iter())
        .filter_map(|node| node.metadata.name)
        .filter(|node| agents.iter().all(|agent| agent.node != *node))
        .collect();
    Ok((agents, without))
}

impl Agent {
    /// How it is, as far as it is needed here.
    pub(super) async fn status(&self) -> Result<Status> {
        let report = self.report().await?;
        serde_json::from_value(report).context(format!("node {}: its agent's status", self.node))
    }

    /// All that it says of itself.
    pub(super) async fn report(&self) -> Result<serde_json::Value> {
        let command = ["warren-cni", "status", "--alive", "--config", CONFIG];
        let text = self.exec(&command, STATUS_PATIENCE).await?;
        serde_json::from_str(&text).context(format!("node {}: its agent's status", self.node))
    }

    /// Takes its pods out of the mesh and the plugin out of the chain.
    pub(super) async fn uninstall(&self, deadline: Duration) -> Result<()> {
        let seconds = deadline.as_secs().to_string();
        let command = [
            "warren-cni",
            "uninstall",
            "--config",
            CONFIG,
            "--deadline",
            &seconds,
        ];
        self.exec(&command, deadline + STATUS_PATIENCE).await?;
        Ok(())
    }

    /// What a command printed. An error holds what it said.
    async fn exec(&self, command: &[&str], patience: Duration) -> Result<String> {
        let at = format!("node {}: `{}`", self.node, command[..2].join(" "));
        let ran = tokio::time::timeout(patience, self.exec_unbounded(command)).await;
        ran.map_err(|_| Error::new(format!("{at} did not answer in {} s", patience.as_secs())))?
            .context(at)
    }

    async fn exec_unbounded(&self, command: &[&str]) -> Result<String> {
        let attach = AttachParams::default().container("agent").stdin(false);
        let running = self
            .pods
            .exec(&self.pod, command.iter().copied(), &attach)
            .await;
        let mut process = running.context("it cannot be run")?;
        let (mut out, mut said) = (String::new(), String::new());
        let (mut stdout, mut stderr) = (process.stdout(), process.stderr());
        let read_out = async {
            match &mut stdout {
                Some(stdout) => stdout.read_to_string(&mut out).await,
                None => Ok(0),
            }
        };
        let read_said = async {
            match &mut stderr {
                Some(stderr) => stderr.read_to_string(&mut said).await,
                None => Ok(0),
            }
        };
        tokio::try_join!(read_out, read_said).context("its output")?;
        let ended = match process.take_status() {
            Some(status) => status.await,
            None => None,
        };
        match ended {
            Some(status) if status.status.as_deref() == Some("Success") => Ok(out),
            Some(status) => {
                let message = status.message.unwrap_or_default();
                Err(Error::new(format!("{message}: {}", said.trim())))
            }
            None => Err(Error::new("the connection was lost")),
        }
    }
}

/// The agent's configuration in its container.
const CONFIG: &str = "/etc/warren/agent.yaml";
const STATUS_PATIENCE: Duration = Duration::from_secs(20);
