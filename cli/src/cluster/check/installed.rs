//! How Warren is, once it is there.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Node, Pod};
use mesh_api::client::credentials::bundle_from_pem;
use mesh_api::tls;

use super::facts::{ADMISSION_POLICY, Facts, full_name, label, name};
use super::{Check, Finding};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "crds",
        expects: "the CRD of TrafficPolicy is there",
        hint: "install the chart warren-crds",
        look: crds,
    },
    Check {
        id: "admission-policy",
        expects: "only the controller may write what it records at pods",
        hint: "install the chart warren with admissionPolicy.enabled; until then, who may change a pod can take it out of the mesh",
        look: admission_policy,
    },
    Check {
        id: "controller-ready",
        expects: "a controller is ready",
        hint: "kubectl -n warren-system describe pods -l app.kubernetes.io/name=warren-controller; then its log",
        look: controller_ready,
    },
    Check {
        id: "controller-leader",
        expects: "one controller leads: it writes status and taints",
        hint: "see the controllers' logs; traffic does not depend on it",
        look: controller_leader,
    },
    Check {
        id: "trust-bundle",
        expects: "the trust bundle is there and holds a valid root",
        hint: "the controller makes it: see its log. Agents and proxies do not start without",
        look: trust_bundle,
    },
    Check {
        id: "root-expiry",
        expects: "the root is valid for 60 days and more",
        hint: "replace it before it ends: docs/reference/controller.md#certificate-authority",
        look: root_expiry,
    },
    Check {
        id: "agents",
        expects: "every Linux node has a running agent",
        hint: "kubectl -n warren-system get pods -l app.kubernetes.io/name=warren-cni -o wide; pods of the mesh do not start there",
        look: |facts| everywhere(facts, "warren-cni"),
    },
    Check {
        id: "node-proxies",
        expects: "every Linux node has a ready node proxy",
        hint: "kubectl -n warren-system get pods -l app.kubernetes.io/name=warren-node-proxy -o wide; connections of its pods wait",
        look: |facts| everywhere(facts, "warren-node-proxy"),
    },
    Check {
        id: "agent-status",
        expects: "every agent can enrol pods",
        hint: "the agent's log says more: kubectl -n warren-system logs -l app.kubernetes.io/name=warren-cni",
        look: agent_status,
    },
    Check {
        id: "agent-controller",
        expects: "every agent is connected to a controller",
        hint: "is DNS up, and port 15012 of warren-controller open to the nodes?",
        look: agent_controller,
    },
    Check {
        id: "pods-enrolled",
        expects: "every pod that is to be in the mesh is",
        hint: "what is named is tried again; a port of the mesh that the app holds, or a missing certificate, is the usual cause",
        look: pods_enrolled,
    },
    Check {
        id: "node-to-node",
        expects: "nodes reach each other on port 15008",
        hint: "a firewall, security group or host policy drops it; open TCP 15008 between all nodes",
        look: node_to_node,
    },
    Check {
        id: "handshakes",
        expects: "nodes trust each other's certificates",
        hint: "see docs/reference/metrics.md#tunnels for what each result means; check the nodes' clocks",
        look: handshakes,
    },
    Check {
        id: "node-taints",
        expects: "no node is kept from pods for lack of a ready agent",
        hint: "the taint warren-mesh.io/not-ready goes when the node's agent is ready",
        look: node_taints,
    },
    Check {
        id: "mistakes",
        expects: "the controller understands all objects",
        hint: "mend what is named; its last good version stays in force",
        look: mistakes,
    },
    Check {
        id: "routes-and-policies",
        expects: "routes and policies are in force as they are written",
        hint: "the condition's message says what to mend; `kubectl describe` shows it, too",
        look: routes_and_policies,
    },
    Check {
        id: "versions",
        expects: "all parts are of one version",
        hint: "an upgrade is under way, or stuck: kubectl -n warren-system rollout status",
        look: versions,
    },
    Check {
        id: "mesh-switch",
        expects: "the mesh is not switched off",
        hint: "an uninstall was broken off; kubectl label namespace warren-system warren-mesh.io/mesh- turns it on again",
        look: mesh_switch,
    },
];

fn crds(facts: &Facts) -> Finding {
    match facts
        .crds
        .iter()
        .any(|crd| name(crd) == "trafficpolicies.warren-mesh.io")
    {
        true => Finding::Ok,
        false => Finding::Failed("trafficpolicies.warren-mesh.io is not there".into()),
    }
}

