use std::collections::HashMap;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
fn spec(address: &str, ready: bool) -> EndpointSpec {
    EndpointSpec {
        address: address.parse().unwrap(),
        ready,
        serving: true,
        terminating: !ready,
        node: "".into(),
        zone: "".into(),
        for_zones: vec![],
        for_nodes: vec![],
    }
}

#[test]
fn the_less_loaded_of_two_is_taken() {
    let set = EndpointSet::new();
    set.set(vec![spec("10.0.0.1:80", true), spec("10.0.0.2:80", true)]);
    // With two endpoints both are always drawn, so the loads can differ by one at most.
    let held: Vec<_> = (0..100).map(|_| set.pick(false, &[]).unwrap()).collect();
    let loads: Vec<_> = set.endpoints().iter().map(|e| e.pending()).collect();
    assert_eq!(loads, [50, 50]);
    drop(held);
    assert!(set.endpoints().iter().all(|e| e.pending() == 0));
}

#[test]
fn load_survives_updates_and_removed_endpoints_are_not_picked() {
    let set = EndpointSet::new();
    set.set(vec![spec("10.0.0.1:80", true)]);
    let held = set.pick(false, &[]).unwrap();
    set.set(vec![spec("10.0.0.1:80", true), spec("10.0.0.2:80", true)]);
    assert_eq!(
        set.pick(false, &[]).unwrap().address(),
        "10.0.0.2:80".parse().unwrap()
    );
    set.set(vec![spec("10.0.0.2:80", true)]);
    assert_eq!(
        set.pick(false, &[]).unwrap().address(),
        "10.0.0.2:80".parse().unwrap()
    );
    drop(held);
}

#[test]
fn another_endpoint_after_a_failed_one() {
    let set = EndpointSet::new();
    set.set(vec![spec("10.0.0.1:80", true), spec("10.0.0.2:80", true)]);
    let tried = ["10.0.0.1:80".parse().unwrap()];
    for _ in 0..20 {
        assert_eq!(
            set.pick(false, &tried).unwrap().address(),
            "10.0.0.2:80".parse().unwrap()
        );
    }
    assert!(set.pick(true, &[]).is_none(), "no endpoint of that family");
}

#[test]
fn terminating_endpoints_serve_only_when_none_is_ready() {
    let set = EndpointSet::new();
    set.set(vec![spec("10.0.0.1:80", false), spec("10.0.0.2:80", true)]);
    assert_eq!(set.endpoints().len(), 1);
    set.set(vec![spec("10.0.0.1:80", false)]);
    assert_eq!(set.endpoints().len(), 1);
}

fn addresses(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("10.0.0.{n}:80")).collect()
}

fn set_of(count: usize) -> EndpointSet {
    let set = EndpointSet::new();
    set.set(addresses(count).iter().map(|a| spec(a, true)).collect());
    set
}

fn at(policy: &Policy, now: Instant) -> PickContext<'_> {
    PickContext {
        policy,
        v6: false,
        tried: &[],
        hash: None,
        session: None,
        node: "node-1",
        zone: "a",
        local_only: false,
        now,
    }
}

fn with(algorithm: Algorithm) -> Policy {
    Policy {
        algorithm,
        ..Policy::default()
    }
}

/// How often each endpoint is picked, each pick answered at once.
fn shares(
    set: &EndpointSet,
    context: &PickContext<'_>,
    picks: usize,
) -> HashMap<SocketAddr, usize> {
    let mut rng = StdRng::seed_from_u64(7);
    let mut shares = HashMap::new();
    for _ in 0..picks {
        let pick = set.pick_by(context, &mut rng).unwrap();
        *shares.entry(pick.address()).or_default() += 1;
    }
    shares
}

const ANSWER: Outcome = Outcome {
    success: true,
    latency: Duration::from_millis(5),
};
const FAILURE: Outcome = Outcome {
    success: false,
    latency: Duration::from_millis(5),
};

#[test]
fn every_algorithm_spreads_over_equal_endpoints() {
    let now = Instant::now();
    for algorithm in [
        Algorithm::PeakEwma,
        Algorithm::LeastRequest,
        Algorithm::Random,
        Algorithm::RoundRobin,
    ] {
        let set = set_of(4);
        let policy = with(algorithm);
        let shares = shares(&set, &at(&policy, now), 4_000);
        assert_eq!(shares.len(), 4, "{algorithm:?}");
        for (address, share) in shares {
            assert!(
                (900..1_100).contains(&share),
                "{algorithm:?} {address} {share}"
            );
        }
    }
}

