//! Heads alone: what is understood, what is refused, how names are spelled.

use super::super::encode;
use super::super::head::{self, Framing, Scan};
use super::*;

fn parse(bytes: &[u8]) -> Result<head::Head<http::request::Parts>, Refused> {
    let limits = Limits::default();
    let end = Scan::default().find(bytes, true)?.expect("a whole head");
    head::request(&Bytes::copy_from_slice(&bytes[..end]), &limits)
}

fn parse_response(bytes: &[u8]) -> Result<head::Head<http::response::Parts>, Refused> {
    let end = Scan::default().find(bytes, false)?.expect("a whole head");
    let bytes = Bytes::copy_from_slice(&bytes[..end]);
    head::response(&bytes, &Limits::default(), &Method::GET)
}

/// Every shape that two parsers may read differently (RFC 9112 11.2), and other malformed heads.
const REFUSED: &[(&str, Refused)] = &[
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        Refused::LengthAndEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
        Refused::LengthAndEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -0\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5 5\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551616\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775808\r\n\r\n",
        Refused::ContentLength,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;q=1\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ,chunked\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n",
        Refused::TransferEncoding,
    ),
    (
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        Refused::Coding,
    ),
    (
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        Refused::TransferEncoding,
    ),
    ("GET / HTTP/1.1\nHost: a\r\n\r\n", Refused::BareLineFeed),
    ("GET / HTTP/1.1\r\nHost: a\n\r\n", Refused::BareLineFeed),
    ("GET / HTTP/1.1\r\nHost: a\r\n\n", Refused::BareLineFeed),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        Refused::HeaderName,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n\tb\r\n\r\n",
        Refused::HeaderName,
    ),
    ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", Refused::HeaderName),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n",
        Refused::HeaderName,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\t: chunked\r\n\r\n",
        Refused::HeaderName,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
        Refused::HeaderName,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
        Refused::HeaderName,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX\u{0}: b\r\n\r\n",
        Refused::HeaderName,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX: b\u{0}c\r\n\r\n",
        Refused::HeaderValue,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n",
        Refused::HeaderValue,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX: b\u{1b}c\r\n\r\n",
        Refused::HeaderValue,
    ),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nX: b\u{7f}c\r\n\r\n",
        Refused::HeaderValue,
    ),
    ("GET / HTTP/1.1\r\n\r\n", Refused::Host),
    (
        "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        Refused::Host,
    ),
    (
        "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
        Refused::Host,
    ),
    ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", Refused::Host),
    ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", Refused::Host),
    ("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", Refused::Host),
    ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", Refused::Version),
    ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", Refused::Version),
    ("GET /\r\nHost: a\r\n\r\n", Refused::Version),
    ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", Refused::StartLine),
    ("G\u{0}T / HTTP/1.1\r\nHost: a\r\n\r\n", Refused::StartLine),
    ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", Refused::Target),
    ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", Refused::Target),
    ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", Refused::Target),
    ("CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n", Refused::Target),
    (
        "CONNECT http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        Refused::Target,
    ),
];

#[test]
fn ambiguous_and_malformed_heads_are_refused_for_their_reason() {
    for (head, reason) in REFUSED {
        let refused = parse(head.as_bytes()).map(|head| head.parts);
        match refused {
            Ok(parts) => panic!("{head:?} was taken: {parts:?}"),
            // A version that is not there is a malformed line to some.
            Err(refused) if *reason == Refused::Version && refused == Refused::StartLine => {}
            Err(refused) => assert_eq!(refused, *reason, "{head:?}"),
        }
    }
}

