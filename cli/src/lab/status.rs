//! What `get`, `exec`, `logs` and `metrics` know of a lab: a file that the daemon replaces after every change.
//!
//! A file and not a question to the daemon, so that all of them work while the daemon is being debugged, is
//! stopped or has died. What changes without the daemon (the proxy's worker, who is enrolled) is looked up by the
//! reader.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::names::LabName;
use super::processes::children;
use crate::error::{Context, Error, Result};

/// The whole lab.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    pub(crate) nodes: Vec<NodeStatus>,
    pub(crate) pods: Vec<PodStatus>,
    pub(crate) services: Vec<ServiceStatus>,
    pub(crate) deployments: Vec<DeploymentStatus>,
    pub(crate) controller: ControllerStatus,
}

/// A node. Process ids are 0 while there is no process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeStatus {
    pub(crate) name: String,
    /// Empty: none.
    #[serde(default)]
    pub(crate) zone: String,
    pub(crate) address: Option<IpAddr>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) netns: PathBuf,
    /// The worker that carries the traffic.
    pub(crate) proxy_pid: u32,
    pub(crate) proxy_supervisor_pid: u32,
    pub(crate) agent_pid: u32,
    pub(crate) metrics_url: String,
    pub(crate) proxy_netns: PathBuf,
    pub(crate) proxy_address: Option<IpAddr>,
    pub(crate) admin_socket: PathBuf,
    /// Supervisors of older proxies that are draining.
    pub(crate) draining_pids: Vec<u32>,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodStatus {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) node: String,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) identity: String,
    /// `none`, `joining`, `enrolled`, `leaving` or `hbone`.
    pub(crate) mesh: String,
    pub(crate) netns: PathBuf,
    /// The container's process; 0 while there is none.
    pub(crate) pid: u32,
    pub(crate) ready: bool,
    pub(crate) restarts: u32,
    pub(crate) phase: String,
    /// What it waits for, or why it is not ready.
    pub(crate) message: String,
    pub(crate) terminating: bool,
    pub(crate) uid: String,
    /// The Deployment that made it.
    pub(crate) owner: Option<String>,
    /// What `exec` needs to be like the container.
    pub(crate) run_as: Option<(u32, u32)>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) container: String,
    pub(crate) hbone: bool,
    pub(crate) opted_in: bool,
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceStatus {
    pub(crate) name: String,
    pub(crate) namespace: String,
    #[serde(rename = "clusterIPs")]
    pub(crate) cluster_ips: Vec<String>,
    pub(crate) ports: Vec<PortStatus>,
    /// Addresses of ready endpoints.
    pub(crate) endpoints: Vec<String>,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortStatus {
    pub(crate) name: String,
    pub(crate) port: i32,
    pub(crate) protocol: String,
    pub(crate) node_port: Option<i32>,
}

/// A Deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeploymentStatus {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) replicas: usize,
    pub(crate) ready: usize,
    pub(crate) updated: usize,
}

/// The controller; empty without a mesh.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ControllerStatus {
    pub(crate) pid: u32,
    pub(crate) netns: PathBuf,
    pub(crate) address: Option<IpAddr>,
}

/// Reads the state of a lab, with what only the reader can know.
pub(crate) fn read(lab: &LabName) -> Result<Status> {
    let paths = lab.paths();
    let bytes = match std::fs::read(paths.status()) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(format!(
                "there is no lab {lab}; start one with `warren lab up --name {lab} -f FILE`, \
                 or see `warren lab list`"
            )));
        }
        Err(e) => return Err(e).context(paths.status().display()),
    };
    let mut status: Status = serde_json::from_slice(&bytes).context(paths.status().display())?;
    for node in &mut status.nodes {
        // The supervisor has no other children.
        node.proxy_pid = match node.proxy_supervisor_pid {
            0 => 0,
            supervisor => children(supervisor).first().copied().unwrap_or(0),
        };
    }
    let phases = enrolment(&paths.controller_state().join("enrolled.json"));
    for pod in &mut status.pods {
        pod.mesh = mesh(pod, phases.get(&pod.uid).map(String::as_str)).into();
    }
    Ok(status)
}