#[test]
fn a_key_stays_with_its_endpoint_and_moves_only_when_that_goes() {
    let now = Instant::now();
    let policy = with(Algorithm::RingHash);
    let pick = |set: &EndpointSet, key: u64| {
        let context = PickContext {
            hash: Some(hash::of(&key.to_be_bytes())),
            ..at(&policy, now)
        };
        set.pick_with(&context).unwrap().address()
    };
    let set = set_of(5);
    let before: Vec<_> = (0..10_000).map(|key| pick(&set, key)).collect();
    let mut shares: HashMap<_, usize> = HashMap::new();
    for address in &before {
        *shares.entry(*address).or_default() += 1;
    }
    assert!(
        shares.values().all(|n| (1_850..2_150).contains(n)),
        "{shares:?}"
    );
    // Another proxy comes to the same answer.
    let other = set_of(5);
    assert!((0..100).all(|key| pick(&other, key) == before[key as usize]));
    let gone: SocketAddr = "10.0.0.3:80".parse().unwrap();
    let rest = addresses(5).into_iter().filter(|a| a.parse() != Ok(gone));
    set.set(rest.map(|a| spec(&a, true)).collect());
    for (key, before) in before.iter().enumerate() {
        let after = pick(&set, key as u64);
        assert!(after == *before || *before == gone, "key {key}");
    }
}

#[test]
fn requests_without_the_key_are_spread() {
    let set = set_of(3);
    let policy = with(Algorithm::RingHash);
    assert_eq!(shares(&set, &at(&policy, Instant::now()), 300).len(), 3);
}

#[test]
fn hints_of_the_zone_count_only_if_all_have_them() {
    let now = Instant::now();
    let policy = Policy::default();
    let zoned = |address: &str, zone: &str| EndpointSpec {
        for_zones: vec![zone.into()],
        ..spec(address, true)
    };
    let set = EndpointSet::new();
    set.set(vec![
        zoned("10.0.0.1:80", "a"),
        zoned("10.0.0.2:80", "a"),
        zoned("10.0.0.3:80", "b"),
    ]);
    let near = shares(&set, &at(&policy, now), 100);
    assert_eq!(near.len(), 2);
    assert!(!near.contains_key(&"10.0.0.3:80".parse().unwrap()));
    // Both tried: over to the other zone.
    let tried = [
        "10.0.0.1:80".parse().unwrap(),
        "10.0.0.2:80".parse().unwrap(),
    ];
    let context = PickContext {
        tried: &tried,
        ..at(&policy, now)
    };
    assert_eq!(
        set.pick_with(&context).unwrap().address().to_string(),
        "10.0.0.3:80"
    );
    // A caller in a zone that no hint names.
    let elsewhere = PickContext {
        zone: "c",
        ..at(&policy, now)
    };
    assert_eq!(shares(&set, &elsewhere, 100).len(), 3);
    set.set(vec![
        zoned("10.0.0.1:80", "a"),
        spec("10.0.0.2:80", true),
        zoned("10.0.0.3:80", "b"),
    ]);
    assert_eq!(
        shares(&set, &at(&policy, now), 100).len(),
        3,
        "one has no hints"
    );
}

#[test]
fn hints_of_the_node_come_before_those_of_the_zone() {
    let policy = Policy::default();
    let hinted = |address: &str, node: &str, zone: &str| EndpointSpec {
        for_nodes: vec![node.into()],
        for_zones: vec![zone.into()],
        ..spec(address, true)
    };
    let set = EndpointSet::new();
    set.set(vec![
        hinted("10.0.0.1:80", "node-1", "a"),
        hinted("10.0.0.2:80", "node-2", "a"),
        hinted("10.0.0.3:80", "node-3", "b"),
    ]);
    let mut tried = Vec::new();
    for expected in ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"] {
        let context = PickContext {
            tried: &tried,
            ..at(&policy, Instant::now())
        };
        let address = set.pick_with(&context).unwrap().address();
        assert_eq!(address.to_string(), expected);
        tried.push(address);
    }
}

