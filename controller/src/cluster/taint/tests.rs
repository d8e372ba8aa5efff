use mesh_api::names::MESH_LABEL;
use serde_json::json;

use super::*;
use crate::fake_api::{Answer, client, failure};

/// node-1 with an agent's pod, node-2 without.
fn objects(tainted: bool, marked: bool, system_label: &str) -> Objects {
    let mut objects = Objects::default();
    let taints = if tainted {
        json!([{ "key": NOT_READY_TAINT, "effect": "NoSchedule" }])
    } else {
        json!([])
    };
    for name in ["node-1", "node-2"] {
        let annotations = if marked {
            json!({ READY: "true" })
        } else {
            json!({})
        };
        let node = json!({
            "metadata": { "name": name, "annotations": annotations }, "spec": { "taints": taints },
            "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
        });
        let node = Arc::new(serde_json::from_value(node).unwrap());
        objects.nodes.insert(name.into(), node);
    }
    let namespace =
        json!({ "metadata": { "name": "warren-system", "labels": { MESH_LABEL: system_label } } });
    let namespace = Arc::new(serde_json::from_value(namespace).unwrap());
    objects.namespaces.insert("warren-system".into(), namespace);
    let pod = json!({
        "metadata": { "name": "warren-cni-x", "namespace": "warren-system" },
        "spec": { "nodeName": "node-1", "serviceAccountName": "warren-cni", "containers": [] },
    });
    let pod = Arc::new(serde_json::from_value(pod).unwrap());
    let name = ("warren-system".to_owned(), "warren-cni-x".to_owned());
    objects.pods.insert(name, pod);
    objects
}

fn changes(objects: &Objects, report: Option<bool>, leads: bool) -> Vec<(String, bool)> {
    let reported = report.map(|ready| ("node-1".to_owned(), ready));
    let now = "2026-01-01T00:01:00Z".parse().unwrap();
    to_change(objects, &reported.into_iter().collect(), leads, now)
}

/// What the kubelet says of pods of the agent on node-1: ready or not, since that second.
fn with_agents(mut objects: Objects, said: &[(&str, u8)]) -> Objects {
    objects.pods.clear();
    for (ready, since) in said {
        let name = format!("warren-cni-{since}");
        let pod = json!({
            "metadata": { "name": name, "namespace": "warren-system" },
            "spec": { "nodeName": "node-1", "serviceAccountName": "warren-cni", "containers": [] },
            "status": { "conditions": [
                { "type": "PodScheduled", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z" },
                { "type": "Ready", "status": ready, "lastTransitionTime": format!("2026-01-01T00:00:{since:02}Z") },
            ] },
        });
        let pod = Arc::new(serde_json::from_value(pod).unwrap());
        objects.pods.insert(("warren-system".into(), name), pod);
    }
    objects
}

#[test]
fn the_report_of_an_agent_lifts_the_taint_and_sets_it() {
    let node = |ready| vec![("node-1".to_owned(), ready)];
    assert_eq!(
        changes(&objects(true, false, "x"), Some(true), false),
        node(true)
    );
    assert_eq!(
        changes(&objects(false, false, "x"), Some(true), false),
        node(true),
        "marked"
    );
    assert_eq!(changes(&objects(false, true, "x"), Some(true), false), []);
    assert_eq!(
        changes(&objects(false, true, "x"), Some(false), false),
        node(false)
    );
    assert_eq!(changes(&objects(true, false, "x"), Some(false), false), []);
}

#[test]
fn the_leader_taints_nodes_that_wait_for_their_agent_and_no_others() {
    let new = objects(false, false, "x");
    assert_eq!(changes(&new, None, true), [("node-1".to_owned(), false)]);
    assert_eq!(changes(&new, None, false), []);
    assert_eq!(changes(&objects(false, true, "x"), None, true), []);
    assert_eq!(
        changes(&objects(false, false, "disabled"), None, true),
        [],
        "taken down"
    );
    assert_eq!(
        changes(&objects(false, true, "disabled"), Some(false), true),
        []
    );
}

#[test]
fn the_leader_taints_nodes_whose_agent_has_been_away_for_a_while() {
    let was_ready = |said| with_agents(objects(false, true, "x"), said);
    let node = [("node-1".to_owned(), false)];
    assert_eq!(changes(&was_ready(&[("False", 50)]), None, true), node);
    assert_eq!(changes(&was_ready(&[("Unknown", 50)]), None, true), node);
    assert_eq!(changes(&was_ready(&[("False", 51)]), None, true), []);
    assert_eq!(changes(&was_ready(&[("True", 20)]), None, true), []);
    assert_eq!(
        changes(&was_ready(&[("False", 20), ("True", 55)]), None, true),
        [],
        "one has taken the place of the other"
    );
    let lifted = |at: &str| {
        let mut objects = was_ready(&[("False", 20)]);
        for node in objects.nodes.values_mut() {
            let annotations = &mut Arc::make_mut(node).metadata.annotations;
            annotations
                .get_or_insert_default()
                .insert(READY.into(), at.into());
        }
        changes(&objects, None, true)
    };
    assert_eq!(
        lifted("2026-01-01T00:00:51Z"),
        [],
        "by another replica just now"
    );
    assert_eq!(lifted("2026-01-01T00:00:50.000000001Z"), []);
    assert_eq!(lifted("2026-01-01T00:00:50Z"), node);
    assert_eq!(changes(&was_ready(&[("False", 20)]), None, false), []);
    assert_eq!(
        changes(&was_ready(&[("False", 20)]), Some(true), true),
        [],
        "it reports"
    );
    let tainted = with_agents(objects(true, false, "x"), &[("False", 20)]);
    assert_eq!(changes(&tainted, None, true), [], "it is");
    let mut unwatched = was_ready(&[("False", 20)]);
    for node in unwatched.nodes.values_mut() {
        let status = Arc::make_mut(node).status.as_mut().unwrap();
        status.conditions.as_mut().unwrap()[0].status = "Unknown".into();
    }
    assert_eq!(changes(&unwatched, None, true), [], "who would know");
    let taken_down = with_agents(objects(false, true, "disabled"), &[("False", 20)]);
    assert_eq!(changes(&taken_down, None, true), []);
}

#[tokio::test]
async fn the_taints_of_others_stay() {
    let (client, asked) = client(|asked| match asked.method.as_str() {
        "GET" => Answer::Json(
            200,
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": { "name": "node-1", "resourceVersion": "5" },
                "spec": { "taints": [
                    { "key": "example.com/gpu", "effect": "NoExecute" },
                    { "key": NOT_READY_TAINT, "effect": "NoSchedule" },
                ] },
            }),
        ),
        "PATCH" => Answer::Json(
            200,
            json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": {} }),
        ),
        _ => failure(405, "MethodNotAllowed"),
    });
    set(&Api::all(client), "node-1", true).await.unwrap();
    let mut patch = asked.lock()[1].body.clone();
    let mark = patch["metadata"]["annotations"][READY].take();
    let written: Timestamp = mark.as_str().unwrap().parse().unwrap();
    assert!(!is_past(written, Timestamp::now()), "{mark}");
    assert_eq!(
        patch,
        json!({
            "metadata": { "resourceVersion": "5", "annotations": { READY: null } },
            "spec": { "taints": [{ "key": "example.com/gpu", "effect": "NoExecute" }] },
        })
    );
}
