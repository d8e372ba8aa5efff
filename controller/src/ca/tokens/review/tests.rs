use serde_json::{Value, json};

use super::*;
use crate::fake_api::{Answer, client, failure};

/// What the API server says of the proxy's token of node-1.
fn good() -> Value {
    json!({
        "authenticated": true,
        "audiences": ["warren-controller"],
        "user": {
            "username": "system:serviceaccount:warren-system:warren-node-proxy",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["warren-node-proxy-x"],
                "authentication.kubernetes.io/pod-uid": ["u1"],
                "authentication.kubernetes.io/node-name": ["node-1"],
            },
        },
    })
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "warren-node-proxy-x", "namespace": "warren-system", "uid": "u1" },
        "spec": { "nodeName": "node-1", "serviceAccountName": "warren-node-proxy", "containers": [] },
    })
}

async fn judge(status: Value, pod: Value, node: &str, role: NodeRole) -> Result<(), String> {
    let (client, asked) = client(move |asked| match &*asked.target {
        "/apis/authentication.k8s.io/v1/tokenreviews?" => {
            assert_eq!(
                asked.body["spec"]["audiences"],
                json!(["warren-controller"])
            );
            assert_eq!(asked.body["spec"]["token"], "t0ken");
            let review = json!({
                "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {},
                "spec": asked.body["spec"], "status": status,
            });
            Answer::Json(201, review)
        }
        "/api/v1/namespaces/warren-system/pods/warren-node-proxy-x" if pod.is_object() => {
            Answer::Json(200, pod.clone())
        }
        _ => failure(404, "NotFound"),
    });
    let judged = TokenReviews::new(client).check(node, role, "t0ken").await;
    assert!(!asked.lock().is_empty());
    judged.map_err(|e| e.to_string())
}

#[tokio::test]
async fn a_token_is_good_for_the_node_and_role_of_its_pod() {
    judge(good(), pod(), "node-1", NodeRole::Proxy)
        .await
        .unwrap();
    // Before Kubernetes 1.32 the token does not tell the node; its pod does.
    let mut old = good();
    let extra = old["user"]["extra"].as_object_mut().unwrap();
    extra.remove("authentication.kubernetes.io/node-name");
    judge(old.clone(), pod(), "node-1", NodeRole::Proxy)
        .await
        .unwrap();
    let error = judge(old, pod(), "node-2", NodeRole::Proxy)
        .await
        .unwrap_err();
    assert!(
        error.contains("its pod warren-node-proxy-x is bound to node \"node-1\""),
        "{error}"
    );
}

#[tokio::test]
async fn each_wrong_token_is_refused_with_its_reason() {
    let with = |pointer: &str, value: Value| {
        let mut status = good();
        *status.pointer_mut(pointer).unwrap() = value;
        status
    };
    let extra = "/user/extra/authentication.kubernetes.io~1";
    let moved = |field: &str, value: &str| {
        let mut pod = pod();
        *pod.pointer_mut(field).unwrap() = json!(value);
        pod
    };
    for (status, pod, expected) in [
        (
            json!({ "authenticated": false, "error": "token has expired" }),
            pod(),
            "the API server says: token has expired",
        ),
        (json!({}), pod(), "the API server says: it is not valid"),
        (
            with("/audiences", json!(["api"])),
            pod(),
            "its audience is not warren-controller",
        ),
        (
            with("/audiences", json!([])),
            pod(),
            "its audience is not warren-controller",
        ),
        (
            with(
                "/user/username",
                json!("system:serviceaccount:warren-system:warren-cni"),
            ),
            pod(),
            "it is that of system:serviceaccount:warren-system:warren-cni, expected",
        ),
        (
            with(
                "/user/username",
                json!("system:serviceaccount:demo:warren-node-proxy"),
            ),
            pod(),
            "it is that of system:serviceaccount:demo:warren-node-proxy, expected",
        ),
        (
            with(&format!("{extra}pod-uid"), json!([])),
            pod(),
            "it is not bound to a pod",
        ),
        (
            with(&format!("{extra}node-name"), json!(["node-2"])),
            pod(),
            "it is bound to node node-2",
        ),
        (
            good(),
            Value::Null,
            "its pod warren-node-proxy-x with UID u1 is gone",
        ),
        (good(), moved("/metadata/uid", "u2"), "with UID u1 is gone"),
        (
            good(),
            moved("/spec/nodeName", "node-2"),
            "its pod warren-node-proxy-x is bound to node \"node-2\"",
        ),
        (
            good(),
            moved("/spec/serviceAccountName", "default"),
            "does not run as warren-node-proxy",
        ),
    ] {
        let error = judge(status, pod, "node-1", NodeRole::Proxy)
            .await
            .unwrap_err();
        assert!(error.contains(expected), "{error}\n{expected}");
        assert!(
            error.starts_with("the token is not good for node node-1"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_token_that_cannot_be_judged_is_not_called_bad() {
    let (client, _) = client(|_| failure(503, "ServiceUnavailable"));
    let judged = TokenReviews::new(client)
        .check("node-1", NodeRole::Agent, "t")
        .await;
    assert!(
        matches!(judged, Err(TokenError::Unavailable(_))),
        "{judged:?}"
    );
}
