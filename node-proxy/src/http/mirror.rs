//! Copies of requests for another backend (RequestMirror, GEP-3171). Their answers count for nothing.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http_body::{Body as _, Frame};
use rand::Rng;

use super::BoxedRequest;
use super::attempt::{Caller, Way};
use super::body::{Body, BodyError};
use super::caller::Session;
use super::h1::OnInterim;
use super::route::Backend;
use super::route::filter::{Filter, mirrors};
use crate::balance::PickContext;

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
    let (copy, body) = copied(body).await;
    let Some(copy) = copy else { return body };
    for backend in chosen {
        let body = copy.try_clone().unwrap_or_default();
        let mut head = Box::new(parts.clone());
        // Nothing of a copy's answer is for the caller.
        head.extensions.remove::<OnInterim>();
        session.spawn_copy(backend, BoxedRequest { head, body });
    }
    body
}

/// The whole of a small body, and the same to go on with.
async fn copied(mut body: Body) -> (Option<Body>, Body) {
    if body.is_end_stream() {
        return (Some(Body::empty()), body);
    }
    if body
        .size_hint()
        .upper()
        .is_none_or(|most| most > MAX_BODY as u64)
    {
        return (None, body);
    }
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => whole.extend_from_slice(&data),
            Ok(Err(_trailers)) => {}
            // A body that has failed looks like one that has ended; the request must fail where it is read next.
            Err(error) => return (None, Body::boxed(Broken(Some(error)))),
        }
    }
    let whole = whole.freeze();
    (Some(Body::full(whole.clone())), Body::full(whole))
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

/// Sends one copy and reads its answer to the end.
pub(super) async fn deliver(
    caller: Caller<'_>,
    v6: bool,
    backend: &Backend,
    request: BoxedRequest,
) {
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
    let sent = way.send(&caller, Some(&port), request, LIMIT);
    let exchange = async {
        if let Ok(answered) = sent.await {
            let mut body = answered.response.into_body();
            while let Some(Ok(_)) = body.frame().await {}
        }
    };
    // A copy that is late is given up.
    let _ = tokio::time::timeout(LIMIT, exchange).await;
}
