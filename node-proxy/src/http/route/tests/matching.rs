//! What a match asks of a request (HTTPRouteMatch, GRPCRouteMatch).

use super::*;

type Pairs = &'static [(&'static str, &'static str)];

/// Whether a request is matched, also: by which prefix.
fn matches(of: mesh::RouteMatch, request: &::http::request::Parts) -> Option<Option<String>> {
    let set = set(vec![http_route(vec![rule("r", vec![of])])]);
    let found = set.find(request)?;
    Some(found.prefix.map(str::to_owned))
}

#[test]
fn paths() {
    // HTTPPathMatch.type and value.
    #[rustfmt::skip]
    let cases = [
        // Exact: byte for byte.
        ("=/abc", "/abc", true), ("=/abc", "/abc/", false), ("=/abc", "/ABC", false), ("=/abc", "/abc/d", false),
        ("=/abc", "/abc?q=1", true), ("=/abc/", "/abc/", true), ("=/abc/", "/abc", false), ("=/", "/", true),
        ("=/a%20b", "/a%20b", true), ("=/a%20b", "/a+b", false),
        // PathPrefix: by element, a trailing slash is ignored.
        ("/abc", "/abc", true), ("/abc", "/abc/", true), ("/abc", "/abc/def", true), ("/abc", "/abcd", false),
        ("/abc/", "/abc", true), ("/abc/", "/abc/", true), ("/abc/", "/abc/def", true), ("/abc/", "/abcd", false),
        ("/abc", "/Abc", false), ("/abc", "/ab", false), ("/abc", "/abc?x=/", true), ("/a/b", "/a/b/c", true),
        ("/a/b", "/a", false), ("/a/b", "/a/bc", false), ("/abc", "/x/abc", false), ("/abc", "//abc", false),
        ("/", "/", true), ("/", "/anything/at/all", true), ("/", "*", true),
        // RegularExpression: RE2 syntax, the whole path.
        ("^/v[0-9]+", "/v12", true), ("^/v[0-9]+", "/v12/x", false), ("^/v[0-9]+", "/x/v12", false),
        ("^/v[0-9]+/.*", "/v1/x/y", true), ("^(?i)/abc", "/ABC", true), ("^/a|/b", "/b", true), ("^/a|/b", "/bx", false),
        ("^/a", "/a?b", true),
    ];
    for (of, uri, expected) in cases {
        assert_eq!(
            matches(path(of), &get(uri)).is_some(),
            expected,
            "{of} on {uri}"
        );
    }
}

#[test]
fn a_match_without_a_path_is_for_every_path() {
    // HTTPRouteRule.matches: "If no matches are specified, the default is a prefix path match on /".
    let none = set(vec![http_route(vec![rule("r", vec![])])]);
    let headers_only = mesh::RouteMatch {
        headers: exact(&[("a", "1")]),
        ..Default::default()
    };
    for uri in ["/", "/x", "/x/y?z"] {
        assert_eq!(found(&none, &get(uri)), "r");
        let with = request("GET", uri, &[("a", "1")]);
        assert_eq!(
            matches(headers_only.clone(), &with),
            Some(Some(String::new()))
        );
        assert_eq!(matches(headers_only.clone(), &get(uri)), None);
    }
}

#[test]
fn the_prefix_that_matched_is_told() {
    let of = |of: &str, uri: &str| matches(path(of), &get(uri)).unwrap();
    assert_eq!(of("/foo/", "/foo/bar").as_deref(), Some("/foo"));
    assert_eq!(of("/", "/foo").as_deref(), Some(""));
    assert_eq!(of("=/foo", "/foo"), None);
    assert_eq!(of("^/f.*", "/foo"), None);
}

