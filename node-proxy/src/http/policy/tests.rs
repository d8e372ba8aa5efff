use mesh_api::proto::mesh;

use super::*;

fn traffic() -> mesh::TrafficPolicy {
    mesh::TrafficPolicy::default()
}

#[test]
fn nothing_written_means_the_documented_defaults() {
    let policy = effective(None, None, None, None);
    assert_eq!(policy, Policy::default());
    let Retry {
        attempts,
        connect_failure,
        refused_stream,
        reset_before_headers,
        statuses,
        grpc_codes,
        max_body,
        budget,
        ..
    } = policy.retry;
    assert_eq!(
        (
            attempts,
            connect_failure,
            refused_stream,
            reset_before_headers
        ),
        (2, true, true, false)
    );
    assert!(statuses.is_empty() && grpc_codes == 0);
    assert_eq!(max_body, 65_536);
    assert_eq!(
        (budget.percent, budget.interval.as_secs(), budget.floor),
        (20, 10, 10)
    );
    assert_eq!(
        policy.timeouts,
        Timeouts {
            request: None,
            per_try: None,
            response_headers: None,
            idle: None,
            connect: None,
        }
    );
    assert_eq!(policy.balance.algorithm, balance::Algorithm::PeakEwma);
    assert_eq!(policy.balance.breaker, None);
    assert_eq!(policy.limits.max_in_flight, None);
}

#[test]
fn empty_resources_change_nothing() {
    let policy = effective(
        Some(&traffic()),
        Some(&mesh::BackendTrafficPolicy::default()),
        Some(&mesh::RouteRule::default()),
        Some(&traffic()),
    );
    assert_eq!(policy, Policy::default());
}

#[test]
fn the_routes_timeouts_win_and_zero_takes_one_away() {
    let service = mesh::TrafficPolicy {
        timeouts: Some(mesh::TimeoutPolicy {
            request_ms: Some(1_000),
            per_try_ms: Some(100),
            response_headers_ms: Some(50),
            idle_ms: Some(60_000),
            connect_ms: Some(0),
        }),
        ..traffic()
    };
    let rule_policy = mesh::TrafficPolicy {
        timeouts: Some(mesh::TimeoutPolicy {
            request_ms: Some(2_000),
            response_headers_ms: Some(0),
            ..Default::default()
        }),
        ..traffic()
    };
    let rule = mesh::RouteRule {
        request_timeout_ms: Some(3_000),
        backend_request_timeout_ms: Some(0),
        ..Default::default()
    };
    let of = |rule, rule_policy| effective(Some(&service), None, rule, rule_policy).timeouts;
    let millis = |ms| Some(Duration::from_millis(ms));
    let all = of(Some(&rule), Some(&rule_policy));
    assert_eq!(
        all,
        Timeouts {
            request: millis(3_000),
            per_try: None,
            response_headers: None,
            idle: millis(60_000),
            connect: None,
        }
    );
    let without_route = of(None, Some(&rule_policy));
    assert_eq!(
        (without_route.request, without_route.per_try),
        (millis(2_000), millis(100))
    );
}

#[test]
fn a_routes_retry_wins_where_it_is_set_and_allows_connection_errors() {
    let service = mesh::TrafficPolicy {
        retry: Some(mesh::RetryPolicy {
            attempts: Some(5),
            conditions: vec![mesh::RetryCondition::ConnectFailure as i32],
            status_codes: vec![500, 503],
            grpc_codes: vec![14, 99],
            backoff_base_ms: Some(10),
            backoff_max_ms: Some(5),
            max_body_bytes: Some(u64::MAX),
            budget: None,
        }),
        ..traffic()
    };
    let alone = effective(Some(&service), None, None, None).retry;
    assert_eq!(alone.attempts, 5);
    assert!(alone.connect_failure && !alone.refused_stream && !alone.reset_before_headers);
    assert_eq!(alone.grpc_codes, 1 << 14);
    assert_eq!(alone.max_body, MAX_BODY_BOUND);
    assert_eq!(alone.backoff.max, alone.backoff.base, "clamped");
    let rule = mesh::RouteRule {
        retry: Some(mesh::RouteRetry {
            codes: vec![502],
            attempts: None,
            backoff_ms: Some(100),
        }),
        ..Default::default()
    };
    let both = effective(Some(&service), None, Some(&rule), None).retry;
    assert_eq!(both.attempts, 5, "not set on the route");
    assert_eq!(*both.statuses, [StatusCode::BAD_GATEWAY]);
    assert!(both.connect_failure && both.refused_stream && both.reset_before_headers);
    assert_eq!(both.grpc_codes, 1 << 14);
    assert_eq!(both.backoff.least, Duration::from_millis(100));
}

