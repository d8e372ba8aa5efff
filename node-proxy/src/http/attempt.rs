//! One try of a request at one endpoint: on this node, through a tunnel, or outside the mesh.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::UPGRADE;
use http::{Method, Response, StatusCode};
use http_body::Body as _;
use mesh_api::errors::ProxyError;
use mesh_api::names::PROXY_ERROR_HEADER;

use super::BoxedRequest;
use super::apps::{AppError, AppKey};
use super::body::{Body, ExchangeError, exchange};
use super::callee::{self, Call, failure, from_app};
use super::retry::Cause;
use super::upgrade::{Upgraded, deferred};
use super::wire::{self, Envelope};
use crate::outbound::judge_local;
use crate::pods::Pod;
use crate::resolve::{self, Path};
use crate::table::ServicePort;
use crate::telemetry::{Party, Security};
use crate::tunnel::pool::{Dialer, Key};
use crate::tunnel::tls;
use crate::worker::Worker;

/// Who calls, and as what.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// The thread.
    pub worker: &'a Arc<Worker>,
    /// The caller's pod.
    pub pod: &'a Arc<Pod>,
    /// The caller in metrics.
    pub party: &'a Party,
    /// Its address.
    pub source: SocketAddr,
}

/// An answer, perhaps one that the callee's proxy made.
#[derive(Debug)]
pub struct Answer {
    /// The answer.
    pub response: Response<Body>,
    /// Why it is a proxy's own.
    pub error: Option<ProxyError>,
}

/// No answer.
#[derive(Clone, Copy, Debug)]
pub struct Failed {
    /// What the caller is told.
    pub error: ProxyError,
    /// What it means for another try. `None`: there is none.
    pub cause: Option<Cause>,
}

impl Failed {
    /// Before anything was sent.
    pub fn unsent(error: ProxyError) -> Self {
        let cause = error.retryable().then_some(Cause::ConnectFailure);
        Self { error, cause }
    }
}

/// The endpoint as it is told in metrics, and how it is reached.
#[derive(Debug)]
pub struct Way {
    path: Path,
    to: SocketAddr,
    /// The callee in metrics.
    pub party: Party,
    /// How the request travels.
    pub security: Security,
}

impl Way {
    /// The way to `to`.
    pub fn to(caller: &Caller<'_>, to: SocketAddr) -> Result<Self, ProxyError> {
        let context = &caller.worker.context;
        let path = resolve::path(&context.table, &context.pods, &context.node, to)?;
        let (party, security) = match &path {
            Path::Direct => {
                let known = context.table.workload(to.ip());
                let party = known.map_or_else(Party::unknown, |w| Party::of(&w));
                (party, Security::Plaintext)
            }
            Path::Local(workload, _) | Path::Tunnel(workload, _) | Path::Hbone(workload, _) => {
                (Party::of(workload), Security::MutualTls)
            }
        };
        Ok(Self {
            path,
            to,
            party,
            security,
        })
    }

    /// Whether it leads through a tunnel.
    pub fn is_tunnel(&self) -> bool {
        matches!(self.path, Path::Tunnel(..) | Path::Hbone(..))
    }

    /// Sends a request that way and waits for the head of the answer. `connect`: how long each connection on the way may
    /// take, if a policy says so. Each way is boxed: what the longest of them
    /// holds would otherwise be moved through every future around it.
    pub async fn send(
        self,
        caller: &Caller<'_>,
        service: Option<&Arc<ServicePort>>,
        request: BoxedRequest,
        connect: Option<Duration>,
    ) -> Result<Answer, Failed> {
        match self.path {
            Path::Local(workload, pod) => {
                let (context, source) = (&caller.worker.context, caller.source.ip());
                judge_local(context, caller.pod, source, &workload, &pod)
                    .map_err(Failed::unsent)?;
                let call = Call {
                    caller: caller.party.clone(),
                    source: caller.source.ip(),
                    target: self.to,
                    service: service.cloned(),
                    security: Security::MutualTls,
                    connect,
                    alone: false,
                };
                let response = Box::pin(callee::deliver(caller.worker, &pod, &call, request)).await;
                let error = wire::error(response.headers());
                named(response, error)
            }
            Path::Direct => Box::pin(outside(caller, self.to, request, connect)).await,
            Path::Tunnel(workload, address) => {
                let key = Key {
                    caller: caller.pod.identity.clone(),
                    callee: workload.identity.clone(),
                    address,
                    kind: tls::Kind::Warren,
                    source: None,
                };
                let envelope = Envelope {
                    target: self.to,
                    source: caller.source.ip(),
                    service: service.map(|port| Arc::clone(&port.reference)),
                    connect,
                    retries: true,
                };
                let sending = through_tunnel(caller, &key, &envelope, request);
                Box::pin(sending).await
            }
            // HBONE peers take connections, not requests.
            Path::Hbone(..) => Err(Failed {
                error: ProxyError::UnsupportedProtocol,
                cause: None,
            }),
        }
    }
}

