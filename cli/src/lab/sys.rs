//! Calls to the kernel that no safe wrapper has.

use std::io;

/// Takes every capability out of the bounding set of the calling thread, so that no program it starts can
/// get one back. Stops at the first number the kernel does not know.
pub(crate) fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            // EINVAL: there is no such capability, nor any above.
            return match error.raw_os_error() {
                Some(libc::EINVAL) => Ok(()),
                _ => Err(error),
            };
        }
    }
    Ok(())
}
