//! PID 1 of the proxy's container: starts the worker, restarts it when it dies, and passes signals on.
//!
//! It exists so that the kubelet's restart back-off (10 s and more) never stands between a crash and the
//! next accept. It reads no configuration and no byte of a peer. The listening sockets are the agent's, so
//! what waits in their queues is served by the next worker.
//!
//! The worker dies with its supervisor (PR_SET_PDEATHSIG), and the supervisor ends with the worker's exit
//! code when it was asked to stop or when the worker says that a restart is no use (`EX_CONFIG`).

use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::memory;
use crate::process::privileges::{PrivilegeError, Privileges};
use crate::seccomp::{self, Profile, SeccompError};

/// Exit code of a worker whose configuration is at fault (sysexits.h, EX_CONFIG).
pub const EX_CONFIG: u8 = 78;

/// What the supervisor is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Passed to the worker.
    pub config: PathBuf,
    /// Run although root or with capabilities.
    pub allow_privileged: bool,
}

/// Why the supervisor ended early.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// It has more rights than it needs.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// The system call filter is not in force.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// A call to the kernel failed.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

impl SupervisorError {
    /// What the process exits with.
    pub fn code(&self) -> u8 {
        match self {
            // Another start would fail alike.
            Self::Privileges(_) => EX_CONFIG,
            Self::Seccomp(_) | Self::System(..) => 1,
        }
    }
}

/// Runs until asked to stop; returns the exit code.
pub fn run(options: &Options) -> Result<u8, SupervisorError> {
    let signals = block_signals().map_err(|e| SupervisorError::System("blocking signals", e))?;
    harden(Profile::Supervisor, "supervisor", options.allow_privileged)?;
    supervise(options, &signals)
}

/// Gives up what is not needed, checks that nothing more is left, and says so in one line. The filter is in
/// force for all threads that start later: there must be no other yet.
pub fn harden(profile: Profile, role: &str, allow_privileged: bool) -> Result<(), SupervisorError> {
    let system = |what| move |e: nix::Error| SupervisorError::System(what, e.into());
    prctl::set_no_new_privs().map_err(system("no_new_privs"))?;
    // Otherwise a worker, started as /proc/self/exe, is called `exe` by ps and top.
    prctl::set_name(c"warren-proxy").map_err(system("PR_SET_NAME"))?;
    // A limit that cannot be raised is no reason to stop; the stocks and budgets adapt to it. Root could
    // not be told from a sandbox here.
    let _ = mesh_api::descriptors::raise_limit();
    let privileges = Privileges::read()?;
    if !allow_privileged {
        privileges.check()?;
    }
    seccomp::apply(profile)?;
    // No core dumps with keys in them, and no ptrace by others of the same user.
    prctl::set_dumpable(false).map_err(system("PR_SET_DUMPABLE"))?;
    eprintln!(
        "warren-node-proxy {} {role}: {}",
        env!("CARGO_PKG_VERSION"),
        Privileges::read()?
    );
    Ok(())
}

/// What the worker calls first: dies with its supervisor. `false`: it is dead already.
pub fn tie_to_parent(supervisor: u32) -> io::Result<bool> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the line above.
    Ok(u32::try_from(Pid::parent().as_raw()) == Ok(supervisor))
}

/// Lets signals through again that the supervisor blocked before it started this process.
pub fn unblock_signals() -> io::Result<()> {
    Ok(handled_signals().thread_unblock()?)
}

fn handled_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]
        .into_iter()
        .collect()
}

fn block_signals() -> io::Result<SigSet> {
    let signals = handled_signals();
    signals.thread_block()?;
    Ok(signals)
}

fn supervise(options: &Options, signals: &SigSet) -> Result<u8, SupervisorError> {
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        let worker = match spawn(options) {
            Ok(worker) => worker,
            Err(error) => {
                // Out of memory or processes: it passes, or the kernel says so again.
                let pause = backoff.after(started.elapsed());
                eprintln!(
                    "warren-node-proxy supervisor: no worker can be started ({error}); next try in {} ms",
                    pause.as_millis()
                );
                if stopped_within(pause, signals)? {
                    return Ok(1);
                }
                continue;
            }
        };
        // From here on it waits.
        memory::unmap_program();
        let (status, asked_to_stop) = attend(worker, signals)?;
        let code = exit_code(status);
        if asked_to_stop || code == EX_CONFIG {
            return Ok(code);
        }
        let pause = backoff.after(started.elapsed());
        eprintln!(
            "warren-node-proxy supervisor: worker {worker} ended ({status}) after {:.1} s; next one in {} ms",
            started.elapsed().as_secs_f64(),
            pause.as_millis()
        );
        if stopped_within(pause, signals)? {
            return Ok(code);
        }
    }
}

fn spawn(options: &Options) -> io::Result<Pid> {
    // Not the path it was started by: that file may have been replaced by another version.
    let child = Command::new("/proc/self/exe")
        .arg0("warren-node-proxy")
        .arg("--worker")
        .arg(std::process::id().to_string())
        .arg("--config")
        .arg(&options.config)
        .args(options.allow_privileged.then_some("--allow-privileged"))
        .env(TUNABLES, tunables(std::env::var_os(TUNABLES)))
        .spawn()?;
    // Awaited with waitpid below, together with orphans that PID 1 inherits.
    Ok(Pid::from_raw(
        i32::try_from(child.id()).map_err(io::Error::other)?,
    ))
}

