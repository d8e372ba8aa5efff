//! From what users wrote to what is in force.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use mesh_api::proto::mesh;

use super::{
    Abort, BACKOFF_MAX, Budget, ByRule, Fault, Limits, MAX_BODY_BOUND, OverBudget, Policy, Rate,
    RateLimit, Retry, Timeouts, WHOLE,
};
use crate::balance;
use crate::http::retry::Backoff;

/// The policy in force. `service`, `backend`: those of the Service; `rule`, `rule_policy`: those of the
/// route's rule.
pub fn effective(
    service: Option<&mesh::TrafficPolicy>,
    backend: Option<&mesh::BackendTrafficPolicy>,
    rule: Option<&mesh::RouteRule>,
    rule_policy: Option<&mesh::TrafficPolicy>,
) -> Policy {
    // Where only one of the two can say it, or a section is taken as a whole.
    fn section<'a, T>(
        rule: Option<&'a mesh::TrafficPolicy>,
        service: Option<&'a mesh::TrafficPolicy>,
        of: impl Fn(&'a mesh::TrafficPolicy) -> Option<&'a T>,
    ) -> Option<&'a T> {
        rule.and_then(&of).or_else(|| service.and_then(&of))
    }
    Policy {
        balance: balance_policy(
            service.and_then(|p| p.load_balancing.as_ref()),
            service.and_then(|p| p.circuit_breaking.as_ref()),
        ),
        retry: retry(
            section(rule_policy, service, retries),
            retry_budget(
                service.and_then(budget),
                backend.and_then(|backend| backend.retry_constraint.as_ref()),
            ),
            rule.and_then(|rule| rule.retry.as_ref()),
        ),
        timeouts: timeouts(
            service.and_then(|p| p.timeouts.as_ref()),
            rule_policy.and_then(|p| p.timeouts.as_ref()),
            rule,
        ),
        limits: service
            .and_then(|p| p.limits.as_ref())
            .map_or_else(Limits::default, limits),
        rate_limit: service
            .and_then(|p| p.rate_limit.as_ref())
            .map(|rates| Arc::new(rate_limit(rates))),
        fault: section(rule_policy, service, |p| p.fault.as_ref()).map(fault),
        by_rule: ByRule {
            balance: rule_policy
                .and_then(|p| p.load_balancing.as_ref())
                .map(|wanted| balance_policy(Some(wanted), None)),
            budget: rule_policy
                .and_then(budget)
                .map(|wanted| retry_budget(Some(wanted), None)),
        },
    }
}

/// The section, if it says anything but the budget.
fn retries(policy: &mesh::TrafficPolicy) -> Option<&mesh::RetryPolicy> {
    let retry = policy.retry.as_ref()?;
    let budget = mesh::RetryPolicy {
        budget: retry.budget,
        ..Default::default()
    };
    (*retry != budget).then_some(retry)
}

fn budget(policy: &mesh::TrafficPolicy) -> Option<&mesh::RetryBudget> {
    policy.retry.as_ref()?.budget.as_ref()
}