#[test]
fn a_retry_constraint_wins_over_a_budget_and_answers_503() {
    let service = mesh::TrafficPolicy {
        retry: Some(mesh::RetryPolicy {
            budget: Some(mesh::RetryBudget {
                percent: Some(150),
                min_per_second: Some(1),
                interval_ms: Some(2_000),
            }),
            ..Default::default()
        }),
        ..traffic()
    };
    let rule_policy = mesh::TrafficPolicy {
        retry: Some(mesh::RetryPolicy::default()),
        ..traffic()
    };
    let own = effective(Some(&service), None, None, Some(&rule_policy))
        .retry
        .budget;
    assert_eq!((own.percent, own.floor), (100, 1), "the Service's, clamped");
    assert_eq!(own.over, OverBudget::Original);
    let backend = mesh::BackendTrafficPolicy {
        retry_constraint: Some(mesh::RetryConstraint {
            budget_percent: 30,
            budget_interval_ms: 20_000,
            min_retry_count: 3,
            min_retry_interval_ms: 2_000,
        }),
        ..Default::default()
    };
    let constrained = effective(Some(&service), Some(&backend), None, None)
        .retry
        .budget;
    assert_eq!(
        constrained,
        Budget {
            percent: 30,
            interval: Duration::from_secs(20),
            floor: 3,
            floor_interval: Duration::from_secs(2),
            over: OverBudget::Unavailable,
        }
    );
}

#[test]
fn sections_of_a_rules_policy_replace_the_services() {
    let fault = |share| mesh::FaultInjection {
        abort_share: share,
        abort_status: 9_999,
        ..Default::default()
    };
    let service = mesh::TrafficPolicy {
        load_balancing: Some(mesh::LoadBalancing {
            r#type: mesh::LoadBalancer::RoundRobin as i32,
            slow_start_ms: Some(30_000),
            ..Default::default()
        }),
        fault: Some(fault(1)),
        circuit_breaking: Some(mesh::CircuitBreaking {
            base_ejection_ms: Some(20_000),
            max_ejected_percent: Some(1_000),
            min_success_percent: Some(90),
            ..Default::default()
        }),
        ..traffic()
    };
    let rule_policy = mesh::TrafficPolicy {
        load_balancing: Some(mesh::LoadBalancing {
            r#type: mesh::LoadBalancer::RingHash as i32,
            hash_key: mesh::HashKey::Header as i32,
            hash_name: "X-User".into(),
            ..Default::default()
        }),
        fault: Some(fault(20_000)),
        circuit_breaking: Some(mesh::CircuitBreaking::default()),
        ..traffic()
    };
    let policy = effective(Some(&service), None, None, Some(&rule_policy));
    assert_eq!(policy.balance.algorithm, balance::Algorithm::RoundRobin);
    // The backend's breaker, whoever says how it is balanced.
    let backend = effective(Some(&service), None, None, None);
    let balance = policy.by_rule.balance(&backend);
    assert_eq!(balance.algorithm, balance::Algorithm::RingHash);
    assert_eq!(
        balance.hash_key,
        Some(balance::HashKey::Header("x-user".parse().unwrap()))
    );
    assert_eq!(balance.slow_start, None, "the section as a whole");
    assert_eq!(balance.breaker, backend.balance.breaker);
    let none = effective(Some(&service), None, None, Some(&traffic()));
    assert_eq!(*none.by_rule.balance(&backend), backend.balance);
    let fault = policy.fault.unwrap();
    assert_eq!(
        (fault.abort_share, fault.abort.status),
        (WHOLE, StatusCode::SERVICE_UNAVAILABLE)
    );
    let breaker = policy.balance.breaker.unwrap();
    assert_eq!(breaker.min_success_percent, Some(90), "the Service's");
    assert_eq!(breaker.consecutive_failures, 0, "not set, not judged");
    assert_eq!(breaker.max_ejected_percent, 100);
    assert_eq!(breaker.max_ejection, breaker.base_ejection);
}

