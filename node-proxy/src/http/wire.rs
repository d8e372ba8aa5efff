//! What crosses the tunnel for one HTTP request, and what is taken off and put on at either end.
//!
//! A request is an HTTP/2 request of its own: the app's pseudo-headers and headers, and beside them
//! `warren-target` (the pod's address and port), `warren-source` (the caller's address), `warren-service`
//! (`namespace/name:port`, if a Service was addressed), `warren-version` (what the app speaks), `warren-case` (how an
//! HTTP/1 app spelled its header names), `warren-connect-timeout` (milliseconds, if a policy has one) and `warren-retries` (the
//! caller's proxy sends it again where that is harmless). An HTTP/1 app's `Host` stays a header, so that it arrives
//! untouched.
//! An upgrade is an extended CONNECT (RFC 8441) whose `:protocol` is the first token of `Upgrade`, and an
//! app's own CONNECT one whose `:protocol` is [`CONNECT_PROTOCOL`]. What is large of a large head goes before the
//! body ([`pack`]).
//!
//! Invariant: no header that begins with `warren-` or `warren_` passes from an app to the mesh or back; those on the
//! tunnel are written by a proxy and removed by the next one ([`mesh_api::headers::is_reserved`]).

use std::fmt;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use h2::ext::Protocol as ExtendedProtocol;
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Method, StatusCode, Version, response};
use mesh_api::errors::ProxyError;
use mesh_api::headers::is_reserved;
use mesh_api::names::PROXY_ERROR_HEADER;

use super::h1::{AbsoluteForm, HeaderCase, remove_hop_by_hop};

/// `:protocol` of an app's own CONNECT.
pub const CONNECT_PROTOCOL: &str = "warren-connect";

const TARGET: HeaderName = HeaderName::from_static("warren-target");
const SOURCE: HeaderName = HeaderName::from_static("warren-source");
const SERVICE: HeaderName = HeaderName::from_static("warren-service");
const VERSION: HeaderName = HeaderName::from_static("warren-version");
const CASE: HeaderName = HeaderName::from_static("warren-case");
const ERROR: HeaderName = HeaderName::from_static(PROXY_ERROR_HEADER);
const AUTHORITY: HeaderName = HeaderName::from_static("warren-authority");
/// The method of an upgrade, if it is not GET.
const METHOD: HeaderName = HeaderName::from_static("warren-method");
const CONNECT_TIMEOUT: HeaderName = HeaderName::from_static("warren-connect-timeout");
const RETRIES: HeaderName = HeaderName::from_static("warren-retries");
/// Headers of a proxy's own beside those of a message.
const MOST_OWN: usize = 8;

/// What a request on a tunnel says beside the app's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The pod and port it is for.
    pub target: SocketAddr,
    /// The caller's address.
    pub source: IpAddr,
    /// `namespace/name:port` of the Service whose endpoint it is.
    pub service: Option<Arc<str>>,
    /// How long the connection to the app may take, if a policy says so.
    pub connect: Option<Duration>,
    /// The caller's proxy sends the request again that the app did not process, or closed a kept connection under.
    pub retries: bool,
}

/// Removes what only proxies may say. Returns whether there was any of it.
pub fn strip(headers: &mut HeaderMap) -> bool {
    let forged: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_reserved(name.as_str()))
        .cloned()
        .collect();
    for name in &forged {
        headers.remove(name);
    }
    !forged.is_empty()
}

