//! Discovery over the real server: what a node is sent, when, and how it resumes.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

use crate::common::{DEMO, Lab, versions};
use mesh_api::proto::discovery::DeltaDiscoveryRequest;
use mesh_api::proto::mesh::{
    BackendTrafficPolicy, EndpointSlice, MeshConfig, NodePod, Route, Service, TrafficPolicy,
    Workload,
};

fn names<T>(items: &[T], name: impl Fn(&T) -> &str) -> BTreeSet<String> {
    items.iter().map(|i| name(i).to_owned()).collect()
}

#[tokio::test]
async fn a_proxy_is_sent_services_with_their_slices_and_the_mesh_config() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<Service>(&["*"]).await;
    let (services, _) = proxy.take::<Service>().await;
    assert_eq!(names(&services, |s| &s.name), ["web".to_owned()].into());
    assert_eq!(services[0].addresses.len(), 2, "both families, once each");
    assert_eq!(services[0].ports[0].port, 80);

    proxy.subscribe::<EndpointSlice>(&["*"]).await;
    let (slices, _) = proxy.take::<EndpointSlice>().await;
    assert_eq!(names(&slices, |s| &s.service), ["web".to_owned()].into());
    assert!(slices[0].endpoints[0].ready && slices[0].endpoints[0].serving);

    proxy.subscribe::<MeshConfig>(&["mesh"]).await;
    let (config, _) = proxy.take::<MeshConfig>().await;
    assert_eq!(config[0].trust_domain, "cluster.local");
    assert!(config[0].services_complete);
    assert_eq!(config[0].trust_bundle.len(), 1);
    assert_eq!(config[0].node_addresses.len(), 3);

    // A Service goes, and its slice with it, although the slice's manifest stays.
    let service = DEMO
        .split("---\n")
        .find(|d| d.contains("kind: Service\n"))
        .unwrap();
    lab.edit(service, "");
    assert_eq!(proxy.take::<Service>().await.1, ["demo/web"]);
    assert_eq!(proxy.take::<EndpointSlice>().await.1, ["demo/web-1"]);
}

#[tokio::test]
async fn an_agent_is_sent_the_pods_of_its_node() {
    let lab = Lab::start(DEMO).await;
    let mut agent = lab.agent("node-2").await;
    agent.stream.subscribe::<NodePod>(&["*"]).await;
    let (pods, _) = agent.stream.take::<NodePod>().await;
    assert_eq!(names(&pods, |p| &p.name), ["client".to_owned()].into());
    assert!(pods[0].enrolled);
    // Only what differs is sent.
    lab.edit(
        "name: demo, labels: {warren",
        "name: demo, labels: {a: b, warren",
    );
    lab.edit(
        "warren-mesh.io/mesh: enabled",
        "warren-mesh.io/mesh: disabled",
    );
    let (pods, removed) = agent.stream.take::<NodePod>().await;
    assert_eq!((pods.len(), removed.len()), (1, 0));
    assert!(!pods[0].enrolled);
}

#[tokio::test]
async fn a_client_that_returns_is_sent_only_what_it_lacks() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<Service>(&["*"]).await;
    let first = proxy.next::<Service>().await;
    let known = versions(&first);
    drop(proxy);

    let mut proxy = lab.proxy("node-1").await;
    proxy.resume::<Service>(&["*"], known.clone()).await;
    let response = proxy.next::<Service>().await;
    assert_eq!(
        (response.resources.len(), response.removed_resources.len()),
        (0, 0)
    );
    drop(proxy);

    // Versions are the same after a restart; what is gone meanwhile is removed, what is new is sent.
    let lab = lab.restart().await;
    let mut stale: HashMap<String, String> = known.clone();
    stale.insert("demo/gone".into(), "0123".into());
    let mut proxy = lab.proxy("node-1").await;
    proxy.resume::<Service>(&["*"], stale).await;
    let response = proxy.next::<Service>().await;
    assert_eq!(response.resources.len(), 0);
    assert_eq!(response.removed_resources, ["demo/gone"]);
    drop(proxy);

    let mut proxy = lab.proxy("node-1").await;
    let old = known
        .keys()
        .map(|name| (name.clone(), "old".to_owned()))
        .collect();
    proxy.resume::<Service>(&["*"], old).await;
    assert_eq!(versions(&proxy.next::<Service>().await), known);
}

#[tokio::test]
async fn a_slow_client_is_sent_the_newest_state_and_no_queue() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<Service>(&["*"]).await;
    let first = proxy.next::<Service>().await;
    let mut snapshots = lab.controller.hub().snapshots();
    for port in 81..=85 {
        snapshots.borrow_and_update();
        lab.edit(&format!("port: {},", port - 1), &format!("port: {port},"));
        crate::common::soon("snapshot", snapshots.changed())
            .await
            .unwrap();
    }
    proxy.ack::<Service>(&first).await;
    let (services, _) = proxy.take::<Service>().await;
    assert_eq!(
        services[0].ports[0].port, 85,
        "the states between are skipped"
    );
}

