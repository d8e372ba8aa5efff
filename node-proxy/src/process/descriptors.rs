//! Room for descriptors, ahead of those who need it.
//!
//! The kernel doubles a process' table of descriptors when it is full, and lets the thread that asked for one more wait
//! until no other thread can be looking at the old table (an RCU grace period: 4 to 16 ms on an idle machine, seven
//! times on the way to 20,000). That thread would be one that accepts, and all its connections would wait with it. So somebody who
//! carries no traffic asks for a descriptor far up in time.

use std::os::fd::{AsFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::close;
use tokio::time::{MissedTickBehavior, interval};

/// From the start: 128 KiB of the kernel's memory. No burst of a second fills half of it.
pub const ROOM: RawFd = 16 * 1024;
/// How often it is seen whether half of the room is taken.
const INTERVAL: Duration = Duration::from_secs(1);

/// Keeps room for as many descriptors as are open, up to `limit` in all. To be run where nobody waits for it.
pub async fn keep_room(limit: u64) {
    let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut room = 0;
    loop {
        ticks.tick().await;
        let grown = lowest_free(0).and_then(|open| {
            let wanted = wanted(room, open, limit);
            if wanted > room {
                lowest_free(wanted - 1)?;
            }
            Ok(wanted)
        });
        match grown {
            Ok(now) => room = now,
            // The last one is taken, or all are: there is no more room to be had.
            Err(Errno::EMFILE) => {}
            Err(error) => {
                tracing::debug!(%error, "no room for descriptors ahead");
                return;
            }
        }
    }
}

/// The room there should be, where there is `room`, so that no more than half of it is taken.
fn wanted(room: RawFd, open: RawFd, limit: RawFd) -> RawFd {
    if room > 0 && open <= room / 2 {
        return room;
    }
    let twice = open.max(room).saturating_mul(2);
    twice.max(ROOM).min(limit)
}

/// The lowest free one from `from` on. The kernel gives the lowest, so from 0 on as many are open.
fn lowest_free(from: RawFd) -> Result<RawFd, Errno> {
    let free = fcntl(std::io::stderr().as_fd(), FcntlArg::F_DUPFD_CLOEXEC(from))?;
    close(free)?;
    Ok(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the table.
    fn size() -> RawFd {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|l| l.strip_prefix("FDSize:"));
        size.unwrap().trim().parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_room_before_it_is_needed() {
        let limit = crate::process::descriptor_limit();
        let keeping = tokio::time::timeout(INTERVAL, keep_room(limit));
        keeping.await.expect_err("it goes on");
        let room = ROOM.min(limit.try_into().unwrap());
        assert!(size() >= room, "room for {} and not {room}", size());
    }

    #[test]
    fn half_of_it_is_free_up_to_the_limit() {
        let limit = 100_000;
        for (room, open, expected) in [
            (0, 10, ROOM),
            (ROOM, ROOM / 2, ROOM),
            (ROOM, ROOM / 2 + 1, 2 * ROOM),
            (ROOM, 40_000, 80_000),
            (80_000, 50_000, limit),
            (limit, 90_000, limit),
        ] {
            assert_eq!(wanted(room, open, limit), expected, "{open} of {room}");
        }
        assert_eq!(wanted(0, 10, 1024), 1024, "fewer are allowed");
    }
}