async fn outside(
    caller: &Caller<'_>,
    to: SocketAddr,
    request: BoxedRequest,
    connect: Option<Duration>,
) -> Result<Answer, Failed> {
    let key = AppKey {
        pod: Arc::clone(caller.pod),
        from: None,
        to,
        version: request.head.version,
        // At the caller's node its own connection is counted.
        counted: None,
        probe: false,
    };
    let sent = caller.worker.apps.send_within(&key, request, connect);
    match sent.await {
        Ok(response) => Ok(Answer {
            response: from_app(response),
            error: None,
        }),
        Err(error) => {
            let cause = match &error {
                AppError::Connect(..) => Some(Cause::ConnectFailure),
                AppError::ClosedIdle(_) => Some(Cause::IdleClosed),
                AppError::Http2(error) if error.is_unprocessed() => Some(Cause::RefusedStream),
                AppError::Http1(super::h1::SendError::Body(_))
                | AppError::Http2(ExchangeError::Body(_)) => None,
                AppError::Http1(_) | AppError::Http2(_) => Some(Cause::ResetBeforeHeaders),
            };
            let error = failure(&error);
            Err(Failed { error, cause })
        }
    }
}

async fn through_tunnel(
    caller: &Caller<'_>,
    key: &Key,
    envelope: &Envelope,
    request: BoxedRequest,
) -> Result<Answer, Failed> {
    let BoxedRequest {
        head: mut parts,
        mut body,
    } = request;
    let connect = parts.method == Method::CONNECT;
    let mut upgrade = wire::is_upgrade(&parts);
    if upgrade && !connect && !body.is_end_stream() {
        // The stream has no room for a body beside what follows it: the upgrade is not asked for (RFC 9110 7.8).
        parts.headers.remove(UPGRADE);
        upgrade = false;
    }
    wire::seal(&mut parts, envelope).map_err(|error| Failed { error, cause: None })?;
    let dialer = Dialer::Node(Arc::clone(&caller.worker.context.host));
    let slot = caller.worker.pool.slot(key, &dialer);
    // The pool has a limit of its own.
    let slot = match envelope.connect {
        None => slot.await,
        Some(limit) => tokio::time::timeout(limit, slot)
            .await
            .unwrap_or(Err(ProxyError::ConnectTimeout)),
    };
    let mut slot = slot.map_err(Failed::unsent)?;
    let mut client = None;
    if upgrade {
        let (known, later) = deferred();
        (client, body) = (Some(known), later);
    }
    let body = wire::pack(slot.large_heads(), &mut parts.headers, body);
    let mut send = slot.take_sender();
    let exchanged = exchange(
        &mut send,
        BoxedRequest { head: parts, body },
        Some(Box::new(slot)),
        Arc::clone(&caller.pod.account),
    )
    .await;
    let (mut parts, body) = exchanged.map_err(|e| of_tunnel(&e))?.into_parts();
    let unpacking = async {
        let packed = wire::packed(&mut parts.headers)?;
        wire::unpack(packed, &mut parts.headers, body).await
    };
    let body = unpacking.await.map_err(|_| Failed {
        error: ProxyError::TunnelReset,
        cause: Some(Cause::ResetBeforeHeaders),
    })?;
    let error = wire::open_response(&mut parts);
    let mut response = Response::from_parts(parts, body);
    if let Some(client) = client {
        let status = response.status();
        let granted = status == StatusCode::SWITCHING_PROTOCOLS || (connect && status.is_success());
        if granted && error.is_none() {
            let from = std::mem::take(response.body_mut());
            response
                .extensions_mut()
                .insert(Upgraded::stream(client, from));
        } else {
            // Declined: an ordinary answer to a request without a body. Cut short instead, the request would
            // take its answer with it. The stream may have ended already.
            let _ = client.send(Body::empty());
        }
    }
    named(response, error)
}

/// The callee's proxy answered itself: where no app has seen the request another endpoint may do better.
fn named(mut response: Response<Body>, error: Option<ProxyError>) -> Result<Answer, Failed> {
    let Some(error) = error else {
        return Ok(Answer {
            response,
            error: None,
        });
    };
    let cause = match error {
        // A name that this version does not know: whether an app has seen the request is not known either.
        ProxyError::PeerRefused => None,
        ProxyError::RefusedStream => Some(Cause::RefusedStream),
        ProxyError::IdleClosed => Some(Cause::IdleClosed),
        error if error.retryable() => Some(Cause::ConnectFailure),
        ProxyError::UpstreamReset => Some(Cause::ResetBeforeHeaders),
        _ => None,
    };
    if let Some(cause) = cause {
        return Err(Failed {
            error,
            cause: Some(cause),
        });
    }
    response.headers_mut().insert(
        PROXY_ERROR_HEADER,
        http::HeaderValue::from_static(error.name()),
    );
    Ok(Answer {
        response,
        error: Some(error),
    })
}

fn of_tunnel(error: &ExchangeError) -> Failed {
    let unprocessed = error.is_unprocessed();
    let (error, cause) = match error {
        ExchangeError::Body(body) => (callee::of_request_body(body), None),
        _ if unprocessed => (ProxyError::TunnelReset, Some(Cause::RefusedStream)),
        ExchangeError::Reset(_) => (ProxyError::UpstreamReset, Some(Cause::ResetBeforeHeaders)),
        ExchangeError::Unusable(_) | ExchangeError::Connection(_) => {
            (ProxyError::TunnelReset, Some(Cause::ResetBeforeHeaders))
        }
    };
    Failed { error, cause }
}
