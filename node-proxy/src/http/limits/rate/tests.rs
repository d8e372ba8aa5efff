use super::*;

fn rate(requests: u32, seconds: u64, burst: u32) -> Rate {
    Rate {
        requests,
        interval: Duration::from_secs(seconds),
        burst,
    }
}

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "demo", account).unwrap()
}

fn total(rate: Rate) -> RateLimit {
    RateLimit {
        total: Some(rate),
        ..RateLimit::default()
    }
}

#[test]
fn a_burst_at_once_then_evenly_and_the_wait_is_told() {
    let start = Instant::now();
    let limiter = RateLimiter::new(start);
    let limit = total(rate(10, 1, 3));
    let check = |millis| limiter.check(&limit, None, start + Duration::from_millis(millis));
    for _ in 0..3 {
        assert_eq!(check(0), Ok(()));
    }
    let limited = check(0).unwrap_err();
    assert_eq!(limited.retry_after, Duration::from_millis(100));
    assert_eq!(limited.retry_after_seconds(), 1);
    assert_eq!(
        check(60).unwrap_err().retry_after,
        Duration::from_millis(40)
    );
    assert_eq!(check(100), Ok(()));
    assert!(check(100).is_err());
    // Refused ones used up nothing, idle time is worth no more than the burst.
    for _ in 0..3 {
        assert_eq!(check(60_000), Ok(()));
    }
    assert!(check(60_000).is_err());
}

#[test]
fn another_rate_counts_at_once() {
    let start = Instant::now();
    let limiter = RateLimiter::new(start);
    let slow = total(rate(1, 3600, 1));
    let fast = total(rate(1000, 1, 1000));
    assert_eq!(limiter.check(&slow, None, start), Ok(()));
    assert!(limiter.check(&slow, None, start).is_err());
    // At most what the new rate takes to have its burst back.
    let wait = limiter.check(&fast, None, start).unwrap_err().retry_after;
    assert_eq!(wait, Duration::from_millis(1));
    let soon = start + Duration::from_millis(5);
    assert_eq!(limiter.check(&fast, None, soon), Ok(()));
}

#[test]
fn over_time_exactly_the_rate_passes() {
    let start = Instant::now();
    let limiter = RateLimiter::new(start);
    let limit = total(rate(50, 1, 1));
    let passed = (0..10_000)
        .filter(|millis| {
            limiter
                .check(&limit, None, start + Duration::from_millis(*millis))
                .is_ok()
        })
        .count();
    assert_eq!(passed, 500);
}

#[test]
fn callers_have_rates_of_their_own_and_overrides() {
    let now = Instant::now();
    let limiter = RateLimiter::new(now);
    let limit = RateLimit {
        total: None,
        per_caller: Some(rate(1, 1, 2)),
        overrides: vec![(("demo".into(), "batch".into()), rate(1, 1, 1))],
    };
    let passed = |caller: Option<&Identity>| {
        (0..10)
            .filter(|_| limiter.check(&limit, caller, now).is_ok())
            .count()
    };
    assert_eq!(passed(Some(&identity("web"))), 2);
    assert_eq!(passed(Some(&identity("api"))), 2);
    assert_eq!(passed(Some(&identity("batch"))), 1);
    assert_eq!(passed(None), 2);
}

#[test]
fn what_the_total_refuses_is_not_charged_to_the_caller() {
    let start = Instant::now();
    let limiter = RateLimiter::new(start);
    let limit = RateLimit {
        total: Some(rate(1, 1, 1)),
        per_caller: Some(rate(1, 10, 2)),
        overrides: vec![],
    };
    let (web, api) = (identity("web"), identity("api"));
    assert!(limiter.check(&limit, Some(&api), start).is_ok());
    for _ in 0..10 {
        assert!(limiter.check(&limit, Some(&web), start).is_err());
    }
    let later = start + Duration::from_secs(1);
    assert!(limiter.check(&limit, Some(&web), later).is_ok());
    let later = start + Duration::from_secs(2);
    assert!(limiter.check(&limit, Some(&web), later).is_ok());
}

#[test]
fn a_rate_of_nothing_lets_nothing_through() {
    let now = Instant::now();
    let limited = RateLimiter::new(now)
        .check(&total(rate(0, 5, 1)), None, now)
        .unwrap_err();
    assert_eq!(limited.retry_after, Duration::from_secs(5));
}

#[test]
fn the_number_of_callers_is_bounded_and_forgets_only_the_idle() {
    let start = Instant::now();
    let limiter = RateLimiter::new(start);
    let limit = RateLimit {
        per_caller: Some(rate(1, 10, 1)),
        ..RateLimit::default()
    };
    for n in 0..MAX_CALLERS {
        let caller = identity(&format!("caller-{n}"));
        assert!(limiter.check(&limit, Some(&caller), start).is_ok());
    }
    assert_eq!(limiter.callers(), MAX_CALLERS);
    // Full of callers that are not idle: those beyond share one rate, none is forgotten.
    assert!(limiter.check(&limit, Some(&identity("one")), start).is_ok());
    assert!(
        limiter
            .check(&limit, Some(&identity("two")), start)
            .is_err()
    );
    let known = identity("caller-0");
    assert!(limiter.check(&limit, Some(&known), start).is_err());
    assert_eq!(limiter.callers(), MAX_CALLERS);
    let later = start + Duration::from_secs(11);
    assert!(limiter.check(&limit, Some(&identity("two")), later).is_ok());
    assert_eq!(limiter.callers(), 1);
}

#[test]
fn what_is_given_back_can_be_taken_again() {
    let now = Instant::now();
    let limiter = RateLimiter::new(now);
    let limit = RateLimit {
        total: Some(rate(1, 10, 2)),
        per_caller: Some(rate(1, 10, 1)),
        overrides: Vec::new(),
    };
    let (web, other) = (identity("web"), identity("other"));
    limiter.check(&limit, Some(&web), now).unwrap();
    assert!(limiter.check(&limit, Some(&web), now).is_err());
    limiter.give_back(&limit, Some(&web), now);
    for caller in [&web, &other] {
        assert_eq!(limiter.check(&limit, Some(caller), now), Ok(()));
    }
    assert!(
        limiter.check(&limit, None, now).is_err(),
        "the total is used up"
    );
}
