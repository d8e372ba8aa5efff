//! TrafficPolicy: its targets, its conflicts, and its form on the wire.

use std::collections::BTreeMap;

use mesh_api::proto::mesh::{
    self, HashKey, LoadBalancer, PolicyTarget, PolicyTargetKind, RetryCondition,
};

use super::{Policies, Refusal, parent};
use crate::model::routes::Services;
use crate::model::status::{Condition, ObjectStatus};
use crate::providers::gateway::{
    Fraction, HttpRouteRule, HttpRouteSpec, ParentReference, duration,
};
use crate::providers::traffic_policy::{
    Abort, CircuitBreaking, FaultInjection, Limits, LoadBalancing, Rate, RateLimit, Retry,
    TargetReference, Timeouts, TrafficPolicy, TrafficPolicySpec, check, grpc_code,
};
use crate::providers::{NamespacedName, Objects, field};

/// A field that a policy sets at a target: who was first.
type Taken<'a> = BTreeMap<(&'a str, &'a TargetReference, &'static str), &'a str>;

pub(super) fn policies(objects: &Objects, services: Services<'_>, policies: &mut Policies) {
    let mut all: Vec<_> = objects.traffic_policies.iter().collect();
    // The older counts, then the first by name.
    all.sort_by_key(|(name, policy)| (policy.created(), *name));
    let mut taken = Taken::new();
    for ((namespace, name), policy) in all {
        let spec = &policy.spec;
        let mut status = ObjectStatus::new("TrafficPolicy", &policy.metadata);
        let refused = check::mistakes(spec);
        let mut targets = Vec::new();
        for target in &spec.target_refs {
            let found = match refused.first() {
                Some((path, message)) => {
                    Err(("Invalid", format!("{}: {message}", field::display(path))))
                }
                None => find(target, namespace, objects, services),
            };
            let mut ignored = Vec::new();
            if found.is_ok() {
                targets.push(policy_target(target));
                ignored = conflicts(target, namespace, name, spec, objects, &mut taken);
            }
            let all_ignored = !ignored.is_empty()
                && set_fields(spec)
                    .iter()
                    .all(|f| ignored.iter().any(|i: &Ignored| i.field == *f));
            let messages: Vec<String> = ignored.iter().map(Ignored::to_string).collect();
            let accepted = match all_ignored {
                true => Err(("Conflicted", messages.join("; "))),
                false => found,
            };
            let mut of_target = parent(reference(target), accepted);
            if !messages.is_empty() {
                let conflicted = Condition::new("Conflicted", true, "Conflicted");
                let conditions = &mut of_target.conditions;
                conditions.push(conflicted.saying(messages.join("; ")));
            }
            status.parents.push(of_target);
        }
        policies.statuses.push(status);
        if !targets.is_empty() {
            let made = traffic_policy(namespace, name, policy, targets);
            policies.traffic.insert(format!("{namespace}/{name}"), made);
        }
    }
}

fn find(
    target: &TargetReference,
    namespace: &str,
    objects: &Objects,
    services: Services<'_>,
) -> Result<(), Refusal> {
    let TargetReference {
        kind,
        name,
        section_name,
        ..
    } = target;
    let key: NamespacedName = (namespace.into(), name.clone());
    // Names of ports, or of rules; `None`: the object is not there.
    let sections: Option<Vec<Option<&String>>> = match kind.as_str() {
        "Service" => services.get(namespace, name).map(|service| {
            let ports = service.spec.iter().flat_map(|s| s.ports.iter().flatten());
            ports.map(|p| p.name.as_ref()).collect()
        }),
        "HTTPRoute" => objects.http_routes.get(&key).map(|route| {
            let rules = route.spec.rules.iter().flatten();
            rules.map(|r| r.name.as_ref()).collect()
        }),
        _ => objects
            .grpc_routes
            .get(&key)
            .map(|route| route.spec.rules.iter().map(|r| r.name.as_ref()).collect()),
    };
    let Some(sections) = sections else {
        let message = format!("there is no {kind} {namespace}/{name}");
        return Err(("TargetNotFound", message));
    };
    match section_name {
        Some(section) if !sections.contains(&Some(section)) => {
            let what = if kind == "Service" { "port" } else { "rule" };
            let message = format!("{kind} {namespace}/{name} has no {what} named {section}");
            Err(("TargetNotFound", message))
        }
        _ => Ok(()),
    }
}

/// A field that does not count at a target, and what counts instead.
struct Ignored {
    field: &'static str,
    because: String,
}

