//! The balancer against simulated endpoints, on a simulated clock: what users are promised of it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

/// How an endpoint behaves.
#[derive(Clone, Copy)]
struct Behaviour {
    latency: Duration,
    failing: f64,
}

const FINE: Behaviour = Behaviour {
    latency: Duration::from_millis(2),
    failing: 0.0,
};
const SLOW: Behaviour = Behaviour {
    latency: Duration::from_millis(200),
    failing: 0.0,
};
const FAILING: Behaviour = Behaviour {
    latency: Duration::from_millis(2),
    failing: 0.5,
};

/// What came of the requests of one span of time.
#[derive(Debug, Default)]
struct Report {
    latencies: Vec<Duration>,
    failed: usize,
    /// By endpoint.
    picked: [usize; 3],
}

impl Report {
    fn p99(&mut self) -> Duration {
        self.latencies.sort_unstable();
        self.latencies[self.latencies.len() * 99 / 100]
    }

    fn failures(&self) -> f64 {
        self.failed as f64 / self.latencies.len() as f64
    }

    fn share(&self, endpoint: usize) -> f64 {
        self.picked[endpoint] as f64 / self.picked.iter().sum::<usize>() as f64
    }
}

struct Simulation {
    set: EndpointSet,
    policy: Policy,
    rng: StdRng,
    now: Instant,
    rate: f64,
    /// By end, then number.
    open: BinaryHeap<Reverse<(Instant, usize)>>,
    picks: HashMap<usize, (Pick, Outcome)>,
    count: usize,
}

impl Simulation {
    fn new(policy: Policy, rate: f64, seed: u64) -> Self {
        let set = EndpointSet::new();
        set.set((1..=3).map(spec).collect());
        Self {
            set,
            policy,
            rng: StdRng::seed_from_u64(seed),
            now: Instant::now(),
            rate,
            open: BinaryHeap::new(),
            picks: HashMap::new(),
            count: 0,
        }
    }

    /// Requests at random times, as independent users make them.
    fn run(&mut self, span: Duration, behaviours: [Behaviour; 3]) -> Report {
        let mut report = Report::default();
        let end = self.now + span;
        loop {
            let gap = -self.rng.random::<f64>().max(1e-9).ln() / self.rate;
            self.now += Duration::from_secs_f64(gap);
            self.finish();
            if self.now >= end {
                return report;
            }
            let context = PickContext {
                policy: &self.policy,
                v6: false,
                tried: &[],
                hash: None,
                session: None,
                node: "",
                zone: "",
                local_only: false,
                now: self.now,
            };
            let pick = self.set.pick_by(&context, &mut self.rng).unwrap();
            let index = usize::from(pick.address().port() - 1);
            let Behaviour { latency, failing } = behaviours[index];
            // Between half and twice the mean, most near it.
            let spread = 0.5 + self.rng.random::<f64>() * self.rng.random::<f64>() * 2.0;
            let outcome = Outcome {
                success: self.rng.random::<f64>() >= failing,
                latency: latency.mul_f64(spread),
            };
            report.picked[index] += 1;
            report.failed += usize::from(!outcome.success);
            report.latencies.push(outcome.latency);
            self.open
                .push(Reverse((self.now + outcome.latency, self.count)));
            self.picks.insert(self.count, (pick, outcome));
            self.count += 1;
        }
    }

    fn finish(&mut self) {
        while let Some(Reverse((end, number))) = self.open.peek().copied()
            && end <= self.now
        {
            self.open.pop();
            let (mut pick, outcome) = self.picks.remove(&number).expect("open");
            pick.record(outcome, end);
        }
    }
}

fn spec(port: u16) -> EndpointSpec {
    EndpointSpec {
        address: SocketAddr::from(([10, 0, 0, 1], port)),
        ready: true,
        serving: true,
        terminating: false,
        node: "".into(),
        zone: "".into(),
        for_zones: vec![],
        for_nodes: vec![],
    }
}

fn policy(algorithm: Algorithm, breaker: Option<Breaker>) -> Policy {
    Policy {
        algorithm,
        breaker,
        ..Policy::default()
    }
}

fn breaker() -> Breaker {
    Breaker {
        min_success_percent: Some(80),
        ..Breaker::default()
    }
}

