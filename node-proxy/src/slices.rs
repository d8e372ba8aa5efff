//! How soon a thread of the data plane runs when it wakes.
//!
//! A thread that wakes waits until the one that has the processor has used its slice up, a millisecond or more. A workload that
//! keeps its thread busy so holds up each request of another one, once for each time the request comes by. So
//! a thread that needs little of the processor asks for a short slice: since Linux 6.12 it runs at once then, in the
//! place of one with a longer slice, as long as it had no more than its share. That share stays the same. Older kernels take
//! the wish and ignore it.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// What a thread asks for that needs little. Most work that a request brings takes a quarter of it.
const SHORT: Duration = Duration::from_micros(400);
/// How often a thread looks at what it has needed.
const EVERY: Duration = Duration::from_millis(100);
/// A thread that needs less than one part in so many of the time is a modest one, and is one no more from twice as much on.
const MODEST: u32 = 4;

#[derive(Clone, Copy, Debug)]
enum State {
    New,
    /// As of the last look.
    Known {
        at: Instant,
        used: Duration,
        modest: bool,
    },
    /// It may not ask.
    Refused,
}

thread_local! {
    static STATE: Cell<State> = const { Cell::new(State::New) };
}

/// Asks for the slice that fits what this thread has needed of late. For one that has just waited for events, and for one
/// that is too busy to wait, now and then.
pub fn look() {
    STATE.set(next(STATE.get(), Instant::now()));
}

fn next(state: State, now: Instant) -> State {
    let (last, modest) = match state {
        State::New => (None, false),
        State::Known { at, .. } if now - at < EVERY => return state,
        State::Known { at, used, modest } => (Some((at, used)), modest),
        State::Refused => return state,
    };
    let used = match sys::used() {
        Ok(used) => used,
        Err(error) => return refused(&error),
    };
    let wanted =
        last.is_some_and(|(at, before)| is_modest(modest, used.saturating_sub(before), now - at));
    if wanted != modest
        && let Err(error) = sys::ask(wanted.then_some(SHORT))
    {
        return refused(&error);
    }
    State::Known {
        at: now,
        used,
        modest: wanted,
    }
}

fn is_modest(before: bool, used: Duration, of: Duration) -> bool {
    let parts = if before { MODEST / 2 } else { MODEST };
    used * parts < of
}

fn refused(error: &std::io::Error) -> State {
    tracing::debug!(%error, "no short slices of the processor");
    State::Refused
}

#[allow(unsafe_code)]
mod sys {
    use std::io;
    use std::time::Duration;

    /// Processor time of this thread so far.
    pub(super) fn used() -> io::Result<Duration> {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes one timespec, to which the pointer is valid.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let whole = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
        Ok(whole + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0)))
    }

    /// Asks for slices of this length for this thread, or for the kernel's own. All else stays as it is.
    pub(super) fn ask(slice: Option<Duration>) -> io::Result<()> {
        let mut now = attributes(ME)?;
        // Of other classes it is not a slice but a promise (sched_setattr(2)).
        let fair = [libc::SCHED_OTHER, libc::SCHED_BATCH];
        if !fair
            .iter()
            .any(|class| u32::try_from(*class) == Ok(now.sched_policy))
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let slice = slice.map_or(0, |slice| slice.as_nanos());
        now.sched_runtime = u64::try_from(slice).unwrap_or(0);
        now.size = SIZE;
        // SAFETY: `now` is a sched_attr of the size it says, which the kernel only reads.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, ME, &raw const now, 0) };
        ended(result)
    }

    #[expect(clippy::cast_possible_truncation, reason = "48")]
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;

    /// The calling thread.
    pub(super) const ME: libc::pid_t = 0;

    pub(super) fn attributes(of: libc::pid_t) -> io::Result<libc::sched_attr> {
        let mut attributes = libc::sched_attr {
            size: SIZE,
            sched_policy: 0,
            sched_flags: 0,
            sched_nice: 0,
            sched_priority: 0,
            sched_runtime: 0,
            sched_deadline: 0,
            sched_period: 0,
        };
        // SAFETY: the kernel writes at most `SIZE` bytes of the struct, which is as large, and valid however its fields are.
        let result =
            unsafe { libc::syscall(libc::SYS_sched_getattr, of, &raw mut attributes, SIZE, 0) };
        ended(result).map(|()| attributes)
    }

    fn ended(result: libc::c_long) -> io::Result<()> {
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;
    use std::{io, thread};

    use super::*;
    use crate::turns::Turns;

    /// Whether this thread has short slices. `None`: this kernel has none for anybody (before Linux 6.12).
    pub(crate) fn has_short() -> Option<bool> {
        let slice = sys::attributes(sys::ME).unwrap().sched_runtime;
        (slice != 0).then(|| u128::from(slice) == SHORT.as_nanos())
    }

    /// Asks for them.
    pub(crate) fn ask() -> io::Result<()> {
        sys::ask(Some(SHORT))
    }

    /// Asks what those of a process are.
    pub(crate) fn read(process: u32) -> io::Result<()> {
        sys::attributes(i32::try_from(process).unwrap()).map(drop)
    }

    #[test]
    fn what_is_modest() {
        let of = Duration::from_millis(100);
        let is = |before, used| is_modest(before, Duration::from_millis(used), of);
        assert_eq!([24, 25].map(|used| is(false, used)), [true, false]);
        assert_eq!([49, 50].map(|used| is(true, used)), [true, false]);
    }

    /// Calls `step` until this thread has short slices, or none. Not where it gets too little of the processor to be a busy one.
    fn until(short: bool, mut step: impl FnMut()) {
        let (begun, used) = (Instant::now(), sys::used().unwrap());
        while has_short().is_some_and(|has| has != short) {
            let passed = begun.elapsed();
            let share = (sys::used().unwrap() - used).as_secs_f64() / passed.as_secs_f64();
            if passed > Duration::from_secs(20) {
                assert!(
                    !short && share < 0.6,
                    "short: {short}, {share} of a processor"
                );
                return println!("{share} of a processor is too little for this test");
            }
            step();
        }
    }

    #[test]
    fn a_thread_that_sleeps_has_short_slices_until_it_works() {
        until(true, || {
            thread::sleep(Duration::from_millis(10));
            look();
        });
        let nice = sys::attributes(sys::ME).unwrap().sched_nice;
        until(false, look);
        assert_eq!(sys::attributes(sys::ME).unwrap().sched_nice, nice);
    }

    /// The runtime then never waits, only looks for events.
    #[tokio::test]
    async fn a_thread_that_never_waits_looks_too() {
        until(true, || {
            thread::sleep(Duration::from_millis(10));
            look();
        });
        let busy = Arc::new(Turns::default()).take(async {
            while has_short() == Some(true) {
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_millis(1) {}
                tokio::task::yield_now().await;
            }
        });
        let limit = tokio::time::timeout(Duration::from_secs(60), busy);
        limit.await.expect("it has the kernel's own slices");
    }
}
