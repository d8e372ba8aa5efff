//! What a cluster must be like, with Warren or before it is there.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use mesh_api::names::{MESH_LABEL, MODE_LABEL, SYSTEM_NAMESPACE, TUNNEL_PORT};
use warren_controller::providers::kubernetes::network::{Refuses, selects};

use super::facts::{Facts, full_name, label, name, phase};
use super::{Check, Finding};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "kubernetes-version",
        expects: "the API server is Kubernetes 1.31 or newer",
        hint: "upgrade the cluster",
        look: kubernetes_version,
    },
    Check {
        id: "permissions",
        expects: "you may create what is installed",
        hint: "install as a cluster administrator",
        look: |facts| Finding::failed_for(facts.forbidden.clone()),
    },
    Check {
        id: "node-kernel",
        expects: "nodes run Linux 5.10 or newer",
        hint: "upgrade the nodes, or keep pods that are to be in the mesh off them",
        look: node_kernel,
    },
    Check {
        id: "node-runtime",
        expects: "nodes run containerd 1.6 or newer, or CRI-O",
        hint: "other runtimes are not tried; upgrade it, or watch pods of these nodes start",
        look: node_runtime,
    },
    Check {
        id: "node-address",
        expects: "every node has an InternalIP, which is its tunnel's address",
        hint: "set --node-ip of the kubelet",
        look: node_address,
    },
    Check {
        id: "port-15008",
        expects: "no pod takes port 15008 of a node",
        hint: "move it to another port: the tunnel between nodes needs this one",
        look: port_taken,
    },
    Check {
        id: "cilium-socket-lb",
        expects: "Cilium translates Services outside pods",
        hint: "set socketLB.hostNamespaceOnly=true in Cilium's values: otherwise the mesh never sees a Service's address",
        look: cilium_socket_lb,
    },
    Check {
        id: "cilium-exclusive",
        expects: "Cilium leaves other programs' CNI configuration alone",
        hint: "set cni.exclusive=false in Cilium's values: otherwise it removes the plugin again and again",
        look: cilium_exclusive,
    },
    Check {
        id: "gateway-api",
        expects: "the Gateway API's CRDs are there, v1.4 or newer",
        hint: "install them if you want HTTPRoute and its kin; everything else works without",
        look: gateway_api,
    },
    Check {
        id: "pod-security",
        expects: "the namespace warren-system allows privileged pods",
        hint: "kubectl label namespace warren-system pod-security.kubernetes.io/enforce=privileged --overwrite",
        look: pod_security,
    },
    Check {
        id: "label-values",
        expects: "Warren's labels have values that mean something",
        hint: "mesh: enabled or disabled; mode: permissive or strict. Others count as if the label were not there",
        look: label_values,
    },
    Check {
        id: "other-mesh",
        expects: "no namespace is in two meshes",
        hint: "remove one of the labels, and restart pods that have a sidecar",
        look: other_mesh,
    },
    Check {
        id: "host-network-pods",
        expects: "no pod of an opted-in namespace is on its node's network",
        hint: "such pods are outside the mesh: callers in the mesh reach them in plaintext, and strict mode refuses their calls",
        look: host_network,
    },
    Check {
        id: "network-policies",
        expects: "NetworkPolicies hold for all traffic of the pods that they select",
        hint: "they do not hold between pods of the mesh, only towards the outside: see docs/operations.md#networkpolicies",
        look: network_policies,
    },
];

fn kubernetes_version(facts: &Facts) -> Finding {
    let (major, minor) = facts.version;
    match facts.version >= (1, 31) {
        true => Finding::Ok,
        false => Finding::Failed(format!("it is {major}.{minor}")),
    }
}

fn node_kernel(facts: &Facts) -> Finding {
    let old = (facts.nodes.iter()).filter_map(|node| {
        let info = node.status.as_ref()?.node_info.as_ref()?;
        if info.operating_system != "linux" {
            return Some(format!("{}: {}", name(node), info.operating_system));
        }
        let version = version(&info.kernel_version)?;
        (version < (5, 10)).then(|| format!("{}: {}", name(node), info.kernel_version))
    });
    Finding::failed_for(old.collect())
}

