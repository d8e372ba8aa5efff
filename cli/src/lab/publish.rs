//! After every change: what the controller, the kernel, the pods and the readers of the status file are told.
//!
//! One task does it, over and over while something has changed; changes that come in between are taken together.
//! Whoever needs the world to know before going on (a pod before CNI ADD, an `apply` before it answers) awaits
//! [`Lab::published`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Node, NodeAddress, NodeStatus, Pod, PodCondition, PodIP, PodStatus,
};
use serde::Serialize;
use serde_json::json;
use warren_controller::providers::directory::Object;

use super::cluster::{Cluster, PodRecord};
use super::daemon::Lab;
use super::hosts;
use super::launch::Launch;
use super::services::all_slices;
use super::{DEFAULT_PATH, processes, translation};
use crate::error::{Context, Result};

/// What was written last, so that nothing is written twice.
#[derive(Debug, Default)]
pub(crate) struct Published {
    files: RefCell<BTreeMap<PathBuf, String>>,
    rules: RefCell<BTreeMap<String, String>>,
}

/// Publishes whenever something has changed.
pub(crate) async fn run(lab: Rc<Lab>) {
    let published = Published::default();
    let mut changes = lab.changes.subscribe();
    loop {
        let change = *changes.borrow_and_update();
        publish(&lab, &published).await;
        lab.publications.send_replace(change);
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn publish(lab: &Lab, published: &Published) {
    // Collected first: the cluster must not be borrowed while something is awaited.
    let (manifests, etc, rules) = {
        let cluster = lab.cluster.borrow();
        (
            manifests(lab, &cluster),
            etc_files(lab, &cluster),
            translation::rules(&cluster),
        )
    };
    let status = serde_json::to_string(&lab.status()).unwrap_or_default();
    let written = published.replace(&lab.paths.status(), status);
    report(written, "status");
    for (name, text) in manifests {
        let file = lab.paths.manifests().join(name);
        report(
            published.replace(&file, text),
            "manifests for the controller",
        );
    }
    for (file, text) in etc {
        report(published.rewrite(&file, text), "hosts file");
    }
    for node in &lab.nodes {
        let same = published.rules.borrow().get(&node.name) == Some(&rules);
        if same {
            continue;
        }
        match apply_rules(&node.netns, &rules).await {
            Ok(()) => {
                published
                    .rules
                    .borrow_mut()
                    .insert(node.name.clone(), rules.clone());
            }
            Err(error) => tracing::error!(node = node.name, %error, "Service translation"),
        }
    }
}

fn report(done: Result<()>, what: &str) {
    if let Err(error) = done {
        tracing::error!(%error, "{what}");
    }
}

impl Published {
    /// Replaces a file by rename.
    fn replace(&self, file: &Path, text: String) -> Result<()> {
        self.if_changed(file, text, |text| {
            // Hidden: the controller does not read unfinished files.
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let draft = file.with_file_name(format!(".{name}.new"));
            std::fs::write(&draft, text)?;
            // Environments of pods are in there.
            std::fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
            std::fs::rename(&draft, file)
        })
    }

    /// Rewrites a file in place.
    fn rewrite(&self, file: &Path, text: String) -> Result<()> {
        self.if_changed(file, text, |text| hosts::rewrite(file, text))
    }

    fn if_changed(
        &self,
        file: &Path,
        text: String,
        write: impl FnOnce(&str) -> std::io::Result<()>,
    ) -> Result<()> {
        if self.files.borrow().get(file) == Some(&text) && file.exists() {
            return Ok(());
        }
        write(&text).context(file.display())?;
        self.files.borrow_mut().insert(file.to_owned(), text);
        Ok(())
    }
}

/// Loads nftables rules in a node's namespace.
pub(crate) async fn apply_rules(netns: &Path, rules: &str) -> Result<()> {
    let launch = Launch {
        argv: ["nft", "-f", "-"].map(str::to_owned).into(),
        env: [("PATH".to_owned(), DEFAULT_PATH.to_owned())].into(),
        netns: Some(netns.to_owned()),
        ..Launch::default()
    };
    let done = processes::run(&launch, rules, Duration::from_secs(20)).await?;
    if done.status.success() {
        return Ok(());
    }
    Err(crate::error::Error::new(format!(
        "nft: {}",
        done.stderr.trim()
    )))
}

/// Label of a node that says which zone it is in.
const ZONE: &str = "topology.kubernetes.io/zone";

/// The controller's input: one List for each kind; routes and policies share one.
fn manifests(lab: &Lab, cluster: &Cluster) -> [(&'static str, String); 7] {
    let nodes: Vec<Node> = lab
        .nodes
        .iter()
        .map(|node| {
            let mut object = Node::default();
            object.metadata.name = Some(node.name.clone());
            let zone = cluster.zones.get(&node.name);
            object.metadata.labels = zone.map(|zone| [(ZONE.to_owned(), zone.clone())].into());
            let address = |address| NodeAddress {
                type_: "InternalIP".into(),
                address,
            };
            let addresses = node
                .addresses
                .both()
                .iter()
                .map(|ip| address(ip.to_string()))
                .collect();
            object.status = Some(NodeStatus {
                addresses: Some(addresses),
                ..Default::default()
            });
            object
        })
        .collect();
    let pods: Vec<Pod> = cluster.pods.values().map(pod_manifest).collect();
    [
        (
            "10-namespaces.json",
            list(&cluster.namespaces.values().collect::<Vec<_>>()),
        ),
        ("20-nodes.json", list(&nodes)),
        (
            "30-serviceaccounts.json",
            list(&cluster.accounts.values().collect::<Vec<_>>()),
        ),
        (
            "40-services.json",
            list(&cluster.services.values().collect::<Vec<_>>()),
        ),
        ("50-pods.json", list(&pods)),
        ("60-endpointslices.json", list(&all_slices(cluster))),
        (
            "70-routes.json",
            list(
                &cluster
                    .extras
                    .values()
                    .map(Object::to_json)
                    .collect::<Vec<_>>(),
            ),
        ),
    ]
}

fn list<T: Serialize>(items: &[T]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

/// A pod as the API server would hold it.
fn pod_manifest(pod: &PodRecord) -> Pod {
    let ips = || pod.life.ips.iter().map(ToString::to_string);
    let ready = if pod.is_ready() { "True" } else { "False" };
    let condition = PodCondition {
        type_: "Ready".into(),
        status: ready.into(),
        ..PodCondition::default()
    };
    Pod {
        status: Some(PodStatus {
            phase: Some(pod.life.phase.name().into()),
            pod_ip: ips().next(),
            pod_ips: Some(ips().map(|ip| PodIP { ip }).collect()),
            conditions: Some(vec![condition]),
            ..PodStatus::default()
        }),
        ..pod.manifest.clone()
    }
}

/// Every pod's `/etc` files that exist: those of a pod are made before its process starts.
fn etc_files(lab: &Lab, cluster: &Cluster) -> Vec<(PathBuf, String)> {
    let names = hosts::names(cluster);
    let with_etc = cluster
        .pods
        .iter()
        .filter(|(_, pod)| !pod.life.ips.is_empty());
    with_etc
        .map(|(key, pod)| {
            let file = lab.paths.pod(&key.0, &key.1).join("hosts");
            (file, hosts::hosts(&names, key, pod))
        })
        .collect()
}
