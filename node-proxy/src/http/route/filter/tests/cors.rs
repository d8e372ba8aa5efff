//! HTTPCORSFilter (GEP-1767).

use super::*;

fn cors(change: impl FnOnce(&mut mesh::Cors)) -> [Filter; 1] {
    let mut wire = mesh::Cors {
        allow_origins: vec!["https://a.test".into()],
        max_age: 5,
        ..Default::default()
    };
    change(&mut wire);
    [filter(Wire::Cors(wire))]
}

type Texts = &'static [&'static str];

fn list(all: &[&str]) -> Vec<String> {
    all.iter().map(|one| (*one).into()).collect()
}

fn preflight(filters: &[Filter], origin: &str, headers: &[(&str, &str)]) -> HeaderMap {
    let mut all = vec![("origin", origin), ("access-control-request-method", "PUT")];
    all.extend(headers);
    let response = answered(filters, request("OPTIONS", "/", &all));
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    response.into_parts().0.headers
}

fn simple(filters: &[Filter], sent: &[(&str, &str)], own: &[(&str, &str)]) -> HeaderMap {
    let request_head = request("GET", "/", sent);
    let origin = origin(filters, &request_head.headers);
    let passed = pass(filters, request_head.clone(), None);
    assert_eq!(passed.headers, request_head.headers);
    let mut response = Response::new(()).into_parts().0;
    response.headers = request("GET", "/", own).headers;
    apply_response(filters, origin.as_ref(), &mut response);
    response.headers
}

fn one(headers: &HeaderMap, name: &str) -> String {
    values(headers, &format!("access-control-{name}")).join(" | ")
}

#[test]
fn origins() {
    // HTTPCORSFilter.allowOrigins.
    #[rustfmt::skip]
    let cases: [(&[&str], &str, &str); 33] = [
        (&["https://a.test"], "https://a.test", "https://a.test"),
        (&["https://a.test"], "http://a.test", ""),
        (&["https://a.test"], "https://a.test:8443", ""),
        (&["https://a.test:8443"], "https://a.test:8443", "https://a.test:8443"),
        (&["https://a.test"], "https://b.test", ""),
        (&["https://a.test", "https://b.test"], "https://b.test", "https://b.test"),
        (&["*"], "https://any.test", "*"),
        (&["https://a.test", "*"], "https://any.test", "*"),
        // `*` of a host is greedy to the left.
        (&["https://*.test"], "https://a.test", "https://a.test"),
        (&["https://*.test"], "https://x.y.a.test", "https://x.y.a.test"),
        (&["https://*.test"], "https://test", ""),
        (&["https://*.test"], "https://.test", ""),
        (&["https://*.test"], "http://a.test", ""),
        (&["https://*.test"], "https://a.test.evil", ""),
        (&["https://*.test"], "https://evil/.test", ""),
        (&["https://*.test:8443"], "https://a.test:8443", "https://a.test:8443"),
        (&["https://*"], "https://a.test", "https://a.test"),
        (&["https://*"], "http://a.test", ""),
        (&[], "https://a.test", ""),
        // Where no port is said it is that of the scheme, on both sides.
        (&["https://a.test:443"], "https://a.test", "https://a.test"),
        (&["https://a.test"], "https://a.test:443", "https://a.test:443"),
        (&["http://a.test:80"], "http://a.test", "http://a.test"),
        (&["http://a.test:443"], "http://a.test", ""),
        (&["https://a.test"], "https://A.Test", "https://A.Test"),
        // `*` does not reach beyond the host.
        (&["https://*"], "https://evil.test:8443", ""),
        (&["https://*"], "https://a.test:443", "https://a.test:443"),
        (&["https://*:8443"], "https://a.test:8443", "https://a.test:8443"),
        (&["https://*.test"], "https://a.test:8443", ""),
        (&["https://*"], "https://a@b.test", ""),
        // No scheme, no host.
        (&["null"], "null", "null"),
        (&["https://*"], "null", ""),
        (&["*"], "null", "*"),
        (&["https://a.test:*"], "https://a.test:8443", ""),
    ];
    for (allowed, origin, expected) in cases {
        let filters = cors(|c| c.allow_origins = list(allowed));
        let answer = preflight(&filters, origin, &[]);
        assert_eq!(
            one(&answer, "allow-origin"),
            expected,
            "{allowed:?} {origin}"
        );
        let answer = simple(&filters, &[("origin", origin)], &[]);
        assert_eq!(
            one(&answer, "allow-origin"),
            expected,
            "{allowed:?} {origin}"
        );
        let varies = !expected.is_empty() && expected != "*";
        assert_eq!(
            !values(&answer, "vary").is_empty(),
            varies,
            "{allowed:?} {origin}"
        );
    }
}

