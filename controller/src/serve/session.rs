//! What one node has been told, and what it must be told next: delta xDS without the transport.
//!
//! Rules of the incremental variant (xDS transport protocol, "Incremental xDS"): a client subscribes to names or
//! to `*`; it is sent what differs from what it holds; each response carries a nonce and is accepted
//! or rejected by it. Warren's own: of each type one response is in flight, and the next is made from the
//! newest snapshot when its answer is here. So a slow client skips states and never builds a queue.
//!
//! Cheap by design, since every change is looked at for every node: of the large tables only what changed since
//! the stream looked last is compared; what the client holds of a whole table is one reference to it; and a first
//! table is finished as it was begun, whatever changes meanwhile.
//!
//! Invariant: `sent` is what the client holds, or will hold once it has read what is in flight. A rejected
//! resource is not repeated until it changes.

mod sent;
mod view;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use mesh_api::identity::NodeRole;
use mesh_api::proto::Resource as _;
use mesh_api::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_api::proto::mesh;

use self::sent::Sent;
use self::view::{Compared, View};
use crate::enrolment::Progress;
use crate::resources::{Resource as Encoded, Snapshot};

/// The types of resources, in the order they are sent: parents before children.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    MeshConfig,
    NodePod,
    Workload,
    Service,
    EndpointSlice,
    Route,
    BackendTrafficPolicy,
    TrafficPolicy,
}

impl Kind {
    const ALL: [Kind; 8] = [
        Kind::MeshConfig,
        Kind::NodePod,
        Kind::Workload,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Route,
        Kind::BackendTrafficPolicy,
        Kind::TrafficPolicy,
    ];

    pub(crate) fn type_url(self) -> &'static str {
        match self {
            Kind::MeshConfig => mesh::MeshConfig::TYPE_URL,
            Kind::NodePod => mesh::NodePod::TYPE_URL,
            Kind::Workload => mesh::Workload::TYPE_URL,
            Kind::Service => mesh::Service::TYPE_URL,
            Kind::EndpointSlice => mesh::EndpointSlice::TYPE_URL,
            Kind::Route => mesh::Route::TYPE_URL,
            Kind::BackendTrafficPolicy => mesh::BackendTrafficPolicy::TYPE_URL,
            Kind::TrafficPolicy => mesh::TrafficPolicy::TYPE_URL,
        }
    }

    /// The type URL's last part: label of metrics.
    pub(crate) fn name(self) -> &'static str {
        let url = self.type_url();
        url.rsplit_once('.').map_or(url, |(_, name)| name)
    }

    fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.type_url() == url)
    }

    fn is_for(self, role: NodeRole) -> bool {
        match self {
            Kind::MeshConfig => true,
            Kind::NodePod => role == NodeRole::Agent,
            Kind::Workload
            | Kind::Service
            | Kind::EndpointSlice
            | Kind::Route
            | Kind::BackendTrafficPolicy
            | Kind::TrafficPolicy => role == NodeRole::Proxy,
        }
    }

    /// What `*` means depends on the Services this stream has been sent.
    fn follows_services(self, snapshot: &Snapshot) -> bool {
        match self {
            Kind::EndpointSlice => true,
            Kind::Route | Kind::BackendTrafficPolicy | Kind::TrafficPolicy => {
                !snapshot.services_complete
            }
            Kind::MeshConfig | Kind::NodePod | Kind::Workload | Kind::Service => false,
        }
    }
}

/// Why a stream must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("resources of type {kind} are not for the {role} of a node")]
    Role { kind: &'static str, role: NodeRole },
    #[error("more than {MAX_NAMES} names are subscribed to")]
    TooManyNames,
}

/// What a request said about an earlier response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Ack(Kind),
    Nack {
        kind: Kind,
        message: String,
        names: Vec<Arc<str>>,
    },
}

/// One stream's subscriptions.
#[derive(Debug)]
pub(crate) struct Session {
    node: String,
    role: NodeRole,
    nonce: u64,
    subscriptions: BTreeMap<Kind, Subscription>,
    /// Nothing that may be large is to be sent now.
    held_back: bool,
}

#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    /// Names asked for one by one; of Services also `address/<ip>`.
    names: BTreeSet<String>,
    /// What each of those was last answered with: a resource's name, or that there is none.
    answered: HashMap<String, Option<Arc<str>>>,
    sent: Sent,
    /// Counts how often a name was added to `sent`, or removed from it.
    changed_names: u64,
    /// A first table that is not all sent: whose it is, and the last name that was.
    first: Option<(Arc<Snapshot>, Arc<str>)>,
    /// The first request of a type is answered even if the client holds everything: it learns so.
    owed: bool,
    in_flight: Option<InFlight>,
    /// The snapshot that was last compared, unless the subscription changed since.
    compared: Option<Compared>,
    handed: u64,
    acked: u64,
    rejected: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<Arc<str>>,
    /// The snapshot the client holds once it has accepted, if the response says everything.
    completes: Option<u64>,
}

