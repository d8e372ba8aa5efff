//! Gives memory back to the system: after a burst, and after the start.
//!
//! The allocator keeps what ended connections leave, for the next ones; a thread that is idle never
//! returns it. Each thread that carries traffic therefore looks now and then whether most of a burst is
//! over, and has its own heap collected.
//!
//! The start runs through much more of the program than what follows, and the kernel maps 16 pages of
//! the file wherever one is touched: in the end nearly all of it. [`unmap_program`] makes that start over.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

/// How often a thread looks.
const INTERVAL: Duration = Duration::from_secs(5);
/// A peak below this is no burst.
const BURST: usize = 64;
/// Looks after a burst at which the heap is collected once more: tunnels that the burst opened, and connections kept for
/// apps, are released while they idle, the last after five minutes.
const AFTERWARDS: [u32; 3] = [6, 15, 65];

/// Runs on the thread whose heap is meant, for as long as the thread. `live` tells how many connections
/// there are.
pub async fn reclaim(live: impl Fn() -> usize) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut peak = 0;
    let mut since = u32::MAX;
    loop {
        ticks.tick().await;
        since = since.saturating_add(1);
        let over = burst_is_over(&mut peak, live());
        if over {
            since = 0;
        }
        if over || AFTERWARDS.contains(&since) {
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

/// Unmaps the program's pages, and its libraries', of this process. What is needed is mapped again when it is
/// touched, from the page cache, where the pages stay.
pub fn unmap_program() {
    sys::unmap_program();
}

#[allow(unsafe_code)]
mod sys {
    use std::ffi::{c_int, c_void};

    pub(super) fn unmap_program() {
        // SAFETY: the callback reads what the loader passes it, during the call, and keeps nothing.
        unsafe { libc::dl_iterate_phdr(Some(unmap), std::ptr::null_mut()) };
    }

    unsafe extern "C" fn unmap(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        _data: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader passes a valid object with `dlpi_phnum` program headers.
        let (base, headers) = unsafe {
            let info = &*info;
            let count = usize::from(info.dlpi_phnum);
            (
                info.dlpi_addr,
                std::slice::from_raw_parts(info.dlpi_phdr, count),
            )
        };
        for header in headers {
            if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
                continue;
            }
            let begin = (base + header.p_vaddr).next_multiple_of(PAGE);
            let end = (base + header.p_vaddr + header.p_memsz) / PAGE * PAGE;
            if begin < end {
                // SAFETY: the pages belong to a segment that was never writable, so they are as in the
                // file, and the kernel reads them from there again. A failure leaves them mapped.
                unsafe {
                    libc::madvise(
                        begin as *mut c_void,
                        (end - begin) as usize,
                        libc::MADV_DONTNEED,
                    )
                };
            }
        }
        0
    }

    /// The largest page of the platforms Linux runs on with 64 bits, so that a boundary is one for all.
    const PAGE: u64 = 64 * 1024;

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
    fn the_program_runs_on_without_its_pages() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = text.lines().find_map(|l| l.strip_prefix("RssFile:"));
            let kib = line.unwrap().trim().trim_end_matches(" kB");
            kib.parse::<usize>().unwrap()
        };
        let before = resident();
        unmap_program();
        let after = resident();
        assert!(after < before, "{after} KiB resident, {before} before");
    }

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