fn balance_policy(
    load_balancing: Option<&mesh::LoadBalancing>,
    circuit_breaking: Option<&mesh::CircuitBreaking>,
) -> balance::Policy {
    let mut policy = balance::Policy::default();
    if let Some(wanted) = load_balancing {
        use mesh::LoadBalancer;
        policy.algorithm = match wanted.r#type() {
            LoadBalancer::Unspecified | LoadBalancer::PeakEwma => balance::Algorithm::PeakEwma,
            LoadBalancer::LeastRequest => balance::Algorithm::LeastRequest,
            LoadBalancer::RingHash => balance::Algorithm::RingHash,
            LoadBalancer::Random => balance::Algorithm::Random,
            LoadBalancer::RoundRobin => balance::Algorithm::RoundRobin,
        };
        policy.hash_key = match wanted.hash_key() {
            mesh::HashKey::Unspecified => None,
            mesh::HashKey::Header => wanted.hash_name.parse().ok().map(balance::HashKey::Header),
            mesh::HashKey::Cookie => {
                Some(balance::HashKey::Cookie(wanted.hash_name.as_str().into()))
            }
            mesh::HashKey::Source => Some(balance::HashKey::Source),
        };
        policy.slow_start = wanted.slow_start_ms.and_then(set_millis);
    }
    policy.breaker = circuit_breaking.map(|wanted| {
        let defaults = balance::Breaker::default();
        let base = wanted
            .base_ejection_ms
            .and_then(set_millis)
            .unwrap_or(defaults.base_ejection);
        let max = wanted
            .max_ejection_ms
            .and_then(set_millis)
            .unwrap_or(defaults.max_ejection);
        balance::Breaker {
            // Each is judged only where it is set, and one of the two is.
            consecutive_failures: wanted.consecutive_failures.unwrap_or(0),
            min_success_percent: wanted.min_success_percent.map(|percent| percent.min(100)),
            min_requests: wanted.min_requests.unwrap_or(defaults.min_requests).max(1),
            window: wanted
                .window_ms
                .and_then(set_millis)
                .unwrap_or(defaults.window),
            base_ejection: base,
            max_ejection: max.max(base),
            max_ejected_percent: wanted
                .max_ejected_percent
                .unwrap_or(defaults.max_ejected_percent)
                .min(100),
        }
    });
    policy
}

fn retry(
    policy: Option<&mesh::RetryPolicy>,
    budget: Budget,
    route: Option<&mesh::RouteRetry>,
) -> Retry {
    let mut retry = Retry {
        budget,
        ..Retry::default()
    };
    if let Some(policy) = policy {
        retry.attempts = policy.attempts.unwrap_or(retry.attempts);
        if !policy.conditions.is_empty() {
            let has = |condition| policy.conditions().any(|c| c == condition);
            retry.connect_failure = has(mesh::RetryCondition::ConnectFailure);
            retry.refused_stream = has(mesh::RetryCondition::RefusedStream);
            retry.reset_before_headers = has(mesh::RetryCondition::ResetBeforeHeaders);
        }
        retry.statuses = statuses(&policy.status_codes);
        retry.grpc_codes = policy
            .grpc_codes
            .iter()
            .filter(|code| **code < u32::BITS)
            .fold(0, |set, code| set | 1 << code);
        if let Some(base) = policy.backoff_base_ms {
            retry.backoff.base = millis(base);
        }
        if let Some(max) = policy.backoff_max_ms {
            retry.backoff.max = millis(max);
        }
        retry.backoff.max = retry.backoff.max.max(retry.backoff.base);
        if let Some(max) = policy.max_body_bytes {
            retry.max_body =
                usize::try_from(max).map_or(MAX_BODY_BOUND, |max| max.min(MAX_BODY_BOUND));
        }
    }
    if let Some(route) = route {
        retry.attempts = route.attempts.unwrap_or(retry.attempts);
        if !route.codes.is_empty() {
            retry.statuses = statuses(&route.codes);
        }
        // GEP-1731: with the stanza, every kind of connection error is tried again.
        retry.connect_failure = true;
        retry.refused_stream = true;
        retry.reset_before_headers = true;
        if let Some(least) = route.backoff_ms.map(millis) {
            // GEP-1731: never sooner; what comes on top keeps callers apart.
            retry.backoff = Backoff {
                least,
                base: least / 4,
                max: least.max(BACKOFF_MAX),
            };
        }
    }
    retry
}