impl Session {
    pub(crate) fn new(node: &str, role: NodeRole) -> Self {
        Self {
            node: node.into(),
            role,
            nonce: 0,
            subscriptions: BTreeMap::new(),
            held_back: false,
        }
    }

    /// Takes a request. Types this controller does not know are ignored: the client may be newer.
    pub(crate) fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
    ) -> Result<Option<Answer>, Violation> {
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            tracing::debug!(
                node = self.node,
                r#type = request.type_url,
                "type is not known"
            );
            return Ok(None);
        };
        if !kind.is_for(self.role) {
            let (kind, role) = (kind.name(), self.role);
            return Err(Violation::Role { kind, role });
        }
        let first = !self.subscriptions.contains_key(&kind);
        let subscription = self.subscriptions.entry(kind).or_default();
        if first {
            // A first request without names asks for everything (same document, "wildcard").
            subscription.wildcard = request.resource_names_subscribe.is_empty();
            subscription.owed = true;
            let held = request.initial_resource_versions;
            subscription.sent = held.into_iter().collect();
        }
        subscription.subscribe(request.resource_names_subscribe)?;
        subscription.unsubscribe(&request.resource_names_unsubscribe);
        let error = request.error_detail.map(|status| status.message);
        Ok(subscription.answer(kind, &request.response_nonce, error))
    }

    /// What to send now.
    pub(crate) fn responses(
        &mut self,
        snapshot: &Arc<Snapshot>,
    ) -> Vec<(Kind, DeltaDiscoveryResponse)> {
        let mut responses = Vec::new();
        for kind in Kind::ALL {
            // Some follow the Services this stream has been sent: before those are compared, no slice
            // would be wanted, and the ones the client holds would be removed.
            let services_pending = || {
                self.subscriptions
                    .get(&Kind::Service)
                    .is_none_or(|s| s.owed)
            };
            let follows_services = kind.follows_services(snapshot);
            if follows_services && services_pending() {
                continue;
            }
            if self.held_back && !matches!(kind, Kind::MeshConfig | Kind::NodePod) {
                continue;
            }
            let Some(mut subscription) = self.subscriptions.remove(&kind) else {
                continue;
            };
            let view = View {
                snapshot,
                node: &self.node,
                kind,
                services: follows_services
                    .then(|| self.subscriptions.get(&Kind::Service))
                    .flatten(),
            };
            if let Some(mut response) = subscription.next(&view) {
                self.nonce += 1;
                response.nonce = self.nonce.to_string();
                if let Some(in_flight) = &mut subscription.in_flight {
                    in_flight.nonce.clone_from(&response.nonce);
                }
                responses.push((kind, response));
            }
            self.subscriptions.insert(kind, subscription);
        }
        responses
    }

    /// Whether the first tables are on their way: asked for and not acknowledged as a whole.
    pub(crate) fn has_first_tables_to_send(&self) -> bool {
        let large = [Kind::Workload, Kind::Service];
        let mut large = large.iter().filter_map(|kind| self.subscriptions.get(kind));
        large.any(|s| s.first.is_some() || s.acked == 0)
    }

    /// Sends nothing that may be large until it is called with false.
    pub(crate) fn hold_back(&mut self, hold: bool) {
        self.held_back = hold;
    }

    /// How far the client is.
    pub(crate) fn progress(&self) -> Progress {
        let table = self.subscriptions.get(match self.role {
            NodeRole::Proxy => &Kind::Workload,
            NodeRole::Agent => &Kind::NodePod,
        });
        let mesh = self.subscriptions.get(&Kind::MeshConfig);
        Progress {
            handed: self.subscriptions.values().map(|s| s.handed).min(),
            acked: table.map_or(0, |s| s.acked),
            mesh_acked: mesh.map(|s| s.acked),
            rejected: table.map(|s| s.rejected.clone()).unwrap_or_default(),
            waiting: table.is_some_and(|s| s.in_flight.is_some()),
        }
    }
}

impl Subscription {
    fn subscribe(&mut self, names: Vec<String>) -> Result<(), Violation> {
        for name in names {
            self.compared = None;
            self.break_off_first();
            if name == "*" {
                self.wildcard = true;
                continue;
            }
            // Asked again: answered again.
            self.answered.remove(&name);
            self.names.insert(name);
            if self.names.len() > MAX_NAMES {
                return Err(Violation::TooManyNames);
            }
        }
        Ok(())
    }

