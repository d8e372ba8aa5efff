//! What replicas tell each other: how far the nodes that each serves are.
//!
//! Each has a Lease of its own, `warren-controller-<replica>`, renewed every few seconds and at once when
//! somebody may wait for what it says. It belongs to the replica's pod and goes with it. A replica that stops
//! leaves it as it is: its nodes are on their way to another, and are waited for that long.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::Patch;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use mesh_api::names::SYSTEM_NAMESPACE;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::as_us;
use crate::enrolment::Peer;
use crate::hub::Hub;
use crate::providers::kubernetes::watched;

/// This replica among the others.
#[derive(Clone)]
pub struct Replica {
    client: Client,
    name: String,
    owner: Option<Value>,
}

impl Replica {
    /// Finds the pod that the replica is, so that its Lease goes with it.
    pub async fn new(client: Client, name: String) -> Self {
        let pods = Api::<Pod>::namespaced(client.clone(), SYSTEM_NAMESPACE);
        // Outside a cluster there is none.
        let pod = pods.get_metadata_opt(&name).await.ok().flatten();
        let owner = pod
            .and_then(|pod| pod.metadata.uid)
            .map(|uid| json!([{ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid }]));
        Self {
            client,
            name,
            owner,
        }
    }

    /// Says for the first time that the replica is there. To be called before nodes can connect, so that no
    /// other replica decides without them.
    pub async fn introduce(&self) -> Result<(), kube::Error> {
        self.say(0, "").await
    }

    /// Says how far the nodes are, for as long as it is polled.
    pub async fn tell(self, hub: Arc<Hub>) {
        let (mut snapshots, mut progress) = (hub.snapshots(), hub.progress());
        let mut said: Option<(u64, String, Instant)> = None;
        loop {
            let (acknowledged, waited_for) = hub.acknowledged();
            let trusted = hub.trusted();
            let due = match &said {
                None => true,
                Some((version, bundle, at)) => {
                    let news = *bundle != trusted || (waited_for && *version != acknowledged);
                    news || at.elapsed() >= RENEWAL
                }
            };
            if due {
                match self.say(acknowledged, &trusted).await {
                    Ok(()) => said = Some((acknowledged, trusted, Instant::now())),
                    Err(error) => tracing::debug!("this replica's Lease was not written: {error}"),
                }
                // Many acknowledgements come at once.
                tokio::time::sleep(PAUSE).await;
            }
            tokio::select! {
                _ = snapshots.changed() => {}
                _ = progress.changed() => {}
                () = tokio::time::sleep(RENEWAL) => {}
            }
        }
    }

    /// Hears what the others say, for as long as it is polled.
    pub async fn hear(self, hub: Arc<Hub>) {
        let config = watcher::Config::default().labels(LABEL);
        let mut events = watched(self.leases(), config).boxed();
        loop {
            let lease = match events.try_next().await {
                Ok(Some(watcher::Event::Apply(lease) | watcher::Event::InitApply(lease))) => {
                    let name = lease.name_any();
                    (name, Some(peer(&lease)))
                }
                Ok(Some(watcher::Event::Delete(lease))) => (lease.name_any(), None),
                Ok(Some(watcher::Event::Init | watcher::Event::InitDone)) => continue,
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!("the Leases of replicas cannot be watched: {error}");
                    continue;
                }
            };
            if lease.0 != self.lease() {
                hub.heard_of_replica(&lease.0, lease.1);
            }
        }
    }

    /// The others that are alive before this one serves anyone; they answer by renewing.
    pub async fn others(&self) -> Result<Vec<(String, Peer)>, kube::Error> {
        let params = kube::api::ListParams::default().labels(LABEL);
        let list = self.leases().list(&params).await?;
        let others = list.iter().filter(|l| l.name_any() != self.lease());
        Ok(others.map(|l| (l.name_any(), peer(l))).collect())
    }

    async fn say(&self, acknowledged: u64, trusted: &str) -> Result<(), kube::Error> {
        let mut lease = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": self.lease(),
                "labels": { LABEL: "true" },
                "annotations": { ACKNOWLEDGED: acknowledged.to_string(), TRUSTED: trusted },
            },
            "spec": {
                "holderIdentity": self.name,
                "leaseDurationSeconds": crate::enrolment::LEASE.as_secs(),
                "renewTime": format!("{:.6}", Timestamp::now()),
            },
        });
        if let Some(owner) = &self.owner {
            lease["metadata"]["ownerReferences"] = owner.clone();
        }
        let params = as_us().force();
        self.leases()
            .patch(&self.lease(), &params, &Patch::Apply(lease))
            .await?;
        Ok(())
    }

    fn lease(&self) -> String {
        format!("warren-controller-{}", self.name)
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE)
    }
}

fn peer(lease: &Lease) -> Peer {
    let annotation = |key: &str| lease.annotations().get(key).cloned().unwrap_or_default();
    let renewed = lease.spec.as_ref().and_then(|s| s.renew_time.as_ref());
    Peer {
        acknowledged: annotation(ACKNOWLEDGED).parse().unwrap_or(0),
        trusted: annotation(TRUSTED),
        renewal: renewed.map(|time| time.0.to_string()).unwrap_or_default(),
    }
}

const LABEL: &str = "warren-mesh.io/replica";
const ACKNOWLEDGED: &str = "warren-mesh.io/acknowledged";
const TRUSTED: &str = "warren-mesh.io/trusted";
const RENEWAL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
