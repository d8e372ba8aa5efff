//! The caller's half: from a captured outbound connection to an app, through a tunnel, inside this node
//! or out of the mesh.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use mesh_api::errors::ProxyError;
use mesh_api::names::PROXY_ERROR_HEADER;
use tokio::net::TcpStream;
use tokio::time::{Duration, Instant, timeout_at};

use crate::authorize;
use crate::balance::Pending;
use crate::budget::{Charge, Resource};
use crate::deliver::{self, Delivered};
use crate::flow::Flow;
use crate::pods::{CapturedGuard, Pod};
use crate::resolve::{self, Path};
use crate::table::{ServiceLookup, ServicePort, Workload};
use crate::tcp::{self, Broken};
use crate::telemetry::{Party, Reporter, Security};
use crate::tunnel::pool::{Dialer, Key, Slot};
use crate::tunnel::{self, tls};
use crate::worker::{Context, Worker};

/// Endpoints tried for one connection.
const ATTEMPTS: usize = 3;
/// From accept to an established path, over all attempts.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a Service that was never heard of is asked for.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// An open way to the callee.
enum Route {
    Tunnel(Box<Stream>),
    Socket {
        delivered: Delivered,
        /// The callee's half, if it is in this process.
        inbound: Option<Box<(Flow, CapturedGuard, Charge)>>,
    },
}

struct Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    _slot: Slot,
}

/// Serves one captured connection until it ends.
pub async fn serve(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    socket: TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
) {
    let context = &worker.context;
    let owner = Arc::clone(&pod.info.load().owner);
    let mut flow = Flow::new(
        Reporter::Source,
        peer,
        destination,
        Party::meshed(&owner, &pod.identity),
    );
    let charge = match pod.account.charge(Resource::Connection) {
        Ok(charge) => charge,
        Err(error) => return refuse(context, &flow, socket, error),
    };
    let _captured = pod.captured.enter();
    let _listed = worker.list("outbound", &pod, peer, destination);
    // Boxed: what it takes to establish a path is large, and gone while the connection idles.
    let established = Box::pin(timeout_at(
        Instant::now() + ESTABLISH_TIMEOUT,
        establish(&worker, &pod, &mut flow),
    ));
    let (route, _pending) = match established.await {
        Ok(Ok(established)) => established,
        Ok(Err(error)) => return refuse(context, &flow, socket, error),
        Err(_late) => return refuse(context, &flow, socket, ProxyError::ConnectTimeout),
    };
    relay(context, &pod, flow, socket, route).await;
    drop(charge);
}

fn refuse(context: &Context, flow: &Flow, socket: TcpStream, error: ProxyError) {
    flow.fail(context, error);
    tcp::reset_on_close(&socket);
}

async fn establish(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    flow: &mut Flow,
) -> Result<(Route, Option<Pending>), ProxyError> {
    let table = &worker.context.table;
    let destination = flow.destination_address;
    let mut lookup = table.service(destination);
    if matches!(lookup, ServiceLookup::Unknown) {
        lookup = table.find_service(destination, LOOKUP_TIMEOUT).await;
    }
    match lookup {
        ServiceLookup::Port(port) => to_service(worker, pod, flow, &port).await,
        // Of a port the Service does not declare nobody knows more than the node's own rules.
        ServiceLookup::NoSuchPort(_) => {
            let delivered = deliver::to_outside(pod, destination).await?;
            Ok((
                Route::Socket {
                    delivered,
                    inbound: None,
                },
                None,
            ))
        }
        ServiceLookup::NotAService | ServiceLookup::Unknown => {
            Ok((to_address(worker, pod, flow, destination).await?, None))
        }
    }
}

async fn to_service(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    flow: &mut Flow,
    port: &ServicePort,
) -> Result<(Route, Option<Pending>), ProxyError> {
    let service: Arc<str> = format!("{}.{}", port.service.1, port.service.0).into();
    flow.service = Some(Arc::clone(&service));
    let v6 = flow.destination_address.is_ipv6();
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut failure = ProxyError::NoEndpoint;
    while tried.len() < ATTEMPTS {
        let Some(pending) = port.endpoints.pick(v6, &tried) else {
            break;
        };
        let address = pending.address();
        match to_address(worker, pod, flow, address).await {
            Ok(route) => return Ok((route, Some(pending))),
            Err(error) if error.retryable() => {
                tracing::debug!(%service, endpoint = %address, reason = error.name(), "endpoint failed");
                failure = error;
                tried.push(address);
            }
            Err(error) => return Err(error),
        }
    }
    Err(failure)
}

