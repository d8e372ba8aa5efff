use mesh_api::proto::mesh::{Mode, PolicyTargetKind};

use crate::model::{Model, Settings, build};
use crate::providers::directory::Reader;
use crate::watch::Changes;

const OBJECTS: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: demo}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}, {name: alt, port: 81}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: demo}
spec:
  parentRefs: [{group: '', kind: Service, name: web}]
  rules:
  - name: slow
    timeouts: {request: 10s}
    retry: {codes: [500]}
    backendRefs: [{name: web, port: 80}]
  - name: plain
    backendRefs: [{name: web, port: 80}]
---
"#;

fn model(manifests: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("m.yaml"), format!("{OBJECTS}{manifests}")).unwrap();
    let mut reader = Reader::new(dir.path());
    let objects = reader.read(&Changes::Unknown).unwrap();
    assert_eq!(reader.mistakes(), [], "{manifests}");
    let settings = Settings {
        trust_domain: "cluster.local".into(),
        mode: Mode::Permissive,
    };
    build(&objects, &settings)
}

fn policy(name: &str, created: u32, spec: &str) -> String {
    format!(
        "apiVersion: warren-mesh.io/v1alpha1\nkind: TrafficPolicy\n\
         metadata: {{name: {name}, namespace: demo, creationTimestamp: '2026-01-01T00:00:{created:02}Z'}}\n\
         spec: {{{spec}}}\n---\n"
    )
}

/// Each target's conditions as `Type=Status Reason: message`.
fn conditions(model: &Model, kind: &str, name: &str) -> Vec<String> {
    let statuses = model
        .statuses
        .iter()
        .filter(|s| s.kind == kind && s.name == name);
    statuses
        .flat_map(|s| &s.parents)
        .flat_map(|p| &p.conditions)
        .map(|c| format!("{}={} {}: {}", c.kind, c.status, c.reason, c.message))
        .collect()
}

const WEB: &str = "{kind: Service, name: web}";

#[test]
fn targets_must_be_there() {
    let route = "group: gateway.networking.k8s.io, kind: HTTPRoute";
    let cases = [
        (WEB.to_owned(), ""),
        (
            "{kind: Service, name: web, sectionName: alt}".to_owned(),
            "",
        ),
        (format!("{{{route}, name: r, sectionName: plain}}"), ""),
        (
            "{kind: Service, name: gone}".into(),
            "there is no Service demo/gone",
        ),
        (
            "{kind: Service, name: web, sectionName: x}".into(),
            "Service demo/web has no port named x",
        ),
        (
            format!("{{{route}, name: r, sectionName: x}}"),
            "HTTPRoute demo/r has no rule named x",
        ),
    ];
    for (target, message) in cases {
        let model = model(&policy(
            "p",
            1,
            &format!("targetRefs: [{target}], timeouts: {{idle: 1m}}"),
        ));
        let expected = match message {
            "" => "Accepted=True Accepted: ".to_owned(),
            message => format!("Accepted=False TargetNotFound: {message}"),
        };
        assert_eq!(
            conditions(&model, "TrafficPolicy", "p"),
            [expected],
            "{target}"
        );
        assert_eq!(
            model.traffic_policies.len(),
            usize::from(message.is_empty()),
            "{target}"
        );
    }
}

/// GEP-713: the older counts, then the first by name; for the fields that both set.
#[test]
fn of_two_policies_the_older_counts() {
    let a = policy(
        "a",
        2,
        &format!("targetRefs: [{WEB}], timeouts: {{idle: 1m, connect: 1s}}"),
    );
    let b = policy(
        "b",
        1,
        &format!("targetRefs: [{WEB}], timeouts: {{idle: 2m}}"),
    );
    let c = policy(
        "c",
        2,
        &format!("targetRefs: [{WEB}], timeouts: {{connect: 2s}}"),
    );
    let port = policy(
        "d",
        3,
        "targetRefs: [{kind: Service, name: web, sectionName: alt}], timeouts: {idle: 3m}",
    );
    let model = model(&(a + &b + &c + &port));
    assert_eq!(
        conditions(&model, "TrafficPolicy", "a"),
        [
            "Accepted=True Accepted: ",
            "Conflicted=True Conflicted: timeouts.idle is ignored: TrafficPolicy demo/b is older and sets it too",
        ]
    );
    assert_eq!(
        conditions(&model, "TrafficPolicy", "b"),
        ["Accepted=True Accepted: "]
    );
    assert_eq!(
        conditions(&model, "TrafficPolicy", "c")[0],
        "Accepted=False Conflicted: timeouts.connect is ignored: TrafficPolicy demo/a is older and sets it too"
    );
    // A port is narrower than its Service: no conflict.
    assert_eq!(
        conditions(&model, "TrafficPolicy", "d"),
        ["Accepted=True Accepted: "]
    );
}

