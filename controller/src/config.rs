//! The configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_api::identity::Identity;
use mesh_api::names;
use mesh_api::proto::mesh;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

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
    /// File of bootstrap tokens, lines `<node> <proxy|agent> <token>`.
    pub tokens: PathBuf,
    /// Where enrolment is kept.
    pub state_dir: PathBuf,
    /// What is logged, in the syntax of `tracing`'s EnvFilter.
    pub log: String,
    /// How it is written.
    pub log_format: LogFormat,
}

/// Where the users' objects come from.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Provider {
    /// All `*.yaml`, `*.yml` and `*.json` below it, watched.
    pub directory: PathBuf,
}

/// The certificate authority.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Ca {
    /// `root.crt`, `root.key` (made if absent), `bundle-extra.pem`, `retired.pem`, `bundle.pem`.
    pub directory: PathBuf,
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
            tokens: PathBuf::new(),
            state_dir: PathBuf::new(),
            log: "info".into(),
            log_format: LogFormat::default(),
        }
    }
}

impl Default for Ca {
    fn default() -> Self {
        Self {
            directory: PathBuf::new(),
            leaf_lifetime_seconds: 24 * 3600,
            node_lifetime_seconds: 3600,
        }
    }
}

impl mesh_api::config::Config for Config {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        for (field, path) in [
            ("provider.directory", &self.provider.directory),
            ("ca.directory", &self.ca.directory),
            ("tokens", &self.tokens),
            ("stateDir", &self.state_dir),
        ] {
            if !path.is_absolute() {
                mistakes.push(format!("{field}: expected an absolute path"));
            }
        }
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

impl Config {
    /// How the authority is set up.
    pub fn authority(&self) -> crate::ca::Settings {
        crate::ca::Settings {
            directory: self.ca.directory.clone(),
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
