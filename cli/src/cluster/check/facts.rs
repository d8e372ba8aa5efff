//! What the checks are made from, asked once.

use std::collections::BTreeMap;
use std::fmt::Debug;

use futures::StreamExt;
use futures::stream;
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client, Resource};
use mesh_api::names::{CONTROLLER_METRICS_PORT, METRICS_PORT, SYSTEM_NAMESPACE};
use serde::de::DeserializeOwned;

use crate::cluster::agents;
use crate::cluster::metrics::Metrics;
use crate::cluster::stat::fetch;
use crate::error::{Context, Result};

/// What the cluster said.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) now: Timestamp,
    /// Major and minor version of the API server.
    pub(super) version: (u32, u32),
    pub(super) nodes: Vec<Node>,
    pub(super) namespaces: Vec<Namespace>,
    pub(super) pods: Vec<Pod>,
    pub(super) policies: Vec<NetworkPolicy>,
    pub(super) crds: Vec<CustomResourceDefinition>,
    pub(super) admission: Option<ValidatingAdmissionPolicy>,
    pub(super) admission_binding: Option<ValidatingAdmissionPolicyBinding>,
    /// `kube-system/cilium-config`.
    pub(super) cilium: Option<ConfigMap>,
    pub(super) trust_bundle: Option<ConfigMap>,
    pub(super) lease: Option<Lease>,
    pub(super) controller: Option<Deployment>,
    /// By name.
    pub(super) daemon_sets: BTreeMap<String, DaemonSet>,
    /// What the user may not do of what installing needs.
    pub(super) forbidden: Vec<String>,
    /// By node: what its agent says, or why it says nothing.
    pub(super) agents: BTreeMap<String, Result<serde_json::Value, String>>,
    /// By node: what its proxy counts.
    pub(super) proxies: BTreeMap<String, Result<Metrics, String>>,
    /// `/status` of one controller.
    pub(super) status: Option<serde_json::Value>,
}

