//! The objects of the Gateway API (v1.6) that Warren reads.
//!
//! Own types and not the crate `gateway-api`: that one follows v1.5 (no TCPRoute v1) and another version of
//! `k8s-openapi`. What the specification makes an enum is text here: a value that is not known, as it may come
//! with a newer CRD, must cost one rule and not the object (`check` names it, the model judges it).

pub(crate) mod check;
mod duration;
mod filters;
mod routes;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

pub(crate) use duration::duration;
pub use filters::{
    CookieConfig, Cors, Fraction, Header, HeaderModifier, LocalReference, PathModifier,
    RequestMirror, RequestRedirect, RouteFilter, SessionPersistence, UrlRewrite,
};
pub use routes::{
    BackendRef, BackendReference, GrpcMethodMatch, GrpcRouteMatch, GrpcRouteRule, GrpcRouteSpec,
    HttpPathMatch, HttpRetry, HttpRouteMatch, HttpRouteRule, HttpRouteSpec, HttpTimeouts,
    L4RouteRule, NamedMatch, ParentReference, TcpRouteSpec, TlsRouteSpec,
};

/// Group of the routes.
pub const GROUP: &str = "gateway.networking.k8s.io";

/// An object of a kind that comes with a CRD.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Custom<S> {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What the user wants.
    pub spec: S,
    /// What controllers have said; not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<serde_json::Value>,
}

impl<S> Custom<S> {
    /// `metadata.creationTimestamp`, seconds since 1970; 0 if it has none.
    pub fn created(&self) -> i64 {
        let created = self.metadata.creation_timestamp.as_ref();
        created.map_or(0, |time| time.0.as_second())
    }
}

/// HTTP requests.
pub type HttpRoute = Custom<HttpRouteSpec>;
/// gRPC calls.
pub type GrpcRoute = Custom<GrpcRouteSpec>;
/// TLS connections, by server name.
pub type TlsRoute = Custom<TlsRouteSpec>;
/// TCP connections.
pub type TcpRoute = Custom<TcpRouteSpec>;
/// XBackendTrafficPolicy (GEP-3388, GEP-1619).
pub type BackendTrafficPolicy = Custom<BackendTrafficPolicySpec>;

/// What an XBackendTrafficPolicy says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendTrafficPolicySpec {
    /// The Services it is for, in its own namespace.
    #[serde(default)]
    pub target_refs: Vec<LocalReference>,
    /// How far retries may add to the load.
    pub retry_constraint: Option<RetryConstraint>,
    /// Requests of a session go to one endpoint.
    pub session_persistence: Option<SessionPersistence>,
}

/// How far retries may add to the load (GEP-3388).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RetryConstraint {
    /// Retries as a share of the requests.
    pub budget: Option<BudgetDetails>,
    /// Retries that are allowed in any case.
    pub min_retry_rate: Option<RequestRate>,
}

/// Retries as a share of the requests of an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BudgetDetails {
    /// 0 to 100, 20 unless set.
    pub percent: Option<i64>,
    /// 1 s to 1 h, 10 s unless set.
    pub interval: Option<String>,
}

/// A number of requests in an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestRate {
    /// 1 to 1,000,000, 10 unless set.
    pub count: Option<i64>,
    /// Up to 1 h, 1 s unless set.
    pub interval: Option<String>,
}
