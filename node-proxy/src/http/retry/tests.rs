use std::time::{Instant, SystemTime};

use http::HeaderMap;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::http::policy::{Budget, Retry, State};

fn policy(retry: Retry) -> Policy {
    Policy {
        retry,
        ..Policy::default()
    }
}

const ANSWER: Cause = Cause::Answer {
    pushback: Pushback::None,
};

fn told(status: u16, grpc_code: Option<u32>) -> Told {
    Told {
        status: StatusCode::from_u16(status).unwrap(),
        grpc_code,
    }
}

fn retried(policy: &Policy, cause: Cause, told: Told, method: &Method) -> bool {
    let mut rng = StdRng::seed_from_u64(1);
    should_retry(policy, 0, cause, told, method, true, &mut rng).is_some()
}

#[test]
fn by_default_only_what_cannot_do_harm() {
    let policy = Policy::default();
    for (cause, status, get, post) in [
        (Cause::ConnectFailure, told(503, Some(14)), true, true),
        (Cause::RefusedStream, told(503, Some(14)), true, true),
        (Cause::IdleClosed, told(502, Some(14)), true, false),
        (Cause::ResetBeforeHeaders, told(502, None), false, false),
        (Cause::Timeout, told(504, Some(4)), false, false),
        (ANSWER, told(503, None), false, false),
        (ANSWER, told(200, Some(14)), false, false),
    ] {
        for (method, wanted) in [(Method::GET, get), (Method::PUT, get), (Method::POST, post)] {
            let retried = retried(&policy, cause, status, &method);
            assert_eq!(retried, wanted, "{cause:?} {method}");
        }
    }
}

#[test]
fn what_the_user_allows() {
    let policy = policy(Retry {
        reset_before_headers: true,
        statuses: [StatusCode::SERVICE_UNAVAILABLE].into(),
        grpc_codes: 1 << 14,
        ..Retry::default()
    });
    for (cause, status, wanted) in [
        (Cause::IdleClosed, told(502, None), true),
        (Cause::ResetBeforeHeaders, told(502, None), true),
        (Cause::Timeout, told(504, None), true),
        (ANSWER, told(503, None), true),
        (ANSWER, told(500, None), false),
        (ANSWER, told(200, Some(14)), true),
        (ANSWER, told(200, Some(13)), false),
        (ANSWER, told(200, Some(4_000_000_000)), false),
    ] {
        let retried = retried(&policy, cause, status, &Method::POST);
        assert_eq!(retried, wanted, "{cause:?} {status:?}");
    }
}

#[test]
fn a_failure_is_what_the_caller_would_be_told() {
    let http = policy(Retry {
        connect_failure: false,
        statuses: [502, 504].map(|s| StatusCode::from_u16(s).unwrap()).into(),
        ..Retry::default()
    });
    let grpc = policy(Retry {
        grpc_codes: 1 << 4 | 1 << 14,
        ..Retry::default()
    });
    for (cause, status, by_http, by_grpc) in [
        (Cause::Timeout, told(504, None), true, false),
        (Cause::Timeout, told(504, Some(4)), true, true),
        (Cause::ResetBeforeHeaders, told(502, None), true, false),
        (Cause::ResetBeforeHeaders, told(502, Some(14)), true, true),
        (Cause::ConnectFailure, told(503, None), false, true),
    ] {
        let by = |policy| retried(policy, cause, status, &Method::POST);
        assert_eq!(
            (by(&http), by(&grpc)),
            (by_http, by_grpc),
            "{cause:?} {status:?}"
        );
    }
}

#[test]
fn not_more_often_than_allowed_and_not_without_the_body() {
    let policy = Policy::default();
    let mut rng = StdRng::seed_from_u64(1);
    let mut ask = |retries, replayable| {
        should_retry(
            &policy,
            retries,
            Cause::ConnectFailure,
            told(503, None),
            &Method::GET,
            replayable,
            &mut rng,
        )
    };
    assert_eq!(
        ask(0, true),
        Some(Duration::ZERO),
        "at once, to another endpoint"
    );
    assert!(ask(1, true).is_some());
    assert_eq!(ask(2, true), None);
    assert_eq!(ask(0, false), None);
}

#[test]
fn pauses_grow_with_full_jitter_and_are_bounded() {
    let backoff = Backoff {
        least: Duration::from_millis(100),
        base: Duration::from_millis(25),
        max: Duration::from_millis(250),
    };
    let mut rng = StdRng::seed_from_u64(1);
    for (retry, most) in [(0, 25), (1, 50), (2, 100), (3, 200), (4, 250), (99, 250)] {
        let pauses: Vec<_> = (0..1_000)
            .map(|_| backoff.pause(retry, &mut rng) - backoff.least)
            .collect();
        let most = Duration::from_millis(most);
        assert!(pauses.iter().all(|pause| *pause <= most), "{retry}");
        let mean = pauses.iter().sum::<Duration>() / 1_000;
        assert!(
            mean > most.mul_f64(0.45) && mean < most.mul_f64(0.55),
            "{retry}: {mean:?}"
        );
    }
}

