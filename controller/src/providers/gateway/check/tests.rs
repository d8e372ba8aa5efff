//! What the proxies would refuse is said here, with its place.

use serde_json::json;

use super::*;
use crate::providers::field::display;

/// What is wrong with the rule of an HTTPRoute, as `place: message` below the rule.
fn mistakes(rule: serde_json::Value) -> Vec<String> {
    let spec: HttpRouteSpec = serde_json::from_value(json!({ "rules": [rule] })).unwrap();
    let found = http_route(&spec);
    let text = |(path, message): &Found| format!("{}: {message}", display(path));
    found
        .iter()
        .map(text)
        .map(|text| text.replacen("spec.rules[0].", "", 1))
        .collect()
}

fn expect(rule: serde_json::Value, expected: &[&str]) {
    let found = mistakes(rule);
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}\n{expected}");
    }
}

#[test]
fn expressions_are_valid_by_themselves() {
    let path = |value: &str| {
        let path = json!({ "type": "RegularExpression", "value": value });
        json!({ "matches": [{ "path": path }] })
    };
    for good in ["/v[12]", "/a|/b", "(?i)/a", "^/a$"] {
        expect(path(good), &[]);
    }
    // The third: what is put around it would be part of its comment.
    for bad in ["v1)|(v2", "a)(b", "(?x)/a # b", "(a"] {
        expect(
            path(bad),
            &["matches[0].path.value: expected a regular expression (RE2 syntax): "],
        );
    }
    let header = json!({ "name": "a", "type": "RegularExpression", "value": "v1)|(v2" });
    expect(
        json!({ "matches": [{ "headers": [header] }] }),
        &["matches[0].headers[0].value: expected a regular expression"],
    );
}

#[test]
fn headers_that_cannot_be_changed() {
    let modifier = |kind: &str, field: &str, set: &[&str], add: &[&str], remove: &[&str]| {
        let pairs = |names: &[&str]| -> Vec<serde_json::Value> {
            let pair = |name: &&str| json!({ "name": name, "value": "é" });
            names.iter().map(pair).collect()
        };
        let edit = json!({ "set": pairs(set), "add": pairs(add), "remove": remove });
        json!({ "filters": [{ "type": kind, field: edit }] })
    };
    let (kind, field) = ("RequestHeaderModifier", "requestHeaderModifier");
    // Nothing of them would be there to remove.
    let hop_by_hop = ["te", "Connection", "keep-alive", "upgrade"];
    expect(modifier(kind, field, &["host"], &["a"], &hop_by_hop), &[]);
    expect(
        modifier(kind, field, &["TE"], &["warren-a"], &["content-length"]),
        &[
            "filters[0].requestHeaderModifier.set[0].name: \"TE\" cannot be set",
            "filters[0].requestHeaderModifier.add[0].name: \"warren-a\" cannot be changed",
            "filters[0].requestHeaderModifier.remove[0]: \"content-length\" cannot be changed",
        ],
    );
    let (kind, field) = ("ResponseHeaderModifier", "responseHeaderModifier");
    expect(
        modifier(kind, field, &["Upgrade"], &[], &["Warren-Proxy-Error"]),
        &[
            "filters[0].responseHeaderModifier.set[0].name: \"Upgrade\" cannot be set",
            "filters[0].responseHeaderModifier.remove[0]: \"Warren-Proxy-Error\" cannot be",
        ],
    );
}

#[test]
fn origins_have_a_host_and_a_port_that_exists() {
    let origins =
        |all: &[&str]| json!({ "filters": [{ "type": "CORS", "cors": { "allowOrigins": all } }] });
    expect(
        origins(&["https://a.example:8443", "https://*", "http://[::1]:80"]),
        &[],
    );
    for bad in [
        "null",
        "https://a.example:*",
        "https://a.example:0",
        "*://a",
    ] {
        expect(
            origins(&[bad]),
            &["filters[0].cors.allowOrigins[0]: expected * or scheme://host[:port], found"],
        );
    }
}