fn admission_policy(facts: &Facts) -> Finding {
    let missing = |kind: &str| format!("there is no {kind} {ADMISSION_POLICY}");
    let Some(policy) = &facts.admission else {
        return Finding::Warning(missing("ValidatingAdmissionPolicy"));
    };
    let Some(binding) = &facts.admission_binding else {
        return Finding::Warning(missing("ValidatingAdmissionPolicyBinding"));
    };
    let mut actions = binding.spec.validation_actions.iter();
    if !actions.any(|action| action == "Deny") {
        return Finding::Warning("its binding does not say Deny".into());
    }
    let checked = policy
        .status
        .as_ref()
        .and_then(|s| s.type_checking.as_ref());
    let warnings = checked.and_then(|checked| checked.expression_warnings.as_ref());
    let broken = warnings.into_iter().flatten();
    Finding::warning_for(
        broken
            .map(|w| format!("{}: {}", w.field_ref, w.warning))
            .collect(),
    )
}

fn controller_ready(facts: &Facts) -> Finding {
    let Some(controller) = &facts.controller else {
        return Finding::Failed("there is no Deployment warren-system/warren-controller".into());
    };
    let status = controller.status.as_ref();
    let ready = status.and_then(|status| status.ready_replicas).unwrap_or(0);
    let wanted = controller
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1);
    let why = || waiting(facts, "warren-controller").unwrap_or_default();
    match ready {
        0 => Finding::Failed(format!("none of {wanted} is; {}", why())),
        _ if ready < wanted => Finding::Warning(format!("{ready} of {wanted} are; {}", why())),
        _ => Finding::Ok,
    }
}

fn controller_leader(facts: &Facts) -> Finding {
    let Some(spec) = facts.lease.as_ref().and_then(|lease| lease.spec.as_ref()) else {
        return Finding::Failed("there is no Lease warren-system/warren-controller".into());
    };
    let holder = spec.holder_identity.as_deref().unwrap_or_default();
    let seconds = i64::from(spec.lease_duration_seconds.unwrap_or(15));
    let age =
        (spec.renew_time.as_ref()).map(|renewed| facts.now.as_second() - renewed.0.as_second());
    match age {
        Some(age) if !holder.is_empty() && age <= 2 * seconds => Finding::Ok,
        Some(age) => Finding::Failed(format!(
            "{holder:?} renewed the Lease {age} s ago, which lasts {seconds} s"
        )),
        None => Finding::Failed("nobody has renewed the Lease".into()),
    }
}

/// Ends of validity of the trusted roots, in seconds since the epoch.
fn roots(facts: &Facts) -> Result<Vec<i64>, String> {
    let map = facts
        .trust_bundle
        .as_ref()
        .ok_or("there is no ConfigMap warren-system/warren-trust-bundle")?;
    let bundle = map.data.as_ref().and_then(|data| data.get("bundle.pem"));
    let bundle = bundle.ok_or("it has no key bundle.pem")?;
    let roots = bundle_from_pem(bundle.as_bytes()).map_err(|e| e.to_string())?;
    let ends = roots.into_iter().filter_map(|der| {
        let end = tls::not_after(&der.into())?;
        i64::try_from(end.as_secs()).ok()
    });
    Ok(ends.collect())
}

fn trust_bundle(facts: &Facts) -> Finding {
    match roots(facts) {
        Err(error) => Finding::Failed(error),
        Ok(ends) if ends.iter().any(|end| *end > facts.now.as_second()) => Finding::Ok,
        Ok(ends) => Finding::Failed(format!("none of its {} roots is valid now", ends.len())),
    }
}

fn root_expiry(facts: &Facts) -> Finding {
    // The signing root is the first. That there is none is another check's to say.
    let Ok(Some(end)) = roots(facts).map(|ends| ends.first().copied()) else {
        return Finding::Ok;
    };
    let days = (end - facts.now.as_second()).div_euclid(DAY);
    match days {
        ..0 => Finding::Failed(format!("it ended {} days ago", -days)),
        0..ENOUGH_DAYS => Finding::Warning(format!("it ends in {days} days")),
        _ => Finding::Ok,
    }
}

