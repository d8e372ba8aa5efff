//! The status of routes and policies, written by the leader.
//!
//! Rules (GEP-1294, GEP-713): one entry for each parent or target that is a Service, under our
//! `controllerName`; entries of other controllers, and conditions of other types in ours, stay as they are.
//! A status is written when it differs from what is there, with the version that it was compared with, and
//! only for the generation that was judged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{CONTROLLER, as_us};
use crate::hub::Hub;
use crate::model::{Condition, ObjectStatus, ParentStatus};
use crate::providers::ObjectKey;
use crate::providers::kubernetes::{Seen, Shared};

/// Writes status while this replica leads, for as long as it is polled.
pub async fn run(
    client: Client,
    hub: Arc<Hub>,
    shared: Arc<Shared>,
    mut leading: watch::Receiver<bool>,
) {
    let (mut snapshots, mut seen) = (hub.snapshots(), shared.changes());
    loop {
        // Both are looked at below: what changes from here on is looked at again.
        snapshots.borrow_and_update();
        seen.borrow_and_update();
        let mut rest = Duration::MAX;
        if *leading.borrow_and_update() {
            let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let model = hub.model();
            let statuses = model.statuses.iter().map(|s| (s.object(), s));
            let statuses: BTreeMap<ObjectKey, &ObjectStatus> = statuses.collect();
            let writes = shared.seen(|(key, seen)| Write::new(key, seen, statuses.get(key), &now));
            let written = futures::stream::iter(writes)
                .map(|write| write.carry_out(&client))
                .buffer_unordered(AT_ONCE);
            if written.any(|ok| async move { !ok }).await {
                rest = AGAIN;
            }
        }
        let changed = async {
            tokio::select! {
                changed = snapshots.changed() => changed.is_ok(),
                changed = seen.changed() => changed.is_ok(),
                changed = leading.changed() => changed.is_ok(),
            }
        };
        match tokio::time::timeout(rest, changed).await {
            // The senders live as long as the controller.
            Ok(false) => return,
            // What is written comes back as a change, and so do most changes in bunches.
            Ok(true) => tokio::time::sleep(GATHERING).await,
            Err(_) => {}
        }
    }
}

/// One status to be written.
#[derive(Debug)]
struct Write {
    key: ObjectKey,
    resource: Arc<ApiResource>,
    resource_version: String,
    status: Value,
}

impl Write {
    /// `None`: the status is as it should be, or what was judged is not what is there.
    fn new(
        key: &ObjectKey,
        seen: &Seen,
        wanted: Option<&&ObjectStatus>,
        now: &str,
    ) -> Option<Self> {
        let judged = wanted.is_none_or(|w| w.observed_generation == seen.generation);
        let (list, reference) = entries_of(&key.kind);
        let empty = Vec::new();
        let there = seen.status[list].as_array().unwrap_or(&empty);
        let (ours, others): (Vec<&Value>, Vec<&Value>) = there
            .iter()
            .partition(|e| e["controllerName"] == CONTROLLER);
        let parents = wanted.map_or(&[][..], |w| &w.parents);
        let room = if list == "parents" { 32 } else { 16 };
        let made: Vec<Value> = parents
            .iter()
            .take(room - others.len().min(room))
            .map(|parent| entry(parent, reference, seen.generation, &ours, now))
            .collect();
        if !judged || ours.iter().copied().eq(&made) {
            return None;
        }
        let all = others.into_iter().cloned().chain(made).collect::<Vec<_>>();
        Some(Self {
            key: key.clone(),
            resource: seen.resource.clone(),
            resource_version: seen.resource_version.clone(),
            status: json!({ list: all }),
        })
    }

    /// False: it is to be tried again.
    async fn carry_out(self, client: &Client) -> bool {
        let Self {
            key,
            resource,
            resource_version,
            status,
        } = self;
        let api = Api::<DynamicObject>::namespaced_with(client.clone(), &key.namespace, &resource);
        let patch =
            json!({ "metadata": { "resourceVersion": resource_version }, "status": status });
        match api
            .patch_status(&key.name, &as_us(), &Patch::Merge(patch))
            .await
        {
            Ok(_) => true,
            // Somebody wrote in between, or it is gone: the watch will say so.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => true,
            Err(error) => {
                tracing::warn!("{key}: its status cannot be written: {error}");
                false
            }
        }
    }
}

/// Where the entries are, and what the reference in each is called.
fn entries_of(kind: &str) -> (&'static str, &'static str) {
    match kind.ends_with("Policy") {
        true => ("ancestors", "ancestorRef"),
        false => ("parents", "parentRef"),
    }
}

fn entry(
    parent: &ParentStatus,
    reference: &str,
    generation: Option<i64>,
    ours: &[&Value],
    now: &str,
) -> Value {
    // References have text keys only: serialising cannot fail.
    let parent_ref = serde_json::to_value(&parent.parent_ref).unwrap_or_default();
    let before = ours.iter().find(|e| e[reference] == parent_ref);
    let empty = Vec::new();
    let before = before
        .and_then(|e| e["conditions"].as_array())
        .unwrap_or(&empty);
    let conditions = parent.conditions.iter().map(|condition| {
        let Condition {
            kind,
            status,
            reason,
            message,
        } = condition;
        let same = before
            .iter()
            .find(|c| c["type"] == *kind && c["status"] == *status);
        let since = same.map_or(json!(now), |c| c["lastTransitionTime"].clone());
        let message: String = message.chars().take(LONGEST_MESSAGE).collect();
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "observedGeneration": generation, "lastTransitionTime": since,
        })
    });
    let others = before
        .iter()
        .filter(|c| !OUR_TYPES.iter().any(|t| c["type"] == *t));
    let conditions: Vec<Value> = conditions.chain(others.cloned()).collect();
    json!({ reference: parent_ref, "controllerName": CONTROLLER, "conditions": conditions })
}

/// Types of conditions that say nothing when they are absent.
const OUR_TYPES: [&str; 4] = ["Accepted", "ResolvedRefs", "PartiallyInvalid", "Conflicted"];
const LONGEST_MESSAGE: usize = 8192;
const GATHERING: Duration = Duration::from_millis(100);
const AGAIN: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 8;

#[cfg(test)]
mod tests;
