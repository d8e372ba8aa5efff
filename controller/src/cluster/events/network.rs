//! NetworkPolicies that do not hold for pods of the mesh as they are written.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::{Complaint, Found};
use crate::hub::Hub;
use crate::model::Model;
use crate::providers::kubernetes::network::{Policy, selects};
use crate::providers::kubernetes::{self, Shared};
use crate::providers::{NamespacedName, ObjectKey, Objects};

/// What was found, until pods or policies change.
#[derive(Default)]
pub(super) struct Policies {
    seen: Option<(Arc<Model>, Arc<kubernetes::Policies>)>,
    found: Found,
    count: i64,
}

impl Policies {
    pub(super) fn look(&mut self, hub: &Hub, shared: &Shared) -> &Found {
        let (model, policies) = (hub.model(), shared.policies());
        let same = self
            .seen
            .as_ref()
            .is_some_and(|(m, p)| Arc::ptr_eq(m, &model) && Arc::ptr_eq(p, &policies));
        if !same {
            (self.found, self.count) = (Found::new(), 0);
            if !policies.is_empty() {
                (self.found, self.count) = judge(&policies, &model, &hub.objects());
            }
            self.seen = Some((model, policies));
        }
        &self.found
    }

    /// Policies that are named.
    pub(super) fn count(&self) -> i64 {
        self.count
    }
}

fn judge(policies: &kubernetes::Policies, model: &Model, objects: &Objects) -> (Found, i64) {
    let (mut found, mut count) = (Found::new(), 0);
    for (name, policy) in policies {
        let pods = selected(&name.0, policy, model, objects);
        if pods.is_empty() {
            continue;
        }
        count += 1;
        let detail = named(&pods);
        let refuses = policy.refuses;
        for (_, reason, note) in [
            (refuses.ingress, "IngressNotEnforced", INGRESS),
            (refuses.egress, "EgressNotEnforced", EGRESS),
        ]
        .into_iter()
        .filter(|(refuses, ..)| *refuses)
        {
            let complaint = Complaint {
                object: key(name),
                reason: reason.into(),
                note: note.into(),
            };
            found.insert(complaint, detail.clone());
        }
    }
    (found, count)
}

/// Names of the pods of the mesh that the policy is for.
fn selected<'o>(
    namespace: &str,
    policy: &Policy,
    model: &Model,
    objects: &'o Objects,
) -> Vec<&'o str> {
    let is_meshed = |pod: &Pod| {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        model.pods.get(uid).is_some_and(|pod| pod.to_be_captured())
    };
    let of_namespace = objects
        .pods
        .range((namespace.to_owned(), String::new())..)
        .take_while(|((other, _), _)| other == namespace);
    of_namespace
        .filter(|(_, pod)| selects(&policy.selector, pod.metadata.labels.as_ref()))
        .filter(|(_, pod)| is_meshed(pod))
        .map(|((_, name), _)| name.as_str())
        .collect()
}

fn named(pods: &[&str]) -> String {
    let first = pods[..pods.len().min(NAMED)].join(", ");
    match pods.len().saturating_sub(NAMED) {
        0 => format!(" Pods of the mesh that it selects: {first}."),
        more => format!(
            " Pods of the mesh that it selects: {}, {first} and {more} more.",
            pods.len()
        ),
    }
}

fn key((namespace, name): &NamespacedName) -> ObjectKey {
    ObjectKey {
        kind: KIND.into(),
        namespace: namespace.clone(),
        name: name.clone(),
    }
}

pub(super) fn uid(shared: &Shared, key: &ObjectKey) -> Option<String> {
    let name = (key.namespace.clone(), key.name.clone());
    let policies = shared.policies();
    let policy = policies.get(&name).filter(|_| key.kind == KIND);
    policy.map(|policy| policy.uid.clone())
}