#[test]
fn a_server_that_says_when_is_believed_up_to_a_bound() {
    let policy = policy(Retry {
        statuses: [StatusCode::SERVICE_UNAVAILABLE].into(),
        ..Retry::default()
    });
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let mut rng = StdRng::seed_from_u64(1);
    let in_three = httpdate::fmt_http_date(now + Duration::from_secs(3));
    let in_an_hour = httpdate::fmt_http_date(now + Duration::from_secs(3600));
    let past = httpdate::fmt_http_date(now - Duration::from_secs(3));
    for (name, value, least) in [
        ("retry-after", "2", Some(2_000)),
        ("retry-after", in_three.as_str(), Some(3_000)),
        ("retry-after", past.as_str(), Some(0)),
        ("retry-after", "3600", None),
        ("retry-after", "99999999999999999999999", None),
        ("retry-after", in_an_hour.as_str(), None),
        ("retry-after", "soon", Some(0)),
        ("grpc-retry-pushback-ms", "150", Some(150)),
        ("grpc-retry-pushback-ms", "-1", None),
        ("grpc-retry-pushback-ms", "+150", None),
        ("grpc-retry-pushback-ms", "x", None),
        ("grpc-retry-pushback-ms", "3600000", None),
    ] {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        let cause = Cause::Answer {
            pushback: Pushback::of(&headers, now),
        };
        let told = told(503, None);
        let pause = should_retry(&policy, 0, cause, told, &Method::GET, true, &mut rng);
        match least.map(Duration::from_millis) {
            None => assert_eq!(pause, None, "{value}"),
            Some(least) => {
                let pause = pause.expect(value);
                let jitter = policy.retry.backoff.base;
                assert!(
                    pause >= least && pause <= least + jitter,
                    "{value}: {pause:?}"
                );
            }
        }
    }
}

#[test]
fn the_budget_is_a_share_of_the_requests_of_its_interval() {
    let policy = Policy::default();
    let state = State::new();
    let start = Instant::now();
    for n in 0..1_000 {
        state.request(&policy.retry.budget, start + Duration::from_millis(n));
    }
    let at = start + Duration::from_secs(1);
    let granted = (0..1_000)
        .filter(|_| state.try_retry(&policy.retry.budget, at))
        .count();
    assert_eq!(granted, 200);
    // The requests leave the window; what is left is the floor.
    let later = at + Duration::from_secs(30);
    let granted = (0..1_000)
        .filter(|_| state.try_retry(&policy.retry.budget, later))
        .count();
    assert_eq!(granted, 10);
}

#[test]
fn the_floor_holds_for_every_interval_of_its_own() {
    let policy = policy(Retry {
        budget: Budget {
            percent: 0,
            floor: 3,
            floor_interval: Duration::from_secs(60),
            ..Budget::default()
        },
        ..Retry::default()
    });
    let state = State::new();
    let start = Instant::now() + Duration::from_secs(1);
    let mut granted = 0;
    for second in 0..600 {
        granted +=
            usize::from(state.try_retry(&policy.retry.budget, start + Duration::from_secs(second)));
    }
    // Three at once, then one every twenty seconds.
    assert!((30..=33).contains(&granted), "{granted}");
}

#[test]
fn a_budget_of_nothing_grants_nothing() {
    let policy = policy(Retry {
        budget: Budget {
            percent: 0,
            floor: 0,
            ..Budget::default()
        },
        ..Retry::default()
    });
    let state = State::new();
    state.request(&policy.retry.budget, Instant::now());
    assert!(!state.try_retry(&policy.retry.budget, Instant::now()));
}

#[test]
fn another_interval_begins_with_an_empty_window() {
    let state = State::new();
    let now = Instant::now() + Duration::from_secs(100);
    let before = Policy::default();
    (0..1_000).for_each(|_| state.request(&before.retry.budget, now));
    let after = policy(Retry {
        budget: Budget {
            interval: Duration::from_secs(60),
            floor: 0,
            ..Budget::default()
        },
        ..Retry::default()
    });
    assert!(!state.try_retry(&after.retry.budget, now));
}

/// An outage: every answer is a 503 that may be retried up to five times.
#[test]
fn a_retry_storm_stays_under_a_quarter_more_load() {
    let policy = policy(Retry {
        attempts: 5,
        statuses: [StatusCode::SERVICE_UNAVAILABLE].into(),
        ..Retry::default()
    });
    for rate in [50, 100, 500, 5_000] {
        let mut rng = StdRng::seed_from_u64(1);
        let state = State::new();
        let mut now = Instant::now();
        let (mut requests, mut sent) = (0_u32, 0_u32);
        for _ in 0..rate * 60 {
            now += Duration::from_secs(1) / rate;
            state.request(&policy.retry.budget, now);
            requests += 1;
            sent += 1;
            let (mut retries, mut at) = (0, now);
            while let Some(pause) = should_retry(
                &policy,
                retries,
                ANSWER,
                told(503, None),
                &Method::GET,
                true,
                &mut rng,
            ) {
                at += pause;
                if !state.try_retry(&policy.retry.budget, at) {
                    break;
                }
                retries += 1;
                sent += 1;
            }
        }
        let load = f64::from(sent) / f64::from(requests);
        assert!(load < 1.25, "at {rate} a second: {load}");
        assert!(load > 1.15, "at {rate} a second the budget is used: {load}");
    }
}
