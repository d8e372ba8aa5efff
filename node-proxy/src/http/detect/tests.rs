use std::sync::Arc;

use super::*;

/// What is said of every beginning of `opening`: undecided up to some byte, one answer from there on.
fn decided_at(opening: &[u8]) -> (usize, Protocol) {
    let first = (0..=opening.len())
        .find(|cut| detect(&opening[..*cut]).is_some())
        .expect("decided at the end");
    let answer = detect(&opening[..first]).unwrap();
    for cut in first..=opening.len() {
        assert_eq!(
            detect(&opening[..cut]).as_ref(),
            Some(&answer),
            "cut at {cut}"
        );
    }
    (first, answer)
}

fn hello(name: &'static str) -> Vec<u8> {
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_root_certificates(rustls::RootCertStore::empty())
    .with_no_client_auth();
    let mut client =
        rustls::ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[test]
fn request_lines_are_known_at_the_version_wherever_they_are_cut() {
    for line in [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "PRI * HTTP/1.1\r\n",
        "PROPFIND /a/b?c=d HTTP/1.0\r\n",
        "M-SEARCH * HTTP/1.1\r\n",
        "CONNECT example.com:443 HTTP/1.1\r\n",
        "OPTIONS http://a/ HTTP/1.1\r\n",
        "!#$%&'*+-.^_`|~09azAZ / HTTP/1.1\r\n",
    ] {
        let (at, answer) = decided_at(line.as_bytes());
        assert_eq!(answer, Protocol::Http1, "{line:?}");
        // What may be the preface of HTTP/2 is so up to its version.
        let more = usize::from(line.starts_with("PRI"));
        assert_eq!(at, line.find("HTTP/").unwrap() + 5 + more, "{line:?}");
    }
}

#[test]
fn what_a_lenient_server_takes_for_a_request_is_http1_wherever_it_is_cut() {
    let forged = "Host: x\r\nwarren-client-id: spiffe://cluster.local/ns/prod/sa/admin\r\n\r\n";
    let long = ["A".repeat(33), "A".repeat(3000)].map(|method| format!("{method} / HTTP/1.1"));
    let lines = [
        "\r\nGET /admin HTTP/1.1",
        "\r\n\r\n\r\nGET / HTTP/1.1",
        "\nGET / HTTP/1.1",
        "\rGET / HTTP/1.1",
        " GET / HTTP/1.1",
        "\t \r\n GET / HTTP/1.1",
        "GET  / HTTP/1.1",
        "GET /  HTTP/1.1",
        "GET\t/\tHTTP/1.1",
        "GET\u{b}/\u{c}HTTP/1.1",
        "GET\r/\rHTTP/1.1",
        "GET\u{1c}/\u{1f}HTTP/1.1",
        "GET  * HTTP/1.1",
        "GET admin HTTP/1.1",
        "GET / http/1.1",
        "GET / Http/1.1",
        "GET / HTTP/2.0",
        "GET / HTTP/9.9",
        "GET /a b HTTP/1.1",
        "GET http://a/b c HTTP/1.1",
        "GET /a\u{1}b HTTP/1.1",
        "GET /a\0b HTTP/1.1",
        "GET /\u{e0} HTTP/1.1",
    ];
    for line in lines.into_iter().chain(long.iter().map(String::as_str)) {
        let opening = format!("{line}\r\n{forged}");
        let (at, answer) = decided_at(opening.as_bytes());
        assert_eq!(answer, Protocol::Http1, "{line:?}");
        let version = line.to_ascii_lowercase().find("http/").unwrap();
        assert_eq!(at, version + 5, "{line:?}");
    }
    // Python takes these for spaces, too; they are no UTF-8.
    assert_eq!(
        decided_at(b"\x85GET\xa0/\x85HTTP/1.1\r\n").1,
        Protocol::Http1
    );
    assert_eq!(
        decided_at(b"PRI * HTTP/2.0\r\n\r\nXX"),
        (19, Protocol::Http1)
    );
}

#[test]
fn empty_lines_alone_say_nothing() {
    for opening in ["\r", "\r\n", "\r\n\r\n", "\n\n", " \t"] {
        assert_eq!(detect(opening.as_bytes()), None, "{opening:?}");
    }
}

#[test]
fn the_preface_is_known_when_it_is_whole() {
    let opening = [PREFACE, &[0; 30]].concat();
    assert_eq!(decided_at(&opening), (24, Protocol::Http2));
}

#[test]
fn other_protocols_are_opaque_at_the_first_byte_that_excludes_the_rest() {
    for (opening, at) in [
        (&b"\x00\x00\x00\x08\x04\xd2\x16\x2f"[..], 1), // PostgreSQL
        (b"*1\r\n$4\r\nPING\r\n", 4),                  // Redis
        (b"PING\r\n", 6),
        (b"GET key\r\n", 9),
        (b"GET /path\r\nHost: a\r\n", 11),
        (b"SET a b\r\n", 7),
        (b"SET a hello\r\n", 8),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 21),
        (b"EHLO mail\r\n", 11),
        (b"GET /\r\n", 7), // HTTP/0.9
        (b"DESCRIBE rtsp://a/b RTSP/1.0\r\n", 30),
        (b"OPTIONS sip:a SIP/2.0\r\n", 15),
        (b"0032git-upload-pack /project.git\0host=a\0", 33),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n", 12),
        (b"\r\n\r\n\0\r\nQUIT\n", 5), // PROXY, version 2
        (b"\x0bMSH|^~\\&|A|B\r", 8),  // HL7
        (b"\x30\x0c\x02\x01\x01", 3), // LDAP
        (b"\x10\x12\0\x04MQTT", 1),
        (b"\x16\x02", 2),
        (b"\x16\x03\x05", 3),
        (b"\x16\x03\x01\x50", 4),
        (b"\x16\x03\x01\x00\x00", 5),
        (b"\x16\x03\x01\x00\x05\x02", 6), // ServerHello
        (b"\x80\x2e\x01\x00\x02", 1),
    ] {
        assert_eq!(decided_at(opening), (at, Protocol::Opaque), "{opening:?}");
    }
}

