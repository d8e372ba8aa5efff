//! The process as the system sees it: descriptors, memory, privileges.

pub mod descriptors;
pub mod http;
pub mod lifecycle;
pub mod metrics;
pub mod privileges;
pub mod run;

use nix::sys::resource::{Resource, getrlimit};

/// Descriptors that are open now. 0 if /proc cannot be read.
pub fn open_descriptors() -> usize {
    // Since Linux 6.2 the size of the directory is the number of descriptors; before, it is zero.
    match std::fs::metadata("/proc/self/fd").map(|m| m.len()) {
        Ok(0) => std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        // A descriptor count is far below usize::MAX.
        Ok(count) => count as usize,
        Err(_) => 0,
    }
}

/// Most descriptors the process may open.
pub fn descriptor_limit() -> u64 {
    // 1024 is what the kernel starts processes with.
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
}
