use std::fmt::Write as _;
use std::sync::Arc;

use mesh_api::proto::mesh::{Mode, Route, route_filter};

use crate::model::{Model, Settings, build};
use crate::providers::Objects;
use crate::providers::directory::Reader;
use crate::watch::Changes;

/// `web` has every kind of port; `db` speaks something else; `v1` and `v2` are backends.
const SERVICES: &str = r#"
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: web, namespace: demo}
  spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}, {name: alt, port: 8080, appProtocol: http}]}
- apiVersion: v1
  kind: Service
  metadata: {name: v1, namespace: demo}
  spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}, {name: tls, port: 443, appProtocol: https}]}
- apiVersion: v1
  kind: Service
  metadata: {name: v2, namespace: other}
  spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
- apiVersion: v1
  kind: Service
  metadata: {name: db, namespace: demo}
  spec: {clusterIP: 10.96.0.4, ports: [{name: sql, port: 3306, appProtocol: mysql}, {name: admin, port: 80}]}
- apiVersion: v1
  kind: Service
  metadata: {name: spoken, namespace: demo}
  spec:
    clusterIP: 10.96.0.5
    ports:
    - {name: a, port: 1, appProtocol: WS}
    - {name: b, port: 2, appProtocol: grpc-web}
    - {name: c, port: 3, appProtocol: kubernetes.io/H2C}
    - {name: d, port: 4, appProtocol: kubernetes.io/ws}
    - {name: e, port: 5, appProtocol: kubernetes.io/wss}
- apiVersion: v1
  kind: Service
  metadata: {name: headless, namespace: demo}
  spec: {clusterIP: None, ports: [{port: 80}]}
- apiVersion: v1
  kind: Service
  metadata: {name: alias, namespace: demo}
  spec: {type: ExternalName, externalName: a.example}
"#;

fn objects(manifests: &str) -> Objects {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("{SERVICES}---\n{manifests}");
    std::fs::write(dir.path().join("m.yaml"), text).unwrap();
    let mut reader = Reader::new(dir.path());
    let objects = reader.read(&Changes::Unknown).unwrap();
    assert_eq!(reader.mistakes(), [], "{manifests}");
    objects
}

fn model_of(objects: &Objects) -> Model {
    let settings = Settings {
        trust_domain: "cluster.local".into(),
        mode: Mode::Permissive,
    };
    build(objects, &settings)
}

fn model(manifests: &str) -> Model {
    model_of(&objects(manifests))
}

fn route(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec:\n{spec}\n---\n"
    )
}

/// An HTTPRoute of `demo` to `demo/web` with these rules.
fn http(rules: &str) -> String {
    let spec =
        format!("  parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n{rules}");
    route("HTTPRoute", "demo", "r", &spec)
}

/// Conditions that are not as good as can be, `parent: Type=Status Reason: message`.
fn complaints(model: &Model, key: &str) -> Vec<String> {
    let status = model.statuses.iter().find(|s| s.key() == key);
    let mut found = Vec::new();
    for parent in status.into_iter().flat_map(|s| &s.parents) {
        for c in &parent.conditions {
            if !c.is_good() {
                let mut text = String::new();
                let name = &parent.parent_ref.name;
                write!(
                    text,
                    "{name}: {}={} {}: {}",
                    c.kind, c.status, c.reason, c.message
                )
                .unwrap();
                found.push(text);
            }
        }
    }
    found
}

/// Parents as `namespace/service:port/section`.
fn parents(model: &Model, name: &str) -> Vec<String> {
    let route = model.routes.get(name);
    let parents = route.into_iter().flat_map(|r| &r.parents);
    parents
        .map(|p| {
            format!(
                "{}/{}:{}/{}",
                p.namespace, p.service, p.port, p.section_name
            )
        })
        .collect()
}

fn one(model: &Model) -> &Route {
    &model.routes["httproute/demo/r"]
}

