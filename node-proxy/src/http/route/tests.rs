//! Which rule a request gets, and which backend. Each case names the field or GEP its rule comes from.

use ::http::Request;
use mesh_api::proto::mesh;

use super::compile::build;
use super::*;

mod matching;
mod precedence;

pub(super) fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> ::http::request::Parts {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

pub(super) fn get(uri: &str) -> ::http::request::Parts {
    request("GET", uri, &[])
}

/// `=/path` exact, `^expression` regular expression, else prefix.
pub(super) fn path(text: &str) -> mesh::RouteMatch {
    let (kind, value) = match text.split_at(1) {
        ("=", path) => (mesh::MatchType::Exact, path),
        ("^", expression) => (mesh::MatchType::Regex, expression),
        _ => (mesh::MatchType::Prefix, text),
    };
    mesh::RouteMatch {
        path: Some(string(kind, value)),
        ..Default::default()
    }
}

pub(super) fn string(kind: mesh::MatchType, value: &str) -> mesh::StringMatch {
    mesh::StringMatch {
        r#type: kind.into(),
        value: value.into(),
    }
}

pub(super) fn exact(pairs: &[(&str, &str)]) -> Vec<mesh::NamedMatch> {
    let pair = |(name, value): &(&str, &str)| mesh::NamedMatch {
        name: (*name).into(),
        value: Some(string(mesh::MatchType::Exact, value)),
    };
    pairs.iter().map(pair).collect()
}

/// A rule that is known by its name.
pub(super) fn rule(name: &str, matches: Vec<mesh::RouteMatch>) -> mesh::RouteRule {
    mesh::RouteRule {
        name: name.into(),
        matches,
        ..Default::default()
    }
}

pub(super) fn route(
    kind: mesh::RouteKind,
    name: &str,
    created: i64,
    rules: Vec<mesh::RouteRule>,
) -> mesh::Route {
    mesh::Route {
        kind: kind.into(),
        namespace: "demo".into(),
        name: name.into(),
        created,
        rules,
        ..Default::default()
    }
}

pub(super) fn http_route(rules: Vec<mesh::RouteRule>) -> mesh::Route {
    route(mesh::RouteKind::Http, "web", 1, rules)
}

/// A Service called `absent` does not exist; all others are on their way.
pub(super) fn place(service: &str, _: u16) -> Arc<Target> {
    let target = Target::default();
    if service.ends_with("/absent") {
        target.set_absent();
    }
    Arc::new(target)
}

pub(super) fn compile(wire: mesh::Route) -> Result<Route, String> {
    let kind = match wire.kind() {
        mesh::RouteKind::Grpc => "grpcroute",
        mesh::RouteKind::Tls => "tlsroute",
        mesh::RouteKind::Tcp => "tcproute",
        mesh::RouteKind::Http | mesh::RouteKind::Unspecified => "httproute",
    };
    let name = format!("{kind}/{}/{}", wire.namespace, wire.name);
    Route::compile(&name, wire, &mut place)
}

pub(super) fn set(routes: Vec<mesh::Route>) -> RouteSet {
    let routes: Vec<Route> = routes.into_iter().map(|r| compile(r).unwrap()).collect();
    let routes: Vec<&Route> = routes.iter().collect();
    build(&routes, |_, _| Arc::default()).unwrap()
}

/// Name of the rule that a request gets; empty: none.
pub(super) fn found(set: &RouteSet, request: &::http::request::Parts) -> String {
    let rule = set.find(request).map(|found| found.rule);
    let name = rule.and_then(|rule| rule.name.as_deref());
    name.unwrap_or_default().to_owned()
}

fn backend(service: &str, weight: u32) -> mesh::RouteBackend {
    mesh::RouteBackend {
        namespace: "demo".into(),
        service: service.into(),
        port: 80,
        weight,
        ..Default::default()
    }
}

fn rule_to(backends: Vec<mesh::RouteBackend>) -> Arc<Rule> {
    let rule = mesh::RouteRule {
        backends,
        ..Default::default()
    };
    let set = set(vec![http_route(vec![rule])]);
    Arc::clone(set.find(&get("/")).unwrap().rule)
}

/// Of 10,000 requests, with random numbers that are spread evenly.
fn shares(rule: &Rule) -> HashMap<String, usize> {
    let mut shares = HashMap::new();
    for turn in 0..10_000 {
        let to = match rule.choose(u64::MAX / 10_000 * turn) {
            Choice::Backend(backend) => backend.service.1.to_string(),
            Choice::Invalid(_) => "500".into(),
            Choice::None => "none".into(),
        };
        *shares.entry(to).or_default() += 1;
    }
    shares
}

#[test]
fn backends_share_by_weight_and_nothing_is_renormalised() {
    let unusable = mesh::RouteBackend {
        invalid: "kind ConfigMap".into(),
        port: 0,
        ..backend("cm", 1)
    };
    type Shares = &'static [(&'static str, usize)];
    #[rustfmt::skip]
    let cases: [(&str, Vec<mesh::RouteBackend>, Shares); 9] = [
        ("HTTPBackendRef.weight", vec![backend("a", 70), backend("b", 30)], &[("a", 7000), ("b", 3000)]),
        ("weight 0 gets nothing", vec![backend("a", 0), backend("b", 1)], &[("b", 10_000)]),
        ("one backend", vec![backend("a", 1)], &[("a", 10_000)]),
        ("HTTPRouteRule.backendRefs: not found", vec![backend("a", 1), backend("absent", 1)], &[("a", 5000), ("500", 5000)]),
        ("HTTPRouteRule.backendRefs: of a kind that is not known", vec![backend("a", 3), unusable.clone()], &[("a", 7500), ("500", 2500)]),
        ("all are not valid", vec![backend("absent", 1), unusable], &[("500", 10_000)]),
        ("MeshGRPCRouteWeight: not found, weight 0", vec![backend("a", 1), backend("absent", 0)], &[("a", 10_000)]),
        ("all weights are 0", vec![backend("a", 0)], &[("none", 10_000)]),
        ("no backend", vec![], &[("none", 10_000)]),
    ];
    for (what, backends, expected) in cases {
        let shares = shares(&rule_to(backends));
        assert_eq!(shares.len(), expected.len(), "{what}: {shares:?}");
        for (to, count) in expected {
            let got = shares.get(*to).copied().unwrap_or_default();
            assert!(got.abs_diff(*count) <= 1, "{what}: {shares:?}");
        }
    }
}

