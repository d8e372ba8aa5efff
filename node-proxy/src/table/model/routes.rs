//! Routes and policies joined to the Services they are attached to.
//!
//! When one of them changes, or a Service comes or changes, the rules of exactly the Service ports
//! concerned are built anew. What comes first does not matter: a route waits for its Service, and a
//! backend's place is filled when its Service comes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_api::client::delta::Update;
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::PolicyTargetKind;
use prost::Message;

use super::{Applied, Kind, Model};
use crate::http::policy;
use crate::http::route::{self, PortRules, PortSelector, Route, RouteKind, RouteSet, Session};
use crate::table::{ServicePort, Target, decode};

/// Routes and policies, and what they point to.
#[derive(Default)]
pub(super) struct Rules {
    pub(super) routes: Versioned<Route>,
    pub(super) backend_policies: Versioned<BackendPolicy>,
    pub(super) traffic_policies: Versioned<mesh::TrafficPolicy>,
    /// Service -> routes.
    routes_of: Index,
    /// Service -> BackendTrafficPolicies.
    backend_policies_of: Index,
    /// [`target_key`] -> TrafficPolicies.
    traffic_policies_of: Index,
    /// Service -> ports that backends name.
    targets: HashMap<Arc<str>, Targets>,
}

pub(super) type Versioned<T> = HashMap<Arc<str>, (Box<str>, T)>;

pub(super) struct BackendPolicy {
    wire: mesh::BackendTrafficPolicy,
    session: Option<Arc<Session>>,
}

#[derive(Default)]
struct Targets {
    ports: HashMap<u16, Arc<Target>>,
    /// The controller said that there is no such Service.
    absent: bool,
}

/// Service ports whose rules are to be built anew, by Service.
type Touched = BTreeMap<Arc<str>, Vec<PortSelector>>;

impl Model {
    pub(super) fn apply_routes(
        &mut self,
        updates: &[Update],
        removed: &[String],
        applied: &mut Applied,
    ) {
        let mut touched = Touched::new();
        for update in updates {
            let targets = &mut self.rules.targets;
            let compiled = mesh::Route::decode(&update.value[..])
                .map_err(|e| e.to_string())
                .and_then(|wire| {
                    Route::compile(&update.name, wire, &mut |service, port| {
                        target(targets, service, port)
                    })
                });
            match compiled {
                Ok(route) => self.rules.put_route(update, route, &mut touched),
                Err(reason) => applied.reject(&update.name, reason, false),
            }
        }
        for name in removed {
            self.rules.remove_route(name, &mut touched);
        }
        self.refresh_targets();
        self.rebuild(&touched);
        self.rules.prune_targets();
    }

    pub(super) fn apply_backend_policies(
        &mut self,
        updates: &[Update],
        removed: &[String],
        applied: &mut Applied,
    ) {
        let mut touched = Touched::new();
        for update in updates {
            match decode::backend_policy(&update.name, &update.value) {
                Ok((wire, session)) => {
                    self.rules.remove_backend_policy(&update.name, &mut touched);
                    let policy = BackendPolicy { wire, session };
                    self.rules.put_backend_policy(update, policy, &mut touched);
                }
                Err(reason) => applied.reject(&update.name, reason, false),
            }
        }
        for name in removed {
            self.rules.remove_backend_policy(name, &mut touched);
        }
        self.rebuild(&touched);
    }

    pub(super) fn apply_traffic_policies(
        &mut self,
        updates: &[Update],
        removed: &[String],
        applied: &mut Applied,
    ) {
        let mut touched = Touched::new();
        for update in updates {
            match decode::traffic_policy(&update.name, &update.value) {
                Ok(wire) => {
                    self.rules.remove_traffic_policy(&update.name, &mut touched);
                    self.rules.put_traffic_policy(update, wire, &mut touched);
                }
                Err(reason) => applied.reject(&update.name, reason, false),
            }
        }
        for name in removed {
            self.rules.remove_traffic_policy(name, &mut touched);
        }
        self.rebuild(&touched);
    }

    fn rebuild(&self, touched: &Touched) {
        for (name, selectors) in touched {
            let Some(service) = self.services.get(name) else {
                continue;
            };
            for port in &service.value.ports {
                if selectors.iter().any(|s| s.selects(port.port, &port.name)) {
                    self.rules.build(name, port);
                }
            }
        }
    }

    /// Fills the places of backends as the Services are now. A place is emptied when its Service goes, so that routes
    /// of Services that point to each other keep nothing alive.
    pub(super) fn refresh_targets(&mut self) {
        let names: Vec<_> = self.rules.targets.keys().cloned().collect();
        for name in names {
            self.refresh_target(&name, None);
        }
    }

    /// The same for one Service. `absent`: the controller has just said whether it exists.
    pub(super) fn refresh_target(&mut self, name: &str, absent: Option<bool>) {
        let all_held = self.all_services_held();
        let service = self.services.get(name).map(|held| &*held.value);
        let Some(targets) = self.rules.targets.get_mut(name) else {
            return;
        };
        targets.absent = absent.unwrap_or(targets.absent);
        let absent = all_held || targets.absent || service.is_some();
        for (number, target) in &targets.ports {
            let known = service.and_then(|s| s.ports.iter().find(|p| p.port == *number));
            target.set(known.cloned(), absent);
        }
    }

