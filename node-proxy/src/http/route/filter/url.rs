//! RequestRedirect and URLRewrite, and the change of a path that both have (HTTPPathModifier).

use ::http::header::{HOST, LOCATION};
use ::http::uri::{Authority, PathAndQuery, Scheme};
use ::http::{HeaderValue, Response, StatusCode, Uri, request};
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::path_modifier::Modifier;

use super::RequestContext;

/// A redirect.
#[derive(Debug, Clone)]
pub struct Redirect {
    scheme: Option<Box<str>>,
    hostname: Option<Box<str>>,
    path: Option<PathChange>,
    port: Option<u16>,
    status: StatusCode,
}

/// A change of a request's host and path.
#[derive(Debug, Clone)]
pub struct Rewrite {
    hostname: Option<HeaderValue>,
    path: Option<PathChange>,
}

/// How a path changes. The query stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathChange {
    /// To this.
    Full(Box<str>),
    /// What the prefix matched becomes this.
    Prefix(Box<str>),
}

impl Redirect {
    pub(super) fn compile(redirect: &mesh::RequestRedirect) -> Result<Self, String> {
        let mesh::RequestRedirect {
            scheme,
            hostname,
            path,
            port,
            status_code,
        } = redirect;
        let status = match *status_code {
            301 => StatusCode::MOVED_PERMANENTLY,
            302 => StatusCode::FOUND,
            303 => StatusCode::SEE_OTHER,
            307 => StatusCode::TEMPORARY_REDIRECT,
            308 => StatusCode::PERMANENT_REDIRECT,
            code => {
                return Err(format!(
                    "requestRedirect.statusCode: {code} is none of 301, 302, 303, 307, 308"
                ));
            }
        };
        Ok(Self {
            scheme: match scheme.as_str() {
                "" => None,
                scheme => Some(
                    Scheme::try_from(scheme)
                        .map_err(|_| format!("requestRedirect.scheme: {scheme:?} is none"))?
                        .as_str()
                        .to_ascii_lowercase()
                        .into(),
                ),
            },
            hostname: match hostname.is_empty() {
                true => None,
                false => Some(host("requestRedirect.hostname", hostname)?.as_str().into()),
            },
            path: path_change("requestRedirect.path", path.as_ref())?,
            port: match *port {
                0 => None,
                port => Some(
                    u16::try_from(port)
                        .map_err(|_| format!("requestRedirect.port: {port} is no port"))?,
                ),
            },
            status,
        })
    }

    pub(super) fn answer(
        &self,
        request: &request::Parts,
        context: &RequestContext<'_>,
    ) -> Response<()> {
        let mut response = Response::new(());
        match HeaderValue::try_from(self.location(request, context)) {
            Ok(location) => {
                *response.status_mut() = self.status;
                response.headers_mut().insert(LOCATION, location);
            }
            // A Host that is not text.
            Err(_) => *response.status_mut() = StatusCode::BAD_REQUEST,
        }
        response
    }

    /// HTTPRequestRedirectFilter: `port` says which port, and when it is left out.
    fn location(&self, request: &request::Parts, context: &RequestContext<'_>) -> String {
        let scheme = self.scheme.as_deref().unwrap_or_else(|| {
            let scheme = request.uri.scheme_str();
            scheme.filter(|s| *s == "https").unwrap_or("http")
        });
        let well_known = match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        let port = self.port.unwrap_or(match &self.scheme {
            Some(_) => well_known.unwrap_or(context.service_port),
            None => context.service_port,
        });
        let path = match &self.path {
            Some(change) => change.apply(request.uri.path(), context.prefix),
            None => request.uri.path().to_owned(),
        };
        let mut location = String::new();
        let of_request = request_host(request);
        // Without any host (HTTP/1.0) the path alone still leads back to where the caller is.
        if let Some(host) = self.hostname.as_deref().or(of_request) {
            location.extend([scheme, "://", host]);
            if well_known != Some(port) {
                location.extend([":", &port.to_string()]);
            }
        }
        location.push_str(&path);
        if let Some(query) = request.uri.query()
            && !path.contains('?')
        {
            location.extend(["?", query]);
        }
        location
    }
}