#[test]
fn headers() {
    // HTTPHeaderMatch.
    let regex = mesh::NamedMatch {
        name: "version".into(),
        value: Some(string(mesh::MatchType::Regex, "v[12]")),
    };
    let latin = ::http::HeaderValue::from_bytes(b"\xe9").unwrap();
    #[rustfmt::skip]
    let cases: [(&str, Vec<mesh::NamedMatch>, Pairs, bool); 17] = [
        ("exact", exact(&[("version", "one")]), &[("version", "one")], true),
        ("values have case", exact(&[("version", "one")]), &[("version", "One")], false),
        ("names have none", exact(&[("Version", "one")]), &[("vErsion", "one")], true),
        ("absent", exact(&[("version", "one")]), &[], false),
        ("an empty value is not absence", exact(&[("version", "")]), &[], false),
        ("empty", exact(&[("version", "")]), &[("version", "")], true),
        ("AND", exact(&[("a", "1"), ("b", "2")]), &[("a", "1"), ("b", "2")], true),
        ("AND, one missing", exact(&[("a", "1"), ("b", "2")]), &[("a", "1")], false),
        ("of one name only the first counts", exact(&[("a", "1"), ("A", "2")]), &[("a", "1")], true),
        ("of one name only the first counts", exact(&[("a", "1"), ("A", "2")]), &[("a", "2")], false),
        ("repeated: the list (RFC 9110, 5.3)", exact(&[("a", "1,2")]), &[("a", "1"), ("a", "2")], true),
        ("repeated: not one of them", exact(&[("a", "1")]), &[("a", "1"), ("a", "2")], false),
        ("parts of a cookie (RFC 9113, 8.2.3)", exact(&[("Cookie", "a=1; b=2")]), &[("cookie", "a=1"), ("cookie", "b=2")], true),
        ("parts of a cookie are no list", exact(&[("cookie", "a=1,b=2")]), &[("cookie", "a=1"), ("cookie", "b=2")], false),
        ("a cookie in one part", exact(&[("cookie", "a=1; b=2")]), &[("cookie", "a=1; b=2")], true),
        ("regular expression", vec![regex.clone()], &[("version", "v2")], true),
        ("regular expression, all of it", vec![regex.clone()], &[("version", "v2x")], false),
    ];
    for (what, headers, sent, expected) in cases {
        let of = mesh::RouteMatch {
            headers,
            ..Default::default()
        };
        let got = matches(of, &request("GET", "/", sent)).is_some();
        assert_eq!(got, expected, "{what}");
    }
    let mut strange = get("/");
    strange.headers.insert("version", latin);
    let of = mesh::RouteMatch {
        headers: vec![regex],
        ..Default::default()
    };
    assert_eq!(matches(of, &strange), None);
}

#[test]
fn the_host_is_a_header_in_every_version() {
    // HTTPRouteSpec.hostnames is not for meshes: a header match on Host is what there is.
    let of = || mesh::RouteMatch {
        headers: exact(&[("host", "web.demo:8080")]),
        ..Default::default()
    };
    assert!(matches(of(), &request("GET", "/", &[("host", "web.demo:8080")])).is_some());
    assert!(matches(of(), &get("http://web.demo:8080/")).is_some());
    assert!(matches(of(), &get("http://other/")).is_none());
}

#[test]
fn query_parameters() {
    // HTTPQueryParamMatch.
    #[rustfmt::skip]
    let cases: [(&str, Pairs, &str, bool); 15] = [
        ("exact", &[("animal", "whale")], "/?animal=whale", true),
        ("other value", &[("animal", "whale")], "/?animal=dolphin", false),
        ("among others", &[("animal", "whale")], "/?a=b&animal=whale&c", true),
        ("absent", &[("animal", "whale")], "/", false),
        ("names have case", &[("animal", "whale")], "/?Animal=whale", false),
        ("values have case", &[("animal", "whale")], "/?animal=Whale", false),
        ("AND", &[("animal", "whale"), ("color", "blue")], "/?color=blue&animal=whale", true),
        ("AND, one missing", &[("animal", "whale"), ("color", "blue")], "/?animal=whale", false),
        ("repeated: the first", &[("animal", "whale")], "/?animal=whale&animal=dolphin", true),
        ("repeated: not the second", &[("animal", "whale")], "/?animal=dolphin&animal=whale", false),
        ("escaped", &[("animal", "blue whale")], "/?animal=blue%20whale", true),
        ("escaped as forms do", &[("animal", "blue whale")], "/?animal=blue+whale", true),
        ("a bad escape stands for itself", &[("animal", "100%")], "/?animal=100%", true),
        ("without a value", &[("animal", "")], "/?animal", true),
        ("of one name only the first counts", &[("a", "1"), ("a", "2")], "/?a=1", true),
    ];
    for (what, wanted, uri, expected) in cases {
        let of = mesh::RouteMatch {
            query_params: exact(wanted),
            ..Default::default()
        };
        assert_eq!(matches(of, &get(uri)).is_some(), expected, "{what}");
    }
    let regex = mesh::NamedMatch {
        name: "n".into(),
        value: Some(string(mesh::MatchType::Regex, "[0-9]+")),
    };
    let of = mesh::RouteMatch {
        query_params: vec![regex],
        ..Default::default()
    };
    assert!(matches(of.clone(), &get("/?n=12")).is_some());
    assert!(matches(of, &get("/?n=12a")).is_none());
}

#[test]
fn methods() {
    // HTTPRouteMatch.method.
    let of = || mesh::RouteMatch {
        method: "POST".into(),
        ..Default::default()
    };
    assert!(matches(of(), &request("POST", "/", &[])).is_some());
    assert!(matches(of(), &request("GET", "/", &[])).is_none());
    assert!(matches(of(), &request("post", "/", &[])).is_none());
}

