use std::collections::BTreeSet;

use bytes::Bytes;
use mesh_api::names::address_to_bytes;
use mesh_api::proto::mesh;
use prost::Message;

use super::*;
use crate::http::opening::{self, Declared};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn bytes(addresses: &[&str]) -> Vec<Bytes> {
    addresses.iter().map(|a| address_to_bytes(ip(a))).collect()
}

fn update(name: &str, message: &impl Message) -> Update {
    Update {
        name: name.into(),
        version: "1".into(),
        aliases: vec![],
        value: message.encode_to_vec().into(),
    }
}

fn workload(uid: &str, addresses: &[&str]) -> mesh::Workload {
    mesh::Workload {
        uid: uid.into(),
        namespace: "demo".into(),
        name: uid.into(),
        service_account: "web".into(),
        addresses: bytes(addresses),
        node: "node-1".into(),
        node_addresses: bytes(&["192.168.0.1"]),
        state: EnrolmentState::Enforced.into(),
        tunnel: TunnelKind::Warren.into(),
        ..Default::default()
    }
}

fn service(name: &str, addresses: &[&str], ports: &[(&str, u32, u32)]) -> Update {
    let ports = ports
        .iter()
        .map(|(name, port, node_port)| mesh::ServicePort {
            name: (*name).into(),
            port: *port,
            node_port: *node_port,
            app_protocol: String::new(),
        });
    let message = mesh::Service {
        namespace: "demo".into(),
        name: name.into(),
        addresses: bytes(addresses),
        ports: ports.collect(),
        ..Default::default()
    };
    update(&format!("demo/{name}"), &message)
}

fn slice(name: &str, service: &str, ports: &[(&str, u32)], endpoints: &[(&str, bool)]) -> Update {
    let message = mesh::EndpointSlice {
        namespace: "demo".into(),
        name: name.into(),
        service: service.into(),
        ports: ports
            .iter()
            .map(|(name, port)| mesh::EndpointPort {
                name: (*name).into(),
                port: *port,
            })
            .collect(),
        endpoints: endpoints
            .iter()
            .map(|(address, ready)| mesh::Endpoint {
                address: address_to_bytes(ip(address)),
                ready: *ready,
                serving: *ready,
                ..Default::default()
            })
            .collect(),
    };
    update(&format!("demo/{name}"), &message)
}

fn settings(services_complete: bool) -> Update {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap();
    let message = mesh::MeshConfig {
        trust_domain: "cluster.local".into(),
        trust_bundle: vec![Bytes::copy_from_slice(root.der())],
        services_complete,
        node_addresses: bytes(&["192.168.0.1"]),
    };
    update("mesh", &message)
}

fn put(table: &Table, kind: Kind, updates: &[Update]) {
    let applied = table.apply(kind.type_url(), updates, &[]);
    assert_eq!(applied.rejected, []);
}

fn remove(table: &Table, kind: Kind, names: &[&str]) {
    let names: Vec<String> = names.iter().map(|n| (*n).into()).collect();
    table.apply(kind.type_url(), &[], &names);
}

fn table(services_complete: bool) -> Arc<Table> {
    let table = Table::new("node-1");
    put(&table, Kind::MeshConfig, &[settings(services_complete)]);
    table
}

fn port(table: &Table, destination: &str) -> Arc<ServicePort> {
    match table.service(destination.parse().unwrap()) {
        ServiceLookup::Port(port) => port,
        other => panic!("{destination}: {other:?}"),
    }
}

fn endpoints(port: &ServicePort) -> BTreeSet<String> {
    port.endpoints
        .endpoints()
        .iter()
        .map(|e| e.address.to_string())
        .collect()
}