#[test]
fn local_only_never_spills_over() {
    let now = Instant::now();
    let policy = Policy::default();
    let of_node = |address: &str, node: &str, ready| EndpointSpec {
        node: node.into(),
        ..spec(address, ready)
    };
    let local: fn(&Policy, Instant) -> PickContext<'_> = |policy, now| PickContext {
        local_only: true,
        ..at(policy, now)
    };
    let set = EndpointSet::new();
    set.set(vec![
        of_node("10.0.0.1:80", "node-1", true),
        of_node("10.0.0.2:80", "node-2", true),
    ]);
    assert_eq!(shares(&set, &local(&policy, now), 50).len(), 1);
    let tried = ["10.0.0.1:80".parse().unwrap()];
    let again = PickContext {
        tried: &tried,
        ..local(&policy, now)
    };
    assert!(set.pick_with(&again).is_none());
    let session = PickContext {
        session: Some("10.0.0.2:80".parse().unwrap()),
        ..local(&policy, now)
    };
    assert_eq!(
        set.pick_with(&session).unwrap().address().to_string(),
        "10.0.0.1:80"
    );
    // The node's own is going away: still better than none, as kube-proxy does.
    set.set(vec![
        of_node("10.0.0.1:80", "node-1", false),
        of_node("10.0.0.2:80", "node-2", true),
    ]);
    assert_eq!(shares(&set, &local(&policy, now), 50).len(), 1);
    assert_eq!(
        set.pick_with(&at(&policy, now))
            .unwrap()
            .address()
            .to_string(),
        "10.0.0.2:80",
        "others do not use it"
    );
    set.set(vec![of_node("10.0.0.2:80", "node-2", true)]);
    assert!(set.pick_with(&local(&policy, now)).is_none());
}

#[test]
fn a_session_stays_while_its_endpoint_is_there() {
    let now = Instant::now();
    let policy = Policy::default();
    let set = set_of(3);
    let session = PickContext {
        session: Some("10.0.0.2:80".parse().unwrap()),
        ..at(&policy, now)
    };
    assert_eq!(shares(&set, &session, 50).len(), 1);
    set.set(vec![spec("10.0.0.1:80", true)]);
    assert_eq!(
        set.pick_with(&session).unwrap().address().to_string(),
        "10.0.0.1:80"
    );
}

#[test]
fn a_new_endpoints_share_grows_linearly() {
    let start = Instant::now();
    for algorithm in [
        Algorithm::PeakEwma,
        Algorithm::Random,
        Algorithm::RoundRobin,
    ] {
        for (count, even) in [(2, 0.5), (4, 0.25)] {
            let set = set_of(count - 1);
            let mut all: Vec<_> = addresses(count).iter().map(|a| spec(a, true)).collect();
            set.set_at(all.clone(), start);
            all.clear();
            let policy = Policy {
                slow_start: Some(Duration::from_secs(10)),
                ..with(algorithm)
            };
            let new: SocketAddr = format!("10.0.0.{count}:80").parse().unwrap();
            let share = |seconds| {
                let context = at(&policy, start + Duration::from_secs(seconds));
                shares(&set, &context, 10_000)
                    .get(&new)
                    .copied()
                    .unwrap_or(0) as f64
                    / 10_000.0
            };
            let (young, half, grown) = (share(1), share(5), share(10));
            let what = format!("{algorithm:?} {count}: {young} {half} {grown}");
            assert!(young > 0.03 * even && young < 0.35 * even, "{what}");
            assert!(half > 0.4 * even && half < 0.8 * even, "{what}");
            assert!((grown - even).abs() < 0.1 * even, "{what}");
        }
    }
}

#[test]
fn no_slow_start_for_the_endpoints_a_set_begins_with() {
    let policy = Policy {
        slow_start: Some(Duration::from_secs(10)),
        ..with(Algorithm::RoundRobin)
    };
    let set = set_of(2);
    let shares = shares(&set, &at(&policy, Instant::now()), 100);
    assert!(shares.values().all(|n| *n == 50), "{shares:?}");
}

#[test]
fn the_share_bounds_ejection_also_between_threads() {
    let now = Instant::now();
    let policy = Policy {
        breaker: Some(Breaker::default()),
        ..with(Algorithm::RoundRobin)
    };
    let set = set_of(5);
    for _ in 0..100 {
        let mut pick = set.pick_with(&at(&policy, now)).unwrap();
        pick.record(FAILURE, now);
    }
    let ejected = set
        .snapshot(now)
        .iter()
        .filter(|e| matches!(e.state, EndpointState::Ejected { .. }))
        .count();
    assert_eq!(ejected, 2, "half of five, rounded down");
    // Ejected ones get nothing, not even as the last resort of a retry.
    let open: Vec<_> = set
        .endpoints()
        .iter()
        .filter(|e| e.circuit.is_closed())
        .map(|e| e.address)
        .collect();
    let shares = shares(&set, &at(&policy, now), 300);
    assert_eq!(shares.len(), 3);
    assert!(open.iter().all(|a| shares.contains_key(a)));
    let retry = PickContext {
        tried: &open,
        ..at(&policy, now)
    };
    assert!(set.pick_with(&retry).is_none());
    // Without the breaker nothing is left out.
    let without = with(Algorithm::RoundRobin);
    assert_eq!(self::shares(&set, &at(&without, now), 300).len(), 5);
}

