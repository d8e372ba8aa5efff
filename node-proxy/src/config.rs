//! The proxy's configuration file. `docs/reference/node-proxy.md` is the same for users.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_api::names::{HEALTH_PORT, METRICS_PORT};
use serde::{Deserialize, Serialize};

use crate::budget::Limits;
use crate::telemetry::{Bounds, access_log, trace};

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// Name of the node in Kubernetes. Required.
    pub node: String,
    /// Where discovery and certificates come from.
    pub controller: Controller,
    /// The agent's socket. Default `/run/warren/broker.sock`.
    pub broker_socket: PathBuf,
    /// Directory on disk for the table and Services; survives restarts. Default `/var/lib/warren/proxy`.
    pub state_dir: PathBuf,
    /// Directory on a tmpfs, mode 0700, for keys and certificates. Default `/run/warren/secrets`.
    pub secrets_dir: PathBuf,
    /// Unix socket of the admin interface. Default `/run/warren/admin.sock`.
    pub admin_socket: PathBuf,
    /// `GET /metrics`. Default `[::]:15020`.
    pub metrics_listen: SocketAddr,
    /// `GET /healthz/live` and `/healthz/ready`. Default `[::]:15021`.
    pub health_listen: SocketAddr,
    /// Threads of the data plane, 1..=256. Default 2.
    pub workers: usize,
    /// Seconds between SIGTERM and SIGKILL, at least 6. The drain ends 5 s earlier. Default 30.
    pub termination_grace_seconds: u64,
    /// One line a connection or request on standard output. Default `off`.
    pub access_log: access_log::Format,
    /// Whether the access log shows the query of a request's target. Default `false`.
    pub access_log_query: bool,
    /// Bounds for the number of time series.
    pub metrics: MetricBounds,
    /// Traces of requests.
    pub tracing: Tracing,
    /// What is logged to standard error, in the syntax of tracing's `EnvFilter`. Default `info`.
    pub log: String,
    /// Form of the log. Default `text`.
    pub log_format: LogFormat,
    /// Bounds for each workload.
    pub limits: Limits,
}

/// How the controller is reached and trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Controller {
    /// `host:port`. Required.
    pub address: String,
    /// PEM file with the roots that are trusted at first contact. Default
    /// `/etc/warren/trust/bundle.pem`.
    pub trust_bundle: PathBuf,
    /// File with the node's token. Default `/var/run/secrets/warren/token`.
    pub token_file: PathBuf,
}

/// How many time series of traffic there may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MetricBounds {
    /// Most series of each family of counters; more are counted as `other`. Default 10,000.
    pub max_series: usize,
    /// Most label sets of histograms. Default 1,000.
    pub max_histograms: usize,
    /// Seconds without use after which a series ends, at least 60. Default 900.
    pub expiry_seconds: u64,
}

/// Traces of requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tracing {
    /// `http://host:port` of an OTLP collector that speaks gRPC. Default: none, no traces.
    pub endpoint: Option<String>,
    /// Share of the requests without a trace that begin one, 0 to 1. Default 0: only what a caller
    /// traces is.
    pub sample_ratio: f64,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is left of the grace period for the process itself to end.
const EXIT_RESERVE: u64 = 5;

impl Default for Config {
    fn default() -> Self {
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        Self {
            node: String::new(),
            controller: Controller::default(),
            broker_socket: "/run/warren/broker.sock".into(),
            state_dir: "/var/lib/warren/proxy".into(),
            secrets_dir: "/run/warren/secrets".into(),
            admin_socket: "/run/warren/admin.sock".into(),
            metrics_listen: any(METRICS_PORT),
            health_listen: any(HEALTH_PORT),
            workers: 2,
            termination_grace_seconds: 30,
            access_log: access_log::Format::default(),
            access_log_query: false,
            metrics: MetricBounds::default(),
            tracing: Tracing::default(),
            log: "info".into(),
            log_format: LogFormat::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            address: String::new(),
            trust_bundle: "/etc/warren/trust/bundle.pem".into(),
            token_file: "/var/run/secrets/warren/token".into(),
        }
    }
}

impl Default for MetricBounds {
    fn default() -> Self {
        let Bounds {
            series,
            histograms,
            expiry,
        } = Bounds::default();
        Self {
            max_series: series,
            max_histograms: histograms,
            expiry_seconds: expiry.as_secs(),
        }
    }
}

impl MetricBounds {
    /// The same for the metrics.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            series: self.max_series,
            histograms: self.max_histograms,
            expiry: Duration::from_secs(self.expiry_seconds),
        }
    }
}

impl Config {
    /// Time from SIGTERM to the end of the drain.
    pub fn drain_time(&self) -> Duration {
        Duration::from_secs(self.termination_grace_seconds.saturating_sub(EXIT_RESERVE))
    }
}

