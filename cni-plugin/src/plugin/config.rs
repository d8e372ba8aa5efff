//! What a runtime passes: the environment and the network configuration on standard input.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mesh_api::names::SYSTEM_NAMESPACE;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{CniError, Code, VERSIONS};

/// The variables of "Section 2: Execution Protocol".
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// CNI_COMMAND.
    pub command: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_NETNS.
    pub netns: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_ARGS.
    pub args: String,
}

impl Environment {
    pub(super) fn from_process() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_default();
        Self {
            command: variable("CNI_COMMAND"),
            container_id: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS"),
            ifname: variable("CNI_IFNAME"),
            args: variable("CNI_ARGS"),
        }
    }

    pub(super) fn container(&self) -> Result<&str, CniError> {
        required("CNI_CONTAINERID", &self.container_id)
    }

    pub(super) fn attachment(&self) -> Result<Attachment, CniError> {
        Ok(Attachment {
            container_id: self.container()?.to_owned(),
            netns: required("CNI_NETNS", &self.netns)?.into(),
            ifname: required("CNI_IFNAME", &self.ifname)?.to_owned(),
        })
    }

    /// The pod, if the agent is to be asked about it.
    pub(super) fn pod(&self, config: &NetworkConfig) -> Result<Option<PodArgs>, CniError> {
        let Some(pod) = PodArgs::parse(&self.args) else {
            return Ok(None);
        };
        if pod.namespace == SYSTEM_NAMESPACE || config.exclude_namespaces.contains(&pod.namespace) {
            return Ok(None);
        }
        if pod.uid.is_empty() {
            return Err(CniError::new(
                Code::Environment,
                "CNI_ARGS names a pod without K8S_POD_UID",
                "the runtime must pass it; without it the pod's identity cannot be known",
            ));
        }
        Ok(Some(pod))
    }
}

fn required<'a>(name: &str, value: &'a str) -> Result<&'a str, CniError> {
    if value.is_empty() {
        return Err(CniError::new(
            Code::Environment,
            format!("{name} is not set"),
            "the CNI specification requires it for this verb",
        ));
    }
    Ok(value)
}

/// Which interface of which container.
pub(super) struct Attachment {
    pub(super) container_id: String,
    pub(super) netns: PathBuf,
    pub(super) ifname: String,
}

/// What Kubernetes' runtimes say about the pod in CNI_ARGS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodArgs {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

impl PodArgs {
    /// Reads `KEY=VALUE;KEY=VALUE`. `None` without namespace and name: not a pod of Kubernetes.
    pub(super) fn parse(args: &str) -> Option<Self> {
        let pairs: BTreeMap<&str, &str> = args
            .split(';')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let value = |key| pairs.get(key).copied().filter(|value| !value.is_empty());
        Some(Self {
            namespace: value("K8S_POD_NAMESPACE")?.to_owned(),
            name: value("K8S_POD_NAME")?.to_owned(),
            uid: value("K8S_POD_UID").unwrap_or_default().to_owned(),
        })
    }
}

/// The network configuration. Fields that other plugins or the runtime add are ignored.
#[derive(Debug)]
pub(super) struct NetworkConfig {
    pub(super) version: String,
    pub(super) socket: PathBuf,
    pub(super) verbose: bool,
    pub(super) exclude_namespaces: Vec<String>,
    pub(super) previous: Option<Box<RawValue>>,
    pub(super) valid_containers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(default = "oldest")]
    cni_version: String,
    #[serde(default)]
    socket: PathBuf,
    #[serde(default)]
    log_level: String,
    #[serde(default)]
    exclude_namespaces: Vec<String>,
    #[serde(default)]
    prev_result: Option<Box<RawValue>>,
    /// `null`, which is how Go writes an empty list, where no attachment is left.
    #[serde(rename = "cni.dev/valid-attachments", default)]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
}

/// "cniVersion" is required since 0.2.0; a configuration without it is an older one.
fn oldest() -> String {
    "0.1.0".into()
}

impl NetworkConfig {
    pub(super) fn parse(input: &[u8]) -> Result<Self, CniError> {
        let wire: Wire = serde_json::from_slice(input).map_err(|e| {
            CniError::new(Code::Decode, "the network configuration cannot be read", e)
        })?;
        if !VERSIONS.contains(&wire.cni_version.as_str()) {
            return Err(CniError::new(
                Code::Version,
                format!("CNI version {} is not supported", wire.cni_version),
                format!("supported are {}", VERSIONS.join(", ")),
            ));
        }
        if !wire.socket.is_absolute() {
            return Err(CniError::new(
                Code::NetworkConfig,
                "`socket` is missing or not an absolute path",
                "the agent writes this entry; it repairs it when it starts",
            ));
        }
        Ok(Self {
            version: wire.cni_version,
            socket: wire.socket,
            verbose: matches!(wire.log_level.as_str(), "debug" | "trace"),
            exclude_namespaces: wire.exclude_namespaces,
            // `null` is how some runtimes write "none".
            previous: wire.prev_result.filter(|raw| raw.get() != "null"),
            valid_containers: (wire.valid_attachments.into_iter().flatten())
                .map(|attachment| attachment.container_id)
                .collect(),
        })
    }

    /// Fails if the verb is newer than the configuration.
    pub(super) fn requires(&self, verb: &str, since: &str) -> Result<(), CniError> {
        let rank = |version: &str| VERSIONS.iter().position(|known| *known == version);
        if rank(&self.version) < rank(since) {
            return Err(CniError::new(
                Code::Version,
                format!("{verb} in CNI version {}", self.version),
                format!("{verb} exists since {since}"),
            ));
        }
        Ok(())
    }
}

/// The version of a configuration that may be broken, for answers that must name one.
pub(super) fn version_of(input: &[u8]) -> String {
    #[derive(Deserialize)]
    struct OnlyVersion {
        #[serde(rename = "cniVersion")]
        version: String,
    }
    serde_json::from_slice::<OnlyVersion>(input)
        .ok()
        .map(|config| config.version)
        .filter(|version| VERSIONS.contains(&version.as_str()))
        .unwrap_or_else(|| VERSIONS[VERSIONS.len() - 1].to_owned())
}
