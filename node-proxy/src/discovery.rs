//! Brings the mesh to this node: feeds the [`Table`] and the [`Identities`] from the controller, and
//! from the disk when a proxy starts.
//!
//! Nothing here is needed for traffic to flow: with the controller away everything goes on with what
//! is held, and the connection is retried for ever.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::client::delta::{self, Sink, Update};
use mesh_api::client::{ClientConfig, Controller};
use mesh_api::proto::discovery::{DeltaDiscoveryResponse, Resource};
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;

use crate::identity::{ControllerIssuer, Identities};
use crate::table::log::Log;
use crate::table::{Applied, Kind, Table};

mod metrics;

use metrics::Metrics;

/// What discovery needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the controller is. Its `credentials_dir` is set from `secrets_dir`.
    pub controller: ClientConfig,
    /// Where the table is kept.
    pub state_dir: PathBuf,
    /// On a tmpfs: keys of the node and its workloads.
    pub secrets_dir: PathBuf,
}

/// The running discovery. Ends when dropped.
pub struct Discovery {
    /// What is known of the mesh.
    pub table: Arc<Table>,
    /// Certificates of this node's workloads.
    pub identities: Arc<Identities>,
    /// The connection to the controller.
    pub controller: Controller,
    tasks: JoinSet<()>,
}

impl Discovery {
    /// Ends, with everything written that is to be kept.
    pub async fn shut_down(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Loads what is on disk and starts to follow the controller. Needs a tokio runtime.
pub fn start(config: Config, registry: &mut Registry) -> Discovery {
    let table = Table::new(&config.controller.node);
    let path = config.state_dir.join(FILE);
    let log = match Log::open(&path) {
        Ok((kept, log)) => {
            restore(&table, kept);
            Some(log)
        }
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "the table cannot be kept on disk: a restarted proxy will need the controller");
            None
        }
    };
    let controller = Controller::start(ClientConfig {
        credentials_dir: Some(config.secrets_dir.clone()),
        ..config.controller
    });
    let issuer = Arc::new(ControllerIssuer(controller.clone()));
    let identities = Identities::new(&config.secrets_dir, issuer, Arc::new(SystemTime::now));
    identities.register(registry);

    let feed = Feed {
        table: Arc::clone(&table),
        identities: Arc::clone(&identities),
        controller: controller.clone(),
        log,
        metrics: Metrics::register(registry, &table),
    };
    feed.trust();
    let mut tasks = JoinSet::new();
    tasks.spawn(delta::run(controller.clone(), table.subscriptions(), feed));
    tasks.spawn(expire(Arc::clone(&table)));
    tasks.spawn(settle(Arc::clone(&table)));
    Discovery {
        table,
        identities,
        controller,
        tasks,
    }
}

/// Applies what an earlier process kept.
fn restore(table: &Table, mut kept: Vec<DeltaDiscoveryResponse>) {
    // The settings first: identities depend on the trust domain.
    let rank = |url: &str| Kind::ALL.iter().position(|k| k.type_url() == url);
    kept.sort_by_key(|response| rank(&response.type_url));
    for response in kept {
        let type_url = response.type_url;
        let updates: Vec<_> = response.resources.into_iter().filter_map(update).collect();
        for rejected in table.apply(&type_url, &updates, &[]).rejected {
            tracing::warn!(
                type_url,
                name = rejected.name,
                reason = rejected.reason,
                "kept resource is not valid"
            );
        }
        table.complete(&type_url);
    }
    if *table.loaded().borrow() {
        let (workloads, services, routes) = sizes(table);
        tracing::info!(workloads, services, routes, "table loaded from disk");
    }
}

/// Where the controller's resources go.
struct Feed {
    table: Arc<Table>,
    identities: Arc<Identities>,
    controller: Controller,
    log: Option<Log>,
    metrics: Metrics,
}

impl Sink for Feed {
    fn known(&self, type_url: &str) -> HashMap<String, String> {
        self.table.known(type_url)
    }

