//! Resources as the controller sends them -> compiled routes, and compiled routes -> the set of a
//! Service port. A route is compiled once; what depends on the Service port (its policy) is added
//! when the port's set is built.

use std::sync::Arc;

use mesh_api::proto::mesh;
use mesh_api::proto::mesh::RouteKind as Wire;

use super::grpc::{GrpcMatch, GrpcRoutes};
use super::http::{HttpMatch, HttpRoutes};
use super::tls::{TcpRoutes, TlsRoutes};
use super::{Backend, Filter, RouteSet, Rule, Session, filter};
use crate::http::policy::Policy;
use crate::table::Target;

/// Finds the place of a Service port by `namespace/name` and port.
pub(crate) type Targets<'a> = dyn FnMut(&str, u16) -> Arc<Target> + 'a;

/// A route, compiled.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) kind: RouteKind,
    /// `namespace/name`.
    pub(crate) name: Arc<str>,
    pub(crate) namespace: Arc<str>,
    pub(crate) parents: Vec<Parent>,
    created: i64,
    hostnames: Vec<String>,
    pub(crate) rules: Vec<RuleSpec>,
}

/// In the order in which they win a Service port (GEP-1294).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RouteKind {
    Grpc,
    Http,
    Tls,
    Tcp,
}

/// What a route is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parent {
    /// `namespace/name` of the Service.
    pub(crate) service: Arc<str>,
    pub(crate) ports: PortSelector,
}

/// Ports of a Service. Both have to match where both are set (ParentReference.port, sectionName).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct PortSelector {
    pub(crate) port: Option<u16>,
    pub(crate) section: Option<Arc<str>>,
}

impl PortSelector {
    pub(crate) fn selects(&self, port: u16, name: &str) -> bool {
        self.port.is_none_or(|wanted| wanted == port)
            && self.section.as_ref().is_none_or(|wanted| **wanted == *name)
    }
}

/// A rule before it is in force at a Service port.
#[derive(Debug)]
pub(crate) struct RuleSpec {
    /// As sent, for the merge of policies.
    pub(crate) wire: mesh::RouteRule,
    name: Option<Arc<str>>,
    matches: Matches,
    filters: Vec<Filter>,
    backends: Vec<Backend>,
    /// None, one, or one for each match.
    sessions: Vec<Arc<Session>>,
    invalid: Option<Arc<str>>,
}

#[derive(Debug)]
enum Matches {
    Http(Vec<HttpMatch>),
    Grpc(Vec<GrpcMatch>),
    Connection,
}

/// Settles ties: the oldest route, then `namespace/name`, then the first rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    created: i64,
    route: Arc<str>,
    rule: usize,
}

impl RouteKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpcroute",
            Self::Http => "httproute",
            Self::Tls => "tlsroute",
            Self::Tcp => "tcproute",
        }
    }
}

impl Route {
    /// `resource` is the resource's name.
    pub(crate) fn compile(
        resource: &str,
        route: mesh::Route,
        targets: &mut Targets<'_>,
    ) -> Result<Self, String> {
        let kind = match route.kind() {
            Wire::Http => RouteKind::Http,
            Wire::Grpc => RouteKind::Grpc,
            Wire::Tls => RouteKind::Tls,
            Wire::Tcp => RouteKind::Tcp,
            Wire::Unspecified => {
                return Err(format!("kind: {} is not known to this proxy", route.kind));
            }
        };
        let name = format!("{}/{}", route.namespace, route.name);
        if format!("{}/{name}", kind.name()) != *resource {
            return Err(format!(
                "kind, namespace, name: {}/{name} is not the resource's name",
                kind.name()
            ));
        }
        let parents = route.parents.iter().map(Parent::compile);
        let rules = route.rules.into_iter().enumerate();
        let rules = rules.map(|(index, rule)| RuleSpec::compile(kind, index, rule, &name, targets));
        Ok(Self {
            kind,
            namespace: route.namespace.as_str().into(),
            created: route.created,
            hostnames: route.hostnames,
            parents: parents.collect::<Result<_, _>>()?,
            rules: rules.collect::<Result<_, _>>()?,
            name: name.into(),
        })
    }

    /// Whether it is attached to a port of a Service.
    pub(crate) fn is_attached(&self, service: &str, port: u16, name: &str) -> bool {
        self.parents
            .iter()
            .any(|p| *p.service == *service && p.ports.selects(port, name))
    }

