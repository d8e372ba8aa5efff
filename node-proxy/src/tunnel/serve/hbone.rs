//! Connections of HBONE peers: nobody has looked into them. What is HTTP goes the way of a request from outside the
//! mesh, but for its caller, who is known: limited, counted, told to the app.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::Request;
use mesh_api::errors::ProxyError;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Judged, Tunnel, accept, buffered};
use crate::budget::Resource;
use crate::deliver::Delivered;
use crate::flow::Flow;
use crate::http::callee::Call;
use crate::http::connection::{Connection, Role};
use crate::http::detect::{Protocol, detect};
use crate::http::opening::{self, Declared, Opening, SLOW};
use crate::outbound::is_settings;
use crate::telemetry::{Meter, Security};
use crate::tunnel::relay;

/// How long the last bytes of a connection that has ended are carried on.
const LAST_BYTES: Duration = Duration::from_secs(10);

/// Reads until it is known what a client speaks that speaks first, as on a socket.
async fn client_first(
    receive: &mut RecvStream,
    bytes: &mut BytesMut,
) -> Result<Protocol, ProxyError> {
    let mut deadline = None;
    loop {
        let more = more(receive, bytes);
        let more = match deadline {
            None => more.await?,
            Some(deadline) => match timeout_at(deadline, more).await {
                Ok(more) => more?,
                Err(_late) => return Ok(Protocol::Http1),
            },
        };
        match detect(bytes) {
            // HTTP/1 says what is wrong with it.
            Some(Protocol::Opaque) => return Ok(Protocol::Http1),
            Some(known) => return Ok(known),
            None if more => {}
            None if bytes.is_empty() => return Ok(Protocol::Opaque),
            None => return Ok(Protocol::Http1),
        }
        deadline.get_or_insert_with(|| Instant::now() + SLOW);
    }
}

/// What the client says, if it speaks before the app does.
async fn first(
    receive: &mut RecvStream,
    bytes: &mut BytesMut,
    delivered: &mut Delivered,
) -> Result<Option<Protocol>, ProxyError> {
    let mut waits = false;
    let mut head = [0; 9];
    loop {
        tokio::select! {
            biased;
            more = more(receive, bytes) => {
                let more = more?;
                let known = detect(bytes);
                if known.is_some() || !more {
                    return Ok(known);
                }
            }
            spoken = delivered.stream().peek(&mut head), if !waits => {
                // What failed is for the relay to find and to pass on.
                waits = spoken.is_ok_and(|length| is_settings(&head[..length]));
                if !waits {
                    return Ok(None);
                }
            }
        }
    }
}

/// Takes what has come of a stream. Whether there may be more.
async fn more(receive: &mut RecvStream, bytes: &mut BytesMut) -> Result<bool, ProxyError> {
    let Some(chunk) = poll_fn(|cx| receive.poll_data(cx)).await else {
        return Ok(false);
    };
    let chunk = chunk.map_err(|_| ProxyError::Cancelled)?;
    bytes.extend_from_slice(&chunk);
    let given_back = receive.flow_control().release_capacity(chunk.len());
    given_back.map_err(|_| ProxyError::Cancelled)?;
    Ok(true)
}

impl Tunnel {
    /// A connection of a peer that has not looked into it.
    pub(super) async fn hbone(&self, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let mut flow = self.flow();
        let admitted = Box::pin(async {
            let judged = self.admit(&request, &mut flow).await?;
            let services = &self
                .worker
                .context
                .table
                .service_ports(flow.destination_address);
            let declared = opening::of_endpoint(services);
            let delivered = match declared {
                Declared::Http => None,
                _ => Some(judged.deliver(&flow).await?),
            };
            Ok((judged, declared, delivered))
        });
        let (judged, declared, mut delivered) = match admitted.await {
            Ok(admitted) => admitted,
            Err(error) => return self.refuse(&flow, error, respond),
        };
        let Some((send, mut receive)) = accept(request, respond) else {
            return;
        };
        let mut bytes = BytesMut::new();
        let known = match &mut delivered {
            None => client_first(&mut receive, &mut bytes).await.map(Some),
            Some(delivered) if declared == Declared::Unset => {
                first(&mut receive, &mut bytes, delivered).await
            }
            Some(_) => Ok(None),
        };
        // A stream is reset by being dropped.
        let failed = |error: &ProxyError| flow.fail(&self.worker.context, *error);
        let Ok(known) = known.inspect_err(failed) else {
            return;
        };
        let bytes = bytes.freeze();
        if let Some(protocol @ (Protocol::Http1 | Protocol::Http2)) = known {
            if let Some(unused) = delivered {
                self.worker.spawn_untracked(unused.close_unused());
            }
            let opening = Opening { protocol, bytes };
            let serving = self.http(&judged, &flow, opening, (send, receive));
            if let Err(error) = Box::pin(serving).await {
                failed(&error);
            }
            return;
        }
        let delivered = match delivered {
            Some(delivered) => Ok(delivered),
            None => judged.deliver(&flow).await,
        };
        if let Ok(delivered) = delivered.inspect_err(failed) {
            let carrying = self.carry(judged, delivered, flow, bytes, (send, receive));
            Box::pin(carrying).await;
        }
    }

    /// Serves HTTP on a stream that has been accepted.
    async fn http(
        &self,
        judged: &Judged,
        flow: &Flow,
        opening: Opening,
        (mut send, mut receive): (SendStream<Bytes>, RecvStream),
    ) -> Result<(), ProxyError> {
        let account = &judged.pod.account;
        // It has both ends of it open.
        let mut charge = account.open_charge(Resource::Connection);
        charge.add(2)?;
        let (near, mut far) = bridge().map_err(|error| {
            tracing::error!(%error, "no sockets for an HTTP connection over HBONE");
            ProxyError::Internal
        })?;
        let _listed = self.worker.list(
            "inbound",
            &judged.pod,
            flow.source_address,
            flow.destination_address,
        );
        let call = Call {
            caller: flow.source.clone(),
            source: judged.source,
            target: flow.destination_address,
            service: None,
            security: Security::MutualTls,
            connect: None,
            alone: true,
        };
        let connection = Arc::new(Connection {
            role: Role::Callee(call),
            worker: Arc::clone(&self.worker),
            pod: Arc::clone(&judged.pod),
        });
        // The requests' bytes are counted, by who serves them.
        let uncounted = [Meter::default(), Meter::default()];
        let mut serving = pin!(connection.serve(near, opening));
        let mut carrying = pin!(relay::relay(
            &mut far,
            &mut send,
            &mut receive,
            &uncounted[0],
            &uncounted[1],
            buffered(account),
        ));
        tokio::select! {
            () = &mut serving => {
                // A peer that does not end its side is not waited for.
                let _ = timeout(LAST_BYTES, carrying).await;
            }
            carried = &mut carrying => if carried.is_ok() {
                serving.await;
            }
        }
        Ok(())
    }
}

/// A connection of this process with itself, which takes the place of a client's. Nothing that is asked of it is TCP's
/// alone.
fn bridge() -> io::Result<(TcpStream, TcpStream)> {
    let (near, far) = UnixStream::pair()?;
    let stream = |end: UnixStream| {
        end.set_nonblocking(true)?;
        TcpStream::from_std(OwnedFd::from(end).into())
    };
    Ok((stream(near)?, stream(far)?))
}
