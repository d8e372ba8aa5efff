//! The parts that keep up with a Kubernetes API server, and write to it.

use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::watch;

use super::{Common, Foundation, Health, Parts, Provider, RootSource, RunError, rotate};
use crate::ca::secret::{Changes, RootSecret};
use crate::ca::tokens::TokenReviews;
use crate::ca::{CaError, Roots};
use crate::cluster::{self, replicas::Replica};
use crate::config::{self, Config};
use crate::hub::{Cluster, Hub, Keeper};
use crate::metrics::Metrics;
use crate::providers::kubernetes::{Reader, connect};

/// What is watched and written.
pub(super) struct Following {
    client: Client,
    reader: Reader,
    version: u64,
    roots: RootSecret,
    replica: Replica,
    name: String,
    mesh_name: String,
    metrics: Metrics,
}

/// Reads everything for the first time; takes as long as the API server does.
pub(super) async fn open(
    config: &Config,
    metrics: &Metrics,
    health: &Health,
    (provider, secret): (&config::Kubernetes, &str),
) -> Result<Foundation, RunError> {
    let client = connect(provider).await?;
    let roots = RootSecret::new(&client, secret, &config.trust_domain);
    let kept = loop {
        match roots.read().await {
            Ok(read) => break read.roots,
            Err(error) => {
                tracing::error!("{error}");
                health.set("start", Some(error.to_string()));
                tokio::time::sleep(AGAIN).await;
            }
        }
    };
    let mut reader = Reader::new(&client, metrics);
    let listed = {
        let shared = reader.shared().clone();
        let mut listed = std::pin::pin!(reader.listed());
        loop {
            match tokio::time::timeout(AGAIN, &mut listed).await {
                Ok(listed) => break listed,
                Err(_) => {
                    let waiting = shared.waiting().join(", ");
                    tracing::warn!("the API server has not listed everything yet: {waiting}");
                    health.set("start", Some(format!("not listed yet: {waiting}")));
                }
            }
        }
    };
    let (objects, version) = listed;
    let name = cluster::replica_name(provider.replica.as_deref());
    let replica = Replica::new(client.clone(), name.clone()).await;
    Ok(Foundation {
        objects,
        roots: kept,
        keeper: Keeper::Cluster(Cluster::new(version)),
        tokens: Arc::new(TokenReviews::new(client.clone())),
        provider: Provider::Kubernetes(Box::new(Following {
            client,
            reader,
            version,
            roots,
            replica,
            name,
            mesh_name: provider.mesh_name.clone(),
            metrics: metrics.clone(),
        })),
    })
}

impl Following {
    pub(super) async fn start(self, parts: &mut Parts, common: &Common) -> Result<(), RunError> {
        let Self {
            client,
            reader,
            version,
            roots,
            replica,
            name,
            mesh_name,
            metrics,
        } = self;
        let (hub, stop) = (&common.hub, &common.stop);
        hub.set_read(None, version);
        // Before the port is open: no other replica may decide without the nodes that come here.
        replica.introduce().await?;
        for (name, peer) in replica.others().await? {
            hub.heard_of_replica(&name, Some(peer));
        }
        let (leads, leading) = watch::channel(false);
        parts.add(
            "leases of other replicas",
            replica.clone().hear(hub.clone()),
        );
        parts.add("lease of this replica", replica.tell(hub.clone()));
        parts.add_ending(
            "election",
            cluster::lease::elect(client.clone(), name.clone(), metrics, leads, stop.clone()),
        );
        let shared = reader.shared().clone();
        parts.add("status", {
            let (client, hub, shared) = (client.clone(), hub.clone(), shared.clone());
            cluster::status::run(client, hub, shared, leading.clone())
        });
        parts.add("events", {
            let (client, hub, shared) = (client.clone(), hub.clone(), shared.clone());
            cluster::events::run(client, name, hub, shared, leading.clone())
        });
        parts.add(
            "XMesh",
            cluster::mesh::run(client.clone(), mesh_name, shared, leading.clone()),
        );
        parts.add(
            "taints",
            cluster::taint::run(client.clone(), hub.clone(), leading.clone()),
        );
        parts.add(
            "record of enrolment",
            cluster::record::run(client, hub.clone()),
        );
        parts.add(
            "watches",
            provide(reader, hub.clone(), common.health.clone()),
        );
        let roots = LedRoots {
            changes: roots.watch(),
            secret: roots,
            leading,
        };
        parts.add("certificate authority", rotate(common.clone(), roots));
        Ok(())
    }
}

async fn provide(mut reader: Reader, hub: Arc<Hub>, health: Arc<Health>) {
    let shared = reader.shared().clone();
    loop {
        let read = reader.changed().await;
        let mistakes = shared.mistakes();
        let told = mistakes
            .iter()
            .map(|(object, mistake)| format!("{object}: {mistake}"));
        *health.mistakes.lock() = told.collect();
        hub.set_read(read.objects, read.version);
    }
}

/// Roots in a Secret; the leader also writes the bundle.
struct LedRoots {
    changes: Changes,
    secret: RootSecret,
    leading: watch::Receiver<bool>,
}

impl RootSource for LedRoots {
    async fn changed(&mut self) {
        tokio::select! {
            () = self.changes.next() => {}
            changed = self.leading.changed() => if changed.is_err() {
                std::future::pending().await
            },
        }
    }

    async fn read(&mut self) -> Result<Roots, CaError> {
        let read = self.secret.read().await?;
        if let Some(bundle) = &read.bundle
            && *self.leading.borrow()
        {
            self.secret.write(bundle).await?;
        }
        Ok(read.roots)
    }
}

/// How long to wait for an API server before saying so.
const AGAIN: Duration = Duration::from_secs(5);