#[test]
fn pods_are_found_by_each_of_their_addresses() {
    let table = table(true);
    let pod = update("a", &workload("a", &["10.0.0.1", "fd00::1"]));
    put(&table, Kind::Workload, &[pod]);
    let found = table.workload(ip("10.0.0.1")).unwrap();
    assert_eq!(
        found.identity.as_str(),
        "spiffe://cluster.local/ns/demo/sa/web"
    );
    assert_eq!(table.workload(ip("fd00::1")).unwrap().uid, found.uid);
    assert_eq!(
        table.workload(ip("::ffff:10.0.0.1")).unwrap().uid,
        found.uid
    );
    assert!(table.workload(ip("10.0.0.2")).is_none());

    put(
        &table,
        Kind::Workload,
        &[update("a", &workload("a", &["10.0.0.2"]))],
    );
    assert!(table.workload(ip("10.0.0.1")).is_none());
    assert!(table.workload(ip("10.0.0.2")).is_some());
    remove(&table, Kind::Workload, &["a"]);
    assert!(table.workload(ip("10.0.0.2")).is_none());
}

#[test]
fn an_address_that_two_pods_claim_is_never_outside_the_mesh() {
    let table = table(true);
    let owner = || table.workload(ip("10.0.0.1")).map(|w| w.uid.to_string());
    put(
        &table,
        Kind::Workload,
        &[update("old", &workload("old", &["10.0.0.1"]))],
    );
    put(
        &table,
        Kind::Workload,
        &[update("new", &workload("new", &["10.0.0.1"]))],
    );
    assert_eq!(owner().as_deref(), Some("new"));
    remove(&table, Kind::Workload, &["new"]);
    assert_eq!(owner().as_deref(), Some("old"));
    put(
        &table,
        Kind::Workload,
        &[update("new", &workload("new", &["10.0.0.1"]))],
    );
    remove(&table, Kind::Workload, &["old"]);
    assert_eq!(owner().as_deref(), Some("new"));
    remove(&table, Kind::Workload, &["new"]);
    assert_eq!(owner(), None);
}

#[test]
fn what_is_not_valid_is_rejected_by_name_and_the_last_good_stays() {
    let table = table(true);
    put(
        &table,
        Kind::Workload,
        &[update("a", &workload("a", &["10.0.0.1"]))],
    );
    let mut bad = workload("a", &["10.0.0.9"]);
    bad.tunnel = 77;
    let good = update("b", &workload("b", &["10.0.0.2"]));
    let url = Kind::Workload.type_url();
    let applied = table.apply(url, &[update("a", &bad), good], &[]);
    let text = applied.result().unwrap_err();
    assert_eq!(text, "a: tunnel: 77 is not known to this proxy");
    assert!(table.workload(ip("10.0.0.1")).is_some(), "last good");
    assert!(table.workload(ip("10.0.0.9")).is_none());
    assert!(
        table.workload(ip("10.0.0.2")).is_some(),
        "the good one beside it"
    );
    assert_eq!(table.known(url).len(), 2);
}

#[test]
fn every_field_of_a_resource_is_judged() {
    let table = table(true);
    let bad = |change: fn(&mut mesh::Workload)| {
        let mut message = workload("x", &["10.0.0.1"]);
        change(&mut message);
        let applied = table.apply(Kind::Workload.type_url(), &[update("x", &message)], &[]);
        applied.result().unwrap_err()
    };
    type Change = fn(&mut mesh::Workload);
    let cases: [(Change, &str); 9] = [
        (|w| w.uid = "y".into(), "uid"),
        (|w| w.namespace = "a/b".into(), "identity"),
        (|w| w.addresses = vec![], "addresses"),
        (
            |w| w.addresses = vec![Bytes::from_static(&[1, 2])],
            "addresses: 2 bytes",
        ),
        (|w| w.node_addresses = vec![], "nodeAddresses"),
        (|w| w.state = 0, "state"),
        (
            |w| w.exclude_inbound_ports = vec![70_000],
            "excludeInboundPorts: 70000",
        ),
        (
            |w| w.exclude_outbound_ports = vec![0],
            "excludeOutboundPorts: 0",
        ),
        (
            |w| w.exclude_outbound_cidrs = vec!["10".into()],
            "excludeOutboundCidrs",
        ),
    ];
    for (change, field) in cases {
        let text = bad(change);
        assert!(text.contains(field), "{text} should name {field}");
    }
    let url = Kind::MeshConfig.type_url();
    let empty = table.apply(url, &[update("mesh", &mesh::MeshConfig::default())], &[]);
    assert!(empty.result().unwrap_err().contains("trustDomain"));
    assert_eq!(table.mesh().trust_domain, "cluster.local");
    let garbage = Update {
        value: Bytes::from_static(b"\xff\xff"),
        ..settings(true)
    };
    assert!(table.apply(url, &[garbage], &[]).result().is_err());
    assert!(
        table
            .apply("type.googleapis.com/x", &[], &[])
            .result()
            .is_err()
    );
}