    /// The client drops what it has unsubscribed from by itself.
    fn unsubscribe(&mut self, names: &[String]) {
        if names.is_empty() {
            return;
        }
        self.compared = None;
        self.break_off_first();
        for name in names {
            self.answered.remove(name);
            self.names.remove(name);
        }
        self.wildcard &= !names.iter().any(|n| n == "*");
        if !self.wildcard {
            let kept: BTreeSet<_> = self.answered.values().flatten().cloned().collect();
            self.sent.retain(|name| kept.contains(name));
            self.changed_names += 1;
        }
    }

    fn answer(&mut self, kind: Kind, nonce: &str, error: Option<String>) -> Option<Answer> {
        // An empty nonce starts a subscription; a strange one is about an earlier stream.
        let in_flight = self
            .in_flight
            .take_if(|f| !nonce.is_empty() && f.nonce == nonce)?;
        if let Some(seq) = in_flight.completes {
            self.acked = seq;
        }
        match error {
            None => {
                for name in &in_flight.names {
                    self.rejected.remove(name);
                }
                Some(Answer::Ack(kind))
            }
            // Which of them is not said: none counts as known.
            Some(message) => {
                self.rejected.extend(in_flight.names.iter().cloned());
                let names = in_flight.names;
                Some(Answer::Nack {
                    kind,
                    message,
                    names,
                })
            }
        }
    }

    fn next(&mut self, view: &View<'_>) -> Option<DeltaDiscoveryResponse> {
        if self.in_flight.is_some() {
            return None;
        }
        let seq = view.snapshot.seq;
        if let Some((snapshot, after)) = self.first.take() {
            return Some(self.part_of_first(&view.of(&snapshot), Some(after)));
        }
        if !self.owed && self.compared.as_ref().is_some_and(|old| view.same_as(old)) {
            self.compared = Some(view.compared());
            (self.handed, self.acked) = (seq, seq);
            return None;
        }
        if view.kind == Kind::Workload && self.is_for_all() && self.sent.is_empty() {
            return Some(self.part_of_first(view, None));
        }
        let changed = (self.compared.as_ref())
            .filter(|_| self.is_for_all())
            .and_then(|old| view.changed_since(old));
        let (wanted, mut removed) = match &changed {
            Some(names) => self.changes(view, names),
            None => self.everything(view),
        };
        let mut renewed: HashMap<Arc<str>, Vec<String>> = HashMap::new();
        for name in &self.names {
            let resolved = view.resolve(name).filter(|r| wanted.contains_key(r));
            if self.answered.get(name) != Some(&resolved) {
                match &resolved {
                    None => {
                        removed.insert(name.clone());
                    }
                    Some(resource) => renewed
                        .entry(resource.clone())
                        .or_default()
                        .push(name.clone()),
                }
                self.answered.insert(name.clone(), resolved);
            }
        }
        let (mut resources, mut sent) = (Vec::new(), Vec::new());
        let (mut names, mut size, mut complete) = (Vec::new(), 0, true);
        for (name, resource) in &wanted {
            let known = self.sent.version(name);
            if known == Some(&resource.version) && !renewed.contains_key(name) {
                continue;
            }
            if size > 0 && size + resource.body.len() > MAX_BYTES {
                complete = false;
                // What was asked for and does not fit must not count as answered.
                for asked in renewed.get(name).into_iter().flatten() {
                    self.answered.remove(asked);
                }
                continue;
            }
            size += resource.body.len() + name.len();
            names.push(name.clone());
            let mut aliases = self.aliases(name);
            aliases.retain(|alias| **alias != **name);
            resources.push(encoded(view.kind, name, resource, aliases));
            sent.push((name, &resource.version));
        }
        for name in &removed {
            self.rejected.remove(name.as_str());
        }
        if complete && view.kind == Kind::Workload && self.is_for_all() {
            self.sent = Sent::All(view.now());
        } else {
            self.changed_names += self.sent.update(sent, &removed);
        }
        if complete {
            self.compared = Some(view.compared());
            self.handed = seq;
        }
        if resources.is_empty() && removed.is_empty() && !self.owed {
            self.acked = seq;
            return None;
        }
        self.owed = false;
        names.extend(removed.iter().map(|n| Arc::from(n.as_str())));
        self.in_flight = Some(InFlight {
            nonce: String::new(),
            names,
            completes: complete.then_some(seq),
        });
        let removed = removed.into_iter().collect();
        Some(response(view, resources, removed, complete))
    }

