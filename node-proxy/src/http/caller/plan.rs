//! Which rule a request is for, which backend, and what they change of it; and the way back through their filters.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::Response;
use http::header::{HeaderMap, HeaderValue};
use http::request::Parts;
use mesh_api::errors::ProxyError;
use rand::Rng;

use super::{Exchange, Stop, Target};
use crate::http::body::Body;
use crate::http::policy::Policy;
use crate::http::route::filter::{self, Filter, Outcome, RequestContext};
use crate::http::route::session::{Session as Persistence, Token};
use crate::http::route::{Backend, Choice, Rule};
use crate::table::ServicePort;

/// How long a rule's backend that has been asked for is waited for.
const BACKEND_WAIT: Duration = Duration::from_secs(2);

/// What a request is sent by: the rule's decisions, or none.
#[derive(Default)]
pub(super) struct Plan {
    /// With the index of the backend.
    pub(super) rule: Option<(Arc<Rule>, usize)>,
    pub(super) origin: Option<HeaderValue>,
    pub(super) persistence: Option<Arc<Persistence>>,
    /// The session that the request came with.
    pub(super) session: Option<Token>,
    pub(super) policy: Arc<Policy>,
}

impl Plan {
    /// The filters in force, the rule's first.
    pub(super) fn filters(&self) -> [&[Filter]; 2] {
        match &self.rule {
            Some((rule, backend)) => [&rule.filters, &rule.backends[*backend].filters],
            None => [&[], &[]],
        }
    }

    /// Keeps the session that the request came with, if sessions are kept here.
    fn keep(&mut self, persistence: Option<&Arc<Persistence>>, request: &HeaderMap) {
        self.persistence = persistence.cloned();
        self.session = persistence.and_then(|session| session.token(request, epoch()));
    }
}

/// Where a request goes.
pub(super) enum Goal {
    Port(Arc<ServicePort>),
    Address(SocketAddr),
}

impl Exchange<'_> {
    /// Which rule, which backend, and what they change of the request.
    pub(super) async fn plan(&mut self, parts: &mut Parts) -> Result<(Plan, Goal), Stop> {
        let mut plan = Plan::default();
        let port = match &self.session.target {
            Target::Service(port) => port,
            Target::Pod(to) | Target::Opaque(to) | Target::Outside(to) => {
                return Ok((plan, Goal::Address(*to)));
            }
        };
        let rules = port.http.load_full();
        let namespace = self.session.pod.identity.namespace();
        let Some(set) = rules.routes_for(namespace).filter(|set| set.is_http()) else {
            plan.keep(rules.session.as_ref(), &parts.headers);
            plan.policy = Arc::clone(&rules.policy);
            return Ok((plan, Goal::Port(Arc::clone(port))));
        };
        let found = set.find(parts).ok_or(ProxyError::NoRoute)?;
        let rule = found.rule;
        let prefix = found.prefix.map(str::to_owned);
        self.labels.route = Some(Arc::clone(&rule.route));
        if rule.invalid.is_some() {
            return Err(ProxyError::InvalidRule.into());
        }
        // All that asks for headers as they came is settled before a filter changes them.
        plan.keep(rule.session.as_ref(), &parts.headers);
        let bound = plan
            .session
            .and_then(|token| rule.backend_with(token.endpoint));
        let choice = match bound {
            Some(backend) => Choice::Backend(backend),
            None => rule.choose(rand::rng().random()),
        };
        if let (Choice::Backend(backend), None) = (choice, &plan.persistence)
            && let Some(port) = backend.service_port()
        {
            plan.keep(port.http.load().session.as_ref(), &parts.headers);
        }
        plan.origin = filter::origin(&rule.filters, &parts.headers);
        let context = RequestContext {
            prefix: prefix.as_deref(),
            service_port: port.port,
        };
        go_on(filter::apply_request(&rule.filters, parts, &context))?;
        let Choice::Backend(backend) = choice else {
            return Err(ProxyError::InvalidBackend.into());
        };
        plan.origin = plan
            .origin
            .or_else(|| filter::origin(&backend.filters, &parts.headers));
        go_on(filter::apply_request(&backend.filters, parts, &context))?;
        let to = self.backend_port(backend).await?;
        self.labels.backend = Some(Arc::clone(&to.backend));
        // `choose` and `backend_with` give one of them.
        let index = rule.backends.iter().position(|b| std::ptr::eq(b, backend));
        plan.rule = index.map(|index| (Arc::clone(rule), index));
        plan.policy = Arc::clone(&rule.policy);
        Ok((plan, Goal::Port(to)))
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
    mut response: Response<Body>,
    endpoint: SocketAddr,
) -> Response<Body> {
    if plan.rule.is_some() {
        let (mut parts, body) = response.into_parts();
        for filters in plan.filters().into_iter().rev() {
            filter::apply_response(filters, plan.origin.as_ref(), &mut parts);
        }
        response = Response::from_parts(parts, body);
    }
    // A session that goes on where it was needs no new name, and never a new beginning.
    if let Some(persistence) = &plan.persistence
        && plan.session.is_none_or(|token| token.endpoint != endpoint)
    {
        let now = epoch();
        let began = plan.session.map_or(now, |token| token.began);
        persistence.announce(endpoint, began, now, response.headers_mut());
    }
    response
}

/// Seconds since 1970.
fn epoch() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
