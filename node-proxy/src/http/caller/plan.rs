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
use crate::http::route::{Backend, Choice, Rule, Session as Persistence, Token};
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

    /// Keeps the session of a backend's Service that the request came with, and gives the backend.
    fn resume<'a>(&mut self, rule: &'a Rule, request: &HeaderMap) -> Option<&'a Backend> {
        let (backend, persistence, token) = rule.resume(request, epoch())?;
        self.persistence = Some(persistence);
        self.session = Some(token);
        Some(backend)
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
        let of_backends = rule.session.is_none() && rule.has_backend_session();
        let bound = match of_backends {
            true => plan.resume(rule, &parts.headers),
            false => plan
                .session
                .and_then(|token| rule.backend_with(token.endpoint)),
        };
        // A session goes before weights (GEP-1619, "Traffic Splitting").
        let choice = match bound {
            Some(backend) => Choice::Backend(backend),
            None => rule.choose(rand::rng().random()),
        };
        if of_backends
            && bound.is_none()
            && let Choice::Backend(backend) = choice
        {
            plan.keep(backend.session().as_ref(), &parts.headers);
        }
        let context = RequestContext {
            prefix: prefix.as_deref(),
            service_port: port.port,
        };
        let (backend, origin) = pass(rule, choice, parts, &context)?;
        plan.origin = origin;
        let to = self.backend_port(backend).await?;
        self.labels.backend = Some(Arc::clone(&to.backend));
        // `choose`, `resume` and `backend_with` give one of them.
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

/// The way there: the rule's filters, then the backend's. Gives the backend, and the origin for the way back.
fn pass<'a>(
    rule: &Rule,
    choice: Choice<'a>,
    parts: &mut Parts,
    context: &RequestContext<'_>,
) -> Result<(&'a Backend, Option<HeaderValue>), Stop> {
    let origin = filter::origin(&rule.filters, &parts.headers);
    let applied = filter::apply_request(&rule.filters, parts, context);
    go_on(applied, &[rule.filters.as_slice()], origin.as_ref())?;
    let Choice::Backend(backend) = choice else {
        return Err(ProxyError::InvalidBackend.into());
    };
    let origin = origin.or_else(|| filter::origin(&backend.filters, &parts.headers));
    let applied = filter::apply_request(&backend.filters, parts, context);
    let back = [backend.filters.as_slice(), rule.filters.as_slice()];
    go_on(applied, &back, origin.as_ref())?;
    Ok((backend, origin))
}

/// A redirect or a preflight is what the user asked for, not a failure. A redirect goes back through the filters; the
/// answer to a preflight is complete.
fn go_on(applied: Outcome, back: &[&[Filter]], origin: Option<&HeaderValue>) -> Result<(), Stop> {
    match applied {
        Outcome::Continue => Ok(()),
        Outcome::Respond(response) => {
            let (mut head, ()) = response.into_parts();
            if head.status.is_redirection() {
                for filters in back {
                    filter::apply_response(filters, origin, &mut head);
                }
            }
            let response = Response::from_parts(head, Body::empty());
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

#[cfg(test)]
mod tests {
    use http::Request;
    use mesh_api::proto::mesh;
    use mesh_api::proto::mesh::route_filter::Filter as Wire;

    use super::*;
    use crate::http::route::{Route, build};

    const APP: &str = "https://app.example.org";

    fn rule(filters: Vec<Wire>, of_backend: Vec<Wire>) -> Arc<Rule> {
        let all = |filters: Vec<Wire>| -> Vec<mesh::RouteFilter> {
            let filters = filters.into_iter().map(Some);
            filters.map(|filter| mesh::RouteFilter { filter }).collect()
        };
        let backend = mesh::RouteBackend {
            namespace: "demo".into(),
            service: "v1".into(),
            port: 80,
            weight: 1,
            filters: all(of_backend),
            ..Default::default()
        };
        let rule = mesh::RouteRule {
            filters: all(filters),
            backends: vec![backend],
            ..Default::default()
        };
        let wire = mesh::Route {
            kind: mesh::RouteKind::Http.into(),
            namespace: "demo".into(),
            name: "web".into(),
            rules: vec![rule],
            ..Default::default()
        };
        let mut targets = |_: &str, _: u16| Arc::new(crate::table::Target::default());
        let route = Route::compile("httproute/demo/web", wire, &mut targets).unwrap();
        let set = build(&[&route], |_, _| Arc::default()).unwrap();
        Arc::clone(set.rules().next().unwrap())
    }

    fn redirect() -> Wire {
        Wire::RequestRedirect(mesh::RequestRedirect {
            hostname: "example.org".into(),
            status_code: 302,
            ..Default::default()
        })
    }

    fn cors() -> Wire {
        Wire::Cors(mesh::Cors {
            allow_origins: vec![APP.into()],
            allow_methods: vec!["*".into()],
            ..Default::default()
        })
    }

    /// Says in the answer who was there last.
    fn mark(by: &str) -> Wire {
        let header = mesh::Header {
            name: "x-last".into(),
            value: by.into(),
        };
        Wire::ResponseHeaderModifier(mesh::HeaderModifier {
            set: vec![header],
            ..Default::default()
        })
    }

    /// Status, `x-last`, `access-control-allow-origin` of the answer that the filters give to a request.
    fn answered(rule: &Rule, method: &str) -> (u16, String, String) {
        let request = Request::builder()
            .method(method)
            .uri("/")
            .header("host", "web")
            .header("origin", APP)
            .header("access-control-request-method", "PUT");
        let mut parts = request.body(()).unwrap().into_parts().0;
        let context = RequestContext {
            prefix: None,
            service_port: 80,
        };
        let Err(Stop::Answer(answer, None)) = pass(rule, rule.choose(0), &mut parts, &context)
        else {
            panic!("the filters answer");
        };
        let field = |name: &str| {
            let value = answer.headers().get(name);
            value.map_or("", |v| v.to_str().unwrap()).to_owned()
        };
        let origin = field("access-control-allow-origin");
        (answer.status().as_u16(), field("x-last"), origin)
    }

    #[test]
    fn redirects_go_back_through_the_filters() {
        // HTTPRouteFilter ResponseHeaderModifier and CORS: they are about every answer.
        let at_rule = rule(vec![cors(), redirect(), mark("rule")], vec![]);
        assert_eq!(
            answered(&at_rule, "GET"),
            (302, "rule".into(), APP.into()),
            "the backend's filters have no part in it"
        );
        let at_backend = rule(vec![], vec![cors(), redirect(), mark("backend")]);
        let expected = (302, "backend".into(), APP.into());
        assert_eq!(answered(&at_backend, "GET"), expected);
        let at_both = rule(
            vec![cors(), mark("rule")],
            vec![redirect(), mark("backend")],
        );
        let expected = (302, "rule".into(), APP.into());
        assert_eq!(answered(&at_both, "GET"), expected, "the rule's come last");
    }

    #[test]
    fn the_answer_to_a_preflight_is_complete() {
        let rule = rule(vec![cors(), redirect(), mark("rule")], vec![]);
        let expected = (204, String::new(), APP.into());
        assert_eq!(answered(&rule, "OPTIONS"), expected);
    }
}
