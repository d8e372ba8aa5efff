//! Starting and ending the lab's processes.
//!
//! Invariant: what is started here dies with the daemon. The kernel ties that to the *thread* that started
//! it (prctl(2), PR_SET_PDEATHSIG), so everything here runs on the daemon's only thread.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::linux::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use super::launch::Launch;
use crate::error::{Context, Error, Result};

/// Starts a process with its output appended to `log`.
pub(crate) fn start(launch: &Launch, log: &Path) -> Result<Child> {
    let log = append_to(log)?;
    let errors = log.try_clone().context("log")?;
    command(launch)?
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .context("starting a process")
}

/// What a short-lived process left.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a process to its end; one that takes longer is killed.
pub(crate) async fn run(launch: &Launch, input: &str, limit: Duration) -> Result<Finished> {
    let name = launch.argv.first().map_or("", |name| name);
    let mut child = command(launch)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context(name)?;
    let stdin = child.stdin.take();
    let talk = async {
        if let Some(mut stdin) = stdin {
            // A program that ends without reading says why in its own words.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    match tokio::time::timeout(limit, talk).await {
        Ok(output) => {
            let output = output.context(name)?;
            Ok(Finished {
                status: output.status,
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            })
        }
        Err(_) => Err(Error::new(format!(
            "{name}: still runs after {limit:?}, killed"
        ))),
    }
}

fn command(launch: &Launch) -> Result<Command> {
    let launch = Launch {
        parent: Some(std::process::id()),
        ..launch.clone()
    };
    let spec = serde_json::to_string(&launch).context("launch")?;
    // Not by its path: that file may have been replaced by another version.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("warren").args(["lab", "launch", "--", &spec]);
    Ok(command)
}

/// Opens a log to add to it, and makes its directory.
pub(crate) fn append_to(log: &Path) -> Result<File> {
    let what = || format!("log {}", log.display());
    if let Some(parent) = log.parent() {
        std::fs::create_dir_all(parent).context(what())?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .context(what())
}

/// Sends SIGTERM, and SIGKILL after `grace`; returns when the process has ended.
pub(crate) async fn end(child: &mut Child, grace: Duration) {
    if let Some(pid) = child.id() {
        signal(pid, Signal::SIGTERM);
    }
    if tokio::time::timeout(grace, child.wait()).await.is_err() {
        // Fails only when it has ended meanwhile.
        let _ = child.start_kill();
        let _ = child.wait().await;
    }
}

/// Sends a signal; a process that is gone is no error.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// How a process ended, for people.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("ended by {signal}"),
            Err(_) => format!("ended by signal {signal}"),
        },
        (None, None) => "ended".into(),
    }
}

/// What tells a network namespace from all others.
pub(crate) type NetnsId = (u64, u64);

/// The identity of the namespace behind a file. `None`: the file is none, or a leftover that is not
/// mounted any more.
pub(crate) fn netns_id(path: &Path) -> Option<NetnsId> {
    let own = std::fs::metadata("/proc/self/ns/net").ok()?;
    let there = std::fs::metadata(path).ok()?;
    let id = (there.st_dev(), there.st_ino());
    // On another file system it is an empty file; and never the namespace of whoever asks.
    (there.st_dev() == own.st_dev() && there.st_ino() != own.st_ino()).then_some(id)
}

/// All processes whose network namespace is one of these.
pub(crate) fn in_namespaces(namespaces: &BTreeSet<NetnsId>) -> Vec<u32> {
    let me = std::process::id();
    pids()
        .filter(|pid| *pid != me)
        .filter(|pid| {
            std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|m| namespaces.contains(&(m.st_dev(), m.st_ino())))
        })
        .collect()
}

/// All processes of the machine.
pub(crate) fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

/// Child processes, of all threads.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|p| p.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

/// Arguments of a process; empty when it is gone.
pub(crate) fn command_line(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .split_terminator('\0')
        .map(str::to_owned)
        .collect()
}

/// Whether a process exists and is not a zombie.
pub(crate) fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may hold anything but ends at the last parenthesis; the state follows.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
