//! One line a connection, or a request where requests are understood, written by a thread of its own so that a slow reader of standard output never
//! holds up traffic: lines that do not fit the queue are dropped and counted.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use mesh_api::errors::ProxyError;
use serde::{Deserialize, Serialize};

use super::{Party, Telemetry};

mod request;

pub use request::RequestRecord;
pub(super) use request::{MAX_NAME, bounded};

/// Form of the lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `key=value` pairs.
    Text,
    /// One JSON object a line.
    Json,
    /// No access log. Failures are still logged as warnings.
    #[default]
    Off,
}

const QUEUE: usize = 4096;

/// Where connections are logged to when they end.
#[derive(Clone, Debug)]
pub struct AccessLog {
    format: Format,
    query: bool,
    lines: Option<SyncSender<String>>,
    telemetry: Arc<Telemetry>,
}

/// What a line says.
#[derive(Debug)]
pub struct Record<'a> {
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// The caller's address.
    pub source_address: SocketAddr,
    /// Where the caller wanted to go.
    pub destination_address: SocketAddr,
    /// Caller.
    pub source: &'a Party,
    /// Callee.
    pub destination: &'a Party,
    /// `name.namespace`, or `unknown`.
    pub service: &'a str,
    /// Bytes from source to destination.
    pub bytes_sent: u64,
    /// Bytes from destination to source.
    pub bytes_received: u64,
    /// From accept to the end.
    pub duration: Duration,
    /// Why it failed, if it did.
    pub error: Option<ProxyError>,
}

impl AccessLog {
    /// Starts the writing thread, unless the log is off.
    pub fn start(format: Format, telemetry: Arc<Telemetry>) -> std::io::Result<Self> {
        if format == Format::Off {
            return Ok(Self {
                format,
                query: false,
                lines: None,
                telemetry,
            });
        }
        let (lines, queue) = sync_channel::<String>(QUEUE);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || {
                let mut out = std::io::stdout();
                for line in queue {
                    if out.write_all(line.as_bytes()).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            format,
            query: false,
            lines: Some(lines),
            telemetry,
        })
    }

    /// Whether the paths of requests are written with their query, which may hold secrets. Without this call:
    /// no.
    pub fn with_query(self, query: bool) -> Self {
        Self { query, ..self }
    }

    /// Whether anything is written, so that nothing need be put together for a log that is off.
    pub fn is_on(&self) -> bool {
        self.lines.is_some()
    }

    /// Writes one line; drops it if the queue is full.
    pub fn write(&self, record: &Record<'_>) {
        self.send(|format| match format {
            Format::Off => None,
            Format::Text => Some(record.text()),
            Format::Json => Some(record.json()),
        });
    }

    /// Writes one line for a request; drops it if the queue is full.
    pub fn write_request(&self, record: &RequestRecord<'_>) {
        self.send(|format| match format {
            Format::Off => None,
            Format::Text => Some(record.text(self.query)),
            Format::Json => Some(record.json(self.query)),
        });
    }

    fn send(&self, line: impl FnOnce(Format) -> Option<String>) {
        let Some(lines) = &self.lines else { return };
        let Some(mut line) = line(self.format) else {
            return;
        };
        line.push('\n');
        if lines.try_send(line).is_err() {
            self.telemetry.access_log_dropped.inc();
        }
    }
}

impl Record<'_> {
    fn text(&self) -> String {
        let error = self
            .error
            .map(|e| format!(" error={}", e.name()))
            .unwrap_or_default();
        format!(
            "{} access direction={} src.addr={} src.workload={} src.namespace={} src.identity={} dst.addr={} \
             dst.workload={} dst.namespace={} dst.identity={} dst.service={} bytes_sent={} bytes_received={} \
             duration_ms={:.3}{error}",
            now(),
            self.direction,
            self.source_address,
            self.source.workload(),
            self.source.namespace(),
            self.source.principal(),
            self.destination_address,
            self.destination.workload(),
            self.destination.namespace(),
            self.destination.principal(),
            self.service,
            self.bytes_sent,
            self.bytes_received,
            self.duration.as_secs_f64() * 1e3,
        )
    }

    fn json(&self) -> String {
        serde_json::json!({
            "time": now(),
            "direction": self.direction,
            "sourceAddress": self.source_address,
            "source": party(self.source),
            "destinationAddress": self.destination_address,
            "destination": party(self.destination),
            "service": self.service,
            "bytesSent": self.bytes_sent,
            "bytesReceived": self.bytes_received,
            "durationMs": self.duration.as_secs_f64() * 1e3,
            "error": self.error.map(ProxyError::name),
        })
        .to_string()
    }
}

fn party(party: &Party) -> serde_json::Value {
    serde_json::json!({"workload": party.workload(), "namespace": party.namespace(), "identity": party.principal()})
}

fn now() -> String {
    let format = time::macros::format_description!(
        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"
    );
    time::OffsetDateTime::now_utc()
        .format(&format)
        .unwrap_or_default()
}
