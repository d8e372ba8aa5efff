//! The callee's half of a request: limited, told who calls, delivered to the app.
//!
//! Whoever calls [`deliver`] has judged the caller already: a tunnel's stream in `tunnel::serve`, the same node
//! in `http::caller`, plaintext in `inbound`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{HeaderName, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Response, StatusCode};
use mesh_api::errors::ProxyError;
use mesh_api::names::CLIENT_ID_HEADER;

use super::answer::{is_grpc, refusal, retry_after};
use super::apps::{AppError, AppKey, Counted};
use super::body::{Body, BodyError, ExchangeError};
use super::h1::{self, SendError};
use super::limits::{RateLimiter, charge_head};
use super::policy::RateLimit;
use super::story::{self, Story};
use super::upgrade::Upgraded;
use super::watched::{Bounds, Record, Sent, watch};
use super::{BoxedRequest, protocol, wire};
use crate::budget::Resource;
use crate::pods::Pod;
use crate::probe;
use crate::table::{ServicePort, Table};
use crate::telemetry::http::RequestLabels;
use crate::telemetry::{Party, Reporter, Security, TcpLabels};
use crate::worker::Worker;

const CLIENT_ID: HeaderName = HeaderName::from_static(CLIENT_ID_HEADER);
/// How often a request is sent that nobody else sends again, because the app closed a kept connection under it. Callers'
/// proxies do it within their limits.
const SENDS: usize = 3;

/// What is known of a request beside itself.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who calls. Without identity: from outside the mesh.
    pub caller: Party,
    /// The caller's address, which the app sees.
    pub source: IpAddr,
    /// The pod's address and port.
    pub target: SocketAddr,
    /// The Service that was addressed. None: the pod itself, or it is not known, as of plaintext.
    pub service: Option<Arc<ServicePort>>,
    /// How it came.
    pub security: Security,
    /// How long the connection to the app may take, if a policy says so.
    pub connect: Option<Duration>,
    /// Nobody on the way sends it again: the caller has no proxy, or one of a version that does not.
    pub alone: bool,
}

/// Delivers a request to an app of this node; every failure is an answer that names its cause. The request's
/// hop-by-hop headers, and all in the name of proxies, are gone already.
pub async fn deliver(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    call: &Call,
    request: BoxedRequest,
) -> Response<Body> {
    let BoxedRequest { mut head, body } = request;
    let grpc = is_grpc(&head.headers);
    let labels = RequestLabels {
        reporter: Reporter::Destination,
        source: call.caller.clone(),
        destination: Party::meshed(&pod.info.load().owner, &pod.identity),
        service: call.service.as_ref().map(|port| Arc::clone(&port.label)),
        route: None,
        backend: None,
        protocol: protocol(&head, grpc),
        security: call.security,
    };
    let telemetry = &worker.context.telemetry;
    let meter = worker.meters.lock().get(&telemetry.http, &labels);
    let mut sent = Sent::default();
    let mut record = Record::new(meter.start(&head.method), grpc);
    let addresses = (SocketAddr::new(call.source, 0), call.target);
    record.story = Story::begin(&worker.context, &mut head, &labels, addresses);
    let refuse = |record: &mut Record, error: ProxyError| {
        let response = refusal(error, grpc);
        record.error = Some(error);
        if record.story.is_none() {
            story::failed(&labels, addresses, response.status(), error);
        }
        response
    };
    let probe = is_probe(worker, pod, call, &head);
    let charge = pod.account.charge_for(Resource::Request, probe);
    let charge = match charge.and_then(|c| Ok((c, charge_head(&pod.account, &head.headers)?))) {
        Ok(charge) => charge,
        Err(error) => {
            let response = refuse(&mut record, error);
            return watch(response, record, Bounds::default(), ());
        }
    };
    if !probe && let Err((error, wait)) = limited(&worker.context.table, pod, call) {
        let mut response = refuse(&mut record, error);
        retry_after(&mut response, wait);
        return watch(response, record, Bounds::default(), ());
    }
    if let Some(identity) = &call.caller.identity
        && let Ok(value) = HeaderValue::from_str(identity.as_str())
    {
        head.headers.insert(CLIENT_ID, value);
    }
    let body = sent.count(body);
    record.sent = sent;
    let captured = pod.captured.enter();
    let response = match send(worker, pod, call, probe, BoxedRequest { head, body }).await {
        Ok(response) => response,
        Err(error) => refuse(&mut record, error),
    };
    watch(response, record, Bounds::default(), (charge, captured))
}