#[test]
fn a_workload_that_is_new_and_not_valid_is_in_the_mesh_and_unreachable() {
    let table = table(true);
    let mut message = workload("a", &["10.0.0.1"]);
    message.tunnel = 77;
    let url = Kind::Workload.type_url();
    let applied = table.apply(url, &[update("a", &message)], &[]);
    assert!(applied.rejected[0].quarantined);
    let held = table.workload(ip("10.0.0.1")).unwrap();
    assert_eq!(held.state, EnrolmentState::Enforced);
    assert!(held.node_addresses.is_empty());
    assert!(table.known(url).is_empty(), "it is asked for again");
    put(
        &table,
        Kind::Workload,
        &[update("a", &workload("a", &["10.0.0.1"]))],
    );
    assert!(
        !table
            .workload(ip("10.0.0.1"))
            .unwrap()
            .node_addresses
            .is_empty()
    );
}

#[test]
fn workloads_may_come_before_the_trust_domain() {
    let table = Table::new("node-1");
    let pods = [
        update("a", &workload("a", &["10.0.0.1"])),
        update("b", &workload("b", &["10.0.0.2"])),
    ];
    put(&table, Kind::Workload, &pods);
    remove(&table, Kind::Workload, &["b"]);
    assert!(table.workload(ip("10.0.0.1")).is_none());
    put(&table, Kind::MeshConfig, &[settings(true)]);
    assert!(table.workload(ip("10.0.0.1")).is_some());
    assert!(table.workload(ip("10.0.0.2")).is_none());
}

#[test]
fn it_is_loaded_when_everything_of_every_type_is_there() {
    let table = Table::new("node-1");
    let loaded = table.loaded();
    for kind in Kind::ALL {
        assert!(!*loaded.borrow(), "before {kind:?}");
        assert!(table.complete(kind.type_url()));
        assert!(!table.complete(kind.type_url()), "no news");
    }
    assert!(!*loaded.borrow(), "no trust domain yet");
    put(&table, Kind::MeshConfig, &[settings(true)]);
    table.complete(Kind::MeshConfig.type_url());
    assert!(*loaded.borrow());
}

#[test]
fn services_are_found_by_address_and_port() {
    let table = table(true);
    let web = service("web", &["10.96.0.1", "1.2.3.4"], &[("http", 80, 30_080)]);
    let db = service("db", &["1.2.3.4"], &[("sql", 3306, 0)]);
    put(&table, Kind::Service, &[web, db]);
    assert_eq!(&*port(&table, "10.96.0.1:80").service.1, "web");
    assert_eq!(&*port(&table, "1.2.3.4:80").service.1, "web");
    assert_eq!(
        &*port(&table, "1.2.3.4:3306").service.1,
        "db",
        "a shared external address"
    );
    assert_eq!(
        &*port(&table, "192.168.0.1:30080").service.1,
        "web",
        "a node port"
    );
    let other = |to: &str| table.service(to.parse().unwrap());
    assert!(matches!(other("10.96.0.1:81"), ServiceLookup::NoSuchPort(s) if &*s.name == "web"));
    assert!(matches!(other("10.96.0.2:80"), ServiceLookup::NotAService));
    assert!(matches!(
        other("192.168.0.1:22"),
        ServiceLookup::NotAService
    ));

    let moved = service("web", &["10.96.0.9"], &[("http", 80, 0)]);
    put(&table, Kind::Service, &[moved]);
    assert!(matches!(other("10.96.0.1:80"), ServiceLookup::NotAService));
    assert!(matches!(other("1.2.3.4:80"), ServiceLookup::NoSuchPort(s) if &*s.name == "db"));
    assert!(matches!(
        other("192.168.0.1:30080"),
        ServiceLookup::NotAService
    ));
    remove(&table, Kind::Service, &["demo/web", "demo/db"]);
    assert!(matches!(other("10.96.0.9:80"), ServiceLookup::NotAService));
    assert!(table.view.services.is_empty() && table.view.node_ports.is_empty());
}

