//! Sessions: what a caller brings back is what it was told, or no session.

use std::net::SocketAddr;
use std::time::Duration;

use ::http::header::{COOKIE, SET_COOKIE};
use ::http::{HeaderMap, HeaderValue};

use super::{Carrier, SKEW, Session, Token};
use crate::fuzz::{Input, part};

const NOW: u64 = 1_800_000_000;

pub(crate) fn session(bytes: &[u8]) {
    let mut input = Input(bytes);
    let kind = input.byte();
    let timeout = (kind & 4 != 0).then_some(Duration::from_secs(600));
    let carrier = match kind & 1 {
        0 => Carrier::Header(::http::HeaderName::from_static("x-session")),
        _ => Carrier::Cookie {
            name: "s".into(),
            path: (kind & 8 == 0).then(|| "/".into()),
            permanent: kind & 2 != 0,
        },
    };
    let session = Session {
        carrier,
        absolute_timeout: timeout,
    };
    let began = NOW + SKEW - u64::from(input.byte()) * 8;
    let cookies = input.part();

    // Whatever is brought: the token is one that this proxy could have given, and not of the future.
    let mut request = HeaderMap::new();
    for line in cookies.split(|b| *b == b'\n').take(8) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            request.append("x-session", value.clone());
            request.append(COOKIE, value);
        }
    }
    if let Some(token) = session.token(&request, NOW) {
        assert_eq!(Token::decode(&token.encode()), Some(token));
        assert!(token.began <= NOW + SKEW);
        assert!(timeout.is_none_or(|limit| NOW.saturating_sub(token.began) < limit.as_secs()));
    }

    // What is told and brought back among others of its kind.
    let Some(endpoint) = std::str::from_utf8(input.part())
        .ok()
        .and_then(|t| t.parse::<SocketAddr>().ok())
    else {
        return;
    };
    let mut response = HeaderMap::new();
    session.announce(endpoint, began, NOW, &mut response);
    let mut request = HeaderMap::new();
    if let Some(value) = response.remove("x-session") {
        request.insert("x-session", value);
    }
    if let Some(value) = response.remove(SET_COOKIE) {
        let pair = value
            .to_str()
            .expect("a cookie is text")
            .split(';')
            .next()
            .unwrap_or_default();
        let among = format!("a=b; {pair}; c=\"d\"");
        request.insert(COOKIE, among.try_into().expect("text"));
    }
    let ended = timeout.is_some_and(|limit| NOW.saturating_sub(began) >= limit.as_secs());
    let token = Token { endpoint, began };
    assert_eq!(session.token(&request, NOW), (!ended).then_some(token));
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let endpoint = "10.1.2.3:8080".parse().expect("an address");
    let token = Token {
        endpoint,
        began: NOW - 10,
    }
    .encode();
    let seed = |kind: u8, brought: &str, endpoint: &str| {
        [
            &[kind, 60][..],
            &part(brought.as_bytes()),
            &part(endpoint.as_bytes()),
        ]
        .concat()
    };
    vec![
        seed(1, &format!("a=b; s={token}"), "10.1.2.3:8080"),
        seed(3, &format!("s=\"{token}\"\ns=other"), "[fd00::1]:80"),
        seed(9, &format!("s={token}"), "10.1.2.3:8080"),
        seed(4, &token, "10.1.2.3:1"),
        seed(5, "s=; s", "[fe80::1%3]:80"),
    ]
}
