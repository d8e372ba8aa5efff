//! One connection as it is seen from outside: its labels, its line in the access log, its place in the
//! list of live connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_api::errors::ProxyError;
use parking_lot::Mutex;

use crate::telemetry::access_log::{Record, RequestRecord};
use crate::telemetry::{OpenConnection, Party, Reporter, Security, TcpLabels};
use crate::worker::Context;

/// Logs at a level that is known at run time only.
macro_rules! at_level {
    ($level:expr, $($what:tt)*) => {
        match $level {
            tracing::Level::ERROR => tracing::error!($($what)*),
            tracing::Level::WARN => tracing::warn!($($what)*),
            tracing::Level::INFO => tracing::info!($($what)*),
            tracing::Level::DEBUG => tracing::debug!($($what)*),
            tracing::Level::TRACE => tracing::trace!($($what)*),
        }
    };
}

/// What is known of a connection so far.
#[derive(Debug)]
pub struct Flow {
    /// The caller's address.
    pub source_address: SocketAddr,
    /// Where the caller wanted to go.
    pub destination_address: SocketAddr,
    /// Which half this node is.
    pub reporter: Reporter,
    /// The caller.
    pub source: Party,
    /// The callee.
    pub destination: Party,
    /// `name.namespace` of the Service that was addressed.
    pub service: Option<Arc<str>>,
    /// How the bytes travel.
    pub security: Security,
    accepted: Instant,
}

impl Flow {
    /// A connection that has just been accepted; the callee is not known yet.
    pub fn new(
        reporter: Reporter,
        source_address: SocketAddr,
        destination_address: SocketAddr,
        source: Party,
    ) -> Self {
        Self {
            source_address,
            destination_address,
            reporter,
            source,
            destination: Party::unknown(),
            service: None,
            security: Security::Plaintext,
            accepted: Instant::now(),
        }
    }

    /// Counts it as established.
    pub fn open(&self, context: &Context) -> OpenConnection {
        context.telemetry.open(&self.labels())
    }

    /// Counts and logs a connection that was not established.
    pub fn fail(&self, context: &Context, error: ProxyError) {
        context.telemetry.fail(&self.labels(), error);
        if let Some(suppressed) = WARNINGS.permit(error) {
            at_level!(
                error.level(),
                direction = self.direction(), source = %self.source_address, destination = %self.destination_address,
                source_identity = self.source.principal(), destination_identity = self.destination.principal(),
                service = self.service.as_deref().unwrap_or("-"), reason = error.name(), suppressed,
                "connection refused: {}", error.hint()
            );
        }
        self.log(context, 0, 0, Some(error));
    }

    /// Logs an established connection that has ended.
    pub fn ended(&self, context: &Context, open: &OpenConnection, error: Option<ProxyError>) {
        self.log(context, open.sent.get(), open.received.get(), error);
    }

    /// `outbound` at the caller's node, `inbound` at the callee's.
    pub fn direction(&self) -> &'static str {
        match self.reporter {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        }
    }

    fn labels(&self) -> TcpLabels {
        TcpLabels {
            reporter: self.reporter,
            source: self.source.clone(),
            destination: self.destination.clone(),
            service: self.service.clone(),
            security: self.security,
        }
    }

    fn log(
        &self,
        context: &Context,
        bytes_sent: u64,
        bytes_received: u64,
        error: Option<ProxyError>,
    ) {
        context.access_log.write(&Record {
            direction: self.direction(),
            source_address: self.source_address,
            destination_address: self.destination_address,
            source: &self.source,
            destination: &self.destination,
            service: self.service.as_deref().unwrap_or("unknown"),
            bytes_sent,
            bytes_received,
            duration: self.accepted.elapsed(),
            error,
        });
    }
}

/// Logs why the proxy ended a request, if it did. Not its path: the access log has that.
pub fn request_failed(record: &RequestRecord<'_>) {
    let Some(error) = record.outcome.error else {
        return;
    };
    if let Some(suppressed) = WARNINGS.permit(error) {
        at_level!(
            error.level(),
            direction = record.direction(), source = %record.source_address,
            destination = %record.destination_address, source_identity = record.source.principal(),
            destination_identity = record.destination.principal(), service = record.service.unwrap_or("-"),
            route = record.route.unwrap_or("-"), status = record.outcome.status, reason = error.name(),
            suppressed, "request ended: {}", error.hint()
        );
    }
}

/// At most one warning a second for each reason: a pod in trouble must not fill the node's disk. The
/// metric counts all.
static WARNINGS: Warnings = Warnings {
    last: Mutex::new([None; ProxyError::ALL.len()]),
};

struct Warnings {
    last: Mutex<[Option<(Instant, u64)>; ProxyError::ALL.len()]>,
}

impl Warnings {
    /// `Some(how many were suppressed since the last one)` if a warning may be written now.
    fn permit(&self, error: ProxyError) -> Option<u64> {
        let mut last = self.last.lock();
        let now = Instant::now();
        match &mut last[error.index()] {
            Some((at, suppressed)) if now.duration_since(*at).as_secs() < 1 => {
                *suppressed += 1;
                None
            }
            slot => {
                let suppressed = slot.map_or(0, |(_, suppressed)| suppressed);
                *slot = Some((now, 0));
                Some(suppressed)
            }
        }
    }
}
