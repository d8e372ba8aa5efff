//! The configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_api::identity::Identity;
use mesh_api::names;
use mesh_api::proto::mesh;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

use crate::providers::is_dns_name;

/// `warren-controller --config FILE`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// gRPC over TLS: discovery, certificates, enrolment.
    pub listen: SocketAddr,
    /// `GET /metrics` and `GET /status`.
    pub metrics_listen: SocketAddr,
    /// `GET /healthz/live` and `GET /healthz/ready`.
    pub health_listen: SocketAddr,
    /// The trust domain of all identities.
    pub trust_domain: String,
    /// The mode where a namespace sets none.
    pub mode: Mode,
    /// Where the users' objects come from.
    pub provider: Provider,
    /// The certificate authority.
    pub ca: Ca,
    /// File of bootstrap tokens, lines `<node> <proxy|agent> <token>`; with `provider.directory`.
    pub tokens: Option<PathBuf>,
    /// Where enrolment is kept; with `provider.directory`.
    pub state_dir: Option<PathBuf>,
    /// What is logged, in the syntax of `tracing`'s EnvFilter.
    pub log: String,
    /// How it is written.
    pub log_format: LogFormat,
}

/// Where the users' objects come from: exactly one of these.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Provider {
    /// All `*.yaml`, `*.yml` and `*.json` below it, watched.
    pub directory: Option<PathBuf>,
    /// The API server of a cluster.
    pub kubernetes: Option<Kubernetes>,
}

/// The API server of a cluster.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Kubernetes {
    /// How to reach it; unset: as a pod does, or what `$KUBECONFIG` names.
    pub kubeconfig: Option<PathBuf>,
    /// Name of the XMesh object that tells the supported features.
    pub mesh_name: String,
    /// Name of this replica; unset: `$POD_NAME`, else the host's name.
    pub replica: Option<String>,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            mesh_name: "warren".into(),
            replica: None,
        }
    }
}

/// The certificate authority.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Ca {
    /// `root.crt`, `root.key` (made if absent), `bundle-extra.pem`, `retired.pem`, `bundle.pem`; with
    /// `provider.directory`.
    pub directory: Option<PathBuf>,
    /// Secret of the root in Warren's own namespace, made if absent; with `provider.kubernetes`.
    pub secret: Option<String>,
    /// Lifetime of workload certificates in seconds.
    pub leaf_lifetime_seconds: u64,
    /// Lifetime of node certificates in seconds.
    pub node_lifetime_seconds: u64,
}

/// Whether plaintext from un-meshed callers is accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// It is.
    #[default]
    Permissive,
    /// It is not.
    Strict,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl From<Mode> for mesh::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Permissive => mesh::Mode::Permissive,
            Mode::Strict => mesh::Mode::Strict,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: ([0, 0, 0, 0], names::CONTROLLER_PORT).into(),
            metrics_listen: ([0, 0, 0, 0], names::CONTROLLER_METRICS_PORT).into(),
            health_listen: ([0, 0, 0, 0], names::HEALTH_PORT).into(),
            trust_domain: names::DEFAULT_TRUST_DOMAIN.into(),
            mode: Mode::default(),
            provider: Provider::default(),
            ca: Ca::default(),
            tokens: None,
            state_dir: None,
            log: "info".into(),
            log_format: LogFormat::default(),
        }
    }
}

impl Default for Ca {
    fn default() -> Self {
        Self {
            directory: None,
            secret: None,
            leaf_lifetime_seconds: 24 * 3600,
            node_lifetime_seconds: 3600,
        }
    }
}

impl mesh_api::config::Config for Config {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        self.backing(&mut mistakes);
        if Identity::new(&self.trust_domain, "a", "b").is_err() {
            mistakes.push("trustDomain: expected a name of a-z, 0-9, '.', '-' and '_'".into());
        }
        for (field, seconds) in [
            ("ca.leafLifetimeSeconds", self.ca.leaf_lifetime_seconds),
            ("ca.nodeLifetimeSeconds", self.ca.node_lifetime_seconds),
        ] {
            if !(60..=MAX_LIFETIME).contains(&seconds) {
                mistakes.push(format!("{field}: expected 60 to {MAX_LIFETIME} seconds"));
            }
        }
        if let Err(error) = EnvFilter::builder().parse(&self.log) {
            mistakes.push(format!("log: {error}"));
        }
        mistakes
    }
}