#[tokio::test]
async fn the_same_is_refused_wherever_the_bytes_are_cut() {
    for (head, reason) in REFUSED {
        for cut in [1, 7, 16, 25, head.len() / 2, head.len() - 1] {
            let cut = cut.min(head.len() - 1);
            let (mut client, socket) = pair().await;
            let mut server = Server::new(socket, Bytes::new(), Limits::default());
            let (_, next) = tokio::join!(
                async {
                    for part in [&head.as_bytes()[..cut], &head.as_bytes()[cut..]] {
                        // A refusal at the first part may have closed nothing yet: writing works.
                        client.write_all(part).await.unwrap();
                        tokio::task::yield_now().await;
                        tokio::task::yield_now().await;
                    }
                },
                server.next()
            );
            let error = next.unwrap_err();
            assert!(
                error.status().is_some_and(|status| status.is_client_error()
                    || status == StatusCode::NOT_IMPLEMENTED
                    || status == StatusCode::HTTP_VERSION_NOT_SUPPORTED),
                "{head:?} at {cut}: {error:?}, expected {reason:?}"
            );
        }
    }
}

#[test]
fn the_end_of_a_head_is_found_wherever_it_is_cut() {
    let head = b"GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\nrest";
    let mut scan = Scan::default();
    for end in 0..head.len() - 5 {
        assert_eq!(scan.find(&head[..end], true), Ok(None), "{end}");
    }
    assert_eq!(scan.find(head, true), Ok(Some(head.len() - 4)));
}

#[test]
fn targets_of_all_four_forms_are_taken() {
    for (line, target, absolute) in [
        ("GET /a?b=c%20d", "/a?b=c%20d", false),
        ("GET //a/b", "//a/b", false),
        ("OPTIONS *", "*", false),
        ("GET http://b:81/x", "http://b:81/x", true),
        ("CONNECT b:443", "b:443", false),
        ("BREW /pot", "/pot", false),
    ] {
        let head = format!("{line} HTTP/1.1\r\nHost: a\r\n\r\n");
        let parts = parse(head.as_bytes()).unwrap().parts;
        assert_eq!(parts.uri.to_string(), target);
        assert_eq!(parts.extensions.get::<AbsoluteForm>().is_some(), absolute);
        let host = if absolute { "b:81" } else { "a" };
        assert_eq!(parts.headers[http::header::HOST], host, "{line}");
    }
}

#[test]
fn what_a_request_says_of_its_body_and_connection() {
    for (head, framing, keep_alive) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n", Framing::Length(0), true),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n",
            Framing::Length(0),
            false,
        ),
        ("GET / HTTP/1.0\r\n", Framing::Length(0), false),
        (
            "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n",
            Framing::Length(0),
            true,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 007\r\n",
            Framing::Length(7),
            true,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\n",
            Framing::Chunked,
            true,
        ),
    ] {
        let head = parse(format!("{head}\r\n").as_bytes()).unwrap();
        assert_eq!((head.framing, head.keep_alive), (framing, keep_alive));
    }
    // Repeated and equal, a length is kept once.
    let head =
        parse(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n")
            .unwrap();
    assert_eq!(head.framing, Framing::Length(5));
    let lengths = head.parts.headers.get_all(http::header::CONTENT_LENGTH);
    assert_eq!(lengths.iter().count(), 1);
}

#[test]
fn a_length_is_passed_on_without_zeros_before_it() {
    for (written, passed_on) in [
        ("00000000000000000005", "5"),
        ("0000000000000000000000000", "0"),
        ("007", "7"),
        ("0", "0"),
        ("70", "70"),
        ("9223372036854775807", "9223372036854775807"),
    ] {
        let length = http::header::CONTENT_LENGTH;
        let framing = Framing::Length(passed_on.parse().unwrap());
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {written}\r\n\r\n");
        let request = parse(head.as_bytes()).unwrap();
        assert_eq!(request.framing, framing);
        assert_eq!(request.parts.headers[&length], passed_on);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {written}\r\n\r\n");
        let response = parse_response(head.as_bytes()).unwrap();
        assert_eq!(response.framing, framing);
        assert_eq!(response.parts.headers[&length], passed_on);
    }
}

