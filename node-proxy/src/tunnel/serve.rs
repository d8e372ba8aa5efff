//! The callee's half of tunnels: the handshake, the checks on each stream, delivery.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::Fuse;
use h2::server::{Connection, SendResponse};
use h2::{RecvStream, SendStream};
use http::{Request, Response, StatusCode};
use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use mesh_api::names::PROXY_ERROR_HEADER;
use mesh_api::tls::PeerRole;
use prometheus_client::metrics::gauge::Gauge;
use rustls::server::Acceptor;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::admission::Turn;
use super::ahead::ReadsAhead;
use super::tls::{Kind, Peer, Refusal, peer, refusal, tls_refusal};
use super::{
    CONNECTION_WINDOW, MAX_FRAME, MAX_HEADER_LIST, MAX_STREAMS, READ_AHEAD, SEND_BUFFER,
    STREAM_WINDOW, claimed_source,
};
use crate::authorize;
use crate::budget::{Account, Charge, Resource};
use crate::deliver::{self, Delivered};
use crate::flow::Flow;
use crate::identity::LocalIdentity;
use crate::pods::{CapturedGuard, Pod};
use crate::tcp::{Broken, reset_on_close};
use crate::telemetry::{GaugeGuard, HandshakeLabels, Party, Reporter, Security, SideLabels};
use crate::turns::{Paced, Turns};
use crate::worker::Worker;

mod hbone;
mod request;

use request::is_request;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// For a peer that is silent while this process drains, and has no stream here.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a stream waits for the table to know its source.
const SOURCE_WAIT: Duration = Duration::from_secs(2);

/// Where a tunnel was accepted.
#[derive(Clone, Debug)]
pub enum Entrance {
    /// The node's tunnel listener: the server name selects the callee.
    Node,
    /// A pod's HBONE listener: the pod is the callee.
    Pod(Arc<Pod>),
}

/// A tunnel whose both ends are known.
struct Tunnel {
    worker: Arc<Worker>,
    entrance: Entrance,
    local: Arc<LocalIdentity>,
    peer: Peer,
    /// Generation of the roots that the peer was judged by.
    trust: u64,
    address: SocketAddr,
    /// Of all tunnels of the peer's identity on this thread.
    turns: Arc<Turns>,
    /// Streams of this side.
    streams: Gauge,
}

/// Serves one connection to a tunnel listener until it ends.
pub async fn serve(
    worker: Arc<Worker>,
    entrance: Entrance,
    socket: TcpStream,
    address: SocketAddr,
) {
    let telemetry = Arc::clone(&worker.context.telemetry);
    let admitted = admit(&worker, &entrance, address);
    let outcome = match &admitted {
        Err(refusal) => {
            reset_on_close(&socket);
            drop(socket);
            Err(*refusal)
        }
        Ok(_) => in_time(&worker, Box::pin(handshake(&worker, &entrance, socket)))
            .await
            .unwrap_or(Err(Refusal {
                error: ProxyError::TunnelHandshake,
                result: "handshake_timeout",
            })),
    };
    let _charge = admitted.ok().and_then(|(_turn, charge)| charge);
    let result = match &outcome {
        Ok((_, _, peer, _)) if peer.resumed => "resumed",
        Ok(_) => "ok",
        Err(refusal) => refusal.result,
    };
    telemetry
        .handshakes
        .get_or_create(&HandshakeLabels {
            side: "server",
            result,
        })
        .inc();
    match outcome {
        // As many as somebody likes: the metric counts them.
        Err(refusal) if refusal.error == ProxyError::WorkloadLimit => {
            tracing::debug!(peer = %address, reason = refusal.result, "tunnel refused: {}", refusal.error);
        }
        Err(refusal) => {
            tracing::warn!(peer = %address, reason = refusal.result, "tunnel refused: {}", refusal.error);
        }
        Ok((tls, local, peer, trust)) => {
            tracing::debug!(peer = %address, caller = %peer.identity, callee = %local.identity, result, "tunnel accepted");
            let open = telemetry
                .tunnels
                .get_or_create(&SideLabels { side: "server" })
                .clone();
            let _open = GaugeGuard::new(&open);
            let tunnel = Arc::new(Tunnel {
                turns: worker.turns_of(&peer.identity),
                streams: telemetry
                    .streams
                    .get_or_create(&SideLabels { side: "server" })
                    .clone(),
                worker,
                entrance,
                local,
                peer,
                trust,
                address,
            });
            tunnel.run(tls).await;
        }
    }
}

