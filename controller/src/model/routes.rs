//! Routes: what they are attached to, which of them count, and what is to be said of them.
//!
//! Rules (GEP-1294 unless named): parents are ClusterIP Services, `group: ""`; a port or the name of one narrows
//! it down. A route of the Service's namespace (producer) is for every caller, one of another namespace
//! (consumer) only for callers of its own, where it stands instead of the producers'. Of the kinds on one port
//! of a Service one counts, GRPC before HTTP before TLS before TCP; producers and each consumer namespace are
//! judged apart, so that no namespace can switch off another's routes.
//!
//! Invariants: a route without an accepted parent is not published. A rule that cannot be carried out is
//! published as such and answers 500, because to skip it would send its requests where they do not belong.

mod backends;
mod rules;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_api::proto::mesh::{Route, RouteKind, RouteParent};

use self::backends::Parent;
pub(super) use self::backends::Services;
use self::rules::Judged;
pub(super) use self::rules::session;
use super::status::{Condition, ObjectStatus, ParentStatus};
use crate::providers::Objects;
use crate::providers::gateway::{Custom, ParentReference, check};

/// Routes by `kind/namespace/name`, and what is to be said of all of them.
#[derive(Debug, Default)]
pub(super) struct Routes {
    pub(super) routes: BTreeMap<String, Route>,
    pub(super) statuses: Vec<ObjectStatus>,
}

/// Attaches all routes.
pub(super) fn build(objects: &Objects) -> Routes {
    let services = Services(&objects.services);
    let mut candidates = Vec::new();
    for route in objects.grpc_routes.values() {
        let parents = &route.spec.parent_refs;
        let found = check::grpc_route(&route.spec);
        let judge = |n: &str| rules::grpc(&route.spec, n, services, &found);
        candidates.extend(Candidate::new(
            RouteKind::Grpc,
            route,
            parents,
            judge,
            &found,
        ));
    }
    for route in objects.http_routes.values() {
        let parents = &route.spec.parent_refs;
        let found = check::http_route(&route.spec);
        let judge = |n: &str| rules::http(&route.spec, n, services, &found);
        candidates.extend(Candidate::new(
            RouteKind::Http,
            route,
            parents,
            judge,
            &found,
        ));
    }
    for route in objects.tls_routes.values() {
        let parents = &route.spec.parent_refs;
        let found = check::tls_route(&route.spec);
        let judge = |n: &str| rules::l4(&route.spec.rules, RouteKind::Tls, n, services, &found);
        let made = Candidate::new(RouteKind::Tls, route, parents, judge, &found);
        candidates.extend(made.map(|c| Candidate {
            hostnames: &route.spec.hostnames,
            ..c
        }));
    }
    for route in objects.tcp_routes.values() {
        let parents = &route.spec.parent_refs;
        let found = check::tcp_route(&route.spec);
        let judge = |n: &str| rules::l4(&route.spec.rules, RouteKind::Tcp, n, services, &found);
        candidates.extend(Candidate::new(
            RouteKind::Tcp,
            route,
            parents,
            judge,
            &found,
        ));
    }
    attach(&candidates, services)
}

/// A route before it is known whether it counts.
struct Candidate<'a> {
    kind: RouteKind,
    metadata: &'a ObjectMeta,
    created: i64,
    namespace: &'a str,
    name: &'a str,
    parents: Vec<&'a ParentReference>,
    hostnames: &'a [String],
    rules: Vec<Judged>,
    /// Why none of it can be used.
    refused: Option<String>,
}

impl<'a> Candidate<'a> {
    /// `None`: it is not attached to any Service; a Gateway's route.
    fn new<S>(
        kind: RouteKind,
        route: &'a Custom<S>,
        parents: &'a [ParentReference],
        judge: impl FnOnce(&str) -> Vec<Judged>,
        found: &[crate::providers::field::Found],
    ) -> Option<Self> {
        let parents: Vec<_> = parents.iter().filter(|p| p.is_service()).collect();
        let namespace = route.metadata.namespace.as_deref()?;
        let name = route.metadata.name.as_deref()?;
        if parents.is_empty() {
            return None;
        }
        // What is wrong with a parent keeps it from being found; what is wrong with a rule costs the rule.
        let elsewhere = |path: &[crate::providers::field::Step]| {
            check::rule_of(path).is_none()
                && path.get(1) != Some(&crate::providers::field::Step::from("parentRefs"))
        };
        let refused = found.iter().find(|(path, _)| elsewhere(path));
        Some(Self {
            kind,
            metadata: &route.metadata,
            created: route.created(),
            namespace,
            name,
            parents,
            hostnames: &[],
            rules: judge(namespace),
            refused: refused.map(rules::in_words),
        })
    }

    /// Whose requests it is for: `None` for all, else those of one namespace.
    fn group(&self, service_namespace: &str) -> Option<&'a str> {
        (self.namespace != service_namespace).then_some(self.namespace)
    }
}

/// A port of a Service, for one group of callers.
type Slot<'a> = (&'a str, &'a str, u32, Option<&'a str>);