/// GEP-1294: what a route may be attached to, and what is said of it.
#[test]
fn parents_are_cluster_ip_services() {
    let cases: [(&str, &[&str], &str); 13] = [
        ("name: web", &["demo/web:0/"], ""),
        ("name: web, port: 80", &["demo/web:80/"], ""),
        ("name: web, sectionName: alt", &["demo/web:0/alt"], ""),
        (
            "name: web, sectionName: alt, port: 8080",
            &["demo/web:8080/alt"],
            "",
        ),
        ("name: v2, namespace: other", &["other/v2:0/"], ""),
        (
            "name: web, sectionName: alt, port: 80",
            &[],
            "web: Accepted=False NoMatchingParent: Service demo/web has no TCP port 80 named alt",
        ),
        (
            "name: web, port: 81",
            &[],
            "web: Accepted=False NoMatchingParent: Service demo/web has no TCP port 81",
        ),
        (
            "name: gone",
            &[],
            "gone: Accepted=False NoMatchingParent: there is no Service demo/gone",
        ),
        (
            "name: headless",
            &[],
            "headless: Accepted=False NoMatchingParent: Service demo/headless is headless",
        ),
        (
            "name: alias",
            &[],
            "alias: Accepted=False NoMatchingParent: Service demo/alias is an ExternalName",
        ),
        // A route makes a port HTTP only where appProtocol does not say otherwise.
        ("name: db", &["demo/db:80/"], ""),
        (
            "name: db, port: 3306",
            &[],
            "db: Accepted=False NoMatchingParent: Service demo/db has appProtocol mysql there",
        ),
        // For a Gateway: the group's default.
        ("name: web, group: gateway.networking.k8s.io", &[], ""),
    ];
    for (reference, attached, complaint) in cases {
        let group = if reference.contains("group") {
            ""
        } else {
            "group: '', "
        };
        let model = model(&route(
            "HTTPRoute",
            "demo",
            "r",
            &format!(
                "  parentRefs: [{{{group}kind: Service, {reference}}}]\n  rules: [{{backendRefs: [{{name: v1, port: 80}}]}}]"
            ),
        ));
        assert_eq!(parents(&model, "httproute/demo/r"), attached, "{reference}");
        let complaints = complaints(&model, "HTTPRoute demo/r").join("\n");
        assert!(
            complaints.starts_with(complaint),
            "{reference}: {complaints}"
        );
        assert_eq!(
            complaints.is_empty(),
            complaint.is_empty(),
            "{reference}: {complaints}"
        );
    }
}

/// GEP-1294, "Route types": GRPC before HTTP before TLS before TCP on one port.
#[test]
fn of_the_kinds_on_a_port_one_counts() {
    let to =
        |port: &str| format!("  parentRefs: [{{group: '', kind: Service, name: web{port}}}]\n");
    let backend = "backendRefs: [{name: v1, port: 80}]";
    let rules = format!("  rules: [{{{backend}}}]");
    let http = route("HTTPRoute", "demo", "h", &(to("") + &rules));
    let tcp = route("TCPRoute", "demo", "c", &(to("") + &rules));
    let grpc = |namespace: &str, port: &str| {
        let spec = format!(
            "  parentRefs: [{{group: '', kind: Service, name: web, namespace: demo{port}}}]\n  rules: []"
        );
        route("GRPCRoute", namespace, "g", &spec)
    };
    // All ports: the losers do not count anywhere.
    let all = model(&(http.clone() + &tcp + &grpc("demo", "")));
    assert_eq!(all.routes.keys().collect::<Vec<_>>(), ["grpcroute/demo/g"]);
    assert_eq!(
        complaints(&all, "HTTPRoute demo/h"),
        [
            "web: Accepted=False RouteReasonConflicted: port 80 has a GRPCRoute, port 8080 has a \
          GRPCRoute, which counts before a HTTPRoute"
        ]
    );
    assert_eq!(complaints(&all, "TCPRoute demo/c").len(), 1);
    // One port: the loser is excluded there only.
    let one = model(&(http.clone() + &grpc("demo", ", port: 80")));
    assert_eq!(parents(&one, "httproute/demo/h"), ["demo/web:8080/"]);
    assert_eq!(parents(&one, "grpcroute/demo/g"), ["demo/web:80/"]);
    assert_eq!(complaints(&one, "HTTPRoute demo/h"), [""; 0]);
    let status = one.statuses.iter().find(|s| s.name == "h").unwrap();
    assert_eq!(
        status.parents[0].conditions[0].message,
        "without these ports: port 80 has a GRPCRoute"
    );
    // A consumer's routes cannot switch off the producer's.
    let consumer = model(&(http + &grpc("other", "")));
    assert_eq!(parents(&consumer, "httproute/demo/h"), ["demo/web:0/"]);
    assert_eq!(parents(&consumer, "grpcroute/other/g"), ["demo/web:0/"]);
}