fn node_runtime(facts: &Facts) -> Finding {
    let other = (facts.nodes.iter()).filter_map(|node| {
        let info = node.status.as_ref()?.node_info.as_ref()?;
        let runtime = &info.container_runtime_version;
        let good = match runtime.split_once("://")? {
            ("containerd", running) => version(running).is_none_or(|v| v >= (1, 6)),
            (kind, _) => kind == "cri-o",
        };
        (!good).then(|| format!("{}: {runtime}", name(node)))
    });
    Finding::warning_for(other.collect())
}

/// Major and minor of a version such as `6.1.0-13-cloud`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text
        .trim_start_matches('v')
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn node_address(facts: &Facts) -> Finding {
    let without = |node: &&Node| {
        let status = node.status.as_ref();
        let addresses = status.and_then(|status| status.addresses.as_ref());
        !addresses.is_some_and(|all| all.iter().any(|address| address.type_ == "InternalIP"))
    };
    Finding::failed_for(
        (facts.nodes.iter())
            .filter(without)
            .map(|n| name(n).to_owned())
            .collect(),
    )
}

fn port_taken(facts: &Facts) -> Finding {
    let takes = |pod: &&Pod| {
        let Some(spec) = &pod.spec else {
            return false;
        };
        let host = spec.host_network == Some(true);
        (spec.containers.iter())
            .flat_map(|c| c.ports.iter().flatten())
            .any(|port| {
                let tunnel = Some(i32::from(TUNNEL_PORT));
                port.host_port == tunnel || host && Some(port.container_port) == tunnel
            })
    };
    Finding::failed_for(facts.pods.iter().filter(takes).map(full_name).collect())
}

fn cilium_value<'a>(cilium: &'a ConfigMap, key: &str) -> &'a str {
    let data = cilium.data.as_ref();
    data.and_then(|data| data.get(key))
        .map_or("", String::as_str)
}

fn cilium_socket_lb(facts: &Facts) -> Finding {
    let Some(cilium) = &facts.cilium else {
        return Finding::Ok;
    };
    // kube-proxy's replacement brings socket load balancing along.
    let replaces = ["true", "strict"].contains(&cilium_value(cilium, "kube-proxy-replacement"));
    let everywhere = replaces || cilium_value(cilium, "bpf-lb-sock") == "true";
    match everywhere && cilium_value(cilium, "bpf-lb-sock-hostns-only") != "true" {
        true => Finding::Failed(
            "bpf-lb-sock-hostns-only is not true in kube-system/cilium-config".into(),
        ),
        false => Finding::Ok,
    }
}

fn cilium_exclusive(facts: &Facts) -> Finding {
    let cilium = facts.cilium.as_ref();
    match cilium.is_some_and(|cilium| cilium_value(cilium, "cni-exclusive") != "false") {
        true => Finding::Failed("cni-exclusive is not false in kube-system/cilium-config".into()),
        false => Finding::Ok,
    }
}

fn gateway_api(facts: &Facts) -> Finding {
    let routes =
        (facts.crds.iter()).find(|crd| name(*crd) == "httproutes.gateway.networking.k8s.io");
    let Some(routes) = routes else {
        return Finding::Warning("they are not there".into());
    };
    let annotations = routes.metadata.annotations.as_ref();
    let bundle = annotations.and_then(|a| a.get("gateway.networking.k8s.io/bundle-version"));
    match bundle.and_then(|bundle| version(bundle)) {
        Some(found) if found >= (1, 4) => Finding::Ok,
        _ => Finding::Warning(format!(
            "their version is {}",
            bundle.map_or("unknown", String::as_str)
        )),
    }
}

fn pod_security(facts: &Facts) -> Finding {
    let namespace = facts
        .namespaces
        .iter()
        .find(|n| name(*n) == SYSTEM_NAMESPACE);
    let enforced = namespace.and_then(|n| label(n, "pod-security.kubernetes.io/enforce"));
    match enforced {
        Some(level) if level != "privileged" => Finding::Failed(format!("it enforces {level}")),
        _ => Finding::Ok,
    }
}