#[test]
fn what_a_response_says_of_its_body() {
    for (head, framing, keep_alive) in [
        ("HTTP/1.1 200 OK\r\n", Framing::Close, false),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n",
            Framing::Length(3),
            true,
        ),
        (
            "HTTP/1.0 200\r\nContent-Length: 3\r\n",
            Framing::Length(3),
            false,
        ),
        ("HTTP/1.1 204 No\r\n", Framing::Length(0), true),
        (
            "HTTP/1.1 304 Not\r\nContent-Length: 9\r\n",
            Framing::Length(0),
            true,
        ),
        (
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n",
            Framing::Chunked,
            true,
        ),
    ] {
        let head = parse_response(format!("{head}\r\n").as_bytes()).unwrap();
        assert_eq!((head.framing, head.keep_alive), (framing, keep_alive));
    }
    for (head, reason) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n",
            Refused::LengthAndEncoding,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n",
            Refused::ContentLength,
        ),
        (
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n",
            Refused::TransferEncoding,
        ),
        (
            "HTTP/1.1 204 OK\r\nContent-Length: x\r\n",
            Refused::ContentLength,
        ),
        ("HTTP/1.1 200 OK\r\nX : a\r\n", Refused::HeaderName),
        ("HTTP/1.1 200 OK\r\nX: a\r\n b\r\n", Refused::HeaderName),
        ("HTTP/1.1 20x OK\r\n", Refused::StartLine),
        ("SSH-2.0-x\r\n", Refused::StartLine),
    ] {
        let refused = parse_response(format!("{head}\r\n").as_bytes());
        match refused {
            Ok(head) => panic!("{head:?} was taken"),
            // httparse calls some of these by other names.
            Err(refused) => assert!(
                refused == reason || matches!(refused, Refused::StartLine | Refused::Version),
                "{head:?}: {refused:?}"
            ),
        }
    }
}

