//! `apply` and `delete`: changing what there is to be.
//!
//! Everything is checked before anything is changed.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::sync::watch;
use warren_controller::providers::directory::{Document, Object, ObjectKey};

use super::cluster::{Cluster, DeploymentRecord, Key, Life, PodRecord};
use super::daemon::Lab;
use super::manifests::{self, EXTRA_KINDS, Known, Source};
use super::requests::{Named, Notes, node_names};
use super::{services, wait};
use crate::error::{Error, Result};

/// Creates and changes objects, in the order of the documents.
pub(crate) async fn apply(lab: &Rc<Lab>, sources: &[Source], notes: &Notes) -> Result<()> {
    let known = Known {
        nodes: node_names(lab),
        namespaces: lab.cluster.borrow().namespaces.keys().cloned().collect(),
    };
    let documents = manifests::parse(sources, &known)?;
    let conflicts = conflicts(&lab.cluster.borrow(), &documents);
    if !conflicts.is_empty() {
        return Err(Error::new(format!(
            "nothing was changed:\n  {}",
            conflicts.join("\n  ")
        )));
    }
    // Namespaces first: their labels decide about the pods that come.
    let (first, then): (Vec<_>, Vec<_>) = documents
        .iter()
        .partition(|d| matches!(d.object, Object::Namespace(_)));
    for document in first.into_iter().chain(then) {
        let outcome = apply_one(lab, document)?;
        // Nobody listens any more when the person went away; the work goes on.
        let _ = notes
            .send(format!("{} {outcome}", document.object.key()))
            .await;
    }
    lab.changed();
    lab.reconcile();
    Ok(())
}

/// What cannot be changed in place.
fn conflicts(cluster: &Cluster, documents: &[Document]) -> Vec<String> {
    let mut conflicts = Vec::new();
    for document in documents {
        let key = document.object.key();
        let place = format!("{}:{}: {key}", document.file.display(), document.line);
        let Object::Pod(pod) = &document.object else {
            continue;
        };
        let Some(existing) = cluster.pods.get(&(key.namespace, key.name)) else {
            continue;
        };
        if existing.life.terminating {
            conflicts.push(format!(
                "{place}: is being deleted; apply again once it is gone"
            ));
        } else if existing.written.as_ref() != pod.spec.as_ref() {
            conflicts.push(format!(
                "{place}: spec: a running pod's cannot be changed; delete it first, or use a Deployment"
            ));
        }
    }
    conflicts
}

const CREATED: &str = "created";
const CONFIGURED: &str = "configured";
const UNCHANGED: &str = "unchanged";

fn outcome<T: PartialEq>(old: Option<&T>, new: &T) -> &'static str {
    match old {
        None => CREATED,
        Some(old) if old == new => UNCHANGED,
        Some(_) => CONFIGURED,
    }
}

fn apply_one(lab: &Rc<Lab>, document: &Document) -> Result<&'static str> {
    let object_key = document.object.key();
    let key: Key = (object_key.namespace.clone(), object_key.name.clone());
    let mut cluster = lab.cluster.borrow_mut();
    Ok(match &document.object {
        Object::Namespace(new) => {
            let said = outcome(cluster.namespaces.get(&key.1), &**new);
            cluster.ending_namespaces.remove(&key.1);
            cluster.namespaces.insert(key.1, (**new).clone());
            said
        }
        Object::ServiceAccount(new) => {
            let said = outcome(cluster.accounts.get(&key), &**new);
            cluster.accounts.insert(key, (**new).clone());
            said
        }
        Object::Deployment(new) => {
            let old = cluster.deployments.get(&key);
            let said = outcome(old.map(|d| &d.manifest), &**new);
            let restarted = old.and_then(|d| d.restarted.clone());
            let record = DeploymentRecord {
                manifest: (**new).clone(),
                restarted,
            };
            cluster.deployments.insert(key, record);
            said
        }
        Object::Service(new) => {
            let mut new = (**new).clone();
            // Its own addresses are free for itself.
            let old = cluster.services.remove(&key);
            let assigned = services::assign(&mut new, old.as_ref(), &cluster.services, lab.plan);
            if let Err(mistake) = assigned {
                if let Some(old) = old {
                    cluster.services.insert(key, old);
                }
                let (file, line) = (document.file.display(), document.line);
                return Err(Error::new(format!(
                    "{file}:{line}: {object_key}: {mistake}"
                )));
            }
            let said = outcome(old.as_ref(), &new);
            cluster.services.insert(key, new);
            said
        }
        Object::EndpointSlice(new) => {
            let said = outcome(cluster.slices.get(&key), &**new);
            cluster.slices.insert(key, (**new).clone());
            said
        }
        Object::Pod(new) => match cluster.pods.get_mut(&key) {
            Some(old) => relabel(old, new),
            None => {
                drop(cluster);
                lab.create_pod(PodRecord {
                    manifest: (**new).clone(),
                    written: Some(new.spec.clone().unwrap_or_else(PodSpec::default)),
                    owner: None,
                    life: Life::default(),
                    stop: watch::Sender::new(None),
                });
                CREATED
            }
        },
        new @ (Object::HttpRoute(_)
        | Object::GrpcRoute(_)
        | Object::TlsRoute(_)
        | Object::TcpRoute(_)
        | Object::BackendTrafficPolicy(_)
        | Object::TrafficPolicy(_)) => {
            let old = cluster.extras.get(&object_key);
            let new = with_creation_time(new.clone(), old);
            let said = outcome(old, &new);
            cluster.extras.insert(object_key, new);
            said
        }
        // Refused when it was checked.
        Object::Node(_) => UNCHANGED,
    })
}

