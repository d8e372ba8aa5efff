//! The caller's half of a request: route, backend, endpoint, retries and time limits.
//!
//! ```text
//! request -> route (404) -> filters -> fault -> backend (500) -> place in flight (503)
//!         -> [endpoint (503) -> attempt] x retries -> filters, backwards -> app
//! ```
//!
//! One level only (GEP-1294): a backend's own routes are not looked at; its balancing, limits and retry budget are.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::Response;
use http::header::HeaderMap;
use http::request::Parts;
use mesh_api::errors::ProxyError;
use parking_lot::Mutex;
use tokio::time::{Instant as Clock, timeout_at};

use super::answer::{answer, is_grpc, refusal};
use super::attempt::{Answer, Caller};
use super::body::Body;
use super::limits::{Permit, charge_head};
use super::policy::Fault;
use super::route::Backend;
use super::story::{self, Story};
use super::watched::{Bounds, Record, Sent, still, watch};
use super::{BoxedRequest, fault, mirror, protocol};
use crate::budget::{Charge, Resource};
use crate::pods::Pod;
use crate::table::ServicePort;
use crate::telemetry::http::{MeterCache, RequestLabels};
use crate::telemetry::{OpenConnection, Party, Reporter, Security, TcpLabels};
use crate::worker::Worker;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod plan;
mod tries;

use plan::{Goal, Plan, finish};

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
    /// Its place in the TCP metrics, under what its first request with an answer was.
    open: OnceLock<OpenConnection>,
}

/// An answer, and why it is a proxy's own.
type Answered = (Response<Body>, Option<ProxyError>);

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
            open: OnceLock::new(),
        }
    }

    /// Answers one request.
    pub async fn handle(&self, request: BoxedRequest) -> Response<Body> {
        let BoxedRequest { mut head, body } = request;
        let grpc = is_grpc(&head.headers);
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
        let mut record = Record::new(meter.start(&head.method), grpc);
        let addresses = (self.source, self.destination);
        record.story = Story::begin(&self.worker.context, &mut head, &labels, addresses);
        let mut exchange = Exchange {
            session: self,
            labels,
            record,
            bounds: Bounds::default(),
            permit: None,
            charge: None,
        };
        let carried = exchange.carry(&mut head, body).await;
        exchange.finish(carried)
    }

    fn meter(&self, labels: &RequestLabels) -> Arc<crate::telemetry::http::RequestMeter> {
        self.meters
            .lock()
            .get(&self.worker.context.telemetry.http, labels)
    }

    /// Sends a copy of a request beside the request, if the pod may have one more in flight: a slow mirror must not
    /// gather copies without bound.
    pub(super) fn spawn_copy(&self, backend: Arc<Backend>, request: BoxedRequest) {
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
            mirror::deliver(caller, v6, &backend, request).await;
            drop(charge);
        });
    }

    /// Counts the connection as established.
    fn count(&self, labels: &RequestLabels) {
        self.open.get_or_init(|| {
            self.worker.context.telemetry.open(&TcpLabels {
                reporter: labels.reporter,
                source: labels.source.clone(),
                destination: labels.destination.clone(),
                service: labels.service.clone(),
                security: labels.security,
            })
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
    /// The request, and its head if that is large.
    charge: Option<(Charge, Option<Charge>)>,
}

impl Exchange<'_> {
    fn finish(mut self, carried: Result<Answered, Stop>) -> Response<Body> {
        let grpc = self.record.grpc;
        let (response, error) = match carried {
            Ok(answered) => answered,
            Err(Stop::Error(error)) => (refusal(error, grpc), Some(error)),
            Err(Stop::Answer(response, error)) => (*response, error),
        };
        self.record.error = error;
        if let (Some(error), None) = (error, &self.record.story) {
            let addresses = (self.session.source, self.session.destination);
            story::failed(&self.labels, addresses, response.status(), error);
        }
        watch(
            response,
            self.record,
            self.bounds,
            (self.permit, self.charge),
        )
    }

    async fn carry(&mut self, parts: &mut Parts, body: Body) -> Result<Answered, Stop> {
        let account = &self.session.pod.account;
        let charge = account.charge(Resource::Request)?;
        self.charge = Some((charge, charge_head(account, &parts.headers)?));
        let (plan, to) = self.plan(parts).await?;
        let timeouts = &plan.policy.timeouts;
        let own = grpc_timeout(&parts.headers).filter(|_| self.record.grpc);
        let limit = timeouts.request.into_iter().chain(own).min();
        let begun = Clock::now();
        let deadline = limit.map(|limit| begun + limit);
        self.bounds.deadline = deadline.map(|at| (at, ProxyError::RequestTimeout));
        self.bounds.idle = timeouts.idle;
        if timeouts.idle.is_some() {
            self.record.sent = Sent::timed();
        }
        let body = self.record.sent.count(body);
        let answering = self.answer(&plan, &to, parts, body);
        let answered = match deadline {
            None => answering.await,
            Some(at) => timeout_at(at, answering)
                .await
                .unwrap_or(Err(ProxyError::RequestTimeout.into())),
        };
        // How little time a caller gives, or how slowly it sends, says nothing of the endpoint.
        self.record.by_caller = own.is_some() && own == limit;
        match answered {
            Err(Stop::Error(ProxyError::RequestTimeout)) if self.record.by_caller => {
                self.record.pick = None;
            }
            Err(Stop::Error(ProxyError::IdleTimeout)) if !self.record.sent.has_ended() => {
                self.record.pick = None;
            }
            Err(Stop::Error(ProxyError::RequestTimeout | ProxyError::IdleTimeout)) => {
                self.record.latency = begun.elapsed();
            }
            _ => {}
        }
        let (Answer { response, error }, endpoint) = answered?;
        Ok((finish(&plan, response, endpoint), error))
    }

    /// All that the request's time limit is for: faults, a place in flight, copies, tries.
    async fn answer(
        &mut self,
        plan: &Plan,
        to: &Goal,
        parts: &Parts,
        mut body: Body,
    ) -> Result<(Answer, SocketAddr), Stop> {
        if let Some(fault) = &plan.policy.fault {
            Box::pin(self.inject(fault)).await?;
        }
        if let Goal::Port(port) = to {
            let limits = port.http.load_full();
            let budget = plan.policy.by_rule.budget(&limits.policy);
            port.state.request(&budget, Instant::now());
            let place = port.state.admit(&limits.policy).await;
            self.permit = Some(place.map_err(|_| ProxyError::QueueFull)?);
        }
        for filters in plan.filters() {
            body = mirror::send(self.session, filters, parts, body).await;
        }
        let sent = self.record.sent.clone();
        let tries = self.tries(plan, to, parts, body);
        let Some(idle) = plan.policy.timeouts.idle else {
            return tries.await;
        };
        let mut tries = pin!(tries);
        let directions = [&sent];
        tokio::select! {
            biased;
            answered = &mut tries => answered,
            () = still(idle, &directions) => Err(ProxyError::IdleTimeout.into()),
        }
    }

    async fn inject(&mut self, fault: &Fault) -> Result<(), Stop> {
        let decided = fault::decide(fault, &mut rand::rng());
        if let Some(delay) = decided.delay {
            self.record.delayed = true;
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
}

/// `grpc-timeout` (gRPC over HTTP/2, "Timeout").
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
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
        for bad in ["", "S", "1", "1x", "123456789S", "-1S", "+1S", "1é"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
