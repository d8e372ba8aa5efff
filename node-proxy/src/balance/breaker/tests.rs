use super::*;

const SECOND: u64 = 1_000_000;

fn now(seconds: u64, picks: u64) -> Now {
    Now {
        micros: seconds * SECOND + 1,
        picks,
    }
}

fn record(circuit: &Circuit, breaker: &Breaker, success: bool, at: &Now) -> Change {
    circuit.record(breaker, success, None, at, |eject| {
        eject();
        true
    })
}

fn probed(circuit: &Circuit, breaker: &Breaker, success: bool, at: &Now) -> Change {
    let probe = circuit.try_probe(breaker, at).expect("due");
    circuit.record(breaker, success, Some(&probe), at, |_| unreachable!())
}

fn ejected(breaker: &Breaker) -> Circuit {
    let circuit = Circuit::default();
    for _ in 1..breaker.consecutive_failures {
        assert_eq!(record(&circuit, breaker, false, &now(0, 0)), Change::None);
    }
    assert_eq!(
        record(&circuit, breaker, false, &now(0, 0)),
        Change::Ejected
    );
    circuit
}

#[test]
fn failures_in_a_row_eject_and_a_success_between_them_does_not() {
    let breaker = Breaker::default();
    let circuit = Circuit::default();
    for _ in 0..100 {
        for _ in 0..4 {
            record(&circuit, &breaker, false, &now(0, 0));
        }
        record(&circuit, &breaker, true, &now(0, 0));
    }
    assert!(circuit.is_closed());
    assert!(!ejected(&breaker).is_closed());
}

#[test]
fn a_low_success_rate_ejects_once_there_are_enough_requests() {
    let breaker = Breaker {
        consecutive_failures: 0,
        min_success_percent: Some(80),
        min_requests: 10,
        ..Breaker::default()
    };
    let circuit = Circuit::default();
    for n in 0..9 {
        assert_eq!(
            record(&circuit, &breaker, n % 2 == 0, &now(0, 0)),
            Change::None
        );
    }
    assert_eq!(
        record(&circuit, &breaker, false, &now(0, 0)),
        Change::Ejected
    );
    // Exactly at the threshold is not below it.
    let circuit = Circuit::default();
    for n in 0..100 {
        record(&circuit, &breaker, n % 5 != 4, &now(0, 0));
    }
    assert!(circuit.is_closed());
}

#[test]
fn requests_before_the_window_do_not_count() {
    let breaker = Breaker {
        consecutive_failures: 0,
        min_success_percent: Some(80),
        ..Breaker::default()
    };
    let circuit = Circuit::default();
    for second in 0..100 {
        // Never five within ten seconds.
        record(&circuit, &breaker, false, &now(second * 3, 0));
        assert!(circuit.is_closed(), "at {second}");
    }
    for second in 300..304 {
        record(&circuit, &breaker, false, &now(second, 0));
    }
    assert!(!circuit.is_closed());
}

#[test]
fn a_fall_after_long_health_is_noticed_within_twenty_requests() {
    let breaker = Breaker {
        consecutive_failures: 0,
        min_success_percent: Some(80),
        ..Breaker::default()
    };
    let circuit = Circuit::default();
    for n in 0..100_000 {
        record(&circuit, &breaker, true, &now(n / 10_000, 0));
    }
    let failures = (0..20)
        .take_while(|n| record(&circuit, &breaker, n % 2 == 0, &now(9, 0)) == Change::None)
        .count();
    assert!(failures < 20);
    assert!(!circuit.is_closed());
}

#[test]
fn ejections_double_up_to_the_longest() {
    let breaker = Breaker::default();
    let circuit = ejected(&breaker);
    let mut at = now(0, 0);
    let mut last = circuit.ejected_until().unwrap() - at.micros;
    for expected in [1, 2, 4, 8, 8, 8] {
        let longest = expected * SECOND;
        assert!(
            last <= longest && last >= longest * 3 / 4,
            "{last} of {longest}"
        );
        at = Now {
            micros: circuit.ejected_until().unwrap(),
            picks: at.picks + 1_000,
        };
        assert_eq!(probed(&circuit, &breaker, false, &at), Change::None);
        last = circuit.ejected_until().unwrap() - at.micros;
    }
}