#[test]
fn rules_do_not_share_sessions_and_cookies_are_for_the_path_that_matched() {
    // GEP-1619, "Edge Case Behavior" and "Path".
    let session = |name: &str, matches: Vec<mesh::RouteMatch>| mesh::RouteRule {
        session_persistence: Some(mesh::SessionPersistence::default()),
        ..rule(name, matches)
    };
    let matches = [
        "/a",
        "=/b/c",
        "^/p1/p2/[^/]+/p3",
        "^/q1/q2x*",
        "^/r1|/r2",
        "^/s1/s2",
        "^.*[.]png",
    ];
    let set = set(vec![http_route(vec![
        session("", matches.map(path).to_vec()),
        session("named", vec![path("/h")]),
        session("", vec![path("/")]),
        rule("", vec![path("/without")]),
    ])]);
    let cookie = |uri: &str| {
        let request = get(uri);
        let session = set.find(&request).unwrap().rule.session.clone()?;
        let mut told = ::http::HeaderMap::new();
        session.announce("10.0.0.1:80".parse().unwrap(), 0, 0, &mut told);
        let cookie = told["set-cookie"].to_str().unwrap();
        let name = cookie.split('=').next().unwrap();
        let path = cookie.split("; ").find_map(|a| a.strip_prefix("Path="));
        Some((name.to_owned(), path.unwrap_or_default().to_owned()))
    };
    for (uri, name, path) in [
        ("/a/x", "warren-session-demo-web-0", "/a"),
        ("/b/c", "warren-session-demo-web-0", "/b/c"),
        ("/p1/p2/foo/p3", "warren-session-demo-web-0", "/p1/p2"),
        ("/q1/q2xx", "warren-session-demo-web-0", "/q1"),
        ("/r2", "warren-session-demo-web-0", "/"),
        ("/s1/s2", "warren-session-demo-web-0", "/s1/s2"),
        ("/logo.png", "warren-session-demo-web-0", "/"),
        ("/h", "warren-session-demo-web-named", "/h"),
        ("/other", "warren-session-demo-web-2", "/"),
    ] {
        let expected = Some((name.to_owned(), path.to_owned()));
        assert_eq!(cookie(uri), expected, "{uri}");
    }
    assert_eq!(cookie("/without"), None);
}