/// `None`: it took too long, or longer than a process that drains waits.
async fn in_time<T>(worker: &Worker, step: impl Future<Output = T>) -> Option<T> {
    let mut draining = worker.draining();
    let drained = async {
        // Nobody is left to say it where the process ends.
        let _ = draining.wait_for(|draining| *draining).await;
        sleep(DRAIN_PATIENCE).await;
    };
    tokio::select! {
        biased;
        done = step => Some(done),
        () = sleep(HANDSHAKE_TIMEOUT) => None,
        () = drained => None,
    }
}

/// A place for the handshake and, at a pod's own entrance, one of the pod's connections: the node's listener is
/// no pod's.
fn admit(
    worker: &Worker,
    entrance: &Entrance,
    address: SocketAddr,
) -> Result<(Turn, Option<Charge>), Refusal> {
    let full = |result| Refusal {
        error: ProxyError::WorkloadLimit,
        result,
    };
    let charge = match entrance {
        Entrance::Node => None,
        Entrance::Pod(pod) => {
            let charge = pod.account.charge(Resource::Connection);
            Some(charge.map_err(|_| full("workload_limit"))?)
        }
    };
    let turn = worker.handshakes.begin(address.ip());
    Ok((turn.ok_or(full("too_many_handshakes"))?, charge))
}

/// With the generation of the roots that the peer was judged by.
type Accepted = (
    TlsStream<BufReader<TcpStream>>,
    Arc<LocalIdentity>,
    Peer,
    u64,
);

async fn handshake(
    worker: &Worker,
    entrance: &Entrance,
    socket: TcpStream,
) -> Result<Accepted, Refusal> {
    let identities = &worker.context.identities;
    let internal = |_| Refusal {
        error: ProxyError::Internal,
        result: "internal",
    };
    let trust = identities.trust().ok_or(Refusal {
        error: ProxyError::NotReady,
        result: "not_ready",
    })?;
    let hello = LazyConfigAcceptor::new(
        Acceptor::default(),
        BufReader::with_capacity(READ_AHEAD, socket),
    )
    .await
    .map_err(|e| refusal(&e))?;
    let (local, kind) = match entrance {
        Entrance::Node => (
            hello
                .client_hello()
                .server_name()
                .and_then(|name| identities.by_server_name(name)),
            Kind::Warren,
        ),
        Entrance::Pod(pod) => (identities.get(&pod.identity), Kind::Hbone),
    };
    let Some(local) = local else {
        // Finished only so that the peer hears an alert.
        let config = worker
            .context
            .server_configs
            .refusing(&trust)
            .map_err(internal)?;
        let _ = hello.into_stream(config).await;
        return Err(Refusal {
            error: ProxyError::NoCertificate,
            result: "no_certificate",
        });
    };
    let config = worker
        .context
        .server_configs
        .get(&local, &trust, kind)
        .map_err(internal)?;
    let tls = hello.into_stream(config).await.map_err(|e| refusal(&e))?;
    let peer = peer(tls.get_ref().1, PeerRole::Client, &trust).map_err(|e| tls_refusal(&e))?;
    if tls.get_ref().1.alpn_protocol().is_none() {
        return Err(Refusal {
            error: ProxyError::TunnelHandshake,
            result: "protocol",
        });
    }
    Ok((tls, local, peer, trust.generation))
}