#[test]
fn one_request_at_a_time_and_five_successes_close() {
    let breaker = Breaker::default();
    let circuit = ejected(&breaker);
    assert!(
        circuit.try_probe(&breaker, &now(0, 10_000)).is_none(),
        "too soon"
    );
    let at = now(2, 10_000);
    for n in 1..=5 {
        let probe = circuit.try_probe(&breaker, &at).expect("due");
        assert!(circuit.try_probe(&breaker, &at).is_none(), "one at a time");
        // Late answers of before the ejection change nothing.
        assert_eq!(record(&circuit, &breaker, true, &at), Change::None);
        let change = circuit.record(&breaker, true, Some(&probe), &at, |_| unreachable!());
        assert_eq!(change == Change::Closed, n == 5, "after {n}");
    }
    assert!(circuit.is_closed());
}

#[test]
fn a_failure_in_probation_starts_it_anew() {
    let breaker = Breaker::default();
    let circuit = ejected(&breaker);
    for _ in 0..4 {
        probed(&circuit, &breaker, true, &now(2, 10_000));
    }
    probed(&circuit, &breaker, false, &now(2, 10_000));
    for _ in 0..4 {
        assert_eq!(
            probed(&circuit, &breaker, true, &now(10, 20_000)),
            Change::None
        );
    }
    assert_eq!(
        probed(&circuit, &breaker, true, &now(10, 20_000)),
        Change::Closed
    );
}

#[test]
fn it_is_tried_only_after_a_hundred_requests_for_each_that_reached_it() {
    let breaker = Breaker::default();
    let circuit = ejected(&breaker);
    assert!(circuit.try_probe(&breaker, &now(60, 499)).is_none());
    assert_eq!(
        probed(&circuit, &breaker, true, &now(60, 500)),
        Change::None
    );
    assert_eq!(
        probed(&circuit, &breaker, false, &now(60, 501)),
        Change::None
    );
    assert!(circuit.try_probe(&breaker, &now(120, 700)).is_none());
    assert!(circuit.try_probe(&breaker, &now(120, 701)).is_some());
    // Or when nobody knows what a share of so little traffic is.
    let circuit = ejected(&breaker);
    assert!(circuit.try_probe(&breaker, &now(302, 0)).is_some());
}

#[test]
fn a_probe_without_an_answer_is_no_verdict() {
    let breaker = Breaker::default();
    let circuit = ejected(&breaker);
    let at = now(2, 1_000);
    let probe = circuit.try_probe(&breaker, &at).expect("due");
    circuit.abandon(&probe, &at);
    assert!(!circuit.is_closed());
    assert!(circuit.try_probe(&breaker, &now(2, 1_099)).is_none());
    let second = circuit
        .try_probe(&breaker, &now(2, 1_100))
        .expect("due again");
    // Hangs for longer than the longest ejection: another may try.
    let third = circuit
        .try_probe(&breaker, &now(11, 1_200))
        .expect("the second's time is over");
    let late = circuit.record(
        &breaker,
        false,
        Some(&second),
        &now(11, 1_200),
        |_| unreachable!(),
    );
    assert_eq!(late, Change::None);
    assert!(circuit.try_probe(&breaker, &now(11, 9_000)).is_none());
    circuit.abandon(&second, &now(11, 9_000));
    assert!(
        circuit.try_probe(&breaker, &now(11, 9_900)).is_none(),
        "not the second's to give"
    );
    assert!(third.lease > second.lease);
}

#[test]
fn patience_begins_anew_with_a_probe_that_was_given_back() {
    let breaker = Breaker::default();
    let circuit = ejected(&breaker);
    let late = now(1_000, 0);
    let probe = circuit.try_probe(&breaker, &late).expect("waited");
    circuit.abandon(&probe, &late);
    assert!(circuit.try_probe(&breaker, &now(1_001, 1)).is_none());
    assert!(circuit.try_probe(&breaker, &now(1_001, 100)).is_some());
}

#[test]
fn a_refused_ejection_leaves_it_closed_and_is_asked_again() {
    let breaker = Breaker::default();
    let circuit = Circuit::default();
    for _ in 0..10 {
        let change = circuit.record(&breaker, false, None, &now(0, 0), |_| false);
        assert_eq!(change, Change::None);
    }
    assert!(circuit.is_closed());
    assert_eq!(
        record(&circuit, &breaker, false, &now(0, 0)),
        Change::Ejected
    );
}

#[test]
fn health_makes_the_next_ejection_short_again() {
    let breaker = Breaker::default();
    let until = |healthy_for: u64| {
        let circuit = ejected(&breaker);
        probed(&circuit, &breaker, false, &now(2, 10_000));
        for _ in 0..5 {
            probed(&circuit, &breaker, true, &now(20, 20_000));
        }
        let at = now(20 + healthy_for, 30_000);
        for _ in 0..5 {
            record(&circuit, &breaker, false, &at);
        }
        circuit.ejected_until().unwrap() - at.micros
    };
    assert!(until(1) > SECOND);
    assert!(until(60) <= SECOND);
}