const SICK: [Behaviour; 3] = [FINE, SLOW, FAILING];
const WELL: [Behaviour; 3] = [FINE; 3];
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn slow_and_failing_endpoints_are_avoided_without_a_breaker() {
    for rate in [100.0, 500.0, 2000.0] {
        for seed in 1..=3 {
            let mut plain = Simulation::new(policy(Algorithm::RoundRobin, None), rate, seed);
            let mut smart = Simulation::new(policy(Algorithm::PeakEwma, None), rate, seed);
            let (mut plain, mut smart) = (plain.run(MINUTE, SICK), smart.run(MINUTE, SICK));
            let what = format!(
                "rate {rate} seed {seed}: p99 {:?} to {:?}, failures {:.4} to {:.4}, picked {:?}",
                smart.p99(),
                plain.p99(),
                smart.failures(),
                plain.failures(),
                smart.picked
            );
            assert!(smart.p99() * 5 <= plain.p99(), "{what}");
            // No more would do; that the failing endpoint is drawn beside the slow one must not show.
            assert!(smart.failures() * 2.0 <= plain.failures(), "{what}");
        }
    }
}

#[test]
fn with_a_breaker_the_failing_endpoint_gets_a_hundredth() {
    for algorithm in [Algorithm::PeakEwma, Algorithm::RoundRobin] {
        for rate in [100.0, 500.0, 2000.0] {
            for seed in 1..=3 {
                let mut plain = Simulation::new(policy(Algorithm::RoundRobin, None), rate, seed);
                let guarded = policy(algorithm, Some(breaker()));
                let mut guarded = Simulation::new(guarded, rate, seed);
                // Fails only after it was healthy for long: its window is full of successes.
                guarded.run(MINUTE, [FINE, SLOW, FINE]);
                let (plain, guarded) = (plain.run(MINUTE, SICK), guarded.run(MINUTE, SICK));
                let what = format!(
                    "{algorithm:?} rate {rate} seed {seed}: failures {:.4} to {:.4}, picked {:?}",
                    guarded.failures(),
                    plain.failures(),
                    guarded.picked
                );
                assert!(guarded.failures() * 5.0 <= plain.failures(), "{what}");
                assert!(guarded.share(2) <= 0.01, "{what}");
            }
        }
    }
}

#[test]
fn an_endpoint_that_fails_always_gets_a_hundredth_too() {
    let dead = Behaviour {
        failing: 1.0,
        ..FINE
    };
    let guarded = policy(Algorithm::LeastRequest, Some(Breaker::default()));
    let report = Simulation::new(guarded, 100.0, 1).run(MINUTE, [FINE, FINE, dead]);
    assert!(report.share(2) <= 0.01, "{:?}", report.picked);
}

#[test]
fn back_to_normal_within_ten_seconds() {
    for (algorithm, breaker) in [
        (Algorithm::PeakEwma, None),
        (Algorithm::PeakEwma, Some(breaker())),
        (Algorithm::LeastRequest, Some(breaker())),
    ] {
        for rate in [100.0, 500.0, 2000.0] {
            for seed in 1..=5 {
                let mut simulation = Simulation::new(policy(algorithm, breaker), rate, seed);
                simulation.run(MINUTE * 2, SICK);
                simulation.run(Duration::from_secs(10), WELL);
                let report = simulation.run(Duration::from_secs(5), WELL);
                let with = if breaker.is_some() { "with" } else { "without" };
                for endpoint in 0..3 {
                    let share = report.share(endpoint);
                    assert!(
                        (0.2..0.47).contains(&share),
                        "{algorithm:?} {with} breaker, rate {rate}, seed {seed}: {:?}",
                        report.picked
                    );
                }
            }
        }
    }
}

#[test]
fn a_rare_failure_does_not_cost_an_endpoint_its_share() {
    let usual = Behaviour {
        failing: 0.01,
        ..FINE
    };
    for rate in [100.0, 2000.0] {
        let policy = policy(Algorithm::PeakEwma, Some(breaker()));
        let report = Simulation::new(policy, rate, 1).run(MINUTE, [usual; 3]);
        for endpoint in 0..3 {
            let share = report.share(endpoint);
            assert!((0.25..0.42).contains(&share), "{rate}: {:?}", report.picked);
        }
    }
}

#[test]
fn a_new_endpoint_is_neither_flooded_nor_starved() {
    let mut simulation = Simulation::new(policy(Algorithm::PeakEwma, None), 500.0, 1);
    simulation.set.set((1..=2).map(spec).collect());
    simulation.run(MINUTE, WELL);
    simulation.set.set((1..=3).map(spec).collect());
    for _ in 0..5 {
        let report = simulation.run(Duration::from_secs(2), WELL);
        assert!(
            (0.2..0.47).contains(&report.share(2)),
            "{:?}",
            report.picked
        );
    }
}
