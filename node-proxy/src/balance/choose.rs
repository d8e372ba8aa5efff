//! One endpoint of several.
//!
//! Two choices need no scan, spread evenly, and avoid the herd that "best of all" causes (Mitzenmacher,
//! "The Power of Two Choices in Randomized Load Balancing"). In a small set both of them may be bad:
//! of three endpoints, one slow and one failing, a third of the draws. So for the estimate of latency a few
//! more are drawn as witnesses, and one that is several times cheaper takes the place of the winner.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;

use super::policy::Algorithm;
use super::{Endpoint, hash};

/// Costs closer than this factor are equal: pending work differs by more, noise by less.
const TIE: f32 = 1.5;
/// A witness wins if it is this many times cheaper.
const OUTLIER: f32 = 4.0;
/// Endpoints that are drawn as witnesses.
const WITNESSES: usize = 3;
/// Share of an endpoint's weight at the start of its slow start.
const SLOW_START_LEAST: f32 = 0.1;
/// Draws before an endpoint in slow start is taken as it is.
const SLOW_START_DRAWS: usize = 8;

/// Endpoints to choose from: a list as it is, which is the common case and costs nothing, or some of it.
pub(super) enum Candidates<'a> {
    All(&'a [Arc<Endpoint>]),
    Some(Vec<&'a Arc<Endpoint>>),
}

impl<'a> Candidates<'a> {
    /// Those of a list that were not tried.
    pub(super) fn untried(endpoints: &'a [Arc<Endpoint>], tried: &[SocketAddr]) -> Self {
        if tried.is_empty() {
            return Self::All(endpoints);
        }
        Self::All(endpoints).only(|endpoint| !tried.contains(&endpoint.address))
    }

    /// Those that `wanted` says.
    pub(super) fn only(self, wanted: impl Fn(&Endpoint) -> bool) -> Self {
        Self::Some(self.iter().filter(|endpoint| wanted(endpoint)).collect())
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::All(all) => all.len(),
            Self::Some(some) => some.len(),
        }
    }

    fn get(&self, index: usize) -> &'a Arc<Endpoint> {
        match self {
            Self::All(all) => &all[index],
            Self::Some(some) => some[index],
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &'a Arc<Endpoint>> {
        (0..self.len()).map(|index| self.get(index))
    }
}

/// What a choice depends on besides the endpoints.
pub(super) struct Choice {
    pub(super) algorithm: Algorithm,
    pub(super) hash: Option<u64>,
    pub(super) slow_start: Option<Duration>,
    pub(super) typical: f32,
    pub(super) now: u64,
}

impl Choice {
    /// `turn`: a number that grows by one with each call, for round robin.
    pub(super) fn among<'a>(
        &self,
        endpoints: &Candidates<'a>,
        turn: impl FnOnce() -> usize,
        rng: &mut impl Rng,
    ) -> Option<&'a Arc<Endpoint>> {
        if endpoints.len() < 2 {
            return endpoints.iter().next();
        }
        Some(match (self.algorithm, self.hash) {
            (Algorithm::PeakEwma, _) => self.cheapest(endpoints, rng),
            (Algorithm::RingHash, Some(key)) => endpoints
                .iter()
                .max_by_key(|endpoint| hash::score(key, endpoint.seed))?,
            (Algorithm::LeastRequest | Algorithm::RingHash, _) => {
                let (first, second) = self.draw_two(endpoints, rng);
                if second.pending() < first.pending() {
                    second
                } else {
                    first
                }
            }
            (Algorithm::Random, _) => self.draw(endpoints, rng),
            (Algorithm::RoundRobin, _) => self.next(endpoints, turn(), rng),
        })
    }

    fn cheapest<'a>(&self, endpoints: &Candidates<'a>, rng: &mut impl Rng) -> &'a Arc<Endpoint> {
        let (first, second) = self.draw_two(endpoints, rng);
        let (first_cost, second_cost) = (self.cost(first), self.cost(second));
        let (mut best, mut cost) = if second_cost * TIE < first_cost {
            (second, second_cost)
        } else if first_cost * TIE < second_cost || first.pending() <= second.pending() {
            (first, first_cost)
        } else {
            (second, second_cost)
        };
        let others = endpoints.len() - 2;
        let start = rng.random_range(0..endpoints.len());
        for step in 0..others.min(WITNESSES) + 2 {
            // Of a small set all are seen, the two choices among them; of a large one neighbours in its
            // order, which is as good as chance for this.
            let witness = endpoints.get((start + step) % endpoints.len());
            let witness_cost = self.cost(witness);
            if witness_cost * OUTLIER < cost && self.is_drawn(witness, rng) {
                (best, cost) = (witness, witness_cost);
            }
        }
        best
    }

    fn cost(&self, endpoint: &Endpoint) -> f32 {
        endpoint
            .load
            .cost(endpoint.pending(), self.typical, self.now)
    }

    /// Two that differ.
    fn draw_two<'a>(
        &self,
        endpoints: &Candidates<'a>,
        rng: &mut impl Rng,
    ) -> (&'a Arc<Endpoint>, &'a Arc<Endpoint>) {
        let count = endpoints.len();
        let draw = |rng: &mut _| {
            let first = Rng::random_range(rng, 0..count);
            (first, (first + Rng::random_range(rng, 1..count)) % count)
        };
        let mut drawn = draw(rng);
        for _ in 0..SLOW_START_DRAWS {
            let (first, second) = (endpoints.get(drawn.0), endpoints.get(drawn.1));
            match (self.is_drawn(first, rng), self.is_drawn(second, rng)) {
                (true, true) => break,
                // There is no other pair: the one that was drawn stands for both.
                (true, false) if count == 2 => return (first, first),
                (false, true) if count == 2 => return (second, second),
                (false, false) if count == 2 => break,
                _ => drawn = draw(rng),
            }
        }
        (endpoints.get(drawn.0), endpoints.get(drawn.1))
    }

    fn draw<'a>(&self, endpoints: &Candidates<'a>, rng: &mut impl Rng) -> &'a Arc<Endpoint> {
        let mut drawn = endpoints.get(rng.random_range(0..endpoints.len()));
        for _ in 0..SLOW_START_DRAWS {
            if self.is_drawn(drawn, rng) {
                break;
            }
            drawn = endpoints.get(rng.random_range(0..endpoints.len()));
        }
        drawn
    }

    fn next<'a>(
        &self,
        endpoints: &Candidates<'a>,
        turn: usize,
        rng: &mut impl Rng,
    ) -> &'a Arc<Endpoint> {
        let in_turn = |step| endpoints.get(turn.wrapping_add(step) % endpoints.len());
        (0..endpoints.len())
            .map(in_turn)
            .find(|endpoint| self.is_drawn(endpoint, rng))
            .unwrap_or_else(|| in_turn(0))
    }

    /// Slow start: an endpoint counts as drawn with a chance that grows linearly with its age.
    fn is_drawn(&self, endpoint: &Endpoint, rng: &mut impl Rng) -> bool {
        let (Some(window), Some(since)) = (self.slow_start, endpoint.since) else {
            return true;
        };
        let age = Duration::from_micros(self.now.saturating_sub(since));
        if age >= window {
            return true;
        }
        let weight = age.as_secs_f32() / window.as_secs_f32();
        rng.random::<f32>() < weight.max(SLOW_START_LEAST)
    }
}
