//! Nobody but the controller writes its records: the chart's admission policy, in a real API server.

use mesh_api::proto::control::PodState;
use mesh_api::proto::mesh::NodePod;
use serde_json::{Value, json};

use crate::apiserver::ApiServer;
use crate::common::soon;
use crate::servers;
use crate::world::PODS;

const RECORD: &str = "warren-mesh.io/enrolled";

fn record(value: Value) -> Value {
    json!({ "metadata": { "annotations": { RECORD: value } } })
}

fn pod(name: &str, annotations: Value) -> Value {
    json!({
        "metadata": { "name": name, "annotations": annotations },
        "spec": { "containers": [{ "name": "c", "image": "x" }] },
    })
}

impl ApiServer {
    /// What `warren install` prints of it. Returns when it is in force.
    async fn guard(&self) {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../deploy/manifests/default.yaml"
        );
        let manifests = std::fs::read_to_string(file).unwrap();
        let mut installed = 0;
        for document in manifests.split("\n---\n") {
            let object: Value = serde_norway::from_str(document).unwrap();
            let plural = match object["kind"].as_str() {
                Some("ValidatingAdmissionPolicy") => "validatingadmissionpolicies",
                Some("ValidatingAdmissionPolicyBinding") => "validatingadmissionpolicybindings",
                _ => continue,
            };
            let path = format!("/apis/admissionregistration.k8s.io/v1/{plural}");
            self.post(&path, object).await;
            installed += 1;
        }
        assert_eq!(installed, 2);
        // The API server reads policies from a cache that follows.
        let in_force = async {
            let dry = format!("{PODS}?dryRun=All");
            let forged = pod("dry", json!({ RECORD: "{}" }));
            while self
                .ask("editor", ("POST", &dry), forged.clone())
                .await
                .is_ok()
            {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        soon("the policy", in_force).await;
    }

    /// Refused by the policy and by nothing else.
    async fn refused(&self, user: &str, call: (&str, &str), body: Value) {
        match self.ask(user, call, body).await {
            Err(kube::Error::Api(status)) => {
                assert_eq!(status.code, 403, "{call:?}: {status}");
                let text = &status.message;
                assert!(text.contains("only Warren's controller may"), "{text}");
                assert!(text.contains("pod template"), "what to do: {text}");
            }
            other => panic!("{user} {call:?}: {other:?}"),
        }
    }

    async fn allowed(&self, user: &str, call: (&str, &str), body: Value) -> Value {
        let answer = self.ask(user, call, body).await;
        answer.unwrap_or_else(|error| panic!("{user} {call:?}: {error}"))
    }
}

#[tokio::test]
async fn only_the_controller_writes_its_records() {
    let server = servers!();
    server.populate().await;
    server.guard().await;
    let lab = server.controller("a").await;
    let mut agent = server.agent(&lab, 1).await;
    agent.stream.subscribe::<NodePod>(&["*"]).await;
    agent.stream.take::<NodePod>().await;
    let uid = server.pod("demo", "web", "node-1", "web").await;
    agent.register(&uid, "web", [10, 1, 1, 2]).await.unwrap();
    agent.report(&[(&uid, PodState::Ready)]).await;
    lab.until_phase(&uid, "enforced").await;
    let kept = server.recorded("web").await;

    let (web, status) = (format!("{PODS}/web"), format!("{PODS}/web/status"));
    for user in ["editor", "admin"] {
        for value in [json!("{\"phase\":\"withdrawn\"}"), json!(""), Value::Null] {
            for path in [&web, &status] {
                server
                    .refused(user, ("PATCH", path), record(value.clone()))
                    .await;
            }
        }
    }
    // Nor added, in any way that a pod's annotations can change; nor in one that is too large to look at.
    server
        .allowed("editor", ("POST", PODS), pod("plain", json!({})))
        .await;
    let plain = format!("{PODS}/plain");
    server
        .refused("editor", ("PATCH", &plain), record(json!("{}")))
        .await;
    let large = "x".repeat(200_000);
    server
        .refused("editor", ("PATCH", &plain), record(json!(large)))
        .await;
    let forged = json!({ RECORD: "{\"phase\":\"enforced\"}" });
    server
        .refused("editor", ("POST", PODS), pod("forged", forged.clone()))
        .await;
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": { "name": "plain", "annotations": forged },
        "target": { "kind": "Node", "name": "node-1" },
    });
    for path in [
        format!("{plain}/binding"),
        "/api/v1/namespaces/demo/bindings".into(),
    ] {
        server
            .refused("editor", ("POST", &path), binding.clone())
            .await;
    }
    assert_eq!(server.recorded("web").await, kept);
    assert_eq!(server.recorded("plain").await, Value::Null);

    // All else goes on: edits of recorded pods, whole updates, what kubelets write, binding, deletion.
    let label = json!({ "metadata": { "labels": { "a": "b" }, "annotations": { "c": "d" } } });
    server.allowed("editor", ("PATCH", &web), label).await;
    let mut whole = server.get(&web).await.unwrap();
    whole["metadata"]["labels"]["e"] = json!("f");
    server.allowed("editor", ("PUT", &web), whole).await;
    let running = json!({ "status": { "phase": "Running" } });
    server.allowed("editor", ("PATCH", &status), running).await;
    let mut bound = binding;
    bound["metadata"]["annotations"] = json!({ "example.com/zone": "a" });
    server
        .allowed("editor", ("POST", &format!("{plain}/binding")), bound)
        .await;
    assert_eq!(server.recorded("web").await, kept);
    let now = json!({ "gracePeriodSeconds": 0 });
    server.allowed("editor", ("DELETE", &web), now).await;
    lab.controller.stop().await;
}
