//! Finds the network namespaces of pods that run already, without asking the container runtime: the kernel says which
//! processes belong to a pod (the kubelet names each pod's cgroup after its UID) and which namespace each is in.
//!
//! A pod's oldest process is in the pod's own namespace: the sandbox's, or where a runtime keeps none, a container's
//! first. Namespaces that a container made for itself belong to younger ones.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::netns::{Netns, NetnsRecord};

#[cfg(test)]
mod tests;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Running {
    /// The `/proc` of the node's own process namespace.
    pub proc_dir: PathBuf,
    /// Where the runtime mounts pods' network namespaces.
    pub netns_dir: PathBuf,
}

impl Running {
    /// The namespaces of those of the pods that run now. Pods on the node's own network (`host`) are left out.
    pub fn find(&self, uids: &HashSet<String>, host: &Netns) -> HashMap<String, NetnsRecord> {
        // UID -> when its oldest process started, and where that is.
        let mut oldest: HashMap<String, (u64, PathBuf)> = HashMap::new();
        for process in entries(&self.proc_dir) {
            let Some((uid, start)) = pod_of(&process) else {
                continue;
            };
            let older = oldest.get(&uid).is_none_or(|(other, _)| start < *other);
            if uids.contains(&uid) && older {
                oldest.insert(uid, (start, process.join("ns/net")));
            }
        }
        (oldest.into_iter())
            .filter_map(|(uid, (_, path))| {
                // Fails when the process has ended meanwhile.
                let netns = Netns::open(&path).ok()?;
                let record = NetnsRecord {
                    path: self.lasting(&netns).unwrap_or(path),
                    id: netns.id(),
                };
                (netns.id() != host.id()).then_some((uid, record))
            })
            .collect()
    }

    /// The runtime's own name for the namespace: unlike a process, it is there as long as the sandbox.
    pub fn lasting(&self, netns: &Netns) -> Option<PathBuf> {
        entries(&self.netns_dir)
            .find(|path| Netns::open(path).is_ok_and(|other| other.id() == netns.id()))
    }
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    (fs::read_dir(directory).into_iter().flatten().flatten()).map(|entry| entry.path())
}

/// The pod a process belongs to, and when it started in ticks since the boot. `None`: to no pod, or it has ended.
fn pod_of(process: &Path) -> Option<(String, u64)> {
    let uid = pod_uid(&fs::read_to_string(process.join("cgroup")).ok()?)?;
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // proc_pid_stat(5): the second field is in parentheses and may hold any byte; the start is the 22nd.
    let (_, fields) = stat.rsplit_once(") ")?;
    let start = fields.split(' ').nth(START - 3)?.parse().ok()?;
    Some((uid, start))
}

/// The UID in a process's cgroups: `.../pod<uid>/...`, or `...-pod<uid>.slice/...` with `_` for `-` where systemd
/// makes them. The outermost counts; a container can make more inside its own.
fn pod_uid(cgroups: &str) -> Option<String> {
    (cgroups.lines())
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .flat_map(|path| path.split('/'))
        .find_map(|name| {
            let name = name.strip_suffix(".slice").unwrap_or(name);
            let (before, uid) = name.rsplit_once("pod")?;
            let uid = uid.replace('_', "-");
            let is_uid = uid.len() >= 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
            (is_uid && (before.is_empty() || before.ends_with('-'))).then_some(uid)
        })
}

const START: usize = 22;
