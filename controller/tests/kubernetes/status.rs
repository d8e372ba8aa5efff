//! What the controller writes to the users' objects, and to nodes.

use mesh_api::proto::mesh::NodePod;
use serde_json::{Value, json};

use crate::provider::route;
use crate::servers;
use crate::world::PODS;

const GATEWAY: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/demo/httproutes";
const US: &str = "warren-mesh.io/controller";

fn condition<'v>(entry: &'v Value, kind: &str) -> &'v Value {
    let conditions = entry["conditions"].as_array().unwrap();
    conditions
        .iter()
        .find(|c| c["type"] == kind)
        .unwrap_or(&Value::Null)
}

fn ours(object: &Value) -> Option<&Value> {
    let parents = object["status"]["parents"].as_array()?;
    parents.iter().find(|p| p["controllerName"] == US)
}

#[tokio::test]
async fn routes_get_a_status_and_the_entries_of_others_stay() {
    let server = servers!();
    server.populate().await;
    server
        .define("httproutes", "gateway.networking.k8s.io", "v1", "HTTPRoute")
        .await;
    server.post(GATEWAY, route("web")).await;
    let others = json!({
        "controllerName": "example.com/gateway", "parentRef": { "name": "gw" }, "conditions": [],
    });
    let status = json!({ "status": { "parents": [others] } });
    server.patch(&format!("{GATEWAY}/web/status"), status).await;

    let lab = server.controller("a").await;
    let path = format!("{GATEWAY}/web");
    let judged = server.until(&path, |route| ours(route).is_some()).await;
    let entry = ours(&judged).unwrap();
    assert_eq!(
        entry["parentRef"],
        json!({ "group": "", "kind": "Service", "name": "web" })
    );
    for kind in ["Accepted", "ResolvedRefs"] {
        assert_eq!(condition(entry, kind)["status"], "True", "{entry}");
        assert_eq!(condition(entry, kind)["observedGeneration"], 1);
    }
    assert!(
        judged["status"]["parents"]
            .as_array()
            .unwrap()
            .contains(&others)
    );

    // A backend that is not there: told in the status, of the new generation, and in an Event.
    server
        .patch(&path, json!({ "spec": route("nobody")["spec"] }))
        .await;
    let unresolved = |route: &Value| {
        ours(route).is_some_and(|entry| condition(entry, "ResolvedRefs")["status"] == "False")
    };
    let judged = server.until(&path, unresolved).await;
    let entry = ours(&judged).unwrap();
    assert_eq!(
        condition(entry, "ResolvedRefs")["reason"],
        "BackendNotFound"
    );
    assert_eq!(condition(entry, "ResolvedRefs")["observedGeneration"], 2);
    assert_eq!(condition(entry, "Accepted")["status"], "True");
    let events = "/apis/events.k8s.io/v1/namespaces/demo/events";
    let told = server
        .until(events, |list| !list["items"].as_array().unwrap().is_empty())
        .await;
    let event = &told["items"][0];
    assert_eq!(event["reason"], "BackendNotFound", "{event}");
    assert_eq!(event["regarding"]["uid"], judged["metadata"]["uid"]);
    assert_eq!(event["reportingController"], US);

    // Nothing is written that is there already: not after a change of something else.
    let version = judged["metadata"]["resourceVersion"].clone();
    let second = route("web");
    let second = json!({ "metadata": { "name": "second" }, "apiVersion": second["apiVersion"],
        "kind": second["kind"], "spec": second["spec"] });
    server.post(GATEWAY, second).await;
    server
        .until(&format!("{GATEWAY}/second"), |route| ours(route).is_some())
        .await;
    assert_eq!(
        server.get(&path).await.unwrap()["metadata"]["resourceVersion"],
        version
    );

    // A route that names no Service any more has nothing of ours.
    let gateway = json!({ "spec": { "parentRefs": [{ "name": "gw" }] } });
    server.patch(&path, gateway).await;
    let left = server.until(&path, |route| ours(route).is_none()).await;
    assert_eq!(left["status"]["parents"], json!([others]));
    lab.controller.stop().await;
}

#[tokio::test]
async fn policies_and_the_mesh_get_a_status() {
    let server = servers!();
    server.populate().await;
    let group = "gateway.networking.x-k8s.io";
    server.define("xmeshes", group, "v1alpha1", "XMesh").await;
    let definition = include_str!("../../../deploy/crds/trafficpolicies.warren-mesh.io.yaml");
    server
        .post(
            crate::provider::CRDS,
            serde_norway::from_str(definition).unwrap(),
        )
        .await;
    let policies = "/apis/warren-mesh.io/v1alpha1/namespaces/demo/trafficpolicies";
    server.until(policies, |list| !list.is_null()).await;
    let policy = json!({
        "apiVersion": "warren-mesh.io/v1alpha1", "kind": "TrafficPolicy", "metadata": { "name": "web" },
        "spec": { "targetRefs": [{ "group": "", "kind": "Service", "name": "web" }] },
    });
    server.post(policies, policy).await;
    let lab = server.controller("a").await;
    let judged = server
        .until(&format!("{policies}/web"), |policy| {
            policy["status"]["ancestors"].is_array()
        })
        .await;
    let entry = &judged["status"]["ancestors"][0];
    assert_eq!(entry["controllerName"], US);
    assert_eq!(entry["ancestorRef"]["name"], "web");
    assert_eq!(
        condition(entry, "Accepted")["observedGeneration"],
        1,
        "{entry}"
    );

    let path = format!("/apis/{group}/v1alpha1/xmeshes/warren");
    let mesh = server
        .until(&path, |mesh| mesh["status"]["supportedFeatures"].is_array())
        .await;
    assert_eq!(mesh["spec"], json!({ "controllerName": US }));
    let features = mesh["status"]["supportedFeatures"].as_array().unwrap();
    assert!(features.contains(&json!({ "name": "MeshConsumerRoute" })));
    assert_eq!(mesh["status"]["conditions"][0]["status"], "True");
    lab.controller.stop().await;
}

