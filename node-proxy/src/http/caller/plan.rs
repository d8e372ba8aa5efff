//! Which rule a request is for, which backend, and what they change of it; and the way back through their filters.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::Response;
use http::header::HeaderValue;
use http::request::Parts;
use mesh_api::errors::ProxyError;
use rand::Rng;

use super::{Exchange, Stop, Target};
use crate::http::body::Body;
use crate::http::policy::Policy;
use crate::http::route::filter::{self, Outcome, RequestContext};
use crate::http::route::{Backend, Choice, PortRules, Rule, Session as Persistence};
use crate::table::ServicePort;

/// How long a rule's backend that has been asked for is waited for.
const BACKEND_WAIT: Duration = Duration::from_secs(2);

/// What a request is sent by: the rule's decisions, or none.
pub(super) struct Plan {
    pub(super) rules: Arc<PortRules>,
    pub(super) rule: Option<Arc<Rule>>,
    /// Index into the rule's backends.
    pub(super) backend: Option<usize>,
    pub(super) origin: Option<HeaderValue>,
    /// The session that the request came with: its endpoint, and when it began.
    pub(super) session: Option<(SocketAddr, u64)>,
    /// Where it goes.
    pub(super) to: Goal,
    pub(super) policy: Arc<Policy>,
}

pub(super) enum Goal {
    Port(Arc<ServicePort>),
    Address(SocketAddr),
}

impl Exchange<'_> {
    /// Which rule, which backend, and what they change of the request.
    pub(super) async fn plan(&mut self, parts: &mut Parts) -> Result<Plan, Stop> {
        let port = match &self.session.target {
            Target::Service(port) => port,
            Target::Pod(to) | Target::Opaque(to) | Target::Outside(to) => {
                return Ok(Plan {
                    rules: Arc::default(),
                    rule: None,
                    backend: None,
                    origin: None,
                    session: None,
                    to: Goal::Address(*to),
                    policy: Arc::default(),
                });
            }
        };
        let rules = port.http.load_full();
        let namespace = self.session.pod.identity.namespace();
        let set = rules.routes_for(namespace).filter(|set| set.is_http());
        let Some(set) = set else {
            let policy = Arc::clone(&rules.policy);
            let token = rules
                .session
                .as_ref()
                .and_then(|session| session.token(&parts.headers, epoch()));
            return Ok(Plan {
                rules,
                rule: None,
                backend: None,
                origin: None,
                session: token.map(|token| (token.endpoint, token.began)),
                to: Goal::Port(Arc::clone(port)),
                policy,
            });
        };
        let found = set.find(parts).ok_or(ProxyError::NoRoute)?;
        let rule = Arc::clone(found.rule);
        let prefix = found.prefix.map(str::to_owned);
        self.labels.route = Some(Arc::clone(&rule.route));
        if rule.invalid.is_some() {
            return Err(ProxyError::InvalidRule.into());
        }
        let context = RequestContext {
            prefix: prefix.as_deref(),
            service_port: port.port,
        };
        let mut origin = filter::origin(&rule.filters, &parts.headers);
        let session = rule.session.as_ref().or(rules.session.as_ref());
        let token = session.and_then(|session| session.token(&parts.headers, epoch()));
        let bound = token.and_then(|token| rule.backend_with(token.endpoint));
        let applied = filter::apply_request(&rule.filters, parts, &context);
        go_on(applied)?;
        let backend = match bound {
            Some(backend) => backend,
            None => match rule.choose(rand::rng().random()) {
                Choice::Backend(backend) => backend,
                Choice::Invalid(_) | Choice::None => return Err(ProxyError::InvalidBackend.into()),
            },
        };
        let index = rule.backends.iter().position(|b| std::ptr::eq(b, backend));
        origin = origin.or_else(|| filter::origin(&backend.filters, &parts.headers));
        let applied = filter::apply_request(&backend.filters, parts, &context);
        go_on(applied)?;
        let to = self.backend_port(backend).await?;
        self.labels.backend = Some(Arc::clone(&to.label));
        Ok(Plan {
            policy: Arc::clone(&rule.policy),
            rule: Some(Arc::clone(&rule)),
            backend: index,
            origin,
            session: token.map(|token| (token.endpoint, token.began)),
            to: Goal::Port(to),
            rules,
        })
    }

    async fn backend_port(&self, backend: &Backend) -> Result<Arc<ServicePort>, ProxyError> {
        if let Some(port) = backend.service_port() {
            return Ok(port);
        }
        let table = &self.session.worker.context.table;
        let found = table.find_backend(backend, BACKEND_WAIT).await;
        found.ok_or(ProxyError::InvalidBackend)
    }
}

/// A redirect or a preflight is what the user asked for, not a failure.
fn go_on(applied: Outcome) -> Result<(), Stop> {
    match applied {
        Outcome::Continue => Ok(()),
        Outcome::Respond(response) => {
            let response = response.map(|()| Body::empty());
            Err(Stop::Answer(Box::new(response), None))
        }
    }
}

/// The way back: the backend's filters, then the rule's.
pub(super) fn finish(
    plan: &Plan,
    response: Response<Body>,
    endpoint: SocketAddr,
) -> Response<Body> {
    let Some(rule) = &plan.rule else {
        return announce(plan, response, endpoint);
    };
    let (mut parts, body) = response.into_parts();
    let origin = plan.origin.as_ref();
    if let Some(index) = plan.backend {
        filter::apply_response(&rule.backends[index].filters, origin, &mut parts);
    }
    filter::apply_response(&rule.filters, origin, &mut parts);
    announce(plan, Response::from_parts(parts, body), endpoint)
}

fn announce(plan: &Plan, mut response: Response<Body>, endpoint: SocketAddr) -> Response<Body> {
    if let Some(session) = persistence(plan) {
        // A session that goes on where it was needs no new name, and never a new beginning.
        if plan.session.is_none_or(|(known, _began)| known != endpoint) {
            let now = epoch();
            let began = plan.session.map_or(now, |(_endpoint, began)| began);
            session.announce(endpoint, began, now, response.headers_mut());
        }
    }
    response
}

fn persistence(plan: &Plan) -> Option<&Persistence> {
    let of_rule = plan.rule.as_ref().and_then(|rule| rule.session.as_deref());
    of_rule.or(plan.rules.session.as_deref())
}

/// Seconds since 1970.
fn epoch() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
