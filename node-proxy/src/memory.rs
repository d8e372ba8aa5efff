//! Gives memory back to the system after a burst.
//!
//! The allocator keeps what ended connections leave, for the next ones; a thread that is idle never
//! returns it. Each thread that carries traffic therefore looks now and then whether most of a burst is
//! over, and has its own heap collected.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

/// How often a thread looks.
const INTERVAL: Duration = Duration::from_secs(5);
/// A peak below this is no burst.
const BURST: usize = 64;

/// Runs on the thread whose heap is meant, for as long as the thread. `live` tells how many connections
/// there are.
pub async fn reclaim(live: impl Fn() -> usize) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut peak = 0;
    loop {
        ticks.tick().await;
        if burst_is_over(&mut peak, live()) {
            sys::collect();
        }
    }
}

/// Whether fewer than half of the most there were are left; starts again from what is left.
fn burst_is_over(peak: &mut usize, live: usize) -> bool {
    *peak = live.max(*peak);
    let over = *peak >= BURST && live <= *peak / 2;
    if over {
        *peak = live;
    }
    over
}

#[allow(unsafe_code)]
mod sys {
    /// Returns the calling thread's free pages, and those of threads that have ended, to the system.
    pub(super) fn collect() {
        // SAFETY: mi_collect takes no pointers and may be called at any time from any thread.
        unsafe { libmimalloc_sys::mi_collect(true) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_collected_once_as_it_ends() {
        let mut peak = 0;
        let collected: Vec<bool> = [0, 10, 5, 0, 2000, 1500, 900, 900, 400, 0]
            .into_iter()
            .map(|live| burst_is_over(&mut peak, live))
            .collect();
        let expected = [
            false, false, false, false, false, false, true, false, true, true,
        ];
        assert_eq!(collected, expected);
    }
}
