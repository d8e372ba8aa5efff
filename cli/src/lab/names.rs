//! What a lab's things are called and where they lie.
//!
//! Invariant: from a name alone one can tell the lab it belongs to. Lab names have no dot, and a dot ends
//! them in the names of network namespaces; so `down` of `a` never touches `a-b`, also when all state is lost.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use sha2::{Digest, Sha256};

/// Where all labs keep their state; a restart of the machine clears it.
pub(crate) const LABS: &str = "/run/warren/lab";
/// Where named network namespaces are (ip-netns(8)).
pub(crate) const NETNS: &str = "/run/netns";

/// Name of a lab: lower-case letters, digits and dashes, at most 32.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LabName(String);

impl LabName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// What the names of all its network namespaces start with.
    pub(crate) fn netns_prefix(&self) -> String {
        format!("warren-{}.", self.0)
    }

    /// A network namespace that is not a pod's: `fabric`, `controller` or a node.
    pub(crate) fn netns(&self, of: &str) -> String {
        format!("{}{of}", self.netns_prefix())
    }

    /// A pod's network namespace. File names end at 255 bytes; a long one is cut and told apart by a hash.
    pub(crate) fn pod_netns(&self, namespace: &str, pod: &str) -> String {
        let full = format!("{}{namespace}.{pod}", self.netns_prefix());
        if full.len() <= MAX_NETNS_NAME {
            return full;
        }
        let hash = short_hash(full.as_bytes());
        format!("{}-{hash}", &full[..MAX_NETNS_NAME - hash.len() - 1])
    }

    /// The lab a network namespace belongs to.
    pub(crate) fn of_netns(netns: &str) -> Option<Self> {
        netns
            .strip_prefix("warren-")?
            .split_once('.')?
            .0
            .parse()
            .ok()
    }

    /// Where its state is.
    pub(crate) fn paths(&self) -> Paths {
        Paths {
            dir: Path::new(LABS).join(&self.0),
        }
    }
}

impl FromStr for LabName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let dashes = name.starts_with('-') || name.ends_with('-');
        if name.is_empty() || name.len() > 32 || dashes || !name.bytes().all(good) {
            return Err("expected 1 to 32 of a-z, 0-9 and -, with no - at the ends".into());
        }
        Ok(Self(name.into()))
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The files of one lab.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    dir: PathBuf,
}

impl Paths {
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
    /// What the lab was started with.
    pub(crate) fn spec(&self) -> PathBuf {
        self.dir.join("lab.json")
    }
    /// What `get`, `exec` and `logs` read.
    pub(crate) fn status(&self) -> PathBuf {
        self.dir.join("status.json")
    }
    /// Where the daemon listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("lab.sock")
    }
    pub(crate) fn daemon_pid(&self) -> PathBuf {
        self.dir.join("daemon.pid")
    }
    pub(crate) fn daemon_log(&self) -> PathBuf {
        self.logs().join("daemon.log")
    }
    pub(crate) fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }
    pub(crate) fn controller(&self) -> PathBuf {
        self.dir.join("controller")
    }
    /// The manifests the controller reads.
    pub(crate) fn manifests(&self) -> PathBuf {
        self.controller().join("manifests")
    }
    /// Where the controller keeps who is enrolled.
    pub(crate) fn controller_state(&self) -> PathBuf {
        self.controller().join("state")
    }
    /// The bootstrap tokens that the controller knows.
    pub(crate) fn tokens(&self) -> PathBuf {
        self.controller().join("tokens")
    }
    /// The CA, unless the user brought one.
    pub(crate) fn ca(&self) -> PathBuf {
        self.controller().join("ca")
    }
    /// The trust bundle as nodes mount it.
    pub(crate) fn trust_bundle(&self) -> PathBuf {
        self.dir.join("trust/bundle.pem")
    }
    pub(crate) fn node(&self, node: &str) -> PathBuf {
        self.dir.join("nodes").join(node)
    }
    /// Keys of the nodes' workloads; always on a tmpfs.
    pub(crate) fn secrets(&self) -> PathBuf {
        self.dir.join("secrets")
    }
    /// A pod's `/etc` files.
    pub(crate) fn pod(&self, namespace: &str, pod: &str) -> PathBuf {
        self.dir.join("pods").join(namespace).join(pod)
    }
    pub(crate) fn pod_log(&self, namespace: &str, pod: &str) -> PathBuf {
        self.logs()
            .join("pods")
            .join(namespace)
            .join(format!("{pod}.log"))
    }
    /// The log of `controller`, or of `agent` or `proxy` of a node.
    pub(crate) fn component_log(&self, node: Option<&str>, part: &str) -> PathBuf {
        match node {
            Some(node) => self.logs().join(node).join(format!("{part}.log")),
            None => self.logs().join(format!("{part}.log")),
        }
    }
}

/// The file of a named network namespace.
pub(crate) fn netns_path(name: &str) -> PathBuf {
    Path::new(NETNS).join(name)
}

/// Ten characters that tell texts apart.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest[..5].iter().map(|b| format!("{b:02x}")).collect()
}

/// Below the limit of 255, and short enough to read.
const MAX_NETNS_NAME: usize = 160;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_is_recognised_by_its_namespaces() {
        let a: LabName = "a".parse().unwrap();
        let ab: LabName = "a-b".parse().unwrap();
        assert_eq!(LabName::of_netns(&a.pod_netns("b.x", "y")), Some(a.clone()));
        assert_eq!(LabName::of_netns(&ab.netns("node-1")), Some(ab.clone()));
        assert!(!ab.netns("fabric").starts_with(&a.netns_prefix()));
        assert_eq!(LabName::of_netns("warren-a"), None);
        assert_eq!(LabName::of_netns("wcx-out"), None);
    }

    #[test]
    fn long_names_stay_distinct() {
        let lab: LabName = "x".repeat(32).parse().unwrap();
        let (a, b) = ("p".repeat(252) + "a", "p".repeat(252) + "b");
        let names = [lab.pod_netns("ns", &a), lab.pod_netns("ns", &b)];
        assert!(names.iter().all(|n| n.len() == MAX_NETNS_NAME), "{names:?}");
        assert_ne!(names[0], names[1]);
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in ["", "a.b", "A", "-a", "a-", "a/b", &"a".repeat(33)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
    }
}
