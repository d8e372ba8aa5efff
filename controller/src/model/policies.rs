//! XBackendTrafficPolicy and TrafficPolicy: what they are for, what counts of them, and what is to be said.
//!
//! Rules: targets are in the policy's own namespace. Of two policies of one kind that set the same field for the
//! same target the older counts, then the one whose name is first (GEP-713). A field that the Gateway API has
//! too counts there where it is set (HTTPRoute `retry` and `timeouts`, XBackendTrafficPolicy `retryConstraint`).
//! Proxies go by the same rules, so that a TrafficPolicy is sent as it was written; here is decided only
//! what its status says.

mod traffic;

use std::collections::BTreeMap;

use mesh_api::proto::mesh;

use super::routes::{Services, session};
use super::status::{Condition, ObjectStatus, ParentStatus};
use crate::providers::Objects;
use crate::providers::gateway::{
    BackendTrafficPolicy, LocalReference, ParentReference, RetryConstraint, check, duration,
};

/// Policies by `namespace/name`, and what is to be said of all of them.
#[derive(Debug, Default)]
pub(super) struct Policies {
    pub(super) backend: BTreeMap<String, mesh::BackendTrafficPolicy>,
    pub(super) traffic: BTreeMap<String, mesh::TrafficPolicy>,
    pub(super) statuses: Vec<ObjectStatus>,
}

/// Judges all policies.
pub(super) fn build(objects: &Objects) -> Policies {
    let services = Services(&objects.services);
    let mut policies = Policies::default();
    backend_policies(objects, services, &mut policies);
    traffic::policies(objects, services, &mut policies);
    policies
}

fn backend_policies(objects: &Objects, services: Services<'_>, policies: &mut Policies) {
    let mut all: Vec<_> = objects.backend_traffic_policies.iter().collect();
    // The older counts, then the first by name.
    all.sort_by_key(|(name, policy)| (policy.created(), *name));
    let mut taken: BTreeMap<(String, String), String> = BTreeMap::new();
    for ((namespace, name), policy) in all {
        let mut status = ObjectStatus::new("XBackendTrafficPolicy", &policy.metadata);
        let refused = check::backend_traffic_policy(&policy.spec);
        let mut names = Vec::new();
        for target in &policy.spec.target_refs {
            let accepted = match refused.first() {
                Some((path, message)) => {
                    let field = crate::providers::field::display(path);
                    Err(("Invalid", format!("{field}: {message}")))
                }
                None => service_target(target, namespace, services),
            };
            let accepted = accepted.and_then(|()| {
                let target = (namespace.clone(), target.name.clone());
                match taken.get(&target) {
                    Some(other) => Err((
                        "Conflicted",
                        format!("XBackendTrafficPolicy {namespace}/{other} is older and counts"),
                    )),
                    None => {
                        taken.insert(target, name.clone());
                        Ok(())
                    }
                }
            });
            if accepted.is_ok() {
                names.push(target.name.clone());
            }
            status
                .parents
                .push(parent(target_reference(target), accepted));
        }
        policies.statuses.push(status);
        if !names.is_empty() {
            let made = backend_policy(namespace, name, policy, names);
            policies.backend.insert(format!("{namespace}/{name}"), made);
        }
    }
}

fn backend_policy(
    namespace: &str,
    name: &str,
    policy: &BackendTrafficPolicy,
    services: Vec<String>,
) -> mesh::BackendTrafficPolicy {
    let spec = &policy.spec;
    mesh::BackendTrafficPolicy {
        namespace: namespace.into(),
        name: name.into(),
        created: policy.created(),
        services,
        retry_constraint: spec.retry_constraint.as_ref().map(retry_constraint),
        session_persistence: spec.session_persistence.as_ref().map(session),
    }
}

/// With the defaults of the CRD.
fn retry_constraint(constraint: &RetryConstraint) -> mesh::RetryConstraint {
    let budget = constraint.budget.as_ref();
    let rate = constraint.min_retry_rate.as_ref();
    let time = |text: Option<&String>, default| {
        let given = text.and_then(|t| duration(t).ok());
        given.unwrap_or(default)
    };
    let number = |n: Option<i64>, default| n.and_then(|n| n.try_into().ok()).unwrap_or(default);
    mesh::RetryConstraint {
        budget_percent: number(budget.and_then(|b| b.percent), 20),
        budget_interval_ms: time(budget.and_then(|b| b.interval.as_ref()), 10_000),
        min_retry_count: number(rate.and_then(|r| r.count), 10),
        min_retry_interval_ms: time(rate.and_then(|r| r.interval.as_ref()), 1_000),
    }
}

/// Why a target is not accepted: reason and message.
type Refusal = (&'static str, String);

fn service_target(
    target: &LocalReference,
    namespace: &str,
    services: Services<'_>,
) -> Result<(), Refusal> {
    let LocalReference { group, kind, name } = target;
    if !group.is_empty() || kind != "Service" {
        return Err(("Invalid", format!("{kind} {name} is no Service")));
    }
    match services.get(namespace, name) {
        Some(_) => Ok(()),
        None => Err((
            "TargetNotFound",
            format!("there is no Service {namespace}/{name}"),
        )),
    }
}

fn target_reference(target: &LocalReference) -> ParentReference {
    ParentReference {
        group: Some(target.group.clone()),
        kind: Some(target.kind.clone()),
        name: target.name.clone(),
        ..ParentReference::default()
    }
}

fn parent(parent_ref: ParentReference, accepted: Result<(), Refusal>) -> ParentStatus {
    let condition = match accepted {
        Ok(()) => Condition::new("Accepted", true, "Accepted"),
        Err((reason, message)) => Condition::new("Accepted", false, reason).saying(message),
    };
    ParentStatus {
        parent_ref,
        conditions: vec![condition],
    }
}

#[cfg(test)]
mod tests;
