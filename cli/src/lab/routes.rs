//! `get routes` and `get policies`: what the controller says of them, from its `/status`.
//!
//! Asked of the controller and not of the daemon: only the controller judges them.

use mesh_api::names::CONTROLLER_METRICS_PORT;
use serde_json::Value;

use super::status::Status;
use super::{mesh, netns, view};
use crate::error::{Context, Result};

/// The objects in one part of the controller's status, of one namespace if one is given.
pub(super) fn judged(status: &Status, part: &str, namespace: Option<&str>) -> Result<Vec<Value>> {
    let controller = &status.controller;
    let address = controller
        .address
        .ok_or_else(|| mesh::no_mesh("the controller"))?;
    let to = netns::socket_address(address, CONTROLLER_METRICS_PORT);
    let body = view::fetch(&controller.netns, to, "/status", "controller")?;
    let mut said: Value = serde_json::from_str(&body).context("the controller's status")?;
    let Value::Array(mut objects) = said[part].take() else {
        return Ok(Vec::new());
    };
    objects.retain(|o| namespace.is_none_or(|n| o["namespace"] == n));
    Ok(objects)
}

/// One line for each parent or target.
pub(super) fn table(objects: &[Value]) -> (&'static [&'static str], Vec<Vec<String>>) {
    let head = &[
        "KIND",
        "NAMESPACE",
        "NAME",
        "FOR",
        "ACCEPTED",
        "REFS",
        "MESSAGE",
    ];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut rows = Vec::new();
    for object in objects {
        for parent in object["parents"].as_array().into_iter().flatten() {
            let none = Vec::new();
            let conditions = parent["conditions"].as_array().unwrap_or(&none);
            let find = |kind: &str| conditions.iter().find(|c| c["type"] == kind);
            let state = |kind: &str| match find(kind) {
                None => "-".to_owned(),
                Some(c) if c["status"] == "True" => "yes".into(),
                Some(c) => format!("no: {}", text(&c["reason"])),
            };
            let messages: Vec<String> = conditions
                .iter()
                .map(|c| text(&c["message"]))
                .filter(|m| !m.is_empty())
                .collect();
            rows.push(vec![
                text(&object["kind"]),
                text(&object["namespace"]),
                text(&object["name"]),
                target(&parent["parentRef"]),
                state("Accepted"),
                state("ResolvedRefs"),
                messages.join("; "),
            ]);
        }
    }
    (head, rows)
}

/// `kind namespace/name:port/section`, as far as the reference says it.
fn target(reference: &Value) -> String {
    let part = |field: &str, before: &str, after: &str| {
        let text = reference[field].as_str().map(str::to_owned);
        let text = text.or_else(|| reference[field].as_i64().map(|n| n.to_string()));
        text.map_or(String::new(), |t| format!("{before}{t}{after}"))
    };
    [
        part("kind", "", " "),
        part("namespace", "", "/"),
        part("name", "", ""),
        part("port", ":", ""),
        part("sectionName", "/", ""),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_for_each_parent() {
        let objects = [json!({
            "kind": "HTTPRoute", "namespace": "demo", "name": "r", "parents": [
                {"parentRef": {"group": "", "kind": "Service", "name": "web", "port": 80}, "conditions": [
                    {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""},
                    {"type": "ResolvedRefs", "status": "False", "reason": "BackendNotFound", "message": "there is none"},
                ]},
                {"parentRef": {"kind": "Service", "namespace": "x", "name": "y", "sectionName": "z"}, "conditions": [
                    {"type": "Accepted", "status": "False", "reason": "NoMatchingParent", "message": "gone"},
                ]},
            ],
        })];
        let (_, rows) = table(&objects);
        assert_eq!(
            rows[0],
            [
                "HTTPRoute",
                "demo",
                "r",
                "Service web:80",
                "yes",
                "no: BackendNotFound",
                "there is none"
            ]
        );
        assert_eq!(rows[1][3..5], ["Service x/y/z", "no: NoMatchingParent"]);
    }
}