#[tokio::test]
async fn the_leader_is_one_and_the_next_takes_over_at_once() {
    let server = servers!();
    server.populate().await;
    let lease = "/apis/coordination.k8s.io/v1/namespaces/warren-system/leases/warren-controller";
    let one = server.controller("a").await;
    server
        .until(lease, |lease| lease["spec"]["holderIdentity"] == "a")
        .await;
    let two = server.controller("b").await;
    assert_eq!(two.metric("warren_controller_leader "), 0.0);
    one.controller.stop().await;
    let taken = server
        .until(lease, |lease| lease["spec"]["holderIdentity"] == "b")
        .await;
    assert_eq!(taken["spec"]["leaseTransitions"], 1);
    two.controller.stop().await;
}

#[tokio::test]
async fn nodes_are_tainted_until_their_agent_is_ready() {
    let server = servers!();
    server.populate().await;
    let lab = server.controller("a").await;
    let node = "/api/v1/nodes/node-1";
    let tainted = |node: &Value| {
        let taints = node["spec"]["taints"].as_array();
        let mut taints = taints.into_iter().flatten();
        taints.any(|t| t["key"] == "warren-mesh.io/not-ready" && t["effect"] == "NoSchedule")
    };
    server.until(node, tainted).await;
    let mut agent = server.agent(&lab, 1).await;
    agent.stream.subscribe::<NodePod>(&["*"]).await;
    agent.stream.take::<NodePod>().await;
    agent.report(&[]).await;
    server.until(node, |node| !tainted(node)).await;
    assert!(tainted(&server.get("/api/v1/nodes/node-2").await.unwrap()));
    let mut report = crate::common::report(&[]);
    report.ready = false;
    crate::common::soon("report", agent.calls.report(report))
        .await
        .unwrap();
    server.until(node, tainted).await;
    lab.controller.stop().await;
}

#[tokio::test]
async fn policies_that_do_not_hold_in_the_mesh_are_named() {
    let server = servers!();
    server.populate().await;
    let policies = "/apis/networking.k8s.io/v1/namespaces/demo/networkpolicies";
    let policy = |name: &str, ingress: Value| {
        json!({
            "metadata": { "name": name },
            "spec": {
                "podSelector": { "matchExpressions": [{ "key": "app", "operator": "In", "values": ["web"] }] },
                "policyTypes": ["Ingress"], "ingress": ingress,
            },
        })
    };
    let deny = server.post(policies, policy("deny", json!([]))).await;
    server.post(policies, policy("open", json!([{}]))).await;
    server.pod("demo", "web", "node-1", "web").await;
    let lab = server.controller("a").await;
    let named = |count: f64| {
        let lab = &lab;
        async move {
            while lab.metric("warren_controller_network_policies ") != count {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    };
    server
        .until(
            "/apis/coordination.k8s.io/v1/namespaces/warren-system/leases/warren-controller",
            |lease| lease["spec"]["holderIdentity"] == "a",
        )
        .await;
    let events = "/apis/events.k8s.io/v1/namespaces/demo/events";
    let of_policies = |list: &Value| -> Vec<Value> {
        let all = list["items"].as_array().cloned().unwrap_or_default();
        all.into_iter()
            .filter(|event| event["regarding"]["kind"] == "NetworkPolicy")
            .collect()
    };
    // It selects nobody before the pod has the label.
    let label = |value: Value| json!({ "metadata": { "labels": { "app": value } } });
    server
        .patch(&format!("{PODS}/web"), label(json!("web")))
        .await;
    let told = server
        .until(events, |list| !of_policies(list).is_empty())
        .await;
    let [event] = &of_policies(&told)[..] else {
        panic!("{told:#}")
    };
    assert_eq!(event["reason"], "IngressNotEnforced", "{event}");
    assert_eq!(event["regarding"]["uid"], deny["metadata"]["uid"]);
    let note = event["note"].as_str().unwrap();
    assert!(note.ends_with("that it selects: web."), "{note}");
    crate::common::soon("the metric", named(1.0)).await;

    // Another pod is no news.
    server.pod("demo", "more", "node-1", "web").await;
    server
        .patch(&format!("{PODS}/more"), label(json!("web")))
        .await;
    // One that allows everything is, as soon as it does not.
    let closed = json!({ "spec": policy("open", json!([]))["spec"] });
    server.patch(&format!("{policies}/open"), closed).await;
    let told = server
        .until(events, |list| of_policies(list).len() > 1)
        .await;
    let told = of_policies(&told);
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(
        told.iter().all(|event| event["series"].is_null()),
        "{told:#?}"
    );
    assert!(
        told.iter()
            .any(|event| event["regarding"]["name"] == "open")
    );

    // It goes with the label and with the policy.
    server.delete(&format!("{policies}/open")).await;
    crate::common::soon("the metric", named(1.0)).await;
    let off = json!({ "metadata": { "labels": { "warren-mesh.io/mesh": "disabled" } } });
    server.patch("/api/v1/namespaces/demo", off).await;
    crate::common::soon("the metric", named(0.0)).await;
    lab.controller.stop().await;
}