/// GEP-1364 and the API's BackendRef: what cannot be used keeps its weight and says why.
#[test]
fn backends_that_cannot_be_used_keep_their_share() {
    let cases = [
        ("name: v1, port: 80", "", ""),
        ("name: v2, namespace: other, port: 80", "", ""),
        ("name: headless, port: 80", "", ""),
        (
            "name: gone, port: 80, weight: 0",
            "BackendNotFound",
            "there is no Service demo/gone",
        ),
        (
            "name: v1, port: 81",
            "BackendNotFound",
            "Service demo/v1 has no TCP port 81",
        ),
        (
            "name: alias, port: 80",
            "InvalidKind",
            "Service demo/alias is an ExternalName",
        ),
        (
            "name: x, kind: Bucket, group: s3.example",
            "InvalidKind",
            "Bucket.s3.example x is no",
        ),
        (
            "name: v1, port: 443",
            "UnsupportedProtocol",
            "Service demo/v1 has appProtocol https",
        ),
    ];
    for (backend, reason, message) in cases {
        let model = model(&http(&format!("  - backendRefs: [{{{backend}}}]")));
        let made = &one(&model).rules[0].backends[0];
        assert_eq!(
            made.weight,
            u32::from(!backend.contains("weight")),
            "{backend}"
        );
        assert!(
            made.invalid.starts_with(message),
            "{backend}: {}",
            made.invalid
        );
        assert_eq!(made.invalid.is_empty(), message.is_empty(), "{backend}");
        let complaints = complaints(&model, "HTTPRoute demo/r").join("\n");
        match reason {
            "" => assert_eq!(complaints, "", "{backend}"),
            reason => assert!(
                complaints.starts_with(&format!("web: ResolvedRefs=False {reason}: {message}")),
                "{backend}: {complaints}"
            ),
        }
    }
    // TCP does not care what is spoken.
    let spec = "  parentRefs: [{group: '', kind: Service, name: db, port: 3306}]\n  rules: [{backendRefs: [{name: v1, port: 443}]}]";
    let model = model(&route("TCPRoute", "demo", "t", spec));
    assert_eq!(
        model.routes["tcproute/demo/t"].rules[0].backends[0].invalid,
        ""
    );
    assert_eq!(complaints(&model, "TCPRoute demo/t"), [""; 0]);
}

/// GEP-1911: what the proxies know as HTTP, in any case, can be routed as such.
#[test]
fn backends_and_parents_speak_http() {
    for (port, good) in [(1, true), (2, true), (3, true), (4, true), (5, false)] {
        let spec = format!(
            "  parentRefs: [{{group: '', kind: Service, name: spoken, port: {port}}}]\n  rules: [{{backendRefs: [{{name: v1, port: 80}}]}}]"
        );
        let as_parent = model(&route("HTTPRoute", "demo", "r", &spec));
        let attached = !parents(&as_parent, "httproute/demo/r").is_empty();
        assert_eq!(attached, good, "parent, port {port}");
        let rule = format!("  - backendRefs: [{{name: spoken, port: {port}}}]");
        let as_backend = model(&http(&rule));
        let invalid = &one(&as_backend).rules[0].backends[0].invalid;
        assert_eq!(invalid.is_empty(), good, "backend, port {port}: {invalid}");
    }
}

/// What a proxy would refuse to do is no rule that is accepted.
#[test]
fn headers_that_cannot_be_changed_cost_their_rule() {
    let mut objects = objects(&http(
        "  - backendRefs: [{name: v1, port: 80}]\n    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: é}], remove: [te]}}]",
    ));
    assert_eq!(complaints(&model_of(&objects), "HTTPRoute demo/r"), [""; 0]);
    let key = ("demo".to_owned(), "r".to_owned());
    let route = objects.http_routes.get_mut(&key).unwrap();
    let rule = &mut Arc::make_mut(route).spec.rules.as_mut().unwrap()[0];
    let modifier = rule.filters[0].request_header_modifier.as_mut().unwrap();
    modifier.set[0].name = "Warren-Client-Id".into();
    let model = model_of(&objects);
    assert!(one(&model).rules[0].invalid.starts_with(
        "spec.rules[0].filters[0].requestHeaderModifier.set[0].name: \"Warren-Client-Id\" cannot"
    ));
    assert!(
        complaints(&model, "HTTPRoute demo/r")[0]
            .starts_with("web: Accepted=False UnsupportedValue")
    );
}

