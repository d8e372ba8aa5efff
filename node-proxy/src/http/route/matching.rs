//! What a match asks of a request besides its path: method, headers, query parameters.

use std::borrow::Cow;

use ::http::header::{ACCESS_CONTROL_REQUEST_METHOD, COOKIE, HOST, ORIGIN};
use ::http::request::Parts;
use ::http::{HeaderName, Method};
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::MatchType;
use regex::Regex;

/// How a text must look.
#[derive(Debug, Clone)]
pub(super) enum TextMatch {
    Exact(Box<str>),
    Regex(Regex),
}

impl TextMatch {
    /// `field` is for the message.
    pub(super) fn compile(field: &str, text: &mesh::StringMatch) -> Result<Self, String> {
        match MatchType::try_from(text.r#type) {
            Ok(MatchType::Exact) => Ok(Self::Exact(text.value.as_str().into())),
            Ok(MatchType::Regex) => Ok(Self::Regex(regex(field, &text.value)?)),
            Ok(MatchType::Prefix) => Err(format!("{field}: only paths have prefixes")),
            Err(_) => Err(format!(
                "{field}: type {} is not known to this proxy",
                text.r#type
            )),
        }
    }

    pub(super) fn is_match(&self, text: &str) -> bool {
        match self {
            Self::Exact(wanted) => **wanted == *text,
            Self::Regex(wanted) => wanted.is_match(text),
        }
    }
}

/// An expression that must match all of a text. Bounded in size, and in time by the engine (RE2's
/// syntax and its guarantee of linear time).
pub(super) fn regex(field: &str, expression: &str) -> Result<Regex, String> {
    // Alone first, so that `a)(b` is not made valid by what is put around it.
    let bounded = |text: &str| {
        regex::RegexBuilder::new(text)
            .size_limit(REGEX_SIZE)
            .dfa_size_limit(REGEX_SIZE)
            .build()
    };
    bounded(expression)
        .and_then(|_| bounded(&format!(r"\A(?:{expression})\z")))
        .map_err(|e| format!("{field}: {e}"))
}

/// A header and its value. Of the values of a header that is repeated the list is meant (RFC 9110, 5.3), of the
/// parts of a cookie, as HTTP/2 sends them, the whole (RFC 9113, 8.2.3).
#[derive(Debug, Clone)]
pub(super) struct HeaderMatch {
    name: HeaderName,
    value: TextMatch,
}

impl HeaderMatch {
    /// Of several matches with one name only the first counts (HTTPHeaderMatch.name).
    pub(super) fn compile_all(all: &[mesh::NamedMatch]) -> Result<Box<[Self]>, String> {
        let mut compiled: Vec<Self> = Vec::with_capacity(all.len());
        for one in all {
            let name = HeaderName::from_bytes(one.name.as_bytes())
                .map_err(|_| format!("matches.headers: {:?} is no name of a header", one.name))?;
            if compiled.iter().any(|known| known.name == name) {
                continue;
            }
            let value = TextMatch::compile("matches.headers", &value_of(one))?;
            compiled.push(Self { name, value });
        }
        Ok(compiled.into())
    }

    fn is_match(&self, request: &Parts) -> bool {
        let mut values = request.headers.get_all(&self.name).iter();
        let Some(first) = values.next() else {
            // HTTP/2 says it in the pseudo-header.
            let authority = request.uri.authority().filter(|_| self.name == HOST);
            return authority.is_some_and(|a| self.value.is_match(a.as_str()));
        };
        let Ok(first) = std::str::from_utf8(first.as_bytes()) else {
            return false;
        };
        let mut rest = values.peekable();
        if rest.peek().is_none() {
            return self.value.is_match(first);
        }
        let separator = if self.name == COOKIE { "; " } else { "," };
        let mut list = first.to_owned();
        for value in rest {
            let Ok(value) = std::str::from_utf8(value.as_bytes()) else {
                return false;
            };
            list.push_str(separator);
            list.push_str(value);
        }
        self.value.is_match(&list)
    }
}

/// A query parameter and its value. Of one that is repeated the first counts.
#[derive(Debug, Clone)]
pub(super) struct QueryMatch {
    name: Box<str>,
    value: TextMatch,
}

impl QueryMatch {
    /// Of several matches with one name only the first counts (HTTPQueryParamMatch.name).
    pub(super) fn compile_all(all: &[mesh::NamedMatch]) -> Result<Box<[Self]>, String> {
        let mut compiled: Vec<Self> = Vec::with_capacity(all.len());
        for one in all {
            if compiled.iter().any(|known| *known.name == *one.name) {
                continue;
            }
            compiled.push(Self {
                name: one.name.as_str().into(),
                value: TextMatch::compile("matches.queryParams", &value_of(one))?,
            });
        }
        Ok(compiled.into())
    }

    fn is_match(&self, query: &str) -> bool {
        query
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .find(|(name, _)| *decoded(name) == *self.name)
            .is_some_and(|(_, value)| self.value.is_match(&decoded(value)))
    }
}

fn value_of(named: &mesh::NamedMatch) -> mesh::StringMatch {
    named.value.clone().unwrap_or_default()
}

/// `application/x-www-form-urlencoded`, which is what a query is in practice. What is no valid escape
/// stands for itself.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.bytes().any(|b| b == b'%' || b == b'+') {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                plain.push((high * 16 + low) as u8);
                at += 3;
            }
            (byte, ..) => {
                plain.push(if byte == b'+' { b' ' } else { byte });
                at += 1;
            }
        }
    }
    match String::from_utf8(plain) {
        Ok(plain) => Cow::Owned(plain),
        Err(_) => Cow::Borrowed(text),
    }
}

/// All that a match asks for besides the path. AND.
#[derive(Debug, Default, Clone)]
pub(super) struct Conditions {
    pub(super) method: Option<Method>,
    pub(super) headers: Box<[HeaderMatch]>,
    pub(super) query: Box<[QueryMatch]>,
}

impl Conditions {
    /// `cors`: the rule answers preflights, which come with the method OPTIONS and name the one they are about
    /// (Fetch, "CORS-preflight request").
    pub(super) fn are_met(&self, request: &Parts, cors: bool) -> bool {
        self.method_matches(request, cors)
            && self.headers.iter().all(|h| h.is_match(request))
            && (self.query.is_empty() || {
                let query = request.uri.query().unwrap_or_default();
                self.query.iter().all(|q| q.is_match(query))
            })
    }

    fn method_matches(&self, request: &Parts, cors: bool) -> bool {
        let Some(wanted) = &self.method else {
            return true;
        };
        request.method == *wanted
            || (cors && preflight_method(request).is_some_and(|m| m == wanted.as_str().as_bytes()))
    }
}

/// The method a preflight asks for; `None`: the request is no preflight.
pub(super) fn preflight_method(request: &Parts) -> Option<&[u8]> {
    if request.method != Method::OPTIONS || !request.headers.contains_key(ORIGIN) {
        return None;
    }
    let method = request.headers.get(ACCESS_CONTROL_REQUEST_METHOD)?;
    Some(method.as_bytes())
}

/// Bytes of a compiled expression. As RE2's usual limit, far above what anyone writes by hand.
const REGEX_SIZE: usize = 1 << 20;
