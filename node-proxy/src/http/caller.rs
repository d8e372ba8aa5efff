//! The caller's half of a request: route, backend, endpoint, retries and time limits.
//!
//! ```text
//! request -> route (404) -> filters -> fault -> backend (500) -> place in flight (503)
//!         -> [endpoint (503) -> attempt] x retries -> filters, backwards -> app
//! ```
//!
//! One level only (GEP-1294): a backend's own routes are not looked at; its balancing, limits and retry budget are.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::header::{HeaderMap, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Request, Response};
use http_body::Body as _;
use mesh_api::errors::ProxyError;
use parking_lot::Mutex;
use rand::Rng;
use tokio::time::Instant as Clock;

use super::answer::{answer, is_grpc, refusal};
use super::attempt::{Answer, Caller, Failed, Way};
use super::body::Body;
use super::h1::remove_hop_by_hop;
use super::limits::Permit;
use super::policy::{OverBudget, Policy};
use super::retry::{Cause, Pushback, Replay, should_retry};
use super::route::filter::{self, Outcome, RequestContext};
use super::route::{Backend, Choice, PortRules, Rule, Session as Persistence};
use super::story::{self, Story};
use super::upgrade::Upgraded;
use super::watched::{Bounds, Record, Sent, grpc_status, watch};
use super::{fault, mirror, protocol, wire};
use crate::balance::{Pick, PickContext};
use crate::budget::{Charge, Resource};
use crate::pods::Pod;
use crate::table::ServicePort;
use crate::telemetry::http::{MeterCache, RequestLabels};
use crate::telemetry::{Party, Reporter, Security};
use crate::worker::Worker;

/// What the original destination of a connection stands for.
#[derive(Clone, Debug)]
pub enum Target {
    /// A declared port of a Service.
    Service(Arc<ServicePort>),
    /// A pod of the mesh, by its address. Not routed (GEP-1294).
    Pod(SocketAddr),
    /// A pod of the mesh that takes connections only.
    Opaque(SocketAddr),
    /// Outside the mesh.
    Outside(SocketAddr),
}

/// The requests of one connection of a meshed pod.
#[derive(Debug)]
pub struct Session {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    party: Party,
    source: SocketAddr,
    destination: SocketAddr,
    target: Target,
    v6: bool,
    meters: Mutex<MeterCache>,
}

/// How long a rule's backend that has been asked for is waited for.
const BACKEND_WAIT: Duration = Duration::from_secs(2);
/// No connect timeout is set: longer than any socket of the stock takes.
const LONG: Duration = Duration::from_secs(3600);

/// What a request is sent by: the rule's decisions, or none.
struct Plan {
    rules: Arc<PortRules>,
    rule: Option<Arc<Rule>>,
    /// Index into the rule's backends.
    backend: Option<usize>,
    origin: Option<HeaderValue>,
    /// The session that the request came with: its endpoint, and when it began.
    session: Option<(SocketAddr, u64)>,
    /// Where it goes.
    to: Goal,
    policy: Arc<Policy>,
}

enum Goal {
    Port(Arc<ServicePort>),
    Address(SocketAddr),
}

/// A request that goes no further.
enum Stop {
    Error(ProxyError),
    Answer(Box<Response<Body>>, Option<ProxyError>),
}

impl From<ProxyError> for Stop {
    fn from(error: ProxyError) -> Self {
        Self::Error(error)
    }
}

impl Session {
    /// A connection from `source` in `pod`.
    pub fn new(
        worker: Arc<Worker>,
        pod: Arc<Pod>,
        party: Party,
        (source, destination): (SocketAddr, SocketAddr),
        target: Target,
    ) -> Self {
        Self {
            worker,
            pod,
            party,
            source,
            destination,
            target,
            v6: destination.is_ipv6(),
            meters: Mutex::default(),
        }
    }

    /// Answers one request.
    pub async fn handle(&self, request: Request<Body>) -> Response<Body> {
        let (mut parts, body) = request.into_parts();
        wire::strip(&mut parts.headers);
        if let Some(protocol) = remove_hop_by_hop(&mut parts.headers) {
            parts.headers.insert(UPGRADE, protocol);
        }
        let grpc = is_grpc(&parts.headers);
        let head = Request::from_parts(parts, ());
        let labels = RequestLabels {
            reporter: Reporter::Source,
            source: self.party.clone(),
            destination: Party::unknown(),
            service: match &self.target {
                Target::Service(port) => Some(Arc::clone(&port.label)),
                _ => None,
            },
            route: None,
            backend: None,
            protocol: protocol(&head, grpc),
            security: Security::Plaintext,
        };
        let meter = self.meter(&labels);
        let record = Record {
            request: meter.start(head.method()),
            error: None,
            pick: None,
            judged: false,
            latency: Duration::ZERO,
            sent: Sent::default(),
            grpc,
            story: None,
        };
        let mut parts = head.into_parts().0;
        let addresses = (self.source, self.destination);
        let story = Story::begin(&self.worker.context, &mut parts, &labels, addresses);
        let record = Record { story, ..record };
        let exchange = Exchange {
            session: self,
            labels,
            record,
            bounds: Bounds::default(),
            permit: None,
            charge: None,
        };
        exchange.run(parts, body).await
    }

