#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::cluster::metrics::Metrics;

fn object<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// A PEM root that is valid for so many days from now.
fn root(days: i64) -> String {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    parameters.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(days);
    let key = rcgen::KeyPair::generate().unwrap();
    parameters.self_signed(&key).unwrap().pem()
}

fn bundle(days: i64) -> Value {
    json!({"metadata": {"name": "warren-trust-bundle"}, "data": {"bundle.pem": root(days)}})
}

fn node(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
            "nodeInfo": {
                "operatingSystem": "linux", "kernelVersion": "6.1.0-13-amd64",
                "containerRuntimeVersion": "containerd://1.7.2", "architecture": "amd64", "bootID": "", "kernelVersion": "6.1.0",
                "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "osImage": "", "systemUUID": "",
            },
        },
    })
}

fn part(part: &str, node: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "warren-system", "name": format!("{part}-{node}"),
            "labels": {"app.kubernetes.io/name": part, "app.kubernetes.io/version": "0.1.0"},
        },
        "spec": {"nodeName": node, "containers": []},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{
                "name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": {"running": {}},
            }],
        },
    })
}

fn app(name: &str) -> Value {
    json!({
        "metadata": {"namespace": "demo", "name": name, "labels": {"app": name}},
        "spec": {"nodeName": "a", "containers": [{"name": "c", "ports": [{"containerPort": 80}]}]},
        "status": {"phase": "Running"},
    })
}

fn daemon_set(name: &str) -> (String, k8s_openapi::api::apps::v1::DaemonSet) {
    let set = json!({
        "metadata": {"name": name},
        "spec": {
            "selector": {},
            "template": {"spec": {"containers": [], "nodeSelector": {"kubernetes.io/os": "linux"}}},
        },
    });
    (name.to_owned(), object(set))
}

/// Two nodes, one app in the mesh, nothing wrong.
fn healthy() -> Facts {
    let now = Timestamp::now();
    let status = json!({
        "problems": [], "controllerConnected": true, "unsettled": [], "pods": {"direct": 1, "enrolled": 1, "leaving": 0},
    });
    let handshakes =
        Metrics::parse("warren_tunnel_handshakes_total{side=\"client\",result=\"ok\"} 3\n");
    let parts = ["warren-cni", "warren-node-proxy"];
    let mut pods = vec![object(part("warren-controller", "a")), object(app("web"))];
    pods.extend(
        ["a", "b"]
            .iter()
            .flat_map(|node| parts.map(|name| object(part(name, node)))),
    );
    Facts {
        now,
        version: (1, 36),
        nodes: vec![object(node("a")), object(node("b"))],
        namespaces: vec![
            object(json!({"metadata": {"name": "warren-system"}})),
            object(
                json!({"metadata": {"name": "demo", "labels": {"warren-mesh.io/mesh": "enabled"}}}),
            ),
        ],
        pods,
        policies: vec![object(json!({
            "metadata": {"namespace": "demo", "name": "open"}, "spec": {"podSelector": {}, "ingress": [{}]},
        }))],
        crds: vec![
            object(crd("trafficpolicies.warren-mesh.io", "")),
            object(crd("httproutes.gateway.networking.k8s.io", "v1.6.1")),
        ],
        admission: Some(object(json!({"spec": {}}))),
        admission_binding: Some(object(json!({"spec": {"validationActions": ["Deny"]}}))),
        cilium: None,
        trust_bundle: Some(object(bundle(365))),
        lease: Some(object(json!({"spec": {
            "holderIdentity": "c", "leaseDurationSeconds": 15, "renewTime": now.to_string(),
        }}))),
        controller: Some(object(
            json!({"spec": {"replicas": 1, "selector": {}, "template": {}}, "status": {"readyReplicas": 1}}),
        )),
        daemon_sets: parts.map(daemon_set).into(),
        forbidden: Vec::new(),
        agents: ["a", "b"]
            .map(|node| (node.to_owned(), Ok(status.clone())))
            .into(),
        proxies: ["a", "b"]
            .map(|node| (node.to_owned(), Ok(handshakes.clone())))
            .into(),
        status: Some(json!({"mistakes": []})),
    }
}

fn crd(name: &str, version: &str) -> Value {
    json!({
        "metadata": {"name": name, "annotations": {"gateway.networking.k8s.io/bundle-version": version}},
        "spec": {"group": "", "names": {"kind": "", "plural": ""}, "scope": "", "versions": []},
    })
}

fn agent_says(facts: &mut Facts, field: &str, value: Value) {
    facts.agents.get_mut("b").unwrap().as_mut().unwrap()[field] = value;
}

fn namespace(labels: Value) -> k8s_openapi::api::core::v1::Namespace {
    object(json!({"metadata": {"name": "other", "labels": labels}}))
}

fn cilium(data: Value) -> Option<k8s_openapi::api::core::v1::ConfigMap> {
    Some(object(json!({"data": data})))
}

