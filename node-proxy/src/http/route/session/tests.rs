use super::*;

fn session(kind: SessionPersistenceType, change: fn(&mut mesh::SessionPersistence)) -> Session {
    let mut wire = mesh::SessionPersistence {
        r#type: kind.into(),
        ..Default::default()
    };
    change(&mut wire);
    Session::compile(&wire, "demo/web", Some("/shop")).unwrap()
}

fn endpoint() -> SocketAddr {
    "[fd00::1]:8080".parse().unwrap()
}

/// What the caller sends after it was told.
fn told(session: &Session, began: u64, now: u64) -> (String, HeaderMap) {
    let mut response = HeaderMap::new();
    session.announce(endpoint(), began, now, &mut response);
    let mut request = HeaderMap::new();
    let (name, value) = response.iter().next().unwrap();
    let value = value.to_str().unwrap().to_owned();
    if name == SET_COOKIE {
        let pair = value.split(';').next().unwrap();
        let cookies = format!("a=b; {pair}; c=d");
        request.insert(COOKIE, cookies.parse().unwrap());
    } else {
        request.insert(name, value.parse().unwrap());
    }
    (value, request)
}

#[test]
fn a_session_comes_back_to_its_endpoint() {
    // GEP-1619, SessionPersistence.type.
    for kind in [
        SessionPersistenceType::Cookie,
        SessionPersistenceType::Header,
    ] {
        let session = session(kind, |s| s.session_name = "sticky".into());
        let (_, request) = told(&session, 100, 100);
        let token = session.token(&request, 1_000_000).unwrap();
        assert_eq!(token.endpoint, endpoint());
        assert_eq!(token.began, 100);
    }
}

#[test]
fn the_cookie_is_for_the_routes_path_and_not_for_scripts() {
    // GEP-1619, "Path" and "Secure, HttpOnly".
    let session = session(SessionPersistenceType::Cookie, |_| ());
    let (cookie, _) = told(&session, 0, 0);
    assert!(cookie.starts_with("warren-session-demo-web="), "{cookie}");
    assert!(cookie.contains("; Path=/shop;"), "{cookie}");
    assert!(cookie.contains("HttpOnly"), "{cookie}");
    assert!(!cookie.contains("Max-Age"), "a session cookie: {cookie}");
}

#[test]
fn a_cookie_without_a_path_does_not_say_one() {
    // GEP-1619, "Path": of a session of a Service it is left unset.
    let session = Session::compile(&mesh::SessionPersistence::default(), "demo/web", None);
    let (cookie, request) = told(&session.clone().unwrap(), 0, 0);
    assert!(!cookie.contains("Path"), "{cookie}");
    assert!(cookie.ends_with("; HttpOnly; SameSite=Lax"), "{cookie}");
    assert!(session.unwrap().token(&request, 0).is_some());
}

#[test]
fn a_session_ends_with_its_absolute_timeout() {
    // SessionPersistence.absoluteTimeout, CookieConfig.lifetimeType.
    let of = |permanent: bool| {
        session(
            SessionPersistenceType::Cookie,
            match permanent {
                true => |s| (s.absolute_timeout_ms, s.permanent) = (60_000, true),
                false => |s| s.absolute_timeout_ms = 60_000,
            },
        )
    };
    let (cookie, request) = told(&of(true), 1000, 1010);
    assert!(cookie.contains("; Max-Age=50"), "{cookie}");
    for session in [of(true), of(false)] {
        assert!(session.token(&request, 1059).is_some());
        assert_eq!(session.token(&request, 1060), None);
        assert!(session.token(&request, 990).is_some(), "clocks differ");
        assert_eq!(session.token(&request, 1), None, "begun in the future");
    }
    assert!(!told(&of(false), 1000, 1010).0.contains("Max-Age"));
}

#[test]
fn what_is_no_token_is_no_session() {
    let session = session(SessionPersistenceType::Header, |s| {
        s.session_name = "x".into()
    });
    let long = "A".repeat(10_000);
    for text in ["", "!", "aGVsbG8", "MS4yLjMuNDo4MA", &long] {
        let request = HeaderMap::from_iter([("x".parse().unwrap(), text.parse().unwrap())]);
        assert_eq!(session.token(&request, 0), None, "{text}");
    }
    assert_eq!(session.token(&HeaderMap::new(), 0), None);
}
