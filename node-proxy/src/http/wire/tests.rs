use http::{Request, Response};

use super::*;

fn envelope() -> Envelope {
    Envelope {
        target: "10.0.0.2:8080".parse().unwrap(),
        source: "10.0.0.1".parse().unwrap(),
        service: Some("demo/web:80".into()),
        connect: Some(Duration::from_millis(250)),
        retries: true,
    }
}

fn request(build: impl FnOnce(http::request::Builder) -> http::request::Builder) -> Parts {
    build(Request::builder()).body(()).unwrap().into_parts().0
}

/// As HTTP/2 carries it: no version, no extensions but `:protocol`.
fn over_tunnel(mut parts: Parts) -> Parts {
    let protocol = parts.extensions.remove::<ExtendedProtocol>();
    parts.extensions.clear();
    parts.extensions.extend(
        protocol
            .map(|protocol| {
                let mut extensions = http::Extensions::new();
                extensions.insert(protocol);
                extensions
            })
            .unwrap_or_default(),
    );
    parts.version = Version::HTTP_2;
    parts
}

#[test]
fn a_request_arrives_as_it_was() {
    for version in [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2] {
        let mut parts = request(|b| b.uri("/a?b").version(version).header("host", "web"));
        parts.extensions.insert(HeaderCase::default());
        let before = parts.headers.clone();
        seal(&mut parts, &envelope()).unwrap();
        let mut parts = over_tunnel(parts);
        assert_eq!(open(&mut parts), Ok(envelope()));
        assert_eq!(parts.version, version);
        assert_eq!(parts.headers, before);
        assert!(parts.extensions.get::<HeaderCase>().is_some());
    }
}

#[test]
fn a_target_in_absolute_form_arrives_in_it() {
    for (target, version, absolute) in [
        ("http://example.com/a", Version::HTTP_11, true),
        ("http://example.com/a", Version::HTTP_2, false),
        ("/a", Version::HTTP_11, false),
    ] {
        let mut parts = request(|b| b.uri(target).version(version));
        seal(&mut parts, &envelope()).unwrap();
        let mut parts = over_tunnel(parts);
        open(&mut parts).unwrap();
        let found = parts.extensions.get::<AbsoluteForm>().is_some();
        assert_eq!(found, absolute, "{target} {version:?}");
    }
}

#[tokio::test]
async fn a_request_of_http2_without_authority_can_be_sent() {
    let mut parts = request(|b| b.uri("/a").version(Version::HTTP_2).header("host", "web"));
    seal(&mut parts, &envelope()).unwrap();
    let (client, server) = tokio::io::duplex(4096);
    let serving = async {
        let mut server = h2::server::handshake(server).await.unwrap();
        let (request, _respond) = server.accept().await.unwrap().unwrap();
        request.into_parts().0
    };
    let calling = async {
        let (send, driving) = h2::client::handshake(client).await.unwrap();
        let mut send = send.ready().await.unwrap();
        let sent = send.send_request(Request::from_parts(parts, ()), true);
        let _answer = sent.expect("the codec takes it");
        let _ = driving.await;
    };
    let mut arrived = tokio::select! {
        arrived = serving => arrived,
        () = calling => unreachable!("the server goes first"),
    };
    assert_eq!(open(&mut arrived), Ok(envelope()));
    assert_eq!(arrived.version, Version::HTTP_2);
    assert_eq!(
        (&arrived.uri.to_string()[..], &arrived.headers["host"]),
        ("/a", &"web".parse().unwrap())
    );
}

#[test]
fn upgrades_travel_as_extended_connect() {
    let mut parts = request(|b| {
        b.uri("/chat")
            .version(Version::HTTP_11)
            .header("upgrade", "websocket")
    });
    seal(&mut parts, &envelope()).unwrap();
    assert_eq!(parts.method, Method::CONNECT);
    assert!(!parts.headers.contains_key(UPGRADE), "forbidden in HTTP/2");
    let mut parts = over_tunnel(parts);
    open(&mut parts).unwrap();
    assert_eq!(parts.method, Method::GET);
    assert_eq!(parts.uri, "/chat");
    assert_eq!(parts.headers[UPGRADE], "websocket");

    let answer = Response::builder()
        .status(101)
        .header("upgrade", "websocket")
        .body(())
        .unwrap();
    let mut answer = answer.into_parts().0;
    seal_response(&mut answer);
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(open_response(&mut answer), None);
    assert_eq!(answer.status, StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(answer.headers[UPGRADE], "websocket");

    answer.status = StatusCode::UPGRADE_REQUIRED;
    seal_response(&mut answer);
    assert!(!answer.headers.contains_key(UPGRADE), "forbidden in HTTP/2");
    open_response(&mut answer);
    assert_eq!(answer.status, StatusCode::UPGRADE_REQUIRED);
    assert_eq!(answer.headers[UPGRADE], "websocket");
}

#[test]
fn a_connect_of_the_apps_own_is_told_from_the_mesh_s() {
    let mut parts = request(|b| b.method("CONNECT").uri("db:5432").version(Version::HTTP_11));
    seal(&mut parts, &envelope()).unwrap();
    let protocol = parts.extensions.get::<ExtendedProtocol>().unwrap();
    assert_eq!(protocol.as_str(), CONNECT_PROTOCOL);
    let mut parts = over_tunnel(parts);
    open(&mut parts).unwrap();
    assert_eq!(parts.method, Method::CONNECT);
    assert_eq!(parts.uri, "db:5432");
}

#[test]
fn nothing_said_in_the_proxies_name_passes() {
    let mut headers = HeaderMap::new();
    headers.insert("warren-source", "10.0.0.9".parse().unwrap());
    headers.insert("warren-client-id", "spiffe://x/ns/a/sa/b".parse().unwrap());
    // The same variable to a CGI program.
    headers.insert("warren_client_id", "spiffe://x/ns/a/sa/b".parse().unwrap());
    headers.insert("warren-client_id", "spiffe://x/ns/a/sa/b".parse().unwrap());
    headers.insert("warrenty", "kept".parse().unwrap());
    assert!(strip(&mut headers));
    assert_eq!(headers.len(), 1);
    assert!(!strip(&mut headers));
}

#[test]
fn a_request_without_an_envelope_is_refused() {
    let sealed = || {
        let mut parts = request(|b| b.uri("/").version(Version::HTTP_11));
        seal(&mut parts, &envelope()).unwrap();
        over_tunnel(parts)
    };
    for name in [TARGET, SOURCE, VERSION] {
        let mut parts = sealed();
        parts.headers.remove(&name);
        assert_eq!(open(&mut parts), Err(ProxyError::BadRequest), "{name}");
        let mut parts = sealed();
        parts.headers.insert(&name, "nonsense".parse().unwrap());
        assert_eq!(open(&mut parts), Err(ProxyError::BadRequest), "{name}");
    }
}

#[test]
fn the_callee_proxys_own_error_is_named() {
    let mut answer = Response::new(()).into_parts().0;
    answer
        .headers
        .insert(PROXY_ERROR_HEADER, "rate_limited".parse().unwrap());
    seal_response(&mut answer);
    assert_eq!(open_response(&mut answer), Some(ProxyError::RateLimited));
    assert!(!answer.headers.contains_key(PROXY_ERROR_HEADER));
}
