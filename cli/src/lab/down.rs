//! `down`: ends a lab and removes every trace of it, also when its daemon or all its state is gone.
//!
//! Nothing here relies on what the daemon knew: namespaces are found by their names, processes by the
//! namespace they are in, mounts by where they are.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::names::{LABS, LabName, netns_path};
use super::{netns, processes};
use crate::error::{Context, Error, Result};

/// Ends a lab.
pub(crate) fn down(name: &LabName) -> Result<()> {
    let was_there = daemon_pid(name).is_some()
        || name.paths().dir().exists()
        || !netns::list(&name.netns_prefix()).is_empty();
    if !was_there {
        super::view::say(format_args!("there is no lab {name}"));
        return Ok(());
    }
    clean(name)?;
    super::view::say(format_args!("lab {name} is gone"));
    Ok(())
}

/// Removes all there is of a lab.
pub(crate) fn clean(name: &LabName) -> Result<()> {
    end_daemon(name);
    let namespaces = netns::list(&name.netns_prefix());
    let ids: BTreeSet<_> = namespaces
        .iter()
        .filter_map(|n| processes::netns_id(&netns_path(n)))
        .collect();
    end_processes(&ids)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("runtime")?;
    runtime.block_on(async {
        for namespace in &namespaces {
            netns::delete(namespace).await?;
        }
        Ok(())
    })?;
    let dir = name.paths().dir().to_owned();
    unmount_below(&dir)?;
    match std::fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(dir.display()),
        _ => Ok(()),
    }
}

/// The daemon, if it runs. A process id alone proves nothing: it may be another's by now.
pub(crate) fn daemon_pid(name: &LabName) -> Option<u32> {
    let recorded = std::fs::read_to_string(name.paths().daemon_pid()).ok();
    let recorded = recorded.and_then(|text| text.trim().parse::<u32>().ok());
    recorded.filter(|pid| is_daemon(*pid, name))
}

fn is_daemon(pid: u32, name: &LabName) -> bool {
    let line = processes::command_line(pid);
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    words.get(1..) == Some(&["lab", "daemon", "--name", name.as_str()])
        && processes::is_running(pid)
}

/// All daemons of that lab: also those whose record is lost.
fn end_daemon(name: &LabName) {
    let daemons: Vec<u32> = processes::pids()
        .filter(|pid| is_daemon(*pid, name))
        .collect();
    let alive = |pid: &&u32| is_daemon(**pid, name);
    for (signal, patience) in [
        (Signal::SIGTERM, Duration::from_secs(4)),
        (Signal::SIGKILL, Duration::from_secs(2)),
    ] {
        for pid in daemons.iter().filter(alive) {
            processes::signal(*pid, signal);
            // It may be stopped; a signal to end would wait for ever.
            processes::signal(*pid, Signal::SIGCONT);
        }
        let deadline = Instant::now() + patience;
        while daemons.iter().any(|pid| is_daemon(*pid, name)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Ends every process in these namespaces.
fn end_processes(namespaces: &BTreeSet<processes::NetnsId>) -> Result<()> {
    for (signal, patience) in [
        (Signal::SIGTERM, Duration::from_secs(2)),
        (Signal::SIGKILL, Duration::from_secs(5)),
    ] {
        let deadline = Instant::now() + patience;
        let mut told = BTreeSet::new();
        loop {
            let left = processes::in_namespaces(namespaces);
            if left.is_empty() {
                return Ok(());
            }
            for pid in left {
                // New ones may appear while others end.
                if told.insert(pid) {
                    processes::signal(pid, signal);
                    processes::signal(pid, Signal::SIGCONT);
                }
            }
            if Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let left: Vec<String> = processes::in_namespaces(namespaces)
        .iter()
        .map(|pid| format!("{pid} {}", processes::command_line(*pid).join(" ")))
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "processes that do not end, not even by SIGKILL: {}",
        left.join("; ")
    )))
}

/// The tmpfs of the keys, where there is one.
fn unmount_below(dir: &Path) -> Result<()> {
    debug_assert!(dir.starts_with(LABS));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let below: Vec<&str> = points
        .filter(|point| Path::new(point).starts_with(dir))
        .collect();
    for point in below.into_iter().rev() {
        umount2(point, MntFlags::MNT_DETACH).context(format!("unmounting {point}"))?;
    }
    Ok(())
}
