//! One connection that carries requests: HTTP/1 one after the other, HTTP/2 beside each other. What becomes of a
//! request is its [`Role`]'s business.
//!
//! Invariants:
//! - every request in flight is charged to the pod whose connection this is; over the bound it is refused,
//!   the connection lives;
//! - while the process drains, and when the pod has left the mesh, an HTTP/1 connection ends after the next answer, or
//!   when no request comes for a while, and an HTTP/2 one takes no new stream;
//! - an HTTP/1 client that has closed its sending side is answered what it asked before, then the connection ends;
//! - a connection that the client abuses (see the bounds below) ends; the process does not.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::Cursor;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response, StatusCode, response};
use http_body::Body as _;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, join};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::answer::refusal;
use super::body::{Body, PumpError, pump};
use super::detect::Protocol;
use super::frames::{Abuse, Frames, STALL, Seen};
use super::opening::Opening;
use super::upgrade::Upgraded;
use super::{BoxedRequest, callee, caller, h1, wire};
use crate::budget::Account;
use crate::pods::Pod;
use crate::turns::Paced;
use crate::worker::Worker;

/// What the requests of a connection are.
#[derive(Debug)]
pub enum Role {
    /// A meshed pod's own, at its node.
    Caller(caller::Session),
    /// Plaintext from outside the mesh, at the callee's node.
    Callee(callee::Call),
}

/// A connection of a pod.
#[derive(Debug)]
pub struct Connection {
    /// The thread it belongs to.
    pub worker: Arc<Worker>,
    /// Who is charged.
    pub pod: Arc<Pod>,
    /// What its requests are.
    pub role: Role,
}

/// Requests an HTTP/2 client may have in flight on one connection.
const MAX_STREAMS: u32 = 256;
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Largest header list of a request.
const MAX_HEADER_LIST: u32 = 64 * 1024;
/// What one stream may hold unsent.
const SEND_BUFFER: usize = 256 * 1024;
/// Streams a client may reset before they were looked at (CVE-2023-44487, "rapid reset").
const MAX_PENDING_RESETS: usize = 32;
/// Streams that this side had to reset for protocol errors before the connection ends.
const MAX_LOCAL_RESETS: usize = 256;
const HANDSHAKE: Duration = Duration::from_secs(10);

impl Connection {
    /// Serves it until it ends.
    pub async fn serve(self: Arc<Self>, socket: TcpStream, opening: Opening) {
        match opening.protocol {
            // Boxed: the larger of the two, so that HTTP/1 does not pay for it.
            Protocol::Http2 => Box::pin(self.http2(socket, opening.bytes)).await,
            _ => self.http1(socket, opening.bytes).await,
        }
    }

