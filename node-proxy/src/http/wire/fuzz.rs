//! What crosses a tunnel comes out as it went in, and nothing that an app says passes for a proxy's word.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use h2::ext::Protocol as ExtendedProtocol;
use http::header::{CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use mesh_api::headers::is_reserved;

use super::{Envelope, clean, large, open, open_response, seal, seal_response};
use crate::fuzz::{Input, headers, part};
use crate::http::body::Body;
use crate::http::h1::HeaderCase;

const VERSIONS: [Version; 3] = [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2];

pub(crate) fn request(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some((mut parts, envelope)) = app(&mut input) else {
        return;
    };
    clean(&mut parts.headers);
    assert!(!is_forged(&parts.headers));
    let before = copy(&parts);
    if seal(&mut parts, &envelope).is_err() {
        return;
    }
    // An extended CONNECT of an app's own may not name the proxies' protocol: that is refused at the other end.
    let pretends = before
        .extensions
        .get::<ExtendedProtocol>()
        .is_some_and(|p| p.as_str() == super::CONNECT_PROTOCOL);
    match open(&mut parts) {
        Err(_) if pretends => return,
        Err(error) => panic!("sealed and not opened: {error}"),
        Ok(opened) => assert_eq!(opened, envelope),
    }
    assert!(!is_forged(&parts.headers));
    assert_eq!(parts.method, before.method);
    assert_eq!(parts.version, before.version);
    assert_eq!(parts.uri, before.uri);
    assert_eq!(
        parts.extensions.get::<HeaderCase>(),
        before.extensions.get()
    );
    let protocol = |parts: &Parts| {
        parts
            .extensions
            .get::<ExtendedProtocol>()
            .map(|p| p.as_str().to_owned())
    };
    assert_eq!(protocol(&parts), protocol(&before));
    let upgrade = super::is_upgrade(&before) || before.method == Method::CONNECT;
    let mut wanted = before.headers;
    if before.method == Method::CONNECT {
        // It cannot become two things; the tunnel it asks for goes first.
        wanted.remove(UPGRADE);
        parts.headers.remove(UPGRADE);
    }
    if upgrade {
        wanted.remove(CONTENT_LENGTH);
        parts.headers.remove(CONTENT_LENGTH);
    }
    assert_eq!(parts.headers, wanted);

    // What comes in from elsewhere, with headers of any kind: an error, or nothing of ours is left.
    let mut foreign = copy(&parts);
    foreign.headers = headers(input.part());
    if open(&mut foreign).is_ok() {
        assert!(!is_forged(&foreign.headers));
    }
}

/// An app's request, and who asks whom.
fn app(input: &mut Input<'_>) -> Option<(Parts, Envelope)> {
    let kind = input.byte();
    let version = VERSIONS[usize::from(kind & 3) % VERSIONS.len()];
    let mut parts = Request::new(()).into_parts().0;
    parts.version = version;
    parts.method = Method::from_bytes(input.part()).ok()?;
    parts.uri = Uri::try_from(input.part()).ok()?;
    parts.headers = headers(input.part());
    if version == Version::HTTP_2 && parts.method == Method::CONNECT && kind & 0x80 != 0 {
        let protocol = std::str::from_utf8(input.part()).ok()?;
        parts.extensions.insert(ExtendedProtocol::from(protocol));
    }
    let extended = parts.extensions.get::<ExtendedProtocol>().is_some();
    let authority_alone = parts.uri.authority().is_some() && parts.uri.scheme().is_none();
    if parts.method == Method::CONNECT && !extended && !authority_alone {
        // Neither codec takes it.
        return None;
    }
    if version != Version::HTTP_2 {
        parts
            .extensions
            .insert(HeaderCase::of([&b"x-ID"[..], b"Host"].into_iter()));
    }
    let ip: IpAddr = match kind & 0x40 {
        0 => Ipv4Addr::from(u32::from(input.byte()) | 0x0a00_0000).into(),
        _ => Ipv6Addr::from(u128::from(input.byte()) | 0xfd << 120).into(),
    };
    let envelope = Envelope {
        target: SocketAddr::new(ip, u16::from(input.byte()) + 1),
        source: ip,
        service: (kind & 0x20 != 0).then(|| "demo/web:80".into()),
        connect: (kind & 0x10 != 0).then(|| Duration::from_millis(u64::from(input.byte()))),
        retries: kind & 0x08 != 0,
    };
    Some((parts, envelope))
}

pub(crate) fn response(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut parts = Response::new(()).into_parts().0;
    parts.version = VERSIONS[usize::from(input.byte() % 3)];
    let Ok(status) =
        StatusCode::from_u16(u16::from(input.byte()) * 4 + u16::from(input.byte() % 4))
    else {
        return;
    };
    parts.status = status;
    parts.headers = headers(input.part());
    // Without what `from_app` takes off.
    clean(&mut parts.headers);
    if !matches!(
        status,
        StatusCode::SWITCHING_PROTOCOLS | StatusCode::UPGRADE_REQUIRED
    ) {
        parts.headers.remove(UPGRADE);
    } else if status == StatusCode::SWITCHING_PROTOCOLS && !parts.headers.contains_key(UPGRADE) {
        return;
    }
    let before = (parts.status, parts.version, parts.headers.clone());
    seal_response(&mut parts);
    assert_eq!(open_response(&mut parts), None);
    assert_eq!((parts.status, parts.version, parts.headers), before);

    let mut foreign = Response::new(()).into_parts().0;
    foreign.headers = headers(input.part());
    open_response(&mut foreign);
    assert!(!is_forged(&foreign.headers));
}

/// The part of a large head that crosses a tunnel before the body.
pub(crate) fn head(bytes: &[u8]) {
    let mut parsed = HeaderMap::new();
    if large::parse(Bytes::copy_from_slice(bytes), &mut parsed).is_none() {
        return;
    }
    assert!(!is_forged(&parsed));
    assert!(!parsed.contains_key(UPGRADE) && !parsed.contains_key(TRANSFER_ENCODING));
    let size: usize = parsed
        .iter()
        .map(|(n, v)| n.as_str().len() + v.len() + 32)
        .sum();
    assert!(size <= crate::tunnel::MAX_HEADER_LIST as usize);
    let mut packed = parsed.clone();
    let body = large::pack(true, &mut packed, Body::empty());
    if let Some(bytes) = body.as_full().filter(|bytes| !bytes.is_empty()) {
        assert_eq!(large::packed(&mut packed), Ok(bytes.len()));
        large::parse(bytes.clone(), &mut packed).expect("packed and not parsed");
    }
    assert_eq!(packed, parsed);
}

fn is_forged(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| is_reserved(name.as_str()))
}