/// Nodes without a ready pod of that part.
fn everywhere(facts: &Facts, part: &str) -> Finding {
    let Some(set) = facts.daemon_sets.get(part) else {
        return Finding::Failed(format!("there is no DaemonSet warren-system/{part}"));
    };
    // The set may be kept off some nodes on purpose.
    let selector = (set.spec.as_ref())
        .and_then(|spec| spec.template.spec.as_ref()?.node_selector.clone())
        .unwrap_or_default();
    let nodes = facts.nodes.iter().filter(|node| {
        selector
            .iter()
            .all(|(key, value)| label(*node, key) == Some(value))
    });
    let linux: BTreeSet<&str> = facts.linux_nodes().collect();
    let runs: BTreeSet<&str> = (facts.of(part))
        // A proxy that drains is not ready, and its successor is.
        .filter(|pod| {
            if part == "warren-cni" {
                is_running(pod)
            } else {
                is_ready(pod)
            }
        })
        .filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref())
        .collect();
    let without = nodes
        .map(name)
        .filter(|node| linux.contains(node) && !runs.contains(node));
    let without: Vec<String> = without.map(str::to_owned).collect();
    match (without.is_empty(), waiting(facts, part)) {
        (true, _) => Finding::Ok,
        (false, Some(why)) => Finding::Failed(format!("{}\n{why}", super::list(&without))),
        (false, None) => Finding::failed_for(without),
    }
}