/// What the controller stands on, as the configuration has it once it is checked.
#[derive(Clone, Debug)]
pub enum Backing {
    /// Files, all of them.
    Directory {
        /// Manifests.
        manifests: PathBuf,
        /// Roots.
        ca: PathBuf,
        /// Bootstrap tokens.
        tokens: PathBuf,
        /// Enrolment.
        state: PathBuf,
    },
    /// An API server.
    Kubernetes {
        /// Which, and what is set for it.
        provider: Kubernetes,
        /// Secret of the root.
        secret: String,
    },
}

impl Config {
    /// What the controller stands on; `None` if that has a mistake, which is added.
    pub fn backing(&self, mistakes: &mut Vec<String>) -> Option<Backing> {
        let before = mistakes.len();
        let files = [
            ("provider.directory", &self.provider.directory),
            ("ca.directory", &self.ca.directory),
            ("tokens", &self.tokens),
            ("stateDir", &self.state_dir),
        ];
        let backing = match (&self.provider.directory, &self.provider.kubernetes) {
            (Some(_), Some(_)) => {
                mistakes
                    .push("provider: expected one of directory and kubernetes, found both".into());
                None
            }
            (None, Some(provider)) => {
                for (field, path) in files.iter().skip(1) {
                    if path.is_some() {
                        mistakes.push(format!(
                            "{field}: not used with provider.kubernetes; remove it"
                        ));
                    }
                }
                if provider
                    .kubeconfig
                    .as_ref()
                    .is_some_and(|p| !p.is_absolute())
                {
                    mistakes
                        .push("provider.kubernetes.kubeconfig: expected an absolute path".into());
                }
                let secret = self.ca.secret.as_deref().unwrap_or(ROOT_SECRET);
                for (field, name) in [
                    ("provider.kubernetes.meshName", &*provider.mesh_name),
                    ("ca.secret", secret),
                ] {
                    if !is_dns_name(name) {
                        mistakes.push(format!("{field}: expected a name of a-z, 0-9, '-' and '.'"));
                    }
                }
                Some(Backing::Kubernetes {
                    provider: provider.clone(),
                    secret: secret.to_owned(),
                })
            }
            (directory, None) => {
                if directory.is_none() {
                    mistakes.push("provider: expected one of directory and kubernetes".into());
                }
                for (field, path) in files.iter().skip(usize::from(directory.is_none())) {
                    if !path.as_ref().is_some_and(|p| p.is_absolute()) {
                        mistakes.push(format!("{field}: expected an absolute path"));
                    }
                }
                if self.ca.secret.is_some() {
                    mistakes.push("ca.secret: not used with provider.directory; remove it".into());
                }
                let path = |path: &Option<PathBuf>| path.clone().unwrap_or_default();
                Some(Backing::Directory {
                    manifests: path(directory),
                    ca: path(&self.ca.directory),
                    tokens: path(&self.tokens),
                    state: path(&self.state_dir),
                })
            }
        };
        backing.filter(|_| mistakes.len() == before)
    }

    /// How the authority is set up.
    pub fn authority(&self) -> crate::ca::Settings {
        crate::ca::Settings {
            trust_domain: self.trust_domain.clone(),
            leaf_lifetime: Duration::from_secs(self.ca.leaf_lifetime_seconds),
            node_lifetime: Duration::from_secs(self.ca.node_lifetime_seconds),
        }
    }

    /// What is set for the whole mesh.
    pub fn mesh(&self) -> crate::model::Settings {
        crate::model::Settings {
            trust_domain: self.trust_domain.clone(),
            mode: self.mode.into(),
        }
    }
}

/// A year: longer-lived leaves would defeat what short ones are for.
const MAX_LIFETIME: u64 = 365 * 24 * 3600;
/// The root's Secret unless set.
const ROOT_SECRET: &str = "warren-root";
