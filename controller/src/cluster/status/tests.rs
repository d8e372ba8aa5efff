use serde_json::json;

use super::*;
use crate::providers::gateway::ParentReference;

const NOW: &str = "2026-01-01T00:00:00Z";

fn key(kind: &str) -> ObjectKey {
    ObjectKey {
        kind: kind.into(),
        namespace: "demo".into(),
        name: "r".into(),
    }
}

fn seen(status: Value) -> Seen {
    Seen {
        uid: "u".into(),
        resource_version: "7".into(),
        generation: Some(2),
        status,
        resource: Arc::new(ApiResource {
            group: String::new(),
            version: String::new(),
            api_version: String::new(),
            kind: String::new(),
            plural: String::new(),
        }),
    }
}

fn judged(kind: &'static str, services: &[&str]) -> ObjectStatus {
    let condition = |kind: &'static str| Condition {
        kind,
        status: "True",
        reason: kind,
        message: String::new(),
    };
    let parents = services.iter().map(|name| ParentStatus {
        parent_ref: ParentReference {
            group: Some(String::new()),
            kind: Some("Service".into()),
            name: (*name).into(),
            port: Some(80),
            ..ParentReference::default()
        },
        conditions: vec![condition("Accepted"), condition("ResolvedRefs")],
    });
    ObjectStatus {
        kind,
        namespace: "demo".into(),
        name: "r".into(),
        observed_generation: Some(2),
        parents: parents.collect(),
    }
}

fn write(status: Value, wanted: Option<&ObjectStatus>) -> Option<Value> {
    let kind = wanted.map_or("HTTPRoute", |w| w.kind);
    Write::new(&key(kind), &seen(status), wanted.as_ref(), NOW).map(|w| {
        assert_eq!(w.resource_version, "7");
        w.status
    })
}

fn others() -> Value {
    json!({ "parentRef": { "name": "gw" }, "controllerName": "example.com/other", "conditions": [] })
}

#[test]
fn only_our_entries_are_written_and_only_when_they_differ() {
    let route = judged("HTTPRoute", &["web"]);
    let first = write(json!({ "parents": [others()] }), Some(&route)).unwrap();
    assert_eq!(first["parents"][0], others());
    let ours = &first["parents"][1];
    assert_eq!(ours["controllerName"], CONTROLLER);
    assert_eq!(
        ours["parentRef"],
        json!({ "group": "", "kind": "Service", "name": "web", "port": 80 })
    );
    assert_eq!(ours["conditions"][0]["observedGeneration"], 2);
    assert_eq!(ours["conditions"][0]["lastTransitionTime"], NOW);
    assert_eq!(
        write(first.clone(), Some(&route)),
        None,
        "it is as it should be"
    );

    // Another order is not another status: who insisted on one would never come to rest.
    let mut turned = first.clone();
    turned["parents"].as_array_mut().unwrap().reverse();
    assert_eq!(write(turned, Some(&route)), None);

    // What a route names no more is taken out; the others' stays.
    assert_eq!(write(first, None), Some(json!({ "parents": [others()] })));
    assert_eq!(write(json!({ "parents": [others()] }), None), None);
    assert_eq!(write(Value::Null, None), None);
}

#[test]
fn a_transition_keeps_its_time_until_the_status_changes() {
    let route = judged("HTTPRoute", &["web"]);
    let mut before = write(Value::Null, Some(&route)).unwrap();
    let long_ago = json!("2020-01-01T00:00:00Z");
    let conditions = before["parents"][0]["conditions"].as_array_mut().unwrap();
    for condition in conditions.iter_mut() {
        condition["lastTransitionTime"] = long_ago.clone();
    }
    conditions[0]["status"] = json!("False");
    conditions.push(json!({ "type": "Example", "status": "True" }));
    conditions.push(json!({ "type": "PartiallyInvalid", "status": "True" }));
    let after = write(before, Some(&route)).unwrap();
    let conditions = after["parents"][0]["conditions"].as_array().unwrap();
    let types: Vec<_> = conditions
        .iter()
        .map(|c| c["type"].as_str().unwrap())
        .collect();
    assert_eq!(types, ["Accepted", "ResolvedRefs", "Example"]);
    assert_eq!(conditions[0]["lastTransitionTime"], NOW);
    assert_eq!(conditions[1]["lastTransitionTime"], long_ago);
}

#[test]
fn what_was_not_judged_yet_is_left_alone() {
    let mut route = judged("HTTPRoute", &["web"]);
    route.observed_generation = Some(1);
    assert_eq!(write(Value::Null, Some(&route)), None);
}

#[test]
fn policies_have_ancestors_and_lists_have_an_end() {
    let policy = judged("TrafficPolicy", &["web"]);
    let status = write(Value::Null, Some(&policy)).unwrap();
    assert_eq!(status["ancestors"][0]["ancestorRef"]["name"], "web");
    let names: Vec<String> = (0..20).map(|i| format!("s{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let policy = judged("XBackendTrafficPolicy", &names);
    let there = json!({ "ancestors": [others(), others()] });
    let status = write(there, Some(&policy)).unwrap();
    assert_eq!(status["ancestors"].as_array().unwrap().len(), 16);
}
