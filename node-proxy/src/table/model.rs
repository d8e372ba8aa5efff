//! The writer's side of the table: what is held by name and version, and how a response changes what
//! readers see.
//!
//! Within a response upserts come before removals, and a workload is entered under its new addresses
//! before it leaves the old ones: an address that passes from one pod to another is at no moment
//! outside the mesh.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::client::delta::Update;
use mesh_api::identity::Identity;
use mesh_api::proto::Resource;
use mesh_api::proto::mesh;

use super::decode::{self, Interner, Slice};
use super::{Mesh, Service, View, Workload};
use routes::Rules;

mod routes;
mod services;

/// A type of resource that the table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Mesh-wide settings.
    MeshConfig,
    /// Meshed pods.
    Workload,
    /// Services.
    Service,
    /// Their endpoints.
    EndpointSlice,
    /// HTTPRoutes, GRPCRoutes, TLSRoutes and TCPRoutes.
    Route,
    /// XBackendTrafficPolicies.
    BackendTrafficPolicy,
    /// TrafficPolicies.
    TrafficPolicy,
}

impl Kind {
    /// In the order in which they are best applied.
    pub const ALL: [Kind; 7] = [
        Kind::MeshConfig,
        Kind::Workload,
        Kind::EndpointSlice,
        // Before the Services, which then come with them.
        Kind::TrafficPolicy,
        Kind::BackendTrafficPolicy,
        Kind::Route,
        Kind::Service,
    ];

    /// A controller that is older than the type does not answer requests for it, and a table kept by an older
    /// proxy does not hold it.
    pub const fn is_optional(self) -> bool {
        match self {
            Kind::MeshConfig | Kind::Workload | Kind::EndpointSlice | Kind::Service => false,
            Kind::Route | Kind::BackendTrafficPolicy | Kind::TrafficPolicy => true,
        }
    }

    /// The type's URL on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            Kind::MeshConfig => mesh::MeshConfig::TYPE_URL,
            Kind::Workload => mesh::Workload::TYPE_URL,
            Kind::Service => mesh::Service::TYPE_URL,
            Kind::EndpointSlice => mesh::EndpointSlice::TYPE_URL,
            Kind::Route => mesh::Route::TYPE_URL,
            Kind::BackendTrafficPolicy => mesh::BackendTrafficPolicy::TYPE_URL,
            Kind::TrafficPolicy => mesh::TrafficPolicy::TYPE_URL,
        }
    }

    /// Value of the metric label `type`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::MeshConfig => "mesh_config",
            Kind::Workload => "workload",
            Kind::Service => "service",
            Kind::EndpointSlice => "endpoint_slice",
            Kind::Route => "route",
            Kind::BackendTrafficPolicy => "backend_traffic_policy",
            Kind::TrafficPolicy => "traffic_policy",
        }
    }

    /// The type with this URL.
    pub fn of(type_url: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| k.type_url() == type_url)
    }
}

/// What became of a response.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Resources that are not valid.
    pub rejected: Vec<Rejected>,
}

/// A resource that is not valid.
#[derive(Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
    /// It is a workload that was not known before: its addresses are refused until it is put right.
    pub quarantined: bool,
}

/// What is held, by name.
#[derive(Default)]
pub(super) struct Model {
    mesh: Option<Held<Mesh>>,
    workloads: HashMap<Arc<str>, Held<Workload>>,
    services: HashMap<Arc<str>, Held<Service>>,
    slices: HashMap<Arc<str>, (Box<str>, Slice)>,
    slices_of: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    rules: Rules,
    /// Workloads that lost an address to a later one.
    contested: HashMap<IpAddr, Vec<Arc<str>>>,
    /// Workloads that came before the trust domain was known.
    early: BTreeMap<String, Update>,
    /// Types of which everything was held at some time.
    complete: HashSet<Kind>,
    /// Optional types are no longer waited for.
    settled: bool,
    interner: Interner,
}

struct Held<T> {
    /// Empty: what was sent is not in force, send it again.
    version: Box<str>,
    value: Arc<T>,
}

impl Model {
    pub(super) fn apply(
        &mut self,
        view: &View,
        type_url: &str,
        updates: &[Update],
        removed: &[String],
    ) -> Applied {
        let mut applied = Applied::default();
        let Some(kind) = Kind::of(type_url) else {
            applied.reject(
                type_url,
                "the type is not known to this proxy".into(),
                false,
            );
            return applied;
        };
        match kind {
            Kind::MeshConfig => self.apply_mesh(view, updates, &mut applied),
            Kind::Workload => self.apply_workloads(view, updates, removed, &mut applied),
            Kind::Service => self.apply_services(view, updates, removed, &mut applied),
            Kind::EndpointSlice => self.apply_slices(view, updates, removed, &mut applied),
            Kind::Route => self.apply_routes(updates, removed, &mut applied),
            Kind::BackendTrafficPolicy => {
                self.apply_backend_policies(updates, removed, &mut applied);
            }
            Kind::TrafficPolicy => self.apply_traffic_policies(updates, removed, &mut applied),
        }
        applied
    }

