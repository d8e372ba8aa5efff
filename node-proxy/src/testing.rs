//! What unit tests of several modules need.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use futures::future::{BoxFuture, pending};
use mesh_api::identity::Identity;

use crate::connections::Connections;
use crate::identity::{Identities, IssueError, Issuer};
use crate::pods::{Host, Pods};
use crate::stock::Supply;
use crate::table::Table;
use crate::telemetry::Telemetry;
use crate::telemetry::access_log::{AccessLog, Format};
use crate::tunnel::tls::ServerConfigs;
use crate::worker::Context;

/// Never reached: no certificate is needed.
struct NoIssuer;

impl Issuer for NoIssuer {
    fn reachable(&self) -> BoxFuture<'_, ()> {
        Box::pin(pending())
    }

    fn issue(&self, _: &Identity, _: Vec<u8>) -> BoxFuture<'_, Result<Vec<Vec<u8>>, IssueError>> {
        Box::pin(pending())
    }
}

/// Without certificates.
pub(crate) fn identities(directory: &Path) -> Arc<Identities> {
    Identities::new(directory, Arc::new(NoIssuer), Arc::new(SystemTime::now))
}

/// Of node-1, without pods and with an empty table.
pub(crate) fn context(identities: Arc<Identities>, supply: &Arc<Supply>) -> Context {
    let telemetry = Telemetry::new();
    Context {
        node: "node-1".into(),
        table: Table::new("node-1"),
        identities,
        pods: Pods::new(),
        host: Host::new(supply),
        access_log: AccessLog::start(Format::Off, Arc::clone(&telemetry)).unwrap(),
        telemetry,
        server_configs: ServerConfigs::default(),
        connections: Arc::new(Connections::default()),
    }
}
