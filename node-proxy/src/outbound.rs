//! The caller's half: from a captured outbound connection to an app, through a tunnel, inside this node
//! or out of the mesh.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use mesh_api::errors::ProxyError;
use mesh_api::names::PROXY_ERROR_HEADER;
use rand::Rng;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Duration;

use crate::authorize;
use crate::balance::Pending;
use crate::budget::{Charge, Resource};
use crate::deliver::{self, Delivered};
use crate::flow::Flow;
use crate::http::caller::{self, Target};
use crate::http::connection::{Connection, Role};
use crate::http::route::{Choice, RouteSet};
use crate::pods::{CapturedGuard, Pod};
use crate::resolve::{self, Path};
use crate::table::{ServicePort, Workload};
use crate::tcp::{self, Broken};
use crate::telemetry::{OpenConnection, Party, Reporter, Security};
use crate::tunnel::pool::{Dialer, Key, Slot};
use crate::tunnel::{self, tls};
use crate::worker::{Context, Worker};

mod begin;

pub use begin::is_settings;
use begin::{Begun, Spoken, begin};

/// Endpoints tried for one connection.
const ATTEMPTS: usize = 3;
/// From accept to an established path, over all attempts.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(15);

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
    // Boxed: what it takes to find out and to establish a path is large, and gone while the connection idles.
    let begun = Box::pin(begin(&worker, &pod, &mut flow, &socket)).await;
    match begun {
        Ok(Begun::Http(target, opening)) => {
            let party = flow.source;
            let (source, destination) = (flow.source_address, flow.destination_address);
            let session = caller::Session::new(
                Arc::clone(&worker),
                Arc::clone(&pod),
                party,
                (source, destination),
                target,
            );
            let connection = Arc::new(Connection {
                role: Role::Caller(session),
                worker: Arc::clone(&worker),
                pod: Arc::clone(&pod),
            });
            Box::pin(connection.serve(socket, opening)).await;
        }
        Ok(Begun::Tcp {
            route,
            opening,
            pending,
        }) => {
            relay(context, &pod, flow, socket, route, opening).await;
            drop(pending);
        }
        Err(error) => return refuse(context, &flow, socket, error),
    }
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
    target: &Target,
    server_name: Option<&str>,
) -> Result<(Route, Option<Pending>), ProxyError> {
    match target {
        Target::Service(port) => {
            let backend = tcp_backend(pod, port, server_name)?;
            to_service(worker, pod, flow, backend.as_ref().unwrap_or(port)).await
        }
        Target::Outside(destination) => {
            let delivered = deliver::to_outside(pod, *destination).await?;
            let route = Route::Socket {
                delivered,
                inbound: None,
            };
            Ok((route, None))
        }
        Target::Pod(destination) | Target::Opaque(destination) => {
            Ok((to_address(worker, pod, flow, *destination).await?, None))
        }
    }
}

/// The backend of a connection where a TCPRoute or TLSRoute is attached. `None`: the Service itself. An invalid
/// backend's share of the connections is refused.
fn tcp_backend(
    pod: &Pod,
    port: &ServicePort,
    server_name: Option<&str>,
) -> Result<Option<Arc<ServicePort>>, ProxyError> {
    let rules = port.http.load();
    let rule = match rules.routes_for(pod.identity.namespace()).map(|set| &**set) {
        None | Some(RouteSet::Http(_) | RouteSet::Grpc(_)) => return Ok(None),
        Some(RouteSet::Tcp(routes)) => routes.rule(),
        Some(RouteSet::Tls(routes)) => routes.find(server_name).ok_or(ProxyError::NoRoute)?,
    };
    if rule.invalid.is_some() {
        return Err(ProxyError::InvalidRule);
    }
    match rule.choose(rand::rng().random()) {
        Choice::Backend(backend) => backend
            .service_port()
            .map(Some)
            .ok_or(ProxyError::NoEndpoint),
        Choice::Invalid(_) | Choice::None => Err(ProxyError::InvalidBackend),
    }
}