fn label_values(facts: &Facts) -> Finding {
    let wrong = |what: String, value: Option<&str>, key: &str, right: [&str; 2]| {
        let value = value.filter(|value| !right.contains(value))?;
        Some(format!("{what}: {key}={value}"))
    };
    let mesh = ["enabled", "disabled"];
    let mut found = Vec::new();
    for namespace in &facts.namespaces {
        let what = || format!("namespace {}", name(namespace));
        found.extend(wrong(
            what(),
            label(namespace, MESH_LABEL),
            MESH_LABEL,
            mesh,
        ));
        let mode = ["permissive", "strict"];
        found.extend(wrong(
            what(),
            label(namespace, MODE_LABEL),
            MODE_LABEL,
            mode,
        ));
    }
    for pod in &facts.pods {
        let what = format!("pod {}", full_name(pod));
        found.extend(wrong(what, label(pod, MESH_LABEL), MESH_LABEL, mesh));
    }
    Finding::failed_for(found)
}

fn other_mesh(facts: &Facts) -> Finding {
    let others = [
        ("istio-injection", "enabled"),
        ("istio.io/dataplane-mode", "ambient"),
        ("linkerd.io/inject", "enabled"),
    ];
    let twice = (facts.namespaces.iter())
        .filter(|namespace| label(*namespace, MESH_LABEL) == Some("enabled"))
        .filter_map(|namespace| {
            let annotations = namespace.metadata.annotations.as_ref();
            let other = others.iter().find(|(key, value)| {
                let annotation = annotations.and_then(|a| a.get(*key)).map(String::as_str);
                label(namespace, key) == Some(value) || annotation == Some(value)
            });
            other.map(|(key, value)| format!("namespace {}: {key}={value}", name(namespace)))
        });
    Finding::failed_for(twice.collect())
}

/// Whether the labels ask for the pod to be in the mesh; the pod's wins.
fn opted_in(facts: &Facts, pod: &Pod) -> bool {
    let namespaces: BTreeMap<&str, Option<&str>> = (facts.namespaces.iter())
        .map(|namespace| (name(namespace), label(namespace, MESH_LABEL)))
        .collect();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let own = label(pod, MESH_LABEL);
    let wish = own.or_else(|| namespaces.get(namespace).copied().flatten());
    wish == Some("enabled")
        && namespace != SYSTEM_NAMESPACE
        && !["Succeeded", "Failed"].contains(&phase(pod))
}

fn is_on_host(pod: &Pod) -> bool {
    let spec = pod.spec.as_ref();
    spec.is_some_and(|spec| spec.host_network == Some(true))
}

fn host_network(facts: &Facts) -> Finding {
    let pods = (facts.pods.iter())
        .filter(|pod| is_on_host(pod))
        .filter(|pod| opted_in(facts, pod));
    Finding::warning_for(pods.map(full_name).collect())
}

fn network_policies(facts: &Facts) -> Finding {
    let changed = (facts.policies.iter()).filter_map(|policy| {
        let spec = policy.spec.clone().unwrap_or_default();
        let directions = match Refuses::of(&spec) {
            Refuses {
                ingress: false,
                egress: false,
            } => return None,
            Refuses {
                ingress: true,
                egress: false,
            } => "ingress",
            Refuses {
                ingress: false,
                egress: true,
            } => "egress",
            _ => "ingress and egress",
        };
        let selector = spec.pod_selector.unwrap_or_default();
        let selected = (facts.pods.iter()).filter(|pod| {
            pod.metadata.namespace == policy.metadata.namespace
                && !is_on_host(pod)
                && opted_in(facts, pod)
                && selects(&selector, pod.metadata.labels.as_ref())
        });
        let pods: Vec<&str> = selected.map(name).collect();
        let first = pods[..pods.len().min(3)].join(", ");
        let more = if pods.len() > 3 { ", ..." } else { "" };
        (!pods.is_empty()).then(|| {
            let count = pods.len();
            format!(
                "{}: {directions} of {count} pods: {first}{more}",
                full_name(policy)
            )
        })
    });
    Finding::warning_for(changed.collect())
}