    fn meter(&self, labels: &RequestLabels) -> Arc<crate::telemetry::http::RequestMeter> {
        self.meters
            .lock()
            .get(&self.worker.context.telemetry.http, labels)
    }

    /// Sends a copy of a request beside the request, if the pod may have one more in flight: a slow mirror must not
    /// gather copies without bound.
    pub(super) fn spawn_copy(&self, backend: Arc<Backend>, parts: Parts, body: Body) {
        let Ok(charge) = self.pod.account.charge(Resource::Request) else {
            return;
        };
        let (worker, pod) = (Arc::clone(&self.worker), Arc::clone(&self.pod));
        let (party, source, v6) = (self.party.clone(), self.source, self.v6);
        self.worker.spawn(async move {
            let caller = Caller {
                worker: &worker,
                pod: &pod,
                party: &party,
                source,
            };
            mirror::deliver(caller, v6, &backend, parts, body).await;
            drop(charge);
        });
    }

    fn caller(&self) -> Caller<'_> {
        Caller {
            worker: &self.worker,
            pod: &self.pod,
            party: &self.party,
            source: self.source,
        }
    }
}

/// One request on its way.
struct Exchange<'a> {
    session: &'a Session,
    labels: RequestLabels,
    record: Record,
    bounds: Bounds,
    permit: Option<Permit>,
    charge: Option<Charge>,
}