impl Facts {
    /// Asks. `pre`: Warren is not there yet.
    pub(super) async fn gather(client: &Client, pre: bool) -> Result<Self> {
        let version = client
            .apiserver_version()
            .await
            .context("the API server does not answer")?;
        let number = |text: &str| {
            let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap_or(0)
        };
        let system = |name: &'static str| (SYSTEM_NAMESPACE, name);
        let mut facts = Self {
            now: Timestamp::now(),
            version: (number(&version.major), number(&version.minor)),
            nodes: all(client).await?,
            namespaces: all(client).await?,
            pods: all(client).await?,
            policies: all(client).await?,
            crds: all(client).await?,
            admission: named(client, ADMISSION_POLICY).await?,
            admission_binding: named(client, ADMISSION_POLICY).await?,
            cilium: one(client, ("kube-system", "cilium-config")).await?,
            trust_bundle: one(client, system("warren-trust-bundle")).await?,
            lease: one(client, system("warren-controller")).await?,
            controller: one(client, system("warren-controller")).await?,
            daemon_sets: BTreeMap::new(),
            forbidden: Vec::new(),
            agents: BTreeMap::new(),
            proxies: BTreeMap::new(),
            status: None,
        };
        if pre {
            facts.forbidden = forbidden(client).await?;
            return Ok(facts);
        }
        for name in ["warren-cni", "warren-node-proxy"] {
            let found: Option<DaemonSet> = one(client, system(name)).await?;
            facts
                .daemon_sets
                .extend(found.map(|set| (name.to_owned(), set)));
        }
        let (agents, _) = agents::find(client).await?;
        facts.agents = stream::iter(&agents)
            .map(|agent| async {
                let report = agent.report().await.map_err(|e| e.to_string());
                (agent.node.clone(), report)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let proxies = facts.parts("warren-node-proxy");
        facts.proxies = stream::iter(proxies)
            .map(|(pod, node)| async move {
                let text = fetch(client, &pod, METRICS_PORT, "/metrics").await;
                (
                    node,
                    text.map(|text| Metrics::parse(&text))
                        .map_err(|e| e.to_string()),
                )
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        for (pod, _) in facts.parts("warren-controller") {
            if let Ok(text) = fetch(client, &pod, CONTROLLER_METRICS_PORT, "/status").await {
                facts.status = serde_json::from_str(&text).ok();
                break;
            }
        }
        Ok(facts)
    }

    /// Name and node of the running pods of a part of Warren's.
    fn parts(&self, name: &str) -> Vec<(String, String)> {
        (self.of(name))
            .filter(|pod| phase(pod) == "Running" && pod.metadata.deletion_timestamp.is_none())
            .filter_map(|pod| {
                let node = pod.spec.as_ref()?.node_name.clone()?;
                Some((pod.metadata.name.clone()?, node))
            })
            .collect()
    }

    /// The pods of a part of Warren's.
    pub(super) fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(move |pod| {
            pod.metadata.namespace.as_deref() == Some(SYSTEM_NAMESPACE)
                && label(*pod, "app.kubernetes.io/name") == Some(name)
        })
    }

    /// Names of the Linux nodes.
    pub(super) fn linux_nodes(&self) -> impl Iterator<Item = &str> {
        (self.nodes.iter())
            .filter(|node| label(*node, "kubernetes.io/os").is_none_or(|os| os == "linux"))
            .map(name)
    }
}

/// The object's name.
pub(super) fn name<K: Resource>(object: &K) -> &str {
    object.meta().name.as_deref().unwrap_or_default()
}

/// `namespace/name`.
pub(super) fn full_name<K: Resource>(object: &K) -> String {
    let namespace = object.meta().namespace.as_deref().unwrap_or_default();
    format!("{namespace}/{}", name(object))
}

/// The value of a label.
pub(super) fn label<'a, K: Resource>(object: &'a K, key: &str) -> Option<&'a str> {
    object.meta().labels.as_ref()?.get(key).map(String::as_str)
}

/// Phase of a pod.
pub(super) fn phase(pod: &Pod) -> &str {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    phase.unwrap_or_default()
}

async fn all<K>(client: &Client) -> Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let api: Api<K> = Api::all(client.clone());
    let kind = K::kind(&());
    let mut objects = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api
            .list(&page)
            .await
            .context(format!("{kind}s cannot be listed"))?;
        objects.extend(list.items);
        match list.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => page = page.continue_token(&more),
            None => return Ok(objects),
        }
    }
}

async fn named<K>(client: &Client, name: &str) -> Result<Option<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let api: Api<K> = Api::all(client.clone());
    let found = api.get_opt(name).await;
    found.context(format!("{} {name} cannot be read", K::kind(&())))
}

async fn one<K>(client: &Client, (namespace, name): (&str, &str)) -> Result<Option<K>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let kind = K::kind(&());
    let found = api.get_opt(name).await;
    found.context(format!("{kind} {namespace}/{name} cannot be read"))
}

async fn forbidden(client: &Client) -> Result<Vec<String>> {
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let mut forbidden = Vec::new();
    for (group, resource) in [
        ("", "namespaces"),
        ("apps", "daemonsets"),
        ("rbac.authorization.k8s.io", "clusterroles"),
        ("rbac.authorization.k8s.io", "clusterrolebindings"),
        ("apiextensions.k8s.io", "customresourcedefinitions"),
        (
            "admissionregistration.k8s.io",
            "validatingadmissionpolicies",
        ),
    ] {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: Some(group.into()),
                    resource: Some(resource.into()),
                    verb: Some("create".into()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = api.create(&PostParams::default(), &review).await;
        let answer = answer.context("the API server does not say what you may do")?;
        if !answer.status.is_some_and(|status| status.allowed) {
            forbidden.push(format!("create {resource}"));
        }
    }
    Ok(forbidden)
}

/// Keeps everyone but the controller from writing what it records at pods; and its binding.
pub(super) const ADMISSION_POLICY: &str = "warren-enrolment-record";
/// Agents and proxies that are asked at once.
const AT_ONCE: usize = 32;
const PAGE: u32 = 500;