#[test]
fn an_origin_that_is_not_allowed_gets_no_header_at_all() {
    let filters = cors(|c| {
        c.allow_credentials = true;
        c.allow_methods = list(&["*"]);
        c.expose_headers = list(&["x"]);
    });
    assert!(preflight(&filters, "https://b.test", &[]).is_empty());
    assert!(simple(&filters, &[("origin", "https://b.test")], &[]).is_empty());
    assert!(
        simple(&filters, &[], &[]).is_empty(),
        "no cross-origin request"
    );
}

#[test]
fn preflights() {
    // HTTPCORSFilter: allowMethods, allowHeaders, allowCredentials, maxAge.
    let wanted = [("access-control-request-headers", "x-a, x-b")];
    #[rustfmt::skip]
    let cases: [(&str, Texts, Texts, bool, &str, &str); 7] = [
        ("lists", &["GET", "PUT"], &["x-a", "x-c"], false, "GET, PUT", "x-a, x-c"),
        ("lists, with credentials", &["GET", "PUT"], &["x-a"], true, "GET, PUT", "x-a"),
        ("`*`", &["*"], &["*"], false, "*", "*"),
        ("with credentials never `*`", &["*"], &["*"], true, "PUT", "x-a, x-b"),
        ("`*` among others", &["GET", "*"], &["x", "*"], true, "PUT", "x-a, x-b"),
        ("nothing is allowed", &[], &[], false, "", ""),
        ("nothing is allowed, with credentials", &[], &[], true, "", ""),
    ];
    for (what, methods, headers, credentials, expected_methods, expected_headers) in cases {
        let filters = cors(|c| {
            c.allow_methods = list(methods);
            c.allow_headers = list(headers);
            c.allow_credentials = credentials;
        });
        let answer = preflight(&filters, "https://a.test", &wanted);
        assert_eq!(one(&answer, "allow-methods"), expected_methods, "{what}");
        assert_eq!(one(&answer, "allow-headers"), expected_headers, "{what}");
        let said = if credentials { "true" } else { "" };
        assert_eq!(
            one(&answer, "allow-credentials"),
            said,
            "{what}: only when true"
        );
        assert_eq!(one(&answer, "max-age"), "5", "{what}");
    }
    // As the conformance test HTTPRouteCORS expects.
    let filters = cors(|c| c.expose_headers = list(&["x-a", "x-b"]));
    let answer = preflight(&filters, "https://a.test", &[]);
    assert_eq!(one(&answer, "expose-headers"), "x-a, x-b");
    assert_eq!(
        one(
            &preflight(&cors(|_| ()), "https://a.test", &[]),
            "expose-headers"
        ),
        ""
    );
    let filters = cors(|c| {
        c.allow_headers = list(&["*"]);
        c.allow_credentials = true;
        c.max_age = 600;
    });
    let answer = preflight(&filters, "https://a.test", &[]);
    assert_eq!(one(&answer, "allow-headers"), "", "not asked, not answered");
    assert_eq!(one(&answer, "max-age"), "600");
}

#[test]
fn with_credentials_any_origin_is_echoed() {
    let filters = cors(|c| {
        c.allow_origins = list(&["*"]);
        c.allow_credentials = true;
    });
    let answer = preflight(&filters, "https://any.test", &[]);
    assert_eq!(one(&answer, "allow-origin"), "https://any.test");
    assert_eq!(values(&answer, "vary"), ["origin"]);
}

#[test]
fn answers_of_the_app_get_the_headers() {
    // HTTPCORSFilter.exposeHeaders. The filter's word counts, not the app's.
    let filters = cors(|c| c.expose_headers = list(&["x-a", "x-b"]));
    let own = [
        ("access-control-allow-origin", "https://elsewhere"),
        ("vary", "accept"),
    ];
    let answer = simple(&filters, &[("origin", "https://a.test")], &own);
    assert_eq!(one(&answer, "allow-origin"), "https://a.test");
    assert_eq!(one(&answer, "expose-headers"), "x-a, x-b");
    assert_eq!(one(&answer, "allow-methods"), "", "of preflights only");
    assert_eq!(one(&answer, "max-age"), "", "of preflights only");
    assert_eq!(values(&answer, "vary"), ["accept", "origin"]);
    for (credentials, expected) in [(false, "*"), (true, "")] {
        let filters = cors(|c| {
            c.expose_headers = list(&["*"]);
            c.allow_credentials = credentials;
        });
        let answer = simple(&filters, &[("origin", "https://a.test")], &[]);
        assert_eq!(one(&answer, "expose-headers"), expected);
    }
}

#[test]
fn only_a_preflight_is_answered_here() {
    let filters = cors(|_| ());
    // OPTIONS without the question, or without an origin, is the app's.
    for headers in [
        &[("origin", "https://a.test")][..],
        &[("access-control-request-method", "PUT")],
    ] {
        pass(&filters, request("OPTIONS", "/", headers), None);
    }
    let asked = [
        ("origin", "https://a.test"),
        ("access-control-request-method", "PUT"),
    ];
    pass(&filters, request("GET", "/", &asked), None);
}