    async fn http1(self: Arc<Self>, socket: TcpStream, begun: Bytes) {
        let mut server =
            h1::Server::new(socket, begun, h1::Limits::default()).charged_to(&self.pod.account);
        let end = End::of(&self);
        let mut quiet = pin!(End::of(&self).quiet());
        let mut leaving = false;
        let interims = Interims::default();
        let sink = interims.sink();
        loop {
            let next = tokio::select! {
                biased;
                next = server.next() => Some(next),
                () = &mut quiet, if !leaving => None,
            };
            let Some(next) = next else {
                if !end.is_near() {
                    // The pod has come back, or the process goes on.
                    quiet.set(End::of(&self).quiet());
                    continue;
                }
                if server.is_idle() {
                    return server.close().await;
                }
                // A request is under way: it is read on, once, and answered.
                leaving = true;
                continue;
            };
            let mut request = match next {
                Ok(Some(request)) => request,
                Ok(None) => return server.close().await,
                Err(error) => {
                    self.malformed(&error);
                    if let h1::Error::Refused(reason) = error {
                        // Who sent this need not hear the answer.
                        let _ = Box::pin(server.respond(refused(reason))).await;
                        server.close().await;
                    }
                    return;
                }
            };
            request.extensions_mut().insert(sink.clone());
            // Boxed: what a request takes is large, and gone while the connection idles.
            let mut handling = Box::pin(self.handle(request.into()));
            let handled = loop {
                tokio::select! {
                    biased;
                    told = interims.or_end(&mut handling) => match told {
                        Told::Interim(head) => {
                            // A client that has gone is found below.
                            let _ = server.interim(head).await;
                        }
                        Told::End(response) => break Some(response),
                    },
                    // The client has gone: what is done for it ends here.
                    () = server.gone() => break None,
                }
            };
            let Some(mut response) = handled else { return };
            // What came together with the final answer; it must not wait for the next request's.
            while let Some(head) = interims.take() {
                // A client that has gone is found below.
                let _ = server.interim(head).await;
            }
            let upgraded = response.extensions_mut().remove::<Upgraded>();
            if (leaving || end.is_near()) && upgraded.is_none() {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
            match server.respond(response).await {
                Ok(h1::Reuse::Yes) => {}
                Ok(h1::Reuse::No) => return server.close().await,
                Ok(h1::Reuse::Raw) => {
                    let (Some((socket, ahead)), Some(upgraded)) = (server.into_raw(), upgraded)
                    else {
                        return;
                    };
                    // Boxed, so that a connection without it holds no room for it.
                    let relay = Box::pin(upgraded.relay(socket, ahead, &self.pod.account));
                    if let Err(error) = relay.await {
                        tracing::debug!(pod = %self.pod.uid, %error, "upgraded connection ended");
                    }
                    return;
                }
                Err(error) => {
                    self.malformed(&error);
                    return;
                }
            }
        }
    }

    async fn http2(self: Arc<Self>, socket: TcpStream, begun: Bytes) {
        let (reader, writer) = socket.into_split();
        let seen = Arc::new(Seen::default());
        let io = Paced::new(join(Cursor::new(begun).chain(reader), writer));
        let io = Frames::of_client(io, Arc::clone(&seen));
        let handshake = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
            .max_local_error_reset_streams(Some(MAX_LOCAL_RESETS))
            .enable_connect_protocol()
            .handshake(io);
        let mut connection = match timeout(HANDSHAKE, handshake).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return self.broken(&error, &seen),
            Err(_late) => return,
        };
        let mut end = End::of(&self);
        let mut near = pin!(end.near());
        let mut leaving = false;
        let mut requests = 0;
        let in_order = loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        requests += 1;
                        let own = Arc::clone(&self);
                        let serving = async move { own.stream(request, respond).await };
                        self.worker.spawn(Arc::clone(&self.pod.turns).take(serving));
                    }
                    Some(Err(error)) => {
                        self.broken(&error, &seen);
                        break !error.is_io();
                    }
                    None => break true,
                },
                () = &mut near, if !leaving => {
                    leaving = true;
                    connection.graceful_shutdown();
                }
            }
        };
        // Of one that was cut, or told to go, some streams may just not have been looked at.
        if in_order && !leaving {
            let refused = seen.streams().saturating_sub(requests);
            self.pod.account.malformed("stream", refused);
        }
    }

    async fn stream(&self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let (mut parts, stream) = request.into_parts();
        let body = Body::http2(stream, &parts.headers);
        let interims = Interims::default();
        parts.extensions.insert(interims.sink());
        let request = Request::from_parts(parts, body);
        let mut handling = pin!(self.handle(request.into()));
        let handled = loop {
            tokio::select! {
                biased;
                told = interims.or_end(&mut handling) => match told {
                    Told::Interim(head) => inform(head, &mut respond),
                    Told::End(response) => break Some(response),
                },
                // The client gave up: what is done for it ends here.
                _reset = poll_fn(|cx| respond.poll_reset(cx)) => break None,
            }
        };
        if let Some(response) = handled {
            while let Some(head) = interims.take() {
                inform(head, &mut respond);
            }
            let account = Some(&self.pod.account);
            let sent = send_within(response, &mut respond, account, Some(STALL)).await;
            if let Err(PumpError::Stalled) = sent {
                self.pod.account.malformed(Abuse::Stalled.name(), 1);
            }
        }
    }

    async fn handle(&self, mut request: BoxedRequest) -> Response<Body> {
        wire::clean(&mut request.head.headers);
        match &self.role {
            Role::Caller(session) => session.handle(request).await,
            Role::Callee(call) => callee::deliver(&self.worker, &self.pod, call, request).await,
        }
    }

    fn malformed(&self, error: &h1::Error) {
        tracing::debug!(pod = %self.pod.uid, %error, "HTTP/1 connection ended");
        let told = error.status().is_some() || matches!(error, h1::Error::Stalled);
        if told && !is_limit(error) {
            self.pod.account.malformed(error.reason(), 1);
        }
    }

    fn broken(&self, error: &h2::Error, seen: &Seen) {
        tracing::debug!(pod = %self.pod.uid, %error, "HTTP/2 connection ended");
        match seen.abuse() {
            Some(abuse) => self.pod.account.malformed(abuse.name(), 1),
            None if error.is_io() => {}
            None => self.pod.account.malformed("http2", 1),
        }
    }
}

