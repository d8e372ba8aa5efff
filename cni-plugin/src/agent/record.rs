//! What the agent keeps on disk, under `stateDir`: it survives the agent and not the node's boot, like
//! the namespaces it is about.
//!
//! One file a pod, the node's mark, what is known of namespaces, and the order in which proxies
//! came. Files are replaced by rename, so that a reader sees the old or the new content.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use mesh_api::proto::mesh::NodePod;
use prost::Message;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::netns::NetnsRecord;
use super::rules::{Applied, MeshMark};

#[cfg(test)]
mod tests;

/// The state directory.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// A pod that the runtime has added, meshed or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodRecord {
    /// UID in Kubernetes.
    pub uid: String,
    /// Namespace in Kubernetes.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// The sandbox of the last ADD.
    pub container_id: String,
    /// Its network namespace.
    pub netns: NetnsRecord,
    /// Addresses of the CNI result.
    pub addresses: Vec<IpAddr>,
    /// The controller knows the addresses.
    pub registered: bool,
    /// What the controller said last.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub pod: Option<NodePod>,
    /// How far the pod is in the mesh. Written before the namespace is changed, so that what it
    /// says may be there is a superset of what is there.
    pub phase: Phase,
    /// The rules that were put in force.
    pub applied: Option<Applied>,
}

/// How far a pod is in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// No trace in its namespace.
    Direct,
    /// Listeners, and rules once a proxy serves them.
    Enrolled,
    /// Rules that match nothing; captured connections still run.
    Leaving,
}

impl Store {
    /// Opens the directory, making it if it is missing.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let store = Self {
            directory: directory.to_owned(),
        };
        let pods = store.directory.join(PODS);
        fs::create_dir_all(&pods).map_err(|e| StoreError::new(&pods, e))?;
        Ok(store)
    }

    /// The node's mark, chosen at the first start.
    pub fn mark(&self) -> Result<MeshMark, StoreError> {
        if let Some(mark) = self.read(MARK)? {
            return Ok(mark);
        }
        let mark = new_mark();
        self.write(MARK, &mark)?;
        Ok(mark)
    }

    /// All pods. A file that cannot be read is left alone and reported: its pod's namespace may hold
    /// rules.
    pub fn pods(&self) -> Result<Vec<PodRecord>, StoreError> {
        let directory = self.directory.join(PODS);
        let failed = |e| StoreError::new(&directory, e);
        let mut pods = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(SUFFIX)) else {
                continue;
            };
            match self.read(&format!("{PODS}/{name}")) {
                Ok(pod) => pods.extend(pod),
                Err(error) => {
                    tracing::error!(%error, "a pod's record is ignored; the pod must be deleted to leave the mesh");
                }
            }
        }
        Ok(pods)
    }

    /// Keeps a pod.
    pub fn put(&self, pod: &PodRecord) -> Result<(), StoreError> {
        self.write(&pod_file(&pod.uid), pod)
    }

    /// Forgets a pod.
    pub fn remove(&self, uid: &str) -> Result<(), StoreError> {
        let path = self.directory.join(pod_file(uid));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::new(&path, e)),
            _ => Ok(()),
        }
    }

    /// Which namespaces opted in.
    pub fn namespaces(&self) -> Result<BTreeMap<String, bool>, StoreError> {
        self.read(NAMESPACES).map(Option::unwrap_or_default)
    }

    /// Keeps which namespaces opted in.
    pub fn put_namespaces(&self, namespaces: &BTreeMap<String, bool>) -> Result<(), StoreError> {
        self.write(NAMESPACES, namespaces)
    }

    /// Instances of proxies in the order in which they came.
    pub fn instances(&self) -> Result<Vec<String>, StoreError> {
        self.read(INSTANCES).map(Option::unwrap_or_default)
    }

    /// Keeps the order of the proxies.
    pub fn put_instances(&self, instances: &[String]) -> Result<(), StoreError> {
        self.write(INSTANCES, &instances)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let path = self.directory.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::new(&path, e)),
        };
        let value = serde_json::from_slice(&text).map_err(|e| StoreError::new(&path, e.into()))?;
        Ok(Some(value))
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let write = || {
            let temporary = path.with_extension("tmp");
            fs::write(&temporary, serde_json::to_vec_pretty(value)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| StoreError::new(&path, e))
    }
}

/// Whether a UID can be the name of a file.
pub fn is_uid(uid: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=128).contains(&uid.len()) && !uid.starts_with('.') && uid.bytes().all(allowed)
}

/// The state directory refused.
#[derive(Debug, thiserror::Error)]
#[error("state file {path}: {source}")]
pub struct StoreError {
    path: String,
    source: io::Error,
}

impl StoreError {
    fn new(path: &Path, source: io::Error) -> Self {
        Self {
            path: path.display().to_string(),
            source,
        }
    }
}

/// A mark that nobody else is likely to use. Marked packets are seen by the rules of the node's
/// namespace too, so the bits that kube-proxy (0x4000, 0x8000) and Cilium (0x0f00) test stay clear.
fn new_mark() -> MeshMark {
    loop {
        let mark = rand::random::<u32>() & !0xcf00;
        if mark != 0 && mark != mesh_api::names::DELIVERED_MARK {
            return MeshMark(mark);
        }
    }
}

fn pod_file(uid: &str) -> String {
    format!("{PODS}/{uid}{SUFFIX}")
}

fn to_hex<S: Serializer>(pod: &Option<NodePod>, serializer: S) -> Result<S::Ok, S::Error> {
    let hex = pod.as_ref().map(|pod| {
        let bytes = pod.encode_to_vec();
        bytes.iter().map(|b| format!("{b:02x}")).collect::<String>()
    });
    hex.serialize(serializer)
}

fn from_hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NodePod>, D::Error> {
    use serde::de::Error;
    let Some(hex) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let bytes: Option<Vec<u8>> = (hex.as_bytes().chunks(2))
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    let bytes = bytes.ok_or_else(|| D::Error::custom("`pod` is not hexadecimal"))?;
    NodePod::decode(bytes.as_slice())
        .map(Some)
        .map_err(D::Error::custom)
}

const PODS: &str = "pods";
const SUFFIX: &str = ".json";
const MARK: &str = "mark";
const NAMESPACES: &str = "namespaces.json";
const INSTANCES: &str = "proxies.json";