/// The field of the Gateway API counts where it is set (GEP-1742, GEP-1731, GEP-3388).
#[test]
fn fields_of_the_gateway_api_count() {
    let rule = |section: &str| {
        format!(
            "targetRefs: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r{section}}}], timeouts: {{request: 1s, idle: 1m}}"
        )
    };
    let of_route = model(&policy("p", 1, &rule("")));
    assert_eq!(
        conditions(&of_route, "TrafficPolicy", "p")[1],
        "Conflicted=True Conflicted: timeouts.request is ignored: spec.rules[0].timeouts.request of the route is set"
    );
    let of_other_rule = model(&policy("p", 1, &rule(", sectionName: plain")));
    assert_eq!(conditions(&of_other_rule, "TrafficPolicy", "p").len(), 1);
    let of_service = model(&policy(
        "p",
        1,
        &format!("targetRefs: [{WEB}], retry: {{statusCodes: [503]}}"),
    ));
    assert_eq!(
        conditions(&of_service, "TrafficPolicy", "p")[0],
        "Accepted=False Conflicted: retry.statusCodes is ignored: spec.rules[0].retry.codes of HTTPRoute demo/r is set"
    );
    // No field of the same name: that the stanza is there is enough.
    let conditions_only = "retry: {conditions: [ConnectFailure]}";
    let of_service = model(&policy(
        "p",
        1,
        &format!("targetRefs: [{WEB}], {conditions_only}"),
    ));
    assert_eq!(
        conditions(&of_service, "TrafficPolicy", "p")[0],
        "Accepted=False Conflicted: retry.conditions is ignored: spec.rules[0].retry of HTTPRoute demo/r is set"
    );
    for (rule, ignored) in [("slow", true), ("plain", false)] {
        let target = format!(
            "{{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r, sectionName: {rule}}}"
        );
        let of_rule = model(&policy(
            "p",
            1,
            &format!("targetRefs: [{target}], {conditions_only}"),
        ));
        let expected = match ignored {
            true => {
                "Accepted=False Conflicted: retry.conditions is ignored: spec.rules[0].retry of the route is set"
            }
            false => "Accepted=True Accepted: ",
        };
        assert_eq!(
            conditions(&of_rule, "TrafficPolicy", "p")[0],
            expected,
            "{rule}"
        );
    }
    let backend = "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\n\
                   metadata: {name: x, namespace: demo}\nspec: {targetRefs: [{group: '', kind: Service, name: web}], retryConstraint: {}}\n";
    let budget = policy(
        "p",
        1,
        &format!("targetRefs: [{WEB}], retry: {{budget: {{percent: 10}}}}"),
    );
    let both = model(&(budget + backend));
    assert!(
        conditions(&both, "TrafficPolicy", "p")[0]
            .ends_with("retryConstraint of XBackendTrafficPolicy demo/x is set")
    );
}

/// GEP-3388: defaults, and one policy for a Service.
#[test]
fn backend_traffic_policies() {
    let policy = |name: &str, target: &str, spec: &str| {
        format!(
            "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\n\
             metadata: {{name: {name}, namespace: demo}}\nspec: {{targetRefs: [{{group: '', kind: Service, name: {target}}}]{spec}}}\n---\n"
        )
    };
    let model = model(
        &(policy("a", "web", ", retryConstraint: {budget: {percent: 5}}")
            + &policy("b", "web", "")
            + &policy("c", "gone", "")),
    );
    assert_eq!(model.backend_traffic_policies.len(), 1);
    let made = &model.backend_traffic_policies["demo/a"];
    assert_eq!(made.services, ["web"]);
    let constraint = made.retry_constraint.as_ref().unwrap();
    assert_eq!(
        (constraint.budget_percent, constraint.budget_interval_ms),
        (5, 10_000)
    );
    assert_eq!(
        (constraint.min_retry_count, constraint.min_retry_interval_ms),
        (10, 1_000)
    );
    assert_eq!(
        conditions(&model, "XBackendTrafficPolicy", "b"),
        ["Accepted=False Conflicted: XBackendTrafficPolicy demo/a is older and counts"]
    );
    assert_eq!(
        conditions(&model, "XBackendTrafficPolicy", "c"),
        ["Accepted=False TargetNotFound: there is no Service demo/gone"]
    );
}