/// Turns an app's request into the one that goes through the tunnel.
pub fn seal(parts: &mut Parts, envelope: &Envelope) -> Result<(), ProxyError> {
    let headers = &mut parts.headers;
    headers.reserve(MOST_OWN);
    headers.insert(TARGET, text(format_args!("{}", envelope.target))?);
    headers.insert(SOURCE, text(format_args!("{}", envelope.source))?);
    if let Some(service) = &envelope.service {
        headers.insert(SERVICE, value(service)?);
    }
    headers.insert(VERSION, HeaderValue::from_static(version(parts.version)));
    if envelope.retries {
        headers.insert(RETRIES, HeaderValue::from_static("1"));
    }
    if let Some(connect) = envelope.connect {
        let millis = u64::try_from(connect.as_millis()).unwrap_or(u64::MAX);
        headers.insert(CONNECT_TIMEOUT, HeaderValue::from(millis));
    }
    if let Some(case) = parts.extensions.remove::<HeaderCase>() {
        headers.insert(CASE, case.encode());
    }
    if let Some(protocol) = tunnelled_protocol(parts)? {
        if parts.method == Method::CONNECT {
            // An extended CONNECT has a path and a scheme; what was asked for goes beside them.
            let authority = parts.uri.authority().ok_or(ProxyError::BadRequest)?;
            parts.headers.insert(AUTHORITY, value(authority.as_str())?);
            parts.uri = http::Uri::from_static("http://connect.warren/");
        } else if parts.method != Method::GET {
            parts.headers.insert(METHOD, value(parts.method.as_str())?);
        }
        parts.method = Method::CONNECT;
        parts.headers.remove(UPGRADE);
        // Of no use where what follows has no end that is known; HTTP/2 would hold the stream to it.
        parts.headers.remove(CONTENT_LENGTH);
        parts.extensions.insert(protocol);
    }
    if parts.version == Version::HTTP_2 && parts.uri.authority().is_none() {
        // A request with `host` in its place (RFC 9113, 8.3.1), which the codec takes of HTTP/1 only.
        parts.version = Version::HTTP_11;
    }
    Ok(())
}

/// Takes a request that came through a tunnel apart: what the proxies say, and the app's own request.
pub fn open(parts: &mut Parts) -> Result<Envelope, ProxyError> {
    let headers = &mut parts.headers;
    let names = [TARGET, SOURCE, SERVICE, VERSION, CASE, AUTHORITY, METHOD];
    let [target, source, service, version, case, authority, method] =
        names.map(|name| headers.remove(name));
    let [connect, retries] = [CONNECT_TIMEOUT, RETRIES].map(|name| headers.remove(name));
    // What a newer peer may say beside it.
    strip(headers);
    let target: SocketAddr = parse(target)?;
    let envelope = Envelope {
        target: SocketAddr::new(target.ip().to_canonical(), target.port()),
        source: parse::<IpAddr>(source)?.to_canonical(),
        service: match service {
            None => None,
            Some(value) => Some(value.to_str().map_err(|_| ProxyError::BadRequest)?.into()),
        },
        connect: match connect {
            None => None,
            millis => Some(Duration::from_millis(parse(millis)?)),
        },
        retries: retries.is_some(),
    };
    parts.version = match version.as_ref().map(HeaderValue::as_bytes) {
        Some(b"1.0") => Version::HTTP_10,
        Some(b"1.1") => Version::HTTP_11,
        Some(b"2") => Version::HTTP_2,
        _ => return Err(ProxyError::BadRequest),
    };
    if let Some(case) = case {
        let case = HeaderCase::decode(&case).ok_or(ProxyError::BadRequest)?;
        parts.extensions.insert(case);
    }
    if let Some(protocol) = parts.extensions.remove::<ExtendedProtocol>() {
        if protocol.as_str() == CONNECT_PROTOCOL {
            let authority = authority.ok_or(ProxyError::BadRequest)?;
            parts.uri =
                http::Uri::try_from(authority.as_bytes()).map_err(|_| ProxyError::BadRequest)?;
        } else if parts.version == Version::HTTP_2 {
            // The app's own extended CONNECT.
            parts.extensions.insert(protocol);
        } else {
            let value =
                HeaderValue::from_str(protocol.as_str()).map_err(|_| ProxyError::BadRequest)?;
            parts.method = match method {
                None => Method::GET,
                Some(name) => Method::from_bytes(name.as_bytes())
                    .ok()
                    .filter(|method| *method != Method::CONNECT)
                    .ok_or(ProxyError::BadRequest)?,
            };
            // The codec adds `Connection: upgrade`.
            parts.headers.insert(UPGRADE, value);
        }
    }
    // A target in origin form comes without a scheme: there was no authority to go with it.
    let of_http1 = parts.version != Version::HTTP_2 && parts.method != Method::CONNECT;
    if of_http1 && parts.uri.scheme().is_some() {
        parts.extensions.insert(AbsoluteForm);
    }
    Ok(envelope)
}

