//! Line 3, GRPCRoute against the running proxy with gRPC peers in Python: matches and their precedence,
//! weights, metadata filters, mirrors, shares of backends that cannot be used.

use std::time::Duration;

use serde_json::{Value, json};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, service, service_of};
use warren_tests::python::python;
use warren_tests::scenario::scenario;
use warren_tests::wait::wait_until;

const CLIENT: PodRef<'_> = ("demo", "client");
const PORT: u16 = 50051;
const UNIMPLEMENTED: i64 = 12;
const UNAVAILABLE: i64 = 14;

#[test]
fn methods_metadata_and_weights() {
    scenario(Duration::from_secs(180), |s| {
        let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        for (name, node) in [("g1", "node-1"), ("g2", "node-2")] {
            let command = python("grpc_server.py", &["--name", name]);
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            manifests.push(account("demo", name));
            manifests.push(
                Pod::new("demo", name, node)
                    .command(&command)
                    .ready_tcp(PORT)
                    .build(),
            );
            manifests.push(service("demo", name, &[(PORT, PORT)]));
        }
        manifests.push(service("demo", "hollow", &[(PORT, PORT)]));
        for (name, protocol) in [
            ("match", None),
            ("weigh", Some("kubernetes.io/h2c")),
            ("share", None),
            ("change", None),
            ("mirror", None),
        ] {
            let mut front = service_of("demo", name, &[(PORT, PORT, protocol)]);
            front["spec"]["selector"] = json!({"app": "g2"});
            manifests.push(front);
        }
        let lab = s.lab(2, &manifests);

        let to = |backend: &str| json!([{"name": backend, "port": PORT}]);
        let method = |service: &str, method: &str| {
            let mut found = json!({});
            for (key, value) in [("service", service), ("method", method)] {
                if !value.is_empty() {
                    found[key] = json!(value);
                }
            }
            json!({"method": found})
        };
        let rule = |matches: Value, backend: &str| json!({"matches": [matches], "backendRefs": to(backend)});
        route(
            &lab,
            "match",
            json!([
                rule(method("mesh.Test", ""), "g2"),
                rule(method("mesh.Test", "Exact"), "g1"),
                rule(method("", "Anywhere"), "g1"),
                rule(json!({"method": {"service": "mesh.Headed"}, "headers": [{"name": "Version", "value": "two"}]}), "g2"),
                rule(method("mesh.Headed", ""), "g1"),
                {"matches": [{"method": {"type": "RegularExpression", "service": "mesh[.]R[a-z]+", "method": "G.*"}}], "backendRefs": to("g2")},
            ]),
        );
        for (shows, called, metadata, code, server) in [
            ("GRPCMethodMatch.service", "/mesh.Test/Unary", None, 0, "g2"),
            (
                "the longer method wins over the service alone",
                "/mesh.Test/Exact",
                None,
                0,
                "g1",
            ),
            (
                "GRPCMethodMatch.method",
                "/other.Service/Anywhere",
                None,
                0,
                "g1",
            ),
            (
                "characters of the service count first",
                "/mesh.Test/Anywhere",
                None,
                0,
                "g2",
            ),
            (
                "GRPCHeaderMatch",
                "/mesh.Headed/Unary",
                Some("version=two"),
                0,
                "g2",
            ),
            (
                "fewer header matches",
                "/mesh.Headed/Unary",
                Some("version=three"),
                0,
                "g1",
            ),
            ("RegularExpression", "/mesh.Reg/Get", None, 0, "g2"),
            (
                "RegularExpression: the whole name",
                "/mesh.Reg/XGet",
                None,
                UNIMPLEMENTED,
                "",
            ),
            (
                "names are case-sensitive",
                "/mesh.test/Unary",
                None,
                UNIMPLEMENTED,
                "",
            ),
            (
                "no rule matches",
                "/nobody.Knows/This",
                None,
                UNIMPLEMENTED,
                "",
            ),
        ] {
            let said = call(&lab, "match", called, metadata);
            assert_eq!(said["code"], code, "{shows}: {called}: {said}");
            if code == 0 {
                assert_eq!(
                    said["answer"]["server"], server,
                    "{shows}: {called}: {said}"
                );
            }
        }

        route(
            &lab,
            "weigh",
            json!([{"backendRefs": [
            {"name": "g1", "port": PORT, "weight": 70}, {"name": "g2", "port": PORT, "weight": 30},
            {"name": "missing", "port": PORT, "weight": 0}]}]),
        );
        // One channel: what is balanced is the call, not the connection.
        let said = client(
            &lab,
            &[
                "tally",
                &format!("weigh:{PORT}"),
                "/mesh.Test/Unary",
                "4000",
            ],
        );
        assert_eq!(
            said["codes"],
            json!({"0": 4000}),
            "MeshGRPCRouteWeight: {said}"
        );
        let share = said["servers"]["g1"].as_f64().unwrap_or_default() / 4000.;
        // Three standard deviations of a share drawn 4,000 times.
        assert!(
            (share - 0.7).abs() < 0.022,
            "MeshGRPCRouteWeight: {share}: {said}"
        );

        route(
            &lab,
            "share",
            json!([
                {"matches": [method("mesh.None", "")], "backendRefs": to("missing")},
                {"matches": [method("mesh.Hollow", "")], "backendRefs": to("hollow")},
                {"matches": [method("mesh.Half", "")], "backendRefs": [{"name": "g1", "port": PORT}, {"name": "missing", "port": PORT}]},
            ]),
        );
        assert_eq!(
            call(&lab, "share", "/mesh.None/Unary", None)["code"],
            UNAVAILABLE,
            "an invalid backend"
        );
        assert_eq!(
            call(&lab, "share", "/mesh.Hollow/Unary", None)["code"],
            UNAVAILABLE,
            "no endpoints"
        );
        let said = client(
            &lab,
            &[
                "tally",
                &format!("share:{PORT}"),
                "/mesh.Half/Unary",
                "1000",
            ],
        );
        let (good, bad) = (said["codes"]["0"].as_f64(), said["codes"]["14"].as_f64());
        let sum = good.unwrap_or_default() + bad.unwrap_or_default();
        assert_eq!(
            sum, 1000.,
            "UNAVAILABLE for the share of an invalid backend: {said}"
        );
        assert!(
            (good.unwrap_or_default() / 1000. - 0.5).abs() < 0.05,
            "{said}"
        );

        let change = json!({"set": [{"name": "x-set", "value": "new"}], "add": [{"name": "x-add", "value": "more"}], "remove": ["x-remove"]});
        route(
            &lab,
            "change",
            json!([{"backendRefs": to("g1"), "filters": [
            {"type": "RequestHeaderModifier", "requestHeaderModifier": change},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-new", "value": "1"}]}}]}]),
        );
        let sent = [
            "call",
            &format!("change:{PORT}"),
            "/mesh.Test/Unary",
            "--metadata",
            "x-set=old",
            "--metadata",
            "x-remove=gone",
        ];
        let said = client(&lab, &sent);
        let seen = said["answer"]["metadata"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        for (pair, there) in [
            (["x-set", "new"], true),
            (["x-add", "more"], true),
            (["x-set", "old"], false),
            (["x-remove", "gone"], false),
        ] {
            assert_eq!(
                seen.contains(&json!(pair)),
                there,
                "GRPCRoute RequestHeaderModifier: {pair:?} in {said}"
            );
        }
        let initial = said["initial"].as_array().cloned().unwrap_or_default();
        assert!(
            initial.contains(&json!(["x-new", "1"])),
            "GRPCRoute ResponseHeaderModifier: {said}"
        );
        // All four kinds go through a routed Service.
        let said = client(&lab, &["kinds", &format!("change:{PORT}")]);
        assert_eq!(
            (&said["bidi"], &said["fail"]["code"], &said["early"]["code"]),
            (&json!(50), &json!(9), &json!(7)),
            "{said}"
        );
        assert_eq!(said["deadline"]["code"], 4, "{said}");

        let mirror = json!({"backendRef": {"name": "g2", "port": PORT}});
        route(
            &lab,
            "mirror",
            json!([{"backendRefs": to("g1"), "filters": [{"type": "RequestMirror", "requestMirror": mirror}]}]),
        );
        // Calls that were answered to; a message that is not whole is none.
        let calls = || {
            let said = call(&lab, "g2", "/mesh.Test/Count", None);
            said["answer"]["calls"].as_u64().ok_or(said)
        };
        let before = calls().expect("the mirror's count");
        let said = client(
            &lab,
            &[
                "tally",
                &format!("mirror:{PORT}"),
                "/mesh.Test/Unary",
                "100",
            ],
        );
        assert_eq!(
            said["servers"],
            json!({"g1": 100}),
            "answers come from the backend alone: {said}"
        );
        // Until no more come.
        let mut last = before;
        wait_until(
            "GRPCRoute RequestMirror: a copy of each call",
            Duration::from_secs(10),
            || {
                let got = calls()? - before;
                let settled = std::mem::replace(&mut last, got) == got;
                if settled && got == 100 {
                    Ok(())
                } else {
                    Err(json!(got))
                }
            },
        );
    });
}

/// Applies a GRPCRoute of the front of that name and waits until the client's node goes by it: the method
/// `IsThere` of its own service has a backend that is missing.
#[track_caller]
fn route(lab: &Lab, name: &str, mut rules: Value) {
    let marker = json!({"matches": [{"method": {"service": format!("is.there.{name}"), "method": "IsThere"}}],
        "backendRefs": [{"name": "missing", "port": PORT}]});
    rules.as_array_mut().expect("rules are a list").push(marker);
    lab.apply(&[json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute",
        "metadata": {"name": name, "namespace": "demo"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": name}], "rules": rules},
    })])
    .expect_ok();
    wait_until(
        &format!("GRPCRoute {name}"),
        Duration::from_secs(15),
        || {
            let said = call(lab, name, &format!("/is.there.{name}/IsThere"), None);
            if said["code"] == UNAVAILABLE {
                Ok(())
            } else {
                Err(said)
            }
        },
    );
}

#[track_caller]
fn call(lab: &Lab, front: &str, method: &str, metadata: Option<&str>) -> Value {
    let target = format!("{front}:{PORT}");
    let mut args = vec!["call", &target, method];
    args.extend(metadata.into_iter().flat_map(|m| ["--metadata", m]));
    client(lab, &args)
}

#[track_caller]
fn client(lab: &Lab, args: &[&str]) -> Value {
    let command = python("grpc_client.py", args);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let done = lab
        .exec_within(CLIENT, &command, Duration::from_secs(60))
        .expect_ok();
    serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
}