fn retry_budget(
    budget: Option<&mesh::RetryBudget>,
    constraint: Option<&mesh::RetryConstraint>,
) -> Budget {
    let mut effective = Budget::default();
    if let Some(constraint) = constraint {
        return Budget {
            percent: constraint.budget_percent.min(100),
            interval: set_millis(constraint.budget_interval_ms).unwrap_or(effective.interval),
            floor: constraint.min_retry_count,
            floor_interval: set_millis(constraint.min_retry_interval_ms)
                .unwrap_or(effective.floor_interval),
            over: OverBudget::Unavailable,
        };
    }
    if let Some(budget) = budget {
        effective.percent = budget.percent.unwrap_or(effective.percent).min(100);
        effective.floor = budget.min_per_second.unwrap_or(effective.floor);
        effective.interval = budget
            .interval_ms
            .and_then(set_millis)
            .unwrap_or(effective.interval);
    }
    effective
}

fn statuses(codes: &[u32]) -> Arc<[StatusCode]> {
    codes
        .iter()
        .filter_map(|code| StatusCode::from_u16(u16::try_from(*code).ok()?).ok())
        .collect()
}

fn timeouts(
    service: Option<&mesh::TimeoutPolicy>,
    rule: Option<&mesh::TimeoutPolicy>,
    route: Option<&mesh::RouteRule>,
) -> Timeouts {
    let mut timeouts = Timeouts::default();
    // The more specific comes later and wins; 0 takes a timeout away.
    let mut set = |of: fn(&mut Timeouts) -> &mut Option<Duration>, wanted: Option<u64>| {
        if let Some(wanted) = wanted {
            *of(&mut timeouts) = set_millis(wanted);
        }
    };
    for policy in [service, rule].into_iter().flatten() {
        let mesh::TimeoutPolicy {
            request_ms,
            per_try_ms,
            response_headers_ms,
            idle_ms,
            connect_ms,
        } = *policy;
        set(|t| &mut t.request, request_ms);
        set(|t| &mut t.per_try, per_try_ms);
        set(|t| &mut t.response_headers, response_headers_ms);
        set(|t| &mut t.idle, idle_ms);
        set(|t| &mut t.connect, connect_ms);
    }
    if let Some(route) = route {
        set(|t| &mut t.request, route.request_timeout_ms);
        set(|t| &mut t.per_try, route.backend_request_timeout_ms);
    }
    timeouts
}

fn limits(wanted: &mesh::LimitPolicy) -> Limits {
    let defaults = Limits::default();
    Limits {
        max_in_flight: wanted.max_in_flight.map(|max| max as usize),
        max_pending: wanted
            .max_pending
            .map_or(defaults.max_pending, |max| max as usize),
        pending_timeout: wanted
            .pending_timeout_ms
            .map_or(defaults.pending_timeout, millis),
    }
}

fn rate_limit(wanted: &mesh::RateLimitPolicy) -> RateLimit {
    let rate = |rate: &mesh::Rate| Rate {
        requests: rate.requests,
        interval: set_millis(rate.interval_ms).unwrap_or(Duration::from_secs(1)),
        burst: rate.burst.max(1),
    };
    RateLimit {
        total: wanted.total.as_ref().map(rate),
        per_caller: wanted.per_caller.as_ref().map(rate),
        overrides: wanted
            .overrides
            .iter()
            .filter_map(|o| {
                let caller = (o.namespace.clone(), o.service_account.clone());
                Some((caller, rate(o.rate.as_ref()?)))
            })
            .collect(),
    }
}

fn fault(wanted: &mesh::FaultInjection) -> Fault {
    let status = u16::try_from(wanted.abort_status)
        .ok()
        .and_then(|status| StatusCode::from_u16(status).ok())
        .filter(|status| status.as_u16() >= 200)
        .unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    Fault {
        delay_share: wanted.delay_share.min(WHOLE),
        delay: millis(wanted.delay_ms),
        abort_share: wanted.abort_share.min(WHOLE),
        abort: Abort {
            status,
            grpc_code: wanted.abort_grpc_code,
        },
    }
}

/// Longer than this is as good as for ever, and still safe to add to a point in time.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis).min(LONGEST)
}

/// `None` for 0, which means "none" in every policy.
fn set_millis(value: u64) -> Option<Duration> {
    (value > 0).then(|| millis(value))
}
