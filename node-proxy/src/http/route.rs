//! Routes of the Gateway API attached to Services (GAMMA, GEP-1294), compiled for matching.
//!
//! The table compiles everything that is attached to one Service port into one [`PortRules`], an
//! immutable snapshot that the data path reads once per request. Matching, the choice of a backend and
//! the filters are pure functions: they know nothing of connections, and random numbers come from the
//! caller.
//!
//! Invariants:
//! - precedence is settled when the rules are compiled: the first candidate that matches is the one
//!   the specification asks for, across all rules of all routes of the set;
//! - weights are never renormalised: the share of a backend that cannot be used is answered with 500;
//! - one level only: what is chosen is a Service port's endpoints, whose own routes are not looked at;
//! - a set that matches nothing is a 404 (gRPC: UNIMPLEMENTED), no set at all is plain pass-through.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::http::policy::Policy;
use crate::table::{ServicePort, Target, TargetState};

mod compile;
pub mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod grpc;
mod http;
mod matching;
pub mod session;
mod tls;

pub use self::http::HttpRoutes;
pub(crate) use compile::{PortSelector, Route, RouteKind, build};
pub use filter::Filter;
pub use grpc::GrpcRoutes;
pub use session::{Session, Token};
pub use tls::{TcpRoutes, TlsRoutes};

/// All that is attached to a Service port.
#[derive(Debug, Default)]
pub struct PortRules {
    /// Routes of the Service's own namespace, for callers of every namespace. `None`: no route.
    pub producer: Option<Arc<RouteSet>>,
    /// By the caller's namespace: routes of that namespace. They replace `producer` there.
    pub consumer: HashMap<Arc<str>, Arc<RouteSet>>,
    /// In force for the Service port itself: for requests that no rule is for, and for what is decided
    /// by the backend (balancing, breaking, limits) wherever the request was routed from.
    pub policy: Arc<Policy>,
    /// Session persistence of the Service (XBackendTrafficPolicy). A rule's own goes before it.
    pub session: Option<Arc<Session>>,
    /// A route or a policy is attached. For the config dump.
    pub attached: bool,
}

impl PortRules {
    /// The routes for callers of a namespace: its own, else those of the Service's namespace
    /// (GEP-1294, producer and consumer routes). `None`: no route is attached, nothing is rejected.
    pub fn routes_for(&self, caller_namespace: &str) -> Option<&Arc<RouteSet>> {
        self.consumer
            .get(caller_namespace)
            .or(self.producer.as_ref())
    }

    /// Which routes are attached, for the admin socket.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let names = |set: &Arc<RouteSet>| -> Vec<String> {
            let mut names: Vec<_> = set
                .rules()
                .map(|rule| format!("{}/{}", rule.kind, rule.route))
                .collect();
            names.sort();
            names.dedup();
            names
        };
        let consumer: serde_json::Map<_, _> = self
            .consumer
            .iter()
            .map(|(namespace, set)| (namespace.to_string(), names(set).into()))
            .collect();
        serde_json::json!({
            "producer": self.producer.as_ref().map(names),
            "consumer": consumer,
            "attached": self.attached,
            "policy": format!("{:?}", self.policy),
        })
    }
}

/// The routes of one group. One kind wins a Service port: GRPC > HTTP > TLS > TCP (GEP-1294).
#[derive(Debug)]
pub enum RouteSet {
    /// HTTPRoutes.
    Http(HttpRoutes),
    /// GRPCRoutes.
    Grpc(GrpcRoutes),
    /// TLSRoutes.
    Tls(TlsRoutes),
    /// TCPRoutes.
    Tcp(TcpRoutes),
}

impl RouteSet {
    /// The rule for a request, of an HTTPRoute or GRPCRoute. `None`: nothing matches (404, UNIMPLEMENTED), or the routes
    /// are not about requests.
    pub fn find(&self, request: &::http::request::Parts) -> Option<Match<'_>> {
        match self {
            Self::Http(routes) => routes.find(request),
            Self::Grpc(routes) => routes.find(request),
            Self::Tls(_) | Self::Tcp(_) => None,
        }
    }

    /// Every rule, as often as it can be found.
    pub fn rules(&self) -> Box<dyn Iterator<Item = &Arc<Rule>> + '_> {
        match self {
            Self::Http(routes) => Box::new(routes.rules()),
            Self::Grpc(routes) => Box::new(routes.rules()),
            Self::Tls(routes) => Box::new(routes.rules()),
            Self::Tcp(routes) => Box::new(std::iter::once(routes.rule())),
        }
    }

    /// Whether its rules are about requests, not connections.
    pub fn is_http(&self) -> bool {
        matches!(self, Self::Http(_) | Self::Grpc(_))
    }
}

/// A rule, and how it came to match.
#[derive(Debug, Clone, Copy)]
pub struct Match<'a> {
    /// The rule.
    pub rule: &'a Arc<Rule>,
    /// The path prefix that matched, for `ReplacePrefixMatch`: without a trailing `/`, so empty for `/`. `None`: the
    /// match was not by prefix.
    pub prefix: Option<&'a str>,
}