/// How long an HTTP/1 connection that is to end waits for one more request, whose answer says so: a client that asks just
/// when its connection is closed would have to ask again.
const QUIET: Duration = Duration::from_secs(2);

/// Whether a connection is to end: the process drains, or its pod has left the mesh.
struct End {
    process: watch::Receiver<bool>,
    pod: watch::Receiver<bool>,
}

impl End {
    fn of(connection: &Connection) -> Self {
        Self {
            process: connection.worker.draining(),
            pod: connection.pod.leaving.subscribe(),
        }
    }

    fn is_near(&self) -> bool {
        // Who told has gone: that is an end, too.
        *self.process.borrow() || *self.pod.borrow() || self.process.has_changed().is_err()
    }

    async fn near(&mut self) {
        tokio::select! {
            _ = self.process.wait_for(|drains| *drains) => {}
            _ = self.pod.wait_for(|leaves| *leaves) => {}
        }
    }

    async fn quiet(mut self) {
        self.near().await;
        sleep(QUIET).await;
    }
}

/// Interim answers of one request at most that wait to be passed on; more are left out.
const INTERIMS: usize = 4;

/// Interim answers (1xx) on their way to the client. Holds no memory while there is none.
///
/// They come while the request is worked on ([`Interims::or_end`]), and from there only: so nobody is to be woken.
#[derive(Clone, Debug, Default)]
pub struct Interims(Arc<Mutex<VecDeque<response::Parts>>>);

/// What a request came to.
#[derive(Debug)]
pub enum Told<T> {
    /// An interim answer; there may be more of them.
    Interim(response::Parts),
    /// Its end. What is left of interim answers came together with it.
    End(T),
}

impl Interims {
    /// Where an app's go.
    pub fn sink(&self) -> h1::OnInterim {
        let heads = Arc::clone(&self.0);
        h1::OnInterim(Arc::new(move |mut head: response::Parts| {
            let mut heads = heads.lock();
            // Nothing stands between where protocols switch: HTTP/2 has none (RFC 9113 8.6), and HTTP/1 ends with it.
            // What is too much is left out: a client may get any number of them, or none (RFC 9110, 15.2).
            if head.status == StatusCode::SWITCHING_PROTOCOLS || heads.len() == INTERIMS {
                return;
            }
            wire::strip(&mut head.headers);
            h1::remove_hop_by_hop(&mut head.headers);
            heads.push_back(head);
        }))
    }

    /// Works on the request whose interim answers these are, until there is one or it has ended. Cancelling it loses
    /// nothing.
    pub async fn or_end<F: Future + Unpin>(&self, request: &mut F) -> Told<F::Output> {
        poll_fn(|cx| match Pin::new(&mut *request).poll(cx) {
            Poll::Ready(end) => Poll::Ready(Told::End(end)),
            Poll::Pending => self
                .take()
                .map_or(Poll::Pending, |head| Poll::Ready(Told::Interim(head))),
        })
        .await
    }

    /// The next, if there is one.
    pub fn take(&self) -> Option<response::Parts> {
        self.0.lock().pop_front()
    }
}

