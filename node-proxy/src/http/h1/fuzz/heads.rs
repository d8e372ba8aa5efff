//! Heads: the same to the second reader, the same when they are written and read again, the same however they are cut.

use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::{Method, Version};

use super::strict::{self, Length};
use crate::fuzz::{Input, segments};
use crate::http::h1::case::HeaderCase;
use crate::http::h1::encode::{self, Connection, Says};
use crate::http::h1::head::{self, Framing, Scan};
use crate::http::h1::hop::is_ours;
use crate::http::h1::{Limits, MOST_HEADERS, Refused};

/// Finds the same end of a head whether the bytes come at once or cut.
fn whole<'a>(input: &mut Input<'a>, strict: bool) -> Option<&'a [u8]> {
    let cuts = input.cuts();
    let bytes = input.0;
    let at_once = Scan::default().find(bytes, strict);
    let mut scan = Scan::default();
    let mut came = 0;
    let mut cut: Result<Option<usize>, Refused> = Ok(None);
    for segment in segments(bytes, &cuts) {
        came += segment.len();
        cut = scan.find(&bytes[..came], strict);
        if cut != Ok(None) {
            break;
        }
    }
    assert_eq!(at_once, cut);
    at_once.ok().flatten().map(|end| &bytes[..end])
}

pub(crate) fn request(bytes: &[u8]) {
    let Some(bytes) = whole(&mut Input(bytes), true) else {
        return;
    };
    let limits = Limits::default();
    let Ok(head) = head::request(&Bytes::copy_from_slice(bytes), &limits) else {
        return;
    };
    let strict = strict::head(bytes, false).expect("read, and malformed to the second reader");
    let [method, target, version] = strict.start;
    let minor = match version {
        b"HTTP/1.0" => 0,
        b"HTTP/1.1" => 1,
        other => panic!("{other:?} is no version"),
    };
    assert_eq!(head.parts.version == Version::HTTP_11, minor == 1);
    assert_eq!(head.parts.method.as_str().as_bytes(), method);
    assert!(!target.is_empty() && !target.iter().any(|b| *b <= b' ' || *b == 0x7f));
    let framing = match strict
        .length(minor)
        .expect("read, and ambiguous to the second reader")
    {
        Length::Bytes(length) => Framing::Length(length),
        Length::Chunked => Framing::Chunked,
        Length::Unsaid => Framing::Length(0),
    };
    assert_eq!(head.framing, framing);
    let absolute = head.parts.extensions.get::<head::AbsoluteForm>().is_some();
    same_fields(&strict, &head.parts.headers, absolute);
    let hosts = strict.all("host").count();
    assert!(hosts == 1 || (hosts == 0 && minor == 0));

    let mut again = Vec::new();
    let (framing, keep_length) = match framing {
        Framing::Length(length) => (
            Some(framing),
            encode::announced(&head.parts.headers) == Some(length),
        ),
        other => (Some(other), false),
    };
    let says = Says {
        framing,
        keep_length,
        connection: Connection::Default,
    };
    encode::request(&mut again, &head.parts, says);
    // With what the codec adds it may be more than a client's are allowed.
    let limits = Limits {
        headers: MOST_HEADERS,
        ..limits
    };
    let second = head::request(&Bytes::from(again.clone()), &limits);
    let second =
        second.unwrap_or_else(|error| panic!("{error} once written: {}", again.escape_ascii()));
    assert_eq!(second.parts.method, head.parts.method);
    assert_eq!(second.parts.version, head.parts.version);
    assert_eq!(second.parts.uri, head.parts.uri);
    assert_eq!(second.framing, head.framing);
    same_headers(&head.parts.headers, &second.parts.headers);
}

pub(crate) fn response(bytes: &[u8]) {
    let mut input = Input(bytes);
    let method = match input.byte() % 4 {
        0 => Method::HEAD,
        1 => Method::CONNECT,
        _ => Method::GET,
    };
    let Some(bytes) = whole(&mut input, false) else {
        return;
    };
    let limits = Limits::default();
    let Ok(head) = head::response(&Bytes::copy_from_slice(bytes), &limits, &method) else {
        return;
    };
    let strict = strict::head(bytes, true).expect("read, and malformed to the second reader");
    let [version, status, _reason] = strict.start;
    let minor = u8::from(version == b"HTTP/1.1");
    assert!(minor == 1 || version == b"HTTP/1.0");
    assert_eq!(head.parts.status.as_str().as_bytes(), status);
    let raw = status == b"101" || (method == Method::CONNECT && head.parts.status.is_success());
    let bodiless = raw || head::has_no_body(&method, head.parts.status);
    if !bodiless {
        let framing = match strict
            .length(minor)
            .expect("read, and ambiguous to the second reader")
        {
            Length::Bytes(length) => Framing::Length(length),
            Length::Chunked => Framing::Chunked,
            Length::Unsaid => Framing::Close,
        };
        assert_eq!(head.framing, framing);
    }
    same_fields(&strict, &head.parts.headers, false);

    let mut again = Vec::new();
    let announced = encode::announced(&head.parts.headers).is_some();
    let says = Says {
        framing: (!bodiless).then_some(head.framing),
        keep_length: announced && !raw,
        connection: Connection::Default,
    };
    encode::response(&mut again, &head.parts, says);
    let limits = Limits {
        headers: MOST_HEADERS,
        ..limits
    };
    let second = head::response(&Bytes::from(again.clone()), &limits, &method);
    let second =
        second.unwrap_or_else(|error| panic!("{error} once written: {}", again.escape_ascii()));
    assert_eq!(second.parts.status, head.parts.status);
    assert_eq!(second.parts.version, head.parts.version);
    assert_eq!(second.framing, head.framing);
    same_headers(&head.parts.headers, &second.parts.headers);
}

