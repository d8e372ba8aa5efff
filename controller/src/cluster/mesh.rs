//! The XMesh object (GEP-3949): which features of the Gateway API the mesh has.
//!
//! Made if it is absent; its spec is never changed. One that belongs to another controller is left alone.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{CONTROLLER, as_us};
use crate::providers::kubernetes::{Shared, api_resource};

/// Keeps the object up to date while this replica leads, for as long as it is polled.
pub async fn run(
    client: Client,
    name: String,
    shared: Arc<Shared>,
    mut leading: watch::Receiver<bool>,
) {
    let mut served = shared.changes();
    let mut warned = false;
    loop {
        let version = served.borrow_and_update().get("XMesh").copied();
        if let Some(version) = version
            && *leading.borrow_and_update()
        {
            let meshes = Api::<DynamicObject>::all_with(client.clone(), &resource(version));
            match publish(&meshes, &name, version).await {
                Ok(true) => warned = false,
                Ok(false) if warned => {}
                Ok(false) => {
                    warned = true;
                    tracing::warn!("XMesh {name} belongs to another controller and is left alone");
                }
                Err(error) => tracing::debug!("XMesh {name}: {error}"),
            }
        }
        let changed = async {
            loop {
                tokio::select! {
                    // Changes also with every route.
                    changed = served.changed() => {
                        changed?;
                        if served.borrow_and_update().get("XMesh").copied() != version {
                            return Ok(());
                        }
                    }
                    changed = leading.changed() => return changed,
                }
            }
        };
        // An error means that the sender is gone.
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, changed).await {
            return;
        }
    }
}

/// False: it is another controller's.
async fn publish(
    meshes: &Api<DynamicObject>,
    name: &str,
    version: &str,
) -> Result<bool, kube::Error> {
    let mesh = match meshes.get_opt(name).await? {
        Some(mesh) => mesh,
        None => {
            let mut mesh = DynamicObject::new(name, &resource(version));
            mesh.data = json!({ "spec": { "controllerName": CONTROLLER } });
            meshes.create(&PostParams::default(), &mesh).await?
        }
    };
    if mesh.data["spec"]["controllerName"] != CONTROLLER {
        return Ok(false);
    }
    let status = wanted(&mesh.data["status"], mesh.metadata.generation);
    if status != mesh.data["status"] {
        let patch = json!({
            "metadata": { "resourceVersion": mesh.metadata.resource_version },
            "status": status,
        });
        meshes
            .patch_status(name, &as_us(), &Patch::Merge(patch))
            .await?;
    }
    Ok(true)
}

/// The status as it should be, made of what is there.
fn wanted(there: &Value, generation: Option<i64>) -> Value {
    let empty = Vec::new();
    let conditions = there["conditions"].as_array().unwrap_or(&empty);
    let is_accepted = |c: &&Value| c["type"] == "Accepted";
    let same = conditions
        .iter()
        .filter(is_accepted)
        .find(|c| c["status"] == "True");
    let now = || json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    let accepted = json!({
        "type": "Accepted", "status": "True", "reason": "Accepted",
        "message": "", "observedGeneration": generation,
        "lastTransitionTime": same.map_or_else(now, |c| c["lastTransitionTime"].clone()),
    });
    let others = conditions.iter().filter(|c| !is_accepted(c)).cloned();
    let features: Vec<Value> = FEATURES
        .iter()
        .map(|name| json!({ "name": name }))
        .collect();
    let mut status = there.clone();
    if !status.is_object() {
        status = json!({});
    }
    status["conditions"] = [accepted].into_iter().chain(others).collect();
    status["supportedFeatures"] = features.into();
    status
}

fn resource(version: &str) -> ApiResource {
    api_resource(version, "XMesh", "xmeshes")
}

/// By the names of the conformance suite, sorted as the API wants them.
const FEATURES: [&str; 34] = [
    "GRPCRoute",
    "GRPCRouteNamedRouteRule",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendTimeout",
    "HTTPRouteCORS",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestMirror",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteRetry",
    "HTTPRouteSchemeRedirect",
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];
const LOOK: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_sorted_and_named_once() {
        assert!(FEATURES.is_sorted_by(|a, b| a < b));
        assert!(FEATURES.len() <= 64);
        let mesh = FEATURES.iter().filter(|f| f.starts_with("Mesh"));
        assert_eq!(mesh.count(), 10);
    }

    #[test]
    fn a_status_that_is_right_is_not_written_again() {
        let first = wanted(&Value::Null, Some(3));
        assert_eq!(first["conditions"][0]["observedGeneration"], 3);
        assert_eq!(wanted(&first, Some(3)), first);
        let mut other = first.clone();
        other["conditions"] = json!([{ "type": "Else", "status": "False" }]);
        assert_eq!(wanted(&other, Some(3))["conditions"][1]["type"], "Else");
    }
}