    /// `namespace/name` of every Service it may send to.
    pub(crate) fn backends(&self) -> impl Iterator<Item = String> {
        self.rules
            .iter()
            .flat_map(|rule| {
                let of_backends = rule.backends.iter().flat_map(|b| &b.filters);
                let mirrors = rule
                    .filters
                    .iter()
                    .chain(of_backends)
                    .filter_map(Filter::mirror);
                rule.backends.iter().chain(mirrors)
            })
            .map(|backend| format!("{}/{}", backend.service.0, backend.service.1))
    }
}

impl Parent {
    fn compile(parent: &mesh::RouteParent) -> Result<Self, String> {
        if parent.namespace.is_empty() || parent.service.is_empty() {
            return Err("parents: namespace and service are needed".into());
        }
        Ok(Self {
            service: format!("{}/{}", parent.namespace, parent.service).into(),
            ports: PortSelector {
                port: match parent.port {
                    0 => None,
                    number => Some(port("parents.port", number)?),
                },
                section: text(&parent.section_name),
            },
        })
    }
}

impl RuleSpec {
    fn compile(
        kind: RouteKind,
        index: usize,
        wire: mesh::RouteRule,
        route: &str,
        targets: &mut Targets<'_>,
    ) -> Result<Self, String> {
        // A rule without matches is for everything, as one empty match is.
        let everything = [mesh::RouteMatch::default()];
        let asked = match wire.matches.as_slice() {
            [] => everything.as_slice(),
            matches => matches,
        };
        let matches = match kind {
            RouteKind::Http => Matches::Http(
                asked
                    .iter()
                    .map(HttpMatch::compile)
                    .collect::<Result<_, _>>()?,
            ),
            RouteKind::Grpc => Matches::Grpc(
                asked
                    .iter()
                    .map(GrpcMatch::compile)
                    .collect::<Result<_, _>>()?,
            ),
            RouteKind::Tls | RouteKind::Tcp => Matches::Connection,
        };
        let (filters, not_carried_out) = filter::compile(&wire.filters, targets);
        let backends = wire.backends.iter();
        let backends = backends.map(|b| Backend::compile(b, targets));
        let sessions = match &wire.session_persistence {
            Some(session) => {
                // Rules do not share sessions (GEP-1619, "Edge Case Behavior").
                let owner = match wire.name.as_str() {
                    "" => format!("{route}/{index}"),
                    name => format!("{route}/{name}"),
                };
                sessions(session, &owner, &matches, asked)?
            }
            None => Vec::new(),
        };
        Ok(Self {
            name: text(&wire.name),
            matches,
            filters,
            backends: backends.collect::<Result<_, _>>()?,
            sessions,
            invalid: text(&wire.invalid).or(not_carried_out),
            wire,
        })
    }
}

/// One for each match of an HTTPRoute's rule, because a cookie is for the path that matched (GEP-1619, "Path");
/// only one where they are all the same.
fn sessions(
    session: &mesh::SessionPersistence,
    owner: &str,
    matches: &Matches,
    asked: &[mesh::RouteMatch],
) -> Result<Vec<Arc<Session>>, String> {
    let paths: Vec<&str> = match matches {
        Matches::Http(matches) => {
            let pairs = matches.iter().zip(asked);
            pairs
                .map(|(compiled, asked)| {
                    let expression = asked.path.as_ref().map_or("", |path| path.value.as_str());
                    let path = compiled.cookie_path();
                    path.unwrap_or_else(|| literal_path(expression))
                })
                .collect()
        }
        Matches::Grpc(_) | Matches::Connection => vec!["/"],
    };
    let mut compiled = paths
        .into_iter()
        .map(|path| Session::compile(session, owner, Some(path)))
        .collect::<Result<Vec<_>, _>>()?;
    if compiled.windows(2).all(|pair| pair[0] == pair[1]) {
        compiled.truncate(1);
    }
    Ok(compiled.into_iter().map(Arc::new).collect())
}

/// The elements that every path begins with which an expression matches.
fn literal_path(expression: &str) -> &str {
    // Alternatives may begin differently.
    if expression.contains('|') {
        return "/";
    }
    let text = expression.strip_prefix('^').unwrap_or(expression);
    let literal = match text.find(|c: char| OPERATORS.contains(c)) {
        // An operator may be about the character before it, so the element it is in does not count.
        Some(end) => text[..end]
            .rsplit_once('/')
            .map_or("", |(elements, _)| elements),
        None => text,
    };
    match literal.starts_with('/') {
        true => literal,
        false => "/",
    }
}