#[test]
fn the_largest_weights_do_not_overflow() {
    let rule = rule_to(vec![backend("a", u32::MAX), backend("b", u32::MAX)]);
    assert!(matches!(rule.choose(0), Choice::Backend(b) if &*b.service.1 == "a"));
    assert!(matches!(rule.choose(u64::MAX), Choice::Backend(b) if &*b.service.1 == "b"));
}

#[test]
fn a_consumer_route_replaces_the_producers_for_its_namespace() {
    // GEP-1294, "Producer and consumer routes".
    let named = |name: &str| Arc::new(set(vec![http_route(vec![rule(name, vec![])])]));
    let rules = PortRules {
        producer: Some(named("producer")),
        consumer: HashMap::from([("shop".into(), named("consumer"))]),
        ..PortRules::default()
    };
    let at = |namespace: &str| found(rules.routes_for(namespace).unwrap(), &get("/"));
    assert_eq!(at("shop"), "consumer");
    assert_eq!(at("other"), "producer");
    assert!(PortRules::default().routes_for("shop").is_none());
}

#[test]
fn one_kind_wins() {
    // GEP-1294, "Route kinds": GRPCRoute > HTTPRoute > TLSRoute > TCPRoute.
    use mesh::RouteKind::{Grpc, Http, Tcp, Tls};
    let of = |kinds: &[mesh::RouteKind]| {
        let rules = || vec![rule("r", vec![])];
        let routes = kinds.iter().map(|kind| route(*kind, "web", 1, rules()));
        match set(routes.collect()) {
            RouteSet::Grpc(_) => Grpc,
            RouteSet::Http(_) => Http,
            RouteSet::Tls(_) => Tls,
            RouteSet::Tcp(_) => Tcp,
        }
    };
    assert_eq!(of(&[Tcp, Tls, Http, Grpc]), Grpc);
    assert_eq!(of(&[Tcp, Http, Tls]), Http);
    assert_eq!(of(&[Tcp, Tls]), Tls);
    assert_eq!(of(&[Tcp]), Tcp);
    assert!(build(&[], |_, _| Arc::default()).is_none());
}

#[test]
fn tls_connections_are_routed_by_server_name() {
    // TLSRouteSpec.hostnames, Hostname.
    let route = |name: &str, created: i64, hostnames: &[&str]| mesh::Route {
        hostnames: hostnames.iter().map(|h| (*h).into()).collect(),
        ..route(
            mesh::RouteKind::Tls,
            name,
            created,
            vec![rule(name, vec![])],
        )
    };
    let set = set(vec![
        route("exact", 5, &["a.example.com"]),
        route("wildcard", 4, &["*.example.com"]),
        route("longer", 4, &["*.b.example.com"]),
        route("younger", 9, &["a.example.com", "only.test"]),
    ]);
    let RouteSet::Tls(routes) = &set else {
        panic!("{set:?}");
    };
    let of = |sni| routes.find(sni).and_then(|rule| rule.name.as_deref());
    for (sni, expected) in [
        ("a.example.com", Some("exact")),
        ("A.Example.COM", Some("exact")),
        ("a.example.com.", Some("exact")),
        ("b.example.com", Some("wildcard")),
        ("x.y.example.com", Some("wildcard")),
        ("x.b.example.com", Some("longer")),
        ("x.y.b.example.com", Some("longer")),
        ("example.com", None),
        (".example.com", None),
        ("badexample.com", None),
        ("only.test", Some("younger")),
        ("", None),
    ] {
        assert_eq!(of(Some(sni)), expected, "{sni:?}");
    }
    assert_eq!(of(None), None);
    assert_eq!(of(Some(&"a.".repeat(8000))), None);
    assert!(set.find(&get("/")).is_none() && !set.is_http());
}

#[test]
fn of_several_tcp_routes_the_oldest_is_in_force() {
    // GEP-1294 with the general rule for conflicts: oldest, then by name.
    let of = |name: &str, created| {
        route(
            mesh::RouteKind::Tcp,
            name,
            created,
            vec![rule(name, vec![])],
        )
    };
    for routes in [
        vec![of("b", 1), of("a", 2)],
        vec![of("a", 2), of("b", 1)],
        vec![of("c", 1), of("b", 1)],
    ] {
        let RouteSet::Tcp(routes) = set(routes) else {
            panic!("it is a set of TCPRoutes");
        };
        assert_eq!(routes.rule().name.as_deref(), Some("b"));
    }
}

