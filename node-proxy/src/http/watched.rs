//! An answer on its way out: what is counted, held and bounded until its last byte.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as _, Frame, SizeHint};
use mesh_api::errors::ProxyError;
use tokio::time::{Sleep, sleep, sleep_until};

use super::answer::grpc_trailers;
use super::body::{Body, BodyError, Passing};
use super::story::Story;
use super::wire;
use crate::balance::{self, Pick};
use crate::budget::Account;
use crate::telemetry::http::{InFlight, Outcome};

/// What becomes of a request is told here, once: to the metrics, and to the balancer.
#[derive(Debug)]
pub struct Record {
    /// The request in the metrics.
    pub request: InFlight,
    /// Why the proxy answered itself.
    pub error: Option<ProxyError>,
    /// The endpoint: open work there until the answer's last byte.
    pub pick: Option<Pick>,
    /// Whether the endpoint of this try has been judged.
    pub judged: bool,
    /// From the start of the last try to its headers.
    pub latency: Duration,
    /// Body bytes of the request.
    pub sent: Sent,
    /// gRPC: the status is in the trailers, if not in the headers.
    pub grpc: bool,
    /// For the access log and the trace, if anyone asks.
    pub story: Option<Box<Story>>,
}

/// Counts the bytes of a request's body.
#[derive(Clone, Debug, Default)]
pub struct Sent(Option<Arc<AtomicU64>>);

/// How long an answer may take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// For all of it.
    pub deadline: Option<tokio::time::Instant>,
    /// Without a byte.
    pub idle: Option<Duration>,
}

impl Sent {
    /// Counts what passes through `body`.
    pub fn count(&mut self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        let bytes = self.0.get_or_insert_with(Arc::default);
        Body::passing(Counted {
            body,
            bytes: Arc::clone(bytes),
        })
    }

    fn get(&self) -> u64 {
        self.0.as_ref().map_or(0, |b| b.load(Ordering::Relaxed))
    }
}

/// Lets an answer go: it is settled when its body has ended.
pub fn watch<H: Send + Unpin + 'static>(
    response: Response<Body>,
    mut record: Record,
    bounds: Bounds,
    held: H,
) -> Response<Body> {
    let (parts, body) = response.into_parts();
    let status = parts.status.as_u16();
    record.request.headers();
    let grpc_status = grpc_status(&parts.headers);
    if !record.judged
        && let Some(pick) = &mut record.pick
    {
        if record.grpc && grpc_status.is_none() && status == 200 {
            pick.answered(record.latency, Instant::now());
        } else {
            let failed = grpc_status.is_some_and(is_failure);
            record.judge(status < 500 && !failed);
        }
    }
    let ended = body.is_end_stream();
    let watched = Watched {
        body,
        record: Some(record),
        status,
        grpc_status,
        bytes: 0,
        deadline: bounds.deadline.map(|at| Box::pin(sleep_until(at))),
        idle: bounds.idle.map(|after| (after, Box::pin(sleep(after)))),
        held: Some(held),
    };
    let body = if ended {
        watched.ended();
        Body::empty()
    } else {
        Body::passing(watched)
    };
    Response::from_parts(parts, body)
}

impl Record {
    /// Tells the balancer.
    pub fn judge(&mut self, success: bool) {
        if let Some(pick) = &mut self.pick
            && !std::mem::replace(&mut self.judged, true)
        {
            let latency = self.latency;
            pick.record(balance::Outcome { success, latency }, Instant::now());
        }
    }
}

/// `grpc-status`, from headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// Codes that are the server's fault, as a 5xx is (gRPC, "Status codes and their use"): UNKNOWN,
/// DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS.
const fn is_failure(code: u8) -> bool {
    matches!(code, 2 | 4 | 13 | 14 | 15)
}

struct Watched<H> {
    body: Body,
    record: Option<Record>,
    status: u16,
    grpc_status: Option<u8>,
    bytes: u64,
    deadline: Option<Pin<Box<Sleep>>>,
    idle: Option<(Duration, Pin<Box<Sleep>>)>,
    held: Option<H>,
}

impl<H> Watched<H> {
    fn ended(mut self) {
        self.settle(None);
    }

    fn settle(&mut self, error: Option<ProxyError>) {
        self.held = None;
        let Some(mut record) = self.record.take() else {
            return;
        };
        if !record.judged && error != Some(ProxyError::Cancelled) {
            let failed = self.grpc_status.is_some_and(is_failure);
            record.judge(error.is_none() && !failed);
        }
        let outcome = Outcome {
            status: self.status,
            grpc_status: self.grpc_status.filter(|_| record.grpc),
            error: error.or(record.error),
            request_bytes: record.sent.get(),
            response_bytes: self.bytes,
        };
        record.request.finish(outcome);
        if let Some(story) = record.story {
            story.end(outcome);
        }
    }

