//! Where the objects come from that users write: a directory of manifests (Kubernetes' API follows).

pub mod directory;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

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
}