#[test]
fn endpoints_come_from_all_slices_by_port_name() {
    let table = table(true);
    // The slice may come first.
    let first = slice(
        "web-1",
        "web",
        &[("http", 8080), ("metrics", 9090)],
        &[("10.0.0.1", true)],
    );
    put(&table, Kind::EndpointSlice, &[first]);
    let web = service(
        "web",
        &["10.96.0.1"],
        &[("http", 80, 0), ("metrics", 9000, 0)],
    );
    put(&table, Kind::Service, &[web]);
    let http = port(&table, "10.96.0.1:80");
    assert_eq!(endpoints(&http), BTreeSet::from(["10.0.0.1:8080".into()]));
    assert_eq!(
        endpoints(&port(&table, "10.96.0.1:9000")),
        BTreeSet::from(["10.0.0.1:9090".into()])
    );

    // One endpoint is in two slices while it moves: ready counts.
    let second = slice(
        "web-2",
        "web",
        &[("http", 8080)],
        &[("10.0.0.1", false), ("10.0.0.2", true)],
    );
    put(&table, Kind::EndpointSlice, &[second]);
    let both = BTreeSet::from(["10.0.0.1:8080".into(), "10.0.0.2:8080".into()]);
    assert_eq!(endpoints(&http), both);

    // A Service that changes keeps the set, and thereby the load of its endpoints.
    put(
        &table,
        Kind::Service,
        &[service("web", &["10.96.0.7"], &[("http", 80, 0)])],
    );
    let later = port(&table, "10.96.0.7:80");
    assert!(Arc::ptr_eq(&http.endpoints, &later.endpoints));
    remove(&table, Kind::EndpointSlice, &["demo/web-1"]);
    assert_eq!(endpoints(&later), BTreeSet::from(["10.0.0.2:8080".into()]));
    // A slice can be given to another Service.
    put(
        &table,
        Kind::EndpointSlice,
        &[slice("web-2", "other", &[("http", 1)], &[])],
    );
    assert_eq!(endpoints(&later), BTreeSet::new());
}

