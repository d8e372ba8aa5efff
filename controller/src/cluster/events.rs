//! Events on users' objects that something is wrong with.
//!
//! The leader tells of what everyone can see: objects that cannot be read, labels and annotations that mean
//! nothing, routes and policies that are not in force as written. A failed enrolment is told of by the replica
//! that the agent reports to. Everything is told once, and again if it comes back.

use std::collections::BTreeSet;
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
    let mut clock = tokio::time::interval(LOOK);
    loop {
        clock.tick().await;
        let mut found = failures(&hub);
        if *leading.borrow() {
            found.extend(mistakes(&hub, &shared));
        }
        told.retain(|complaint| found.contains(complaint));
        let new: Vec<Complaint> = found.difference(&told).cloned().collect();
        for complaint in new.into_iter().take(AT_ONCE) {
            if let Err(error) = complaint.publish(&recorder, &hub, &shared).await {
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

fn failures(hub: &Hub) -> BTreeSet<Complaint> {
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
    failed.collect()
}

fn mistakes(hub: &Hub, shared: &Shared) -> BTreeSet<Complaint> {
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
    all.collect()
}

impl Complaint {
    async fn publish(
        &self,
        recorder: &Recorder,
        hub: &Hub,
        shared: &Shared,
    ) -> Result<(), kube::Error> {
        let versions = KINDS.iter().find(|k| k.0 == self.object.kind);
        let uid = shared
            .uid(&self.object)
            .or_else(|| uid(&hub.objects(), &self.object));
        let reference = ObjectReference {
            api_version: versions.and_then(|k| k.1.first()).map(|v| (*v).into()),
            kind: Some(self.object.kind.clone()),
            namespace: Some(self.object.namespace.clone()).filter(|n| !n.is_empty()),
            name: Some(self.object.name.clone()),
            uid,
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: self.reason.clone(),
            note: Some(self.note.chars().take(LONGEST_NOTE).collect()),
            action: "Configure".into(),
            secondary: None,
        };
        recorder.publish(&event, &reference).await
    }
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
/// The API server takes up to a kilobyte.
const LONGEST_NOTE: usize = 240;
