//! The kinds of objects a manifest may hold, typed.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// A typed object. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// v1 Namespace
    Namespace(Arc<Namespace>),
    /// v1 ServiceAccount
    ServiceAccount(Arc<ServiceAccount>),
    /// v1 Node
    Node(Arc<Node>),
    /// v1 Pod
    Pod(Arc<Pod>),
    /// apps/v1 Deployment
    Deployment(Arc<Deployment>),
    /// v1 Service
    Service(Arc<Service>),
    /// discovery.k8s.io/v1 EndpointSlice
    EndpointSlice(Arc<EndpointSlice>),
}

/// What identifies an object: kind, namespace (empty for cluster-scoped kinds) and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Kind, such as `Pod`.
    pub kind: String,
    /// Namespace; empty for cluster-scoped kinds and where the document does not tell.
    pub namespace: String,
    /// Name; empty where the document does not tell.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)?;
        match (&*self.namespace, &*self.name) {
            ("", "") => Ok(()),
            ("", name) => write!(f, " {name}"),
            (namespace, name) => write!(f, " {namespace}/{name}"),
        }
    }
}

impl Object {
    /// What identifies the object.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        ObjectKey {
            kind: self.kind().into(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }

    /// Kind, such as `Pod`.
    pub fn kind(&self) -> &'static str {
        match self {
            Object::Namespace(_) => "Namespace",
            Object::ServiceAccount(_) => "ServiceAccount",
            Object::Node(_) => "Node",
            Object::Pod(_) => "Pod",
            Object::Deployment(_) => "Deployment",
            Object::Service(_) => "Service",
            Object::EndpointSlice(_) => "EndpointSlice",
        }
    }

    /// The object's metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Object::Namespace(o) => &o.metadata,
            Object::ServiceAccount(o) => &o.metadata,
            Object::Node(o) => &o.metadata,
            Object::Pod(o) => &o.metadata,
            Object::Deployment(o) => &o.metadata,
            Object::Service(o) => &o.metadata,
            Object::EndpointSlice(o) => &o.metadata,
        }
    }
}

/// The kinds that are read: kind, apiVersion, whether it lives in a namespace.
pub(super) const KINDS: [(&str, &str, bool); 7] = [
    ("Namespace", "v1", false),
    ("ServiceAccount", "v1", true),
    ("Node", "v1", false),
    ("Pod", "v1", true),
    ("Deployment", "apps/v1", true),
    ("Service", "v1", true),
    ("EndpointSlice", "discovery.k8s.io/v1", true),
];
