//! The taint `warren-mesh.io/not-ready`: no pods for nodes whose agent cannot enrol them.
//!
//! The replica that an agent reports to takes the taint from its node, or sets it again, and marks the node
//! by the annotation `warren-mesh.io/ready`. The leader taints the nodes whose agent reports to nobody: that was
//! never ready, or whose pod has not been for a while; nodes that no agent is to run on are left alone, and those that
//! another replica has marked just now.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use k8s_openapi::jiff::Timestamp;
use kube::api::Patch;
use kube::{Api, Client};
use mesh_api::names::{NOT_READY_TAINT, SYSTEM_NAMESPACE};
use serde_json::json;
use tokio::sync::watch;

use super::as_us;
use crate::hub::Hub;
use crate::providers::{Objects, is_agent};

/// Sets and lifts taints, for as long as it is polled.
pub async fn run(client: Client, hub: Arc<Hub>, leading: watch::Receiver<bool>) {
    let nodes = Api::<Node>::all(client);
    let (mut readiness, mut snapshots) = (hub.readiness_changes(), hub.snapshots());
    loop {
        readiness.borrow_and_update();
        let reported = hub.readiness();
        snapshots.borrow_and_update();
        let leads = *leading.borrow();
        for (name, ready) in to_change(&hub.objects(), &reported, leads, Timestamp::now()) {
            match set(&nodes, &name, ready).await {
                Ok(()) => {
                    let what = if ready { "is lifted" } else { "is set" };
                    tracing::info!(node = name, "taint {NOT_READY_TAINT} {what}");
                }
                Err(error) => tracing::debug!(node = name, "taint: {error}"),
            }
        }
        // An error means that the sender is gone.
        let changed = async {
            tokio::select! {
                changed = readiness.changed() => changed.is_ok(),
                changed = snapshots.changed() => changed.is_ok(),
            }
        };
        match tokio::time::timeout(LOOK, changed).await {
            Ok(false) => return,
            Ok(true) => tokio::time::sleep(GATHERING).await,
            Err(_) => {}
        }
    }
}

/// Nodes whose taint is not as it should be, and whether they are ready.
fn to_change(
    objects: &Objects,
    reported: &BTreeMap<String, bool>,
    leads: bool,
    now: Timestamp,
) -> Vec<(String, bool)> {
    let leaving = objects.mesh_is_off();
    // By node: whether its agent's pod has been away for too long. While one is replaced there may be two.
    let mut agents = BTreeMap::<&str, bool>::new();
    let pods = objects
        .pods
        .range((SYSTEM_NAMESPACE.to_owned(), String::new())..)
        .take_while(|((namespace, _), _)| namespace == SYSTEM_NAMESPACE)
        .filter(|(_, pod)| is_agent(pod));
    for (_, pod) in pods {
        let spec = pod.spec.as_ref();
        if let Some(node) = spec.and_then(|spec| spec.node_name.as_deref()) {
            let away = agents.entry(node).or_insert(true);
            *away &= is_away(pod, now);
        }
    }
    let mut changes = Vec::new();
    for (name, node) in &objects.nodes {
        let tainted = taints(node).any(|t| t.key == NOT_READY_TAINT);
        let annotations = node.metadata.annotations.as_ref();
        let mark = annotations.and_then(|a| a.get(READY));
        let marked = mark.is_some();
        match reported.get(name) {
            Some(true) if tainted || !marked => changes.push((name.clone(), true)),
            Some(false) if !leaving && (!tainted || marked) => changes.push((name.clone(), false)),
            None if leads && !leaving && !tainted => match agents.get(&**name) {
                Some(away) if mark.is_none_or(|m| *away && is_old(m, now) && is_watched(node)) => {
                    changes.push((name.clone(), false));
                }
                Some(_) | None => {}
            },
            Some(_) | None => {}
        }
    }
    changes
}

/// Whether the kubelet has said of it for a while that it is not ready.
fn is_away(agent: &Pod, now: Timestamp) -> bool {
    let conditions = agent.status.iter().flat_map(|s| &s.conditions).flatten();
    let mut unready = conditions.filter(|c| c.type_ == "Ready" && c.status != "True");
    unready.any(|condition| {
        let since = condition.last_transition_time.as_ref();
        since.is_some_and(|since| is_past(since.0, now))
    })
}

/// Whether the kubelet has had the time to see what a replica heard of the agent when it wrote this mark. One that is
/// no time is of an earlier version.
fn is_old(mark: &str, now: Timestamp) -> bool {
    mark.parse().map_or(true, |written| is_past(written, now))
}

fn is_past(time: Timestamp, now: Timestamp) -> bool {
    now.duration_since(time) >= AWAY.try_into().unwrap_or_default()
}

/// Whether its kubelet is there, to say how its pods are. Where it is not, Kubernetes calls them all unready, and
/// taints the node itself.
fn is_watched(node: &Node) -> bool {
    let mut conditions = node.status.iter().flat_map(|s| &s.conditions).flatten();
    conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}

async fn set(nodes: &Api<Node>, name: &str, ready: bool) -> Result<(), kube::Error> {
    let node = nodes.get(name).await?;
    let kept = taints(&node).filter(|t| t.key != NOT_READY_TAINT).cloned();
    let ours = (!ready).then(|| Taint {
        key: NOT_READY_TAINT.into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    });
    let all: Vec<Taint> = kept.chain(ours).collect();
    let mark = ready.then(|| Timestamp::now().to_string());
    // The list is replaced whole: only on top of what was read.
    let patch = json!({
        "metadata": {
            "resourceVersion": node.metadata.resource_version,
            "annotations": { READY: mark },
        },
        "spec": { "taints": all },
    });
    nodes
        .patch_metadata(name, &as_us(), &Patch::Merge(patch))
        .await?;
    Ok(())
}

fn taints(node: &Node) -> impl Iterator<Item = &Taint> {
    let spec = node.spec.as_ref();
    spec.and_then(|s| s.taints.as_ref()).into_iter().flatten()
}

/// Annotation of nodes whose agent said last that it can enrol pods: since when it says so.
const READY: &str = "warren-mesh.io/ready";
/// Longer than an agent takes to be replaced, and than the kubelet takes to see that it is ready: until then another
/// replica may have lifted the taint again.
const AWAY: Duration = Duration::from_secs(10);
const GATHERING: Duration = Duration::from_millis(200);
/// What could not be written is tried again.
const LOOK: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
