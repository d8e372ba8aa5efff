//! How a process gets into a pod: `warren lab launch SPEC` prepares itself and then becomes the program.
//!
//! Done in a process of its own instead of between fork and exec, because there only little may be called;
//! here everything can be, and the process id stays the same.
//!
//! Order matters: namespaces and mounts need the rights that are given up next, and a change of user clears
//! the parent-death signal (prctl(2)), so that one comes last.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, setgid, setgroups, sethostname, setsid, setuid};
use serde::{Deserialize, Serialize};

use super::sys;
use crate::error::{Context, Error, Result};

/// What to become.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Launch {
    /// Program and arguments. A program without a slash is looked for in the PATH of `env`.
    pub(crate) argv: Vec<String>,
    /// The whole environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Network namespace; none: the caller's.
    pub(crate) netns: Option<PathBuf>,
    /// Files put over others, in a mount namespace of its own: (what, over what). A file that this
    /// machine does not have is not covered.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// Host name, in a UTS namespace of its own.
    pub(crate) hostname: Option<String>,
    pub(crate) workdir: Option<PathBuf>,
    /// User and group; none: root.
    pub(crate) user: Option<(u32, u32)>,
    /// No capability now or later, and none from programs with file capabilities.
    pub(crate) unprivileged: bool,
    /// Die with this process, and be the leader of a session of one's own.
    pub(crate) parent: Option<u32>,
    /// Open the program while still root: it may lie where `user` cannot look.
    pub(crate) open_first: bool,
}

/// Becomes the process of a JSON [`Launch`]; returns only when that fails.
pub(crate) fn from_argument(spec: &str) -> Error {
    match serde_json::from_str::<Launch>(spec) {
        Ok(launch) => launch.become_it(),
        Err(e) => Error::new(format!("launch: {e}")),
    }
}

impl Launch {
    /// Becomes the program; returns only when that fails.
    pub(crate) fn become_it(&self) -> Error {
        let program = match self.prepare() {
            Ok(program) => program,
            Err(e) => return e,
        };
        let Some((name, arguments)) = self.argv.split_first() else {
            return Error::new("launch: no program was named");
        };
        let path: &OsStr = program
            .as_ref()
            .map_or(OsStr::new(name), |p| p.path.as_os_str());
        let cause = Command::new(path)
            .arg0(name)
            .args(arguments)
            .env_clear()
            .envs(&self.env)
            .exec();
        Error::new(format!("cannot run {name}: {cause}"))
    }

    fn prepare(&self) -> Result<Option<Program>> {
        if let Some(netns) = &self.netns {
            let what = || format!("network namespace {}", netns.display());
            let file = File::open(netns).context(what())?;
            setns(file, CloneFlags::CLONE_NEWNET).context(what())?;
        }
        if !self.files.is_empty() {
            self.cover_files()?;
        }
        if let Some(hostname) = &self.hostname {
            unshare(CloneFlags::CLONE_NEWUTS).context("a UTS namespace")?;
            // The kernel takes 64 bytes, as a Kubernetes host name has.
            let end = hostname.len().min(63);
            sethostname(&hostname[..end]).context("the host name")?;
        }
        // As container runtimes do. Cannot fail: a soft limit may always be raised to the hard one.
        let _ = mesh_api::descriptors::raise_limit();
        // Before the rights are gone: the program may lie where only root can look.
        let program = match self.argv.first() {
            Some(path) if self.open_first => Some(Program::open(path)?),
            _ => None,
        };
        if let Some(dir) = &self.workdir {
            std::env::set_current_dir(dir).context(format!("workingDir {}", dir.display()))?;
        }
        if self.parent.is_some() {
            // Fails only for the leader of a group, which a child just started is not.
            let _ = setsid();
        }
        if self.unprivileged {
            sys::drop_bounding_set().context("dropping capabilities")?;
            prctl::set_no_new_privs().context("no_new_privs")?;
        }
        if let Some((uid, gid)) = self.user {
            setgroups(&[]).context("setgroups")?;
            setgid(Gid::from_raw(gid)).context("setgid")?;
            setuid(Uid::from_raw(uid)).context("setuid")?;
        }
        if let Some(parent) = self.parent {
            prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
            // It may have died before the line above.
            if u32::try_from(Pid::parent().as_raw()) != Ok(parent) {
                return Err(Error::new("the lab's daemon is gone"));
            }
        }
        Ok(program)
    }

    fn cover_files(&self) -> Result<()> {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
        // Slave, not private: a namespace that is deleted on the outside must go here too.
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(NONE, "/", NONE, slave, NONE).context("a mount namespace")?;
        for (what, over) in &self.files {
            if Path::new(over).exists() {
                mount(Some(what), over, NONE, MsFlags::MS_BIND, NONE).context(format!(
                    "mounting {} over {}",
                    what.display(),
                    over.display()
                ))?;
            }
        }
        Ok(())
    }
}

/// A program that is open, to be run by its descriptor.
struct Program {
    path: PathBuf,
    _file: File,
}

impl Program {
    fn open(path: &str) -> Result<Self> {
        let file = File::open(path).context(path)?;
        // It must still be there when the program is run; what runs may keep it.
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).context(path)?;
        Ok(Self {
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            _file: file,
        })
    }
}