fn handshake(result: &str) -> Result<Metrics, String> {
    let text = format!("warren_tunnel_handshakes_total{{side=\"client\",result=\"{result}\"}} 2\n");
    Ok(Metrics::parse(&text))
}

type Fault = fn(&mut Facts);

/// The check that is to name it, what its message is to hold, and the fault.
const FAULTS: &[(&str, &str, Fault)] = &[
    ("kubernetes-version", "1.30", |f| f.version = (1, 30)),
    ("permissions", "daemonsets", |f| {
        f.forbidden.push("create daemonsets".into())
    }),
    ("node-kernel", "a: 4.19.0", |f| {
        f.nodes[0]
            .status
            .as_mut()
            .unwrap()
            .node_info
            .as_mut()
            .unwrap()
            .kernel_version = "4.19.0".into();
    }),
    ("node-runtime", "b: docker://20.1", |f| {
        let status = f.nodes[1].status.as_mut().unwrap();
        status.node_info.as_mut().unwrap().container_runtime_version = "docker://20.1".into();
    }),
    ("node-address", "b", |f| {
        f.nodes[1].status.as_mut().unwrap().addresses = None
    }),
    ("port-15008", "demo/hostile", |f| {
        let mut pod = app("hostile");
        pod["spec"]["containers"][0]["ports"][0] = json!({"containerPort": 80, "hostPort": 15008});
        f.pods.push(object(pod));
    }),
    ("cilium-socket-lb", "hostns-only", |f| {
        f.cilium = cilium(json!({"kube-proxy-replacement": "true", "cni-exclusive": "false"}));
    }),
    ("cilium-exclusive", "cni-exclusive", |f| {
        f.cilium = cilium(json!({"cni-exclusive": "true"}));
    }),
    ("gateway-api", "not there", |f| {
        f.crds.retain(|crd| facts::name(crd).contains("warren"))
    }),
    ("gateway-api", "v1.2.0", |f| {
        f.crds[1] = object(crd("httproutes.gateway.networking.k8s.io", "v1.2.0"))
    }),
    ("pod-security", "restricted", |f| {
        f.namespaces[0] = object(json!({"metadata": {
            "name": "warren-system", "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        }}));
    }),
    (
        "label-values",
        "namespace other: warren-mesh.io/mesh=true",
        |f| {
            f.namespaces
                .push(namespace(json!({"warren-mesh.io/mesh": "true"})));
        },
    ),
    ("label-values", "warren-mesh.io/mode=STRICT", |f| {
        f.namespaces
            .push(namespace(json!({"warren-mesh.io/mode": "STRICT"})));
    }),
    ("other-mesh", "namespace other: istio-injection", |f| {
        let labels = json!({"warren-mesh.io/mesh": "enabled", "istio-injection": "enabled"});
        f.namespaces.push(namespace(labels));
    }),
    ("host-network-pods", "demo/host", |f| {
        let mut pod = app("host");
        pod["spec"]["hostNetwork"] = true.into();
        f.pods.push(object(pod));
    }),
    (
        "network-policies",
        "demo/deny: ingress of 1 pods: web",
        |f| {
            f.policies.push(object(json!({
            "metadata": {"namespace": "demo", "name": "deny"},
            "spec": {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}},
        })));
        },
    ),
    ("crds", "trafficpolicies", |f| {
        f.crds.retain(|crd| !facts::name(crd).contains("warren"))
    }),
    ("admission-policy", "no ValidatingAdmissionPolicy ", |f| {
        f.admission = None
    }),
    ("admission-policy", "PolicyBinding", |f| {
        f.admission_binding = None
    }),
    ("admission-policy", "does not say Deny", |f| {
        f.admission_binding = Some(object(json!({"spec": {"validationActions": ["Audit"]}})));
    }),
    ("admission-policy", "spec.matchConditions[0]", |f| {
        f.admission = Some(object(
            json!({"spec": {}, "status": {"typeChecking": {"expressionWarnings": [
                {"fieldRef": "spec.matchConditions[0].expression", "warning": "undefined field"},
            ]}}}),
        ));
    }),
    ("controller-ready", "none of 1", |f| {
        f.controller
            .as_mut()
            .unwrap()
            .status
            .as_mut()
            .unwrap()
            .ready_replicas = None;
    }),
    ("controller-leader", "renewed the Lease", |f| {
        let spec = f.lease.as_mut().unwrap().spec.as_mut().unwrap();
        spec.renew_time.as_mut().unwrap().0 =
            Timestamp::from_second(f.now.as_second() - 300).unwrap();
    }),
    ("controller-leader", "no Lease", |f| f.lease = None),
    ("trust-bundle", "no key", |f| {
        f.trust_bundle.as_mut().unwrap().data = None
    }),
    ("root-expiry", "it ends in", |f| {
        f.trust_bundle = Some(object(bundle(30)))
    }),
    ("agents", "b", |f| {
        f.pods.retain(|pod| facts::name(pod) != "warren-cni-b")
    }),
    ("node-proxies", "ImagePullBackOff", |f| {
        let mut pod = part("warren-node-proxy", "b");
        pod["status"]["conditions"][0]["status"] = "False".into();
        pod["status"]["containerStatuses"][0]["state"] =
            json!({"waiting": {"reason": "ImagePullBackOff"}});
        f.pods
            .retain(|pod| facts::name(pod) != "warren-node-proxy-b");
        f.pods.push(object(pod));
    }),
    ("agent-status", "b: no network configuration", |f| {
        agent_says(
            f,
            "problems",
            json!(["no network configuration in /etc/cni/net.d yet"]),
        );
    }),
    ("agent-controller", "b: not connected", |f| {
        agent_says(f, "controllerConnected", json!(false))
    }),
    ("pods-enrolled", "b: demo/web: port 15001", |f| {
        let pod = json!({"namespace": "demo", "name": "web", "failed": true, "reason": "port 15001 is taken"});
        agent_says(f, "unsettled", json!([pod]));
    }),
    (
        "node-to-node",
        "a: 2 of side client: connect_timeout",
        |f| {
            f.proxies.insert("a".into(), handshake("connect_timeout"));
        },
    ),
    ("handshakes", "peer_unknown_ca", |f| {
        f.proxies.insert("a".into(), handshake("peer_unknown_ca"));
    }),
    ("node-taints", "b", |f| {
        let mut tainted = node("b");
        tainted["spec"]["taints"] =
            json!([{"key": "warren-mesh.io/not-ready", "effect": "NoSchedule"}]);
        f.nodes[1] = object(tainted);
    }),
    ("mistakes", "HTTPRoute demo/web", |f| {
        f.status = Some(json!({"mistakes": ["HTTPRoute demo/web: x"]}))
    }),
    ("mistakes", "no controller answers", |f| f.status = None),
    (
        "routes-and-policies",
        "HTTPRoute demo/r: BackendNotFound: no Service x",
        |f| {
            let conditions = json!([
                {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""},
                {"type": "ResolvedRefs", "status": "False", "reason": "BackendNotFound", "message": "no Service x"},
            ]);
            let route = json!({"kind": "HTTPRoute", "namespace": "demo", "name": "r", "parents": [{"conditions": conditions}]});
            f.status = Some(json!({"mistakes": [], "routes": [route]}));
        },
    ),
    (
        "routes-and-policies",
        "TrafficPolicy demo/p: Conflicted",
        |f| {
            let conditions = json!([{"type": "Conflicted", "status": "True", "reason": "Conflicted", "message": "with demo/o"}]);
            let policy = json!({"kind": "TrafficPolicy", "namespace": "demo", "name": "p", "parents": [{"conditions": conditions}]});
            f.status = Some(json!({"mistakes": [], "policies": [policy]}));
        },
    ),
    ("versions", "warren-cni: 0.2.0", |f| {
        let mut pod = part("warren-cni", "b");
        pod["metadata"]["labels"]["app.kubernetes.io/version"] = "0.2.0".into();
        pod["metadata"]["name"] = "new".into();
        f.pods.push(object(pod));
    }),
    ("mesh-switch", "disabled", |f| {
        f.namespaces[0] = object(json!({"metadata": {
            "name": "warren-system", "labels": {"warren-mesh.io/mesh": "disabled"},
        }}));
    }),
];

fn named(facts: &Facts) -> Vec<(&'static str, String)> {
    let found = results(facts, false)
        .into_iter()
        .filter(|outcome| outcome.result != "ok");
    found.map(|outcome| (outcome.id, outcome.message)).collect()
}

#[test]
fn nothing_is_wrong_with_a_healthy_mesh() {
    assert_eq!(named(&healthy()), []);
}

#[test]
fn each_fault_is_found_by_its_name_and_by_no_other() {
    for (id, says, fault) in FAULTS {
        let mut facts = healthy();
        fault(&mut facts);
        let found = named(&facts);
        assert!(
            matches!(&found[..], [(name, message)] if name == id && message.contains(says)),
            "planted {id} ({says}), found {found:?}"
        );
    }
}

#[test]
fn every_check_is_tried_and_explained() {
    let page = include_str!("../../../../docs/reference/check.md");
    let explained: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    let ids: Vec<&str> = checks(false).map(|check| check.id).collect();
    assert_eq!(explained, ids, "docs/reference/check.md");
    let planted: BTreeSet<&str> = FAULTS.iter().map(|(id, ..)| *id).collect();
    assert_eq!(planted, ids.iter().copied().collect());
}

#[test]
fn before_the_installation_only_prerequisites_are_asked() {
    let mut facts = healthy();
    facts.controller = None;
    facts.daemon_sets.clear();
    facts.cilium = cilium(json!({}));
    let results = results(&facts, true);
    let failed: Vec<_> = results.iter().filter(|o| o.result != "ok").collect();
    assert_eq!(
        failed.iter().map(|o| o.id).collect::<Vec<_>>(),
        ["cilium-exclusive"]
    );
    assert!(!failed[0].hint.is_empty());
    assert!(text(&results).ends_with("1 failed, 0 unknown\n"));
}