/// Passes an interim answer on.
pub fn inform(head: response::Parts, respond: &mut SendResponse<Bytes>) {
    let mut response = Response::new(());
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    // A stream that has gone is found by the final answer.
    let _ = respond.send_informational(response);
}

/// Sends an answer on an HTTP/2 stream. What waits for the client is charged to `account`.
pub async fn send(
    response: Response<Body>,
    respond: &mut SendResponse<Bytes>,
    account: Option<&Arc<Account>>,
) {
    // Who reset the stream, or whose body failed, is told there.
    let _ = send_within(response, respond, account, None).await;
}

/// As [`send`]. `stall`: how long the receiver may leave data without window.
async fn send_within(
    response: Response<Body>,
    respond: &mut SendResponse<Bytes>,
    account: Option<&Arc<Account>>,
    stall: Option<Duration>,
) -> Result<(), PumpError> {
    let (mut parts, body) = response.into_parts();
    parts.version = http::Version::HTTP_2;
    let ended = body.is_end_stream();
    // A client that has gone needs no answer; what the body holds is given back by its drop.
    let Ok(mut stream) = respond.send_response(Response::from_parts(parts, ()), ended) else {
        return Ok(());
    };
    if ended {
        return Ok(());
    }
    pump(body, &mut stream, account, stall)
        .await
        .inspect_err(|error| tracing::debug!(%error, "answer not sent to its end"))
}

/// The cause as in the table of errors; the status says more than the table's.
fn refused(reason: h1::Refused) -> Response<Body> {
    let mut response = refusal(reason.error(), false);
    *response.status_mut() = reason.status();
    response
}

fn is_limit(error: &h1::Error) -> bool {
    matches!(error, h1::Error::Refused(h1::Refused::Limit))
}

#[cfg(test)]
mod tests {
    use mesh_api::errors::ProxyError;

    use super::*;

    /// The size of what a function's future holds.
    fn size<A, B, C, F: Future>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn an_idle_connection_holds_little() {
        let (http1, both) = (size(Connection::http1), size(Connection::serve));
        assert!(http1 < 4 * 1024, "HTTP/1: {http1} bytes");
        assert!(both < 4 * 1024 + 256, "any: {both} bytes");
    }

    #[test]
    fn what_is_refused_names_its_cause_and_keeps_its_status() {
        use h1::Refused;
        for (reason, status, error) in [
            (Refused::HeadTooLarge, 431, ProxyError::HeadersTooLarge),
            (Refused::TooManyHeaders, 431, ProxyError::HeadersTooLarge),
            (Refused::LineTooLong, 414, ProxyError::HeadersTooLarge),
            (Refused::SlowHead, 408, ProxyError::SlowRequest),
            (Refused::Version, 505, ProxyError::UnsupportedProtocol),
            (Refused::Coding, 501, ProxyError::UnsupportedProtocol),
            (Refused::Limit, 429, ProxyError::WorkloadLimit),
            (Refused::Host, 400, ProxyError::MalformedRequest),
            (Refused::ContentLength, 400, ProxyError::MalformedRequest),
        ] {
            let response = refused(reason);
            assert_eq!(response.status(), status, "{reason}");
            assert_eq!(wire::error(response.headers()), Some(error), "{reason}");
        }
    }

    #[test]
    fn interim_answers_are_stripped_bounded_and_in_order() {
        let interims = Interims::default();
        let h1::OnInterim(sink) = interims.sink();
        for status in [101, 103, 100, 102, 103, 103] {
            let head = Response::builder()
                .status(status)
                .header("warren-client-id", "forged")
                .header("link", "kept");
            sink(head.body(()).unwrap().into_parts().0);
        }
        let heads: Vec<_> = std::iter::from_fn(|| interims.take()).collect();
        let statuses: Vec<u16> = heads.iter().map(|head| head.status.as_u16()).collect();
        assert_eq!(statuses, [103, 100, 102, 103]);
        assert!(heads.iter().all(|head| head.headers.len() == 1));
    }
}
