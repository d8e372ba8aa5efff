//! The operator's view into a proxy: HTTP/1 on a unix socket that only its own user (and root) can open.
//!
//! Nothing secret is shown: certificates without their keys.

use std::sync::Arc;

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::broker::{Roster, Stage};
use crate::budget::{Account, Resource};
use crate::config::Config;
use crate::health::{Health, Metrics};
use crate::pods::{Captured, Pod, PodInfo, Probe, ProbeKind};
use crate::process::http::{Answer, Handler, json as json_answer, text};
use crate::process::lifecycle::Lifecycle;

pub mod logging;

use logging::Logging;

const HELP: &str = "\
GET  /config_dump   configuration, mesh settings, workloads and Services
GET  /pods          pods of this node, and what they consume
GET  /connections   live connections
GET  /certificates  identities of this node's pods, until when they are valid
GET  /metrics       as on the metrics port
GET  /ready         as on the health port, with what is missing
GET  /logging       what is logged
PUT  /logging?level=LEVEL
                    change it until the restart, e.g. debug or info,warren_node_proxy::broker=trace
POST /drain         accept no new connections; they wait for another proxy
POST /resume        accept again
";

/// What the admin interface shows and changes.
pub struct Admin {
    /// As loaded.
    pub config: Config,
    /// Pods, table, workers.
    pub roster: Arc<Roster>,
    /// Readiness.
    pub health: Health,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// What is logged.
    pub logging: Logging,
    /// Drain and resume.
    pub lifecycle: Arc<Lifecycle>,
}

impl Admin {
    /// Answers on the admin socket.
    pub fn handler(self) -> Handler {
        Arc::new(move |request| {
            let uri = request.uri();
            self.answer(
                request.method(),
                uri.path(),
                uri.query().unwrap_or_default(),
            )
        })
    }

    fn answer(&self, method: &Method, path: &str, query: &str) -> Answer {
        match (method.as_str(), path) {
            ("GET", "/") => text(StatusCode::OK, HELP),
            ("GET", "/config_dump") => json_answer(&self.config_dump()),
            ("GET", "/pods") => json_answer(&self.pods()),
            ("GET", "/connections") => {
                match serde_json::to_value(self.roster.parts.workers.connections()) {
                    Ok(rows) => json_answer(&rows),
                    Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
                }
            }
            ("GET", "/certificates") => json_answer(&self.roster.parts.identities.dump()),
            ("GET", "/metrics") => self.metrics.answer(),
            ("GET", "/ready") => self.health.ready(),
            ("GET", "/logging") => text(StatusCode::OK, format!("{}\n", self.logging.level())),
            ("PUT", "/logging") => self.set_level(query),
            ("POST", "/drain") => self.drained(self.lifecycle.drain(), "accepting no more"),
            ("POST", "/resume") => self.drained(self.lifecycle.resume(), "accepting again"),
            (
                _,
                "/" | "/config_dump" | "/pods" | "/connections" | "/certificates" | "/metrics"
                | "/ready",
            ) => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
            (_, "/logging") => text(StatusCode::METHOD_NOT_ALLOWED, "only GET and PUT\n"),
            (_, "/drain" | "/resume") => text(StatusCode::METHOD_NOT_ALLOWED, "only POST\n"),
            _ => text(
                StatusCode::NOT_FOUND,
                format!("no such page; there are:\n{HELP}"),
            ),
        }
    }