/// Every field once: what users write, and what proxies are sent.
#[test]
fn every_field_arrives() {
    let text = include_str!("../../../../docs/reference/traffic-policy.md");
    let (_, rest) = text.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let model = model(&format!("{example}\n"));
    let made = &model.traffic_policies["demo/web"];
    assert_eq!(made.targets[0].kind(), PolicyTargetKind::Service);
    assert_eq!(made.targets[0].section_name, "http");
    let balancing = made.load_balancing.as_ref().unwrap();
    assert_eq!((balancing.r#type, balancing.hash_key), (3, 1));
    assert_eq!(
        (&*balancing.hash_name, balancing.slow_start_ms),
        ("x-user", Some(30_000))
    );
    let retry = made.retry.as_ref().unwrap();
    assert_eq!(retry.attempts, Some(2));
    assert_eq!(retry.conditions, [1, 2, 3]);
    assert_eq!(
        (&retry.status_codes[..], &retry.grpc_codes[..]),
        (&[502, 503][..], &[14][..])
    );
    assert_eq!(
        (retry.backoff_base_ms, retry.backoff_max_ms),
        (Some(25), Some(1_000))
    );
    assert_eq!(retry.max_body_bytes, Some(65_536));
    let budget = retry.budget.as_ref().unwrap();
    assert_eq!(
        (budget.percent, budget.min_per_second, budget.interval_ms),
        (Some(20), Some(10), Some(10_000))
    );
    let timeouts = made.timeouts.as_ref().unwrap();
    assert_eq!(
        (timeouts.request_ms, timeouts.per_try_ms),
        (Some(10_000), Some(2_000))
    );
    assert_eq!(
        (timeouts.response_headers_ms, timeouts.idle_ms),
        (Some(5_000), Some(300_000))
    );
    assert_eq!(timeouts.connect_ms, Some(1_000));
    let breaking = made.circuit_breaking.as_ref().unwrap();
    assert_eq!(
        (breaking.consecutive_failures, breaking.min_success_percent),
        (Some(5), Some(80))
    );
    assert_eq!(
        (breaking.min_requests, breaking.window_ms),
        (Some(20), Some(10_000))
    );
    assert_eq!(
        (breaking.base_ejection_ms, breaking.max_ejection_ms),
        (Some(1_000), Some(60_000))
    );
    assert_eq!(breaking.max_ejected_percent, Some(50));
    let limits = made.limits.as_ref().unwrap();
    assert_eq!(
        (
            limits.max_in_flight,
            limits.max_pending,
            limits.pending_timeout_ms
        ),
        (Some(500), Some(100), Some(100))
    );
    let rates = made.rate_limit.as_ref().unwrap();
    let total = rates.total.as_ref().unwrap();
    assert_eq!(
        (total.requests, total.interval_ms, total.burst),
        (1_000, 1_000, 200)
    );
    let per_caller = rates.per_caller.as_ref().unwrap();
    assert_eq!(
        (per_caller.requests, per_caller.burst),
        (100, 100),
        "burst as requests"
    );
    assert_eq!(
        (
            &*rates.overrides[0].namespace,
            &*rates.overrides[0].service_account
        ),
        ("batch", "importer")
    );
    let fault = made.fault.as_ref().unwrap();
    assert_eq!((fault.delay_share, fault.delay_ms), (500, 100));
    assert_eq!(
        (fault.abort_share, fault.abort_status, fault.abort_grpc_code),
        (10, 503, Some(14))
    );
}

/// The CRD and the example know the same fields: neither may be changed alone.
#[test]
fn the_crd_has_every_field_of_the_example() {
    type Json = serde_json::Value;
    fn compare(schema: &Json, example: &Json, at: &str, differences: &mut Vec<String>) {
        if let Some(items) = schema.get("items") {
            return compare(items, &example[0], &format!("{at}[]"), differences);
        }
        let Some(properties) = schema["properties"].as_object() else {
            return;
        };
        for key in example.as_object().into_iter().flat_map(|o| o.keys()) {
            if !properties.contains_key(key) {
                differences.push(format!("{at}.{key} is not in the CRD"));
            }
        }
        for (key, inner) in properties {
            match example.get(key) {
                Some(value) => compare(inner, value, &format!("{at}.{key}"), differences),
                None => differences.push(format!("{at}.{key}")),
            }
        }
    }
    let crd = include_str!("../../../../deploy/crds/trafficpolicies.warren-mesh.io.yaml");
    let crd: Json = serde_norway::from_str(crd).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let text = include_str!("../../../../docs/reference/traffic-policy.md");
    let (_, rest) = text.split_once("```yaml\n").unwrap();
    let example: Json = serde_norway::from_str(rest.split_once("```").unwrap().0).unwrap();
    let mut differences = Vec::new();
    compare(schema, &example["spec"], "spec", &mut differences);
    differences.sort();
    // What the example leaves to its default, or cannot have beside another field.
    assert_eq!(
        differences,
        [
            "spec.faultInjection.abort.percent",
            "spec.faultInjection.delay.fraction",
            "spec.rateLimit.perCaller.burst",
            "spec.rateLimit.perCaller.interval",
            "spec.targetRefs[].group",
        ]
    );
}
