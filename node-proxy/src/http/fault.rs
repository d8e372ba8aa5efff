//! Fault injection: which requests are delayed or aborted on purpose.
//!
//! For tests of the users' own resilience. Both are drawn independently; a request that is delayed and
//! aborted waits first, as a failing peer would let it.

use std::time::Duration;

use rand::Rng;

use super::policy::{Abort, Fault, WHOLE};

/// What is done to one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Wait so long first.
    pub delay: Option<Duration>,
    /// Then answer with this instead of passing it on.
    pub abort: Option<Abort>,
}

/// Draws for one request.
pub fn decide(fault: &Fault, rng: &mut impl Rng) -> Decision {
    let mut drawn = |share: u32| share > 0 && rng.random_range(0..WHOLE) < share;
    Decision {
        delay: (drawn(fault.delay_share) && !fault.delay.is_zero()).then_some(fault.delay),
        abort: drawn(fault.abort_share).then_some(fault.abort),
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn fault(delay_share: u32, abort_share: u32) -> Fault {
        Fault {
            delay_share,
            delay: Duration::from_millis(100),
            abort_share,
            abort: Abort {
                status: StatusCode::SERVICE_UNAVAILABLE,
                grpc_code: Some(14),
            },
        }
    }

    #[test]
    fn shares_are_hundredths_of_a_percent_and_independent() {
        let mut rng = StdRng::seed_from_u64(1);
        let fault = fault(2_500, 150);
        let decisions: Vec<_> = (0..100_000).map(|_| decide(&fault, &mut rng)).collect();
        let count = |wanted: fn(&Decision) -> bool| decisions.iter().filter(|d| wanted(d)).count();
        let delayed = count(|d| d.delay.is_some());
        let aborted = count(|d| d.abort.is_some());
        let both = count(|d| d.delay.is_some() && d.abort.is_some());
        assert!((24_500..25_500).contains(&delayed), "{delayed}");
        assert!((1_350..1_650).contains(&aborted), "{aborted}");
        assert!((275..475).contains(&both), "{both}");
    }

    #[test]
    fn none_and_all() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..1_000 {
            assert_eq!(decide(&fault(0, 0), &mut rng), Decision::default());
            let all = decide(&fault(WHOLE, WHOLE), &mut rng);
            assert!(all.delay.is_some() && all.abort.is_some());
        }
    }
}
