//! Copies of requests for another backend (RequestMirror, GEP-3171). Their answers count for nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use http::request::Parts;
use http_body::Body as _;
use rand::Rng;

use super::attempt::{Caller, Way};
use super::body::Body;
use super::caller::Session;
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
        let copy = copy.try_clone().unwrap_or_default();
        session.spawn_copy(backend, parts.clone(), copy);
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
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => whole.extend_from_slice(&data),
            Ok(Err(_trailers)) => {}
            // Cut short: the request fails where it is read next.
            Err(_) => return (None, body),
        }
    }
    let whole = whole.freeze();
    (Some(Body::full(whole.clone())), Body::full(whole))
}

/// Sends one copy and reads its answer to the end.
pub(super) async fn deliver(
    caller: Caller<'_>,
    v6: bool,
    backend: &Backend,
    parts: Parts,
    body: Body,
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
    let sent = way.send(&caller, Some(&port), parts, body, LIMIT);
    let exchange = async {
        if let Ok(answered) = sent.await {
            let mut body = answered.response.into_body();
            while let Some(Ok(_)) = body.frame().await {}
        }
    };
    // A copy that is late is given up.
    let _ = tokio::time::timeout(LIMIT, exchange).await;
}