/// A rule of a route as it is in force at one Service port.
#[derive(Debug)]
pub struct Rule {
    /// `namespace/name` of the route.
    pub route: Arc<str>,
    /// The kind of the route, as in its resource name: `httproute`, `grpcroute`, `tlsroute`, `tcproute`.
    pub kind: &'static str,
    /// The rule's name, if it has one (GEP-995).
    pub name: Option<Arc<str>>,
    /// In the order in which they apply.
    pub filters: Vec<Filter>,
    /// Where its requests go.
    pub backends: Vec<Backend>,
    /// Sum of the weights of all backends, also of those that cannot be used.
    pub total_weight: u64,
    /// What is in force for its requests.
    pub policy: Arc<Policy>,
    /// Session persistence of the rule (GEP-1619).
    pub session: Option<Arc<Session>>,
    /// Why every request it matches is answered with 500.
    pub invalid: Option<Arc<str>>,
    /// A preflight is matched by the method it asks for.
    cors: bool,
}

/// A backend of a rule, or of a mirror.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Namespace and name of the Service.
    pub service: (Arc<str>, Arc<str>),
    /// Its port.
    pub port: u16,
    /// Share of [`Rule::total_weight`].
    pub weight: u32,
    /// After the rule's own, in the order in which they apply.
    pub filters: Vec<Filter>,
    /// Why the reference cannot be used, by what the controller knows.
    pub invalid: Option<Arc<str>>,
    pub(crate) target: Arc<Target>,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy)]
pub enum Choice<'a> {
    /// To this Service port. It may still be on its way, see [`Backend::state`].
    Backend(&'a Backend),
    /// To what cannot be used: 500, UNAVAILABLE, or the connection is rejected.
    Invalid(&'a Backend),
    /// The rule has no backend, or none with a weight: 500 unless a filter answers.
    None,
}

impl Rule {
    /// Chooses a backend by weight. `random` is uniform over all of `u64`.
    pub fn choose(&self, random: u64) -> Choice<'_> {
        // Multiplication instead of a remainder: no division, and no bias that could be measured.
        let mut left = scale(random, self.total_weight);
        for backend in &self.backends {
            let weight = u64::from(backend.weight);
            if left < weight {
                return match backend.is_invalid() {
                    true => Choice::Invalid(backend),
                    false => Choice::Backend(backend),
                };
            }
            left -= weight;
        }
        Choice::None
    }

    /// The backend whose endpoint a session is bound to, whatever its weight: a session outlives a
    /// change of weights (GEP-1619).
    pub fn backend_with(&self, endpoint: SocketAddr) -> Option<&Backend> {
        self.backends.iter().find(|backend| backend.has(endpoint))
    }

    /// Whether the Service of a backend keeps sessions of its own (XBackendTrafficPolicy).
    pub fn has_backend_session(&self) -> bool {
        self.backends
            .iter()
            .any(|backend| backend.session().is_some())
    }

    /// The backend whose Service's session a request came with, whatever its weight (GEP-1619, "Traffic Splitting").
    /// `now`: seconds since 1970.
    pub fn resume(
        &self,
        request: &::http::HeaderMap,
        now: u64,
    ) -> Option<(&Backend, Arc<Session>, Token)> {
        self.backends.iter().find_map(|backend| {
            let session = backend.session()?;
            let token = session.token(request, now)?;
            backend
                .has(token.endpoint)
                .then_some((backend, session, token))
        })
    }
}

impl Backend {
    /// The Service port as it is known now. `None`: see [`Backend::state`].
    pub fn service_port(&self) -> Option<Arc<ServicePort>> {
        match self.target.state() {
            TargetState::Known(port) => Some(port),
            TargetState::Pending | TargetState::Absent => None,
        }
    }

    /// The session persistence of its Service, as far as the Service is known.
    pub fn session(&self) -> Option<Arc<Session>> {
        let port = self.service_port()?;
        let rules = port.http.load();
        rules.session.clone()
    }

    /// Whether it can be used and this is one of its endpoints.
    fn has(&self, endpoint: SocketAddr) -> bool {
        !self.is_invalid()
            && self.service_port().is_some_and(|port| {
                port.endpoints
                    .endpoints()
                    .iter()
                    .any(|known| known.address == endpoint)
            })
    }

    /// What is known of the Service port.
    pub fn state(&self) -> TargetState {
        self.target.state()
    }

    /// Its share must be answered with 500: the controller said so, or there is no such Service or port.
    pub fn is_invalid(&self) -> bool {
        self.invalid.is_some() || self.target.is_absent()
    }
}

/// A uniform number below `limit` (0 for 0).
fn scale(random: u64, limit: u64) -> u64 {
    ((u128::from(random) * u128::from(limit)) >> 64) as u64
}

#[cfg(test)]
mod tests;
