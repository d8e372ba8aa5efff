//! Headers that end at each hop (RFC 9110 7.6.1).

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Headers that a Connection header cannot make hop-by-hop: they are the message's own.
const END_TO_END: [HeaderName; 6] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::AUTHORIZATION,
    header::CACHE_CONTROL,
    header::COOKIE,
];

/// Removes what is meant for this hop alone, and returns the protocol of an upgrade that was asked for or
/// granted, so that the caller can put it back for the next hop (`Upgrade` in the headers of a message that
/// is written makes the codec add `Connection: upgrade`).
///
/// An upgrade that names `h2c`, alone or among others, is not passed on, and neither is what belongs to it: RFC 9113 3.1
/// has withdrawn it, and what follows it would be opaque.
/// `te: trailers` stays. Transfer-Encoding goes: how the body is framed is the next hop's to say.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    // Most messages have none: one look at each name costs less than a look-up of each that might be there.
    let ends_here = |name| {
        is_ours(name) || *name == header::TE || *name == header::UPGRADE || *name == HTTP2_SETTINGS
    };
    if !headers.keys().any(ends_here) {
        return None;
    }
    let mut upgrades = false;
    if headers.contains_key(header::CONNECTION) {
        let mut listed: Vec<HeaderName> = Vec::new();
        for value in headers.get_all(header::CONNECTION) {
            for option in tokens(value) {
                if option.eq_ignore_ascii_case(b"upgrade") {
                    upgrades = true;
                } else if let Ok(name) = HeaderName::from_bytes(option)
                    && name != header::TE
                    && !END_TO_END.contains(&name)
                {
                    listed.push(name);
                }
            }
        }
        headers.remove(header::CONNECTION);
        for name in listed {
            headers.remove(name);
        }
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(HTTP2_SETTINGS);
    if headers.contains_key(header::TE) {
        let trailers = headers
            .get_all(header::TE)
            .iter()
            .flat_map(tokens)
            .any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        } else {
            headers.remove(header::TE);
        }
    }
    let h2c = headers
        .get_all(header::UPGRADE)
        .iter()
        .flat_map(tokens)
        .any(|protocol| protocol.eq_ignore_ascii_case(b"h2c"));
    let upgrade = headers.remove(header::UPGRADE)?;
    (upgrades && !h2c).then_some(upgrade)
}

/// Whether a header is written by the codec itself or not at all.
pub(in crate::http) fn is_ours(name: &HeaderName) -> bool {
    *name == header::CONNECTION
        || *name == header::TRANSFER_ENCODING
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
}

/// The elements of a comma-separated list.
pub(super) fn tokens(value: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    value
        .as_bytes()
        .split(|b| *b == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}