#[test]
fn everything_in_a_match_must_hold_and_any_match_of_a_rule() {
    // HTTPRouteMatch and HTTPRouteRule.matches.
    let both = mesh::RouteMatch {
        method: "GET".into(),
        headers: exact(&[("version", "v2")]),
        query_params: exact(&[("q", "1")]),
        ..path("/foo")
    };
    let set = set(vec![http_route(vec![rule(
        "r",
        vec![both, path("/v2/foo")],
    )])]);
    let v2 = &[("version", "v2")];
    assert_eq!(found(&set, &request("GET", "/foo?q=1", v2)), "r");
    assert_eq!(found(&set, &request("PUT", "/foo?q=1", v2)), "");
    assert_eq!(found(&set, &request("GET", "/foo", v2)), "");
    assert_eq!(found(&set, &request("GET", "/foo?q=1", &[])), "");
    assert_eq!(found(&set, &request("GET", "/bar?q=1", v2)), "");
    assert_eq!(found(&set, &get("/v2/foo")), "r");
}

#[test]
fn a_preflight_is_for_the_rule_of_the_method_it_asks_about() {
    // HTTPCORSFilter; Fetch, "CORS-preflight request".
    let of = |name: &str, cors: bool| mesh::RouteRule {
        filters: cors
            .then(|| mesh::RouteFilter {
                filter: Some(mesh::route_filter::Filter::Cors(mesh::Cors::default())),
            })
            .into_iter()
            .collect(),
        ..rule(
            name,
            vec![mesh::RouteMatch {
                method: "PUT".into(),
                ..Default::default()
            }],
        )
    };
    let preflight = [
        ("origin", "http://a"),
        ("access-control-request-method", "PUT"),
    ];
    let with = set(vec![http_route(vec![of("r", true)])]);
    assert_eq!(found(&with, &request("OPTIONS", "/", &preflight)), "r");
    assert_eq!(found(&with, &request("OPTIONS", "/", &preflight[1..])), "");
    assert_eq!(found(&with, &request("GET", "/", &preflight)), "");
    let without = set(vec![http_route(vec![of("r", false)])]);
    assert_eq!(found(&without, &request("OPTIONS", "/", &preflight)), "");
}

#[test]
fn a_path_of_many_elements_costs_no_more_look_ups() {
    let set = set(vec![http_route(vec![rule("r", vec![path("/a/b")])])]);
    let long = format!("/a/b{}", "/x".repeat(20_000));
    assert_eq!(found(&set, &get(&long)), "r");
}

#[test]
fn grpc_calls() {
    // GRPCMethodMatch, GRPCHeaderMatch.
    use mesh::MatchType::{Exact, Regex};
    let of = |service: Option<(mesh::MatchType, &str)>, method: Option<(mesh::MatchType, &str)>| {
        mesh::RouteMatch {
            grpc_service: service.map(|(kind, value)| string(kind, value)),
            grpc_method: method.map(|(kind, value)| string(kind, value)),
            ..Default::default()
        }
    };
    #[rustfmt::skip]
    let cases = [
        (of(Some((Exact, "a.Echo")), Some((Exact, "Say"))), "/a.Echo/Say", true),
        (of(Some((Exact, "a.Echo")), Some((Exact, "Say"))), "/a.Echo/Shout", false),
        (of(Some((Exact, "a.Echo")), Some((Exact, "Say"))), "/a.echo/Say", false),
        (of(Some((Exact, "a.Echo")), None), "/a.Echo/Anything", true),
        (of(Some((Exact, "a.Echo")), None), "/b.Echo/Anything", false),
        (of(None, Some((Exact, "Say"))), "/any.Service/Say", true),
        (of(None, Some((Exact, "Say"))), "/any.Service/Shout", false),
        (of(Some((Regex, "a\\..*")), Some((Regex, "S.y"))), "/a.Echo/Say", true),
        (of(Some((Regex, "a\\..*")), Some((Regex, "S.y"))), "/xa.Echo/Say", false),
        (of(Some((Exact, "a.Echo")), Some((Regex, "S.*"))), "/a.Echo/Shout", true),
        (of(Some((Exact, "a.Echo")), Some((Regex, "S.*"))), "/a.Echo/XS", false),
        (of(Some((Exact, "a.Echo")), None), "/a.Echo/x/y", false),
        (of(Some((Exact, "a.Echo")), None), "/a.Echo", false),
        (of(None, None), "/whatever/it/is", true),
    ];
    for (of, uri, expected) in cases {
        let route = route(
            mesh::RouteKind::Grpc,
            "web",
            1,
            vec![rule("r", vec![of.clone()])],
        );
        let got = set(vec![route]).find(&request("POST", uri, &[])).is_some();
        assert_eq!(got, expected, "{of:?} on {uri}");
    }
    let headers = mesh::RouteMatch {
        headers: exact(&[("a", "1")]),
        ..Default::default()
    };
    let route = route(
        mesh::RouteKind::Grpc,
        "web",
        1,
        vec![rule("r", vec![headers])],
    );
    let set = set(vec![route]);
    assert_eq!(found(&set, &request("POST", "/a/b", &[("a", "1")])), "r");
    assert_eq!(found(&set, &request("POST", "/a/b", &[])), "");
}
