//! Copies of requests for another backend (RequestMirror, GEP-3171). Their answers count for nothing.
//!
//! A body that is known to be small is read before the request goes on. One of unknown length, as that of a gRPC call,
//! may last: it is kept as it passes (`tee`), and copied when it has ended.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderMap, Method};
use http_body::{Body as _, Frame};
use rand::Rng;

use super::BoxedRequest;
use super::attempt::{Caller, Way};
use super::body::{Body, BodyError};
use super::caller::Session;
use super::h1::OnInterim;
use super::limits::charge_head;
use super::route::Backend;
use super::route::filter::{Filter, mirrors};
use crate::balance::PickContext;

mod tee;

use tee::{Awaited, tee};

/// A larger body is not mirrored: it would have to be held.
const MAX_BODY: usize = 64 * 1024;
/// What a copy may take.
const LIMIT: Duration = Duration::from_secs(15);

/// Sends copies where the filters ask for it. Returns the body to go on with.
pub(super) async fn send(session: &Session, filters: &[Filter], parts: &Parts, body: Body) -> Body {
    let chosen: Vec<Arc<Backend>> = mirrors(filters, || rand::rng().random()).cloned().collect();
    if chosen.is_empty() {
        return body;
    }
    // Boxed, so that a request that is not mirrored holds no room for it.
    let (copied, body) = Box::pin(copied(parts, body)).await;
    let Some(copied) = copied else { return body };
    for backend in chosen {
        let mut head = Box::new(parts.clone());
        // Nothing of a copy's answer is for the caller.
        head.extensions.remove::<OnInterim>();
        let body = match &copied {
            Copied::Here(whole) => whole.body(),
            Copied::Passing(awaited) => {
                head.extensions.insert(awaited.clone());
                Body::empty()
            }
        };
        session.spawn_copy(backend, BoxedRequest { head, body });
    }
    body
}

/// A body for copies.
enum Copied {
    Here(Whole),
    /// It is not known yet whether there will be one; [`deliver`] waits for it.
    Passing(Awaited),
}

/// All of a body.
#[derive(Clone, Debug)]
struct Whole {
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl Whole {
    fn body(&self) -> Body {
        let data = self.data.clone();
        match self.trailers.clone() {
            None => Body::full(data),
            trailers => Body::boxed(Trailed { data, trailers }),
        }
    }
}

/// The body for copies, and the same to go on with.
async fn copied(parts: &Parts, mut body: Body) -> (Option<Copied>, Body) {
    let mut whole = BytesMut::new();
    let mut trailers = None;
    if !body.is_end_stream() {
        match body.size_hint().upper() {
            Some(most) if most > MAX_BODY as u64 => return (None, body),
            Some(_) => {}
            // What follows a CONNECT is no body.
            None if parts.method == Method::CONNECT => return (None, body),
            None => {
                let (body, awaited) = tee(body);
                return (Some(Copied::Passing(awaited)), body);
            }
        }
        while let Some(frame) = body.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => whole.extend_from_slice(&data),
                Ok(Err(frame)) => trailers = frame.into_trailers().ok(),
                // A body that has failed looks like one that has ended; the request must fail where it is read next.
                Err(error) => return (None, Body::boxed(Broken(Some(error)))),
            }
        }
    }
    let data = whole.freeze();
    let whole = Whole { data, trailers };
    let body = whole.body();
    (Some(Copied::Here(whole)), body)
}

/// A body with trailers. Its length is not told: HTTP/1 has trailers only without one.
struct Trailed {
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl http_body::Body for Trailed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let data = std::mem::take(&mut this.data);
        let frame = if data.is_empty() {
            this.trailers.take().map(Frame::trailers)
        } else {
            Some(Frame::data(data))
        };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_empty() && self.trailers.is_none()
    }
}

/// What is left of a body that failed while it was read.
struct Broken(Option<BodyError>);

impl http_body::Body for Broken {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Poll::Ready(self.get_mut().0.take().map(Err))
    }
}

/// Sends one copy, when its body is here, and reads its answer to the end.
pub(super) async fn deliver(
    caller: Caller<'_>,
    v6: bool,
    backend: &Backend,
    mut request: BoxedRequest,
) {
    let mut held = None;
    if let Some(awaited) = request.head.extensions.remove::<Awaited>() {
        let account = &caller.pod.account;
        // A head that waits is charged like one of a request, and both until the copy is through.
        let Ok(head) = charge_head(account, &request.head.headers) else {
            return;
        };
        let Some(whole) = awaited.whole(account).await else {
            return;
        };
        request.body = whole.body();
        held = Some((head, awaited));
    }
    let Some(port) = backend.service_port() else {
        return;
    };
    let rules = port.http.load_full();
    let info = caller.pod.info.load_full();
    let context = PickContext {
        policy: &rules.policy.balance,
        v6,
        tried: &[],
        hash: None,
        session: None,
        node: &caller.worker.context.node,
        zone: &info.zone,
        local_only: port.internal_traffic_local,
        now: Instant::now(),
    };
    let Some(pick) = port.endpoints.pick_with(&context) else {
        return;
    };
    let Ok(way) = Way::to(&caller, pick.address()) else {
        return;
    };
    let sent = way.send(&caller, Some(&port), request, None);
    let exchange = async {
        if let Ok(answered) = sent.await {
            let mut body = answered.response.into_body();
            while let Some(Ok(_)) = body.frame().await {}
        }
    };
    // A copy that is late is given up.
    let _ = tokio::time::timeout(LIMIT, exchange).await;
    drop(held);
}