    fn set_level(&self, query: &str) -> Answer {
        let level = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("level="));
        let Some(level) = level.and_then(percent_decoded) else {
            return text(
                StatusCode::BAD_REQUEST,
                "expected PUT /logging?level=LEVEL\n",
            );
        };
        match self.logging.set_level(&level) {
            Ok(()) => {
                tracing::info!(level, "log level changed");
                text(StatusCode::OK, format!("{level}\n"))
            }
            Err(error) => text(
                StatusCode::BAD_REQUEST,
                format!("level {level:?}: {error}\n"),
            ),
        }
    }

    fn drained(&self, done: bool, what: &str) -> Answer {
        let phase = self.lifecycle.phase().name();
        if done {
            tracing::info!("{what}, as asked on the admin socket");
            text(StatusCode::OK, format!("{what}; the process is {phase}\n"))
        } else {
            text(
                StatusCode::CONFLICT,
                format!("nothing changed; the process is {phase}\n"),
            )
        }
    }

    fn config_dump(&self) -> Value {
        let parts = &self.roster.parts;
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "config": self.config,
            "phase": self.lifecycle.phase().name(),
            "hostAddresses": **parts.host.addresses.load(),
            "table": parts.table.dump(),
            "pods": self.pods(),
        })
    }

    fn pods(&self) -> Value {
        let waiting = self.roster.waiting();
        let mut rows: Vec<Value> = Vec::new();
        for pod in self.roster.parts.pods.all() {
            let stage = waiting
                .iter()
                .find(|(uid, _)| *uid == pod.uid)
                .map(|(_, stage)| stage);
            rows.push(pod_row(&pod, stage));
        }
        // Those that wait for the table have no Pod yet.
        for (uid, stage) in &waiting {
            if self.roster.parts.pods.by_uid(uid).is_none() {
                rows.push(json!({"uid": &**uid, "state": state(Some(stage))}));
            }
        }
        Value::Array(rows)
    }
}

fn pod_row(pod: &Pod, stage: Option<&Stage>) -> Value {
    let Pod {
        uid,
        info,
        identity,
        certificate: _,
        stock,
        account,
        captured,
        rates: _,
        turns: _,
        leaving: _,
        served: _,
    } = pod;
    let PodInfo {
        namespace,
        name,
        service_account: _,
        owner,
        addresses,
        strict,
        exclude_inbound_ports,
        exclude_outbound_ports,
        exclude_outbound_cidrs,
        probes,
        zone,
    } = &**info.load();
    json!({
        "uid": &**uid,
        "namespace": &**namespace,
        "name": &**name,
        "workload": &**owner,
        "identity": identity.as_str(),
        "addresses": addresses,
        "mode": if *strict { "strict" } else { "permissive" },
        "excludeInboundPorts": exclude_inbound_ports,
        "excludeOutboundPorts": exclude_outbound_ports,
        "excludeOutboundCidrs": exclude_outbound_cidrs,
        "zone": &**zone,
        "probes": probes.iter().map(probe_row).collect::<Vec<_>>(),
        "state": state(stage),
        "captured": Captured::open(captured),
        "sockets": {"ipv4": stock.available(false), "ipv6": stock.available(true)},
        "budget": budget(account),
    })
}

fn state(stage: Option<&Stage>) -> String {
    match stage {
        None | Some(Stage::Served) => "served".into(),
        Some(Stage::Certified) => "waits for the other pods".into(),
        Some(Stage::Starting) => "waits for table or certificate".into(),
        Some(Stage::Failed(reason)) => format!("failed: {reason}"),
    }
}

fn probe_row(probe: &Probe) -> Value {
    let Probe { port, kind } = probe;
    match kind {
        ProbeKind::HttpGet(path) => json!({"port": port, "httpGet": path}),
        ProbeKind::TcpSocket => json!({"port": port, "tcpSocket": {}}),
        ProbeKind::Grpc(service) => json!({"port": port, "grpc": service}),
    }
}

fn budget(account: &Account) -> Value {
    let row = |resource: &Resource| {
        let resource = *resource;
        let row = json!({
            "used": account.used(resource),
            "limit": account.limit(resource),
            "refused": account.refused(resource),
        });
        (resource.name().to_owned(), row)
    };
    Resource::ALL
        .iter()
        .map(row)
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// `None` if it is not valid UTF-8, or a % is not followed by two hexadecimal digits (RFC 3986, section 2.1).
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        // Two hexadecimal digits make a byte.
        bytes.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_may_be_percent_encoded() {
        assert_eq!(
            percent_decoded("info%2Cwarren=trace").as_deref(),
            Some("info,warren=trace")
        );
        for bad in ["%", "%2", "%zz", "%ff"] {
            assert_eq!(percent_decoded(bad), None, "{bad}");
        }
    }
}
