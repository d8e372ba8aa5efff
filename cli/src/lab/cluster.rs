//! What the lab knows: the objects as an API server would hold them, and how far each pod is.
//!
//! Only data and synchronous questions to it; the daemon's tasks change it and never hold it across an `.await`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod, PodSpec, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::sync::watch;
use warren_controller::providers::directory::{Object, ObjectKey};

use super::deployments::Owned;

/// Namespace and name.
pub(crate) type Key = (String, String);

/// All objects.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) namespaces: BTreeMap<String, Namespace>,
    pub(crate) accounts: BTreeMap<Key, ServiceAccount>,
    pub(crate) deployments: BTreeMap<Key, DeploymentRecord>,
    /// With their cluster IPs and node ports.
    pub(crate) services: BTreeMap<Key, Service>,
    /// The user's own; those of Services with a selector are made when they are asked for.
    pub(crate) slices: BTreeMap<Key, EndpointSlice>,
    pub(crate) pods: BTreeMap<Key, PodRecord>,
    /// Routes and policies: what only the controller reads.
    pub(crate) extras: BTreeMap<ObjectKey, Object>,
    /// Zones of the nodes that have one.
    pub(crate) zones: BTreeMap<String, String>,
    /// Deleted; they go with their last pod.
    pub(crate) ending_namespaces: BTreeSet<String>,
}

#[derive(Debug)]
pub(crate) struct DeploymentRecord {
    pub(crate) manifest: Deployment,
    /// When `rollout restart` was last asked for.
    pub(crate) restarted: Option<String>,
}

/// A pod.
#[derive(Debug)]
pub(crate) struct PodRecord {
    /// As the API server would hold it, without `status`: UID, node and owner are set.
    pub(crate) manifest: Pod,
    /// The spec as the user wrote it; `None` for a Deployment's pod.
    pub(crate) written: Option<PodSpec>,
    /// Deployment and hash of the template it was made from.
    pub(crate) owner: Option<(String, String)>,
    pub(crate) life: Life,
    /// Asks the pod's task to end it within that time.
    pub(crate) stop: watch::Sender<Option<Duration>>,
}

/// How far a pod is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Life {
    pub(crate) phase: Phase,
    /// What is being done or has failed, for people.
    pub(crate) step: String,
    pub(crate) ips: Vec<IpAddr>,
    /// Its container's process.
    pub(crate) pid: Option<u32>,
    pub(crate) ready: bool,
    pub(crate) restarts: u32,
    pub(crate) terminating: bool,
}

/// `status.phase`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

impl PodRecord {
    pub(crate) fn uid(&self) -> &str {
        self.manifest.metadata.uid.as_deref().unwrap_or_default()
    }

    pub(crate) fn node(&self) -> &str {
        self.spec()
            .and_then(|s| s.node_name.as_deref())
            .unwrap_or_default()
    }

    pub(crate) fn spec(&self) -> Option<&PodSpec> {
        self.manifest.spec.as_ref()
    }

    pub(crate) fn account(&self) -> &str {
        let account = self.spec().and_then(|s| s.service_account_name.as_deref());
        account.filter(|a| !a.is_empty()).unwrap_or("default")
    }

    pub(crate) fn labels(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.manifest.metadata.labels.as_ref().unwrap_or(&NONE)
    }

    /// Done or ready: nothing that one would wait for.
    pub(crate) fn is_settled(&self) -> bool {
        self.life.phase == Phase::Succeeded || (self.life.ready && !self.life.terminating)
    }

    /// An address that carries traffic.
    pub(crate) fn is_ready(&self) -> bool {
        self.life.ready && !self.life.terminating && self.life.phase == Phase::Running
    }
}

impl Cluster {
    /// A cluster with the namespace that every one has.
    pub(crate) fn new() -> Self {
        let mut cluster = Self::default();
        let mut default = Namespace::default();
        default.metadata.name = Some("default".into());
        cluster.namespaces.insert("default".into(), default);
        cluster
    }

    /// Pods of a Deployment.
    pub(crate) fn owned(&self, (namespace, deployment): &Key) -> Vec<Owned> {
        let pods = self.pods.iter().filter(|((ns, _), _)| ns == namespace);
        pods.filter_map(|((_, name), pod)| {
            let (owner, hash) = pod.owner.as_ref()?;
            (owner == deployment).then(|| Owned {
                name: name.clone(),
                hash: hash.clone(),
                ready: pod.is_ready(),
                terminating: pod.life.terminating,
            })
        })
        .collect()
    }

    /// Removes a pod, and its namespace if that was only waiting for it.
    pub(crate) fn remove_pod(&mut self, key: &Key, uid: &str) {
        if self.pod_mut(key, uid).is_none() {
            return;
        }
        self.pods.remove(key);
        let namespace = &key.0;
        let last = !self.pods.keys().any(|(ns, _)| ns == namespace);
        if last && self.ending_namespaces.remove(namespace) {
            self.namespaces.remove(namespace);
        }
    }

    /// Changes a pod if it is still the one with that UID.
    pub(crate) fn pod_mut(&mut self, key: &Key, uid: &str) -> Option<&mut PodRecord> {
        self.pods.get_mut(key).filter(|pod| pod.uid() == uid)
    }

    /// Whether a pod's own label or its namespace's says it belongs to the mesh.
    pub(crate) fn opted_in(&self, (namespace, _): &Key, pod: &PodRecord) -> bool {
        let own = pod.labels().get(mesh_api::names::MESH_LABEL);
        let labels = self
            .namespaces
            .get(namespace)
            .and_then(|n| n.metadata.labels.as_ref());
        let label = own.or_else(|| labels?.get(mesh_api::names::MESH_LABEL));
        label.is_some_and(|l| l == "enabled")
    }

    /// The one object of that name, in that namespace if one is given.
    pub(crate) fn find<T>(
        of: &BTreeMap<Key, T>,
        kind: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Key, String> {
        let all = of.keys().filter(|(_, n)| n == name);
        let found: Vec<&Key> = all
            .filter(|(ns, _)| namespace.is_none_or(|n| n == ns))
            .collect();
        match (&found[..], namespace) {
            ([one], _) => Ok((*one).clone()),
            ([], Some(namespace)) => Err(format!("there is no {kind} {namespace}/{name}")),
            ([], None) => Err(format!("there is no {kind} {name} in any namespace")),
            (many, _) => {
                let namespaces: Vec<&str> = many.iter().map(|(ns, _)| ns.as_str()).collect();
                let namespaces = namespaces.join(", ");
                Err(format!(
                    "{kind} {name} is in several namespaces ({namespaces}); say -n"
                ))
            }
        }
    }
}
