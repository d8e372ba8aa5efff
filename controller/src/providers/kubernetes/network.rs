//! NetworkPolicies, as far as the mesh changes what they mean.
//!
//! A network enforces them where packets enter and leave a pod. Between two pods of the mesh none do: the caller's are
//! taken over inside its namespace, travel from node to node, and reach the app inside the namespace of the callee. So
//! a policy does not hold there, in either direction, and it makes a difference where it would have refused something.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// What is kept of a NetworkPolicy that may refuse a connection between pods.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// `metadata.uid`
    pub uid: String,
    /// Which pods of its namespace it holds for.
    pub selector: LabelSelector,
    /// What it may refuse.
    pub refuses: Refuses,
}

/// Which connections between pods a policy may refuse: TCP only, which is all that the mesh takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refuses {
    /// Some to its pods.
    pub ingress: bool,
    /// Some from its pods.
    pub egress: bool,
}

impl Policy {
    /// `None`: it lets every pod connect to every port.
    pub(super) fn of(policy: NetworkPolicy) -> Option<Self> {
        let spec = policy.spec?;
        let refuses = Refuses::of(&spec);
        (refuses != Refuses::default()).then(|| Self {
            uid: policy.metadata.uid.unwrap_or_default(),
            selector: spec.pod_selector.unwrap_or_default(),
            refuses,
        })
    }
}

impl Refuses {
    /// Of a policy's `spec`.
    pub fn of(spec: &NetworkPolicySpec) -> Self {
        let named = |direction: &str| {
            let types = spec.policy_types.as_ref().filter(|types| !types.is_empty());
            types.map(|types| types.iter().any(|t| t == direction))
        };
        let mut ingress = spec.ingress.iter().flatten();
        let mut egress = spec.egress.iter().flatten();
        Self {
            ingress: named("Ingress").unwrap_or(true)
                && !ingress.any(|rule| is_open(rule.from.as_deref(), rule.ports.as_deref())),
            egress: named("Egress").unwrap_or(spec.egress.is_some())
                && !egress.any(|rule| is_open(rule.to.as_deref(), rule.ports.as_deref())),
        }
    }
}

/// Whether a rule lets all pods through on all TCP ports. An `ipBlock` is of one address family, so never all.
fn is_open(peers: Option<&[NetworkPolicyPeer]>, ports: Option<&[NetworkPolicyPort]>) -> bool {
    let is_empty = |selector: &LabelSelector| *selector == LabelSelector::default();
    let all_pods = peers.unwrap_or_default().iter().any(|peer| {
        peer.namespace_selector.as_ref().is_some_and(is_empty)
            && peer.pod_selector.as_ref().is_none_or(is_empty)
    });
    let all_ports = ports
        .unwrap_or_default()
        .iter()
        .any(|port| port.port.is_none() && port.protocol.as_deref().is_none_or(|p| p == "TCP"));
    (all_pods || peers.is_none_or(<[_]>::is_empty))
        && (all_ports || ports.is_none_or(<[_]>::is_empty))
}

/// Whether a label selector is for an object with these labels.
pub fn selects(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let value = |key: &str| labels.and_then(|labels| labels.get(key));
    let mut equal = selector.match_labels.iter().flatten();
    let mut expressions = selector.match_expressions.iter().flatten();
    equal.all(|(key, wanted)| value(key) == Some(wanted))
        && expressions.all(|expression| {
            let value = value(&expression.key);
            let values = expression.values.as_deref().unwrap_or_default();
            let is_among = value.is_some_and(|value| values.contains(value));
            match &*expression.operator {
                "In" => is_among,
                "NotIn" => !is_among,
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn refuses(spec: Value) -> (bool, bool) {
        let Refuses { ingress, egress } = Refuses::of(&serde_json::from_value(spec).unwrap());
        (ingress, egress)
    }

    #[test]
    fn a_policy_matters_where_it_may_refuse_a_connection_between_pods() {
        let none = json!({});
        // Without types: ingress, and egress if there is a section of it.
        assert_eq!(refuses(json!({ "podSelector": none })), (true, false));
        assert_eq!(
            refuses(json!({ "podSelector": none, "ingress": [{}], "egress": [] })),
            (false, true)
        );
        assert_eq!(
            refuses(json!({ "policyTypes": ["Egress"], "ingress": [] })),
            (false, true)
        );
        assert_eq!(
            refuses(
                json!({ "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}] })
            ),
            (false, false)
        );
    }

    #[test]
    fn only_a_rule_for_all_pods_and_all_tcp_ports_is_open() {
        let ingress =
            |rule: Value| refuses(json!({ "ingress": [{ "ports": [{ "port": 1 }] }, rule] })).0;
        for open in [
            json!({}),
            json!({ "from": [], "ports": [] }),
            json!({ "from": [{ "namespaceSelector": {} }] }),
            json!({ "from": [{ "namespaceSelector": {}, "podSelector": {} }], "ports": [{ "protocol": "TCP" }] }),
            json!({ "ports": [{ "protocol": "UDP" }, {}] }),
        ] {
            assert!(!ingress(open.clone()), "{open}");
        }
        for closed in [
            // Pods of other namespaces are refused.
            json!({ "from": [{ "podSelector": {} }] }),
            json!({ "from": [{ "namespaceSelector": { "matchLabels": { "a": "b" } } }] }),
            json!({ "from": [{ "namespaceSelector": {}, "podSelector": { "matchLabels": { "a": "b" } } }] }),
            json!({ "from": [{ "ipBlock": { "cidr": "0.0.0.0/0" } }] }),
            json!({ "ports": [{ "port": 80 }] }),
            json!({ "ports": [{ "protocol": "UDP" }] }),
        ] {
            assert!(ingress(closed.clone()), "{closed}");
        }
    }

    #[test]
    fn selectors_mean_what_kubernetes_says() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let selects =
            |selector: Value| selects(&serde_json::from_value(selector).unwrap(), Some(&labels));
        let expression = |key: &str, operator: &str, values: &[&str]| json!({ "matchExpressions": [{ "key": key, "operator": operator, "values": values }] });
        assert!(selects(json!({})));
        assert!(selects(json!({ "matchLabels": { "app": "web" } })));
        assert!(!selects(
            json!({ "matchLabels": { "app": "web", "b": "c" } })
        ));
        assert!(selects(expression("app", "In", &["web", "x"])));
        assert!(!selects(expression("b", "In", &["c"])));
        assert!(!selects(expression("app", "NotIn", &["web"])));
        assert!(selects(expression("b", "NotIn", &["c"])));
        assert!(selects(expression("app", "Exists", &[])));
        assert!(selects(expression("b", "DoesNotExist", &[])));
        assert!(!selects(expression("app", "DoesNotExist", &[])));
    }
}
