//! Session persistence (GEP-1619): requests of one session go to one endpoint for as long as it is usable.
//!
//! The token is the endpoint's address, opaque to callers. A forged one gains nothing: it selects among the
//! endpoints that the route sends to anyway, and one that is none of them counts as no token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ::http::header::{COOKIE, SET_COOKIE};
use ::http::{HeaderMap, HeaderName, HeaderValue};
use data_encoding::BASE64URL_NOPAD;
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::SessionPersistenceType;

/// How sessions are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    carrier: Carrier,
    /// From the session's first request. `None`: it does not end by itself.
    absolute_timeout: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Carrier {
    Cookie {
        name: Arc<str>,
        path: Option<Arc<str>>,
        permanent: bool,
    },
    Header(HeaderName),
}

/// A session as a request names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Where its requests go.
    pub endpoint: SocketAddr,
    /// Seconds since 1970 when it began.
    pub began: u64,
}

impl Session {
    /// `owner` is what it is declared by; sessions without a name are named after it. `path` is what a cookie is for;
    /// `None`: the cookie does not say, as one of a Service must not (GEP-1619, "Path").
    pub(crate) fn compile(
        session: &mesh::SessionPersistence,
        owner: &str,
        path: Option<&str>,
    ) -> Result<Self, String> {
        let field = "sessionPersistence";
        let timeout = session.absolute_timeout_ms;
        let name = match session.session_name.as_str() {
            "" => format!("warren-session-{}", owner.replace(['/', '.'], "-")),
            name => name.to_owned(),
        };
        let header = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| format!("{field}.sessionName: {name:?} is no token"))?;
        let carrier = match SessionPersistenceType::try_from(session.r#type) {
            Ok(SessionPersistenceType::Header) => Carrier::Header(header),
            Ok(SessionPersistenceType::Cookie) => Carrier::Cookie {
                name: name.into(),
                path: path.map(|path| match path.contains([';', ',']) {
                    true => "/".into(),
                    false => path.into(),
                }),
                permanent: session.permanent,
            },
            Err(_) => {
                return Err(format!(
                    "{field}.type: {} is not known to this proxy",
                    session.r#type
                ));
            }
        };
        Ok(Self {
            carrier,
            absolute_timeout: (timeout > 0).then(|| Duration::from_millis(timeout)),
        })
    }

    /// The session a request belongs to, unless it has ended. `now`: seconds since 1970.
    pub fn token(&self, request: &HeaderMap, now: u64) -> Option<Token> {
        let token = match &self.carrier {
            Carrier::Header(name) => Token::decode(request.get(name)?.to_str().ok()?)?,
            Carrier::Cookie { name, .. } => {
                // Of several cookies of one name the most specific comes first (RFC 6265, 5.4).
                let cookies = request.get_all(COOKIE).iter();
                let pairs = cookies
                    .filter_map(|c| c.to_str().ok())
                    .flat_map(|c| c.split(';'));
                let mut values = pairs.filter_map(|pair| {
                    let (key, value) = pair.trim().split_once('=')?;
                    (*key == **name).then(|| value.trim_matches('"'))
                });
                Token::decode(values.next()?)?
            }
        };
        let ended = |limit: Duration| now.saturating_sub(token.began) >= limit.as_secs().max(1);
        (!self.absolute_timeout.is_some_and(ended) && token.began <= now + SKEW).then_some(token)
    }

    /// Tells the caller of its session: the answer to the first request of one, and to any whose endpoint had to
    /// change, carries it. `began`: of the session that goes on with another endpoint, else `now`.
    pub fn announce(&self, endpoint: SocketAddr, began: u64, now: u64, response: &mut HeaderMap) {
        let token = Token { endpoint, began }.encode();
        match &self.carrier {
            Carrier::Header(name) => {
                if let Ok(value) = HeaderValue::try_from(token) {
                    response.insert(name.clone(), value);
                }
            }
            Carrier::Cookie {
                name,
                path,
                permanent,
            } => {
                let mut cookie = format!("{name}={token}");
                if let Some(path) = path {
                    cookie.push_str(&format!("; Path={path}"));
                }
                cookie.push_str("; HttpOnly; SameSite=Lax");
                if let Some(timeout) = self.absolute_timeout.filter(|_| *permanent) {
                    let left = timeout
                        .as_secs()
                        .max(1)
                        .saturating_sub(now.saturating_sub(began));
                    cookie.push_str(&format!("; Max-Age={left}"));
                }
                if let Ok(value) = HeaderValue::try_from(cookie) {
                    response.append(SET_COOKIE, value);
                }
            }
        }
    }
}

impl Token {
    fn encode(self) -> String {
        BASE64URL_NOPAD.encode(format!("{} {:x}", self.endpoint, self.began).as_bytes())
    }

    fn decode(text: &str) -> Option<Self> {
        if text.len() > MAX_TOKEN {
            return None;
        }
        let plain = BASE64URL_NOPAD.decode(text.as_bytes()).ok()?;
        let (endpoint, began) = std::str::from_utf8(&plain).ok()?.split_once(' ')?;
        Some(Self {
            endpoint: endpoint.parse().ok()?,
            began: u64::from_str_radix(began, 16).ok()?,
        })
    }
}

/// Nodes' clocks differ by less; a session that begins later than that is forged, to last for ever.
const SKEW: u64 = 300;
/// An IPv6 address with scope and port, and a time, encoded.
const MAX_TOKEN: usize = 128;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