impl Exchange<'_> {
    async fn run(mut self, parts: Parts, body: Body) -> Response<Body> {
        let grpc = self.record.grpc;
        let (mut response, error) = match self.carry(parts, body).await {
            Ok(answered) => answered,
            Err(Stop::Error(error)) => (refusal(error, grpc), Some(error)),
            Err(Stop::Answer(response, error)) => (*response, error),
        };
        self.record.error = error;
        if let (Some(error), None) = (error, &self.record.story) {
            let addresses = (self.session.source, self.session.destination);
            story::failed(&self.labels, addresses, response.status(), error);
        }
        let upgraded = response.extensions_mut().remove::<Upgraded>();
        let mut response = watch(
            response,
            self.record,
            self.bounds,
            (self.permit, self.charge),
        );
        if let Some(upgraded) = upgraded {
            response.extensions_mut().insert(upgraded);
        }
        response
    }

    async fn carry(
        &mut self,
        mut parts: Parts,
        body: Body,
    ) -> Result<(Response<Body>, Option<ProxyError>), Stop> {
        self.charge = Some(self.session.pod.account.charge(Resource::Request)?);
        let plan = self.plan(&mut parts).await?;
        self.inject(&plan.policy).await?;
        let now = Instant::now();
        let timeouts = &plan.policy.timeouts;
        let own = grpc_timeout(&parts.headers).filter(|_| self.record.grpc);
        let limit = timeouts.request.into_iter().chain(own).min();
        self.bounds.deadline = limit.map(|limit| Clock::now() + limit);
        self.bounds.idle = timeouts.idle;
        if let Goal::Port(port) = &plan.to {
            port.state.request(&plan.policy, now);
            let limits = port.http.load_full();
            let place = port.state.admit(&limits.policy).await;
            self.permit = Some(place.map_err(|_| ProxyError::QueueFull)?);
        }
        let mut body = self.record.sent.count(body);
        if let Some(rule) = &plan.rule {
            let chosen = plan.backend.map(|index| &rule.backends[index]);
            let filters = [&rule.filters[..], chosen.map_or(&[], |b| &b.filters[..])];
            let session = self.session;
            let copying = async {
                for list in filters {
                    body = mirror::send(session, list, &parts, body).await;
                }
                body
            };
            // A copy is made of a body that is here: that, too, is time of the request's.
            body = match self.bounds.deadline {
                None => copying.await,
                Some(deadline) => tokio::time::timeout_at(deadline, copying)
                    .await
                    .map_err(|_late| ProxyError::RequestTimeout)?,
            };
        }
        let deadline = self.bounds.deadline;
        let tries = self.tries(&plan, parts, body);
        let (Answer { response, error }, endpoint) = match deadline {
            None => tries.await?,
            Some(deadline) => tokio::time::timeout_at(deadline, tries)
                .await
                .unwrap_or(Err(Stop::Error(ProxyError::RequestTimeout)))?,
        };
        Ok((finish(&plan, response, endpoint), error))
    }

    /// Which rule, which backend, and what they change of the request.
    async fn plan(&mut self, parts: &mut Parts) -> Result<Plan, Stop> {
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
        self.stop_at(applied, &rule.filters, origin.as_ref())?;
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
        self.stop_at(applied, &backend.filters, origin.as_ref())?;
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

    fn stop_at(
        &mut self,
        applied: Outcome,
        filters: &[filter::Filter],
        origin: Option<&HeaderValue>,
    ) -> Result<(), Stop> {
        let Outcome::Respond(response) = applied else {
            return Ok(());
        };
        let _ = (filters, origin);
        // A redirect or a preflight is what the user asked for, not a failure.
        Err(Stop::Answer(
            Box::new(response.map(|()| Body::empty())),
            None,
        ))
    }

    async fn backend_port(&self, backend: &Backend) -> Result<Arc<ServicePort>, ProxyError> {
        if let Some(port) = backend.service_port() {
            return Ok(port);
        }
        let table = &self.session.worker.context.table;
        let found = table.find_backend(backend, BACKEND_WAIT).await;
        found.ok_or(ProxyError::InvalidBackend)
    }

    async fn inject(&mut self, policy: &Policy) -> Result<(), Stop> {
        let Some(fault) = &policy.fault else {
            return Ok(());
        };
        let decided = fault::decide(fault, &mut rand::rng());
        if let Some(delay) = decided.delay {
            tokio::time::sleep(delay).await;
        }
        let Some(abort) = decided.abort else {
            return Ok(());
        };
        let error = ProxyError::FaultAbort;
        let grpc = self.record.grpc && abort.grpc_code.is_some();
        let code = abort.grpc_code.and_then(|code| u8::try_from(code).ok());
        let code = code.unwrap_or(error.grpc_status());
        let response = answer(abort.status, code, error, grpc);
        Err(Stop::Answer(Box::new(response), Some(error)))
    }

    /// Tries until there is an answer to give.
    async fn tries(
        &mut self,
        plan: &Plan,
        parts: Parts,
        body: Body,
    ) -> Result<(Answer, SocketAddr), Stop> {
        let policy = &plan.policy;
        let mut source = Source::new(body, policy);
        let mut tried = Vec::new();
        let mut retries = 0;
        let mut last: Option<ProxyError> = None;
        loop {
            let (pick, to) = match self.endpoint(plan, &parts.headers, &tried) {
                Some(found) => found,
                None => return Err(last.unwrap_or(ProxyError::NoEndpoint).into()),
            };
            self.record.pick = pick;
            self.record.judged = false;
            let Some(body) = source.body() else {
                return Err(last.unwrap_or(ProxyError::Internal).into());
            };
            let begun = Instant::now();
            let result = self.attempt(plan, to, parts.clone(), body).await;
            self.record.latency = begun.elapsed();
            let (cause, failed) = match &result {
                Ok(answered) => (answer_cause(answered, self.record.grpc), None),
                Err(failed) => (failed.cause, Some(failed.error)),
            };
            let Some(cause) = cause else {
                source.commit();
                return give(result, to);
            };
            let pause = should_retry(
                policy,
                retries,
                cause,
                &parts.method,
                source.is_replayable(),
                &mut rand::rng(),
            );
            let Some(pause) = pause else {
                source.commit();
                if failed.is_some() {
                    self.record.judge(false);
                }
                return give(result, to);
            };
            let over_deadline = self
                .bounds
                .deadline
                .is_some_and(|deadline| Clock::now() + pause >= deadline);
            if over_deadline || !self.may_retry(plan) {
                if !over_deadline {
                    self.record.request.retry_budget_exhausted();
                }
                if failed.is_some() {
                    self.record.judge(false);
                }
                if policy.retry.budget.over == OverBudget::Unavailable && !over_deadline {
                    return Err(ProxyError::RetryBudget.into());
                }
                return give(result, to);
            }
            self.record.judge(false);
            self.record.request.retried();
            if let Some(story) = &mut self.record.story {
                story.retries += 1;
            }
            last = failed.or(last);
            tried.push(to);
            retries += 1;
            drop(result);
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    }

    fn may_retry(&self, plan: &Plan) -> bool {
        match &plan.to {
            Goal::Port(port) => port.state.try_retry(&plan.policy, Instant::now()),
            Goal::Address(_) => true,
        }
    }

    /// The next endpoint. One that failed is tried again only where there is no other.
    fn endpoint(
        &self,
        plan: &Plan,
        headers: &HeaderMap,
        tried: &[SocketAddr],
    ) -> Option<(Option<Pick>, SocketAddr)> {
        let port = match &plan.to {
            Goal::Address(to) => return Some((None, *to)),
            Goal::Port(port) => port,
        };
        let rules = port.http.load();
        let policy = &rules.policy.balance;
        let hash = policy.hash_key.as_ref();
        let info = self.session.pod.info.load();
        let session = plan.session.map(|(endpoint, _began)| endpoint);
        let mut context = PickContext {
            policy,
            v6: self.session.v6,
            tried,
            hash: hash.and_then(|key| key.of(headers, self.session.source.ip())),
            session,
            node: &self.session.worker.context.node,
            zone: &info.zone,
            local_only: port.internal_traffic_local,
            now: Instant::now(),
        };
        let mut pick = port.endpoints.pick_with(&context);
        if pick.is_none() && !tried.is_empty() {
            context.tried = &[];
            pick = port.endpoints.pick_with(&context);
        }
        let pick = pick?;
        let to = pick.address();
        Some((Some(pick), to))
    }

    async fn attempt(
        &mut self,
        plan: &Plan,
        to: SocketAddr,
        parts: Parts,
        body: Body,
    ) -> Result<Answer, Failed> {
        let session = self.session;
        let caller = session.caller();
        let way = Way::to(&caller, to).map_err(|error| Failed {
            error,
            cause: error.retryable().then_some(Cause::ConnectFailure),
        })?;
        self.labels.destination = way.party.clone();
        self.labels.security = way.security;
        self.record.request.move_to(&session.meter(&self.labels));
        if let Some(story) = &mut self.record.story {
            story.labels = self.labels.clone();
            story.destination = to;
        }
        let timeouts = &plan.policy.timeouts;
        let service = match &plan.to {
            Goal::Port(port) => Some(port),
            Goal::Address(_) => None,
        };
        let connect = timeouts.connect.unwrap_or(LONG);
        let sending = way.send(&caller, service, parts, body, connect);
        let (limit, error) = match (timeouts.per_try, timeouts.response_headers) {
            (None, None) => return sending.await,
            (Some(a), Some(b)) if b < a => (b, ProxyError::ResponseHeadersTimeout),
            (Some(a), _) => (a, ProxyError::TryTimeout),
            (None, Some(b)) => (b, ProxyError::ResponseHeadersTimeout),
        };
        tokio::time::timeout(limit, sending)
            .await
            .unwrap_or(Err(Failed {
                error,
                cause: Some(Cause::Timeout),
            }))
    }
}

/// A body, as often as it is needed.
enum Source {
    Empty,
    Once(Option<Body>),
    Replay(Replay<Body>),
}

impl Source {
    fn new(body: Body, policy: &Policy) -> Self {
        if body.is_end_stream() {
            Self::Empty
        } else if policy.retry.attempts == 0 {
            Self::Once(Some(body))
        } else {
            Self::Replay(Replay::new(body, policy.retry.max_body))
        }
    }

    fn body(&mut self) -> Option<Body> {
        match self {
            Self::Empty => Some(Body::empty()),
            Self::Once(body) => body.take(),
            Self::Replay(replay) => replay.attempt().map(Body::boxed),
        }
    }

    /// There is no further try: what goes on does so without being kept.
    fn commit(&self) {
        if let Self::Replay(replay) = self {
            replay.commit();
        }
    }

    fn is_replayable(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Once(body) => body.is_some(),
            Self::Replay(replay) => replay.is_replayable(),
        }
    }
}