#[test]
fn the_rates_of_callers() {
    let rate = |requests| mesh::Rate {
        requests,
        interval_ms: 1_000,
        burst: 0,
    };
    let service = mesh::TrafficPolicy {
        rate_limit: Some(mesh::RateLimitPolicy {
            total: Some(rate(100)),
            per_caller: Some(rate(10)),
            overrides: vec![mesh::RateOverride {
                namespace: "demo".into(),
                service_account: "batch".into(),
                rate: Some(rate(1)),
            }],
        }),
        ..traffic()
    };
    let limit = effective(Some(&service), None, None, None)
        .rate_limit
        .unwrap();
    let of = |namespace, account| {
        let caller = Identity::new("cluster.local", namespace, account).unwrap();
        limit.of(Some(&caller)).unwrap().requests
    };
    assert_eq!(of("demo", "batch"), 1);
    assert_eq!(of("other", "batch"), 10);
    assert_eq!(of("demo", "web"), 10);
    let none = limit.of(None).unwrap();
    assert_eq!((none.requests, none.burst), (10, 1));
}

#[test]
fn absurd_durations_are_still_safe_to_add() {
    let service = mesh::TrafficPolicy {
        timeouts: Some(mesh::TimeoutPolicy {
            request_ms: Some(u64::MAX),
            ..Default::default()
        }),
        ..traffic()
    };
    let timeouts = effective(Some(&service), None, None, None).timeouts;
    assert!(
        Instant::now()
            .checked_add(timeouts.request.unwrap())
            .is_some()
    );
}

#[test]
fn the_retry_budget_is_the_backends_unless_the_rule_has_one() {
    let of = |percent| mesh::TrafficPolicy {
        retry: Some(mesh::RetryPolicy {
            budget: Some(mesh::RetryBudget {
                percent: Some(percent),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..traffic()
    };
    let constrained = mesh::BackendTrafficPolicy {
        retry_constraint: Some(mesh::RetryConstraint {
            budget_percent: 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    let (parent, backend) = (of(50), effective(Some(&of(30)), None, None, None));
    let constrained = effective(Some(&of(30)), Some(&constrained), None, None);
    let by_parent = effective(Some(&parent), None, None, None).by_rule;
    let by_rule = effective(Some(&parent), None, None, Some(&of(40))).by_rule;
    assert_eq!(by_parent.budget(&backend).percent, 30);
    assert_eq!(by_rule.budget(&backend).percent, 40);
    let interval = by_rule.budget(&backend).interval;
    assert_eq!(interval, backend.retry.budget.interval, "one count");
    let mut twice = of(30);
    twice.retry.as_mut().unwrap().attempts = Some(5);
    let merged = effective(Some(&twice), None, None, Some(&of(40)));
    assert_eq!(merged.retry.attempts, 5, "a budget is no section");
    let over = by_rule.budget(&constrained);
    assert_eq!((over.percent, over.over), (1, OverBudget::Unavailable));
}

#[test]
fn of_several_policies_each_field_is_of_the_first_that_sets_it() {
    let timeouts = |request_ms, connect_ms| {
        Some(mesh::TimeoutPolicy {
            request_ms,
            connect_ms,
            ..Default::default()
        })
    };
    let first = mesh::TrafficPolicy {
        timeouts: timeouts(Some(1), None),
        retry: Some(mesh::RetryPolicy {
            attempts: Some(1),
            backoff_base_ms: Some(10),
            ..Default::default()
        }),
        ..traffic()
    };
    let second = mesh::TrafficPolicy {
        timeouts: timeouts(Some(2), Some(3)),
        retry: Some(mesh::RetryPolicy {
            attempts: Some(9),
            status_codes: vec![503],
            backoff_max_ms: Some(1),
            ..Default::default()
        }),
        limits: Some(mesh::LimitPolicy {
            max_in_flight: Some(7),
            ..Default::default()
        }),
        ..traffic()
    };
    let all = together([&first, &second]).unwrap();
    assert_eq!(all.timeouts, timeouts(Some(1), Some(3)));
    assert_eq!(all.limits, second.limits);
    let retry = all.retry.unwrap();
    assert_eq!(
        (retry.attempts, &retry.status_codes[..]),
        (Some(1), &[503][..])
    );
    assert_eq!(
        (retry.backoff_base_ms, retry.backoff_max_ms),
        (Some(10), None)
    );
    assert_eq!(together([]), None);
}