impl Status {
    /// The one pod of that name; `deploy/NAME` is any of its pods, a ready one if there is.
    pub(crate) fn pod(&self, namespace: Option<&str>, name: &str) -> Result<&PodStatus> {
        let here = |pod: &&PodStatus| namespace.is_none_or(|n| n == pod.namespace);
        let place = namespace.map_or(String::new(), |n| format!(" in namespace {n}"));
        if let Some(deployment) = deployment_name(name) {
            let mut pods: Vec<&PodStatus> = self
                .pods
                .iter()
                .filter(here)
                .filter(|p| p.owner.as_deref() == Some(deployment))
                .collect();
            pods.sort_by_key(|p| (p.terminating, !p.ready));
            let first = pods.first().copied();
            return first
                .ok_or_else(|| Error::new(format!("Deployment {deployment}{place} has no pod")));
        }
        let found: Vec<&PodStatus> = self
            .pods
            .iter()
            .filter(here)
            .filter(|p| p.name == name)
            .collect();
        match found[..] {
            [one] => Ok(one),
            [] => Err(Error::new(format!(
                "there is no pod {name}{place}; see `warren lab get pods`"
            ))),
            _ => Err(Error::new(format!(
                "pod {name} is in several namespaces; say which with -n"
            ))),
        }
    }

    /// A node, named with or without `node/`.
    pub(crate) fn node(&self, name: &str) -> Result<&NodeStatus> {
        let name = name.strip_prefix("node/").unwrap_or(name);
        let found = self.nodes.iter().find(|n| n.name == name);
        found.ok_or_else(|| {
            let last = self.nodes.len();
            Error::new(format!(
                "there is no node {name}; the lab has node-1 to node-{last}"
            ))
        })
    }
}

/// The name in `deploy/NAME`.
pub(crate) fn deployment_name(text: &str) -> Option<&str> {
    let prefixes = ["deploy/", "deployment/", "deployments/", "deployment.apps/"];
    prefixes.iter().find_map(|prefix| text.strip_prefix(prefix))
}

/// Phase of each pod by UID, as the controller keeps it. No file or an unreadable one: none.
fn enrolment(file: &std::path::Path) -> BTreeMap<String, String> {
    #[derive(Deserialize)]
    struct Stored {
        pods: BTreeMap<String, Pod>,
    }
    #[derive(Deserialize)]
    struct Pod {
        phase: String,
    }
    let stored = std::fs::read(file)
        .ok()
        .and_then(|b| serde_json::from_slice::<Stored>(&b).ok());
    let pods = stored.map(|s| s.pods).unwrap_or_default();
    pods.into_iter()
        .map(|(uid, pod)| (uid, pod.phase))
        .collect()
}

fn mesh(pod: &PodStatus, phase: Option<&str>) -> &'static str {
    match phase {
        _ if pod.hbone && pod.opted_in => "hbone",
        Some("enforced") => "enrolled",
        Some("wanted" | "tunnel" | "rejoining") => "joining",
        Some("leaving" | "withdrawn") => "leaving",
        _ => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str, owner: Option<&str>, ready: bool) -> PodStatus {
        PodStatus {
            name: name.into(),
            namespace: namespace.into(),
            owner: owner.map(str::to_owned),
            ready,
            ..PodStatus::default()
        }
    }

    #[test]
    fn pods_are_found_by_name_and_deployment() {
        let status = Status {
            pods: vec![
                pod("a", "web-1", Some("web"), false),
                pod("a", "web-2", Some("web"), true),
                pod("a", "x", None, true),
                pod("b", "x", None, true),
            ],
            ..Status::default()
        };
        assert_eq!(status.pod(None, "deploy/web").unwrap().name, "web-2");
        assert_eq!(status.pod(Some("b"), "x").unwrap().namespace, "b");
        let error = |namespace, name| status.pod(namespace, name).unwrap_err().to_string();
        assert!(error(None, "x").contains("-n"));
        assert!(error(Some("b"), "web-1").contains("no pod web-1"));
        assert!(error(None, "deploy/db").contains("Deployment db"));
    }
}
