//! How many descriptors a process may open. Many systems start processes with room for a thousand, for the sake of
//! programs that use `select`; every part of Warren may need more.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit to the hard limit, and returns that. Needs no privilege.
pub fn raise_limit() -> nix::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}
