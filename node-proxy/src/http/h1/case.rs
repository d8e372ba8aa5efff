//! How a message spells its header names.
//!
//! `HeaderMap` knows lower case only, and HTTP/2 carries nothing else. The spelling is kept beside the
//! headers and crosses a tunnel as one header value: a letter for what most names follow (`T`itle-Case or
//! `l`ower), then the names that do not, each after a comma. Common clients need the letter only. It is
//! looked up by name, so headers may be added, removed and reordered on the way.

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::http::detect::is_token;

const TITLE: &[u8] = b"T";
const LOWER: &[u8] = b"l";
/// Bytes of the encoded form; spellings beyond follow the letter.
const MOST_BYTES: usize = 4096;
const MOST_NAMES: usize = 100;

/// The original spelling of header names; an extension of requests and responses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderCase(Bytes);

impl Default for HeaderCase {
    /// Title-Case.
    fn default() -> Self {
        Self(Bytes::from_static(TITLE))
    }
}

impl HeaderCase {
    /// From names as they were written.
    pub fn of<'a>(names: impl Iterator<Item = &'a [u8]> + Clone) -> Self {
        let (mut title, mut lower, mut count) = (0, 0, 0);
        for name in names.clone() {
            count += 1;
            title += usize::from(is_title(name));
            lower += usize::from(is_lower(name));
        }
        if title == count {
            return Self(Bytes::from_static(TITLE));
        }
        if lower == count {
            return Self(Bytes::from_static(LOWER));
        }
        let (letter, follows): (_, fn(&[u8]) -> bool) = if title >= lower {
            (TITLE, is_title)
        } else {
            (LOWER, is_lower)
        };
        let mut text = letter.to_vec();
        for name in names.filter(|name| !follows(name)).take(MOST_NAMES) {
            if text.len() + 1 + name.len() > MOST_BYTES {
                break;
            }
            text.push(b',');
            text.extend_from_slice(name);
        }
        Self(text.into())
    }

    /// As the value of a header.
    pub fn encode(&self) -> HeaderValue {
        // Letters, tokens and commas: always a valid value.
        HeaderValue::from_maybe_shared(self.0.clone())
            .unwrap_or_else(|_| HeaderValue::from_static("T"))
    }

    /// From the value of a header. None if it is not what [`HeaderCase::encode`] makes.
    pub fn decode(value: &HeaderValue) -> Option<Self> {
        let bytes = value.as_bytes();
        if bytes.len() > MOST_BYTES {
            return None;
        }
        let mut parts = bytes.split(|b| *b == b',');
        let style = match parts.next()? {
            b"T" => TITLE,
            b"l" => LOWER,
            _ => return None,
        };
        let mut names = 0;
        for name in parts {
            names += 1;
            if name.is_empty() || names > MOST_NAMES || !name.iter().all(|b| is_token(*b)) {
                return None;
            }
        }
        Some(Self(if names == 0 {
            Bytes::from_static(style)
        } else {
            Bytes::copy_from_slice(bytes)
        }))
    }

    /// Appends `name` as it was spelled.
    pub(super) fn write(&self, name: &HeaderName, out: &mut Vec<u8>) {
        let name = name.as_str().as_bytes();
        if self.0.len() > 1 {
            let mut exceptions = self.0[1..].split(|b| *b == b',');
            if let Some(spelled) = exceptions.find(|e| e.eq_ignore_ascii_case(name)) {
                return out.extend_from_slice(spelled);
            }
        }
        if self.0[0] == b'l' {
            return out.extend_from_slice(name);
        }
        let mut first = true;
        out.extend(name.iter().map(|byte| {
            let written = if first {
                byte.to_ascii_uppercase()
            } else {
                *byte
            };
            first = *byte == b'-';
            written
        }));
    }

    /// Every name of `headers` as it would be written; for tests and traces.
    pub fn names(&self, headers: &HeaderMap) -> Vec<String> {
        headers
            .keys()
            .map(|name| {
                let mut text = Vec::new();
                self.write(name, &mut text);
                String::from_utf8_lossy(&text).into_owned()
            })
            .collect()
    }
}

fn is_title(name: &[u8]) -> bool {
    let mut first = true;
    name.iter().all(|byte| {
        let fits = if first {
            !byte.is_ascii_lowercase()
        } else {
            !byte.is_ascii_uppercase()
        };
        first = *byte == b'-';
        fits
    })
}

fn is_lower(name: &[u8]) -> bool {
    !name.iter().any(u8::is_ascii_uppercase)
}