#[test]
fn the_services_of_an_endpoint_of_this_node() {
    let table = table(true);
    let of = |endpoint: &str| -> Vec<String> {
        let ports = table.service_ports(endpoint.parse().unwrap());
        let mut names: Vec<_> = ports.iter().map(|p| p.reference.to_string()).collect();
        names.sort();
        names
    };
    let web = slice(
        "web-1",
        "web",
        &[("http", 8080), ("metrics", 9090)],
        &[("10.0.0.1", true), ("10.0.0.2", false)],
    );
    let far = mesh::EndpointSlice {
        namespace: "demo".into(),
        name: "web-2".into(),
        service: "web".into(),
        ports: vec![mesh::EndpointPort {
            name: "http".into(),
            port: 8080,
        }],
        endpoints: vec![mesh::Endpoint {
            address: address_to_bytes(ip("10.0.0.3")),
            ready: true,
            node: "node-2".into(),
            ..Default::default()
        }],
    };
    put(
        &table,
        Kind::EndpointSlice,
        &[web, update("demo/web-2", &far)],
    );
    let ports = [("http", 80, 0), ("metrics", 9000, 0)];
    put(
        &table,
        Kind::Service,
        &[service("web", &["10.96.0.1"], &ports)],
    );
    assert_eq!(of("10.0.0.1:8080"), ["demo/web:80"]);
    assert_eq!(of("10.0.0.2:9090"), ["demo/web:9000"], "ready or not");
    assert_eq!(of("10.0.0.3:8080"), [""; 0], "of another node");
    assert_eq!(
        of("10.0.0.1:80"),
        [""; 0],
        "the Service's port, not the pod's"
    );

    // Another Service of the same pods.
    let other = slice("all-1", "all", &[("", 8080)], &[("10.0.0.1", true)]);
    put(&table, Kind::EndpointSlice, &[other]);
    let all = service("all", &["10.96.0.2"], &[("", 80, 0)]);
    put(&table, Kind::Service, &[all]);
    assert_eq!(of("10.0.0.1:8080"), ["demo/all:80", "demo/web:80"]);
    let named = |reference: &str| {
        let endpoint = "10.0.0.1:8080".parse().unwrap();
        table.service_port(endpoint, reference).is_some()
    };
    assert!(named("demo/all:80") && named("demo/web:80"));
    assert!(!named("demo/web:9000"), "another port's endpoint");

    // Ports and endpoints go.
    put(
        &table,
        Kind::Service,
        &[service("web", &["10.96.0.1"], &ports[..1])],
    );
    assert_eq!(of("10.0.0.1:9090"), [""; 0]);
    remove(&table, Kind::EndpointSlice, &["demo/web-1"]);
    assert_eq!(of("10.0.0.1:8080"), ["demo/all:80"]);
    remove(&table, Kind::Service, &["demo/all", "demo/web"]);
    assert!(table.view.service_ports.is_empty());
}

