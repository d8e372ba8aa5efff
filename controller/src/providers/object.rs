//! The kinds of objects that a provider reads, typed.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use crate::providers::gateway::{BackendTrafficPolicy, GrpcRoute, HttpRoute, TcpRoute, TlsRoute};
use crate::providers::traffic_policy::TrafficPolicy;

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
    /// gateway.networking.k8s.io/v1 HTTPRoute
    HttpRoute(Arc<HttpRoute>),
    /// gateway.networking.k8s.io/v1 GRPCRoute
    GrpcRoute(Arc<GrpcRoute>),
    /// gateway.networking.k8s.io/v1 TLSRoute
    TlsRoute(Arc<TlsRoute>),
    /// gateway.networking.k8s.io/v1 TCPRoute
    TcpRoute(Arc<TcpRoute>),
    /// gateway.networking.x-k8s.io/v1alpha1 XBackendTrafficPolicy
    BackendTrafficPolicy(Arc<BackendTrafficPolicy>),
    /// warren-mesh.io/v1alpha1 TrafficPolicy
    TrafficPolicy(Arc<TrafficPolicy>),
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
            Object::HttpRoute(_) => "HTTPRoute",
            Object::GrpcRoute(_) => "GRPCRoute",
            Object::TlsRoute(_) => "TLSRoute",
            Object::TcpRoute(_) => "TCPRoute",
            Object::BackendTrafficPolicy(_) => "XBackendTrafficPolicy",
            Object::TrafficPolicy(_) => "TrafficPolicy",
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
            Object::HttpRoute(o) => &o.metadata,
            Object::GrpcRoute(o) => &o.metadata,
            Object::TlsRoute(o) => &o.metadata,
            Object::TcpRoute(o) => &o.metadata,
            Object::BackendTrafficPolicy(o) => &o.metadata,
            Object::TrafficPolicy(o) => &o.metadata,
        }
    }

    /// The object's metadata, to be changed.
    pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Object::Namespace(o) => &mut Arc::make_mut(o).metadata,
            Object::ServiceAccount(o) => &mut Arc::make_mut(o).metadata,
            Object::Node(o) => &mut Arc::make_mut(o).metadata,
            Object::Pod(o) => &mut Arc::make_mut(o).metadata,
            Object::Deployment(o) => &mut Arc::make_mut(o).metadata,
            Object::Service(o) => &mut Arc::make_mut(o).metadata,
            Object::EndpointSlice(o) => &mut Arc::make_mut(o).metadata,
            Object::HttpRoute(o) => &mut Arc::make_mut(o).metadata,
            Object::GrpcRoute(o) => &mut Arc::make_mut(o).metadata,
            Object::TlsRoute(o) => &mut Arc::make_mut(o).metadata,
            Object::TcpRoute(o) => &mut Arc::make_mut(o).metadata,
            Object::BackendTrafficPolicy(o) => &mut Arc::make_mut(o).metadata,
            Object::TrafficPolicy(o) => &mut Arc::make_mut(o).metadata,
        }
    }

    /// The object as JSON, in the form it was read from.
    pub fn to_json(&self) -> Value {
        let json = match self {
            Object::Namespace(o) => serde_json::to_value(&**o),
            Object::ServiceAccount(o) => serde_json::to_value(&**o),
            Object::Node(o) => serde_json::to_value(&**o),
            Object::Pod(o) => serde_json::to_value(&**o),
            Object::Deployment(o) => serde_json::to_value(&**o),
            Object::Service(o) => serde_json::to_value(&**o),
            Object::EndpointSlice(o) => serde_json::to_value(&**o),
            Object::HttpRoute(o) => serde_json::to_value(&**o),
            Object::GrpcRoute(o) => serde_json::to_value(&**o),
            Object::TlsRoute(o) => serde_json::to_value(&**o),
            Object::TcpRoute(o) => serde_json::to_value(&**o),
            Object::BackendTrafficPolicy(o) => serde_json::to_value(&**o),
            Object::TrafficPolicy(o) => serde_json::to_value(&**o),
        };
        // All keys are text: serialising cannot fail.
        json.unwrap_or_default()
    }
}

/// The kinds that are read: kind, the versions that are taken, whether it lives in a namespace.
pub(crate) const KINDS: [(&str, &[&str], bool); 13] = [
    ("Namespace", &["v1"], false),
    ("ServiceAccount", &["v1"], true),
    ("Node", &["v1"], false),
    ("Pod", &["v1"], true),
    ("Deployment", &["apps/v1"], true),
    ("Service", &["v1"], true),
    ("EndpointSlice", &["discovery.k8s.io/v1"], true),
    (
        "HTTPRoute",
        &[
            "gateway.networking.k8s.io/v1",
            "gateway.networking.k8s.io/v1beta1",
        ],
        true,
    ),
    ("GRPCRoute", &["gateway.networking.k8s.io/v1"], true),
    (
        "TLSRoute",
        &[
            "gateway.networking.k8s.io/v1",
            "gateway.networking.k8s.io/v1alpha3",
            "gateway.networking.k8s.io/v1alpha2",
        ],
        true,
    ),
    (
        "TCPRoute",
        &[
            "gateway.networking.k8s.io/v1",
            "gateway.networking.k8s.io/v1alpha2",
        ],
        true,
    ),
    (
        "XBackendTrafficPolicy",
        &["gateway.networking.x-k8s.io/v1alpha1"],
        true,
    ),
    ("TrafficPolicy", &["warren-mesh.io/v1alpha1"], true),
];