async fn to_address(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    flow: &mut Flow,
    to: SocketAddr,
) -> Result<Route, ProxyError> {
    let context = &worker.context;
    match resolve::path(&context.table, &context.pods, &context.node, to)? {
        Path::Direct => {
            flow.destination = context
                .table
                .workload(to.ip())
                .map_or_else(Party::unknown, |w| party(&w));
            flow.security = Security::Plaintext;
            let delivered = deliver::to_outside(pod, to).await?;
            Ok(Route::Socket {
                delivered,
                inbound: None,
            })
        }
        Path::Local(workload, callee) => {
            flow.destination = party(&workload);
            flow.security = Security::MutualTls;
            let source = flow.source_address.ip();
            let claimed = context.table.workload(source);
            let own = pod.info.load().addresses.contains(&source);
            let (served, caller) = (&callee.identity, &pod.identity);
            authorize::local(&workload, served, claimed.as_deref(), caller, own)?;
            to_local(context, flow, &callee, to).await
        }
        Path::Tunnel(workload, address) => {
            flow.destination = party(&workload);
            flow.security = Security::MutualTls;
            let key = key(pod, &workload, address, tls::Kind::Warren);
            through_tunnel(
                worker,
                key,
                Dialer::Node(Arc::clone(&context.host)),
                flow.source_address.ip(),
                to,
            )
            .await
        }
        Path::Hbone(workload, address) => {
            flow.destination = party(&workload);
            flow.security = Security::MutualTls;
            let key = key(pod, &workload, address, tls::Kind::Hbone);
            through_tunnel(
                worker,
                key,
                Dialer::Pod(Arc::clone(pod)),
                flow.source_address.ip(),
                to,
            )
            .await
        }
    }
}

fn party(workload: &Workload) -> Party {
    Party::meshed(&workload.owner, &workload.identity)
}

fn key(pod: &Arc<Pod>, callee: &Workload, address: SocketAddr, kind: tls::Kind) -> Key {
    Key {
        caller: pod.identity.clone(),
        callee: callee.identity.clone(),
        address,
        kind,
        source: (kind == tls::Kind::Hbone).then(|| Arc::clone(&pod.uid)),
    }
}

/// Both halves in this process: no tunnel, and the callee's checks, budget and telemetry as on the wire.
async fn to_local(
    context: &Context,
    flow: &Flow,
    callee: &Arc<Pod>,
    to: SocketAddr,
) -> Result<Route, ProxyError> {
    let mut inbound = Flow::new(
        Reporter::Destination,
        flow.source_address,
        to,
        flow.source.clone(),
    );
    inbound.destination = flow.destination.clone();
    inbound.service = flow.service.clone();
    inbound.security = Security::MutualTls;
    let charge = match callee.account.charge(Resource::Stream) {
        Ok(charge) => charge,
        Err(error) => {
            inbound.fail(context, error);
            return Err(error);
        }
    };
    let captured = callee.captured.enter();
    match deliver::to_app(callee, flow.source_address.ip(), to).await {
        Ok(delivered) => Ok(Route::Socket {
            delivered,
            inbound: Some(Box::new((inbound, captured, charge))),
        }),
        Err(error) => {
            inbound.fail(context, error);
            Err(error)
        }
    }
}

async fn through_tunnel(
    worker: &Arc<Worker>,
    key: Key,
    dialer: Dialer,
    source: IpAddr,
    to: SocketAddr,
) -> Result<Route, ProxyError> {
    let mut slot = worker.pool.slot(&key, &dialer).await?;
    let authority = Uri::builder()
        .authority(to.to_string())
        .build()
        .map_err(|_| ProxyError::Internal)?;
    let forwarded =
        HeaderValue::try_from(tunnel::forwarded(source)).map_err(|_| ProxyError::Internal)?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = authority;
    request
        .headers_mut()
        .insert(http::header::FORWARDED, forwarded);
    let (response, send) = slot
        .send
        .send_request(request, false)
        .map_err(|_| ProxyError::TunnelReset)?;
    let response = response.await.map_err(|_| ProxyError::TunnelReset)?;
    if response.status() != StatusCode::OK {
        let named = response
            .headers()
            .get(PROXY_ERROR_HEADER)
            .and_then(|v| v.to_str().ok());
        return Err(named
            .and_then(ProxyError::from_name)
            .unwrap_or(ProxyError::PeerRefused));
    }
    Ok(Route::Tunnel(Box::new(Stream {
        send,
        receive: response.into_body(),
        _slot: slot,
    })))
}

async fn relay(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
    flow: Flow,
    mut socket: TcpStream,
    route: Route,
) {
    let buffered = [
        pod.account.open_charge(Resource::BufferedBytes),
        pod.account.open_charge(Resource::BufferedBytes),
    ];
    let open = flow.open(context);
    let result = match route {
        Route::Tunnel(mut stream) => {
            let Stream {
                send,
                receive,
                _slot,
            } = &mut *stream;
            tunnel::relay::relay(
                &mut socket,
                send,
                receive,
                &open.sent,
                &open.received,
                buffered,
            )
            .await
        }
        Route::Socket {
            mut delivered,
            inbound,
        } => {
            let other = inbound.as_ref().map(|inbound| inbound.0.open(context));
            let result = tcp::relay(
                &mut socket,
                delivered.stream(),
                &open.sent,
                &open.received,
                buffered,
            )
            .await;
            if let (Some(inbound), Some(other)) = (&inbound, &other) {
                other
                    .sent
                    .add(usize::try_from(open.sent.get()).unwrap_or(usize::MAX));
                other
                    .received
                    .add(usize::try_from(open.received.get()).unwrap_or(usize::MAX));
                inbound
                    .0
                    .ended(context, other, result.as_ref().err().and_then(reason));
            }
            if result.is_ok() {
                delivered.recycle();
            }
            result
        }
    };
    flow.ended(context, &open, result.as_ref().err().and_then(reason));
}

/// The row of the error table for a relay that broke, if it was not the apps' own doing.
pub fn reason(broken: &Broken) -> Option<ProxyError> {
    match broken {
        Broken::Io(_) => None,
        Broken::Stream => Some(ProxyError::TunnelReset),
        Broken::Limit(error) => Some(*error),
    }
}
