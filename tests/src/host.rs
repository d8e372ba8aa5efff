//! What a lab must not touch (the host) and must not leave (its own traces).

use std::collections::BTreeSet;
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::lab::LabFootprint;
use crate::process::run;

/// Network configuration of the namespace the tests run in.
#[derive(Debug)]
pub struct HostState(Vec<(&'static str, BTreeSet<String>)>);

impl HostState {
    /// Reads it.
    pub fn read() -> Self {
        Self(
            [
                "ip -o link show",
                "ip rule show",
                "ip -6 rule show",
                "ip route show table all",
                "nft list ruleset",
                "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding",
            ]
            .into_iter()
            .map(|command| (command, lines(command)))
            .collect(),
        )
    }

    /// What is different in `after`.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let mut changed = Vec::new();
        for ((command, before), (_, after)) in self.0.iter().zip(&after.0) {
            changed.extend(
                after
                    .difference(before)
                    .map(|l| format!("{command}: new: {l}")),
            );
            changed.extend(
                before
                    .difference(after)
                    .map(|l| format!("{command}: gone: {l}")),
            );
        }
        changed
    }
}

fn lines(command: &str) -> BTreeSet<String> {
    let mut words = command.split(' ');
    let mut process = Command::new(words.next().unwrap_or_default());
    let output = run(process.args(words), Duration::from_secs(10));
    output
        .stdout
        .lines()
        .map(|l| l.trim().to_owned())
        .filter(|l| !l.is_empty())
        .collect()
}

/// Processor time of a process, and how long its threads have waited for a processor.
pub fn scheduled(pid: u32) -> [Duration; 2] {
    let mut all = [Duration::ZERO; 2];
    for thread in entries(&format!("/proc/{pid}/task")) {
        // A thread may end meanwhile.
        let of = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat"));
        let of = of.unwrap_or_default();
        for (sum, nanos) in all.iter_mut().zip(of.split(' ')) {
            *sum += Duration::from_nanos(nanos.parse().unwrap_or(0));
        }
    }
    all
}

/// Processor time that the machine beneath this one gave to others (proc_stat(5), "steal"; in hundredths of a second),
/// while something here wanted to run.
#[track_caller]
pub fn stolen() -> Duration {
    let stat = fs::read_to_string("/proc/stat").expect("/proc/stat is readable");
    let ticks = stat
        .lines()
        .next()
        .and_then(|all| all.split_whitespace().nth(8)?.parse().ok());
    let ticks: u64 = ticks.unwrap_or_else(|| panic!("no steal in {stat}"));
    Duration::from_millis(ticks * 10)
}

/// Namespaces, processes, mounts and files that a lab left.
pub fn leftovers(lab: &LabFootprint) -> Vec<String> {
    let mut left = Vec::new();
    let name = lab.name.as_str();
    for directory in [
        "/run",
        "/run/netns",
        "/var/run",
        "/run/warren",
        "/run/warren-lab",
        "/tmp",
        "/var/lib",
        "/etc/netns",
    ] {
        for entry in entries(directory) {
            if entry.contains(name) {
                left.push(format!("file {directory}/{entry}"));
            }
        }
    }
    for line in fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
    {
        if line.contains(name) {
            left.push(format!("mount {line}"));
        }
    }
    for pid in pids() {
        if pid == std::process::id() {
            continue;
        }
        let command = command_line(pid);
        let in_namespace = fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|m| lab.namespaces.contains(&m.st_ino()));
        if in_namespace || command.contains(name) {
            left.push(format!("process {pid} {command}"));
        }
    }
    left
}

/// All processes.
pub fn pids() -> Vec<u32> {
    entries("/proc")
        .iter()
        .filter_map(|n| n.parse().ok())
        .collect()
}

/// Command line of a process, arguments separated by spaces; empty when it is gone.
pub fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .replace('\0', " ")
        .trim()
        .to_owned()
}

/// A field of `/proc/<pid>/status`.
#[track_caller]
pub fn status_field(pid: u32, field: &str) -> String {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    text.lines()
        .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("{path} has no {field}"))
        .trim()
        .to_owned()
}

/// Child processes, of all threads.
pub fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in entries(&format!("/proc/{pid}/task")) {
        let path = format!("/proc/{pid}/task/{task}/children");
        let text = fs::read_to_string(path).unwrap_or_default();
        found.extend(
            text.split_whitespace()
                .filter_map(|p| p.parse::<u32>().ok()),
        );
    }
    found
}

/// A process and all its descendants.
pub fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while next < all.len() {
        all.extend(children(all[next]));
        next += 1;
    }
    all
}

/// Resident memory of a process and its descendants, in kibibytes. Proportional: what supervisor and
/// worker share counts once.
pub fn rss_kib(pid: u32) -> u64 {
    memory_kib(pid, "Pss:")
}

/// The part of it that the processes allocated. The rest are pages of the program file, which the kernel
/// brings and takes as it likes.
pub fn allocated_kib(pid: u32) -> u64 {
    memory_kib(pid, "Pss_Anon:")
}

fn memory_kib(pid: u32, field: &str) -> u64 {
    family(pid)
        .into_iter()
        .filter_map(|p| {
            let text = fs::read_to_string(format!("/proc/{p}/smaps_rollup")).ok()?;
            text.lines().find_map(|l| {
                l.strip_prefix(field)?
                    .trim()
                    .strip_suffix(" kB")?
                    .trim()
                    .parse::<u64>()
                    .ok()
            })
        })
        .sum()
}

/// Open descriptors of a process and its descendants.
pub fn descriptors(pid: u32) -> usize {
    family(pid)
        .into_iter()
        .map(|p| entries(&format!("/proc/{p}/fd")).len())
        .sum()
}

/// Inode of a network namespace file.
pub fn namespace_inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|m| m.st_ino())
}

fn entries(directory: &str) -> Vec<String> {
    let Ok(read) = fs::read_dir(directory) else {
        return Vec::new();
    };
    read.flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}
