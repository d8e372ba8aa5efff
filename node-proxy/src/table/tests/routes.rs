//! Routes and policies joined to Services, whatever comes first.

use mesh_api::proto::mesh::RouteKind;

use super::*;
use crate::http::route::{Choice, Match};

fn parent(service: &str) -> mesh::RouteParent {
    mesh::RouteParent {
        namespace: "demo".into(),
        service: service.into(),
        ..Default::default()
    }
}

fn backend(service: &str) -> mesh::RouteBackend {
    mesh::RouteBackend {
        namespace: "demo".into(),
        service: service.into(),
        port: 80,
        weight: 1,
        ..Default::default()
    }
}

/// An HTTPRoute of one rule that is called as the route.
fn route(name: &str, parents: Vec<mesh::RouteParent>, to: &str) -> mesh::Route {
    mesh::Route {
        kind: RouteKind::Http.into(),
        namespace: "demo".into(),
        name: name.into(),
        parents,
        rules: vec![mesh::RouteRule {
            name: name.into(),
            backends: vec![backend(to)],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn resource(route: &mesh::Route) -> Update {
    let kind = route.kind().as_str_name().replace("ROUTE_KIND_", "");
    let kind = kind.to_lowercase();
    update(
        &format!("{kind}route/{}/{}", route.namespace, route.name),
        route,
    )
}

fn put_route(table: &Table, route: &mesh::Route) {
    put(table, Kind::Route, &[resource(route)]);
}

fn web(name: &str, address: &str) -> Update {
    service(name, &[address], &[("http", 80, 0), ("admin", 81, 0)])
}

/// The route in force at a Service port for callers of a namespace; empty: none.
fn in_force(port: &ServicePort, namespace: &str) -> String {
    let rules = port.http.load();
    let Some(set) = rules.routes_for(namespace) else {
        return String::new();
    };
    let request = ::http::Request::new(()).into_parts().0;
    set.find(&request)
        .map(|Match { rule, .. }| rule.route.to_string())
        .unwrap_or_default()
}

/// Where its only rule sends: the port's Service, else what is known of it.
fn sends_to(port: &ServicePort) -> String {
    let rules = port.http.load();
    let set = rules.routes_for("demo").unwrap();
    let rule = set.rules().next().unwrap();
    match rule.choose(0) {
        Choice::Invalid(_) => "500".into(),
        Choice::None => "none".into(),
        Choice::Backend(backend) => match backend.service_port() {
            Some(port) => format!("{}:{}", port.service.1, port.port),
            None => "pending".into(),
        },
    }
}

fn loaded(services_complete: bool) -> Arc<Table> {
    let table = table(services_complete);
    for kind in Kind::ALL {
        table.complete(kind.type_url());
    }
    table
}

#[test]
fn it_does_not_matter_what_comes_first() {
    let of_web = route("r", vec![parent("web")], "api");
    let arrivals: [&dyn Fn(&Table); 3] = [
        &|table| put_route(table, &of_web),
        &|table| put(table, Kind::Service, &[web("web", "10.96.0.1")]),
        &|table| put(table, Kind::Service, &[web("api", "10.96.0.2")]),
    ];
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let table = loaded(true);
        for arrival in order {
            arrivals[arrival](&table);
        }
        let web = port(&table, "10.96.0.1:80");
        assert_eq!(in_force(&web, "demo"), "demo/r", "{order:?}");
        assert_eq!(sends_to(&web), "api:80", "{order:?}");
        let api = port(&table, "10.96.0.2:80");
        assert_eq!(in_force(&api, "demo"), "", "one level only");
    }
}

#[test]
fn routes_are_attached_by_port_and_section_name() {
    // ParentReference.port and sectionName (GEP-1294): a Service's port number, its port's name, both.
    let of = |port: u32, section: &str| mesh::RouteParent {
        port,
        section_name: section.into(),
        ..parent("web")
    };
    for (parents, at_80, at_81) in [
        (vec![of(0, "")], true, true),
        (vec![of(80, "")], true, false),
        (vec![of(81, "")], false, true),
        (vec![of(8080, "")], false, false),
        (vec![of(0, "http")], true, false),
        (vec![of(0, "other")], false, false),
        (vec![of(80, "http")], true, false),
        (vec![of(80, "admin")], false, false),
        (vec![of(80, "http"), of(81, "admin")], true, true),
        (vec![parent("api")], false, false),
        (vec![], false, false),
    ] {
        for service_first in [true, false] {
            let table = loaded(true);
            let arrive = |service: bool| match service {
                true => put(&table, Kind::Service, &[web("web", "10.96.0.1")]),
                false => put_route(&table, &route("r", parents.clone(), "api")),
            };
            arrive(service_first);
            arrive(!service_first);
            for (to, expected) in [("10.96.0.1:80", at_80), ("10.96.0.1:81", at_81)] {
                let port = port(&table, to);
                let in_force = !in_force(&port, "demo").is_empty();
                assert_eq!(in_force, expected, "{to} {parents:?}");
                assert_eq!(port.http.load().attached, expected, "{to} {parents:?}");
            }
        }
    }
}

#[test]
fn consumer_routes_are_for_their_own_namespace() {
    // GEP-1294, "Producer and consumer routes".
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    let producer = route("p", vec![parent("web")], "api");
    let consumer = mesh::Route {
        namespace: "shop".into(),
        ..route("c", vec![parent("web")], "api")
    };
    put_route(&table, &consumer);
    let web = port(&table, "10.96.0.1:80");
    assert_eq!(in_force(&web, "shop"), "shop/c");
    assert_eq!(in_force(&web, "demo"), "", "passes through");
    assert!(web.http.load().routes_for("demo").is_none());
    put_route(&table, &producer);
    assert_eq!(in_force(&web, "shop"), "shop/c", "replaces, does not merge");
    assert_eq!(in_force(&web, "demo"), "demo/p");
    assert_eq!(in_force(&web, "other"), "demo/p");
    remove(&table, Kind::Route, &["httproute/shop/c"]);
    assert_eq!(in_force(&web, "shop"), "demo/p");
}

#[test]
fn kinds_conflict_within_a_service_port_only() {
    // GEP-1294, "Route kinds".
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    put_route(&table, &route("h", vec![parent("web")], "api"));
    let grpc = mesh::Route {
        kind: RouteKind::Grpc.into(),
        ..route(
            "g",
            vec![mesh::RouteParent {
                port: 80,
                ..parent("web")
            }],
            "api",
        )
    };
    put_route(&table, &grpc);
    assert_eq!(in_force(&port(&table, "10.96.0.1:80"), "demo"), "demo/g");
    assert_eq!(in_force(&port(&table, "10.96.0.1:81"), "demo"), "demo/h");
    remove(&table, Kind::Route, &["grpcroute/demo/g"]);
    assert_eq!(in_force(&port(&table, "10.96.0.1:80"), "demo"), "demo/h");
}

#[test]
fn a_route_that_changes_or_goes_leaves_nothing_behind() {
    let table = loaded(true);
    let services = [web("web", "10.96.0.1"), web("api", "10.96.0.2")];
    put(&table, Kind::Service, &services);
    put_route(&table, &route("r", vec![parent("web")], "api"));
    let (web, api) = (port(&table, "10.96.0.1:80"), port(&table, "10.96.0.2:80"));
    // It moves to another Service.
    let mut moved = resource(&route("r", vec![parent("api")], "web"));
    moved.version = "2".into();
    put(&table, Kind::Route, &[moved]);
    assert_eq!(in_force(&web, "demo"), "");
    assert_eq!(in_force(&api, "demo"), "demo/r");
    let known = table.known(Kind::Route.type_url());
    assert_eq!(
        known,
        HashMap::from([("httproute/demo/r".into(), "2".into())])
    );
    remove(&table, Kind::Route, &["httproute/demo/r"]);
    assert_eq!(in_force(&api, "demo"), "");
    assert!(!api.http.load().attached);
    assert_eq!(table.model.lock().places(), 0);
    assert!(table.known(Kind::Route.type_url()).is_empty());
}

#[test]
fn rules_outlive_an_update_of_their_service() {
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    put_route(&table, &route("r", vec![parent("web")], "web"));
    let before = port(&table, "10.96.0.1:80");
    let rules = before.http.load_full();
    put(&table, Kind::Service, &[web("web", "10.96.0.9")]);
    let after = port(&table, "10.96.0.9:80");
    assert!(Arc::ptr_eq(&before.http, &after.http));
    assert!(
        Arc::ptr_eq(&rules, &after.http.load_full()),
        "nothing to build anew"
    );
    // Who still holds the old port sees the new rules.
    put_route(&table, &route("s", vec![parent("web")], "web"));
    remove(&table, Kind::Route, &["httproute/demo/r"]);
    assert_eq!(in_force(&before, "demo"), "demo/s");
    // A port that is renamed may be another's.
    let by_name = mesh::RouteParent {
        section_name: "new".into(),
        ..parent("web")
    };
    put_route(&table, &route("t", vec![by_name], "web"));
    remove(&table, Kind::Route, &["httproute/demo/s"]);
    assert_eq!(in_force(&after, "demo"), "");
    put(
        &table,
        Kind::Service,
        &[service("web", &["10.96.0.9"], &[("new", 80, 0)])],
    );
    assert_eq!(in_force(&port(&table, "10.96.0.9:80"), "demo"), "demo/t");
}

#[test]
fn only_the_ports_concerned_are_built_anew() {
    let table = loaded(true);
    put(
        &table,
        Kind::Service,
        &[web("web", "10.96.0.1"), web("api", "10.96.0.2")],
    );
    put_route(
        &table,
        &route(
            "r",
            vec![mesh::RouteParent {
                port: 80,
                ..parent("web")
            }],
            "api",
        ),
    );
    let ports = [
        "10.96.0.1:80",
        "10.96.0.1:81",
        "10.96.0.2:80",
        "10.96.0.2:81",
    ]
    .map(|to| port(&table, to));
    let changed = |change: &dyn Fn()| -> Vec<bool> {
        let before: Vec<_> = ports.iter().map(|p| p.http.load_full()).collect();
        change();
        let pairs = ports.iter().zip(&before);
        pairs
            .map(|(p, before)| !Arc::ptr_eq(&p.http.load_full(), before))
            .collect()
    };
    let target = |kind: mesh::PolicyTargetKind, name: &str, section: &str| mesh::PolicyTarget {
        kind: kind.into(),
        name: name.into(),
        section_name: section.into(),
    };
    let policy = |target: mesh::PolicyTarget| {
        let policy = mesh::TrafficPolicy {
            namespace: "demo".into(),
            name: "p".into(),
            targets: vec![target],
            ..Default::default()
        };
        put(&table, Kind::TrafficPolicy, &[update("demo/p", &policy)]);
    };
    type Case<'a> = (&'static str, &'a dyn Fn(), [bool; 4]);
    use mesh::PolicyTargetKind::{GrpcRoute, HttpRoute, Service};
    #[rustfmt::skip]
    let cases: [Case<'_>; 9] = [
        ("a route of one port", &|| put_route(&table, &route("s", vec![mesh::RouteParent { port: 81, ..parent("web") }], "api")), [false, true, false, false]),
        ("a policy of a route", &|| policy(target(HttpRoute, "r", "")), [true, false, false, false]),
        ("it moves to a port", &|| policy(target(Service, "api", "admin")), [true, false, false, true]),
        ("to a Service", &|| policy(target(Service, "api", "")), [false, false, true, true]),
        ("to a route of another kind", &|| policy(target(GrpcRoute, "r", "")), [false, false, true, true]),
        ("it goes", &|| remove(&table, Kind::TrafficPolicy, &["demo/p"]), [false; 4]),
        ("a policy of a Service", &|| {
            let policy = mesh::BackendTrafficPolicy { namespace: "demo".into(), name: "b".into(), services: vec!["web".into()], ..Default::default() };
            put(&table, Kind::BackendTrafficPolicy, &[update("demo/b", &policy)]);
        }, [true, true, false, false]),
        ("it goes", &|| remove(&table, Kind::BackendTrafficPolicy, &["demo/b"]), [true, true, false, false]),
        ("endpoints", &|| put(&table, Kind::EndpointSlice, &[slice("w", "web", &[("http", 1)], &[])]), [false; 4]),
    ];
    for (what, change, expected) in cases {
        assert_eq!(changed(change), expected, "{what}");
    }
}

#[test]
fn a_policy_makes_a_port_one_that_something_is_attached_to() {
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    let web = port(&table, "10.96.0.1:80");
    assert!(!web.http.load().attached);
    let policy = mesh::BackendTrafficPolicy {
        namespace: "demo".into(),
        name: "b".into(),
        services: vec!["web".into()],
        session_persistence: Some(mesh::SessionPersistence::default()),
        ..Default::default()
    };
    put(
        &table,
        Kind::BackendTrafficPolicy,
        &[update("demo/b", &policy)],
    );
    assert!(web.http.load().attached && web.http.load().session.is_some());
    // The oldest counts.
    let older = mesh::BackendTrafficPolicy {
        name: "z".into(),
        created: -1,
        session_persistence: None,
        ..policy
    };
    put(
        &table,
        Kind::BackendTrafficPolicy,
        &[update("demo/z", &older)],
    );
    assert!(web.http.load().session.is_none());
}

#[test]
fn sessions_of_services_go_before_weights() {
    // GEP-1619, "Traffic Splitting": also with weight 0.
    let table = loaded(true);
    let services = [
        web("web", "10.96.0.1"),
        web("v1", "10.96.0.2"),
        web("v2", "10.96.0.3"),
    ];
    put(&table, Kind::Service, &services);
    let endpoints =
        |name: &str, address: &str| slice(name, name, &[("http", 8080)], &[(address, true)]);
    let slices = [endpoints("v1", "10.0.0.1"), endpoints("v2", "10.0.0.2")];
    put(&table, Kind::EndpointSlice, &slices);
    let mut split = route("r", vec![parent("web")], "v1");
    split.rules[0].backends.push(mesh::RouteBackend {
        weight: 0,
        ..backend("v2")
    });
    put_route(&table, &split);
    let rules = port(&table, "10.96.0.1:80").http.load_full();
    let set = rules.routes_for("demo").unwrap();
    let rule = set.rules().next().unwrap();
    assert!(!rule.has_backend_session());
    for name in ["v1", "v2"] {
        let policy = mesh::BackendTrafficPolicy {
            namespace: "demo".into(),
            name: name.into(),
            services: vec![name.into()],
            session_persistence: Some(mesh::SessionPersistence::default()),
            ..Default::default()
        };
        let policy = update(&format!("demo/{name}"), &policy);
        put(&table, Kind::BackendTrafficPolicy, &[policy]);
    }
    assert!(rule.has_backend_session());

    let brought = |service: &str, endpoint: &str| {
        let rules = port(&table, service).http.load_full();
        let session = rules.session.clone().unwrap();
        let mut told = ::http::HeaderMap::new();
        session.announce(endpoint.parse().unwrap(), 1, 1, &mut told);
        let cookie = told["set-cookie"].to_str().unwrap();
        assert!(!cookie.contains("Path"), "GEP-1619, Path: {cookie}");
        let mut request = ::http::HeaderMap::new();
        let pair = cookie.split(';').next().unwrap();
        request.insert("cookie", pair.parse().unwrap());
        request
    };
    let resumed = |request: &::http::HeaderMap| {
        let (backend, session, token) = rule.resume(request, 2)?;
        assert_eq!(session.token(request, 2), Some(token));
        Some(backend.service.1.to_string())
    };
    let (v1, v2) = ("10.96.0.2:80", "10.96.0.3:80");
    assert_eq!(
        resumed(&brought(v1, "10.0.0.1:8080")),
        Some("v1".to_owned())
    );
    assert_eq!(
        resumed(&brought(v2, "10.0.0.2:8080")),
        Some("v2".to_owned())
    );
    assert_eq!(
        resumed(&brought(v2, "10.0.0.1:8080")),
        None,
        "an endpoint of another backend"
    );
    assert_eq!(resumed(&brought(v1, "10.0.0.9:8080")), None, "it is gone");
    assert_eq!(resumed(&::http::HeaderMap::new()), None);
}

#[test]
fn a_backend_that_does_not_exist_takes_its_share() {
    // HTTPRouteRule.backendRefs: 500 for the share of what is not found.
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    put_route(&table, &route("r", vec![parent("web")], "api"));
    let web_port = port(&table, "10.96.0.1:80");
    assert_eq!(sends_to(&web_port), "500");
    put(
        &table,
        Kind::Service,
        &[service("api", &["10.96.0.2"], &[("", 81, 0)])],
    );
    assert_eq!(sends_to(&web_port), "500", "the Service has no such port");
    put(&table, Kind::Service, &[web("api", "10.96.0.2")]);
    assert_eq!(sends_to(&web_port), "api:80");
    remove(&table, Kind::Service, &["demo/api"]);
    assert_eq!(sends_to(&web_port), "500");
}

#[test]
fn before_every_service_is_held_none_is_missing() {
    let table = table(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    put_route(&table, &route("r", vec![parent("web")], "api"));
    let web = port(&table, "10.96.0.1:80");
    assert_eq!(sends_to(&web), "pending");
    table.complete(Kind::Service.type_url());
    assert_eq!(sends_to(&web), "500");
    put(&table, Kind::MeshConfig, &[settings(false)]);
    assert_eq!(sends_to(&web), "pending", "it can be asked for now");
}

#[tokio::test]
async fn backends_are_asked_for_by_name_where_not_all_services_are_held() {
    let table = loaded(false);
    table.set_online(true);
    let of_web = route("r", vec![parent("web")], "api");
    put_route(&table, &of_web);
    assert_eq!(
        asked_for(&table),
        BTreeSet::new(),
        "no Service here has the route"
    );
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    assert_eq!(asked_for(&table), BTreeSet::from(["demo/api".into()]));

    let web_port = port(&table, "10.96.0.1:80");
    let find = || {
        let (table, port) = (Arc::clone(&table), Arc::clone(&web_port));
        tokio::spawn(async move {
            let rules = port.http.load_full();
            let rule = rules.routes_for("demo").unwrap().rules().next().unwrap();
            let limit = Duration::from_secs(20);
            table.find_backend(&rule.backends[0], limit).await
        })
    };
    let waiting = find();
    tokio::task::yield_now().await;
    put(&table, Kind::Service, &[web("api", "10.96.0.2")]);
    assert_eq!(&*waiting.await.unwrap().unwrap().service.1, "api");

    remove(&table, Kind::Service, &["demo/api"]);
    assert!(find().await.unwrap().is_none(), "it is gone");
    assert_eq!(sends_to(&web_port), "500");
    assert_eq!(asked_for(&table), BTreeSet::from(["demo/api".into()]));

    // Another backend, about which the controller says nothing while it is away.
    put_route(&table, &route("r", vec![parent("web")], "other"));
    assert_eq!(asked_for(&table), BTreeSet::from(["demo/other".into()]));
    assert_eq!(sends_to(&web_port), "pending");
    table.set_online(false);
    assert!(find().await.unwrap().is_none());
    table.set_online(true);
    remove(&table, Kind::Service, &["demo/other"]);
    assert_eq!(sends_to(&web_port), "500");

    put(&table, Kind::MeshConfig, &[settings(true)]);
    assert_eq!(asked_for(&table), BTreeSet::new());
}

#[test]
fn names_that_are_asked_for_are_bounded() {
    let demand = Demand::new();
    let names = |count: usize| (0..count).map(|n| format!("demo/{n:06}")).collect();
    demand.name(names(demand::MAX_NAMED + 10));
    let asked = || demand.subscriptions().borrow()[Kind::Service.type_url()].len();
    assert_eq!(asked(), demand::MAX_NAMED + 1, "and the wildcard");
    demand.ask(ip("10.0.0.1"));
    demand.name(names(1));
    assert_eq!(asked(), 3, "addresses are not touched");
}

#[test]
fn what_is_not_valid_is_rejected_and_the_last_good_route_stays() {
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    put_route(&table, &route("r", vec![parent("web")], "api"));
    let mut bad = route("r", vec![parent("web")], "api");
    bad.rules[0].matches = vec![mesh::RouteMatch {
        method: "G T".into(),
        ..Default::default()
    }];
    let other = route("s", vec![parent("web")], "api");
    let url = Kind::Route.type_url();
    let applied = table.apply(url, &[resource(&bad), resource(&other)], &[]);
    assert_eq!(
        applied.result().unwrap_err(),
        "httproute/demo/r: matches.method: \"G T\" is no method"
    );
    assert_eq!(in_force(&port(&table, "10.96.0.1:80"), "demo"), "demo/r");
    assert_eq!(table.count(Kind::Route), 2);

    let named = update("httproute/demo/x", &other);
    assert!(
        table
            .apply(url, &[named], &[])
            .result()
            .unwrap_err()
            .contains("not the resource's name")
    );
    let policy = mesh::TrafficPolicy {
        namespace: "demo".into(),
        name: "p".into(),
        targets: vec![mesh::PolicyTarget {
            kind: 9,
            name: "web".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let url = Kind::TrafficPolicy.type_url();
    let text = table.apply(url, &[update("demo/p", &policy)], &[]).result();
    assert_eq!(
        text.unwrap_err(),
        "demo/p: targets.kind: 9 is not known to this proxy"
    );
    let policy = mesh::BackendTrafficPolicy {
        namespace: "demo".into(),
        name: "b".into(),
        services: vec![String::new()],
        ..Default::default()
    };
    let url = Kind::BackendTrafficPolicy.type_url();
    let text = table.apply(url, &[update("demo/b", &policy)], &[]).result();
    assert_eq!(text.unwrap_err(), "demo/b: services: empty");
}

#[test]
fn a_service_keeps_nothing_alive_once_it_is_gone() {
    // Two Services whose routes point to each other, and one that points to itself.
    let table = loaded(true);
    put(
        &table,
        Kind::Service,
        &[web("a", "10.96.0.1"), web("b", "10.96.0.2")],
    );
    put_route(&table, &route("ab", vec![parent("a")], "b"));
    put_route(&table, &route("ba", vec![parent("b")], "a"));
    put_route(&table, &route("aa", vec![parent("a")], "a"));
    let held = [port(&table, "10.96.0.1:80"), port(&table, "10.96.0.2:80")];
    assert!(
        format!("{held:?}").len() < 100_000,
        "printing does not go in circles"
    );
    let weak = held.map(|port| Arc::downgrade(&port));
    remove(&table, Kind::Service, &["demo/a", "demo/b"]);
    assert!(weak.iter().all(|port| port.upgrade().is_none()));
}

#[test]
fn a_service_says_which_endpoints_its_callers_should_use() {
    // Service.spec.internalTrafficPolicy and trafficDistribution (KEP-2086, KEP-4444, KEP-3015).
    let table = loaded(true);
    let with = |local: bool, distribution: &str| {
        let message = mesh::Service {
            namespace: "demo".into(),
            name: "web".into(),
            addresses: bytes(&["10.96.0.1"]),
            ports: vec![mesh::ServicePort {
                port: 80,
                ..Default::default()
            }],
            internal_traffic_local: local,
            traffic_distribution: distribution.into(),
        };
        put(&table, Kind::Service, &[update("demo/web", &message)]);
        let port = port(&table, "10.96.0.1:80");
        (port.internal_traffic_local, port.traffic_distribution)
    };
    assert_eq!(with(true, ""), (true, TrafficDistribution::Any));
    assert_eq!(
        with(false, "PreferClose"),
        (false, TrafficDistribution::PreferSameZone)
    );
    assert_eq!(
        with(false, "PreferSameZone"),
        (false, TrafficDistribution::PreferSameZone)
    );
    assert_eq!(
        with(false, "PreferSameNode"),
        (false, TrafficDistribution::PreferSameNode)
    );
    assert_eq!(with(false, "PreferMoon"), (false, TrafficDistribution::Any));
}

#[test]
fn types_that_not_every_controller_knows_are_not_waited_for_for_ever() {
    let table = table(true);
    let (loaded, nearly) = (table.loaded(), table.nearly_loaded());
    for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_optional()) {
        assert!(!*nearly.borrow(), "before {kind:?}");
        table.complete(kind.type_url());
    }
    assert!(*nearly.borrow() && !*loaded.borrow());
    table.settle();
    assert!(*loaded.borrow());
}

#[test]
fn the_dump_shows_what_is_attached() {
    let table = loaded(true);
    put(&table, Kind::Service, &[web("web", "10.96.0.1")]);
    put_route(&table, &route("r", vec![parent("web")], "web"));
    let dump = table.dump();
    let rules = &dump["services"][0]["ports"][0]["rules"];
    assert_eq!(rules["producer"][0], "httproute/demo/r");
}