/// As an API server sets it: when the object was first there. The older of two routes counts.
fn with_creation_time(mut new: Object, old: Option<&Object>) -> Object {
    let known = old.and_then(|o| o.metadata().creation_timestamp.clone());
    let metadata = new.metadata_mut();
    if metadata.creation_timestamp.is_none() {
        let now = || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
            let seconds = i64::try_from(now.as_secs()).ok()?;
            k8s_openapi::jiff::Timestamp::from_second(seconds)
                .map(Time)
                .ok()
        };
        metadata.creation_timestamp = known.or_else(now);
    }
    new
}

/// Labels and annotations of a running pod may change.
fn relabel(old: &mut PodRecord, new: &Pod) -> &'static str {
    let metadata = &mut old.manifest.metadata;
    let same =
        metadata.labels == new.metadata.labels && metadata.annotations == new.metadata.annotations;
    metadata.labels = new.metadata.labels.clone();
    metadata.annotations = new.metadata.annotations.clone();
    if same { UNCHANGED } else { CONFIGURED }
}

/// Deletes objects; returns when their pods are gone.
pub(crate) async fn delete(lab: &Rc<Lab>, objects: Vec<Named>, notes: &Notes) -> Result<()> {
    let mut gone: Vec<Key> = Vec::new();
    for object in objects {
        let name = format!("{} {}", object.kind, object.name);
        match delete_one(lab, &object) {
            Ok(pods) => {
                gone.extend(pods);
                let _ = notes.send(format!("{name} deleted")).await;
            }
            Err(_) if object.optional => {
                let _ = notes.send(format!("{name} not found")).await;
            }
            Err(why) => return Err(Error::new(why)),
        }
    }
    lab.changed();
    lab.reconcile();
    wait::gone(lab, &gone).await;
    Ok(())
}

/// Removes an object; returns the pods that end with it.
fn delete_one(lab: &Lab, object: &Named) -> std::result::Result<Vec<Key>, String> {
    let mut cluster = lab.cluster.borrow_mut();
    let namespace = object.namespace.as_deref();
    let name = object.name.as_str();
    let pods: Vec<Key> = match object.kind.as_str() {
        "Pod" => vec![Cluster::find(&cluster.pods, "Pod", namespace, name)?],
        "Deployment" => {
            let key = Cluster::find(&cluster.deployments, "Deployment", namespace, name)?;
            cluster.deployments.remove(&key);
            let owned = cluster.owned(&key).into_iter();
            owned.map(|pod| (key.0.clone(), pod.name)).collect()
        }
        "Service" => {
            let key = Cluster::find(&cluster.services, "Service", namespace, name)?;
            cluster.services.remove(&key);
            Vec::new()
        }
        "ServiceAccount" => {
            let key = Cluster::find(&cluster.accounts, "ServiceAccount", namespace, name)?;
            cluster.accounts.remove(&key);
            Vec::new()
        }
        "EndpointSlice" => {
            let key = Cluster::find(&cluster.slices, "EndpointSlice", namespace, name)?;
            cluster.slices.remove(&key);
            Vec::new()
        }
        "Namespace" => {
            if name == "default" {
                return Err("Namespace default cannot be deleted".into());
            }
            if !cluster.namespaces.contains_key(name) {
                return Err(format!("there is no Namespace {name}"));
            }
            cluster.deployments.retain(|key, _| key.0 != name);
            cluster.services.retain(|key, _| key.0 != name);
            cluster.slices.retain(|key, _| key.0 != name);
            cluster.accounts.retain(|key, _| key.0 != name);
            cluster.extras.retain(|key, _| key.namespace != name);
            cluster
                .pods
                .keys()
                .filter(|key| key.0 == name)
                .cloned()
                .collect()
        }
        kind if EXTRA_KINDS.contains(&kind) => {
            let of_kind = cluster.extras.keys().filter(|key| key.kind == kind);
            let names: BTreeMap<Key, ()> = of_kind
                .map(|key| ((key.namespace.clone(), key.name.clone()), ()))
                .collect();
            let (namespace, name) = Cluster::find(&names, kind, namespace, name)?;
            let kind = kind.to_owned();
            cluster.extras.remove(&ObjectKey {
                kind,
                namespace,
                name,
            });
            Vec::new()
        }
        other => return Err(format!("the lab cannot delete a {other}")),
    };
    // Last, so that its pods are still judged by its labels while they end.
    let namespace_gone = object.kind == "Namespace";
    drop(cluster);
    for key in &pods {
        let grace = lab.grace(key);
        lab.delete_pod(key, grace);
    }
    if namespace_gone && pods.is_empty() {
        lab.cluster.borrow_mut().namespaces.remove(name);
    } else if namespace_gone {
        lab.cluster
            .borrow_mut()
            .ending_namespaces
            .insert(name.to_owned());
    }
    Ok(pods)
}
