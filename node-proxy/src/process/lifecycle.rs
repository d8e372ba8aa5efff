//! Whether the process accepts connections, and why not.
//!
//! Drain is a value that is passed down and awaited. The agent's Drain (a newer proxy is ready) can be
//! taken back by its Resume; termination cannot.

use tokio::sync::watch;
use tokio::time::Instant;

/// What the process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Accepts connections once it can.
    Serving,
    /// Accepts no more, keeps those it has, and may be told to accept again.
    Drained,
    /// Accepts no more, and ends with its last connection and tunnel or at the deadline.
    Terminating {
        /// When it ends in any case.
        deadline: Instant,
    },
}

impl Phase {
    /// One word for health and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Drained => "drained",
            Self::Terminating { .. } => "terminating",
        }
    }
}

/// Sets and tells the phase.
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    accept: Box<dyn Fn(bool) + Send + Sync>,
}

impl Lifecycle {
    /// Serving. `accept` is called when accepting is to stop (`false`) or to go on.
    pub fn new(accept: impl Fn(bool) + Send + Sync + 'static) -> Self {
        Self {
            phase: watch::Sender::new(Phase::Serving),
            accept: Box::new(accept),
        }
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Follows the phase.
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Stops accepting until [`Lifecycle::resume`]. `false`: the process is not serving.
    pub fn drain(&self) -> bool {
        self.change(Phase::Serving, Phase::Drained)
    }

    /// Accepts again. `false`: it was not drained.
    pub fn resume(&self) -> bool {
        self.change(Phase::Drained, Phase::Serving)
    }

    /// Ends by the deadline; the earliest counts.
    pub fn terminate(&self, deadline: Instant) {
        self.phase.send_if_modified(|phase| {
            if matches!(phase, Phase::Terminating { deadline: earlier } if *earlier <= deadline) {
                return false;
            }
            *phase = Phase::Terminating { deadline };
            true
        });
        (self.accept)(false);
    }

    fn change(&self, from: Phase, to: Phase) -> bool {
        let changed = self.phase.send_if_modified(|phase| {
            let change = *phase == from;
            if change {
                *phase = to;
            }
            change
        });
        if changed {
            (self.accept)(to == Phase::Serving);
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn only_a_drain_can_be_taken_back() {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&calls);
        let lifecycle = Lifecycle::new(move |accept| seen.lock().push(accept));
        assert!(!lifecycle.resume());
        assert!(lifecycle.drain());
        assert!(!lifecycle.drain());
        assert!(lifecycle.resume());
        let soon = Instant::now() + Duration::from_secs(1);
        lifecycle.terminate(soon);
        lifecycle.terminate(soon + Duration::from_secs(1));
        assert_eq!(lifecycle.phase(), Phase::Terminating { deadline: soon });
        assert!(!lifecycle.resume() && !lifecycle.drain());
        assert_eq!(*calls.lock(), [false, true, false, false]);
    }
}