impl Rewrite {
    pub(super) fn compile(rewrite: &mesh::UrlRewrite) -> Result<Self, String> {
        let hostname = match rewrite.hostname.as_str() {
            "" => None,
            hostname => {
                let field = "urlRewrite.hostname";
                let value = HeaderValue::from_str(host(field, hostname)?.as_str());
                Some(value.map_err(|_| format!("{field}: {hostname:?} is no host"))?)
            }
        };
        Ok(Self {
            hostname,
            path: path_change("urlRewrite.path", rewrite.path.as_ref())?,
        })
    }

    pub(super) fn apply(&self, request: &mut request::Parts, prefix: Option<&str>) {
        if let Some(hostname) = &self.hostname {
            set_host(request, hostname);
        }
        let Some(change) = &self.path else { return };
        let mut path = change.apply(request.uri.path(), prefix);
        if let Some(query) = request.uri.query()
            && !path.contains('?')
        {
            path.extend(["?", query]);
        }
        let mut uri = request.uri.clone().into_parts();
        // What was checked when it was compiled, and parts of a path that came from a request.
        let Ok(path) = PathAndQuery::try_from(path) else {
            return;
        };
        uri.path_and_query = Some(path);
        if let Ok(uri) = Uri::from_parts(uri) {
            request.uri = uri;
        }
    }
}

impl PathChange {
    /// `prefix`: what matched, without a trailing `/`. Without one a prefix cannot be replaced, and the path stays
    /// (the API allows it only with one prefix match).
    pub fn apply(&self, path: &str, prefix: Option<&str>) -> String {
        match self {
            Self::Full(new) => new.to_string(),
            Self::Prefix(new) => {
                let Some(rest) = prefix.and_then(|prefix| path.strip_prefix(prefix)) else {
                    return path.to_owned();
                };
                let new = new.strip_suffix('/').unwrap_or(new);
                match (new, rest) {
                    ("", "") => "/".to_owned(),
                    // What has no path (`*` of OPTIONS) has no prefix either.
                    (_, rest) if !rest.is_empty() && !rest.starts_with('/') => path.to_owned(),
                    (new, rest) => [new, rest].concat(),
                }
            }
        }
    }
}

/// Puts a host in the place where the request has it: `Host`, and the authority of HTTP/2 and of absolute forms.
pub(super) fn set_host(request: &mut request::Parts, host: &HeaderValue) {
    let authority = request.uri.authority().is_some();
    if authority && let Ok(new) = Authority::try_from(host.as_bytes()) {
        let mut uri = request.uri.clone().into_parts();
        uri.authority = Some(new);
        if let Ok(uri) = Uri::from_parts(uri) {
            request.uri = uri;
        }
    }
    if !authority || request.headers.contains_key(HOST) {
        request.headers.insert(HOST, host.clone());
    }
}

/// The request's host without a port.
fn request_host(request: &request::Parts) -> Option<&str> {
    let header = request.headers.get(HOST).and_then(|h| h.to_str().ok());
    let host = request.uri.authority().map(Authority::as_str).or(header)?;
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    // The colons of an IPv6 address are within brackets.
    let host = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    (!host.is_empty()).then_some(host)
}

fn host(field: &str, text: &str) -> Result<Authority, String> {
    Authority::try_from(text).map_err(|_| format!("{field}: {text:?} is no host"))
}

fn path_change(
    field: &str,
    modifier: Option<&mesh::PathModifier>,
) -> Result<Option<PathChange>, String> {
    let absolute = |path: &str| match path.starts_with('/') || path.is_empty() {
        true => path.to_owned(),
        false => format!("/{path}"),
    };
    let change = match modifier.and_then(|m| m.modifier.as_ref()) {
        None => return Ok(None),
        Some(Modifier::ReplaceFullPath(path)) if path.is_empty() => PathChange::Full("/".into()),
        Some(Modifier::ReplaceFullPath(path)) => PathChange::Full(absolute(path).into()),
        Some(Modifier::ReplacePrefixMatch(path)) => PathChange::Prefix(absolute(path).into()),
    };
    let (PathChange::Full(path) | PathChange::Prefix(path)) = &change;
    match path.is_empty() || PathAndQuery::try_from(&**path).is_ok() {
        true => Ok(Some(change)),
        false => Err(format!("{field}: {path:?} is no path")),
    }
}
