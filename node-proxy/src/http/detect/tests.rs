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
        assert_eq!(at, line.find("HTTP/1.").unwrap() + 7, "{line:?}");
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
        (b"*1\r\n$4\r\nPING\r\n", 3),                  // Redis
        (b"SSH-2.0-OpenSSH_9.2\r\n", 20),
        (b"EHLO mail\r\n", 10),
        (b"GET /\r\n", 6),       // HTTP/0.9
        (b"GET  / HTTP/1.1", 5), // two spaces
        (b"GET / HTTP/2.0\r\n", 12),
        (b"PRI * HTTP/2.0\r\n\r\nXX", 12 + 7),
        (b" GET / HTTP/1.1", 1),
        (b"\r\nGET / HTTP/1.1", 1),
        (b"GET / Http/1.1", 8),
        (b"\x16\x02", 2),
        (b"\x16\x03\x05", 3),
        (b"\x16\x03\x01\x50", 4),
        (b"\x16\x03\x01\x00\x00", 5),
        (b"\x16\x03\x01\x00\x05\x02", 6), // ServerHello
        (b"\x80\x2e\x01\x00\x02", 1),
    ] {
        assert_eq!(decided_at(opening).1, Protocol::Opaque, "{opening:?}");
        if !opening.starts_with(b"PRI") && !opening.starts_with(b"GET / HTTP/2") {
            assert_eq!(decided_at(opening).0, at, "{opening:?}");
        }
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
fn nothing_is_undecided_for_ever() {
    let mut line = b"GET /".to_vec();
    line.resize(MAX_PEEK, b'a');
    assert_eq!(detect(&line[..MAX_PEEK - 1]), None);
    assert_eq!(detect(&line), Some(Protocol::Opaque));
    let mut large = vec![22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff];
    large.resize(MAX_PEEK, 0);
    assert_eq!(detect(&large[..MAX_PEEK - 1]), None);
    assert_eq!(detect(&large), Some(Protocol::Tls { sni: None }));
    assert_eq!(detect(&[b'A'; MAX_METHOD]), None);
    assert_eq!(detect(&[b'A'; MAX_METHOD + 1]), Some(Protocol::Opaque));
}
