//! Ranges and enums of a TrafficPolicy, and what cannot stand together.

use std::collections::BTreeSet;

use super::{
    CircuitBreaking, FaultInjection, GRPC_CODES, Limits, LoadBalancing, Rate, RateLimit, Retry,
    TargetReference, Timeouts, TrafficPolicySpec, grpc_code,
};
use crate::providers::field::{Found, Report, steps};
use crate::providers::gateway::check::{range, time};
use crate::providers::gateway::{Fraction, GROUP};

/// Everything that is wrong with a TrafficPolicy.
pub(crate) fn mistakes(spec: &TrafficPolicySpec) -> Vec<Found> {
    let TrafficPolicySpec {
        target_refs,
        load_balancing,
        retry,
        timeouts,
        circuit_breaking,
        limits,
        rate_limit,
        fault_injection,
    } = spec;
    let mut found = Vec::new();
    let mut at = Report::new(steps!["spec"], &mut found);
    targets(target_refs, &mut at);
    if let Some(balancing) = load_balancing {
        load_balancing_fields(balancing, &mut at.at(steps!["loadBalancing"]));
    }
    if let Some(retry) = retry {
        retry_fields(retry, &mut at.at(steps!["retry"]));
    }
    if let Some(timeouts) = timeouts {
        timeout_fields(timeouts, &mut at.at(steps!["timeouts"]));
    }
    if let Some(breaking) = circuit_breaking {
        breaking_fields(breaking, &mut at.at(steps!["circuitBreaking"]));
    }
    if let Some(limits) = limits {
        limit_fields(limits, &mut at.at(steps!["limits"]));
    }
    if let Some(limit) = rate_limit {
        rate_limit_fields(limit, &mut at.at(steps!["rateLimit"]));
    }
    if let Some(fault) = fault_injection {
        fault_fields(fault, &mut at.at(steps!["faultInjection"]));
    }
    // They are about endpoints and pods, which a rule has none of its own.
    if target_refs.iter().any(|t| t.kind != "Service") {
        for (field, set) in [
            ("circuitBreaking", circuit_breaking.is_some()),
            ("limits", limits.is_some()),
            ("rateLimit", rate_limit.is_some()),
        ] {
            if set {
                at.say(steps![field], "is only for targets of kind Service");
            }
        }
    }
    found
}

fn targets(targets: &[TargetReference], at: &mut Report<'_>) {
    if targets.is_empty() || targets.len() > 16 {
        let message = format!("expected 1 to 16 targets, found {}", targets.len());
        at.say(steps!["targetRefs"], message);
    }
    for (i, target) in targets.iter().enumerate() {
        let mut here = at.at(steps!["targetRefs", i]);
        let TargetReference {
            group,
            kind,
            name,
            section_name: _,
        } = target;
        let expected = match kind.as_str() {
            "Service" => Some(""),
            "HTTPRoute" | "GRPCRoute" => Some(GROUP),
            _ => None,
        };
        match expected {
            None => here.say(
                steps!["kind"],
                format!("expected Service, HTTPRoute or GRPCRoute, found {kind:?}"),
            ),
            Some(expected) if expected != group => here.say(
                steps!["group"],
                format!("expected {expected:?} for kind {kind}, found {group:?}"),
            ),
            Some(_) => {}
        }
        if name.is_empty() {
            here.say(steps!["name"], "expected the name of the object");
        }
        if targets[..i].contains(target) {
            here.say(steps![], "is there twice");
        }
    }
}

fn load_balancing_fields(balancing: &LoadBalancing, at: &mut Report<'_>) {
    let kind = balancing.kind.as_deref().unwrap_or("PeakEWMA");
    one_of("type", kind, &LOAD_BALANCERS, at);
    match &balancing.hash_key {
        None if kind == "RingHash" => at.say(steps!["hashKey"], "is needed for type RingHash"),
        None => {}
        Some(_) if kind != "RingHash" => at.say(steps!["hashKey"], "is only for type RingHash"),
        Some(key) => {
            let mut at = at.at(steps!["hashKey"]);
            one_of(
                "type",
                &key.kind,
                &["Header", "Cookie", "SourceIP"],
                &mut at,
            );
            let named = key.name.as_deref().is_some_and(|n| !n.is_empty());
            if key.kind == "SourceIP" && key.name.is_some() {
                at.say(steps!["name"], "is not for type SourceIP");
            } else if key.kind != "SourceIP" && !named {
                at.say(steps!["name"], "expected the name of the header or cookie");
            }
        }
    }
    time("slowStart", balancing.slow_start.as_deref(), 0..=HOUR, at);
}