#[tokio::test]
async fn a_rejection_is_counted_and_not_repeated() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<Service>(&["*"]).await;
    let first = proxy.next::<Service>().await;
    proxy.nack::<Service>(&first, "port 80 is not mine").await;
    // The next response is about something else: the rejected one was not sent again.
    proxy.subscribe::<MeshConfig>(&["*"]).await;
    proxy.take::<MeshConfig>().await;
    let line = "warren_controller_nacks_total{type=\"Service\",node=\"node-1\"}";
    assert_eq!(lab.metric(line), 1.0);
    lab.edit("port: 80,", "port: 81,");
    let (services, _) = proxy.take::<Service>().await;
    assert_eq!(services[0].ports[0].port, 81, "a new version is tried");
}

#[tokio::test]
async fn services_are_found_by_address() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<Service>(&["address/10.96.0.10"]).await;
    let response = proxy.next::<Service>().await;
    proxy.ack::<Service>(&response).await;
    assert_eq!(response.resources[0].name, "demo/web");
    assert_eq!(response.resources[0].aliases, ["address/10.96.0.10"]);

    // No such Service, an address that is none, and the other family of one that was sent already.
    for (asked, found) in [
        ("address/10.9.9.9", false),
        ("address/x", false),
        ("address/fd00:96::10", true),
    ] {
        proxy.subscribe::<Service>(&[asked]).await;
        let response = proxy.next::<Service>().await;
        proxy.ack::<Service>(&response).await;
        if found {
            assert!(
                response.resources[0].aliases.contains(&asked.to_owned()),
                "{response:?}"
            );
        } else {
            assert_eq!(response.removed_resources, [asked]);
        }
    }
    // The address is taken into use later: who asked is told.
    lab.write(
        "manifests/late.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: demo}\n\
         spec: {clusterIP: 10.9.9.9, ports: [{port: 1}]}\n",
    );
    let response = proxy.next::<Service>().await;
    proxy.ack::<Service>(&response).await;
    assert_eq!(response.resources[0].name, "demo/late");
    assert_eq!(response.resources[0].aliases, ["address/10.9.9.9"]);
    // And when it goes again.
    std::fs::remove_file(lab.path("manifests/late.yaml")).unwrap();
    let (_, removed) = proxy.take::<Service>().await;
    assert_eq!(removed, ["address/10.9.9.9", "demo/late"]);
}

#[tokio::test]
async fn above_a_thousand_services_a_node_is_sent_those_of_its_namespaces() {
    let mut manifests = DEMO.to_owned();
    for i in 0..1000 {
        let (a, b) = (i / 250, i % 250 + 1);
        write!(
            manifests,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: other}}\n\
             spec: {{clusterIP: 10.97.{a}.{b}, ports: [{{port: 80}}]}}\n"
        )
        .unwrap();
    }
    let lab = Lab::start(&manifests).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<MeshConfig>(&["*"]).await;
    assert!(!proxy.take::<MeshConfig>().await.0[0].services_complete);
    proxy.subscribe::<Service>(&["*"]).await;
    let (services, _) = proxy.take::<Service>().await;
    assert_eq!(names(&services, |s| &s.name), ["web".to_owned()].into());
    proxy.subscribe::<Service>(&["address/10.97.1.1"]).await;
    let (services, _) = proxy.take::<Service>().await;
    assert_eq!(names(&services, |s| &s.name), ["s250".to_owned()].into());
    // Unsubscribed from and not in `*`: the client is told to forget it, as the protocol asks.
    let request = DeltaDiscoveryRequest {
        resource_names_unsubscribe: vec!["address/10.97.1.1".into()],
        ..Default::default()
    };
    proxy.request::<Service>(request).await;
    let (services, removed) = proxy.take::<Service>().await;
    assert_eq!(
        (services.len(), removed),
        (0, vec!["other/s250".to_owned()])
    );
}

#[tokio::test]
async fn a_type_the_controller_does_not_know_is_ignored() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    let request = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/warren.mesh.v1.FromTheFuture".into(),
        ..Default::default()
    };
    proxy.requests.send(request).await.unwrap();
    proxy.subscribe::<Workload>(&["*"]).await;
    assert_eq!(proxy.take::<Workload>().await.0.len(), 0);
}

const ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: demo}\nspec:\n  \
    parentRefs: [{group: '', kind: Service, name: web}]\n  rules: [{backendRefs: [{name: web, port: 80, weight: 1}]}]\n";
const BUSY: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: rpc, namespace: other}\nspec:\n  \
    parentRefs: [{group: '', kind: Service, name: web, namespace: demo}]\n  rules: [{backendRefs: [{name: web, namespace: demo, port: 80}]}]\n";
const POLICY: &str = "apiVersion: warren-mesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: web, namespace: demo}\nspec:\n  \
    targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: 1s}\n";