impl Backend {
    pub(super) fn compile(
        backend: &mesh::RouteBackend,
        targets: &mut Targets<'_>,
    ) -> Result<Self, String> {
        let mesh::RouteBackend {
            namespace,
            service,
            port: number,
            weight,
            filters,
            invalid,
        } = backend;
        let (filters, not_carried_out) = filter::compile(filters, targets);
        // What the controller found unusable need not even name a port.
        let number = match invalid.is_empty() {
            true => port("backends.port", *number)?,
            false => u16::try_from(*number).unwrap_or_default(),
        };
        Ok(Self {
            service: (namespace.as_str().into(), service.as_str().into()),
            port: number,
            weight: *weight,
            filters,
            invalid: text(invalid).or(not_carried_out),
            target: match invalid.is_empty() {
                true => targets(&format!("{namespace}/{service}"), number),
                false => Arc::default(),
            },
        })
    }
}

/// The set of a group of routes that are attached to one Service port. `policy` is asked for what is in force
/// for each rule. `None`: there is no route.
pub(crate) fn build(
    routes: &[&Route],
    mut policy: impl FnMut(&Route, &RuleSpec) -> Arc<Policy>,
) -> Option<RouteSet> {
    let kind = routes.iter().map(|route| route.kind).min()?;
    let (mut http, mut grpc, mut tls, mut tcp) = (vec![], vec![], vec![], vec![]);
    for route in routes.iter().filter(|route| route.kind == kind) {
        for (index, spec) in route.rules.iter().enumerate() {
            let rank = Rank {
                created: route.created,
                route: Arc::clone(&route.name),
                rule: index,
            };
            let rules = spec.put_in_force(route, &policy(route, spec));
            match (&spec.matches, kind) {
                // One for all matches, or one for each.
                (Matches::Http(matches), _) => http.extend(
                    matches
                        .iter()
                        .zip(rules.iter().cycle())
                        .map(|(m, rule)| (m.clone(), rank.clone(), Arc::clone(rule))),
                ),
                (Matches::Grpc(matches), _) => grpc.extend(
                    matches
                        .iter()
                        .zip(rules.iter().cycle())
                        .map(|(m, rule)| (m.clone(), rank.clone(), Arc::clone(rule))),
                ),
                (Matches::Connection, RouteKind::Tls) => tls.extend(
                    rules
                        .into_iter()
                        .map(|rule| (route.hostnames.as_slice(), rank.clone(), rule)),
                ),
                (Matches::Connection, _) => {
                    tcp.extend(rules.into_iter().map(|rule| (rank.clone(), rule)));
                }
            }
        }
    }
    match kind {
        RouteKind::Http => Some(RouteSet::Http(HttpRoutes::new(http))),
        RouteKind::Grpc => Some(RouteSet::Grpc(GrpcRoutes::new(grpc))),
        RouteKind::Tls => Some(RouteSet::Tls(TlsRoutes::new(tls))),
        RouteKind::Tcp => TcpRoutes::new(tcp).map(RouteSet::Tcp),
    }
}

impl RuleSpec {
    /// The rule's name, empty for an unnamed one.
    pub(crate) fn name(&self) -> &str {
        &self.wire.name
    }

    /// One for each of its sessions, or one without.
    fn put_in_force(&self, route: &Route, policy: &Arc<Policy>) -> Vec<Arc<Rule>> {
        let with = |session: Option<&Arc<Session>>| {
            Arc::new(Rule {
                route: Arc::clone(&route.name),
                kind: route.kind.name(),
                name: self.name.clone(),
                filters: self.filters.clone(),
                backends: self.backends.clone(),
                total_weight: self.backends.iter().map(|b| u64::from(b.weight)).sum(),
                policy: Arc::clone(policy),
                session: session.cloned(),
                invalid: self.invalid.clone(),
                cors: self.filters.iter().any(|f| matches!(f, Filter::Cors(_))),
            })
        };
        match self.sessions.as_slice() {
            [] => vec![with(None)],
            sessions => sessions.iter().map(|session| with(Some(session))).collect(),
        }
    }
}

fn text(text: &str) -> Option<Arc<str>> {
    (!text.is_empty()).then(|| text.into())
}

fn port(field: &str, number: u32) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{field}: {number} is no port")),
    }
}

/// What is no literal in an expression.
const OPERATORS: &str = r"\.+*?()[]{}^$";