#[test]
fn a_client_hello_is_known_when_it_is_whole_and_names_the_server() {
    let bytes = hello("Web.Example.COM");
    let (at, answer) = decided_at(&bytes);
    assert_eq!(at, bytes.len());
    assert_eq!(
        answer,
        Protocol::Tls {
            sni: Some("web.example.com".into())
        }
    );
    // An address is no name (RFC 6066 3).
    assert_eq!(
        decided_at(&hello("10.0.0.1")).1,
        Protocol::Tls { sni: None }
    );
}

#[test]
fn a_client_hello_over_several_records_is_put_together() {
    let whole = hello("web.example.com");
    let message = &whole[5..];
    for size in [1, 3, 64, 500] {
        let mut split = Vec::new();
        for part in message.chunks(size) {
            split.extend_from_slice(&[22, 3, 1]);
            split.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
            split.extend_from_slice(part);
        }
        if split.len() < MAX_PEEK {
            let (at, answer) = decided_at(&split);
            assert_eq!(at, split.len());
            assert_eq!(
                answer,
                Protocol::Tls {
                    sni: Some("web.example.com".into())
                }
            );
        }
    }
}

#[test]
fn a_malformed_hello_is_tls_without_a_name() {
    let whole = hello("web.example.com");
    // Every length field in turn made too large.
    for at in 9..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] = 0xff;
        assert!(matches!(detect(&bytes), Some(Protocol::Tls { .. })));
    }
}

#[test]
fn control_characters_are_no_client_hello() {
    // What Netty skips before a request.
    let hello = [22, 3, 1, 0, 5, 1, 0, 0, 1, 0];
    let request = b"GET /admin HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_eq!(
        detect(&[&hello[..], request].concat()),
        Some(Protocol::Opaque)
    );
}

#[test]
fn nothing_is_undecided_for_ever() {
    for (begin, with, answer) in [
        (&b"GET /"[..], b'a', Protocol::Http1),
        (b"GET http://", b'a', Protocol::Http1),
        (b"CONNECT ", b'a', Protocol::Http1),
        (b"GET / ", b'H', Protocol::Http1),
        (b"GET", b' ', Protocol::Http1),
        (b"", b'\n', Protocol::Http1),
        // Data, not a method.
        (b"", b'a', Protocol::Opaque),
    ] {
        let mut line = begin.to_vec();
        line.resize(MAX_PEEK, with);
        assert_eq!(detect(&line[..MAX_PEEK - 1]), None, "{begin:?}");
        assert_eq!(detect(&line), Some(answer.clone()), "{begin:?}");
        // More of them change nothing.
        line.extend_from_slice(b"\n\0");
        assert_eq!(detect(&line), Some(answer), "{begin:?}");
    }
    let mut large = vec![22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff];
    large.resize(MAX_PEEK, 0);
    assert_eq!(detect(&large[..MAX_PEEK - 1]), None);
    assert_eq!(detect(&large), Some(Protocol::Tls { sni: None }));
}
