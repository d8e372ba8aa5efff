//! HTTPRoute, GRPCRoute, TLSRoute and TCPRoute.

use serde::{Deserialize, Serialize};

use super::{GROUP, RouteFilter, SessionPersistence};

/// What an HTTPRoute says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteSpec {
    /// What it is attached to.
    #[serde(default)]
    pub parent_refs: Vec<ParentReference>,
    /// For Gateways; a mesh goes by the Service's address.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// For Gateways.
    pub use_default_gateways: Option<String>,
    /// Absent: one that matches everything and has no backend.
    pub rules: Option<Vec<HttpRouteRule>>,
}

/// One rule of an HTTPRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteRule {
    /// Name (GEP-995).
    pub name: Option<String>,
    /// OR. None: everything.
    #[serde(default)]
    pub matches: Vec<HttpRouteMatch>,
    /// What happens to requests and responses.
    #[serde(default)]
    pub filters: Vec<RouteFilter>,
    /// Where requests go.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
    /// GEP-1742.
    pub timeouts: Option<HttpTimeouts>,
    /// GEP-1731.
    pub retry: Option<HttpRetry>,
    /// GEP-1619.
    pub session_persistence: Option<SessionPersistence>,
}

/// AND of what is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteMatch {
    /// Unset: prefix `/`.
    pub path: Option<HttpPathMatch>,
    /// Of one name only the first counts.
    #[serde(default)]
    pub headers: Vec<NamedMatch>,
    /// Of one name only the first counts.
    #[serde(default)]
    pub query_params: Vec<NamedMatch>,
    /// Unset: any.
    pub method: Option<String>,
}

/// A path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpPathMatch {
    /// `Exact`, `PathPrefix` (unless set) or `RegularExpression`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// `/` unless set.
    pub value: Option<String>,
}

/// A header or query parameter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedMatch {
    /// `Exact` (unless set) or `RegularExpression`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
}

/// GEP-1742.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpTimeouts {
    /// Of the whole request, retries included.
    pub request: Option<String>,
    /// Of each attempt.
    pub backend_request: Option<String>,
}

/// GEP-1731.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRetry {
    /// Status codes that are tried again.
    #[serde(default)]
    pub codes: Vec<i64>,
    /// How often a request is tried again.
    pub attempts: Option<i64>,
    /// The shortest pause before that.
    pub backoff: Option<String>,
}

/// What a GRPCRoute says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteSpec {
    /// What it is attached to.
    #[serde(default)]
    pub parent_refs: Vec<ParentReference>,
    /// For Gateways; a mesh goes by the Service's address.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// For Gateways.
    pub use_default_gateways: Option<String>,
    /// Rules.
    #[serde(default)]
    pub rules: Vec<GrpcRouteRule>,
}

/// One rule of a GRPCRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteRule {
    /// Name (GEP-995).
    pub name: Option<String>,
    /// OR. None: everything.
    #[serde(default)]
    pub matches: Vec<GrpcRouteMatch>,
    /// What happens to requests and responses.
    #[serde(default)]
    pub filters: Vec<RouteFilter>,
    /// Where calls go.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
    /// GEP-1619.
    pub session_persistence: Option<SessionPersistence>,
}

/// AND of what is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteMatch {
    /// Unset: any.
    pub method: Option<GrpcMethodMatch>,
    /// Of one name only the first counts.
    #[serde(default)]
    pub headers: Vec<NamedMatch>,
}

/// A service, a method, or both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcMethodMatch {
    /// `Exact` (unless set) or `RegularExpression`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Unset: any.
    pub service: Option<String>,
    /// Unset: any.
    pub method: Option<String>,
}

/// What a TLSRoute says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TlsRouteSpec {
    /// What it is attached to.
    #[serde(default)]
    pub parent_refs: Vec<ParentReference>,
    /// Server names.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// For Gateways.
    pub use_default_gateways: Option<String>,
    /// One rule.
    #[serde(default)]
    pub rules: Vec<L4RouteRule>,
}

/// What a TCPRoute says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TcpRouteSpec {
    /// What it is attached to.
    #[serde(default)]
    pub parent_refs: Vec<ParentReference>,
    /// For Gateways.
    pub use_default_gateways: Option<String>,
    /// One rule.
    #[serde(default)]
    pub rules: Vec<L4RouteRule>,
}

/// The rule of a TLSRoute or TCPRoute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct L4RouteRule {
    /// Name (GEP-995).
    pub name: Option<String>,
    /// Where connections go.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
}

/// What a route is attached to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentReference {
    /// `gateway.networking.k8s.io` unless set; empty for Services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// `Gateway` unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The route's own unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Name of the Service's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// Number of the Service's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<i64>,
}

impl ParentReference {
    /// Whether it is a Service (GEP-1294): `group: ""`, `kind: Service`.
    pub fn is_service(&self) -> bool {
        self.group.as_deref().unwrap_or(GROUP).is_empty() && self.kind.as_deref() == Some("Service")
    }
}

/// Where requests go, without weight: of mirrors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendReference {
    /// Empty (the core group) unless set.
    pub group: Option<String>,
    /// `Service` unless set.
    pub kind: Option<String>,
    /// Name.
    pub name: String,
    /// The route's own unless set.
    pub namespace: Option<String>,
    /// Number of the Service's port.
    pub port: Option<i64>,
}

/// Where requests go.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRef {
    /// Empty (the core group) unless set.
    pub group: Option<String>,
    /// `Service` unless set.
    pub kind: Option<String>,
    /// Name.
    pub name: String,
    /// The route's own unless set.
    pub namespace: Option<String>,
    /// Number of the Service's port.
    pub port: Option<i64>,
    /// Share of the sum of the rule's weights; 1 unless set.
    pub weight: Option<i64>,
    /// What happens to requests of this backend.
    #[serde(default)]
    pub filters: Vec<RouteFilter>,
}

impl BackendRef {
    /// Which object is meant.
    pub fn reference(&self) -> BackendReference {
        BackendReference {
            group: self.group.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            port: self.port,
        }
    }
}
