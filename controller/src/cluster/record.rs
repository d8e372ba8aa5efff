//! Writes the annotation `warren-mesh.io/enrolled` of pods.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Patch;
use kube::{Api, Client};
use mesh_api::names::ENROLLED_ANNOTATION;
use serde_json::json;

use super::as_us;
use crate::enrolment::Write;
use crate::hub::Hub;

/// Writes whatever is to be recorded, for as long as it is polled.
pub async fn run(client: Client, hub: Arc<Hub>) {
    loop {
        hub.to_record().await;
        loop {
            let writes = hub.unrecorded();
            if writes.is_empty() {
                break;
            }
            let written = futures::stream::iter(writes)
                .map(|write| record(&client, &hub, write))
                .buffer_unordered(AT_ONCE);
            let failed = written.any(|ok| async move { !ok }).await;
            if failed {
                // The API server is away or overloaded; what failed is proposed again by then.
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// True unless the API server could not do it now.
async fn record(client: &Client, hub: &Hub, write: Write) -> bool {
    let Write {
        uid,
        namespace,
        name,
        recorded,
    } = &write;
    // `Recorded` has text keys only: serialising cannot fail.
    let text = serde_json::to_string(recorded).unwrap_or_default();
    // The UID keeps it from a pod that took the name meanwhile.
    let patch = json!({
        "metadata": { "uid": &**uid, "annotations": { ENROLLED_ANNOTATION: text } },
    });
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    // Only the metadata comes back.
    let written = pods
        .patch_metadata(name, &as_us(), &Patch::Merge(patch))
        .await;
    let Err(error) = written else { return true };
    hub.not_recorded(&write);
    match error {
        // The pod is gone, or another has its name: the watch will say so.
        kube::Error::Api(status) if matches!(status.code, 404 | 409 | 422) => {
            tracing::debug!("Pod {namespace}/{name}: not recorded: {status}");
            true
        }
        error => {
            tracing::warn!("Pod {namespace}/{name}: its enrolment cannot be recorded: {error}");
            hub.metrics().store_failures.inc();
            false
        }
    }
}

/// Writes at the same time.
const AT_ONCE: usize = 16;
const PAUSE: Duration = Duration::from_secs(1);
