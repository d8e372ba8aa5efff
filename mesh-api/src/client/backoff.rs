//! Delays between attempts: doubling, with jitter, so that a thousand nodes do not return at once.

use std::time::Duration;

use rand::Rng;

/// The delays of one thing that is retried.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Delays double from `min` to `max`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
        }
    }

    /// The next delay, between half and the whole of the present step; the step then doubles.
    pub fn delay(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.max);
        step.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// The next delay starts from the smallest again.
    pub fn reset(&mut self) {
        self.next = self.min;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_within_bounds_and_start_again() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(15));
        let mut step = 50;
        for _ in 0..20 {
            let delay = backoff.delay().as_millis() as u64;
            assert!((step / 2..=step).contains(&delay), "{delay} of {step}");
            step = (step * 2).min(15_000);
        }
        backoff.reset();
        assert!(backoff.delay() <= Duration::from_millis(50));
    }
}