fn case_of(names: &[&'static str]) -> HeaderCase {
    HeaderCase::of(names.iter().map(|name| name.as_bytes()))
}

#[test]
fn the_spelling_of_names_survives_a_tunnel() {
    for (names, encoded) in [
        (&["Host", "User-Agent", "X-1-Two"][..], "T"),
        (&["host", "user-agent"], "l"),
        (&[], "T"),
        (
            &["Host", "ETag", "WWW-Authenticate"],
            "T,ETag,WWW-Authenticate",
        ),
        (&["host", "accept", "X-Api-KEY"], "l,X-Api-KEY"),
    ] {
        let case = case_of(names);
        assert_eq!(case.encode(), encoded);
        let case = HeaderCase::decode(&case.encode()).unwrap();
        let headers: HeaderMap = names
            .iter()
            .map(|name| (name.parse().unwrap(), HeaderValue::from_static("v")))
            .collect::<Vec<(HeaderName, HeaderValue)>>()
            .into_iter()
            .collect();
        assert_eq!(case.names(&headers), names);
    }
}

#[test]
fn a_hostile_spelling_is_not_decoded() {
    let long = format!("T,{}", "a".repeat(5000));
    let many = format!("T{}", ",a".repeat(101));
    for text in [
        "", "t", "X", "T,", "T,,a", "T,a b", "Ta", "T,a:b", "T,a\tb", "l,\u{e9}", &long, &many,
    ] {
        let value = HeaderValue::from_bytes(text.as_bytes()).unwrap();
        assert_eq!(HeaderCase::decode(&value), None, "{text:?}");
    }
    // More odd names than are kept: those beyond follow the letter.
    let names: Vec<String> = (0..300).map(|n| format!("xX-{n}")).collect();
    let case = HeaderCase::of(names.iter().map(String::as_bytes));
    assert_eq!(HeaderCase::decode(&case.encode()), Some(case));
}

#[test]
fn headers_of_this_hop_are_removed() {
    let mut headers = map(&[
        ("connection", "close, X-Mine, content-length, Host"),
        ("x-mine", "1"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("te", "gzip, trailers"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "websocket"),
        ("host", "a"),
        ("content-length", "5"),
        ("x-yours", "2"),
    ]);
    assert_eq!(remove_hop_by_hop(&mut headers), None);
    assert_eq!(
        headers,
        map(&[
            ("te", "trailers"),
            ("host", "a"),
            ("content-length", "5"),
            ("x-yours", "2"),
        ])
    );
    let mut headers = map(&[
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
    ]);
    assert_eq!(
        remove_hop_by_hop(&mut headers),
        Some(HeaderValue::from_static("websocket"))
    );
    assert!(headers.is_empty());
    // Also where `Connection` does not say that the settings are of this hop.
    for upgrade in ["h2c", "h2c, websocket", "websocket , H2C", "a,,h2C,b"] {
        for connection in ["Upgrade, HTTP2-Settings", "upgrade"] {
            let mut headers = map(&[("connection", connection), ("http2-settings", "x")]);
            headers.insert("upgrade", HeaderValue::from_static(upgrade));
            assert_eq!(remove_hop_by_hop(&mut headers), None, "{upgrade}");
            assert!(headers.is_empty(), "{headers:?}");
        }
    }
    let mut headers = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
    headers.append("upgrade", HeaderValue::from_static("h2c"));
    assert_eq!(remove_hop_by_hop(&mut headers), None);
    let mut headers = map(&[("http2-settings", "x"), ("host", "a")]);
    assert_eq!(remove_hop_by_hop(&mut headers), None);
    assert_eq!(headers, map(&[("host", "a")]));
    let mut headers = map(&[("connection", "upgrade"), ("upgrade", "x, h2c-like")]);
    assert_eq!(
        remove_hop_by_hop(&mut headers),
        Some(HeaderValue::from_static("x, h2c-like"))
    );
}

/// Every byte of some heads replaced by each of these: nothing panics, and what is taken is taken again as
/// the same when it has been written anew.
#[test]
fn what_is_taken_means_the_same_to_the_next_parser() {
    let mut taken = 0;
    for base in [
        "POST /a?b HTTP/1.1\r\nHost: a:80\r\nContent-Length: 15\r\nX-Y: a, b\r\nConnection: close\r\n\r\n",
        "PUT http://h/x HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\r\n",
        "CONNECT a:1 HTTP/1.0\r\nHost: a:1\r\nContent-Length: 0\r\n\r\n",
    ] {
        for at in 0..base.len() {
            for byte in b"\0\t\n\r !,/09:;=@aZ#%\x7f\x80\xff" {
                let mut bytes = base.as_bytes().to_vec();
                bytes[at] = *byte;
                let Ok(Some(end)) = Scan::default().find(&bytes, true) else {
                    continue;
                };
                let bytes = Bytes::copy_from_slice(&bytes[..end]);
                let Ok(first) = head::request(&bytes, &Limits::default()) else {
                    continue;
                };
                taken += 1;
                let announced = encode::announced(&first.parts.headers);
                let says = encode::Says {
                    framing: Some(first.framing).filter(|f| *f != Framing::Length(0)),
                    keep_length: announced.is_some_and(|n| first.framing == Framing::Length(n)),
                    connection: encode::Connection::Default,
                };
                let mut written = Vec::new();
                encode::request(&mut written, &first.parts, says);
                let again = parse(&written).unwrap_or_else(|refused| {
                    panic!("{bytes:?} as {:?}: {refused}", Bytes::from(written))
                });
                assert_eq!(again.framing, first.framing, "{bytes:?}");
                assert_eq!(again.parts.method, first.parts.method);
                assert_eq!(again.parts.uri, first.parts.uri, "{bytes:?}");
                // Without a Host (HTTP/1.0) it is written from the target.
                if let Some(host) = first.parts.headers.get(http::header::HOST) {
                    assert_eq!(again.parts.headers[http::header::HOST], host);
                }
            }
        }
    }
    assert!(taken > 500, "{taken}");
}
