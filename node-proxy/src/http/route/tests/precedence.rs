//! Which of several matches wins, across all rules of all routes (HTTPRouteRule.matches,
//! GRPCRouteRule.matches).

use super::*;

/// Two routes of one rule each: the second, which is `wins`, goes before the first, in whatever order they
/// are listed.
fn compare(
    kind: mesh::RouteKind,
    loses: (&str, i64, mesh::RouteMatch),
    wins: (&str, i64, mesh::RouteMatch),
    request: &::http::request::Parts,
) {
    let of = |name: &str, (route_name, created, of): &(&str, i64, mesh::RouteMatch)| {
        route(
            kind,
            route_name,
            *created,
            vec![rule(name, vec![of.clone()])],
        )
    };
    for turn in 0..2 {
        let mut routes = vec![of("loses", &loses), of("wins", &wins)];
        routes.rotate_left(turn);
        assert_eq!(found(&set(routes), request), "wins", "{loses:?} {wins:?}");
    }
}

fn with(of: mesh::RouteMatch, method: &str, headers: usize, query: usize) -> mesh::RouteMatch {
    let named = |prefix: &str, count: usize| -> Vec<_> {
        (0..count)
            .flat_map(|n| exact(&[(&format!("{prefix}{n}"), "1")]))
            .collect()
    };
    mesh::RouteMatch {
        method: method.into(),
        headers: named("h", headers),
        query_params: named("q", query),
        ..of
    }
}

#[test]
fn of_http_matches() {
    let headers = [("h0", "1"), ("h1", "1"), ("h2", "1")];
    let all = request("GET", "/foo/bar?q0=1&q1=1&q2=1", &headers);
    // Each step outweighs everything below it; the older route is always the one that loses, so that
    // age does not decide.
    #[rustfmt::skip]
    let steps = [
        // 1. Exact path.
        (with(path("/foo/bar"), "GET", 3, 3), path("=/foo/bar")),
        // Regular expressions: our choice.
        (with(path("^/foo/bar"), "GET", 3, 3), path("=/foo/bar")),
        (with(path("/foo/bar"), "GET", 3, 3), path("^/.*")),
        (path("^/foo.*"), path("^/foo/bar")),
        // 2. Longest prefix.
        (with(path("/foo"), "GET", 3, 3), path("/foo/bar")),
        (with(path("/"), "GET", 3, 3), path("/foo")),
        (with(mesh::RouteMatch::default(), "GET", 3, 3), path("/foo")),
        // 3. A method.
        (with(path("/foo"), "", 3, 3), with(path("/foo"), "GET", 0, 0)),
        // 4. Most headers.
        (with(path("/foo"), "GET", 1, 3), with(path("/foo"), "GET", 2, 0)),
        (with(path("=/foo/bar"), "", 1, 3), with(path("=/foo/bar"), "", 2, 0)),
        // 5. Most query parameters.
        (with(path("/foo"), "GET", 2, 1), with(path("/foo"), "GET", 2, 2)),
        (with(path("^/foo/bar"), "", 0, 1), with(path("^/foo/bar"), "", 0, 2)),
    ];
    for (loses, wins) in steps {
        compare(mesh::RouteKind::Http, ("a", 1, loses), ("b", 2, wins), &all);
    }
    // 6. The oldest route. 7. By namespace/name.
    compare(
        mesh::RouteKind::Http,
        ("a", 2, path("/foo")),
        ("b", 1, path("/foo")),
        &all,
    );
    compare(
        mesh::RouteKind::Http,
        ("b", 1, path("/foo")),
        ("a", 1, path("/foo")),
        &all,
    );
    // A trailing slash makes no prefix longer.
    compare(
        mesh::RouteKind::Http,
        ("b", 1, path("/foo/")),
        ("a", 1, path("/foo")),
        &all,
    );
}

#[test]
fn the_first_rule_of_a_route_and_the_namespace_before_the_name() {
    // 8. List order.
    let rules = vec![
        rule("first", vec![path("/")]),
        rule("second", vec![path("/")]),
    ];
    assert_eq!(found(&set(vec![http_route(rules)]), &get("/")), "first");
    let of = |namespace: &str, name: &str| mesh::Route {
        namespace: namespace.into(),
        ..route(
            mesh::RouteKind::Http,
            name,
            1,
            vec![rule(namespace, vec![])],
        )
    };
    assert_eq!(
        found(&set(vec![of("b", "a"), of("a", "b")]), &get("/")),
        "a"
    );
}

#[test]
fn what_does_not_hold_gives_way_to_the_next_best() {
    // Precedence is of matches, not of rules: a rule counts by whichever of its matches holds.
    let set = set(vec![http_route(vec![
        rule("exact", vec![with(path("=/foo/bar"), "", 1, 0)]),
        rule("long", vec![with(path("/foo/bar"), "POST", 0, 0)]),
        rule("short", vec![path("/foo"), path("=/other")]),
        rule("any", vec![path("/")]),
    ])]);
    assert_eq!(
        found(&set, &request("GET", "/foo/bar", &[("h0", "1")])),
        "exact"
    );
    assert_eq!(found(&set, &request("POST", "/foo/bar", &[])), "long");
    assert_eq!(found(&set, &request("GET", "/foo/bar", &[])), "short");
    assert_eq!(found(&set, &get("/other")), "short");
    assert_eq!(found(&set, &get("/fo")), "any");
}

