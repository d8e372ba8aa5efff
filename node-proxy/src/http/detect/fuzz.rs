//! Openings: a prefix never says what more bytes take back, and others read the same in them.

use bytes::Bytes;

use super::{MAX_PEEK, PREFACE, Protocol, detect, is_blank, is_token};
use crate::http::h1;

pub(crate) fn opening(bytes: &[u8]) {
    let whole = detect(bytes);
    let mut decided = None;
    for length in 0..=bytes.len() {
        let now = detect(&bytes[..length]);
        if decided.is_some() {
            assert_eq!(now, decided, "of {length} bytes");
        }
        decided = now;
    }
    // However little comes at a time, what is never decided is decided by the bound.
    if whole.is_none() {
        let mut long = bytes.to_vec();
        long.resize(MAX_PEEK.max(long.len()), b'a');
        assert!(detect(&long).is_some());
    }
    if bytes.len() < MAX_PEEK {
        if whole == Some(Protocol::Http1) {
            assert!(words(bytes).iter().skip(2).any(|word| is_version(word)));
        }
        // What the codec would take, or a server that divides a line into words, must be led to the codec.
        let is_request = h1::fuzz::heads::is_request(&Bytes::copy_from_slice(bytes));
        if is_request || is_lenient_request(bytes) {
            assert_eq!(whole, Some(Protocol::Http1));
        }
    }
    // What another TLS server reads in a ClientHello.
    let is_seen = bytes.len() <= MAX_PEEK && has_known_versions(bytes);
    if let Some(name) = by_rustls(bytes).filter(|_| is_seen) {
        assert!(matches!(&whole, Some(Protocol::Tls { .. })), "{whole:?}");
        if let Some(name) = name {
            let sni = Some(name.to_ascii_lowercase().into());
            assert_eq!(whole, Some(Protocol::Tls { sni }));
        }
    }
}

/// The words of the first line that has any.
fn words(bytes: &[u8]) -> Vec<&[u8]> {
    let mut lines = bytes.split(|b| *b == b'\n').map(|line| {
        let words = line.split(|b| is_blank(*b));
        words.filter(|word| !word.is_empty()).collect::<Vec<_>>()
    });
    lines.find(|words| !words.is_empty()).unwrap_or_default()
}

fn is_version(word: &[u8]) -> bool {
    word.get(..5)
        .is_some_and(|begin| begin.eq_ignore_ascii_case(b"HTTP/"))
}

/// Whether the first line is of three words, a method, a target and a version.
fn is_lenient_request(bytes: &[u8]) -> bool {
    let [method, target, version] = words(bytes)[..] else {
        return false;
    };
    !PREFACE.starts_with(bytes)
        && !bytes.starts_with(PREFACE)
        && method.iter().all(|b| is_token(*b))
        && !target.iter().any(u8::is_ascii_control)
        && is_version(version)
}

/// Whether its records are of a version there is; a receiver may ignore that (RFC 8446, section 5.1), detection does not.
fn has_known_versions(mut bytes: &[u8]) -> bool {
    while let [_, major, minor, high, low, rest @ ..] = bytes {
        if *major != 3 || *minor > 4 {
            return false;
        }
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        bytes = rest.get(length..).unwrap_or_default();
    }
    true
}

/// The server name of a hello that rustls takes.
fn by_rustls(mut bytes: &[u8]) -> Option<Option<String>> {
    let mut acceptor = rustls::server::Acceptor::default();
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes).ok()?;
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                return Some(accepted.client_hello().server_name().map(str::to_owned));
            }
            Ok(None) => {}
            Err(_) => return None,
        }
    }
    None
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "SSH-2.0-x\r\n",
        "M-SEARCH * HTTP/1.1\r\n",
        "GET /no-version\r\n",
        "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        " GET\t /  Http/9.9\r\n",
        "GET\u{b}/a b\rHTTP/1.1\n",
        "GET http://a/ HTTP/1.1\r\n",
        "A-METHOD-OF-MORE-THAN-THIRTY-TWO-BYTES / HTTP/1.1\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nXX",
        "0032git-upload-pack /project.git\0host=a\0",
        "SET a hello\r\n",
        "\u{3}\u{0}\u{0}\u{13}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    for name in ["web.demo.svc", "A_b.example.com", "10.0.0.1"] {
        let hello = hello(name);
        let mut cut = vec![];
        // The same message in two records.
        let (first, second) = hello[5..].split_at(20);
        for part in [first, second] {
            cut.extend_from_slice(&[22, 3, 1, (part.len() >> 8) as u8, part.len() as u8]);
            cut.extend_from_slice(part);
        }
        seeds.extend([hello, cut]);
    }
    seeds
}

fn hello(name: &str) -> Vec<u8> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .expect("the provider has them")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = rustls_pki_types::ServerName::try_from(name.to_owned()).expect("a name");
    let mut client = rustls::ClientConnection::new(config.into(), name).expect("a client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("memory");
    hello
}
