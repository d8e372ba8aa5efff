//! The system calls that the supervisor and its worker may make. Everything else returns EPERM and is
//! written to the kernel's audit log (rate-limited, `type=1326`).
//!
//! Filters stack and the strictest answer wins, so the supervisor's list, which its worker inherits, is
//! the worker's plus what starting a process takes. The worker then adds its own filter before its first
//! thread starts and before any byte of a peer is read. In it, among others, `execve`, `fork`, `ptrace`,
//! `mount`, `setns`, `unshare`, `bpf`, `keyctl` and `io_uring_setup` are denied, memory cannot be made
//! executable, and sockets are of the families unix, IPv4 and IPv6 only.
//!
//! Calls of the data path carry no condition on their arguments: the kernel then knows their verdict from
//! a bitmap and does not run the filter (since Linux 5.11).

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

mod calls;
#[cfg(test)]
mod tests;

/// Whose filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Starts and restarts the worker; parses nothing.
    Supervisor,
    /// Everything else.
    Worker,
}

/// Why the filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The filter cannot be built for this machine.
    #[error("seccomp filter: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("seccomp: {0}; the kernel must have CONFIG_SECCOMP_FILTER")]
    Install(#[from] std::io::Error),
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Applies the profile to the calling thread and all that it starts. Sets `no_new_privs`.
pub fn apply(profile: Profile) -> Result<(), SeccompError> {
    if profile == Profile::Supervisor {
        sys::install(&no_clone3()?, false)?;
    }
    sys::install(&allow_list(profile)?, true)?;
    Ok(())
}

/// `clone3` takes its flags through memory, where a filter cannot see them. ENOSYS makes libc use `clone`.
/// The allow-list passes `clone3`, and the stricter answer, this one, wins.
fn no_clone3() -> Result<BpfProgram, SeccompError> {
    let rules = Rules::from([(libc::SYS_clone3, vec![])]);
    build(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )
}

fn allow_list(profile: Profile) -> Result<BpfProgram, SeccompError> {
    let mut rules: Rules = calls::BOTH.iter().map(|call| (*call, vec![])).collect();
    // Of the calling thread only.
    for call in [libc::SYS_sched_getattr, libc::SYS_sched_setattr] {
        rules.insert(call, one_of(0, &[0])?);
    }
    match profile {
        Profile::Supervisor => {
            rules.extend(calls::SUPERVISOR.iter().map(|call| (*call, vec![])));
            rules.insert(
                libc::SYS_clone,
                vec![all(vec![no_bits(0, calls::NAMESPACES)?])?],
            );
        }
        Profile::Worker => {
            let thread = libc::CLONE_THREAD as u64;
            let is_thread = SeccompCondition::new(
                0,
                SeccompCmpArgLen::Qword,
                SeccompCmpOp::MaskedEq(thread | calls::NAMESPACES),
                thread,
            )?;
            rules.insert(libc::SYS_clone, vec![all(vec![is_thread])?]);
            for call in [libc::SYS_mmap, libc::SYS_mprotect] {
                rules.insert(call, vec![all(vec![no_bits(2, libc::PROT_EXEC as u64)?])?]);
            }
            rules.insert(libc::SYS_socket, one_of(0, &calls::FAMILIES)?);
            rules.insert(libc::SYS_ioctl, one_of(1, &calls::IOCTLS)?);
            rules.insert(libc::SYS_prctl, one_of(0, &calls::PRCTLS)?);
            // Limits may be read, not set.
            let only_read = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
            rules.insert(libc::SYS_prlimit64, vec![all(vec![only_read])?]);
        }
    }
    build(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )
}

fn build(
    rules: Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, SeccompError> {
    let machine = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, matched, machine)?.try_into()?)
}

fn all(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, SeccompError> {
    Ok(SeccompRule::new(conditions)?)
}

fn no_bits(argument: u8, bits: u64) -> Result<SeccompCondition, SeccompError> {
    let operator = SeccompCmpOp::MaskedEq(bits);
    Ok(SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Qword,
        operator,
        0,
    )?)
}

fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, SeccompError> {
    let rule = |value: &u64| {
        // The kernel takes these arguments as 32-bit integers and ignores the upper half.
        let operator = SeccompCmpOp::Eq;
        all(vec![SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            operator,
            *value,
        )?])
    };
    values.iter().map(rule).collect()
}

#[allow(unsafe_code)]
mod sys {
    use std::io;

    use seccompiler::BpfProgramRef;

    /// As `seccompiler::apply_filter`, and with the flag that makes the kernel log what was denied.
    pub(super) fn install(program: BpfProgramRef<'_>, log: bool) -> io::Result<()> {
        nix::sys::prctl::set_no_new_privs()?;
        let length = u16::try_from(program.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "filter too long"))?;
        let program = libc::sock_fprog {
            len: length,
            filter: program.as_ptr().cast_mut().cast(),
        };
        let flags = if log {
            libc::SECCOMP_FILTER_FLAG_LOG
        } else {
            0
        };
        // SAFETY: `program` points to `len` instructions that live until the call returns; the kernel copies
        // them and writes nothing. seccompiler's sock_filter is #[repr(C)] with the kernel's layout.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}
