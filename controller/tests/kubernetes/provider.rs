//! What users write reaches the nodes, whatever happens to the API server.

use mesh_api::proto::mesh::{EndpointSlice, Route, Service};
use serde_json::{Value, json};

use crate::apiserver::ApiServer;
use crate::common::{Lab, Stream};
use crate::servers;
use crate::world::PODS;

pub(crate) const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const ROUTES: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/demo/httproutes";

impl ApiServer {
    /// A CRD whose schema takes everything.
    pub(crate) async fn define(&self, plural: &str, group: &str, version: &str, kind: &str) {
        let any = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
        let definition = json!({
            "metadata": {
                "name": format!("{plural}.{group}"),
                "annotations": { "api-approved.kubernetes.io": "unapproved, a test" },
            },
            "spec": {
                "group": group, "scope": if kind == "XMesh" { "Cluster" } else { "Namespaced" },
                "names": { "plural": plural, "kind": kind },
                "versions": [{
                    "name": version, "served": true, "storage": true, "schema": { "openAPIV3Schema": any },
                    "subresources": { "status": {} },
                }],
            },
        });
        self.post(CRDS, definition).await;
        let established = |definition: &Value| {
            let conditions = definition["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|c| c["type"] == "Established" && c["status"] == "True")
        };
        self.until(&format!("{CRDS}/{plural}.{group}"), established)
            .await;
        let path = format!("/apis/{group}/{version}/{plural}");
        self.until(&path, |list| !list.is_null()).await;
    }
}

pub(crate) fn route(backend: &str) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": { "name": "web" },
        "spec": {
            "parentRefs": [{ "group": "", "kind": "Service", "name": "web" }],
            "rules": [{ "backendRefs": [{ "name": backend, "port": 80 }] }],
        },
    })
}

async fn next_of<T: mesh_api::proto::Resource>(proxy: &mut Stream) -> (Vec<T>, Vec<String>) {
    proxy.take::<T>().await
}

#[tokio::test]
async fn edits_reach_the_nodes_through_outages_and_lost_history() {
    let mut server = servers!();
    server.populate().await;
    let lab = server.controller("a").await;
    let mut proxy = server.proxy(&lab, 1).await;
    proxy.subscribe::<Service>(&["*"]).await;
    let (services, _) = next_of::<Service>(&mut proxy).await;
    let names: Vec<&str> = services.iter().map(|s| s.name.as_str()).collect();
    assert!(names.contains(&"web"), "{names:?}");
    proxy.subscribe::<EndpointSlice>(&["*"]).await;
    next_of::<EndpointSlice>(&mut proxy).await;
    let slice = json!({
        "metadata": { "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
        "endpoints": [{ "addresses": ["10.1.1.2"] }],
    });
    let slices = "/apis/discovery.k8s.io/v1/namespaces/demo/endpointslices";
    server.post(slices, slice).await;
    let (found, _) = next_of::<EndpointSlice>(&mut proxy).await;
    assert_eq!(found[0].endpoints.len(), 1);

    // The API server dies; nothing changes for anyone, and it is followed again when it is back.
    server.kill();
    lab.until("the outage is noticed", |_| {
        lab.metric("warren_controller_watch_failures_total{kind=\"EndpointSlice\"} ") > 0.0
    })
    .await;
    assert_eq!(
        lab.metric("warren_controller_resources{type=\"EndpointSlice\"} "),
        1.0
    );
    server.restart().await;
    let more =
        json!({ "endpoints": [{ "addresses": ["10.1.1.2"] }, { "addresses": ["10.1.1.3"] }] });
    server.patch(&format!("{slices}/web-1"), more).await;
    let (found, _) = next_of::<EndpointSlice>(&mut proxy).await;
    assert_eq!(found[0].endpoints.len(), 2);

    // Away again, and by the time it is back the history is gone: everything is listed anew.
    server.kill();
    server.restart().await;
    let less = json!({ "endpoints": [{ "addresses": ["10.1.1.4"] }] });
    server.patch(&format!("{slices}/web-1"), less).await;
    server.compact();
    server.kill();
    server.restart().await;
    loop {
        let (found, _) = next_of::<EndpointSlice>(&mut proxy).await;
        if found[0].endpoints.len() == 1 {
            break;
        }
    }
    server.delete(&format!("{slices}/web-1")).await;
    let (_, removed) = next_of::<EndpointSlice>(&mut proxy).await;
    assert_eq!(removed, ["demo/web-1"]);
    lab.controller.stop().await;
}

#[tokio::test]
async fn routes_count_from_the_moment_that_their_definition_is_there() {
    let server = servers!();
    server.populate().await;
    let lab = server.controller("a").await;
    let mut proxy = server.proxy(&lab, 1).await;
    proxy.subscribe::<Route>(&["*"]).await;
    let (routes, _) = next_of::<Route>(&mut proxy).await;
    assert!(routes.is_empty());
    server
        .define("httproutes", "gateway.networking.k8s.io", "v1", "HTTPRoute")
        .await;
    server.post(ROUTES, route("web")).await;
    let (routes, _) = next_of::<Route>(&mut proxy).await;
    assert_eq!(routes[0].name, "web");
    let failures = "warren_controller_watch_failures_total{kind=\"HTTPRoute\"} ";
    let failed = lab.metric(failures);

    // A mistake that a schema of another version let pass: the last good version stays in force.
    let broken =
        json!({ "spec": { "rules": [{ "backendRefs": [{ "name": "web", "port": "http" }] }] } });
    server.patch(&format!("{ROUTES}/web"), broken).await;
    let events = "/apis/events.k8s.io/v1/namespaces/demo/events";
    // The API server writes Events of its own.
    fn ours(list: &Value) -> Option<&Value> {
        let events = list["items"].as_array()?;
        events.iter().find(|e| e["reason"] == "CannotBeRead")
    }
    let told = server.until(events, |list| ours(list).is_some()).await;
    let event = ours(&told).unwrap();
    assert_eq!(event["regarding"]["name"], "web");
    assert!(
        event["note"]
            .as_str()
            .unwrap()
            .starts_with("spec.rules[0].backendRefs[0].port: "),
        "{event}"
    );
    assert_eq!(
        lab.metric("warren_controller_resources{type=\"Route\"} "),
        1.0
    );

    server
        .delete(&format!("{CRDS}/httproutes.gateway.networking.k8s.io"))
        .await;
    let (_, removed) = next_of::<Route>(&mut proxy).await;
    assert_eq!(removed.len(), 1);
    assert_eq!(
        lab.metric(failures),
        failed,
        "what is not served is not asked for"
    );
    lab.controller.stop().await;
}

#[tokio::test]
async fn a_controller_waits_for_the_api_server_and_says_so() {
    let mut server = servers!();
    server.populate().await;
    server.pod("demo", "web", "node-1", "web").await;
    server.kill();
    let config = server.config("a");
    let starting =
        tokio::spawn(async move { warren_controller::run::Controller::start(&config).await });
    assert!(server.is_away().await);
    server.restart().await;
    let controller = crate::common::soon("start", starting)
        .await
        .unwrap()
        .unwrap();
    let lab = Lab {
        dir: tempfile::TempDir::new().unwrap(),
        controller,
    };
    let pods = lab.controller.hub().status()["pods"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(pods, 1, "complete from the first moment");
    server.delete(&format!("{PODS}/web")).await;
    lab.until("the pod is gone", |status| status["pods"] == json!([]))
        .await;
    lab.controller.stop().await;
}