fn attach(candidates: &[Candidate<'_>], services: Services<'_>) -> Routes {
    let mut kinds: BTreeMap<Slot<'_>, RouteKind> = BTreeMap::new();
    for candidate in candidates.iter().filter(|c| c.refused.is_none()) {
        for parent in &candidate.parents {
            let found = services.parent(parent, candidate.namespace, candidate.kind);
            for slot in found.iter().flat_map(|p| slots(candidate, p)) {
                let kind = kinds.entry(slot).or_insert(candidate.kind);
                if rank(candidate.kind) < rank(*kind) {
                    *kind = candidate.kind;
                }
            }
        }
    }
    let mut result = Routes::default();
    for candidate in candidates {
        let mut status = ObjectStatus::new(object_kind(candidate.kind), candidate.metadata);
        let mut parents: Vec<RouteParent> = Vec::new();
        for parent in &candidate.parents {
            let accepted = accept(candidate, parent, services, &kinds, &mut parents);
            let mut conditions = vec![accepted, resolved_refs(candidate)];
            conditions.extend(partially_invalid(candidate));
            status.parents.push(ParentStatus {
                parent_ref: (*parent).clone(),
                conditions,
            });
        }
        result.statuses.push(status);
        if parents.is_empty() {
            continue;
        }
        parents.dedup();
        let (namespace, name) = (candidate.namespace, candidate.name);
        let kind = object_kind(candidate.kind).to_lowercase();
        let rules = candidate.rules.iter().filter_map(|j| j.rule.clone());
        let route = Route {
            kind: candidate.kind.into(),
            namespace: namespace.into(),
            name: name.into(),
            created: candidate.created,
            parents,
            hostnames: candidate.hostnames.to_vec(),
            rules: rules.collect(),
        };
        result
            .routes
            .insert(format!("{kind}/{namespace}/{name}"), route);
    }
    result
}

fn slots<'a>(candidate: &Candidate<'a>, parent: &Parent<'a>) -> Vec<Slot<'a>> {
    let group = candidate.group(parent.namespace);
    let ports = parent.ports.iter();
    ports
        .map(|port| (parent.namespace, parent.name, *port, group))
        .collect()
}

/// Judges one parent; adds what is in force to `parents`.
fn accept(
    candidate: &Candidate<'_>,
    reference: &ParentReference,
    services: Services<'_>,
    kinds: &BTreeMap<Slot<'_>, RouteKind>,
    parents: &mut Vec<RouteParent>,
) -> Condition {
    let no = |reason| Condition::new("Accepted", false, reason);
    if let Some(why) = &candidate.refused {
        return no("UnsupportedValue").saying(why);
    }
    let parent = match services.parent(reference, candidate.namespace, candidate.kind) {
        Ok(parent) => parent,
        Err(why) => return no("NoMatchingParent").saying(why),
    };
    let (mut kept, mut lost) = (Vec::new(), Vec::new());
    for slot in slots(candidate, &parent) {
        match kinds.get(&slot) {
            Some(winner) if *winner != candidate.kind => lost.push((slot.2, *winner)),
            _ => kept.push(slot.2),
        }
    }
    let losses: Vec<String> = lost
        .iter()
        .map(|(port, winner)| format!("port {port} has a {}", object_kind(*winner)))
        .collect();
    let losses = losses.join(", ");
    if kept.is_empty() {
        // The word of GEP-1294.
        return no("RouteReasonConflicted").saying(format!(
            "{losses}, which counts before a {}",
            object_kind(candidate.kind)
        ));
    }
    if lost.is_empty() && parent.is_whole {
        parents.push(RouteParent {
            namespace: parent.namespace.into(),
            service: parent.name.into(),
            port: port_number(reference),
            section_name: reference.section_name.clone().unwrap_or_default(),
        });
    } else {
        parents.extend(kept.iter().map(|port| RouteParent {
            namespace: parent.namespace.into(),
            service: parent.name.into(),
            port: *port,
            section_name: String::new(),
        }));
    }
    let mistakes: Vec<&str> = candidate.rules.iter().filter_map(Judged::mistake).collect();
    if !mistakes.is_empty() && mistakes.len() == candidate.rules.len() {
        // Published all the same: what its rules match is answered with 500.
        return no("UnsupportedValue").saying(mistakes.join("; "));
    }
    let message = match lost.is_empty() {
        true => String::new(),
        false => format!("without these ports: {losses}"),
    };
    Condition::new("Accepted", true, "Accepted").saying(message)
}

fn port_number(reference: &ParentReference) -> u32 {
    reference.port.and_then(|p| p.try_into().ok()).unwrap_or(0)
}

fn resolved_refs(candidate: &Candidate<'_>) -> Condition {
    let unresolved: Vec<_> = candidate.rules.iter().flat_map(|j| &j.unresolved).collect();
    match unresolved.first() {
        None => Condition::new("ResolvedRefs", true, "ResolvedRefs"),
        Some((reason, _)) => {
            let messages: Vec<&str> = unresolved.iter().map(|(_, m)| m.as_str()).collect();
            Condition::new("ResolvedRefs", false, reason).saying(messages.join("; "))
        }
    }
}

/// Only ever true, and only if some rules can be carried out.
fn partially_invalid(candidate: &Candidate<'_>) -> Option<Condition> {
    let mistakes: Vec<&str> = candidate.rules.iter().filter_map(Judged::mistake).collect();
    let some = !mistakes.is_empty() && mistakes.len() < candidate.rules.len();
    (some && candidate.refused.is_none()).then(|| {
        let message = format!("Dropped Rule {}", mistakes.join("; Dropped Rule "));
        Condition::new("PartiallyInvalid", true, "UnsupportedValue").saying(message)
    })
}

/// Lower counts before higher.
fn rank(kind: RouteKind) -> u8 {
    match kind {
        RouteKind::Grpc => 0,
        RouteKind::Http => 1,
        RouteKind::Tls => 2,
        RouteKind::Tcp => 3,
        RouteKind::Unspecified => u8::MAX,
    }
}

/// The kind as manifests have it.
pub(super) fn object_kind(kind: RouteKind) -> &'static str {
    match kind {
        RouteKind::Grpc => "GRPCRoute",
        RouteKind::Http => "HTTPRoute",
        RouteKind::Tls => "TLSRoute",
        RouteKind::Tcp => "TCPRoute",
        RouteKind::Unspecified => "route",
    }
}

#[cfg(test)]
mod tests;
