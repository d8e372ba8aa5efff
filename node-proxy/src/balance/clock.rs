//! Points in time as integers, so that they fit into atomics.

use std::sync::LazyLock;
use std::time::Instant;

/// Before the first of them is asked for there was nothing to remember.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Microseconds since the process began to balance; at least 1, so that 0 can stand for "never".
pub(super) fn micros(now: Instant) -> u64 {
    let since = now.saturating_duration_since(*START).as_micros();
    u64::try_from(since)
        .unwrap_or(u64::MAX - 1)
        .saturating_add(1)
}