    /// Whether `*` is all that is asked for.
    fn is_for_all(&self) -> bool {
        self.wildcard && self.names.is_empty()
    }

    /// The next part of a table that the client holds nothing of.
    fn part_of_first(
        &mut self,
        view: &View<'_>,
        after: Option<Arc<str>>,
    ) -> DeltaDiscoveryResponse {
        let table = view.now();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut resources, mut names, mut size) = (Vec::new(), Vec::new(), 0);
        let mut rest = table
            .range::<Arc<str>, _>((from, Bound::Unbounded))
            .peekable();
        while let Some((name, resource)) =
            rest.next_if(|(_, r)| size == 0 || size + r.body.len() <= MAX_BYTES)
        {
            size += resource.body.len() + name.len();
            resources.push(encoded(view.kind, name, resource, Vec::new()));
            names.push(name.clone());
        }
        let complete = rest.peek().is_none();
        if complete {
            self.sent = Sent::All(table.clone());
            self.compared = Some(view.compared());
            self.handed = view.snapshot.seq;
        } else if let Some(last) = names.last() {
            self.first = Some((view.snapshot.clone(), last.clone()));
        }
        self.owed = false;
        self.in_flight = Some(InFlight {
            nonce: String::new(),
            names,
            completes: complete.then_some(view.snapshot.seq),
        });
        response(view, resources, Vec::new(), complete)
    }

    /// What is asked for is another: the rest of a first table is compared like any other.
    fn break_off_first(&mut self) {
        if let Some((snapshot, last)) = self.first.take() {
            let parts = snapshot.workloads.range::<Arc<str>, _>(..=last);
            self.sent = parts
                .map(|(name, resource)| (name.clone(), resource.version.clone()))
                .collect();
        }
    }

    /// What the client should hold of these names, and what of them it holds and should not.
    fn changes(&self, view: &View<'_>, names: &BTreeSet<Arc<str>>) -> (Wanted, BTreeSet<String>) {
        let table = view.now();
        let (mut wanted, mut removed) = (Wanted::new(), BTreeSet::new());
        for name in names {
            match table.get(name).filter(|_| view.in_wildcard(name)) {
                Some(resource) => drop(wanted.insert(name.clone(), resource.clone())),
                None if self.sent.version(name).is_some() => {
                    removed.insert(name.to_string());
                }
                None => {}
            }
        }
        (wanted, removed)
    }

    /// The same of all there is.
    fn everything(&self, view: &View<'_>) -> (Wanted, BTreeSet<String>) {
        let wanted = view.wanted(self);
        let held = self.sent.names();
        let removed = held.filter(|name| !wanted.contains_key(*name));
        let removed = removed.map(|name| name.to_string()).collect();
        (wanted, removed)
    }

    /// The names under which a resource was asked for.
    fn aliases(&self, name: &Arc<str>) -> Vec<String> {
        let answered = self.answered.iter();
        let mut aliases: Vec<String> = answered
            .filter(|(_, resource)| resource.as_ref() == Some(name))
            .map(|(asked, _)| asked.clone())
            .collect();
        aliases.sort();
        aliases
    }
}

/// Resources by name.
type Wanted = BTreeMap<Arc<str>, Arc<Encoded>>;

fn encoded(kind: Kind, name: &Arc<str>, resource: &Encoded, aliases: Vec<String>) -> Resource {
    Resource {
        version: resource.version.to_string(),
        resource: Some(prost_types::Any {
            type_url: kind.type_url().into(),
            value: resource.body.to_vec(),
        }),
        name: name.to_string(),
        aliases,
    }
}

fn response(
    view: &View<'_>,
    resources: Vec<Resource>,
    removed_resources: Vec<String>,
    complete: bool,
) -> DeltaDiscoveryResponse {
    let seq = view.snapshot.seq;
    DeltaDiscoveryResponse {
        // A receiver must not take a part of the first table for all of it.
        system_version_info: if complete {
            seq.to_string()
        } else {
            format!("{seq}{}", mesh_api::client::delta::MORE)
        },
        resources,
        type_url: view.kind.type_url().into(),
        nonce: String::new(),
        removed_resources,
    }
}

/// Names one stream may ask for one by one, per type.
const MAX_NAMES: usize = 50_000;
/// What one response holds at most, unless a single resource is larger. The transport keeps a buffer of this size for
/// each stream as long as it lives, at both ends.
const MAX_BYTES: usize = 128 * 1024;

#[cfg(test)]
mod tests;