fn give(result: Result<Answer, Failed>, to: SocketAddr) -> Result<(Answer, SocketAddr), Stop> {
    match result {
        Ok(answer) => Ok((answer, to)),
        Err(failed) => Err(failed.error.into()),
    }
}

/// What an answer may be tried again for.
fn answer_cause(answered: &Answer, grpc: bool) -> Option<Cause> {
    let headers = answered.response.headers();
    let status = answered.response.status();
    let grpc_code = grpc_status(headers).filter(|_| grpc).map(u32::from);
    let failure = status.is_client_error() || status.is_server_error();
    (failure || grpc_code.is_some_and(|code| code != 0)).then(|| Cause::Answer {
        status,
        grpc_code,
        pushback: Pushback::of(headers, SystemTime::now()),
    })
}

/// The way back: the backend's filters, then the rule's.
fn finish(plan: &Plan, response: Response<Body>, endpoint: SocketAddr) -> Response<Body> {
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

/// `grpc-timeout` (gRPC over HTTP/2, "Timeout").
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", value.parse().unwrap());
            grpc_timeout(&headers)
        };
        assert_eq!(of("250m"), Some(Duration::from_millis(250)));
        assert_eq!(of("2S"), Some(Duration::from_secs(2)));
        assert_eq!(of("1H"), Some(Duration::from_secs(3600)));
        for bad in ["", "S", "1", "1x", "123456789S", "-1S", "1é"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
