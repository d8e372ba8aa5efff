//! Events on users' objects that something is wrong with.
//!
//! The leader tells of what everyone can see: objects that cannot be read, labels and annotations that mean
//! nothing, routes and policies that are not in force as written, NetworkPolicies that mean something else for pods of
//! the mesh ([`network`]). A failed enrolment is told of by the replica that the agent reports to. Everything is told
//! once, and again if it comes back.

mod network;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::watch;

use super::CONTROLLER;
use crate::hub::Hub;
use crate::providers::kubernetes::Shared;
use crate::providers::object::KINDS;
use crate::providers::{ObjectKey, Objects};

/// Tells of what is wrong, for as long as it is polled.
pub async fn run(
    client: Client,
    replica: String,
    hub: Arc<Hub>,
    shared: Arc<Shared>,
    leading: watch::Receiver<bool>,
) {
    let reporter = Reporter {
        controller: CONTROLLER.into(),
        instance: Some(replica),
    };
    let recorder = Recorder::new(client, reporter);
    let mut told = BTreeSet::new();
    let mut policies = network::Policies::default();
    let mut clock = tokio::time::interval(LOOK);
    loop {
        clock.tick().await;
        let mut found = failures(&hub);
        let leads = *leading.borrow();
        if leads {
            found.extend(mistakes(&hub, &shared));
            found.extend(policies.look(&hub, &shared).clone());
        }
        let named = if leads { policies.count() } else { 0 };
        hub.metrics().network_policies.set(named);
        told.retain(|complaint| found.contains_key(complaint));
        let new = found.into_iter().filter(|(c, _)| !told.contains(c));
        for (complaint, detail) in new.take(AT_ONCE).collect::<Vec<_>>() {
            let published = complaint.publish(&detail, &recorder, &hub, &shared).await;
            if let Err(error) = published {
                tracing::debug!("an Event cannot be written, the rest waits: {error}");
                break;
            }
            told.insert(complaint);
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Complaint {
    object: ObjectKey,
    reason: String,
    note: String,
}

/// What is wrong, and what is told beside, but is no reason to tell it again.
type Found = BTreeMap<Complaint, String>;

fn failures(hub: &Hub) -> Found {
    let failed = hub
        .failures()
        .into_iter()
        .map(|(namespace, name, _, why)| Complaint {
            object: ObjectKey {
                kind: "Pod".into(),
                namespace,
                name,
            },
            reason: "EnrolmentFailed".into(),
            note: format!("the pod cannot join the mesh: {why}"),
        });
    failed.map(|complaint| (complaint, String::new())).collect()
}

fn mistakes(hub: &Hub, shared: &Shared) -> Found {
    let model = hub.model();
    let unreadable = shared
        .mistakes()
        .into_iter()
        .map(|(object, mistake)| Complaint {
            object,
            reason: "CannotBeRead".into(),
            note: format!("{mistake}; the last good version stays in force"),
        });
    let warnings = model.warnings.iter().map(|warning| Complaint {
        object: warning.object.clone(),
        reason: "NotUsable".into(),
        note: warning.message.clone(),
    });
    let statuses = model.statuses.iter().flat_map(|status| {
        let bad = status.parents.iter().flat_map(|parent| {
            let conditions = parent.conditions.iter().filter(|c| !c.is_good());
            conditions.map(move |c| (parent, c))
        });
        bad.map(|(parent, condition)| Complaint {
            object: status.object(),
            reason: condition.reason.into(),
            note: format!("{}: {}", parent.parent_ref.name, condition.message),
        })
    });
    let all = unreadable.chain(warnings).chain(statuses);
    all.map(|complaint| (complaint, String::new())).collect()
}

impl Complaint {
    async fn publish(
        &self,
        detail: &str,
        recorder: &Recorder,
        hub: &Hub,
        shared: &Shared,
    ) -> Result<(), kube::Error> {
        let versions = KINDS.iter().find(|k| k.0 == self.object.kind);
        let versions = versions.map(|k| k.1).unwrap_or(network::VERSIONS);
        let uid = shared
            .uid(&self.object)
            .or_else(|| network::uid(shared, &self.object))
            .or_else(|| uid(&hub.objects(), &self.object));
        let reference = ObjectReference {
            api_version: versions.first().map(|v| (*v).into()),
            kind: Some(self.object.kind.clone()),
            namespace: Some(self.object.namespace.clone()).filter(|n| !n.is_empty()),
            name: Some(self.object.name.clone()),
            uid,
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: self.reason.clone(),
            note: Some(shortened(format!("{}{detail}", self.note))),
            action: "Configure".into(),
            secondary: None,
        };
        recorder.publish(&event, &reference).await
    }
}

/// As much as the API server takes.
fn shortened(mut note: String) -> String {
    let ends = (0..=LONGEST_NOTE.min(note.len())).rev();
    let end = ends.into_iter().find(|end| note.is_char_boundary(*end));
    note.truncate(end.unwrap_or(0));
    note
}

fn uid(objects: &Objects, key: &ObjectKey) -> Option<String> {
    let name = (key.namespace.clone(), key.name.clone());
    match &*key.kind {
        "Namespace" => objects.namespaces.get(&key.name)?.metadata.uid.clone(),
        "Node" => objects.nodes.get(&key.name)?.metadata.uid.clone(),
        "Pod" => objects.pods.get(&name)?.metadata.uid.clone(),
        "Service" => objects.services.get(&name)?.metadata.uid.clone(),
        "EndpointSlice" => objects.slices.get(&name)?.metadata.uid.clone(),
        _ => None,
    }
}

const LOOK: Duration = Duration::from_secs(1);
/// Events a second; what is left is told the next.
const AT_ONCE: usize = 10;
/// Bytes.
const LONGEST_NOTE: usize = 1024;