/// A proxy holds all routes and policies; an edit is one resource, a removal one name.
#[tokio::test]
async fn a_proxy_is_sent_routes_and_policies() {
    let lab = Lab::start(&format!("{DEMO}---\n{ROUTE}---\n{BUSY}---\n{POLICY}")).await;
    let mut proxy = lab.proxy("node-1").await;
    // No Services are needed for it while every node is sent all.
    proxy.subscribe::<Route>(&["*"]).await;
    let (routes, _) = proxy.take::<Route>().await;
    let both = ["rpc".to_owned(), "web".to_owned()];
    assert_eq!(names(&routes, |r| &r.name), both.into());
    proxy.subscribe::<TrafficPolicy>(&["*"]).await;
    let (policies, _) = proxy.take::<TrafficPolicy>().await;
    assert_eq!(policies[0].timeouts.unwrap().request_ms, Some(1_000));
    proxy.subscribe::<BackendTrafficPolicy>(&["*"]).await;
    let (policies, _) = proxy.take::<BackendTrafficPolicy>().await;
    assert_eq!(policies, [], "answered although there is none");

    lab.edit("weight: 1}", "weight: 2}");
    let (routes, removed) = proxy.take::<Route>().await;
    assert_eq!((routes.len(), removed.len()), (1, 0));
    assert_eq!(routes[0].rules[0].backends[0].weight, 2);
    // A mistake costs nothing: the last good version stays.
    lab.edit("weight: 2}", "weight: -2}");
    lab.edit("timeouts: {request: 1s}", "timeouts: {request: 2s}");
    let (policies, _) = proxy.take::<TrafficPolicy>().await;
    assert_eq!(policies[0].timeouts.unwrap().request_ms, Some(2_000));
    assert_eq!(lab.metric("warren_controller_manifest_mistakes"), 1.0);
    lab.edit("weight: -2}", "weight: 3}");
    let (routes, _) = proxy.take::<Route>().await;
    assert_eq!(routes[0].rules[0].backends[0].weight, 3);
    // Its parent goes, and the route is nobody's.
    lab.edit(
        "name: web, namespace: demo}\nspec:\n  clusterIP",
        "name: was, namespace: demo}\nspec:\n  clusterIP",
    );
    let (_, removed) = proxy.take::<Route>().await;
    assert_eq!(removed, ["grpcroute/other/rpc", "httproute/demo/web"]);
    let status = lab.controller.hub().status();
    let said = &status["routes"][0]["parents"][0]["conditions"][0];
    assert_eq!(said["reason"], "NoMatchingParent", "{status:#}");
}

/// Above a thousand Services: those of the node's namespaces and of the Services it holds, which come with
/// the Services that their routes send to.
#[tokio::test]
async fn above_a_thousand_services_a_node_is_sent_the_routes_that_concern_it() {
    let mut manifests = format!("{DEMO}---\n{ROUTE}");
    for i in 0..1000 {
        let (a, b) = (i / 250, i % 250 + 1);
        write!(
            manifests,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: other}}\n\
             spec: {{clusterIP: 10.97.{a}.{b}, ports: [{{port: 80}}]}}\n"
        )
        .unwrap();
    }
    // `web` also sends to s7; the route of s1 is another namespace's business, as is its policy.
    let to = |name: &str, backend: &str| {
        let route = ROUTE.replace("namespace: demo}\nspec", "namespace: other}\nspec");
        let route = route.replace(
            "name: web, namespace: other}",
            &format!("name: {name}, namespace: other}}"),
        );
        route
            .replace(
                "kind: Service, name: web}",
                &format!("kind: Service, name: {name}}}"),
            )
            .replace("name: web, port", &format!("name: {backend}, port"))
    };
    let manifests = manifests.replace(
        "backendRefs: [{name: web, port: 80, weight: 1}]",
        "backendRefs: [{name: s7, namespace: other, port: 80}]",
    );
    let (policy, of_route) = (
        to("s1", "s2"),
        POLICY.replace("namespace: demo", "namespace: other"),
    );
    let of_route = of_route.replace(
        "{kind: Service, name: web}",
        "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: s1}",
    );
    let lab = Lab::start(&format!("{manifests}---\n{policy}---\n{of_route}")).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<Service>(&["*"]).await;
    let (services, _) = proxy.take::<Service>().await;
    let held = ["s7".to_owned(), "web".to_owned()];
    assert_eq!(names(&services, |s| &s.name), held.into());
    proxy.subscribe::<Route>(&["*"]).await;
    let (routes, _) = proxy.take::<Route>().await;
    assert_eq!(names(&routes, |r| &r.name), ["web".to_owned()].into());
    proxy.subscribe::<TrafficPolicy>(&["*"]).await;
    assert_eq!(proxy.take::<TrafficPolicy>().await.0, []);
    // With the Service come its route, the route's backend and the route's policy.
    proxy.subscribe::<Service>(&["address/10.97.0.2"]).await;
    let (services, _) = proxy.take::<Service>().await;
    let asked = ["s1".to_owned(), "s2".to_owned()];
    assert_eq!(names(&services, |s| &s.name), asked.into());
    let (routes, _) = proxy.take::<Route>().await;
    assert_eq!(names(&routes, |r| &r.name), ["s1".to_owned()].into());
    let (policies, _) = proxy.take::<TrafficPolicy>().await;
    assert_eq!(names(&policies, |p| &p.name), ["web".to_owned()].into());
}
