//! RequestHeaderModifier and ResponseHeaderModifier (HTTPHeaderFilter).
//!
//! Names that frame messages or belong to one connection are refused: changing them would change where a message
//! ends (RFC 9110, 7.6.1; RFC 9112, 6). So are the mesh's own, which say who calls. The controller refuses the same
//! ([`mesh_api::headers`]).

use ::http::header::{HOST, SET_COOKIE};
use ::http::{HeaderMap, HeaderName, HeaderValue, request};
use mesh_api::headers::{is_hop_by_hop, refuse_remove, refuse_set};
use mesh_api::proto::mesh;

use super::url::set_host;

/// Changes of headers. `set` before `add` before `remove`; the API allows one action for each name.
#[derive(Debug, Clone, Default)]
pub struct HeaderEdit {
    set: Box<[(HeaderName, HeaderValue)]>,
    add: Box<[(HeaderName, HeaderValue)]>,
    remove: Box<[HeaderName]>,
}

impl HeaderEdit {
    pub(super) fn compile(field: &str, edit: &mesh::HeaderModifier) -> Result<Self, String> {
        let mesh::HeaderModifier { set, add, remove } = edit;
        let pairs = |all: &[mesh::Header]| {
            all.iter()
                .map(|h| Ok((name(field, &h.name, refuse_set)?, value(field, h)?)))
                .collect::<Result<_, String>>()
        };
        Ok(Self {
            set: pairs(set)?,
            add: pairs(add)?,
            remove: remove
                .iter()
                .filter(|n| !is_hop_by_hop(n))
                .map(|n| name(field, n, refuse_remove))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Applies it.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            add(headers, name, value);
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }

    /// As [`HeaderEdit::apply`]; `Host` is what HTTP/2 has in a pseudo-header, and cannot be taken away.
    pub(super) fn apply_to_request(&self, request: &mut request::Parts) {
        let host = self.set.iter().find(|(name, _)| *name == HOST);
        if let Some((_, host)) = host {
            set_host(request, host);
        }
        for (name, value) in self.set.iter().filter(|(name, _)| *name != HOST) {
            request.headers.insert(name.clone(), value.clone());
        }
        for (name, value) in self.add.iter().filter(|(name, _)| *name != HOST) {
            add(&mut request.headers, name, value);
        }
        for name in self.remove.iter().filter(|name| *name != HOST) {
            request.headers.remove(name);
        }
    }
}

/// `existing,new` in one field, as the API's example has it. Cookies cannot be joined (RFC 6265, 3).
fn add(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    let mut existing = headers.get_all(name).iter();
    let joined = match (existing.next(), existing.next()) {
        (Some(only), None) if *name != SET_COOKIE => {
            let joined = [only.as_bytes(), b",", value.as_bytes()].concat();
            HeaderValue::from_bytes(&joined).ok()
        }
        _ => None,
    };
    match joined {
        Some(joined) => {
            headers.insert(name.clone(), joined);
        }
        None => {
            headers.append(name.clone(), value.clone());
        }
    }
}

fn name(
    field: &str,
    text: &str,
    refuse: fn(&str) -> Option<&'static str>,
) -> Result<HeaderName, String> {
    let name = HeaderName::from_bytes(text.as_bytes())
        .map_err(|_| format!("{field}: {text:?} is no name of a header"))?;
    match refuse(name.as_str()) {
        Some(why) => Err(format!("{field}: {name} {why}")),
        None => Ok(name),
    }
}

/// Any text is a value, in UTF-8 (`obs-text`; RFC 9110, 5.5).
fn value(field: &str, header: &mesh::Header) -> Result<HeaderValue, String> {
    HeaderValue::from_bytes(header.value.trim_matches([' ', '\t']).as_bytes())
        .map_err(|_| format!("{field}: {:?} is no value of a header", header.value))
}
