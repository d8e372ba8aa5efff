//! Waiting for a condition with a deadline.

use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);

/// Asks `probe` until it answers `Ok`; panics at the deadline with what was waited for and the last
/// answer.
pub fn wait_until<T, E: std::fmt::Display>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<T, E>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= deadline => {
                panic!("waited {limit:?} for {what}; last: {last}")
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// [`wait_until`] for a plain condition.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_until(what, limit, || {
        if condition() { Ok(()) } else { Err("not yet") }
    });
}

/// Lets a scenario go on for a given time on purpose: a load that must run that long, an outage that
/// must last that long. Never a substitute for a condition.
pub fn let_run(time: Duration) {
    std::thread::sleep(time);
}