async fn to_service(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    flow: &mut Flow,
    port: &ServicePort,
) -> Result<(Route, Option<Pending>), ProxyError> {
    let service = &port.label;
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
                .map_or_else(Party::unknown, |w| Party::of(&w));
            flow.security = Security::Plaintext;
            let delivered = deliver::to_outside(pod, to).await?;
            Ok(Route::Socket {
                delivered,
                inbound: None,
            })
        }
        Path::Local(workload, callee) => {
            flow.destination = Party::of(&workload);
            flow.security = Security::MutualTls;
            judge_local(context, pod, flow.source_address.ip(), &workload, &callee)?;
            to_local(context, flow, &callee, to).await
        }
        Path::Tunnel(workload, address) => {
            flow.destination = Party::of(&workload);
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
            flow.destination = Party::of(&workload);
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

fn key(pod: &Arc<Pod>, callee: &Workload, address: SocketAddr, kind: tls::Kind) -> Key {
    Key {
        caller: pod.identity.clone(),
        callee: callee.identity.clone(),
        address,
        kind,
        source: (kind == tls::Kind::Hbone).then(|| Arc::clone(&pod.uid)),
    }
}

/// What a tunnel's server would judge: `source` must be `caller`'s, and `served` the `callee` of the table.
pub fn judge_local(
    context: &Context,
    caller: &Pod,
    source: IpAddr,
    callee: &Workload,
    served: &Pod,
) -> Result<(), ProxyError> {
    let claimed = context.table.workload(source);
    let own = caller.info.load().addresses.contains(&source);
    let identities = (&served.identity, &caller.identity);
    authorize::local(callee, identities.0, claimed.as_deref(), identities.1, own)
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
    let mut ask_again = true;
    let (slot, response, send) = loop {
        let mut slot = worker.pool.slot(&key, &dialer).await?;
        let asked = slot.send.send_request(request.clone(), false);
        let answered = match asked {
            Ok((response, send)) => response.await.map(|response| (response, send)),
            Err(error) => Err(error),
        };
        match answered {
            Ok((response, send)) => break (slot, response, send),
            // Most likely the peer's process has ended before it answered, and the next one is there. Nothing that the app
            // said was sent. A peer that fell silent is not asked again: another endpoint may be faster.
            Err(error)
                if lost_tunnel(&error) && !slot.is_silent() && std::mem::take(&mut ask_again) => {}
            Err(_) => return Err(ProxyError::TunnelReset),
        }
    };
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

/// Whether the whole tunnel went away or would not take the stream, rather than the peer ended the stream.
fn lost_tunnel(error: &h2::Error) -> bool {
    !error.is_reset() || error.reason() == Some(h2::Reason::REFUSED_STREAM)
}

async fn relay(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
    flow: Flow,
    mut socket: TcpStream,
    route: Route,
    spoken: Spoken,
) {
    let buffered = [
        pod.account.open_charge(Resource::BufferedBytes),
        pod.account.open_charge(Resource::BufferedBytes),
    ];
    let open = flow.open(context);
    let mut route = route;
    if let Err(broken) = repeat(&mut socket, &mut route, spoken, &open).await {
        tcp::reset_on_close(&socket);
        return flow.ended(context, &open, reason(&broken));
    }
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

/// Passes on what was said before both ways were open.
async fn repeat(
    socket: &mut TcpStream,
    route: &mut Route,
    spoken: Spoken,
    open: &OpenConnection,
) -> Result<(), Broken> {
    let Spoken { client, server } = spoken;
    open.sent.add(client.len());
    open.received.add(server.len());
    if !client.is_empty() {
        match route {
            // At most one detection's worth: less than a stream's first window.
            Route::Tunnel(stream) => stream
                .send
                .send_data(client, false)
                .map_err(|_| Broken::Stream)?,
            Route::Socket { delivered, .. } => delivered.stream().write_all(&client).await?,
        }
    }
    if !server.is_empty() {
        socket.write_all(&server).await?;
        if let Route::Tunnel(stream) = route {
            stream
                .receive
                .flow_control()
                .release_capacity(server.len())
                .map_err(|_| Broken::Stream)?;
        }
    }
    Ok(())
}

/// The row of the error table for a relay that broke, if it was not the apps' own doing.
pub fn reason(broken: &Broken) -> Option<ProxyError> {
    match broken {
        Broken::Io(_) => None,
        Broken::Stream => Some(ProxyError::TunnelReset),
        Broken::Limit(error) => Some(*error),
    }
}