    /// Whether a Service that is not held does not exist.
    fn all_services_held(&self) -> bool {
        let settings = self.mesh.as_ref();
        settings.is_some_and(|held| held.value.services_complete)
            && self.complete.contains(&Kind::Service)
    }

    /// Services to be asked for by name: the backends of routes that are attached to Services held here.
    pub(in crate::table) fn named_services(&self) -> BTreeSet<String> {
        let settings = self.mesh.as_ref();
        if settings.is_none_or(|held| held.value.services_complete) {
            return BTreeSet::new();
        }
        let attached = self.rules.routes_of.0.iter();
        attached
            .filter(|(service, _)| self.services.contains_key(*service))
            .flat_map(|(_, routes)| routes)
            .filter_map(|route| self.rules.routes.get(route))
            .flat_map(|(_, route)| route.backends())
            .collect()
    }
}

impl Rules {
    /// Builds the rules of a port and puts them in place. `service` is `namespace/name`.
    pub(super) fn build(&self, service: &str, port: &ServicePort) {
        let (namespace, _) = &port.service;
        let routes: Vec<&Route> = self
            .routes_of
            .get(service)
            .filter_map(|name| self.routes.get(name).map(|(_, route)| route))
            .filter(|route| route.is_attached(service, port.port, &port.name))
            .collect();
        let of_service = self.traffic_policy(PolicyTargetKind::Service, service, &[&port.name, ""]);
        let of_service = of_service.as_ref();
        let backend = self.backend_policy(service);
        let backend_wire = backend.map(|policy| &policy.wire);
        let build = |group: &[&Route]| -> Option<Arc<RouteSet>> {
            let set = route::build(group, |route, rule| {
                let kind = match route.kind {
                    RouteKind::Http => PolicyTargetKind::HttpRoute,
                    RouteKind::Grpc => PolicyTargetKind::GrpcRoute,
                    RouteKind::Tls | RouteKind::Tcp => PolicyTargetKind::Unspecified,
                };
                let own = self.traffic_policy(kind, &route.name, &[rule.name(), ""]);
                let wire = Some(&rule.wire);
                Arc::new(policy::effective(
                    of_service,
                    backend_wire,
                    wire,
                    own.as_ref(),
                ))
            });
            set.map(Arc::new)
        };
        let (own, others): (Vec<&Route>, Vec<&Route>) = routes
            .iter()
            .copied()
            .partition(|route| route.namespace == *namespace);
        let mut by_namespace: HashMap<Arc<str>, Vec<&Route>> = HashMap::new();
        for route in others {
            by_namespace
                .entry(Arc::clone(&route.namespace))
                .or_default()
                .push(route);
        }
        let consumer = by_namespace
            .into_iter()
            .filter_map(|(namespace, group)| Some((namespace, build(&group)?)));
        port.http.store(Arc::new(PortRules {
            producer: build(&own),
            consumer: consumer.collect(),
            policy: Arc::new(policy::effective(of_service, backend_wire, None, None)),
            session: backend.and_then(|policy| policy.session.clone()),
            attached: !routes.is_empty() || of_service.is_some() || backend.is_some(),
        }));
    }

    /// The policies for a target as one. Those for the first of `sections` come first, of several for one the oldest,
    /// then the first by name.
    fn traffic_policy(
        &self,
        kind: PolicyTargetKind,
        name: &str,
        sections: &[&str],
    ) -> Option<mesh::TrafficPolicy> {
        let key = target_key(kind, name);
        let of_target = self.traffic_policies_of.get(&key);
        let ranked = of_target.filter_map(|policy| {
            let (_, policy) = self.traffic_policies.get(policy)?;
            let rank = policy
                .targets
                .iter()
                .filter(|t| t.kind() == kind && *name == format!("{}/{}", policy.namespace, t.name))
                .filter_map(|t| sections.iter().position(|s| *s == t.section_name))
                .min()?;
            Some((rank, policy))
        });
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_by_key(|(rank, policy)| (*rank, policy.created, &policy.name));
        policy::together(ranked.into_iter().map(|(_, policy)| policy))
    }

    fn backend_policy(&self, service: &str) -> Option<&BackendPolicy> {
        let of_service = self.backend_policies_of.get(service);
        of_service
            .filter_map(|name| self.backend_policies.get(name).map(|(_, policy)| policy))
            .min_by_key(|policy| (policy.wire.created, &policy.wire.name))
    }

    fn put_route(&mut self, update: &Update, route: Route, touched: &mut Touched) {
        self.remove_route(&update.name, touched);
        let name: Arc<str> = update.name.as_str().into();
        for parent in &route.parents {
            self.routes_of.insert(&parent.service, &name);
            touch(touched, &parent.service, parent.ports.clone());
        }
        self.routes
            .insert(name, (update.version.as_str().into(), route));
    }