/// Sends it; where nobody else does it, again if the app closed a kept connection and nothing can be harmed by it.
async fn send(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    call: &Call,
    probe: bool,
    mut request: BoxedRequest,
) -> Result<Response<Body>, ProxyError> {
    let key = AppKey {
        pod: Arc::clone(pod),
        from: Some(call.source),
        to: call.target,
        version: request.head.version,
        counted: Some(Counted {
            telemetry: Arc::clone(&worker.context.telemetry),
            labels: TcpLabels {
                reporter: Reporter::Destination,
                source: call.caller.clone(),
                destination: Party::meshed(&pod.info.load().owner, &pod.identity),
                service: call.service.as_ref().map(|port| Arc::clone(&port.label)),
                security: call.security,
            },
        }),
        probe,
    };
    let connect = call.connect;
    for _ in 1..SENDS {
        let again = call.alone && request.head.method.is_idempotent();
        match worker.apps.send_within(&key, request, connect).await {
            Ok(response) => return Ok(from_app(response)),
            Err(AppError::ClosedIdle(Some(unsent))) if again => request = unsent,
            Err(error) => return Err(call.failure(&error)),
        }
    }
    let last = worker.apps.send_within(&key, request, connect).await;
    last.map(from_app).map_err(|error| call.failure(&error))
}

impl Call {
    /// As [`failure`], in words that a caller's proxy of any version knows.
    fn failure(&self, error: &AppError) -> ProxyError {
        match failure(error) {
            ProxyError::RefusedStream if self.alone => ProxyError::ConnectFailed,
            ProxyError::IdleClosed if self.alone => ProxyError::UpstreamReset,
            error => error,
        }
    }
}

/// What an app may say, in a form that can go on.
pub fn from_app(mut response: Response<Body>) -> Response<Body> {
    wire::clean(response.headers_mut());
    if !matches!(
        response.status(),
        StatusCode::SWITCHING_PROTOCOLS | StatusCode::UPGRADE_REQUIRED
    ) {
        response.headers_mut().remove(UPGRADE);
    }
    let raw = response.extensions_mut().remove::<h1::Upgraded>();
    if let Some(raw) = raw.and_then(|upgraded| upgraded.take()) {
        response.extensions_mut().insert(Upgraded::raw(raw));
    }
    response
}

/// The row of the error table for an app that gave no answer.
pub fn failure(error: &AppError) -> ProxyError {
    match error {
        AppError::Connect(error, _) => *error,
        AppError::Http2(error) if error.is_unprocessed() => ProxyError::RefusedStream,
        AppError::ClosedIdle(_) => ProxyError::IdleClosed,
        AppError::Http1(SendError::Refused(_)) => ProxyError::UpstreamProtocol,
        AppError::Http1(SendError::Body(body)) | AppError::Http2(ExchangeError::Body(body)) => {
            of_request_body(body)
        }
        AppError::Http1(SendError::Closed | SendError::Io(_)) => ProxyError::UpstreamReset,
        AppError::Http2(ExchangeError::Connection(error)) if !error.is_io() => {
            ProxyError::UpstreamProtocol
        }
        AppError::Http2(_) => ProxyError::UpstreamReset,
    }
}

/// The row for a request whose own body failed.
pub fn of_request_body(error: &BodyError) -> ProxyError {
    match error {
        BodyError::TooLarge => ProxyError::BodyTooLarge,
        BodyError::Framing => ProxyError::MalformedRequest,
        BodyError::Timeout => ProxyError::SlowRequest,
        BodyError::Limit => ProxyError::WorkloadLimit,
        _ => ProxyError::Cancelled,
    }
}

/// Judges a request by the rates of the Service that was addressed; where that is not known, by those of every
/// Service whose endpoint the app is: no way around a Service is a way around its limits.
fn limited(table: &Table, pod: &Pod, call: &Call) -> Result<(), (ProxyError, Duration)> {
    let all;
    let ports = match &call.service {
        Some(port) => std::slice::from_ref(port),
        None => {
            all = table.service_ports(call.target);
            &all
        }
    };
    let caller = call.caller.identity.as_ref();
    let mut taken: Vec<(Arc<RateLimiter>, Arc<RateLimit>)> = Vec::new();
    for port in ports {
        let rules = port.http.load();
        let Some(limit) = &rules.policy.rate_limit else {
            continue;
        };
        let now = Instant::now();
        let limiter = pod.rates.of(&port.reference, now);
        if let Err(limited) = limiter.check(limit, caller, now) {
            for (limiter, limit) in &taken {
                limiter.give_back(limit, caller, now);
            }
            return Err((ProxyError::RateLimited, limited.retry_after));
        }
        taken.push((limiter, Arc::clone(limit)));
    }
    Ok(())
}

/// Whether the kubelet asks what the pod declares: a pod whose callers use up its rate or its budget is not unhealthy.
fn is_probe(worker: &Worker, pod: &Pod, call: &Call, request: &Parts) -> bool {
    call.security == Security::Plaintext
        && worker.context.host.addresses.load().contains(&call.source)
        && probe::is_declared(&pod.info.load(), call.target.port(), request)
}