#[test]
fn the_suites_own_cases() {
    // Conformance test MeshHTTPRouteMatching.
    let version = |of: mesh::RouteMatch, version: &str| mesh::RouteMatch {
        headers: exact(&[("version", version)]),
        ..of
    };
    let matching = set(vec![http_route(vec![
        rule(
            "v1",
            vec![path("/"), version(mesh::RouteMatch::default(), "one")],
        ),
        rule(
            "v2",
            vec![path("/v2"), version(mesh::RouteMatch::default(), "two")],
        ),
    ])]);
    for (uri, headers, expected) in [
        ("/", &[][..], "v1"),
        ("/example", &[], "v1"),
        ("/", &[("version", "one")], "v1"),
        ("/v2", &[], "v2"),
        ("/v2/example", &[], "v2"),
        ("/", &[("version", "two")], "v2"),
        ("/v2/", &[], "v2"),
        ("/v2example", &[], "v1"),
        ("/foo/v2/example", &[], "v1"),
    ] {
        assert_eq!(
            found(&matching, &request("GET", uri, headers)),
            expected,
            "{uri}"
        );
    }

    // MeshHTTPRouteQueryParamMatching: a prefix goes before a query parameter, and no match is a 404.
    let query = |pairs: &[(&str, &str)], of: mesh::RouteMatch| mesh::RouteMatch {
        query_params: exact(pairs),
        ..of
    };
    let any = mesh::RouteMatch::default;
    let matching = set(vec![http_route(vec![
        rule("v1", vec![query(&[("animal", "whale")], any())]),
        rule("v2", vec![query(&[("animal", "dolphin")], any())]),
        rule(
            "v3",
            vec![
                query(&[("animal", "dolphin"), ("color", "blue")], any()),
                query(&[("ANIMAL", "Whale")], any()),
            ],
        ),
        rule("path", vec![path("/path5")]),
    ])]);
    for (uri, expected) in [
        ("/?animal=whale", "v1"),
        ("/?animal=dolphin", "v2"),
        ("/?animal=dolphin&color=blue", "v3"),
        ("/?ANIMAL=Whale", "v3"),
        ("/?animal=whale&otherparam=irrelevant", "v1"),
        ("/?color=blue", ""),
        ("/?animal=dog", ""),
        ("/", ""),
        ("/path5?animal=whale", "path"),
    ] {
        assert_eq!(found(&matching, &get(uri)), expected, "{uri}");
    }
}

#[test]
fn of_grpc_matches() {
    use mesh::MatchType::{Exact, Regex};
    let of = |service: Option<(mesh::MatchType, &str)>,
              method: Option<(mesh::MatchType, &str)>,
              headers: usize| mesh::RouteMatch {
        grpc_service: service.map(|(kind, value)| string(kind, value)),
        grpc_method: method.map(|(kind, value)| string(kind, value)),
        ..with(mesh::RouteMatch::default(), "", headers, 0)
    };
    let headers = [("h0", "1"), ("h1", "1")];
    let call = request("POST", "/pkg.Echo/Say", &headers);
    let (service, method) = (Some((Exact, "pkg.Echo")), Some((Exact, "Say")));
    #[rustfmt::skip]
    let steps = [
        // Characters in the service, whatever the method and headers.
        (of(None, method, 2), of(service, None, 0)),
        (of(Some((Regex, "pkg.E...")), method, 2), of(service, None, 0)),
        (of(None, method, 2), of(Some((Regex, ".*")), None, 0)),
        (of(Some((Regex, ".*")), method, 2), of(Some((Regex, "pkg.*")), None, 0)),
        // Characters in the method.
        (of(service, None, 2), of(service, method, 0)),
        (of(service, Some((Regex, "S.y")), 2), of(service, method, 0)),
        (of(None, None, 2), of(None, method, 0)),
        // Headers.
        (of(service, method, 1), of(service, method, 2)),
        (of(None, None, 0), of(None, None, 1)),
    ];
    for (loses, wins) in steps {
        compare(
            mesh::RouteKind::Grpc,
            ("a", 1, loses),
            ("b", 2, wins),
            &call,
        );
    }
    let same = || of(service, method, 0);
    compare(
        mesh::RouteKind::Grpc,
        ("a", 2, same()),
        ("b", 1, same()),
        &call,
    );
    compare(
        mesh::RouteKind::Grpc,
        ("b", 1, same()),
        ("a", 1, same()),
        &call,
    );
    let rules = vec![rule("first", vec![same()]), rule("second", vec![same()])];
    let set = set(vec![route(mesh::RouteKind::Grpc, "a", 1, rules)]);
    assert_eq!(found(&set, &call), "first");
}