#[test]
fn ejection_is_ignored_where_too_few_endpoints_are_left() {
    let now = Instant::now();
    let policy = Policy {
        breaker: Some(Breaker::default()),
        ..with(Algorithm::RoundRobin)
    };
    let set = set_of(2);
    for _ in 0..20 {
        let mut pick = set.pick_with(&at(&policy, now)).unwrap();
        pick.record(FAILURE, now);
    }
    let ejected = set.endpoints().into_iter().find(|e| !e.circuit.is_closed());
    let ejected = ejected.expect("one of two").address;
    set.set(vec![spec(&ejected.to_string(), true)]);
    let pick = set.pick_with(&at(&policy, now)).unwrap();
    assert_eq!((pick.address(), pick.is_probe()), (ejected, false));
}

#[test]
fn with_all_of_them_allowed_all_are_ejected() {
    let now = Instant::now();
    let policy = Policy {
        breaker: Some(Breaker {
            max_ejected_percent: 100,
            ..Breaker::default()
        }),
        ..with(Algorithm::RoundRobin)
    };
    let set = set_of(2);
    for _ in 0..10 {
        let mut pick = set.pick_with(&at(&policy, now)).unwrap();
        pick.record(FAILURE, now);
    }
    assert!(set.pick_with(&at(&policy, now)).is_none());
}

#[test]
fn a_cancelled_request_teaches_nothing() {
    let now = Instant::now();
    let policy = Policy {
        breaker: Some(Breaker::default()),
        ..Policy::default()
    };
    let set = set_of(1);
    let before = set.snapshot(now);
    drop(set.pick_with(&at(&policy, now)).unwrap());
    assert_eq!(set.snapshot(now), before);
}

#[test]
fn a_stream_is_measured_by_its_headers() {
    let now = Instant::now();
    let policy = Policy::default();
    let set = set_of(1);
    let mut pick = set.pick_with(&at(&policy, now)).unwrap();
    pick.answered(Duration::from_millis(5), now);
    let later = now + Duration::from_millis(1);
    pick.record(
        Outcome {
            success: true,
            latency: Duration::from_secs(3600),
        },
        later,
    );
    let snapshot = &set.snapshot(later)[0];
    assert!((snapshot.latency_ms - 5.0).abs() < 0.01, "{snapshot:?}");
    assert_eq!(snapshot.pending, 1, "until it ends");
    drop(pick);
    assert_eq!(set.snapshot(later)[0].pending, 0);
}

#[test]
fn a_new_endpoint_is_expected_to_be_typical() {
    let now = Instant::now();
    let policy = Policy::default();
    let set = set_of(2);
    for _ in 0..100 {
        let mut pick = set.pick_with(&at(&policy, now)).unwrap();
        pick.record(ANSWER, now);
    }
    set.set(addresses(3).iter().map(|a| spec(a, true)).collect());
    let share = shares(&set, &at(&policy, now), 3_000);
    let new = share[&"10.0.0.3:80".parse().unwrap()];
    assert!((850..1_150).contains(&new), "{share:?}");
    assert!((set.snapshot(now)[2].latency_ms - 5.0).abs() < 0.01);
}

#[test]
fn a_probe_goes_to_the_key_that_is_its_own() {
    let now = Instant::now();
    let policy = Policy {
        breaker: Some(Breaker {
            consecutive_failures: 1,
            ..Breaker::default()
        }),
        ..with(Algorithm::RingHash)
    };
    let set = set_of(3);
    let key = |key: u64, now| PickContext {
        hash: Some(hash::of(&key.to_be_bytes())),
        ..at(&policy, now)
    };
    let mut own = set.pick_with(&key(1, now)).unwrap();
    let ejected = own.address();
    own.record(FAILURE, now);
    drop(own);
    let without = EndpointSet::new();
    let rest = addresses(3)
        .into_iter()
        .filter(|a| a.parse() != Ok(ejected));
    without.set(rest.map(|a| spec(&a, true)).collect());
    let later = now + Duration::from_secs(2);
    let mut probes = 0;
    for n in 0..1_000 {
        let pick = set.pick_with(&key(n, later)).unwrap();
        let other = set_of(3).pick_with(&key(n, later)).unwrap().address();
        if pick.is_probe() {
            probes += 1;
            assert_eq!((pick.address(), other), (ejected, ejected));
        } else {
            let left = without.pick_with(&key(n, later)).unwrap();
            assert_eq!(pick.address(), left.address());
        }
    }
    assert!((1..=10).contains(&probes), "{probes}");
}