fn is_running(pod: &Pod) -> bool {
    let containers = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    containers.into_iter().any(|c| {
        c.state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    })
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Why a pod of that part does not run: an image that is not there, a crash, a node that does not take it.
fn waiting(facts: &Facts, part: &str) -> Option<String> {
    facts.of(part).find_map(|pod| {
        let status = pod.status.as_ref()?;
        let container = (status.container_statuses.iter().flatten()).find_map(|container| {
            let waiting = container.state.as_ref()?.waiting.as_ref()?;
            let reason = waiting.reason.as_deref().unwrap_or("waiting");
            Some(format!(
                "{reason} {}",
                waiting.message.as_deref().unwrap_or_default()
            ))
        });
        let condition = || {
            let scheduled = (status.conditions.iter().flatten()).find(|condition| {
                condition.type_ == "PodScheduled" && condition.status == "False"
            })?;
            scheduled.message.clone()
        };
        let why = container.or_else(condition)?;
        Some(format!("{}: {}", full_name(pod), why.trim()))
    })
}

/// A line for each agent, of what is made of its status.
fn of_agents(facts: &Facts, look: impl Fn(&serde_json::Value) -> Vec<String>) -> Vec<String> {
    let mut lines = Vec::new();
    for (node, status) in &facts.agents {
        let said = status.as_ref().map(&look).unwrap_or_default();
        lines.extend(said.into_iter().map(|said| format!("{node}: {said}")));
    }
    lines
}

fn strings(value: &serde_json::Value) -> Vec<String> {
    let values = value.as_array().into_iter().flatten();
    values
        .filter_map(|value| value.as_str().map(str::to_owned))
        .collect()
}

fn agent_status(facts: &Facts) -> Finding {
    let mut problems = of_agents(facts, |status| strings(&status["problems"]));
    let silent = facts
        .agents
        .values()
        .filter_map(|status| status.as_ref().err());
    problems.extend(silent.cloned());
    Finding::failed_for(problems)
}

fn agent_controller(facts: &Facts) -> Finding {
    Finding::failed_for(of_agents(facts, |status| {
        let away = status["controllerConnected"] == false;
        away.then(|| "not connected".to_owned())
            .into_iter()
            .collect()
    }))
}

fn pods_enrolled(facts: &Facts) -> Finding {
    Finding::failed_for(of_agents(facts, |status| {
        let unsettled = status["unsettled"].as_array().into_iter().flatten();
        let failed = (unsettled.filter(|pod| pod["failed"] == true)).map(|pod| {
            let text = |field: &str| pod[field].as_str().unwrap_or_default().to_owned();
            format!("{}/{}: {}", text("namespace"), text("name"), text("reason"))
        });
        failed.collect()
    }))
}

/// Failed handshakes as the nodes' proxies count them: node, side and result.
fn failed_handshakes(facts: &Facts) -> Vec<(String, String)> {
    let mut failed = Vec::new();
    for (node, metrics) in &facts.proxies {
        let Ok(metrics) = metrics else { continue };
        for (series, count) in metrics.named("warren_tunnel_handshakes_total") {
            let result = series.label("result");
            if count > 0.0 && !["ok", "resumed"].contains(&result) {
                let line = format!("{node}: {count} of side {}: {result}", series.label("side"));
                failed.push((result.to_owned(), line));
            }
        }
    }
    failed
}

fn node_to_node(facts: &Facts) -> Finding {
    let lines = failed_handshakes(facts).into_iter();
    let lines = lines.filter(|(result, _)| result == "connect" || result == "connect_timeout");
    // Since the proxy's start; a node that went away counts, too.
    Finding::warning_for(lines.map(|(_, line)| line).collect())
}

fn handshakes(facts: &Facts) -> Finding {
    let doubt = |result: &str| {
        ["peer_", "refused_", "protocol", "incompatible"]
            .iter()
            .any(|start| result.starts_with(start))
    };
    let lines = failed_handshakes(facts)
        .into_iter()
        .filter(|(result, _)| doubt(result));
    Finding::warning_for(lines.map(|(_, line)| line).collect())
}

fn node_taints(facts: &Facts) -> Finding {
    let tainted = |node: &&Node| {
        let taints = node
            .spec
            .iter()
            .flat_map(|spec| spec.taints.iter().flatten());
        taints
            .into_iter()
            .any(|taint| taint.key == "warren-mesh.io/not-ready")
    };
    Finding::failed_for(
        facts
            .nodes
            .iter()
            .filter(tainted)
            .map(|n| name(n).to_owned())
            .collect(),
    )
}

fn mistakes(facts: &Facts) -> Finding {
    match &facts.status {
        Some(status) => Finding::failed_for(strings(&status["mistakes"])),
        None => Finding::Unknown("no controller answers /status".into()),
    }
}

/// Conditions that say that something is not as it was written.
fn routes_and_policies(facts: &Facts) -> Finding {
    let mut bad = Vec::new();
    // That nobody answers is another check's to say.
    let status = facts.status.clone().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let objects = ["routes", "policies"].map(|list| status[list].as_array());
    for object in objects.into_iter().flatten().flatten() {
        let parents = object["parents"].as_array().into_iter().flatten();
        for condition in parents.flat_map(|p| p["conditions"].as_array().into_iter().flatten()) {
            let wanted = match condition["type"].as_str() {
                Some("Accepted" | "ResolvedRefs") => "True",
                _ => "False",
            };
            if condition["status"] != wanted {
                bad.push(format!(
                    "{} {}/{}: {}: {}",
                    text(&object["kind"]),
                    text(&object["namespace"]),
                    text(&object["name"]),
                    text(&condition["reason"]),
                    text(&condition["message"])
                ));
            }
        }
    }
    bad.dedup();
    Finding::warning_for(bad)
}

fn versions(facts: &Facts) -> Finding {
    let parts = ["warren-controller", "warren-cni", "warren-node-proxy"];
    let found: BTreeSet<(&str, &str)> = (parts.iter())
        .flat_map(|part| facts.of(part).map(move |pod| (*part, pod)))
        .filter(|(_, pod)| pod.metadata.deletion_timestamp.is_none())
        .filter_map(|(part, pod)| Some((part, label(pod, "app.kubernetes.io/version")?)))
        .collect();
    let different: BTreeSet<&str> = found.iter().map(|(_, version)| *version).collect();
    match different.len() {
        0 | 1 => Finding::Ok,
        _ => Finding::warning_for(
            found
                .iter()
                .map(|(part, version)| format!("{part}: {version}"))
                .collect(),
        ),
    }
}

fn mesh_switch(facts: &Facts) -> Finding {
    use mesh_api::names::{MESH_LABEL, SYSTEM_NAMESPACE};
    let namespace = facts
        .namespaces
        .iter()
        .find(|n| name(*n) == SYSTEM_NAMESPACE);
    match namespace.and_then(|n| label(n, MESH_LABEL)) {
        Some("disabled") => Finding::Failed(format!(
            "namespace {SYSTEM_NAMESPACE} is labelled {MESH_LABEL}=disabled"
        )),
        _ => Finding::Ok,
    }
}

const DAY: i64 = 24 * 3600;
const ENOUGH_DAYS: i64 = 60;
