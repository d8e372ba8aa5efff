//! Where the objects come from that users write: a directory of manifests, or a Kubernetes API server.

mod check;
pub mod directory;
pub(crate) mod field;
pub mod gateway;
pub mod kubernetes;
pub(crate) mod object;
pub mod traffic_policy;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use mesh_api::names::{MESH_LABEL, SYSTEM_NAMESPACE};

pub(crate) use self::check::is_dns_name;
use self::gateway::{BackendTrafficPolicy, GrpcRoute, HttpRoute, TcpRoute, TlsRoute};
pub use self::object::{Object, ObjectKey};
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

/// Whether it is the agent of its node: by its ServiceAccount, as the certificates of agents are.
pub(crate) fn is_agent(pod: &Pod) -> bool {
    let account = (pod.spec.as_ref()).and_then(|spec| spec.service_account_name.as_deref());
    pod.metadata.namespace.as_deref() == Some(SYSTEM_NAMESPACE) && account == Some("warren-cni")
}

impl Objects {
    /// Whether the whole mesh is switched off, by the label of Warren's own namespace: it is being taken down.
    pub(crate) fn mesh_is_off(&self) -> bool {
        let system = self.namespaces.get(SYSTEM_NAMESPACE);
        let labels = system.and_then(|namespace| namespace.metadata.labels.as_ref());
        labels
            .and_then(|labels| labels.get(MESH_LABEL))
            .is_some_and(|value| value == "disabled")
    }

    /// Takes an object, or its newer version. True: it is another than before. Identities are named by pods
    /// and pods are made of Deployments elsewhere: the model has no use for ServiceAccounts and Deployments.
    pub(crate) fn insert(&mut self, object: Object) -> bool {
        fn put<K: Ord, V: PartialEq>(table: &mut BTreeMap<K, V>, name: K, value: V) -> bool {
            if table.get(&name) == Some(&value) {
                return false;
            }
            table.insert(name, value);
            true
        }
        let key = object.key();
        let name = (key.namespace, key.name);
        match object {
            Object::Namespace(o) => put(&mut self.namespaces, name.1, o),
            Object::Node(o) => put(&mut self.nodes, name.1, o),
            Object::Pod(o) => put(&mut self.pods, name, o),
            Object::Service(o) => put(&mut self.services, name, o),
            Object::EndpointSlice(o) => put(&mut self.slices, name, o),
            Object::HttpRoute(o) => put(&mut self.http_routes, name, o),
            Object::GrpcRoute(o) => put(&mut self.grpc_routes, name, o),
            Object::TlsRoute(o) => put(&mut self.tls_routes, name, o),
            Object::TcpRoute(o) => put(&mut self.tcp_routes, name, o),
            Object::BackendTrafficPolicy(o) => put(&mut self.backend_traffic_policies, name, o),
            Object::TrafficPolicy(o) => put(&mut self.traffic_policies, name, o),
            Object::ServiceAccount(_) | Object::Deployment(_) => false,
        }
    }

    /// Keeps of one kind only the objects with these names. True: some were removed.
    pub(crate) fn retain(&mut self, kind: &str, keep: impl Fn(&str, &str) -> bool) -> bool {
        fn of<V>(
            table: &mut BTreeMap<NamespacedName, V>,
            keep: impl Fn(&str, &str) -> bool,
        ) -> bool {
            let before = table.len();
            table.retain(|(namespace, name), _| keep(namespace, name));
            table.len() != before
        }
        fn global<V>(table: &mut BTreeMap<String, V>, keep: impl Fn(&str, &str) -> bool) -> bool {
            let before = table.len();
            table.retain(|name, _| keep("", name));
            table.len() != before
        }
        match kind {
            "Namespace" => global(&mut self.namespaces, keep),
            "Node" => global(&mut self.nodes, keep),
            "Pod" => of(&mut self.pods, keep),
            "Service" => of(&mut self.services, keep),
            "EndpointSlice" => of(&mut self.slices, keep),
            "HTTPRoute" => of(&mut self.http_routes, keep),
            "GRPCRoute" => of(&mut self.grpc_routes, keep),
            "TLSRoute" => of(&mut self.tls_routes, keep),
            "TCPRoute" => of(&mut self.tcp_routes, keep),
            "XBackendTrafficPolicy" => of(&mut self.backend_traffic_policies, keep),
            "TrafficPolicy" => of(&mut self.traffic_policies, keep),
            _ => false,
        }
    }
}