const KIND: &str = "NetworkPolicy";
pub(super) const VERSIONS: &[&str] = &["networking.k8s.io/v1"];
const NAMED: usize = 3;
const INGRESS: &str = "callers in the mesh are not held to its ingress rules: their connections come through the tunnel between \
    nodes and are delivered inside the pod, past where the network looks. Callers outside the mesh are held to them. Keep ports that \
    it guards out of the mesh with the annotation warren-mesh.io/exclude-inbound-ports, or the pods with the label \
    warren-mesh.io/mesh: disabled; see docs/operations.md#networkpolicies.";
const EGRESS: &str = "calls of pods of the mesh are not held to its egress rules: they leave through the tunnel between nodes, past \
    where the network looks. Calls to what is outside the mesh are held to them. Keep destinations out of the mesh with the \
    annotations warren-mesh.io/exclude-outbound-ports and exclude-outbound-cidrs, or the pods with the label warren-mesh.io/mesh: \
    disabled; see docs/operations.md#networkpolicies.";

#[cfg(test)]
mod tests {
    use mesh_api::proto::mesh::Mode;
    use serde_json::json;

    use super::*;
    use crate::model::{self, Settings};
    use crate::providers::Object;
    use crate::providers::kubernetes::network::Refuses;

    fn objects(pods: &[(&str, &str)]) -> Objects {
        let mut objects = Objects::default();
        for (name, mesh) in pods {
            let pod = json!({
                "metadata": {
                    "namespace": "demo", "name": name, "uid": name,
                    "labels": { "app": "web", "warren-mesh.io/mesh": mesh },
                },
                "spec": { "nodeName": "n", "containers": [] },
            });
            objects.insert(Object::Pod(Arc::new(serde_json::from_value(pod).unwrap())));
        }
        objects
    }

    fn found(app: &str, refuses: Refuses, pods: &[(&str, &str)]) -> Vec<(String, String)> {
        let selector = serde_json::from_value(json!({ "matchLabels": { "app": app } })).unwrap();
        let policy = Policy {
            uid: "u".into(),
            selector,
            refuses,
        };
        let policies = [(("demo".to_owned(), "deny".to_owned()), policy)].into();
        let objects = objects(pods);
        let settings = Settings {
            trust_domain: "cluster.local".into(),
            mode: Mode::Permissive,
        };
        let model = model::build(&objects, &settings);
        let (found, count) = judge(&policies, &model, &objects);
        assert_eq!(count, i64::from(!found.is_empty()));
        found
            .into_iter()
            .map(|(c, detail)| (c.reason, detail))
            .collect()
    }

    #[test]
    fn each_direction_that_a_policy_refuses_is_named_with_its_pods() {
        let both = Refuses {
            ingress: true,
            egress: true,
        };
        let one = [("a", "enabled"), ("b", "disabled")];
        let detail = " Pods of the mesh that it selects: a.".to_owned();
        let reasons = ["EgressNotEnforced", "IngressNotEnforced"].map(str::to_owned);
        assert_eq!(
            found("web", both, &one),
            reasons.map(|r| (r, detail.clone()))
        );
        let egress = Refuses {
            ingress: false,
            egress: true,
        };
        assert_eq!(found("web", egress, &one)[0].0, "EgressNotEnforced");
        assert_eq!(found("other", both, &one), []);
        assert_eq!(found("web", both, &[("b", "disabled")]), []);
        let many = ["a", "b", "c", "d", "e"].map(|name| (name, "enabled"));
        assert!(
            found("web", egress, &many)[0]
                .1
                .ends_with(": 5, a, b, c and 2 more.")
        );
    }

    #[test]
    fn a_note_fits_with_the_longest_names() {
        let name = "x".repeat(253);
        let detail = named(&[&name, "b", "c"]);
        for note in [INGRESS, EGRESS] {
            assert!(note.len() + detail.len() < super::super::LONGEST_NOTE);
        }
        assert_eq!(super::super::shortened("ü".repeat(1000)).len(), 1024);
        assert_eq!(super::super::shortened("ü".into()), "ü");
    }
}