/// HTTPRequestMirrorFilter, GEP-3171: a mirror that is not there is left out, its request is not.
#[test]
fn mirrors_that_cannot_be_reached_are_dropped() {
    let rule = |mirror: &str| {
        http(&format!(
            "  - backendRefs: [{{name: v1, port: 80}}]\n    filters: [{{type: RequestMirror, requestMirror: {{{mirror}}}}}]"
        ))
    };
    let gone = model(&rule("backendRef: {name: gone, port: 80}"));
    assert_eq!(one(&gone).rules[0].filters, []);
    assert_eq!(one(&gone).rules[0].invalid, "");
    assert_eq!(
        complaints(&gone, "HTTPRoute demo/r"),
        ["web: ResolvedRefs=False BackendNotFound: there is no Service demo/gone"]
    );
    for (share, expected) in [
        ("", (100, 100)),
        (", percent: 42", (42, 100)),
        (", percent: 0", (0, 100)),
        (", fraction: {numerator: 1, denominator: 3}", (1, 3)),
        (", fraction: {numerator: 5}", (5, 100)),
    ] {
        let model = model(&rule(&format!("backendRef: {{name: v1, port: 80}}{share}")));
        let Some(route_filter::Filter::RequestMirror(mirror)) =
            &one(&model).rules[0].filters[0].filter
        else {
            panic!("{share}");
        };
        assert_eq!((mirror.numerator, mirror.denominator), expected, "{share}");
    }
}

/// The API's "unresolvable ExtensionRef": never skipped; GEP-1364 for the conditions.
#[test]
fn a_rule_that_cannot_be_carried_out_answers_for_itself() {
    let extension =
        "filters: [{type: ExtensionRef, extensionRef: {group: x.example, kind: Wasm, name: w}}]";
    let good = "  - matches: [{path: {value: /good}}]\n    backendRefs: [{name: v1, port: 80}]\n";
    let bad = format!("  - matches: [{{path: {{value: /bad}}}}]\n    {extension}\n");
    let some = model(&http(&format!("{good}{bad}")));
    let rules = &one(&some).rules;
    assert_eq!(rules.len(), 2);
    assert_eq!(rules[0].invalid, "");
    assert_eq!(
        rules[1].invalid,
        "spec.rules[1].filters[0]: there is no Wasm.x.example w"
    );
    assert_eq!(rules[1].matches.len(), 1);
    assert_eq!(
        complaints(&some, "HTTPRoute demo/r"),
        [
            "web: PartiallyInvalid=True UnsupportedValue: Dropped Rule spec.rules[1].filters[0]: \
          there is no Wasm.x.example w"
        ]
    );
    // None left: not accepted, and still not skipped.
    let all = model(&http(&bad));
    assert_eq!(one(&all).rules.len(), 1);
    assert!(
        complaints(&all, "HTTPRoute demo/r")[0].starts_with("web: Accepted=False UnsupportedValue")
    );
    // At a backend it costs the backend's share.
    let share = model(&http(&format!(
        "  - backendRefs: [{{name: v1, port: 80, {extension}}}]"
    )));
    assert_eq!(one(&share).rules[0].invalid, "");
    assert_eq!(
        one(&share).rules[0].backends[0].invalid,
        "there is no Wasm.x.example w"
    );
}

/// What a newer CRD lets pass and a directory would not: it costs what it stands in.
#[test]
fn values_that_are_not_known_cost_their_rule() {
    let text = http(
        "  - matches: [{path: {value: /a}}, {path: {value: /b}}]\n    backendRefs: [{name: v1, port: 80}]\n\
         \x20 - backendRefs: [{name: v1, port: 80}]",
    );
    let mut objects = objects(&text);
    let key = ("demo".to_owned(), "r".to_owned());
    let edit = |objects: &mut Objects,
                change: &dyn Fn(&mut crate::providers::gateway::HttpRouteSpec)| {
        let route = objects.http_routes.get_mut(&key).unwrap();
        change(&mut Arc::make_mut(route).spec);
    };
    edit(&mut objects, &|spec| {
        let rule = &mut spec.rules.as_mut().unwrap()[0];
        rule.matches[0].path.as_mut().unwrap().kind = Some("Glob".into());
    });
    let model = model_of(&objects);
    let rule = &one(&model).rules[0];
    // The match that is understood is answered with 500; the other is nobody's.
    assert_eq!(rule.matches.len(), 1);
    assert_eq!(rule.matches[0].path.as_ref().unwrap().value, "/b");
    assert!(
        rule.invalid
            .starts_with("spec.rules[0].matches[0].path.type: expected Exact")
    );
    // No match is understood: the rule must not catch everything.
    edit(&mut objects, &|spec| {
        let rule = &mut spec.rules.as_mut().unwrap()[0];
        rule.matches[1].method = Some("BREW".into());
    });
    let model = model_of(&objects);
    assert_eq!(one(&model).rules.len(), 1);
    assert!(complaints(&model, "HTTPRoute demo/r")[0].starts_with("web: PartiallyInvalid=True"));
    // A filter that is not known.
    edit(&mut objects, &|spec| {
        let filter = crate::providers::gateway::RouteFilter {
            kind: "Teleport".into(),
            ..Default::default()
        };
        spec.rules.as_mut().unwrap()[1].filters = vec![filter];
    });
    let model = model_of(&objects);
    assert!(one(&model).rules[0].invalid.contains("found \"Teleport\""));
    assert!(complaints(&model, "HTTPRoute demo/r")[0].starts_with("web: Accepted=False Unsupp"));
}

