//! `warren uninstall`: every pod out of the mesh first, each node after that, the objects last.
//!
//! The label `warren-mesh.io/mesh: disabled` on Warren's own namespace turns the whole mesh off: the controller tells every
//! other node before a pod leaves, so that no caller is refused on the way. Nothing here depends on the controller being
//! there; without it the nodes' agents are told one by one, and what is captured is cut at the deadline.

use std::process::ExitCode;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource};
use mesh_api::names::{MESH_LABEL, SYSTEM_NAMESPACE};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::Instant;

use super::agents::{self, Agent};
use super::{PART_OF, connect};
use crate::args::{Uninstall, UninstallStep};
use crate::error::{Context, Error, Result};

/// Does what the options say.
pub(crate) async fn run(options: Uninstall) -> Result<ExitCode> {
    let client = connect(&options.cluster).await?;
    let deadline = Duration::from_secs(options.deadline);
    match options.step {
        Some(UninstallStep::Nodes) => nodes(&client, deadline).await?,
        Some(UninstallStep::Leftovers) => leftovers(&client).await?,
        None => {
            not_helms(&client).await?;
            nodes(&client, deadline).await?;
            objects(&client).await?;
            leftovers(&client).await?;
            println!(
                "Warren is removed. The Secret with the mesh's root stays; it goes with `kubectl delete namespace {SYSTEM_NAMESPACE}`."
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Every pod out of the mesh, the plugin out of every node's chain.
async fn nodes(client: &Client, deadline: Duration) -> Result<()> {
    let end = Instant::now() + deadline;
    switch(client, Some("disabled")).await?;
    let (agents, without) = agents::find(client).await?;
    for node in &without {
        eprintln!(
            "warren: node {node}: no agent runs there; what it put there, if any, stays until the node's boot"
        );
    }
    let failures: Vec<String> = stream::iter(&agents)
        .map(|agent| async move { leave(agent, end).await.err() })
        .buffer_unordered(AT_ONCE)
        .filter_map(|failure| async move { failure.map(|failure| failure.to_string()) })
        .collect()
        .await;
    match failures.is_empty() {
        true => Ok(()),
        false => Err(Error::new(format!(
            "{}\nNothing was removed. Run it again, or see docs/operations.md#a-node-cannot-be-cleaned",
            failures.join("\n")
        ))),
    }
}

/// One node: waits until the controller has taken its pods out, then has the agent leave.
async fn leave(agent: &Agent, end: Instant) -> Result<()> {
    loop {
        let status = agent.status().await?;
        let captured = status.pods.captured();
        if captured == 0 {
            break;
        }
        if !status.controller_connected || Instant::now() >= end {
            eprintln!(
                "warren: node {}: {captured} pods are still captured; their captured connections are cut",
                agent.node
            );
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    let left = agent.uninstall(LAST).await;
    // It complains of connections that it cut; what counts is that nothing is captured any more.
    match agent.status().await?.pods.captured() {
        0 => {
            println!("node {}: has left the mesh", agent.node);
            Ok(())
        }
        captured => Err(left.err().unwrap_or_else(|| {
            Error::new(format!(
                "node {}: {captured} pods are still captured",
                agent.node
            ))
        })),
    }
}

/// What the controller made, and the switch.
async fn leftovers(client: &Client) -> Result<()> {
    delete::<ConfigMap>(client, "warren-trust-bundle").await?;
    delete::<Lease>(client, "warren-controller").await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    delete_labelled(&leases, "warren-mesh.io/replica=true").await?;
    let nodes: Api<Node> = Api::all(client.clone());
    for node in nodes.list(&ListParams::default()).await.context("nodes")? {
        let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let others: Vec<_> = (taints.iter()).filter(|taint| taint.key != TAINT).collect();
        let Some(name) = node.metadata.name else {
            continue;
        };
        if others.len() < taints.len() {
            // The version: a taint that somebody else sets meanwhile must not be lost.
            let version = node.metadata.resource_version;
            let patch =
                json!({"metadata": {"resourceVersion": version}, "spec": {"taints": others}});
            let patched = nodes
                .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
                .await;
            patched.context(format!("the taint of node {name}"))?;
        }
    }
    switch(client, None).await
}

/// Sets or removes the label that turns the mesh off.
async fn switch(client: &Client, value: Option<&str>) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let patch = json!({"metadata": {"labels": {MESH_LABEL: value}}});
    match namespaces
        .patch(
            SYSTEM_NAMESPACE,
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
    {
        Err(error) if value.is_none() && is_missing(&error) => Ok(()),
        patched => patched.map(drop).context(format!(
            "the label {MESH_LABEL} of namespace {SYSTEM_NAMESPACE}"
        )),
    }
}

/// A release of Helm is Helm's to remove: it would keep its record of it otherwise.
async fn not_helms(client: &Client) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let found = deployments
        .get_opt("warren-controller")
        .await
        .context("the controller")?;
    let annotations = found
        .and_then(|deployment| deployment.metadata.annotations)
        .unwrap_or_default();
    match annotations.get("meta.helm.sh/release-name") {
        Some(release) => Err(Error::new(format!(
            "it was installed by Helm: helm uninstall {release} --namespace {SYSTEM_NAMESPACE}"
        ))),
        None => Ok(()),
    }
}

/// Everything that `warren install` prints, but the namespace and the CRDs.
async fn objects(client: &Client) -> Result<()> {
    delete_ours(&Api::<Deployment>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await?;
    delete_ours(&Api::<DaemonSet>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await?;
    delete_ours(&Api::<PodDisruptionBudget>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await?;
    delete_ours(&Api::<Service>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await?;
    delete_ours(&Api::<ConfigMap>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await?;
    delete_ours(&Api::<RoleBinding>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await?;
    delete_ours(&Api::<Role>::namespaced(client.clone(), SYSTEM_NAMESPACE)).await?;
    delete_ours(&Api::<ClusterRoleBinding>::all(client.clone())).await?;
    delete_ours(&Api::<ClusterRole>::all(client.clone())).await?;
    delete_ours(&Api::<ValidatingAdmissionPolicyBinding>::all(
        client.clone(),
    ))
    .await?;
    delete_ours(&Api::<ValidatingAdmissionPolicy>::all(client.clone())).await?;
    delete_ours(&Api::<ServiceAccount>::namespaced(
        client.clone(),
        SYSTEM_NAMESPACE,
    ))
    .await
}

async fn delete_ours<K>(api: &Api<K>) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    delete_labelled(api, PART_OF).await
}

async fn delete_labelled<K>(api: &Api<K>, label: &str) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let kind = K::kind(&());
    let labelled = ListParams::default().labels(label);
    // One by one: `deletecollection` does not exist for Services everywhere.
    for object in api.list(&labelled).await.context(&kind)? {
        let Some(name) = &object.meta().name else {
            continue;
        };
        match api.delete(name, &DeleteParams::default()).await {
            Err(error) if !is_missing(&error) => {
                return Err(error).context(format!("{kind} {name}"));
            }
            _ => println!("{kind} {name} deleted"),
        }
    }
    Ok(())
}

async fn delete<K>(client: &Client, name: &str) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    match api.delete(name, &DeleteParams::default()).await {
        Err(error) if !is_missing(&error) => Err(error).context(format!("{} {name}", K::kind(&()))),
        _ => Ok(()),
    }
}

fn is_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Taint of nodes without a ready agent.
const TAINT: &str = "warren-mesh.io/not-ready";
/// Nodes that are worked on at once.
const AT_ONCE: usize = 16;
const POLL: Duration = Duration::from_secs(1);
/// What connections get that are still captured when their time is over.
const LAST: Duration = Duration::from_secs(5);