impl mesh_api::config::Config for Config {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut expect = |good: bool, mistake: &str| {
            if !good {
                mistakes.push(mistake.to_owned());
            }
        };
        expect(!self.node.is_empty(), "node: the node's name is required");
        let port = self
            .controller
            .address
            .rsplit_once(':')
            .map(|(host, port)| {
                (!host.is_empty())
                    .then_some(port)
                    .and_then(|port| port.parse::<u16>().ok())
            });
        expect(
            matches!(port, Some(Some(1..))),
            "controller.address: expected host:port",
        );
        expect(
            (1..=256).contains(&self.workers),
            "workers: expected 1..=256",
        );
        expect(
            (EXIT_RESERVE + 1..=86_400).contains(&self.termination_grace_seconds),
            "terminationGraceSeconds: expected 6..=86400",
        );
        expect(
            self.metrics_listen.port() == 0 || self.metrics_listen != self.health_listen,
            "healthListen: must differ from metricsListen",
        );
        let paths = [
            ("brokerSocket", &self.broker_socket),
            ("stateDir", &self.state_dir),
            ("secretsDir", &self.secrets_dir),
            ("adminSocket", &self.admin_socket),
            ("controller.trustBundle", &self.controller.trust_bundle),
            ("controller.tokenFile", &self.controller.token_file),
        ];
        for (field, path) in paths {
            expect(
                path.is_absolute(),
                &format!("{field}: expected an absolute path"),
            );
        }
        // sun_path of unix(7) holds 108 bytes with the final NUL.
        for (field, path) in [
            ("brokerSocket", &self.broker_socket),
            ("adminSocket", &self.admin_socket),
        ] {
            expect(
                path.as_os_str().len() < 108,
                &format!("{field}: longer than the 107 bytes a unix socket's path may have"),
            );
        }
        if let Err(error) = self.log.parse::<tracing_subscriber::EnvFilter>() {
            expect(false, &format!("log: {error}"));
        }
        expect(
            self.limits.buffered_bytes >= 1 << 20,
            "limits.bufferedBytes: expected at least 1048576 (one stream's window)",
        );
        expect(
            (1..=1_000_000).contains(&self.metrics.max_series),
            "metrics.maxSeries: expected 1..=1000000",
        );
        expect(
            (1..=100_000).contains(&self.metrics.max_histograms),
            "metrics.maxHistograms: expected 1..=100000",
        );
        expect(
            (60..=86_400).contains(&self.metrics.expiry_seconds),
            "metrics.expirySeconds: expected 60..=86400",
        );
        expect(
            (0.0..=1.0).contains(&self.tracing.sample_ratio),
            "tracing.sampleRatio: expected 0 to 1",
        );
        if let Some(endpoint) = &self.tracing.endpoint {
            expect(
                trace::endpoint(endpoint).is_some(),
                "tracing.endpoint: expected http://host:port",
            );
        }
        mistakes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(yaml: &str) -> Result<Config, String> {
        let file = tempfile(yaml);
        mesh_api::config::load(&file.0).map_err(|e| e.to_string())
    }

    struct File(PathBuf);

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn tempfile(text: &str) -> File {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("warren-proxy-config-{}-{number}.yaml", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        File(path)
    }

    #[test]
    fn defaults_fill_what_is_not_said() {
        let config = load("node: node-1\ncontroller: {address: '10.0.0.1:15012'}\n").unwrap();
        assert_eq!(config.workers, 2);
        assert_eq!(config.metrics_listen.to_string(), "[::]:15020");
        assert_eq!(config.drain_time(), Duration::from_secs(25));
        assert_eq!(config.metrics.bounds(), Bounds::default());
        assert_eq!(config.tracing, Tracing::default());
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let error = load(
            "workers: 0\nterminationGraceSeconds: 5\nadminSocket: admin.sock\nlog: 'a=b=c'\n\
             controller: {address: ':15012'}\nlimits: {bufferedBytes: 1}\n\
             metrics: {maxSeries: 0, maxHistograms: 0, expirySeconds: 1}\n\
             tracing: {endpoint: 'https://collector:4317', sampleRatio: 1.5}\n",
        )
        .unwrap_err();
        for field in [
            "node",
            "controller.address",
            "workers",
            "terminationGraceSeconds",
            "adminSocket",
            "log:",
            "limits.bufferedBytes",
            "metrics.maxSeries",
            "metrics.maxHistograms",
            "metrics.expirySeconds",
            "tracing.endpoint",
            "tracing.sampleRatio",
        ] {
            assert!(error.contains(field), "{field} in {error}");
        }
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error = load("node: a\ncontroller: {adress: x}\n").unwrap_err();
        assert!(error.contains("adress"), "{error}");
    }
}
