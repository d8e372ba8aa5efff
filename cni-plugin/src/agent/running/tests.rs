#![allow(clippy::unwrap_used)]

use std::os::unix::fs::symlink;

use super::*;

const UID: &str = "0b5fd1ac-2a32-4c1c-8a5f-0e86ae26a0d3";
const OTHER: &str = "9d3c0e44-7a0b-4c57-9f7c-4a7f3f0f6a11";

#[test]
fn the_uid_is_read_from_every_form_of_cgroup() {
    let under = UID.replace('-', "_");
    for cgroups in [
        format!("0::/kubepods/burstable/pod{UID}/cri-1\n"),
        format!(
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-1.scope"
        ),
        // A guaranteed pod; version 1, from inside another cgroup namespace.
        format!("0::/kubepods.slice/kubepods-pod{under}.slice/crio-1.scope"),
        format!("12:pids:/../../node-2/kubepods/pod{UID}/x\n11:cpuset:/../pod{UID}/x\n0::/\n"),
        // A container that makes a cgroup named after another pod.
        format!("0::/kubepods/pod{UID}/x/pod{OTHER}"),
    ] {
        assert_eq!(pod_uid(&cgroups).as_deref(), Some(UID), "{cgroups}");
    }
    for cgroups in [
        "0::/\n",
        "0::/kubepods/besteffort",
        "0::/system.slice/podman.service",
        "",
    ] {
        assert_eq!(pod_uid(cgroups), None, "{cgroups}");
    }
}

/// A `/proc` of our own; each process's namespace is a file, which is as good as one here.
struct Proc(tempfile::TempDir);

impl Proc {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["proc", "netns", "names"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self(directory)
    }

    fn namespace(&self, name: &str) -> PathBuf {
        let path = self.0.path().join("names").join(name);
        fs::write(&path, "").unwrap();
        path
    }

    fn process(&self, pid: u32, uid: &str, start: u64, namespace: &Path) {
        let directory = self.0.path().join(format!("proc/{pid}"));
        fs::create_dir_all(directory.join("ns")).unwrap();
        fs::write(
            directory.join("cgroup"),
            format!("0::/kubepods/pod{uid}/x\n"),
        )
        .unwrap();
        let stat = format!("{pid} (a) b (c) S {} {start} 0 0", "0 ".repeat(18).trim());
        fs::write(directory.join("stat"), stat).unwrap();
        symlink(namespace, directory.join("ns/net")).unwrap();
    }

    fn find(&self, uids: &[&str], host: &Path) -> HashMap<String, PathBuf> {
        let running = Running {
            proc_dir: self.0.path().join("proc"),
            netns_dir: self.0.path().join("netns"),
        };
        let uids = uids.iter().map(ToString::to_string).collect();
        let found = running.find(&uids, &Netns::open(host).unwrap());
        found
            .into_iter()
            .map(|(uid, record)| (uid, record.path))
            .collect()
    }
}

#[test]
fn the_oldest_process_of_a_pod_names_its_namespace() {
    let proc = Proc::new();
    let (host, pod, nested) = (
        proc.namespace("host"),
        proc.namespace("pod"),
        proc.namespace("nested"),
    );
    // The sandbox, with a number higher than its containers', after the numbers went round.
    proc.process(30_000, UID, 100, &pod);
    proc.process(7, UID, 200, &nested);
    proc.process(8, OTHER, 50, &nested);
    fs::create_dir(proc.0.path().join("proc/self")).unwrap();
    let by_process = proc.0.path().join("proc/30000/ns/net");
    assert_eq!(
        proc.find(&[UID], &host),
        [(UID.to_owned(), by_process)].into()
    );

    // By the runtime's name, if it has one.
    let name = proc.0.path().join("netns/cni-1");
    fs::hard_link(&pod, &name).unwrap();
    fs::hard_link(&nested, proc.0.path().join("netns/cni-0")).unwrap();
    assert_eq!(proc.find(&[UID], &host), [(UID.to_owned(), name)].into());
}

#[test]
fn pods_on_the_nodes_own_network_are_left_out() {
    let proc = Proc::new();
    let host = proc.namespace("host");
    proc.process(7, UID, 1, &host);
    assert_eq!(proc.find(&[UID], &host), HashMap::new());
}
