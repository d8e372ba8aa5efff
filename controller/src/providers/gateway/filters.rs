//! Filters of routes, and session persistence.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::BackendReference;

/// One filter. `type` says which of the others is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteFilter {
    /// Which filter it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// Changes the request's headers.
    pub request_header_modifier: Option<HeaderModifier>,
    /// Changes the response's headers.
    pub response_header_modifier: Option<HeaderModifier>,
    /// Sends a copy somewhere else.
    pub request_mirror: Option<RequestMirror>,
    /// Answers with a redirect.
    pub request_redirect: Option<RequestRedirect>,
    /// Changes host or path.
    #[serde(rename = "urlRewrite")]
    pub url_rewrite: Option<UrlRewrite>,
    /// Answers preflights and adds CORS headers.
    pub cors: Option<Cors>,
    /// Not supported.
    pub external_auth: Option<Value>,
    /// An implementation's own filter; Warren has none.
    pub extension_ref: Option<LocalReference>,
}

/// An object of the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalReference {
    /// Group; empty for the core group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
}

/// Changes headers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeaderModifier {
    /// Replaces.
    #[serde(default)]
    pub set: Vec<Header>,
    /// Appends.
    #[serde(default)]
    pub add: Vec<Header>,
    /// Removes.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// A header.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    /// Name, in any case.
    pub name: String,
    /// Value.
    pub value: String,
}

/// Sends a copy of the request to one endpoint and forgets the answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestMirror {
    /// Where to.
    pub backend_ref: BackendReference,
    /// Share of the requests; not with `fraction`.
    pub percent: Option<i64>,
    /// Share of the requests; not with `percent`.
    pub fraction: Option<Fraction>,
}

/// A share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fraction {
    /// At most the denominator.
    pub numerator: i64,
    /// At least 1; 100 unless set.
    pub denominator: Option<i64>,
}

/// Answers with a redirect.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestRedirect {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// Host of the Location.
    pub hostname: Option<String>,
    /// Path of the Location.
    pub path: Option<PathModifier>,
    /// Port of the Location.
    pub port: Option<i64>,
    /// 301, 302 (unless set), 303, 307 or 308.
    pub status_code: Option<i64>,
}

/// Changes host or path of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UrlRewrite {
    /// The new Host.
    pub hostname: Option<String>,
    /// The new path.
    pub path: Option<PathModifier>,
}

/// A new path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PathModifier {
    /// `ReplaceFullPath` or `ReplacePrefixMatch`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For `ReplaceFullPath`.
    pub replace_full_path: Option<String>,
    /// For `ReplacePrefixMatch`.
    pub replace_prefix_match: Option<String>,
}

/// CORS (GEP-1767).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cors {
    /// Who may call.
    #[serde(default)]
    pub allow_origins: Vec<String>,
    /// Whether with credentials.
    pub allow_credentials: Option<bool>,
    /// With which methods.
    #[serde(default)]
    pub allow_methods: Vec<String>,
    /// With which headers.
    #[serde(default)]
    pub allow_headers: Vec<String>,
    /// Which headers of the answer scripts may read.
    #[serde(default)]
    pub expose_headers: Vec<String>,
    /// Seconds for which a preflight counts; 5 unless set.
    pub max_age: Option<i64>,
}

/// Requests of a session go to one endpoint (GEP-1619).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionPersistence {
    /// Name of the cookie or header.
    pub session_name: Option<String>,
    /// How long a session lasts at most.
    pub absolute_timeout: Option<String>,
    /// `Cookie` (unless set) or `Header`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Only with `Cookie`.
    pub cookie_config: Option<CookieConfig>,
}

/// How long browsers keep the cookie.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CookieConfig {
    /// `Session` (unless set) or `Permanent`.
    pub lifetime_type: Option<String>,
}