fn retry_fields(retry: &Retry, at: &mut Report<'_>) {
    range("attempts", retry.attempts, 0..=10, at);
    for (i, condition) in retry.conditions.iter().enumerate() {
        if !CONDITIONS.contains(&condition.as_str()) {
            let known = CONDITIONS.join(", ");
            let message = format!("expected one of {known}, found {condition:?}");
            at.say(steps!["conditions", i], message);
        }
    }
    for (i, code) in retry.status_codes.iter().enumerate() {
        if !(400..=599).contains(code) {
            let message = format!("expected a status from 400 to 599, found {code}");
            at.say(steps!["statusCodes", i], message);
        }
    }
    for (i, code) in retry.grpc_codes.iter().enumerate() {
        if code == "OK" || grpc_code(code).is_none() {
            let known = GRPC_CODES[1..].join(", ");
            let message = format!("expected one of {known}, found {code:?}");
            at.say(steps!["grpcCodes", i], message);
        }
    }
    if let Some(backoff) = &retry.backoff {
        let mut at = at.at(steps!["backoff"]);
        let base = time("base", backoff.base.as_deref(), 1..=MINUTE, &mut at);
        let max = time("max", backoff.max.as_deref(), 1..=5 * MINUTE, &mut at);
        not_below("max", max, "base", base, &mut at);
    }
    // Proxies keep no more of a body (`MAX_BODY_BOUND`).
    range("maxBodyBytes", retry.max_body_bytes, 0..=1 << 20, at);
    if let Some(budget) = &retry.budget {
        let mut at = at.at(steps!["budget"]);
        range("percent", budget.percent, 0..=100, &mut at);
        range("minPerSecond", budget.min_per_second, 0..=MILLION, &mut at);
        let interval = budget.interval.as_deref();
        time("interval", interval, SECOND..=HOUR, &mut at);
    }
}

fn timeout_fields(timeouts: &Timeouts, at: &mut Report<'_>) {
    let Timeouts {
        request,
        per_try,
        response_headers,
        idle,
        connect,
    } = timeouts;
    let mut read = |field, value: &Option<String>| time(field, value.as_deref(), 0..=24 * HOUR, at);
    let whole = read("request", request).filter(|ms| *ms > 0);
    let each = read("perTry", per_try);
    read("responseHeaders", response_headers);
    read("idle", idle);
    read("connect", connect);
    not_below("request", whole, "perTry", each, at);
}

fn breaking_fields(breaking: &CircuitBreaking, at: &mut Report<'_>) {
    range(
        "consecutiveFailures",
        breaking.consecutive_failures,
        1..=1_000,
        at,
    );
    range(
        "minSuccessPercent",
        breaking.min_success_percent,
        1..=100,
        at,
    );
    range("minRequests", breaking.min_requests, 1..=MILLION, at);
    time("window", breaking.window.as_deref(), SECOND..=HOUR, at);
    let base = time(
        "baseEjection",
        breaking.base_ejection.as_deref(),
        100..=HOUR,
        at,
    );
    let max = time(
        "maxEjection",
        breaking.max_ejection.as_deref(),
        100..=24 * HOUR,
        at,
    );
    not_below("maxEjection", max, "baseEjection", base, at);
    range(
        "maxEjectedPercent",
        breaking.max_ejected_percent,
        0..=100,
        at,
    );
    if breaking.consecutive_failures.is_none() && breaking.min_success_percent.is_none() {
        at.say(
            steps![],
            "expected consecutiveFailures, minSuccessPercent or both",
        );
    }
    for (field, set) in [
        ("minRequests", breaking.min_requests.is_some()),
        ("window", breaking.window.is_some()),
    ] {
        if set && breaking.min_success_percent.is_none() {
            at.say(steps![field], "means nothing without minSuccessPercent");
        }
    }
}