#[test]
fn a_rule_that_cannot_be_carried_out_says_so() {
    // HTTPRouteFilter: what is not known must not be skipped.
    let of = |rule: mesh::RouteRule| {
        let set = set(vec![http_route(vec![rule])]);
        let rule = Arc::clone(set.find(&get("/")).unwrap().rule);
        rule.invalid.clone()
    };
    let written = mesh::RouteRule {
        invalid: "extensionRef".into(),
        ..Default::default()
    };
    assert_eq!(of(written).as_deref(), Some("extensionRef"));
    let newer = mesh::RouteRule {
        filters: vec![mesh::RouteFilter { filter: None }],
        ..Default::default()
    };
    assert!(of(newer).is_some());
    let bad = mesh::RequestRedirect {
        status_code: 200,
        ..Default::default()
    };
    let bad = mesh::RouteFilter {
        filter: Some(mesh::route_filter::Filter::RequestRedirect(bad)),
    };
    let bad = mesh::RouteRule {
        filters: vec![bad],
        ..Default::default()
    };
    assert!(of(bad).is_some_and(|why| why.contains("statusCode")));
    assert_eq!(of(mesh::RouteRule::default()), None);
    let at_backend = mesh::RouteBackend {
        filters: vec![mesh::RouteFilter { filter: None }],
        ..backend("a", 1)
    };
    assert!(matches!(
        rule_to(vec![at_backend]).choose(0),
        Choice::Invalid(_)
    ));
}

#[test]
fn what_is_not_valid_is_refused_by_field() {
    let with = |change: fn(&mut mesh::Route)| {
        let mut wire = http_route(vec![rule("r", vec![path("/")])]);
        change(&mut wire);
        compile(wire).unwrap_err()
    };
    type Change = fn(&mut mesh::Route);
    #[rustfmt::skip]
    let cases: [(Change, &str); 13] = [
        (|r| r.kind = 9, "kind: 9"),
        (|r| r.parents = vec![mesh::RouteParent::default()], "parents"),
        (|r| r.parents = vec![mesh::RouteParent { namespace: "a".into(), service: "b".into(), port: 70_000, ..Default::default() }], "parents.port: 70000"),
        (|r| r.rules[0].matches = vec![path("x")], "matches.path"),
        (|r| r.rules[0].matches = vec![path("^(")], "matches.path"),
        (|r| r.rules[0].matches = vec![path("^a)(b")], "matches.path"),
        (|r| r.rules[0].matches = vec![path("^a)|(b")], "matches.path"),
        (|r| r.rules[0].matches = vec![path("^(.{1,1000}){1,1000}")], "size limit"),
        (|r| r.rules[0].matches[0].method = "G T".into(), "matches.method"),
        (|r| r.rules[0].matches[0].headers = exact(&[(":path", "/")]), "matches.headers"),
        (|r| r.rules[0].matches[0].path = Some(mesh::StringMatch { r#type: 7, value: "/".into() }), "type 7"),
        (|r| r.rules[0].backends = vec![mesh::RouteBackend { port: 0, ..backend("a", 1) }], "backends.port"),
        (|r| r.rules[0].session_persistence = Some(mesh::SessionPersistence { session_name: "a b".into(), ..Default::default() }), "sessionPersistence"),
    ];
    for (change, field) in cases {
        let text = with(change);
        assert!(text.contains(field), "{text} should name {field}");
    }
}

#[test]
fn a_hundred_routes_are_found_through_indexes() {
    let routes = (0..100).map(|n| {
        let matches = vec![
            path(&format!("/team-{n}/api")),
            path(&format!("=/exact-{n}")),
        ];
        route(
            mesh::RouteKind::Http,
            &format!("r{n}"),
            n,
            vec![rule(&n.to_string(), matches)],
        )
    });
    let set = set(routes.collect());
    assert_eq!(found(&set, &get("/team-42/api/x/y")), "42");
    assert_eq!(found(&set, &get("/exact-7?q")), "7");
    assert_eq!(found(&set, &get("/team-100/api")), "");
    let RouteSet::Http(routes) = &set else {
        panic!("{set:?}");
    };
    assert_eq!(routes.lengths(), [12, 11], "one look-up for each length");
}