impl std::fmt::Display for Ignored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is ignored: {}", self.field, self.because)
    }
}

fn conflicts<'a>(
    target: &'a TargetReference,
    namespace: &'a str,
    name: &'a str,
    spec: &TrafficPolicySpec,
    objects: &Objects,
    taken: &mut Taken<'a>,
) -> Vec<Ignored> {
    let mut ignored = Vec::new();
    for field in set_fields(spec) {
        match taken.get(&(namespace, target, field)) {
            Some(other) => ignored.push(Ignored {
                field,
                because: format!("TrafficPolicy {namespace}/{other} is older and sets it too"),
            }),
            None => drop(taken.insert((namespace, target, field), name)),
        }
        for because in overridden(target, namespace, field, objects) {
            ignored.push(Ignored { field, because });
        }
    }
    ignored
}

/// Where the Gateway API has the field too and it is set.
fn overridden(
    target: &TargetReference,
    namespace: &str,
    field: &str,
    objects: &Objects,
) -> Vec<String> {
    let mut found = Vec::new();
    if target.kind == "HTTPRoute" {
        let key: NamespacedName = (namespace.into(), target.name.clone());
        let route = objects.http_routes.get(&key);
        if let Some(route) = route {
            let section = target.section_name.as_deref();
            let sets = rules_that_set(&route.spec, field, section);
            found.extend(sets.map(|at| format!("{at} of the route is set")));
        }
    }
    if target.kind == "Service" {
        if field == "retry.budget" {
            let mut policies = objects.backend_traffic_policies.iter();
            let sets = policies.find(|((ns, _), policy)| {
                let spec = &policy.spec;
                let mut targets = spec.target_refs.iter();
                ns == namespace
                    && spec.retry_constraint.is_some()
                    && targets.any(|t| t.kind == "Service" && t.name == target.name)
            });
            found.extend(sets.map(|((ns, name), _)| {
                format!("retryConstraint of XBackendTrafficPolicy {ns}/{name} is set")
            }));
        }
        for ((ns, name), route) in &objects.http_routes {
            let parents = &route.spec.parent_refs;
            let attached = parents.iter().any(|p| {
                p.is_service()
                    && p.name == target.name
                    && p.namespace.as_deref().unwrap_or(ns) == namespace
            });
            if attached {
                let sets = rules_that_set(&route.spec, field, None);
                found.extend(sets.map(|at| format!("{at} of HTTPRoute {ns}/{name} is set")));
            }
        }
    }
    found
}

/// Paths of the fields of an HTTPRoute's rules that count instead of `field`.
fn rules_that_set<'s>(
    spec: &'s HttpRouteSpec,
    field: &'s str,
    section: Option<&'s str>,
) -> impl Iterator<Item = String> + use<'s> {
    let rules = spec.rules.iter().flatten().enumerate();
    let rules =
        rules.filter(move |(_, rule)| section.is_none_or(|s| rule.name.as_deref() == Some(s)));
    rules.filter_map(move |(i, rule)| {
        let own = gateway_field(rule, field)?;
        Some(format!("spec.rules[{i}].{own}"))
    })
}

fn gateway_field(rule: &HttpRouteRule, field: &str) -> Option<&'static str> {
    let (retry, timeouts) = (rule.retry.as_ref(), rule.timeouts.as_ref());
    let (name, is_set) = match field {
        "retry.attempts" => ("retry.attempts", retry?.attempts.is_some()),
        // GEP-1731: with the stanza, every kind of connection error is tried again.
        "retry.conditions" => ("retry", retry.is_some()),
        "retry.statusCodes" => ("retry.codes", !retry?.codes.is_empty()),
        "retry.backoff" => ("retry.backoff", retry?.backoff.is_some()),
        "timeouts.request" => ("timeouts.request", timeouts?.request.is_some()),
        "timeouts.perTry" => (
            "timeouts.backendRequest",
            timeouts?.backend_request.is_some(),
        ),
        _ => return None,
    };
    is_set.then_some(name)
}