impl Tunnel {
    async fn run(self: Arc<Self>, tls: TlsStream<BufReader<TcpStream>>) {
        let connection = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_streams(MAX_STREAMS)
            .enable_connect_protocol()
            .handshake(Paced::new(ReadsAhead::new(tls)));
        let mut connection: Connection<_, Bytes> = match in_time(&self.worker, connection).await {
            Some(Ok(connection)) => connection,
            Some(Err(_)) | None => return,
        };
        let Some(mut ping) = connection.ping_pong() else {
            return;
        };
        let mut drain = self.worker.draining();
        let mut changed = self.worker.context.identities.changed();
        // What the handshake went by may have been replaced before anybody listened for it.
        changed.mark_changed();
        // The peer opens another tunnel, to the process or with the certificate that is newest now. Waited for once, not
        // anew with each stream.
        let leaving = async {
            let outdated = async { while changed.changed().await.is_ok() && !self.is_stale() {} };
            tokio::select! {
                _ = drain.wait_for(|draining| *draining) => {}
                () = outdated => {}
            }
        };
        let mut leaving = pin!(leaving.fuse());
        let mut unused = pin!(Fuse::terminated());
        let keepalive = async {
            let mut ticks = tokio::time::interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
            loop {
                ticks.tick().await;
                if !matches!(
                    timeout(PING_TIMEOUT, ping.ping(h2::Ping::opaque())).await,
                    Ok(Ok(_))
                ) {
                    return;
                }
            }
        };
        let mut keepalive = pin!(keepalive);
        loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Some(Ok((request, respond))) => self.spawn(request, respond),
                    Some(Err(error)) => {
                        tracing::debug!(peer = %self.address, caller = %self.peer.identity, %error, "tunnel ended");
                        return;
                    }
                    None => return,
                },
                () = &mut keepalive => {
                    tracing::debug!(peer = %self.address, caller = %self.peer.identity, "tunnel does not answer");
                    return;
                }
                () = &mut leaving => {
                    connection.graceful_shutdown();
                    unused.set(self.unused().fuse());
                }
                // The peer should have closed it by now.
                () = &mut unused => return,
            }
        }
    }

    /// Ends when it is found without streams, each of which holds the tunnel.
    async fn unused(self: &Arc<Self>) {
        loop {
            sleep(DRAIN_PATIENCE).await;
            if Arc::strong_count(self) == 1 {
                return;
            }
        }
    }

    fn is_stale(&self) -> bool {
        let identities = &self.worker.context.identities;
        let certificate = identities.get(&self.local.identity);
        // A root that is trusted no more must not go on through the tunnels it opened.
        certificate.is_none_or(|current| current.generation != self.local.generation)
            || identities
                .trust()
                .is_none_or(|current| current.generation != self.trust)
    }

    fn spawn(self: &Arc<Self>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let open = GaugeGuard::new(&self.streams);
        let turns = Arc::clone(&self.turns);
        let tunnel = Arc::clone(self);
        // Each with room for itself only.
        match self.entrance {
            Entrance::Node if is_request(&request) => {
                self.worker.spawn(turns.take(async move {
                    tunnel.request(request, respond).await;
                    drop(open);
                }));
            }
            Entrance::Node => self.worker.spawn(turns.take(async move {
                tunnel.connection(request, respond).await;
                drop(open);
            })),
            Entrance::Pod(_) => self.worker.spawn(turns.take(async move {
                tunnel.hbone(request, respond).await;
                drop(open);
            })),
        }
    }

    /// A stream from the peer, of which no more is known.
    fn flow(&self) -> Flow {
        let mut flow = Flow::new(
            Reporter::Destination,
            self.address,
            self.address,
            Party {
                workload: None,
                identity: Some(self.peer.identity.clone()),
            },
        );
        flow.security = Security::MutualTls;
        flow
    }

    /// A TCP connection, of which the peer has found out that it is nothing else.
    async fn connection(&self, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let mut flow = self.flow();
        let admitted = Box::pin(async {
            let judged = self.admit(&request, &mut flow).await?;
            let delivered = judged.deliver(&flow).await?;
            Ok((judged, delivered))
        });
        match admitted.await {
            Err(error) => self.refuse(&flow, error, respond),
            Ok((judged, delivered)) => {
                if let Some(stream) = accept(request, respond) {
                    self.carry(judged, delivered, flow, Bytes::new(), stream)
                        .await;
                }
            }
        }
    }

    fn refuse(&self, flow: &Flow, error: ProxyError, mut respond: SendResponse<Bytes>) {
        flow.fail(&self.worker.context, error);
        // A peer that has gone needs no answer.
        let _ = respond.send_response(refused(error), true);
    }

    /// Carries a connection on, of which `begun` was read already.
    async fn carry(
        &self,
        judged: Judged,
        mut delivered: Delivered,
        flow: Flow,
        begun: Bytes,
        (mut send, mut receive): (SendStream<Bytes>, RecvStream),
    ) {
        let context = &self.worker.context;
        let _listed = self.worker.list(
            "inbound",
            &judged.pod,
            flow.source_address,
            flow.destination_address,
        );
        let open = flow.open(context);
        let carrying = async {
            if !begun.is_empty() {
                open.sent.add(begun.len());
                let writing = delivered.stream().write_all(&begun);
                writing.await.map_err(Broken::Io)?;
            }
            drop(begun);
            // Here the socket is the destination, so what goes into the tunnel is what was received.
            let buffered = buffered(&judged.pod.account);
            super::relay::relay(
                delivered.stream(),
                &mut send,
                &mut receive,
                &open.received,
                &open.sent,
                buffered,
            )
            .await
        };
        let result = carrying.await;
        if result.is_ok() {
            delivered.recycle();
        }
        flow.ended(
            context,
            &open,
            result.as_ref().err().and_then(crate::outbound::reason),
        );
    }

    /// Whether a connection may be opened, and whose it is then.
    async fn admit(
        &self,
        request: &Request<RecvStream>,
        flow: &mut Flow,
    ) -> Result<Judged, ProxyError> {
        if is_request(request) {
            return Err(ProxyError::BadRequest);
        }
        let authority = request.uri().authority().ok_or(ProxyError::BadRequest)?;
        let target: SocketAddr = authority
            .as_str()
            .parse()
            .map_err(|_| ProxyError::BadRequest)?;
        // Pods are found by either form, and sockets are of the address's own family.
        let target = SocketAddr::new(target.ip().to_canonical(), target.port());
        flow.destination_address = target;
        let claimed = claimed_source(request.headers())?;
        self.judge(target, claimed, flow).await
    }

    /// Whether the peer may reach the target as the source it claims.
    async fn judge(
        &self,
        target: SocketAddr,
        claimed: Option<IpAddr>,
        flow: &mut Flow,
    ) -> Result<Judged, ProxyError> {
        let context = &self.worker.context;
        let now = SystemTime::now();
        if self.peer.not_after <= now || self.local.not_after <= now {
            return Err(ProxyError::CertificateExpired);
        }
        let pod = self.target(target, &self.local.identity)?;
        flow.destination = Party::meshed(&pod.info.load().owner, &pod.identity);
        let source = match (&self.entrance, claimed) {
            (Entrance::Node, None) => return Err(ProxyError::BadRequest),
            (_, Some(claimed)) => claimed,
            (Entrance::Pod(_), None) => self.address.ip(),
        };
        flow.source_address = SocketAddr::new(source, 0);
        // Not a claim but where the packets come from: an HBONE peer outside the table.
        let comes_from_there =
            matches!(self.entrance, Entrance::Pod(_)) && source == self.address.ip().to_canonical();
        let caller = match context.table.workload(source) {
            Some(caller) if authorize::source(&caller, &self.peer.identity).is_ok() => Some(caller),
            None if comes_from_there => None,
            // The pod, or that the address has passed to it, may be on its way here.
            _ => {
                let (table, identity) = (&context.table, &self.peer.identity);
                let owner = table.wait_for_workload(source, identity, SOURCE_WAIT).await;
                let caller = owner.or_else(|| table.workload(source));
                let caller = caller.ok_or(ProxyError::UnknownSource)?;
                authorize::source(&caller, identity)?;
                Some(caller)
            }
        };
        if let Some(caller) = caller {
            flow.source.workload = Some(Arc::clone(&caller.owner));
        }
        let charge = pod.account.charge(Resource::Stream)?;
        let captured = pod.captured.enter();
        Ok(Judged {
            pod,
            source,
            charge,
            captured,
        })
    }

    /// The pod a stream is for: of this node, and of the identity the tunnel was opened to.
    fn target(&self, target: SocketAddr, callee: &Identity) -> Result<Arc<Pod>, ProxyError> {
        let pod = self
            .worker
            .context
            .pods
            .by_address(target.ip())
            .ok_or(ProxyError::NotLocal)?;
        let right_pod = match &self.entrance {
            Entrance::Node => pod.identity == *callee,
            Entrance::Pod(own) => Arc::ptr_eq(own, &pod),
        };
        if right_pod {
            Ok(pod)
        } else {
            Err(ProxyError::NotLocal)
        }
    }
}

/// A stream whose peer may reach its target.
struct Judged {
    pod: Arc<Pod>,
    source: IpAddr,
    charge: Charge,
    captured: CapturedGuard,
}

impl Judged {
    async fn deliver(&self, flow: &Flow) -> Result<Delivered, ProxyError> {
        deliver::to_app(&self.pod, self.source, flow.destination_address).await
    }
}

/// Tells the peer that its connection is open. `None`: it has gone.
fn accept(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Option<(SendStream<Bytes>, RecvStream)> {
    let send = respond.send_response(Response::new(()), false).ok()?;
    Some((send, request.into_body()))
}

/// For what waits in either direction.
fn buffered(account: &Arc<Account>) -> [Charge; 2] {
    [(); 2].map(|()| account.open_charge(Resource::BufferedBytes))
}

fn refused(error: ProxyError) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() =
        StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(
        PROXY_ERROR_HEADER,
        http::HeaderValue::from_static(error.name()),
    );
    response
}
