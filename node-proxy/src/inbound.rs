//! The callee's half for plaintext: connections that reached a pod's address outside any tunnel.
//!
//! They come from callers outside the mesh, from pods that are being enrolled, and from the node itself
//! (probes). What may pass is decided in [`crate::authorize`] and [`crate::probe`].

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use mesh_api::errors::ProxyError;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::authorize::{self, Plaintext};
use crate::budget::Resource;
use crate::deliver::{self, Delivered};
use crate::flow::Flow;
use crate::http::callee::Call;
use crate::http::connection::{Connection, Role};
use crate::http::detect::Protocol;
use crate::http::opening::{self, Declared, Opening};
use crate::outbound::is_settings;
use crate::pods::Pod;
use crate::probe;
use crate::tcp;
use crate::telemetry::{Party, ReasonLabels, Reporter, Security};
use crate::worker::Worker;

/// Serves one captured connection until it ends.
pub async fn serve(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    mut socket: TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
) {
    let context = &worker.context;
    let caller = context.table.workload(peer.ip());
    let source = caller.as_ref().map_or_else(Party::unknown, |w| Party {
        workload: Some(Arc::clone(&w.owner)),
        // An address proves nothing.
        identity: None,
    });
    let info = pod.info.load_full();
    let mut flow = Flow::new(Reporter::Destination, peer, destination, source);
    flow.destination = Party::meshed(&info.owner, &pod.identity);
    let refuse = |flow: &Flow, socket: TcpStream, error: ProxyError| {
        flow.fail(context, error);
        tcp::reset_on_close(&socket);
    };
    let from_node = context.host.addresses.load().contains(&peer.ip());
    let maybe_probe = from_node && info.probes.iter().any(|p| p.port == destination.port());
    let charge = match pod.account.charge_for(Resource::Connection, maybe_probe) {
        Ok(charge) => charge,
        Err(error) => return refuse(&flow, socket, error),
    };
    let _captured = pod.captured.enter();
    let _listed = worker.list("inbound", &pod, peer, destination);
    if from_node && info.strict {
        return match probe::serve(&pod, &info, &mut socket, peer, destination).await {
            Ok(()) => {}
            Err(error) => refuse(&flow, socket, error),
        };
    }
    let callee = context.table.workload(destination.ip());
    let target = (destination.ip(), destination.port());
    match authorize::plaintext(caller.as_deref(), callee.as_deref(), info.strict, target) {
        Err(error) => return refuse(&flow, socket, error),
        Ok(Plaintext::Unmeshed) => {}
        Ok(reason @ (Plaintext::Enrolling | Plaintext::Excluded)) => {
            context
                .telemetry
                .plaintext_allowed
                .get_or_create(&ReasonLabels {
                    reason: reason.name(),
                })
                .inc();
        }
    }
    // As for a caller of the mesh. A node's probes of TCP are to reach the app, whatever it is declared to speak.
    let declared = match from_node {
        true => Declared::Unset,
        false => opening::of_endpoint(&context.table.service_ports(destination)),
    };
    let mut bytes = BytesMut::new();
    let mut known = match opening::begun(declared, &socket, &mut bytes).await {
        Ok(known) => known,
        Err(_) => return refuse(&flow, socket, ProxyError::Cancelled),
    };
    let mut delivered = None;
    if !is_http(known.as_ref()) {
        let connecting = deliver::to_app_for(&pod, peer.ip(), destination, maybe_probe);
        match Box::pin(connecting).await {
            Ok(connection) => delivered = Some(connection),
            Err(error) => return refuse(&flow, socket, error),
        }
        if let (None, Some(delivered)) = (&known, &mut delivered) {
            known = client_first(&socket, &mut bytes, delivered).await;
        }
    }
    if let Some(protocol @ (Protocol::Http1 | Protocol::Http2)) = known {
        if let Some(unused) = delivered {
            worker.spawn_untracked(unused.close_unused());
        }
        let call = Call {
            caller: flow.source,
            source: peer.ip(),
            target: destination,
            service: None,
            security: Security::Plaintext,
            connect: None,
            alone: true,
        };
        let connection = Arc::new(Connection {
            role: Role::Callee(call),
            worker: Arc::clone(&worker),
            pod: Arc::clone(&pod),
        });
        let bytes = bytes.freeze();
        return Box::pin(connection.serve(socket, Opening { protocol, bytes })).await;
    }
    let Some(mut delivered) = delivered else {
        return;
    };
    let buffered = [
        pod.account.open_charge(Resource::BufferedBytes),
        pod.account.open_charge(Resource::BufferedBytes),
    ];
    let open = flow.open(context);
    open.sent.add(bytes.len());
    if delivered.stream().write_all(&bytes).await.is_err() {
        tcp::reset_on_close(&socket);
        return flow.ended(context, &open, None);
    }
    drop(bytes);
    let result = tcp::relay(
        &mut socket,
        delivered.stream(),
        &open.sent,
        &open.received,
        buffered,
    )
    .await;
    if result.is_ok() {
        delivered.recycle();
    }
    flow.ended(
        context,
        &open,
        result.as_ref().err().and_then(crate::outbound::reason),
    );
    drop(charge);
}

fn is_http(protocol: Option<&Protocol>) -> bool {
    matches!(protocol, Some(Protocol::Http1 | Protocol::Http2))
}

/// What the client says, if it speaks before the app does.
async fn client_first(
    socket: &TcpStream,
    bytes: &mut BytesMut,
    delivered: &mut Delivered,
) -> Option<Protocol> {
    let mut waits = false;
    let mut head = [0; 9];
    loop {
        tokio::select! {
            biased;
            readable = socket.readable() => {
                // What failed is for the relay to find and to pass on.
                readable.ok()?;
                let known = opening::look(socket, bytes).ok()?;
                if known.is_some() {
                    return known;
                }
            }
            spoken = delivered.stream().peek(&mut head), if !waits => {
                // An HTTP/2 server speaks first and waits for its client all the same.
                waits = is_settings(&head[..spoken.ok()?]);
                if !waits {
                    return None;
                }
            }
        }
    }
}
