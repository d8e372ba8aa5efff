//! Writes heads.
//!
//! What is written of Connection, Transfer-Encoding and Content-Length is decided here, from the body that
//! follows; a head that arrives with them cannot contradict its body.

use std::io::Write as _;

use http::header::{self, HeaderMap, HeaderName};
use http::{Method, Version, request, response};
use http_body::Body as _;

use super::case::HeaderCase;
use super::head::{AbsoluteForm, Framing};
use super::hop::is_ours;
use crate::http::body::Body;

/// What a head says of its connection and body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Says {
    /// None: the message has no body, and a Content-Length in its headers stays (HEAD, 304).
    pub(super) framing: Option<Framing>,
    /// A Content-Length in the headers stays as it is.
    pub(super) keep_length: bool,
    pub(super) connection: Connection,
}

/// The connection option of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connection {
    /// What the version means without one.
    Default,
    KeepAlive,
    Close,
    Upgrade,
}

/// Appends the head of a request.
pub(super) fn request(out: &mut Vec<u8>, parts: &request::Parts, says: Says) {
    out.extend_from_slice(parts.method.as_str().as_bytes());
    out.push(b' ');
    let uri = &parts.uri;
    if parts.method == Method::CONNECT
        && let Some(authority) = uri.authority()
    {
        out.extend_from_slice(authority.as_str().as_bytes());
    } else if parts.extensions.get::<AbsoluteForm>().is_some() {
        // Writing to a vector cannot fail.
        let _ = write!(out, "{uri}");
    } else {
        let target = uri.path_and_query().map_or("/", |target| target.as_str());
        out.extend_from_slice(target.as_bytes());
    }
    out.extend_from_slice(match parts.version {
        Version::HTTP_10 => b" HTTP/1.0\r\n",
        _ => b" HTTP/1.1\r\n",
    });
    let case = parts.extensions.get::<HeaderCase>();
    if !parts.headers.contains_key(header::HOST) {
        let host = uri.authority().map_or("", |authority| authority.as_str());
        let host = host.rsplit_once('@').map_or(host, |(_user, host)| host);
        if !host.is_empty() || parts.version != Version::HTTP_10 {
            field(out, case, &header::HOST, host.as_bytes());
        }
    }
    headers(out, case, &parts.headers, says);
}

/// Appends the head of a response, in HTTP/1.0 if it came in that and in 1.1 otherwise.
pub(super) fn response(out: &mut Vec<u8>, parts: &response::Parts, says: Says) {
    out.extend_from_slice(match parts.version {
        Version::HTTP_10 => b"HTTP/1.0 ",
        _ => b"HTTP/1.1 ",
    });
    out.extend_from_slice(parts.status.as_str().as_bytes());
    out.push(b' ');
    if let Some(reason) = parts.status.canonical_reason() {
        out.extend_from_slice(reason.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    headers(out, parts.extensions.get(), &parts.headers, says);
}

/// Appends trailers and the empty line behind them.
pub(super) fn trailers(out: &mut Vec<u8>, case: Option<&HeaderCase>, trailers: &HeaderMap) {
    for (name, value) in trailers {
        if !is_ours(name) && *name != header::CONTENT_LENGTH {
            field(out, case, name, value.as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

fn headers(out: &mut Vec<u8>, case: Option<&HeaderCase>, headers: &HeaderMap, says: Says) {
    let upgrade = says.connection == Connection::Upgrade;
    let mut te = false;
    for (name, value) in headers {
        let skipped = is_ours(name)
            || (*name == header::CONTENT_LENGTH && !says.keep_length)
            || (*name == header::UPGRADE && !upgrade);
        if skipped {
            continue;
        }
        te |= *name == header::TE;
        field(out, case, name, value.as_bytes());
    }
    match says.framing {
        Some(Framing::Length(length)) if !says.keep_length => {
            name(out, case, &header::CONTENT_LENGTH);
            // Writing to a vector cannot fail.
            let _ = write!(out, ": {length}\r\n");
        }
        Some(Framing::Chunked) => field(out, case, &header::TRANSFER_ENCODING, b"chunked"),
        Some(Framing::Length(_) | Framing::Close) | None => {}
    }
    let option: &[u8] = match (says.connection, te) {
        (Connection::Default, false) => b"",
        (Connection::Default, true) => b"TE",
        (Connection::KeepAlive, false) => b"keep-alive",
        (Connection::KeepAlive, true) => b"keep-alive, TE",
        (Connection::Close, false) => b"close",
        (Connection::Close, true) => b"close, TE",
        (Connection::Upgrade, false) => b"Upgrade",
        (Connection::Upgrade, true) => b"Upgrade, TE",
    };
    if !option.is_empty() {
        field(out, case, &header::CONNECTION, option);
    }
    out.extend_from_slice(b"\r\n");
}

fn field(out: &mut Vec<u8>, case: Option<&HeaderCase>, key: &HeaderName, value: &[u8]) {
    name(out, case, key);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn name(out: &mut Vec<u8>, case: Option<&HeaderCase>, name: &HeaderName) {
    match case {
        Some(case) => case.write(name, out),
        None => HeaderCase::default().write(name, out),
    }
}

/// The length that the headers announce, if they do so once and in digits.
pub(super) fn announced(headers: &HeaderMap) -> Option<u64> {
    let mut values = headers.get_all(header::CONTENT_LENGTH).iter();
    let value = values.next()?;
    if values.next().is_some() || !value.as_bytes().iter().all(u8::is_ascii_digit) {
        return None;
    }
    value.to_str().ok()?.parse().ok()
}

/// How a body is framed: by its length where that is known, else as the headers announce, else `otherwise`.
/// And whether the Content-Length that is there can stay.
pub(super) fn frame(headers: &HeaderMap, body: &Body, otherwise: Framing) -> (Framing, bool) {
    let announced = announced(headers);
    match body.size_hint().exact().or(announced) {
        Some(length) => (Framing::Length(length), announced == Some(length)),
        None => (otherwise, false),
    }
}
