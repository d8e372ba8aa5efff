use std::net::IpAddr;

use mesh_api::identity::{Identity, NodeRole};
use mesh_api::names::address_to_bytes;
use mesh_api::proto::discovery::DeltaDiscoveryRequest;
use mesh_api::proto::mesh::{self, EnrolmentState, TunnelKind};
use prost::Message;

use super::*;
use crate::table::ServiceLookup;
use fake::{Fake, within};

#[path = "../../../mesh-api/src/client/tests/fake.rs"]
mod fake;

/// A proxy's discovery against a controller, with directories that outlive it.
struct Node {
    fake: Fake,
    registry: Registry,
}

impl Node {
    async fn new() -> Self {
        Self {
            fake: Fake::start().await,
            registry: Registry::with_prefix("warren"),
        }
    }

    fn start(&mut self) -> Discovery {
        self.registry = Registry::with_prefix("warren");
        let config = Config {
            controller: self.fake.client(NodeRole::Proxy),
            state_dir: self.fake.dir().join("state"),
            secrets_dir: self.fake.secrets(),
        };
        start(config, &mut self.registry)
    }

    /// The requests that begin a stream, by type.
    async fn begin(&mut self) -> HashMap<String, DeltaDiscoveryRequest> {
        let mut first = HashMap::new();
        for _ in Kind::ALL {
            let request = self.fake.request().await;
            assert_eq!(request.response_nonce, "");
            first.insert(request.type_url.clone(), request);
        }
        first
    }

    /// Sends resources of one type, and returns the answer.
    async fn push<R: mesh_api::proto::Resource>(
        &mut self,
        nonce: &str,
        resources: &[(&str, &str, R)],
    ) -> DeltaDiscoveryRequest {
        let resources = resources
            .iter()
            .map(|(n, v, r)| (*n, *v, r.encode_to_vec()));
        self.fake
            .respond(fake::response::<R>(nonce, resources))
            .await;
        let answer = self.fake.request().await;
        assert_eq!(answer.response_nonce, nonce);
        answer
    }