fn limit_fields(limits: &Limits, at: &mut Report<'_>) {
    range("maxInFlight", limits.max_in_flight, 1..=MILLION, at);
    range("maxPending", limits.max_pending, 0..=MILLION, at);
    time(
        "pendingTimeout",
        limits.pending_timeout.as_deref(),
        1..=MINUTE,
        at,
    );
    if limits.max_in_flight.is_none() {
        at.say(steps!["maxInFlight"], "is needed");
    }
}

fn rate_limit_fields(limit: &RateLimit, at: &mut Report<'_>) {
    if limit.total.is_none() && limit.per_caller.is_none() && limit.overrides.is_empty() {
        at.say(steps![], "expected total, perCaller or overrides");
    }
    for (field, rate) in [("total", &limit.total), ("perCaller", &limit.per_caller)] {
        if let Some(rate) = rate {
            rate_fields(rate, &mut at.at(steps![field]));
        }
    }
    if limit.overrides.len() > 64 {
        let message = format!(
            "expected at most 64 entries, found {}",
            limit.overrides.len()
        );
        at.say(steps!["overrides"], message);
    }
    let mut seen = BTreeSet::new();
    for (i, one) in limit.overrides.iter().enumerate() {
        let mut at = at.at(steps!["overrides", i]);
        rate_fields(&one.rate, &mut at.at(steps!["rate"]));
        let account = &one.service_account;
        if account.name.is_empty() {
            let message = "expected the name of a service account";
            at.say(steps!["serviceAccount", "name"], message);
        } else if !seen.insert((&account.namespace, &account.name)) {
            at.say(steps!["serviceAccount"], "has another override");
        }
    }
}

fn rate_fields(rate: &Rate, at: &mut Report<'_>) {
    range("requests", Some(rate.requests), 1..=MILLION, at);
    time("interval", rate.interval.as_deref(), 1..=24 * HOUR, at);
    range("burst", rate.burst, 1..=MILLION, at);
}

fn fault_fields(fault: &FaultInjection, at: &mut Report<'_>) {
    if let Some(delay) = &fault.delay {
        let mut at = at.at(steps!["delay"]);
        time("duration", Some(&delay.duration), 1..=5 * MINUTE, &mut at);
        share(delay.percent, delay.fraction.as_ref(), &mut at);
    }
    if let Some(abort) = &fault.abort {
        let mut at = at.at(steps!["abort"]);
        range("httpStatus", abort.http_status, 400..=599, &mut at);
        if let Some(status) = &abort.grpc_status {
            one_of("grpcStatus", status, &GRPC_CODES[1..], &mut at);
        }
        share(abort.percent, abort.fraction.as_ref(), &mut at);
    }
    if fault.delay.is_none() && fault.abort.is_none() {
        at.say(steps![], "expected delay, abort or both");
    }
}

fn share(percent: Option<i64>, fraction: Option<&Fraction>, at: &mut Report<'_>) {
    range("percent", percent, 0..=100, at);
    let Some(fraction) = fraction else { return };
    if percent.is_some() {
        at.say(steps!["fraction"], "cannot stand beside percent");
    }
    let mut at = at.at(steps!["fraction"]);
    range("denominator", fraction.denominator, 1..=MILLION, &mut at);
    let most = fraction.denominator.unwrap_or(100).max(0);
    range("numerator", Some(fraction.numerator), 0..=most, &mut at);
}

fn one_of(field: &str, value: &str, known: &[&str], at: &mut Report<'_>) {
    if !known.contains(&value) {
        let known = known.join(", ");
        let message = format!("expected one of {known}, found {value:?}");
        at.say(steps![field], message);
    }
}

fn not_below(
    field: &str,
    value: Option<u64>,
    other: &str,
    least: Option<u64>,
    at: &mut Report<'_>,
) {
    if let (Some(value), Some(least)) = (value, least)
        && value < least
    {
        at.say(steps![field], format!("must not be shorter than {other}"));
    }
}

const LOAD_BALANCERS: [&str; 5] = [
    "PeakEWMA",
    "LeastRequest",
    "RingHash",
    "Random",
    "RoundRobin",
];
const CONDITIONS: [&str; 3] = ["ConnectFailure", "RefusedStream", "ResetBeforeHeaders"];
const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const MILLION: i64 = 1_000_000;
