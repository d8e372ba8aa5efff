//! Room for descriptors, ahead of those who need it.
//!
//! The kernel doubles a process' table of descriptors when it is full, and lets the thread that asked for one more wait
//! until no other thread can be looking at the old table (an RCU grace period; docs/performance.md has what that takes).
//! That thread would be one that accepts, and all its connections would wait with it. So somebody who carries no traffic
//! asks for a descriptor far up in time.

use std::convert::Infallible;
use std::os::fd::{AsFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::close;
use tokio::time::{MissedTickBehavior, interval};

use super::open_descriptors;

/// From the start: 128 KiB of the kernel's memory.
const ROOM: RawFd = 16 * 1024;
/// There is room for so many times what is open.
const TIMES: RawFd = 4;
/// How often that is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// The first room. Before anybody accepts nobody waits for it.
pub fn make_room(limit: u64) {
    make(wanted(0, 0, bounded(limit)));
}

/// Keeps room for more descriptors than are open, up to `limit` in all.
pub async fn keep_room(limit: u64) -> Infallible {
    let limit = bounded(limit);
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut room = wanted(0, 0, limit);
    loop {
        ticks.tick().await;
        let open = RawFd::try_from(open_descriptors()).unwrap_or(RawFd::MAX);
        let wanted = wanted(room, open, limit);
        if wanted > room {
            // Elsewhere: this thread has sockets to hand out.
            let made = tokio::task::spawn_blocking(move || make(wanted));
            if made.await.is_ok() {
                room = wanted;
            }
        }
    }
}

/// The room there should be, where there is `room`.
fn wanted(room: RawFd, open: RawFd, limit: RawFd) -> RawFd {
    if room > 0 && open <= room / TIMES {
        return room;
    }
    let more = open.saturating_mul(TIMES).max(room.saturating_mul(2));
    more.max(ROOM).min(limit)
}

/// The kernel has room for all below a descriptor that is open.
fn make(room: RawFd) {
    let highest = FcntlArg::F_DUPFD_CLOEXEC(room - 1);
    match fcntl(std::io::stderr().as_fd(), highest) {
        // What it refers to is open elsewhere: nothing is lost by an error.
        Ok(taken) => drop(close(taken)),
        // It is in use, so there is room.
        Err(Errno::EMFILE) => {}
        Err(error) => tracing::warn!(room, %error, "no room for descriptors is made ahead"),
    }
}

fn bounded(limit: u64) -> RawFd {
    RawFd::try_from(limit).unwrap_or(RawFd::MAX)
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

    #[test]
    fn there_is_room_from_the_start() {
        let limit = crate::process::descriptor_limit();
        make_room(limit);
        let room = ROOM.min(bounded(limit));
        assert!(size() >= room, "room for {} and not {room}", size());
    }

    #[test]
    fn a_quarter_of_it_is_taken_at_most() {
        let limit = 200_000;
        for (room, open, expected) in [
            (0, 0, ROOM),
            (ROOM, ROOM / 4, ROOM),
            (ROOM, ROOM / 4 + 1, 2 * ROOM),
            (ROOM, 20_000, 80_000),
            (80_000, 60_000, limit),
            (limit, 190_000, limit),
        ] {
            assert_eq!(wanted(room, open, limit), expected, "{open} of {room}");
        }
        assert_eq!(wanted(0, 10, 1024), 1024, "no more are allowed");
    }
}