    fn remove_route(&mut self, name: &str, touched: &mut Touched) {
        let Some((_, route)) = self.routes.remove(name) else {
            return;
        };
        for parent in route.parents {
            self.routes_of.remove(&parent.service, name);
            touch(touched, &parent.service, parent.ports);
        }
    }

    fn put_backend_policy(
        &mut self,
        update: &Update,
        policy: BackendPolicy,
        touched: &mut Touched,
    ) {
        let name: Arc<str> = update.name.as_str().into();
        for service in policy.services() {
            self.backend_policies_of.insert(&service, &name);
            touch(touched, &service, PortSelector::default());
        }
        self.backend_policies
            .insert(name, (update.version.as_str().into(), policy));
    }

    fn remove_backend_policy(&mut self, name: &str, touched: &mut Touched) {
        let Some((_, policy)) = self.backend_policies.remove(name) else {
            return;
        };
        for service in policy.services() {
            self.backend_policies_of.remove(&service, name);
            touch(touched, &service, PortSelector::default());
        }
    }

    fn put_traffic_policy(
        &mut self,
        update: &Update,
        policy: mesh::TrafficPolicy,
        touched: &mut Touched,
    ) {
        let name: Arc<str> = update.name.as_str().into();
        for target in &policy.targets {
            let of = format!("{}/{}", policy.namespace, target.name);
            let key = target_key(target.kind(), &of);
            self.traffic_policies_of.insert(&key, &name);
            self.touch_target(target, &of, touched);
        }
        self.traffic_policies
            .insert(name, (update.version.as_str().into(), policy));
    }

    fn remove_traffic_policy(&mut self, name: &str, touched: &mut Touched) {
        let Some((_, policy)) = self.traffic_policies.remove(name) else {
            return;
        };
        for target in &policy.targets {
            let of = format!("{}/{}", policy.namespace, target.name);
            self.traffic_policies_of
                .remove(&target_key(target.kind(), &of), name);
            self.touch_target(target, &of, touched);
        }
    }

    /// A policy's target concerns a Service's ports, or those a route is attached to.
    fn touch_target(&self, target: &mesh::PolicyTarget, of: &str, touched: &mut Touched) {
        let kind = match target.kind() {
            PolicyTargetKind::HttpRoute => RouteKind::Http,
            PolicyTargetKind::GrpcRoute => RouteKind::Grpc,
            PolicyTargetKind::Service | PolicyTargetKind::Unspecified => {
                let section = target.section_name.as_str();
                let selector = PortSelector {
                    port: None,
                    section: (!section.is_empty()).then(|| section.into()),
                };
                return touch(touched, of, selector);
            }
        };
        let route = self.routes.get(&*format!("{}/{of}", kind.name()));
        for parent in route.into_iter().flat_map(|(_, route)| &route.parents) {
            touch(touched, &parent.service, parent.ports.clone());
        }
    }

    /// Forgets the places that no backend has any more.
    fn prune_targets(&mut self) {
        self.targets.retain(|_, targets| {
            targets
                .ports
                .retain(|_, target| Arc::strong_count(target) > 1);
            !targets.ports.is_empty()
        });
    }

    #[cfg(test)]
    pub(super) fn places(&self) -> usize {
        self.targets.values().map(|t| t.ports.len()).sum()
    }
}

impl BackendPolicy {
    /// `namespace/name` of its Services.
    fn services(&self) -> Vec<String> {
        let name = |service: &String| format!("{}/{service}", self.wire.namespace);
        self.wire.services.iter().map(name).collect()
    }
}

/// Key -> names of the resources that point to it.
#[derive(Default)]
struct Index(HashMap<Arc<str>, BTreeSet<Arc<str>>>);

impl Index {
    fn insert(&mut self, key: &str, name: &Arc<str>) {
        let names = match self.0.get_mut(key) {
            Some(names) => names,
            None => self.0.entry(key.into()).or_default(),
        };
        names.insert(Arc::clone(name));
    }

    fn remove(&mut self, key: &str, name: &str) {
        if let Some(names) = self.0.get_mut(key) {
            names.remove(name);
            if names.is_empty() {
                self.0.remove(key);
            }
        }
    }

    fn get(&self, key: &str) -> impl Iterator<Item = &Arc<str>> {
        self.0.get(key).into_iter().flatten()
    }
}

fn touch(touched: &mut Touched, service: &str, ports: PortSelector) {
    touched.entry(service.into()).or_default().push(ports);
}

fn target(all: &mut HashMap<Arc<str>, Targets>, service: &str, port: u16) -> Arc<Target> {
    let targets = match all.get_mut(service) {
        Some(targets) => targets,
        None => all.entry(service.into()).or_default(),
    };
    Arc::clone(targets.ports.entry(port).or_default())
}

fn target_key(kind: PolicyTargetKind, name: &str) -> String {
    format!("{}/{name}", i32::from(kind))
}