/// Every field that a policy sets, as deep as two policies can differ in.
fn set_fields(spec: &TrafficPolicySpec) -> Vec<&'static str> {
    let TrafficPolicySpec {
        target_refs: _,
        load_balancing,
        retry,
        timeouts,
        circuit_breaking,
        limits,
        rate_limit,
        fault_injection,
    } = spec;
    let mut fields = Vec::new();
    let mut add = |field, set: bool| {
        if set {
            fields.push(field);
        }
    };
    add("loadBalancing", load_balancing.is_some());
    if let Some(retry) = retry {
        add("retry.attempts", retry.attempts.is_some());
        add("retry.conditions", !retry.conditions.is_empty());
        add("retry.statusCodes", !retry.status_codes.is_empty());
        add("retry.grpcCodes", !retry.grpc_codes.is_empty());
        add("retry.backoff", retry.backoff.is_some());
        add("retry.maxBodyBytes", retry.max_body_bytes.is_some());
        add("retry.budget", retry.budget.is_some());
    }
    if let Some(timeouts) = timeouts {
        add("timeouts.request", timeouts.request.is_some());
        add("timeouts.perTry", timeouts.per_try.is_some());
        add(
            "timeouts.responseHeaders",
            timeouts.response_headers.is_some(),
        );
        add("timeouts.idle", timeouts.idle.is_some());
        add("timeouts.connect", timeouts.connect.is_some());
    }
    add("circuitBreaking", circuit_breaking.is_some());
    add("limits", limits.is_some());
    add("rateLimit", rate_limit.is_some());
    add("faultInjection", fault_injection.is_some());
    fields
}

fn reference(target: &TargetReference) -> ParentReference {
    ParentReference {
        group: Some(target.group.clone()),
        kind: Some(target.kind.clone()),
        name: target.name.clone(),
        section_name: target.section_name.clone(),
        ..ParentReference::default()
    }
}

fn policy_target(target: &TargetReference) -> PolicyTarget {
    let kind = match target.kind.as_str() {
        "HTTPRoute" => PolicyTargetKind::HttpRoute,
        "GRPCRoute" => PolicyTargetKind::GrpcRoute,
        _ => PolicyTargetKind::Service,
    };
    PolicyTarget {
        kind: kind.into(),
        name: target.name.clone(),
        section_name: target.section_name.clone().unwrap_or_default(),
    }
}

fn traffic_policy(
    namespace: &str,
    name: &str,
    policy: &TrafficPolicy,
    targets: Vec<PolicyTarget>,
) -> mesh::TrafficPolicy {
    let spec = &policy.spec;
    mesh::TrafficPolicy {
        namespace: namespace.into(),
        name: name.into(),
        created: policy.created(),
        targets,
        load_balancing: spec.load_balancing.as_ref().map(load_balancing),
        retry: spec.retry.as_ref().map(retry),
        timeouts: spec.timeouts.as_ref().map(timeouts),
        circuit_breaking: spec.circuit_breaking.as_ref().map(circuit_breaking),
        limits: spec.limits.as_ref().map(limits),
        rate_limit: spec.rate_limit.as_ref().map(|l| rate_limit(l, namespace)),
        fault: spec.fault_injection.as_ref().map(fault),
    }
}

fn load_balancing(balancing: &LoadBalancing) -> mesh::LoadBalancing {
    let kind = match balancing.kind.as_deref() {
        Some("LeastRequest") => LoadBalancer::LeastRequest,
        Some("RingHash") => LoadBalancer::RingHash,
        Some("Random") => LoadBalancer::Random,
        Some("RoundRobin") => LoadBalancer::RoundRobin,
        _ => LoadBalancer::PeakEwma,
    };
    let key = balancing.hash_key.as_ref();
    let hash_key = match key.map(|k| k.kind.as_str()) {
        Some("Header") => HashKey::Header,
        Some("Cookie") => HashKey::Cookie,
        Some("SourceIP") => HashKey::Source,
        _ => HashKey::Unspecified,
    };
    mesh::LoadBalancing {
        r#type: kind.into(),
        hash_key: hash_key.into(),
        hash_name: key.and_then(|k| k.name.clone()).unwrap_or_default(),
        slow_start_ms: time(&balancing.slow_start),
    }
}

fn retry(retry: &Retry) -> mesh::RetryPolicy {
    let condition = |name: &String| match name.as_str() {
        "ConnectFailure" => RetryCondition::ConnectFailure,
        "RefusedStream" => RetryCondition::RefusedStream,
        "ResetBeforeHeaders" => RetryCondition::ResetBeforeHeaders,
        _ => RetryCondition::Unspecified,
    };
    let backoff = retry.backoff.as_ref();
    let conditions = retry.conditions.iter().map(|c| condition(c).into());
    let codes = retry.status_codes.iter();
    mesh::RetryPolicy {
        attempts: number(retry.attempts),
        conditions: conditions.collect(),
        status_codes: codes.filter_map(|c| (*c).try_into().ok()).collect(),
        grpc_codes: retry
            .grpc_codes
            .iter()
            .filter_map(|c| grpc_code(c))
            .collect(),
        backoff_base_ms: backoff.and_then(|b| time(&b.base)),
        backoff_max_ms: backoff.and_then(|b| time(&b.max)),
        max_body_bytes: retry.max_body_bytes.and_then(|n| n.try_into().ok()),
        budget: retry.budget.as_ref().map(|budget| mesh::RetryBudget {
            percent: number(budget.percent),
            min_per_second: number(budget.min_per_second),
            interval_ms: time(&budget.interval),
        }),
    }
}

