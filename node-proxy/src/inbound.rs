//! The callee's half for plaintext: connections that reached a pod's address outside any tunnel.
//!
//! They come from callers outside the mesh, from pods that are being enrolled, and from the node itself
//! (probes). What may pass is decided in [`crate::authorize`] and [`crate::probe`].

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_api::errors::ProxyError;
use tokio::net::TcpStream;

use crate::authorize::{self, Plaintext};
use crate::budget::Resource;
use crate::deliver;
use crate::flow::Flow;
use crate::pods::Pod;
use crate::probe;
use crate::tcp;
use crate::telemetry::{Party, ReasonLabels, Reporter};
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
    let charge = match pod.account.charge(Resource::Connection) {
        Ok(charge) => charge,
        Err(error) => return refuse(&flow, socket, error),
    };
    let _captured = pod.captured.enter();
    let _listed = worker.list("inbound", &pod, peer, destination);
    let from_node = context.host.addresses.load().contains(&peer.ip());
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
    let mut delivered = match Box::pin(deliver::to_app(&pod, peer.ip(), destination)).await {
        Ok(delivered) => delivered,
        Err(error) => return refuse(&flow, socket, error),
    };
    let buffered = [
        pod.account.open_charge(Resource::BufferedBytes),
        pod.account.open_charge(Resource::BufferedBytes),
    ];
    let open = flow.open(context);
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