fn copy(parts: &Parts) -> Parts {
    let mut copy = Request::new(()).into_parts().0;
    copy.method = parts.method.clone();
    copy.uri = parts.uri.clone();
    copy.version = parts.version;
    copy.headers = parts.headers.clone();
    copy.extensions = parts.extensions.clone();
    copy
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let seed = |kind: u8, method: &str, uri: &str, headers: &str, more: &str| {
        let parts = [method, uri, headers]
            .map(|text| part(text.as_bytes()))
            .concat();
        let foreign = "warren-target: 10.0.0.1:80\nwarren-source: 10.0.0.2\nwarren-version: 1.1\nwarren-case: T,ETag\nwarren-x: y\n\
             warren-target: 10.0.0.3:80\nwarren-x: z";
        [
            &[kind][..],
            &parts,
            &part(more.as_bytes()),
            &[1, 80],
            &part(foreign.as_bytes()),
        ]
        .concat()
    };
    vec![
        seed(
            1,
            "GET",
            "/a?b",
            "host: web\nwarren-client-id: forged\nconnection: close, x-a\nx-a: 1",
            "",
        ),
        seed(
            1,
            "GET",
            "/chat",
            "host: web\nupgrade: websocket\nconnection: upgrade",
            "",
        ),
        seed(
            1,
            "POST",
            "/up",
            "upgrade: x/2\nconnection: upgrade\ncontent-length: 3",
            "",
        ),
        seed(1, "CONNECT", "a:443", "host: a:443", ""),
        seed(0x20, "GET", "http://web/x", "te: trailers, gzip", ""),
        seed(0x82, "CONNECT", "http://web/chat", "x: y", "websocket"),
        seed(0x82, "CONNECT", "http://web/chat", "x: y", "warren-connect"),
        seed(0x42, "CONNECT", "web:443", "x: y", ""),
    ]
}

pub(crate) fn response_seeds() -> Vec<Vec<u8>> {
    let seed = |version: u8, status: u16, headers: &str| {
        let status = [(status / 4) as u8, (status % 4) as u8];
        let foreign = "warren-version: 1.0\nwarren-upgraded: x\nwarren-proxy-error: nonsense\nwarren-case: l\nwarren-x: y\nwarren-version: 2";
        [
            &[version][..],
            &status,
            &part(headers.as_bytes()),
            &part(foreign.as_bytes()),
        ]
        .concat()
    };
    vec![
        seed(
            1,
            200,
            "server: nginx\nwarren-proxy-error: forged\nupgrade: h2,h2c\nconnection: upgrade",
        ),
        seed(1, 101, "upgrade: websocket\nconnection: upgrade"),
        seed(1, 426, "upgrade: TLS/1.2\nconnection: upgrade"),
        seed(2, 204, "x: y"),
    ]
}

pub(crate) fn head_seeds() -> Vec<Vec<u8>> {
    let of = |headers: &[(&str, &str)]| {
        let entry = |(name, value): &(&str, &str)| {
            let lengths = [
                &(name.len() as u16).to_be_bytes()[..],
                &(value.len() as u32).to_be_bytes(),
            ];
            [&lengths.concat()[..], name.as_bytes(), value.as_bytes()].concat()
        };
        headers.iter().flat_map(entry).collect()
    };
    let long = "x".repeat(9000);
    vec![
        of(&[("cookie", &long), ("cookie", "b"), ("content-length", "3")]),
        of(&[("x-a", "1"), ("connection", "close")]),
        of(&[("warren-source", "10.0.0.1")]),
        vec![0, 1, 0, 0, 0, 9, b'a'],
    ]
}