fn timeouts(timeouts: &Timeouts) -> mesh::TimeoutPolicy {
    let Timeouts {
        request,
        per_try,
        response_headers,
        idle,
        connect,
    } = timeouts;
    mesh::TimeoutPolicy {
        request_ms: time(request),
        per_try_ms: time(per_try),
        response_headers_ms: time(response_headers),
        idle_ms: time(idle),
        connect_ms: time(connect),
    }
}

fn circuit_breaking(breaking: &CircuitBreaking) -> mesh::CircuitBreaking {
    let CircuitBreaking {
        consecutive_failures,
        min_success_percent,
        min_requests,
        window,
        base_ejection,
        max_ejection,
        max_ejected_percent,
    } = breaking;
    mesh::CircuitBreaking {
        consecutive_failures: number(*consecutive_failures),
        min_success_percent: number(*min_success_percent),
        min_requests: number(*min_requests),
        window_ms: time(window),
        base_ejection_ms: time(base_ejection),
        max_ejection_ms: time(max_ejection),
        max_ejected_percent: number(*max_ejected_percent),
    }
}

fn limits(limits: &Limits) -> mesh::LimitPolicy {
    let Limits {
        max_in_flight,
        max_pending,
        pending_timeout,
    } = limits;
    mesh::LimitPolicy {
        max_in_flight: number(*max_in_flight),
        max_pending: number(*max_pending),
        pending_timeout_ms: time(pending_timeout),
    }
}

fn rate_limit(limit: &RateLimit, namespace: &str) -> mesh::RateLimitPolicy {
    let overrides = limit.overrides.iter().map(|one| {
        let account = &one.service_account;
        mesh::RateOverride {
            namespace: account.namespace.as_deref().unwrap_or(namespace).into(),
            service_account: account.name.clone(),
            rate: Some(rate(&one.rate)),
        }
    });
    mesh::RateLimitPolicy {
        total: limit.total.as_ref().map(rate),
        per_caller: limit.per_caller.as_ref().map(rate),
        overrides: overrides.collect(),
    }
}

/// With its defaults.
fn rate(rate: &Rate) -> mesh::Rate {
    let requests = number(Some(rate.requests)).unwrap_or(0);
    mesh::Rate {
        requests,
        interval_ms: time(&rate.interval).unwrap_or(1_000),
        burst: number(rate.burst).unwrap_or(requests),
    }
}

fn fault(fault: &FaultInjection) -> mesh::FaultInjection {
    let delay = fault.delay.as_ref();
    let abort = fault.abort.as_ref();
    let abort_code = |a: &Abort| grpc_code(a.grpc_status.as_deref()?);
    mesh::FaultInjection {
        delay_share: delay.map_or(0, |d| share(d.percent, d.fraction.as_ref())),
        delay_ms: delay.and_then(|d| duration(&d.duration).ok()).unwrap_or(0),
        abort_share: abort.map_or(0, |a| share(a.percent, a.fraction.as_ref())),
        abort_status: abort.map_or(0, |a| number(a.http_status).unwrap_or(503)),
        abort_grpc_code: abort.and_then(abort_code),
    }
}

/// Hundredths of a percent, rounded up: what was asked for must not become never.
fn share(percent: Option<i64>, fraction: Option<&Fraction>) -> u32 {
    let (numerator, denominator) = match fraction {
        Some(fraction) => (fraction.numerator, fraction.denominator.unwrap_or(100)),
        None => (percent.unwrap_or(100), 100),
    };
    let (numerator, denominator) = (numerator.max(0) as u64, denominator.max(1) as u64);
    let share = (numerator * 10_000).div_ceil(denominator);
    u32::try_from(share.min(10_000)).unwrap_or(10_000)
}

fn number(value: Option<i64>) -> Option<u32> {
    value.and_then(|v| v.try_into().ok())
}

fn time(text: &Option<String>) -> Option<u64> {
    duration(text.as_deref()?).ok()
}
