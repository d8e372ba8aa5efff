//! Services as routes name them: parents and backends.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use mesh_api::names;
use mesh_api::proto::mesh::RouteKind;

use crate::providers::NamespacedName;
use crate::providers::gateway::{BackendReference, ParentReference};

/// All Services.
#[derive(Clone, Copy)]
pub(in crate::model) struct Services<'a>(
    pub(in crate::model) &'a BTreeMap<NamespacedName, Arc<k8s::Service>>,
);

/// A Service that a route is attached to.
pub(super) struct Parent<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    /// The ports that the reference means and the route's kind can be used on.
    pub(super) ports: Vec<u32>,
    /// These are all that the reference means.
    pub(super) is_whole: bool,
}

/// Why a reference to a backend cannot be used: reason and message.
pub(super) type Unresolved = (&'static str, String);

impl<'a> Services<'a> {
    pub(in crate::model) fn get(self, namespace: &str, name: &str) -> Option<&'a k8s::Service> {
        let key = (namespace.to_owned(), name.to_owned());
        self.0.get(&key).map(|s| &**s)
    }

    /// The Service that a parent reference means.
    pub(super) fn parent(
        self,
        reference: &ParentReference,
        route_namespace: &str,
        kind: RouteKind,
    ) -> Result<Parent<'a>, String> {
        let namespace = reference.namespace.as_deref().unwrap_or(route_namespace);
        let name = &reference.name;
        let key = (namespace.to_owned(), name.clone());
        let Some(((namespace, name), service)) = self.0.get_key_value(&key) else {
            return Err(format!("there is no Service {namespace}/{name}"));
        };
        let what = format!("Service {namespace}/{name}");
        if is_external(service) {
            return Err(format!(
                "{what} is an ExternalName, which has no address to route"
            ));
        }
        if is_headless(service) {
            return Err(format!("{what} is headless: pod addresses are not routed"));
        }
        let section = reference.section_name.as_deref();
        let meant: Vec<&k8s::ServicePort> = tcp_ports(service)
            .filter(|p| {
                reference
                    .port
                    .is_none_or(|number| number == i64::from(p.port))
            })
            .filter(|p| section.is_none_or(|name| p.name.as_deref().unwrap_or_default() == name))
            .collect();
        if meant.is_empty() {
            let number = reference.port.map(|p| format!(" {p}")).unwrap_or_default();
            let name = section.map(|s| format!(" named {s}")).unwrap_or_default();
            return Err(format!("{what} has no TCP port{number}{name}"));
        }
        let is_http = matches!(kind, RouteKind::Http | RouteKind::Grpc);
        let ports: Vec<u32> = meant
            .iter()
            .filter(|p| !is_http || is_http_like(p.app_protocol.as_deref()))
            .filter_map(|p| u32::try_from(p.port).ok())
            .collect();
        if ports.is_empty() {
            let protocol = meant[0].app_protocol.as_deref().unwrap_or_default();
            return Err(format!(
                "{what} has appProtocol {protocol} there, which is not HTTP"
            ));
        }
        Ok(Parent {
            namespace,
            name,
            is_whole: ports.len() == meant.len(),
            ports,
        })
    }

    /// Whether a backend can be used by a route of that kind.
    pub(super) fn backend(
        self,
        backend: &BackendReference,
        route_namespace: &str,
        kind: RouteKind,
    ) -> Result<(), Unresolved> {
        let group = backend.group.as_deref().unwrap_or_default();
        let of_kind = backend.kind.as_deref().unwrap_or("Service");
        if !group.is_empty() || of_kind != "Service" {
            let of_kind = match group {
                "" => of_kind.to_owned(),
                group => format!("{of_kind}.{group}"),
            };
            let message = format!("{of_kind} {} is no Service", backend.name);
            return Err(("InvalidKind", message));
        }
        let namespace = backend.namespace.as_deref().unwrap_or(route_namespace);
        let what = format!("Service {namespace}/{}", backend.name);
        let Some(service) = self.get(namespace, &backend.name) else {
            return Err(("BackendNotFound", format!("there is no {what}")));
        };
        if is_external(service) {
            return Err(("InvalidKind", format!("{what} is an ExternalName")));
        }
        let number = backend.port.unwrap_or_default();
        let Some(port) = tcp_ports(service).find(|p| i64::from(p.port) == number) else {
            let message = format!("{what} has no TCP port {number}");
            return Err(("BackendNotFound", message));
        };
        let protocol = port.app_protocol.as_deref();
        let is_http = matches!(kind, RouteKind::Http | RouteKind::Grpc);
        if is_http && !is_http_like(protocol) {
            let protocol = protocol.unwrap_or_default();
            let message =
                format!("{what} has appProtocol {protocol} on port {number}, which is not HTTP");
            return Err(("UnsupportedProtocol", message));
        }
        Ok(())
    }
}

/// What the proxies speak HTTP to (GEP-1911), TLS not among it.
fn is_http_like(app_protocol: Option<&str>) -> bool {
    let protocol = app_protocol.unwrap_or_default();
    protocol.is_empty() || names::is_http(protocol)
}

fn is_external(service: &k8s::Service) -> bool {
    let spec = service.spec.as_ref();
    spec.and_then(|s| s.type_.as_deref()) == Some("ExternalName")
}

fn is_headless(service: &k8s::Service) -> bool {
    let spec = service.spec.as_ref();
    spec.and_then(|s| s.cluster_ip.as_deref()) == Some("None")
}

fn tcp_ports(service: &k8s::Service) -> impl Iterator<Item = &k8s::ServicePort> {
    let ports = service.spec.iter().flat_map(|s| s.ports.iter().flatten());
    ports.filter(|p| matches!(p.protocol.as_deref(), None | Some("" | "TCP")))
}
