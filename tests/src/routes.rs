//! Routes of the Gateway API as tables: many cases side by side in one lab, each with a Service of its own
//! as front, all with the same servers behind.

use std::time::Duration;

use serde_json::{Value, json};

use crate::http::{Answer, HTTP, try_curl};
use crate::lab::{Lab, PodRef};
use crate::manifest::{Pod, account, meshed_namespace, service, service_of};
use crate::scenario::{Scenario, scenario};
use crate::wait::wait_until;

/// One row: which rule of which document it shows, the routes, the requests and what must come back.
#[derive(Debug)]
pub struct Case {
    /// Name of the front Service.
    pub name: &'static str,
    /// The GEP or field it shows.
    pub shows: &'static str,
    /// The specs' `rules` of each route attached to the front.
    pub routes: Vec<Value>,
    /// Requests.
    pub probes: Vec<Probe>,
}

/// A request with curl and what must come back.
#[derive(Debug)]
pub struct Probe(
    pub &'static str,
    pub &'static [&'static str],
    pub Vec<Expect>,
);

/// What must come back.
#[derive(Clone, Debug, PartialEq)]
pub enum Expect {
    /// 200 from that server.
    From(&'static str),
    /// That status.
    Status(u16),
    /// A field of the answer; `None`: it is not there.
    Field(&'static str, Option<&'static str>),
    /// The path and query that the server saw.
    Path(&'static str),
    /// A header that the server saw; `None`: it did not.
    Saw(&'static str, Option<&'static str>),
}

impl Expect {
    /// Why the answer is not as expected.
    #[track_caller]
    pub fn check(&self, answer: &Answer) -> Result<(), String> {
        let (wanted, got) = match self {
            Self::From(server) => (
                format!("200 {server}"),
                format!("{} {}", answer.status(), answer.server()),
            ),
            Self::Status(status) => (status.to_string(), answer.status().to_string()),
            Self::Field(name, value) => (
                format!("{value:?}"),
                format!("{:?}", answer.field(name).as_deref()),
            ),
            _ if answer.server().is_empty() => {
                ("an answer of a server".into(), format!("{answer:?}"))
            }
            Self::Path(path) => (format!("{path:?}"), answer.seen()["path"].to_string()),
            Self::Saw(name, value) => (
                format!("{value:?}"),
                format!("{:?}", answer.seen_header(name).as_deref()),
            ),
        };
        if wanted == got {
            Ok(())
        } else {
            Err(format!("{self:?}, got {got}"))
        }
    }
}

/// The front Services of all cases, port 80 and 8080.
pub fn fronts(namespace: &str, cases: &[Case], backend: &str) -> Vec<Value> {
    cases
        .iter()
        .map(|case| front(namespace, case.name, backend))
        .collect()
}

/// A Service of another Service's pods, port 80 and 8080.
pub fn front(namespace: &str, name: &str, backend: &str) -> Value {
    let mut front = service(namespace, name, &[(80, HTTP), (8080, HTTP)]);
    front["spec"]["selector"] = json!({"app": backend});
    front
}

/// An HTTPRoute of a Service of its own namespace. One more rule, for a path that nothing else uses, tells
/// when a node has it: see [`wait_for_route`].
pub fn http_route(namespace: &str, name: &str, service: &str, rules: &Value) -> Value {
    let parent = json!({"group": "", "kind": "Service", "name": service});
    http_route_of(namespace, name, &parent, rules)
}

/// [`http_route`] with a `parentRef` of its own.
pub fn http_route_of(namespace: &str, name: &str, parent: &Value, rules: &Value) -> Value {
    let mut all = rules.as_array().cloned().unwrap_or_default();
    all.push(json!({
        "matches": [{"path": {"type": "Exact", "value": format!("/is-there/{name}")}}],
        "filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": name, "statusCode": 302}}],
    }));
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"parentRefs": [parent], "rules": all},
    })
}

/// Waits until a node's proxy goes by a route of [`http_route`].
#[track_caller]
pub fn wait_for_route(lab: &Lab, pod: PodRef<'_>, authority: &str, route: &str) {
    let url = format!("http://{authority}/is-there/{route}");
    wait_until(
        &format!("route {route} at {authority}"),
        Duration::from_secs(15),
        || {
            let answer = try_curl(lab, pod, &[&url])?;
            let there = answer.status() == 302;
            if there {
                Ok(())
            } else {
                Err(format!("{answer:?}"))
            }
        },
    );
}