/// The defaults of the API are filled in; of headers of one name the first counts (HTTPRouteMatch).
#[test]
fn defaults_are_filled_in() {
    let model = model(&http(
        "  - matches: [{headers: [{name: Version, value: a}, {name: VERSION, value: b}], queryParams: [{name: Q, value: 'x+', type: RegularExpression}]}, {path: {}}]\n\
         \x20   filters: [{type: RequestRedirect, requestRedirect: {}}]\n\
         \x20   timeouts: {request: 1m, backendRequest: 0s}\n\
         \x20   retry: {codes: [500], attempts: 2, backoff: 100ms}\n\
         \x20   sessionPersistence: {}",
    ));
    let rule = &one(&model).rules[0];
    let headers = &rule.matches[0].headers;
    assert_eq!((headers.len(), &*headers[0].name), (1, "version"));
    assert_eq!(headers[0].value.as_ref().unwrap().value, "a");
    assert_eq!(rule.matches[0].query_params[0].name, "Q");
    assert!(rule.matches[0].path.is_none());
    assert_eq!(rule.matches[1].path.as_ref().unwrap().value, "/");
    assert_eq!(rule.request_timeout_ms, Some(60_000));
    assert_eq!(rule.backend_request_timeout_ms, Some(0), "0s: none");
    let retry = rule.retry.as_ref().unwrap();
    assert_eq!((retry.attempts, retry.backoff_ms), (Some(2), Some(100)));
    assert!(rule.session_persistence.is_some());
    let Some(route_filter::Filter::RequestRedirect(redirect)) = &rule.filters[0].filter else {
        panic!("{rule:?}");
    };
    assert_eq!((redirect.status_code, redirect.port), (302, 0));
    // No rules at all: one that matches everything and has no backend.
    let text = route(
        "HTTPRoute",
        "demo",
        "r",
        "  parentRefs: [{group: '', kind: Service, name: web}]",
    );
    let model = self::model(&text);
    assert_eq!(one(&model).rules, [Default::default()]);
}

/// TLSRoute, TCPRoute and GRPCRoute in their own words.
#[test]
fn the_other_kinds() {
    let parent = "  parentRefs: [{group: '', kind: Service, name: web}]\n";
    let tls = format!(
        "{parent}  hostnames: ['*.a.example', b.example]\n  rules: [{{backendRefs: [{{name: v1, port: 443, weight: 3}}]}}]"
    );
    let model = model(&route("TLSRoute", "demo", "t", &tls));
    let made = &model.routes["tlsroute/demo/t"];
    assert_eq!(made.hostnames, ["*.a.example", "b.example"]);
    assert_eq!(made.rules[0].backends[0].weight, 3);

    let grpc = format!(
        "{parent}  rules:\n  - name: n\n    matches: [{{method: {{service: a.B, method: C}}}}, {{method: {{type: RegularExpression, service: 'x.*'}}}}]\n    \
         backendRefs: [{{name: v1, port: 80}}]"
    );
    let model = self::model(&route("GRPCRoute", "demo", "g", &grpc));
    let rule = &model.routes["grpcroute/demo/g"].rules[0];
    assert_eq!(rule.name, "n");
    assert_eq!(rule.matches[0].grpc_method.as_ref().unwrap().value, "C");
    assert_eq!(rule.matches[1].grpc_method, None);
    assert_eq!(rule.matches[1].grpc_service.as_ref().unwrap().r#type, 2);
}

/// What is taken over is what would be made anew.
#[test]
fn a_model_that_follows_is_the_model_of_its_objects() {
    use crate::model::rebuild;
    let first = objects(&http("  - backendRefs: [{name: v1, port: 80}]"));
    let model = model_of(&first);
    let rebuilt = |objects: &Objects| rebuild(objects, &model.settings, (&first, &model));
    assert_eq!(rebuilt(&first), model);
    let mut without_backend = first.clone();
    without_backend
        .services
        .remove(&("demo".into(), "v1".into()));
    let mut without_route = first.clone();
    without_route.http_routes.clear();
    for changed in [without_backend, without_route] {
        assert_eq!(rebuilt(&changed), model_of(&changed));
        assert_ne!(rebuilt(&changed).statuses, model.statuses);
    }
}