/// What was read is what stands there, but for a length that was repeated or has zeros before it, and a Host that the
/// target overrides.
fn same_fields(strict: &strict::Head<'_>, headers: &HeaderMap, absolute: bool) {
    for name in headers.keys() {
        if absolute && name == header::HOST {
            continue;
        }
        let read: Vec<_> = headers.get_all(name).iter().map(|v| v.as_bytes()).collect();
        let mut there: Vec<_> = strict.all(name.as_str()).collect();
        if name == header::CONTENT_LENGTH {
            there.truncate(1);
            // As a number it is compared with the framing.
            let first = there[0];
            let zeros = first.iter().take_while(|digit| **digit == b'0').count();
            there[0] = &first[zeros.min(first.len() - 1)..];
        }
        assert_eq!(read, there, "{name}");
    }
    for (name, _) in &strict.fields {
        let name = std::str::from_utf8(name).expect("a token");
        assert!(headers.contains_key(name), "{name} was lost");
    }
}

/// But for what the codec writes itself.
fn same_headers(before: &HeaderMap, after: &HeaderMap) {
    let ours = |name: &header::HeaderName| {
        is_ours(name)
            || *name == header::CONTENT_LENGTH
            || *name == header::UPGRADE
            || *name == header::HOST
    };
    let of = |map: &HeaderMap| {
        let mut all: Vec<_> = map
            .iter()
            .filter(|(name, _)| !ours(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        all.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        all
    };
    assert_eq!(of(before), of(after));
    let host = |map: &HeaderMap| map.get(header::HOST).cloned();
    if let Some(host_before) = host(before) {
        assert_eq!(host(after), Some(host_before));
    }
}

/// Names are written as they were spelled, here and behind a tunnel.
pub(crate) fn case(bytes: &[u8]) {
    if let Ok(value) = header::HeaderValue::from_bytes(bytes)
        && let Some(case) = HeaderCase::decode(&value)
    {
        assert_eq!(HeaderCase::decode(&case.encode()).as_ref(), Some(&case));
    }
    let mut names: Vec<&[u8]> = Vec::new();
    let mut length = 0;
    for name in bytes.split(|b| *b == b'\n') {
        let known = names.iter().any(|other| other.eq_ignore_ascii_case(name));
        length += name.len() + 1;
        if !known
            && header::HeaderName::from_bytes(name).is_ok()
            && length < 4000
            && names.len() < 100
        {
            names.push(name);
        }
    }
    let case = HeaderCase::of(names.iter().copied());
    let there = HeaderCase::decode(&case.encode()).expect("what is encoded can be decoded");
    assert_eq!(there, case);
    for spelled in names {
        let name = header::HeaderName::from_bytes(spelled).expect("filtered above");
        let mut written = Vec::new();
        there.write(&name, &mut written);
        assert_eq!(written, spelled);
    }
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /a?b=c HTTP/1.1\r\nhost: a:80\r\nContent-Length: 5\r\nX-Y:  z \r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "GET http://u@b:8/x HTTP/1.1\r\nHost: a\r\nConnection: close, X-A\r\n\r\n",
        "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
        "OPTIONS * HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\n\n",
    ]
    .iter()
    .flat_map(|text| {
        let head = text.as_bytes();
        [[&[0][..], head].concat(), [&[2, 0, 3][..], head].concat()]
    })
    .collect()
}

pub(crate) fn response_seeds() -> Vec<Vec<u8>> {
    [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        "HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n",
        "HTTP/1.0 404 Not Found\nServer: old\n\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 304 \r\nContent-Length: 10\r\nETag: \"x\"\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ]
    .iter()
    .enumerate()
    .map(|(n, text)| [&[n as u8, 2, 0, 3][..], text.as_bytes()].concat())
    .collect()
}

pub(crate) fn case_seeds() -> Vec<Vec<u8>> {
    [
        "Host\nAccept\nX-Request-ID\nETag",
        "host\naccept\nX-A\ncontent-LENGTH",
        "T,ETag,X-ID",
        "l",
        "l,A,B",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// Whether the codec takes the beginning of `bytes` for a request.
pub(crate) fn is_request(bytes: &Bytes) -> bool {
    match Scan::default().find(bytes, true) {
        Ok(Some(end)) => head::request(&bytes.slice(..end), &Limits::default()).is_ok(),
        _ => false,
    }
}