/// Prepares an answer for the tunnel. What an app says in the proxies' name has been stripped before.
pub fn seal_response(parts: &mut response::Parts) {
    parts
        .headers
        .insert(VERSION, HeaderValue::from_static(version(parts.version)));
    if let Some(case) = parts.extensions.remove::<HeaderCase>() {
        parts.headers.insert(CASE, case.encode());
    }
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        // RFC 8441, section 5: the answer to an extended CONNECT is 200.
        parts.status = StatusCode::OK;
    }
    // Chosen with 101, or asked for with 426. HTTP/2 forbids `upgrade` itself.
    if let Some(protocol) = parts.headers.remove(UPGRADE) {
        parts.headers.insert(UPGRADED, protocol);
    }
}

/// The error that a proxy names in its own answer. One that this version does not know: [`ProxyError::PeerRefused`].
pub fn error(headers: &HeaderMap) -> Option<ProxyError> {
    headers.get(ERROR).map(named)
}

fn named(value: &HeaderValue) -> ProxyError {
    let known = value.to_str().ok().and_then(ProxyError::from_name);
    known.unwrap_or(ProxyError::PeerRefused)
}

/// Takes what an app may not say, and what ends at this hop, off the headers of its message. An upgrade stays: the codec
/// writes what belongs to it.
pub fn clean(headers: &mut HeaderMap) {
    strip(headers);
    if let Some(protocol) = remove_hop_by_hop(headers) {
        headers.insert(UPGRADE, protocol);
    }
}

/// Whether a request asks for its connection to become something else than HTTP.
pub fn is_upgrade(parts: &Parts) -> bool {
    parts.version != Version::HTTP_2
        && (parts.method == Method::CONNECT || parts.headers.contains_key(UPGRADE))
}

/// Takes an answer that came through a tunnel apart. The error that the callee's proxy named, if the answer is its own.
pub fn open_response(parts: &mut response::Parts) -> Option<ProxyError> {
    let names = [ERROR, VERSION, CASE, UPGRADED];
    let [error, version, case, upgraded] = names.map(|name| parts.headers.remove(name));
    strip(&mut parts.headers);
    parts.version = match version.as_ref().map(HeaderValue::as_bytes) {
        Some(b"1.0") => Version::HTTP_10,
        Some(b"1.1") => Version::HTTP_11,
        _ => Version::HTTP_2,
    };
    if let Some(case) = case.as_ref().and_then(HeaderCase::decode) {
        parts.extensions.insert(case);
    }
    if let Some(protocol) = upgraded {
        if parts.status == StatusCode::OK {
            parts.status = StatusCode::SWITCHING_PROTOCOLS;
        }
        parts.headers.insert(UPGRADE, protocol);
    }
    error.as_ref().map(named)
}

const UPGRADED: HeaderName = HeaderName::from_static("warren-upgraded");

fn tunnelled_protocol(parts: &Parts) -> Result<Option<ExtendedProtocol>, ProxyError> {
    if parts.version == Version::HTTP_2 {
        // Its own extended CONNECT goes as it is; a plain one as any other app's.
        let plain =
            parts.method == Method::CONNECT && parts.extensions.get::<ExtendedProtocol>().is_none();
        return Ok(plain.then(|| ExtendedProtocol::from_static(CONNECT_PROTOCOL)));
    }
    if parts.method == Method::CONNECT {
        return Ok(Some(ExtendedProtocol::from_static(CONNECT_PROTOCOL)));
    }
    let Some(upgrade) = parts.headers.get(UPGRADE) else {
        return Ok(None);
    };
    let upgrade = upgrade.to_str().map_err(|_| ProxyError::BadRequest)?;
    Ok(Some(ExtendedProtocol::from(upgrade)))
}

fn parse<T: std::str::FromStr>(value: Option<HeaderValue>) -> Result<T, ProxyError> {
    value
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .ok_or(ProxyError::BadRequest)
}

fn text(address: fmt::Arguments<'_>) -> Result<HeaderValue, ProxyError> {
    // The longest is an IPv6 address with a scope and a port.
    let mut text = [0; 64];
    let mut rest = &mut text[..];
    rest.write_fmt(address).map_err(|_| ProxyError::Internal)?;
    let left = rest.len();
    HeaderValue::from_bytes(&text[..text.len() - left]).map_err(|_| ProxyError::Internal)
}

fn value(text: &str) -> Result<HeaderValue, ProxyError> {
    HeaderValue::from_str(text).map_err(|_| ProxyError::Internal)
}

const fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 | Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod large;
#[cfg(test)]
mod tests;

pub use large::{HEAD, pack, packed, unpack};