    fn apply(
        &mut self,
        type_url: &str,
        upserts: Vec<Update>,
        removed: Vec<String>,
    ) -> Result<(), String> {
        let applied = self.table.apply(type_url, &upserts, &removed);
        for rejected in &applied.rejected {
            tracing::error!(
                type_url,
                name = rejected.name,
                reason = rejected.reason,
                "resource rejected, what was known before stays"
            );
        }
        let result = applied.result();
        self.metrics.message(type_url, result.is_ok());
        if let Some(log) = &mut self.log {
            log.append(&taken(type_url, upserts, removed, &applied));
        }
        if Kind::of(type_url) == Some(Kind::MeshConfig) {
            self.trust();
        }
        result
    }

    fn complete(&mut self, type_url: &str) {
        let was_loaded = *self.table.loaded().borrow();
        if !self.table.complete(type_url) {
            return;
        }
        if let Some(log) = &mut self.log {
            log.append(&DeltaDiscoveryResponse {
                type_url: type_url.to_owned(),
                ..Default::default()
            });
        }
        if !was_loaded && *self.table.loaded().borrow() {
            let (workloads, services, routes) = sizes(&self.table);
            tracing::info!(
                workloads,
                services,
                routes,
                "table loaded from the controller"
            );
        }
    }

    fn opened(&mut self) {
        self.table.set_online(true);
        self.metrics.opened();
        tracing::info!("discovery stream open");
    }

    fn closed(&mut self) {
        self.table.set_online(false);
        self.metrics.closed();
    }
}

impl Feed {
    /// Hands the roots of the table on.
    fn trust(&self) {
        let mesh = self.table.mesh();
        if !mesh.trust_bundle.is_empty() {
            self.identities
                .set_trust(&mesh.trust_domain, &mesh.trust_bundle);
            self.controller.set_trust_bundle(mesh.trust_bundle.clone());
        }
    }
}

/// The part of a response that is in force. A workload that was quarantined is kept too, so that it is
/// quarantined again after a restart.
fn taken(
    type_url: &str,
    upserts: Vec<Update>,
    removed: Vec<String>,
    applied: &Applied,
) -> DeltaDiscoveryResponse {
    let dropped = |name: &str| {
        applied
            .rejected
            .iter()
            .any(|r| r.name == name && !r.quarantined)
    };
    DeltaDiscoveryResponse {
        // Whether it was all there is, `complete` says.
        system_version_info: delta::MORE.into(),
        type_url: type_url.to_owned(),
        resources: upserts
            .into_iter()
            .filter(|u| !dropped(&u.name))
            .map(|u| Resource {
                version: u.version,
                name: u.name,
                aliases: u.aliases,
                resource: Some(prost_types::Any {
                    type_url: type_url.to_owned(),
                    value: u.value.into(),
                }),
            })
            .collect(),
        removed_resources: removed,
        ..Default::default()
    }
}

fn update(resource: Resource) -> Option<Update> {
    Some(Update {
        name: resource.name,
        version: resource.version,
        aliases: resource.aliases,
        value: resource.resource?.value.into(),
    })
}

async fn expire(table: Arc<Table>) {
    loop {
        tokio::time::sleep(EXPIRE_EVERY).await;
        table.expire_demand();
    }
}

/// A controller that knows a type answers at once. One that is older than the type ignores it, and a table that an
/// older proxy kept does not hold it: neither must keep the node from serving.
async fn settle(table: Arc<Table>) {
    let (mut nearly, mut loaded) = (table.nearly_loaded(), table.loaded());
    // An error means that the table is gone.
    let _ = nearly.wait_for(|nearly| *nearly).await;
    let rest = loaded.wait_for(|loaded| *loaded);
    if tokio::time::timeout(OPTIONAL_WAIT, rest).await.is_err() {
        tracing::warn!(
            "no routes and policies from the controller or the disk: the node serves without them"
        );
    }
    table.settle();
}

/// Meshed pods, Services and routes that are held.
fn sizes(table: &Table) -> (usize, usize, usize) {
    let [workloads, services, routes] =
        [Kind::Workload, Kind::Service, Kind::Route].map(|kind| table.count(kind));
    (workloads, services, routes)
}

/// How long an otherwise complete table waits for types that not every controller knows.
#[cfg(not(test))]
const OPTIONAL_WAIT: Duration = Duration::from_secs(2);
#[cfg(test)]
const OPTIONAL_WAIT: Duration = Duration::from_millis(100);
const FILE: &str = "table.log";
const EXPIRE_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
