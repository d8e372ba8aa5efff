//! The agent's configuration file.

use std::net::IpAddr;
use std::path::PathBuf;

use mesh_api::config::Config;
use mesh_api::names::PROXY_UID;
use serde::Deserialize;

/// `agent.yaml`. Every field has the default shown in `docs/reference/cni.md`, but for those that
/// differ on each node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AgentConfig {
    /// The node's name in Kubernetes.
    pub node: String,
    /// Its InternalIPs; the tunnel listens on the first of each family.
    pub node_addresses: Vec<IpAddr>,
    /// Where the controller is.
    pub controller: ControllerConfig,
    /// Socket for node proxies.
    pub broker_socket: PathBuf,
    /// Socket for the CNI plugin.
    pub cni_socket: PathBuf,
    /// What survives a restart of the agent; must not survive one of the node.
    pub state_dir: PathBuf,
    /// Where the runtime looks for network configurations and plugins.
    pub cni: CniConfig,
    /// User that node proxies run as.
    pub proxy_uid: u32,
    /// Namespaces whose pods are never asked about.
    pub exclude_namespaces: Vec<String>,
    /// Log filter, as of `RUST_LOG`.
    pub log: String,
    /// Form of the log.
    pub log_format: LogFormat,
}

/// How to reach and trust the controller.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ControllerConfig {
    /// `host:port`.
    pub address: String,
    /// PEM file with the roots for first contact.
    pub trust_bundle: PathBuf,
    /// File with the node's token.
    pub token_file: PathBuf,
}

/// The container runtime's directories.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CniConfig {
    /// Network configurations.
    pub conf_dir: PathBuf,
    /// Plugin binaries.
    pub bin_dir: PathBuf,
    /// Install the plugin and keep it in the chain.
    pub install: bool,
    /// Where the runtime mounts pods' network namespaces.
    pub netns_dir: PathBuf,
    /// The `/proc` of the node's own process namespace.
    pub proc_dir: PathBuf,
}

/// Form of the log on standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            node: String::new(),
            node_addresses: Vec::new(),
            controller: ControllerConfig::default(),
            broker_socket: "/run/warren/broker.sock".into(),
            cni_socket: "/run/warren/cni.sock".into(),
            state_dir: "/run/warren/agent".into(),
            cni: CniConfig::default(),
            proxy_uid: PROXY_UID,
            exclude_namespaces: vec!["warren-system".into(), "kube-system".into()],
            log: "info".into(),
            log_format: LogFormat::Text,
        }
    }
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dir: "/opt/cni/bin".into(),
            install: true,
            netns_dir: "/run/netns".into(),
            proc_dir: "/proc".into(),
        }
    }
}

impl Config for AgentConfig {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut expect = |right: bool, mistake: &str| {
            if !right {
                mistakes.push(mistake.to_owned());
            }
        };
        expect(!self.node.is_empty(), "node: the node's name is expected");
        expect(
            !self.node_addresses.is_empty(),
            "nodeAddresses: at least one address is expected",
        );
        expect(
            self.node_addresses.iter().all(|a| !a.is_unspecified()),
            "nodeAddresses: addresses of the node are expected, not wildcards",
        );
        expect(
            self.controller.address.contains(':'),
            "controller.address: host:port is expected",
        );
        let paths = [
            ("controller.trustBundle", &self.controller.trust_bundle),
            ("controller.tokenFile", &self.controller.token_file),
            ("brokerSocket", &self.broker_socket),
            ("cniSocket", &self.cni_socket),
            ("stateDir", &self.state_dir),
            ("cni.confDir", &self.cni.conf_dir),
            ("cni.binDir", &self.cni.bin_dir),
            ("cni.netnsDir", &self.cni.netns_dir),
            ("cni.procDir", &self.cni.proc_dir),
        ];
        for (field, path) in paths {
            let mistake = format!("{field}: an absolute path is expected");
            expect(path.is_absolute(), &mistake);
        }
        for (field, path) in [
            ("brokerSocket", &self.broker_socket),
            ("cniSocket", &self.cni_socket),
        ] {
            // sockaddr_un has room for 108 bytes, the last one zero.
            let mistake = format!("{field}: a path of at most 107 bytes is expected");
            expect(path.as_os_str().len() <= 107, &mistake);
        }
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log);
        expect(
            filter.is_ok(),
            "log: a filter such as `info` or `warren_cni=debug` is expected",
        );
        mistakes
    }
}