/// The C library's settings for the worker: what was given, and that copies are made with vector instructions.
///
/// From some 2 KiB on glibc copies with `rep movsb`, which on AMD Zen 3 and 4 takes 30 times as long when the
/// target is a few bytes ahead of the source modulo 4096 (glibc bug 30994; changed in 2.39). A payload of whole
/// pages that gets a TLS record's or a frame's head in front is just that. Vector instructions are as fast
/// everywhere else. A libc that does not know the setting ignores it.
fn tunables(given: Option<OsString>) -> OsString {
    const VECTOR_COPIES: &str = "glibc.cpu.x86_rep_movsb_threshold=0x40000000";
    match given {
        None => VECTOR_COPIES.into(),
        Some(mut given) => {
            given.push(":");
            given.push(VECTOR_COPIES);
            given
        }
    }
}

/// What glibc reads at a program's start.
const TUNABLES: &str = "GLIBC_TUNABLES";

/// Passes signals on until the worker has ended.
fn attend(worker: Pid, signals: &SigSet) -> Result<(ExitStatus, bool), SupervisorError> {
    let mut asked_to_stop = false;
    loop {
        if let Some(status) = reap(worker)? {
            return Ok((status, asked_to_stop));
        }
        match sys::wait_for_signal(signals, None)
            .map_err(|e| SupervisorError::System("sigtimedwait", e))?
        {
            Some(signal @ (Signal::SIGTERM | Signal::SIGINT)) => {
                asked_to_stop = true;
                // It can only fail when the worker has just ended, and that is seen next.
                let _ = kill(worker, signal);
            }
            Some(_child) => {}
            None => {}
        }
    }
}

/// Collects ended processes; returns the worker's status if it is among them.
fn reap(worker: Pid) -> Result<Option<ExitStatus>, SupervisorError> {
    loop {
        let (pid, raw) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code << 8),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, signal as i32),
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(_) | Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(SupervisorError::System("waitpid", error.into())),
        };
        if pid == worker {
            return Ok(Some(ExitStatus::from_raw(raw)));
        }
    }
}

/// Waits before the next start. `true`: asked to stop meanwhile.
fn stopped_within(pause: Duration, signals: &SigSet) -> Result<bool, SupervisorError> {
    let until = Instant::now() + pause;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let signal = sys::wait_for_signal(signals, Some(left))
            .map_err(|e| SupervisorError::System("sigtimedwait", e))?;
        match signal {
            Some(Signal::SIGTERM | Signal::SIGINT) => return Ok(true),
            Some(_) => {}
            None if left.is_zero() => return Ok(false),
            None => {}
        }
    }
}

/// As a shell gives it: 128 and the signal's number for a death by signal.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Pauses between restarts: none after the first death, then 100 ms doubling up to 2 s while workers keep
/// dying young.
#[derive(Debug, Default)]
struct Backoff {
    quick_deaths: u32,
}

const LONG_LIFE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Backoff {
    fn after(&mut self, life: Duration) -> Duration {
        if life >= LONG_LIFE {
            self.quick_deaths = 0;
        }
        let pause = match self.quick_deaths {
            0 => Duration::ZERO,
            // 2^5 x 100 ms is over the longest already.
            deaths => (FIRST_PAUSE * (1 << (deaths - 1).min(5))).min(LONGEST_PAUSE),
        };
        self.quick_deaths = self.quick_deaths.saturating_add(1);
        pause
    }
}

#[allow(unsafe_code)]
mod sys {
    use std::io;
    use std::time::Duration;

    use nix::sys::signal::{SigSet, Signal};

    /// Takes the next of the blocked signals; `None` when the time is over or another signal came.
    pub(super) fn wait_for_signal(
        signals: &SigSet,
        timeout: Option<Duration>,
    ) -> io::Result<Option<Signal>> {
        let timeout = timeout.map(|timeout| libc::timespec {
            // Both in range: timeouts are seconds, and below 10^9 nanoseconds by type.
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
        });
        let timeout_pointer = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the set and the timeout are valid for the call; a null siginfo and a null timeout are allowed.
        let signal =
            unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), timeout_pointer) };
        if signal >= 0 {
            return Ok(Signal::try_from(signal).ok());
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(None),
            error => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_workers_die_young_and_start_over_after_a_long_life() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..8)
            .map(|_| backoff.after(Duration::from_secs(1)).as_millis())
            .collect();
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(backoff.after(LONG_LIFE), Duration::ZERO);
        assert_eq!(backoff.after(Duration::ZERO), FIRST_PAUSE);
    }

    #[test]
    fn settings_of_the_c_library_are_added_to_those_given() {
        let own = "glibc.cpu.x86_rep_movsb_threshold=0x40000000";
        assert_eq!(tunables(None), own);
        let given = tunables(Some("glibc.malloc.check=3".into()));
        assert_eq!(
            given.into_string().unwrap(),
            format!("glibc.malloc.check=3:{own}")
        );
    }

    #[test]
    fn exit_codes_are_a_shells() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGKILL)), 137);
    }
}
