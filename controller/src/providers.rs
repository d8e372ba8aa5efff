//! Where the objects come from that users write: a directory of manifests (Kubernetes' API follows).

pub mod directory;
pub(crate) mod field;
pub mod gateway;
pub mod traffic_policy;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use self::gateway::{BackendTrafficPolicy, GrpcRoute, HttpRoute, TcpRoute, TlsRoute};
use self::traffic_policy::TrafficPolicy;

/// Namespace and name of an object.
pub type NamespacedName = (String, String);

/// Everything a provider knows at one moment, in the form the model is built from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// By name.
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// By name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// By namespace and name. Every pod has a UID.
    pub pods: BTreeMap<NamespacedName, Arc<Pod>>,
    /// By namespace and name.
    pub services: BTreeMap<NamespacedName, Arc<Service>>,
    /// By namespace and name.
    pub slices: BTreeMap<NamespacedName, Arc<EndpointSlice>>,
    /// By namespace and name.
    pub http_routes: BTreeMap<NamespacedName, Arc<HttpRoute>>,
    /// By namespace and name.
    pub grpc_routes: BTreeMap<NamespacedName, Arc<GrpcRoute>>,
    /// By namespace and name.
    pub tls_routes: BTreeMap<NamespacedName, Arc<TlsRoute>>,
    /// By namespace and name.
    pub tcp_routes: BTreeMap<NamespacedName, Arc<TcpRoute>>,
    /// By namespace and name.
    pub backend_traffic_policies: BTreeMap<NamespacedName, Arc<BackendTrafficPolicy>>,
    /// By namespace and name.
    pub traffic_policies: BTreeMap<NamespacedName, Arc<TrafficPolicy>>,
}