    /// Whether a bound has been passed.
    fn late(&mut self, cx: &mut Context<'_>) -> Option<ProxyError> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Some(ProxyError::RequestTimeout);
        }
        if let Some((_, idle)) = &mut self.idle
            && idle.as_mut().poll(cx).is_ready()
        {
            return Some(ProxyError::IdleTimeout);
        }
        None
    }
}

impl<H: Send + Unpin + 'static> http_body::Body for Watched<H> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Nothing in it is pinned in place.
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        if polled.is_pending()
            && let Some(error) = this.late(cx)
        {
            let grpc = this.record.as_ref().is_some_and(|record| record.grpc);
            this.grpc_status = Some(error.grpc_status());
            // Whoever sends it is told to stop.
            this.body = Body::empty();
            this.settle(Some(error));
            // gRPC is told in trailers, which may come at any time; all else by a reset.
            return Poll::Ready(Some(match grpc {
                true => Ok(Frame::trailers(grpc_trailers(error))),
                false => Err(BodyError::Timeout),
            }));
        }
        let mut frame = ready!(polled);
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some((after, idle)) = &mut this.idle {
                    idle.as_mut().reset(tokio::time::Instant::now() + *after);
                }
                if let Some(data) = frame.data_ref() {
                    this.bytes += data.len() as u64;
                } else if let Some(trailers) = frame.trailers_mut() {
                    wire::strip(trailers);
                    this.grpc_status = this.grpc_status.or(grpc_status(trailers));
                }
                if this.body.is_end_stream() {
                    this.settle(None);
                }
            }
            Some(Err(_)) => this.settle(Some(ProxyError::UpstreamReset)),
            None => this.settle(None),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<H: Send + Unpin + 'static> Passing for Watched<H> {
    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        self.body.poll_absorb(cx, account)
    }
}

impl<H> Drop for Watched<H> {
    fn drop(&mut self) {
        // A client that goes away says nothing about the endpoint.
        self.settle(Some(ProxyError::Cancelled));
    }
}

struct Counted {
    body: Body,
    bytes: Arc<AtomicU64>,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let mut frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame {
            if let Some(data) = frame.data_ref() {
                this.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            } else if let Some(trailers) = frame.trailers_mut() {
                // An app may put them with the headers.
                wire::strip(trailers);
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Passing for Counted {
    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        self.body.poll_absorb(cx, account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::http::{Protocol, RequestLabels};
    use crate::telemetry::{Party, Reporter, Security, Telemetry};

    /// Never says anything.
    struct Silent;

    impl http_body::Body for Silent {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(
            self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            Poll::Pending
        }
    }

    fn silent(telemetry: &Telemetry, grpc: bool) -> Response<Body> {
        let labels = RequestLabels {
            reporter: Reporter::Source,
            source: Party::unknown(),
            destination: Party::unknown(),
            service: None,
            route: None,
            backend: None,
            protocol: Protocol::Grpc,
            security: Security::Plaintext,
        };
        let record = Record {
            request: telemetry.http.meter(&labels).start(&http::Method::POST),
            error: None,
            pick: None,
            judged: false,
            latency: Duration::ZERO,
            sent: Sent::default(),
            grpc,
            story: None,
        };
        let bounds = Bounds {
            deadline: Some(tokio::time::Instant::now() + Duration::from_secs(1)),
            idle: None,
        };
        watch(Response::new(Body::boxed(Silent)), record, bounds, ())
    }

    #[tokio::test(start_paused = true)]
    async fn past_the_deadline_grpc_is_told_in_trailers_and_all_else_by_an_error() {
        let telemetry = Telemetry::new();
        let mut body = silent(&telemetry, true).into_body();
        let trailers = body.frame().await.unwrap().unwrap().into_trailers();
        assert_eq!(trailers.unwrap()["grpc-status"], "4");
        assert!(body.frame().await.is_none());
        let mut body = silent(&telemetry, false).into_body();
        assert!(matches!(body.frame().await, Some(Err(BodyError::Timeout))));
        let text = telemetry.encode();
        assert!(
            text.contains(r#"grpc_status="4",response_flags="request_timeout"} 1"#),
            "{text}"
        );
    }
}