    /// Everything of a type is held. Returns whether that is news.
    pub(super) fn complete(&mut self, kind: Kind) -> bool {
        let news = self.complete.insert(kind);
        if news && kind == Kind::Service {
            self.refresh_targets();
        }
        news
    }

    /// Whether there is a trust domain and everything of every type was held.
    pub(super) fn is_complete(&self) -> bool {
        let held = |kind: &Kind| self.complete.contains(kind) || self.settled;
        self.is_complete_but_for_optional() && Kind::ALL.iter().all(held)
    }

    /// The same, of the types that every controller knows.
    pub(super) fn is_complete_but_for_optional(&self) -> bool {
        let held = |kind: &Kind| self.complete.contains(kind) || kind.is_optional();
        self.mesh.is_some() && Kind::ALL.iter().all(held)
    }

    /// Waits for optional types no longer.
    pub(super) fn settle(&mut self) {
        self.settled = true;
    }

    pub(super) fn known(&self, type_url: &str) -> HashMap<String, String> {
        fn versions<'a>(held: impl Iterator<Item = (&'a str, &'a str)>) -> HashMap<String, String> {
            held.filter(|(_, version)| !version.is_empty())
                .map(|(name, version)| (name.to_owned(), version.to_owned()))
                .collect()
        }
        fn versioned<T>(all: &HashMap<Arc<str>, (Box<str>, T)>) -> HashMap<String, String> {
            versions(all.iter().map(|(name, (version, _))| (&**name, &**version)))
        }
        fn held<T>(all: &HashMap<Arc<str>, Held<T>>) -> HashMap<String, String> {
            versions(all.iter().map(|(name, held)| (&**name, &*held.version)))
        }
        let Some(kind) = Kind::of(type_url) else {
            return HashMap::new();
        };
        match kind {
            Kind::MeshConfig => versions(self.mesh.iter().map(|h| (MESH, &*h.version))),
            Kind::Workload => held(&self.workloads),
            Kind::Service => held(&self.services),
            Kind::EndpointSlice => versioned(&self.slices),
            Kind::Route => versioned(&self.rules.routes),
            Kind::BackendTrafficPolicy => versioned(&self.rules.backend_policies),
            Kind::TrafficPolicy => versioned(&self.rules.traffic_policies),
        }
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::MeshConfig => usize::from(self.mesh.is_some()),
            Kind::Workload => self.workloads.len(),
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::Route => self.rules.routes.len(),
            Kind::BackendTrafficPolicy => self.rules.backend_policies.len(),
            Kind::TrafficPolicy => self.rules.traffic_policies.len(),
        }
    }

    /// How many Service ports are held for what points to them.
    #[cfg(test)]
    pub(super) fn places(&self) -> usize {
        self.rules.places()
    }

    pub(super) fn workloads(&self) -> impl Iterator<Item = Arc<Workload>> {
        self.workloads.values().map(|h| Arc::clone(&h.value))
    }

    pub(super) fn services(&self) -> impl Iterator<Item = Arc<Service>> {
        self.services.values().map(|h| Arc::clone(&h.value))
    }

    /// The settings are never taken away: a removal leaves the last good ones.
    fn apply_mesh(&mut self, view: &View, updates: &[Update], applied: &mut Applied) {
        for update in updates {
            let mesh = match decode::mesh(&update.name, &update.value) {
                Ok(mesh) => Arc::new(mesh),
                Err(reason) => {
                    applied.reject(&update.name, reason, false);
                    continue;
                }
            };
            let moved = self
                .mesh
                .as_ref()
                .is_some_and(|held| held.value.trust_domain != mesh.trust_domain);
            if moved {
                self.rename_identities(view, &mesh.trust_domain);
            }
            view.mesh.store(Arc::clone(&mesh));
            self.mesh = Some(Held {
                version: update.version.as_str().into(),
                value: mesh,
            });
            self.refresh_targets();
            let early: Vec<_> = std::mem::take(&mut self.early).into_values().collect();
            self.apply_workloads(view, &early, &[], applied);
        }
    }

    fn apply_workloads(
        &mut self,
        view: &View,
        updates: &[Update],
        removed: &[String],
        applied: &mut Applied,
    ) {
        let Some(mesh) = self.mesh.as_ref().map(|held| Arc::clone(&held.value)) else {
            self.early
                .extend(updates.iter().map(|u| (u.name.clone(), u.clone())));
            for name in removed {
                self.early.remove(name);
            }
            return;
        };
        for update in updates {
            let (name, value) = (&update.name, &update.value);
            match decode::workload(name, value, &mesh.trust_domain, &mut self.interner) {
                Ok(workload) => self.put_workload(view, &update.version, workload),
                Err(reason) => {
                    let known = self.workloads.contains_key(name.as_str());
                    let stand_in =
                        decode::quarantined(name, value, &mesh.trust_domain).filter(|_| !known);
                    applied.reject(name, reason, stand_in.is_some());
                    if let Some(stand_in) = stand_in {
                        self.put_workload(view, "", stand_in);
                    }
                }
            }
        }
        for name in removed {
            if let Some((uid, held)) = self.workloads.remove_entry(name.as_str()) {
                for address in &held.value.addresses {
                    self.release(view, *address, &uid);
                }
            }
        }
        if self.interner.identities() > 2 * self.workloads.len() + 256 {
            self.interner
                .keep_identities(self.workloads.values().map(|h| &h.value.identity));
        }
    }

    fn put_workload(&mut self, view: &View, version: &str, workload: Workload) {
        let workload = Arc::new(workload);
        let uid = Arc::clone(&workload.uid);
        for address in &workload.addresses {
            let before = view.workloads.insert(*address, Arc::clone(&workload));
            if let Some(losers) = self.contested.get_mut(address) {
                losers.retain(|loser| *loser != uid);
            }
            if let Some(before) = before.filter(|b| b.uid != uid) {
                let losers = self.contested.entry(*address).or_default();
                losers.push(Arc::clone(&before.uid));
            }
        }
        let held = Held {
            version: version.into(),
            value: Arc::clone(&workload),
        };
        if let Some(old) = self.workloads.insert(Arc::clone(&uid), held) {
            for address in &old.value.addresses {
                if !workload.addresses.contains(address) {
                    self.release(view, *address, &uid);
                }
            }
        }
    }

    /// A workload no longer has an address: it goes back to whom it was taken from, if anyone.
    fn release(&mut self, view: &View, address: IpAddr, uid: &str) {
        let mut heir = None;
        if let Some(losers) = self.contested.get_mut(&address) {
            losers.retain(|loser| **loser != *uid);
            heir = losers.last().and_then(|loser| self.workloads.get(loser));
        }
        let owned = view.workloads.get(&address).is_some_and(|w| *w.uid == *uid);
        if owned {
            match heir {
                Some(heir) => {
                    view.workloads.insert(address, Arc::clone(&heir.value));
                    if let Some(losers) = self.contested.get_mut(&address) {
                        losers.pop();
                    }
                }
                None => {
                    view.workloads.remove(&address);
                }
            }
        }
        if self.contested.get(&address).is_some_and(Vec::is_empty) {
            self.contested.remove(&address);
        }
    }

    /// The trust domain of the mesh has changed.
    fn rename_identities(&mut self, view: &View, trust_domain: &str) {
        for held in self.workloads.values_mut() {
            let old = &held.value.identity;
            // Checked when the parts and the trust domain were taken.
            if let Ok(identity) =
                Identity::new(trust_domain, old.namespace(), old.service_account())
            {
                held.value = Arc::new(Workload {
                    identity,
                    ..(*held.value).clone()
                });
            }
        }
        for mut entry in view.workloads.iter_mut() {
            if let Some(held) = self.workloads.get(&entry.uid) {
                *entry.value_mut() = Arc::clone(&held.value);
            }
        }
    }
}

impl Applied {
    fn reject(&mut self, name: &str, reason: String, quarantined: bool) {
        self.rejected.push(Rejected {
            name: name.into(),
            reason,
            quarantined,
        });
    }

    /// The text of the rejection, or that there is none. Bounded, whatever was sent.
    pub fn result(&self) -> Result<(), String> {
        if self.rejected.is_empty() {
            return Ok(());
        }
        let mut text: Vec<String> = self
            .rejected
            .iter()
            .take(REPORTED)
            .map(|r| format!("{}: {}", r.name, r.reason))
            .collect();
        if self.rejected.len() > REPORTED {
            text.push(format!("and {} more", self.rejected.len() - REPORTED));
        }
        Err(text.join("; "))
    }
}

const MESH: &str = "mesh";
/// Rejected resources named in one answer to the controller.
const REPORTED: usize = 20;