/// Applies the routes of all cases and sends their requests from `pod`. Panics with all that is wrong.
#[track_caller]
pub fn check_cases(lab: &Lab, pod: PodRef<'_>, cases: &[Case]) {
    let route = |case: &Case, at: usize| format!("{}-{at}", case.name);
    let mut manifests = Vec::new();
    for case in cases {
        for (at, rules) in case.routes.iter().enumerate() {
            let mut manifest = http_route(pod.0, &route(case, at), case.name, &rules["rules"]);
            for (key, value) in rules.as_object().into_iter().flatten() {
                match key.as_str() {
                    "created" => manifest["metadata"]["creationTimestamp"] = value.clone(),
                    "hostnames" => manifest["spec"]["hostnames"] = value.clone(),
                    _ => {}
                }
            }
            manifests.push(manifest);
        }
    }
    lab.apply(&manifests).expect_ok();
    let mut wrong = Vec::new();
    for case in cases {
        for at in 0..case.routes.len() {
            wait_for_route(lab, pod, case.name, &route(case, at));
        }
        for Probe(path, args, expected) in &case.probes {
            let url = if let Some(path) = path.strip_prefix(':') {
                format!("http://{}:{path}", case.name)
            } else {
                format!("http://{}{path}", case.name)
            };
            let answer = try_curl(lab, pod, &[&["--path-as-is", &url], *args].concat());
            for expect in expected {
                let checked = answer
                    .as_ref()
                    .map_err(Clone::clone)
                    .and_then(|a| expect.check(a));
                if let Err(why) = checked {
                    wrong.push(format!(
                        "{} ({}): {url} {args:?}: {why}",
                        case.name, case.shows
                    ));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// The client of the labs below.
pub const CLIENT: PodRef<'_> = ("demo", "client");

/// A client and the server `v1` on node 1, the server `v2` on node 2; fronts lead to `v2` unless routed.
pub fn check(cases: &[Case]) {
    scenario(Duration::from_secs(150), |s| {
        let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        for (name, node) in [("v1", "node-1"), ("v2", "node-2")] {
            manifests.push(account("demo", name));
            manifests.push(Pod::http("demo", name, node).build());
            manifests.push(service("demo", name, &[(80, 8080)]));
        }
        manifests.extend(fronts("demo", cases, "v2"));
        let lab = s.lab(2, &manifests);
        check_cases(&lab, CLIENT, cases);
    });
}

/// Clients in `demo` and `consumer` on node 1, the servers `v1` (node 1) and `v2` (node 2) and their
/// Services; fronts of `v2`'s pods; the Service `hollow` without endpoints.
pub fn routed_lab(s: &Scenario, names: &[&str]) -> Lab {
    let mut manifests = Vec::new();
    for namespace in ["demo", "consumer"] {
        manifests.extend([meshed_namespace(namespace), account(namespace, "client")]);
        manifests.push(Pod::idle(namespace, "client", "node-1"));
    }
    for (name, node) in [("v1", "node-1"), ("v2", "node-2")] {
        manifests.push(account("demo", name));
        manifests.push(Pod::http("demo", name, node).build());
        manifests.push(service("demo", name, &[(80, HTTP)]));
    }
    manifests.push(service("demo", "hollow", &[(80, HTTP)]));
    manifests.push(service_of(
        "demo",
        "postgres",
        &[(80, HTTP, Some("postgres"))],
    ));
    manifests.extend(names.iter().map(|name| front("demo", name, "v2")));
    s.lab(2, &manifests)
}

/// A match by path.
pub fn path(kind: &str, value: &str) -> Value {
    json!({"path": {"type": kind, "value": value}})
}

/// Applies one route of a front and waits until the client's node goes by it.
#[track_caller]
pub fn routed(lab: &Lab, name: &str, rules: Value) {
    lab.apply(&[http_route("demo", name, name, &rules)])
        .expect_ok();
    wait_for_route(lab, CLIENT, name, name);
}

/// A backend, port 80.
pub fn to(backend: &str) -> Value {
    json!([{"name": backend, "port": 80}])
}

/// A rule: matches, backend.
pub fn rule(matches: Value, backend: &str) -> Value {
    json!({"matches": matches, "backendRefs": to(backend)})
}

/// A match by headers.
pub fn headers(pairs: &[(&str, &str)]) -> Value {
    let all: Vec<Value> = pairs
        .iter()
        .map(|(n, v)| json!({"name": n, "value": v}))
        .collect();
    json!({"headers": all})
}

/// A match by query parameters.
pub fn queries(pairs: &[(&str, &str)]) -> Value {
    let all: Vec<Value> = pairs
        .iter()
        .map(|(n, v)| json!({"name": n, "value": v}))
        .collect();
    json!({"queryParams": all})
}

/// Both objects' keys.
pub fn and(mut one: Value, other: &Value) -> Value {
    for (key, value) in other.as_object().into_iter().flatten() {
        one[key] = value.clone();
    }
    one
}

/// A request with one expectation.
pub fn probe(path: &'static str, args: &'static [&'static str], expect: Expect) -> Probe {
    Probe(path, args, vec![expect])
}