#[test]
fn what_the_services_of_an_endpoint_declare_counts_where_they_agree() {
    let table = table(true);
    let declare = |name: &str, app_protocol: &str| {
        let of_name = slice(name, name, &[("", 8080)], &[("10.0.0.1", true)]);
        put(&table, Kind::EndpointSlice, &[of_name]);
        let service = mesh::Service {
            namespace: "demo".into(),
            name: name.into(),
            ports: vec![mesh::ServicePort {
                port: 80,
                app_protocol: app_protocol.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let update = update(&format!("demo/{name}"), &service);
        put(&table, Kind::Service, &[update]);
        let endpoint = "10.0.0.1:8080".parse().unwrap();
        opening::of_endpoint(&table.service_ports(endpoint))
    };
    assert_eq!(declare("a", ""), Declared::Unset);
    assert_eq!(declare("b", "http"), Declared::Http, "one says nothing");
    assert_eq!(declare("c", "grpc"), Declared::Http, "another word for it");
    assert_eq!(declare("d", "tcp"), Declared::Unset, "they differ");
    remove(&table, Kind::Service, &["demo/b", "demo/c"]);
    assert_eq!(declare("a", ""), Declared::Opaque);
}

#[tokio::test]
async fn a_pod_that_is_not_known_yet_is_waited_for() {
    let table = table(true);
    let address = ip("10.0.0.1");
    let web = Identity::new("cluster.local", "demo", "web").unwrap();
    assert!(
        table
            .wait_for_workload(address, &web, Duration::ZERO)
            .await
            .is_none()
    );
    let waiting = {
        let table = Arc::clone(&table);
        tokio::spawn(async move {
            table
                .wait_for_workload(address, &web, Duration::from_secs(20))
                .await
        })
    };
    tokio::task::yield_now().await;
    // The pod that had the address before.
    let earlier = mesh::Workload {
        service_account: "batch".into(),
        ..workload("a", &["10.0.0.1"])
    };
    put(&table, Kind::Workload, &[update("a", &earlier)]);
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    put(
        &table,
        Kind::Workload,
        &[update("b", &workload("b", &["10.0.0.1"]))],
    );
    assert_eq!(&*waiting.await.unwrap().unwrap().uid, "b");
}

fn asked_for(table: &Table) -> BTreeSet<String> {
    let subscriptions = table.subscriptions();
    let names = subscriptions.borrow()[Kind::Service.type_url()].clone();
    names.into_iter().filter(|n| n != "*").collect()
}

#[tokio::test]
async fn unknown_addresses_are_asked_for_where_not_all_services_are_held() {
    let table = table(false);
    let to: SocketAddr = "10.96.0.1:80".parse().unwrap();
    assert!(matches!(table.service(to), ServiceLookup::Unknown));
    let limit = Duration::from_secs(20);
    let away = table.find_service(to, limit).await;
    assert!(
        matches!(away, ServiceLookup::NotAService),
        "the controller is away"
    );
    assert_eq!(asked_for(&table), BTreeSet::new());

    table.set_online(true);
    let find = |to: SocketAddr| {
        let table = Arc::clone(&table);
        tokio::spawn(async move { table.find_service(to, limit).await })
    };
    let found = find(to);
    tokio::task::yield_now().await;
    assert_eq!(
        asked_for(&table),
        BTreeSet::from(["address/10.96.0.1".into()])
    );
    let mut web = service("web", &["10.96.0.1"], &[("http", 80, 0)]);
    web.aliases = vec!["address/10.96.0.1".into()];
    put(&table, Kind::Service, &[web]);
    assert!(matches!(found.await.unwrap(), ServiceLookup::Port(_)));

    let outside: SocketAddr = "8.8.8.8:53".parse().unwrap();
    let found = find(outside);
    tokio::task::yield_now().await;
    remove(&table, Kind::Service, &["address/8.8.8.8"]);
    assert!(matches!(found.await.unwrap(), ServiceLookup::NotAService));
    assert!(
        matches!(table.service(outside), ServiceLookup::NotAService),
        "remembered"
    );

    let silent = table
        .find_service("8.8.4.4:53".parse().unwrap(), Duration::from_millis(1))
        .await;
    assert!(
        matches!(silent, ServiceLookup::NotAService),
        "no answer in time"
    );
}

#[test]
fn what_is_asked_for_is_bounded() {
    let began = tokio::time::Instant::now();
    let demand = Demand::new();
    let address = |n: usize| IpAddr::from(u32::try_from(n).unwrap().to_be_bytes());
    for n in 0..demand::MAX_ASKED {
        demand.ask(address(n));
    }
    demand.touch(address(0));
    demand.ask(address(demand::MAX_ASKED));
    let names = demand.subscriptions().borrow()[Kind::Service.type_url()].clone();
    assert_eq!(names.len(), demand::MAX_ASKED + 1, "and the wildcard");
    assert!(names.contains("address/0.0.0.0"), "used since");
    assert!(
        !names.contains("address/0.0.0.1"),
        "the one unused for longest gave way"
    );

    demand.expire(began + demand::UNUSED);
    assert_eq!(
        demand.subscriptions().borrow()[Kind::Service.type_url()].len(),
        names.len()
    );
    demand.expire(began + demand::UNUSED + Duration::from_secs(60));
    let names = demand.subscriptions().borrow()[Kind::Service.type_url()].clone();
    assert_eq!(names, BTreeSet::from(["*".to_owned()]));
}

#[test]
fn the_dump_shows_everything() {
    let table = table(true);
    put(
        &table,
        Kind::Workload,
        &[update("a", &workload("a", &["10.0.0.1"]))],
    );
    put(
        &table,
        Kind::EndpointSlice,
        &[slice("w", "web", &[("", 8080)], &[("10.0.0.1", true)])],
    );
    put(
        &table,
        Kind::Service,
        &[service("web", &["10.96.0.1"], &[("", 80, 0)])],
    );
    let dump = table.dump();
    assert_eq!(dump["workloads"][0]["addresses"][0], "10.0.0.1");
    assert_eq!(dump["workloads"][0]["state"], "ENROLMENT_STATE_ENFORCED");
    let endpoint = &dump["services"][0]["ports"][0]["endpoints"][0];
    assert_eq!(endpoint["address"], "10.0.0.1:8080");
}

mod routes;
