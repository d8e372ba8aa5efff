//! Several policies for one target.

use mesh_api::proto::mesh::{RetryPolicy, TimeoutPolicy, TrafficPolicy};

/// The policies of one target as one: each field is that of the first which sets it. The fields are those whose
/// conflicts the controller reports: of `retry` and `timeouts` each one, otherwise whole sections.
pub fn together<'a>(
    policies: impl IntoIterator<Item = &'a TrafficPolicy>,
) -> Option<TrafficPolicy> {
    let mut policies = policies.into_iter();
    let mut all = policies.next()?.clone();
    for policy in policies {
        let TrafficPolicy {
            namespace: _,
            name: _,
            created: _,
            targets: _,
            load_balancing,
            retry,
            timeouts,
            circuit_breaking,
            limits,
            rate_limit,
            fault,
        } = policy;
        fill(&mut all.load_balancing, load_balancing);
        fill(&mut all.circuit_breaking, circuit_breaking);
        fill(&mut all.limits, limits);
        fill(&mut all.rate_limit, rate_limit);
        fill(&mut all.fault, fault);
        match (&mut all.retry, retry) {
            (Some(own), Some(other)) => fill_retry(own, other),
            (own, other) => fill(own, other),
        }
        match (&mut all.timeouts, timeouts) {
            (Some(own), Some(other)) => fill_timeouts(own, other),
            (own, other) => fill(own, other),
        }
    }
    Some(all)
}

fn fill<T: Clone>(own: &mut Option<T>, other: &Option<T>) {
    if own.is_none() {
        own.clone_from(other);
    }
}

fn fill_retry(own: &mut RetryPolicy, other: &RetryPolicy) {
    let RetryPolicy {
        attempts,
        conditions,
        status_codes,
        grpc_codes,
        backoff_base_ms,
        backoff_max_ms,
        max_body_bytes,
        budget,
    } = other;
    fill(&mut own.attempts, attempts);
    fill(&mut own.max_body_bytes, max_body_bytes);
    fill(&mut own.budget, budget);
    if own.conditions.is_empty() {
        own.conditions.clone_from(conditions);
    }
    for (own, other) in [
        (&mut own.status_codes, status_codes),
        (&mut own.grpc_codes, grpc_codes),
    ] {
        if own.is_empty() {
            own.clone_from(other);
        }
    }
    // The bounds of one back-off belong together.
    if own.backoff_base_ms.is_none() && own.backoff_max_ms.is_none() {
        own.backoff_base_ms = *backoff_base_ms;
        own.backoff_max_ms = *backoff_max_ms;
    }
}

fn fill_timeouts(own: &mut TimeoutPolicy, other: &TimeoutPolicy) {
    let TimeoutPolicy {
        request_ms,
        per_try_ms,
        response_headers_ms,
        idle_ms,
        connect_ms,
    } = other;
    fill(&mut own.request_ms, request_ms);
    fill(&mut own.per_try_ms, per_try_ms);
    fill(&mut own.response_headers_ms, response_headers_ms);
    fill(&mut own.idle_ms, idle_ms);
    fill(&mut own.connect_ms, connect_ms);
}