    /// Sends a first table of one pod and one Service.
    async fn fill(&mut self, services_complete: bool) {
        let settings = mesh::MeshConfig {
            trust_domain: "cluster.local".into(),
            trust_bundle: self.fake.bundle(),
            services_complete,
            node_addresses: vec![],
        };
        self.push("m1", &[("mesh", "1", settings)]).await;
        self.push("w1", &[("a", "1", pod("a", "10.0.0.1"))]).await;
        self.push("s1", &[("demo/web", "1", web())]).await;
        self.push::<mesh::EndpointSlice>("e1", &[]).await;
        self.push::<mesh::TrafficPolicy>("t1", &[]).await;
        self.push::<mesh::BackendTrafficPolicy>("b1", &[]).await;
        let name = "httproute/demo/split";
        self.push("r1", &[(name, "1", split())]).await;
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(uid: &str, address: &str) -> mesh::Workload {
    mesh::Workload {
        uid: uid.into(),
        namespace: "demo".into(),
        name: uid.into(),
        service_account: "web".into(),
        addresses: vec![address_to_bytes(ip(address))],
        node: "node-1".into(),
        node_addresses: vec![address_to_bytes(ip("192.168.0.1"))],
        state: EnrolmentState::Enforced.into(),
        tunnel: TunnelKind::Warren.into(),
        ..Default::default()
    }
}

fn web() -> mesh::Service {
    mesh::Service {
        namespace: "demo".into(),
        name: "web".into(),
        addresses: vec![address_to_bytes(ip("10.96.0.1"))],
        ports: vec![mesh::ServicePort {
            port: 80,
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// A route of `demo/web`.
fn split() -> mesh::Route {
    mesh::Route {
        kind: mesh::RouteKind::Http.into(),
        namespace: "demo".into(),
        name: "split".into(),
        parents: vec![mesh::RouteParent {
            namespace: "demo".into(),
            service: "web".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn has_route(discovery: &Discovery) -> bool {
    match discovery.table.service("10.96.0.1:80".parse().unwrap()) {
        ServiceLookup::Port(port) => port.http.load().routes_for("demo").is_some(),
        other => panic!("{other:?}"),
    }
}

async fn loaded(discovery: &Discovery) {
    within(discovery.table.loaded().wait_for(|l| *l))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_first_table_comes_from_the_controller() {
    let mut node = Node::new().await;
    let discovery = node.start();
    for (type_url, request) in node.begin().await {
        let expected = if type_url == Kind::MeshConfig.type_url() {
            "mesh"
        } else {
            "*"
        };
        assert_eq!(request.resource_names_subscribe, [expected]);
        assert!(request.initial_resource_versions.is_empty());
    }
    assert!(!*discovery.table.loaded().borrow());
    node.fill(true).await;
    loaded(&discovery).await;
    assert!(discovery.table.workload(ip("10.0.0.1")).is_some());
    let to = "10.96.0.1:80".parse().unwrap();
    assert!(matches!(
        discovery.table.service(to),
        ServiceLookup::Port(_)
    ));
    assert_eq!(
        discovery.identities.trust().unwrap().trust_domain,
        "cluster.local"
    );
    let text = node.metrics();
    for line in [
        "warren_xds_connected 1",
        "warren_xds_reconnects_total 0",
        "warren_xds_messages_total{type=\"workload\",result=\"ack\"} 1",
        "warren_xds_resources{type=\"service\"} 1",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test]
async fn a_part_of_a_first_table_is_not_the_table() {
    let mut node = Node::new().await;
    let discovery = node.start();
    node.begin().await;
    let parts = [("w1", "a", "10.0.0.1", "7+"), ("w2", "b", "10.0.0.2", "7")];
    for (nonce, uid, address, info) in parts {
        let value = pod(uid, address).encode_to_vec();
        let mut part = fake::response::<mesh::Workload>(nonce, [(uid, "1", value)]);
        part.system_version_info = info.into();
        node.fake.respond(part).await;
        node.fake.request().await;
        if nonce == "w1" {
            let others = |kind: &Kind| !matches!(kind, Kind::Workload | Kind::MeshConfig);
            for kind in Kind::ALL.into_iter().filter(others) {
                discovery.table.complete(kind.type_url());
            }
            let settings = mesh::MeshConfig {
                trust_domain: "cluster.local".into(),
                trust_bundle: node.fake.bundle(),
                ..Default::default()
            };
            node.push("m1", &[("mesh", "1", settings)]).await;
            assert!(!*discovery.table.loaded().borrow());
        }
    }
    loaded(&discovery).await;
}

#[tokio::test]
async fn a_bad_resource_is_rejected_by_name_and_the_last_good_stays() {
    let mut node = Node::new().await;
    let discovery = node.start();
    node.begin().await;
    node.fill(true).await;
    let mut bad = pod("a", "10.0.0.9");
    bad.state = 99;
    let answer = node
        .push("w2", &[("a", "2", bad), ("b", "1", pod("b", "10.0.0.2"))])
        .await;
    let error = answer.error_detail.unwrap().message;
    assert_eq!(error, "a: state: 99 is not known to this proxy");
    assert!(discovery.table.workload(ip("10.0.0.1")).is_some());
    assert!(discovery.table.workload(ip("10.0.0.2")).is_some());
    let line = "warren_xds_messages_total{type=\"workload\",result=\"nack\"} 1";
    assert!(node.metrics().contains(line));

    // The version that is in force is what a new stream tells.
    node.fake.stop().await;
    within(discovery.controller.connected().wait_for(|c| !*c))
        .await
        .unwrap();
    node.fake.resume().await;
    let again = node.begin().await;
    let held = &again[Kind::Workload.type_url()].initial_resource_versions;
    let expected = HashMap::from([("a".into(), "1".into()), ("b".into(), "1".into())]);
    assert_eq!(*held, expected);
    node.push("w3", &[("b", "2", pod("b", "10.0.0.3"))]).await;
    assert!(discovery.table.workload(ip("10.0.0.3")).is_some());
    assert!(node.metrics().contains("warren_xds_reconnects_total 1"));
}

#[tokio::test]
async fn a_restarted_proxy_needs_no_controller() {
    let mut node = Node::new().await;
    let identity = Identity::new("cluster.local", "demo", "web").unwrap();
    {
        let discovery = node.start();
        node.begin().await;
        node.fill(true).await;
        loaded(&discovery).await;
        let _guard = discovery.identities.acquire(identity.clone());
        within(discovery.identities.ready(&identity)).await;
        discovery.identities.keep_files(true);
        // As when a process ends: what was handed to the disk is written.
        discovery.shut_down().await;
    }
    assert_eq!(node.fake.issued_to(identity.as_str()), 1);
    node.fake.stop().await;

    let discovery = node.start();
    assert!(*discovery.table.loaded().borrow(), "at once");
    assert!(discovery.table.workload(ip("10.0.0.1")).is_some());
    assert!(discovery.identities.trust().is_some());
    assert!(has_route(&discovery), "with its routes");
    let _guard = discovery.identities.acquire(identity.clone());
    within(discovery.identities.ready(&identity)).await;

    node.fake.resume().await;
    let first = node.begin().await;
    assert_eq!(
        first[Kind::Service.type_url()].initial_resource_versions["demo/web"],
        "1"
    );
    assert_eq!(node.fake.issued_to(identity.as_str()), 1);
    assert_eq!(node.fake.issued_to_nodes(), 1);
}

#[tokio::test]
async fn a_controller_or_a_table_that_is_older_than_routes_serves_nevertheless() {
    let mut node = Node::new().await;
    {
        let discovery = node.start();
        node.begin().await;
        let settings = mesh::MeshConfig {
            trust_domain: "cluster.local".into(),
            trust_bundle: node.fake.bundle(),
            services_complete: true,
            node_addresses: vec![],
        };
        node.push("m1", &[("mesh", "1", settings)]).await;
        node.push::<mesh::Workload>("w1", &[]).await;
        node.push("s1", &[("demo/web", "1", web())]).await;
        node.push::<mesh::EndpointSlice>("e1", &[]).await;
        loaded(&discovery).await;
        discovery.shut_down().await;
    }
    node.fake.stop().await;
    let discovery = node.start();
    loaded(&discovery).await;
    assert!(!has_route(&discovery));
    // A newer controller takes over, and its routes are in force at once.
    node.fake.resume().await;
    node.begin().await;
    let name = "httproute/demo/split";
    node.push("r1", &[(name, "1", split())]).await;
    assert!(has_route(&discovery));
}

#[tokio::test]
async fn a_damaged_file_means_waiting_for_the_controller() {
    let mut node = Node::new().await;
    {
        let discovery = node.start();
        node.begin().await;
        node.fill(true).await;
        discovery.shut_down().await;
    }
    let path = node.fake.dir().join("state").join(FILE);
    let mut content = std::fs::read(&path).unwrap();
    content[40] ^= 0xff;
    std::fs::write(&path, content).unwrap();
    let discovery = node.start();
    assert!(!*discovery.table.loaded().borrow());
    for request in node.begin().await.values() {
        assert!(request.initial_resource_versions.is_empty(), "{request:?}");
    }
    node.fill(true).await;
    loaded(&discovery).await;
}

#[tokio::test]
async fn services_are_asked_for_where_not_all_are_sent() {
    let mut node = Node::new().await;
    let discovery = node.start();
    node.begin().await;
    node.fill(false).await;
    let find = |to: &str| {
        let (table, to) = (Arc::clone(&discovery.table), to.parse().unwrap());
        tokio::spawn(async move { table.find_service(to, Duration::from_secs(20)).await })
    };
    let found = find("10.96.0.2:80");
    let request = node.fake.request().await;
    assert_eq!(request.resource_names_subscribe, ["address/10.96.0.2"]);
    let mut db = web();
    db.name = "db".into();
    db.addresses = vec![address_to_bytes(ip("10.96.0.2"))];
    let resource = [("demo/db", "1", db.encode_to_vec())];
    let mut answer = fake::response::<mesh::Service>("s2", resource);
    answer.resources[0].aliases = vec!["address/10.96.0.2".into()];
    node.fake.respond(answer).await;
    assert!(matches!(
        within(found).await.unwrap(),
        ServiceLookup::Port(_)
    ));
    node.fake.request().await;

    let absent = find("8.8.8.8:53");
    assert_eq!(
        node.fake.request().await.resource_names_subscribe,
        ["address/8.8.8.8"]
    );
    let mut answer = fake::response::<mesh::Service>("s3", []);
    answer.removed_resources = vec!["address/8.8.8.8".into()];
    node.fake.respond(answer).await;
    assert!(matches!(
        within(absent).await.unwrap(),
        ServiceLookup::NotAService
    ));
}

#[tokio::test]
async fn a_workloads_certificate_comes_from_the_controller() {
    let mut node = Node::new().await;
    let discovery = node.start();
    let identity = Identity::new("cluster.local", "demo", "web").unwrap();
    node.fake.refuse(Some(tonic::Status::permission_denied(
        "no pod of this node has it",
    )));
    let guard = discovery.identities.acquire(identity.clone());
    let refused = "warren_certificate_issues_total{result=\"refused\"} 1";
    within(async {
        while !node.metrics().contains(refused) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    node.fake.refuse(None);
    let local = within(discovery.identities.ready(&identity)).await;
    assert_eq!(
        mesh_api::tls::uri_name(&local.certified.cert[0]).unwrap(),
        identity.as_str()
    );
    drop(guard);
    assert!(discovery.identities.get(&identity).is_none());
}
