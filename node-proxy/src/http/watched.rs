//! An answer on its way out: what is counted, held and bounded until its last byte.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as _, Frame, SizeHint};
use mesh_api::errors::ProxyError;
use tokio::sync::Notify;
use tokio::time::{Instant as Clock, Sleep, sleep, sleep_until};

use super::answer::grpc_trailers;
use super::body::{Body, BodyError, Passing};
use super::story::Story;
use super::upgrade::{Traffic, Upgraded};
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
    /// The answer comes through a tunnel.
    pub tunnelled: bool,
    /// The deadline is the caller's own.
    pub by_caller: bool,
    /// A fault was injected that delayed it.
    pub delayed: bool,
    /// For the access log and the trace, if anyone asks.
    pub story: Option<Box<Story>>,
}

/// Counts the bytes of a request's body, or of one direction of an upgraded connection. Clones share the count.
#[derive(Clone, Debug, Default)]
pub struct Sent(Option<Arc<Progress>>);

#[derive(Debug)]
struct Progress {
    begun: Clock,
    bytes: AtomicU64,
    /// When the last of them came, in microseconds from the beginning. `None`: nobody asks.
    moved: Option<AtomicU64>,
    ended: AtomicBool,
    end: Notify,
}

/// How long an answer may take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// For all of it, and why.
    pub deadline: Option<(Clock, ProxyError)>,
    /// Without a byte in either direction.
    pub idle: Option<Duration>,
}

impl Bounds {
    /// No later than this, either.
    pub fn by(self, at: Clock, error: ProxyError) -> Self {
        let sooner = self.deadline.is_none_or(|(deadline, _)| at < deadline);
        let deadline = if sooner {
            Some((at, error))
        } else {
            self.deadline
        };
        Self { deadline, ..self }
    }
}

impl Sent {
    /// Of what is not known yet, with the time at which it moves.
    pub fn timed() -> Self {
        Self::new(Some(AtomicU64::new(0)))
    }

    fn new(moved: Option<AtomicU64>) -> Self {
        Self(Some(Arc::new(Progress {
            begun: Clock::now(),
            bytes: AtomicU64::new(0),
            moved,
            ended: AtomicBool::new(false),
            end: Notify::new(),
        })))
    }

    /// Counts what passes through `body`; what is here at once.
    pub fn count(&mut self, body: Body) -> Body {
        if body.is_end_stream() {
            self.end();
            return body;
        }
        if self.0.is_none() {
            *self = Self::new(None);
        }
        if let Some(whole) = body.as_full() {
            self.pass(whole.len());
            self.end();
            return body;
        }
        Body::passing(Counted {
            body,
            progress: self.clone(),
        })
    }

    fn get(&self) -> u64 {
        let progress = self.0.as_ref();
        progress.map_or(0, |p| p.bytes.load(Ordering::Relaxed))
    }

    /// When the last byte passed, or the first was waited for. `None`: there are none, or nobody was to look.
    pub fn moved(&self) -> Option<Clock> {
        let progress = self.0.as_ref()?;
        let since = progress.moved.as_ref()?.load(Ordering::Relaxed);
        Some(progress.begun + Duration::from_micros(since))
    }

    /// Whether all has passed, or no more will.
    pub fn has_ended(&self) -> bool {
        let progress = self.0.as_ref();
        progress.is_none_or(|p| p.ended.load(Ordering::Acquire))
    }

    /// Waits until all has passed, or no more will.
    pub async fn ended(&self) {
        let Some(progress) = &self.0 else { return };
        // Before the look: an end in between is not missed.
        let end = progress.end.notified();
        if !progress.ended.load(Ordering::Acquire) {
            end.await;
        }
    }

    fn pass(&self, bytes: usize) {
        let Some(progress) = &self.0 else { return };
        progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(moved) = &progress.moved {
            let since = u64::try_from(progress.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            moved.store(since, Ordering::Relaxed);
        }
    }

    fn end(&self) {
        let Some(progress) = &self.0 else { return };
        if !progress.ended.swap(true, Ordering::Release) {
            progress.end.notify_waiters();
        }
    }
}

/// Waits until nothing has moved in any of these for so long.
pub async fn still(after: Duration, directions: &[&Sent]) {
    let begun = Clock::now();
    loop {
        let moved = directions.iter().filter_map(|sent| sent.moved());
        let until = moved.fold(begun, Clock::max) + after;
        if until <= Clock::now() {
            return;
        }
        sleep_until(until).await;
    }
}

/// Lets an answer go: it is settled when its body has ended, or the connection that it made something else.
pub fn watch<H: Send + Sync + Unpin + 'static>(
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
    if let Some(upgraded) = parts.extensions.get::<Upgraded>() {
        record.judge(true);
        let traffic = upgraded.counted(bounds.idle);
        record.sent = traffic.up.clone();
        upgraded.hold((
            Tail {
                record: Some(record),
                status,
                traffic,
            },
            held,
        ));
        return Response::from_parts(parts, body);
    }
    let ended = body.is_end_stream();
    let watched = Watched {
        body,
        record: Some(record),
        status,
        grpc_status,
        bytes: 0,
        deadline: bounds
            .deadline
            .map(|(at, error)| (Box::pin(sleep_until(at)), error)),
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
    /// Of a request that has just come.
    pub fn new(request: InFlight, grpc: bool) -> Self {
        Self {
            request,
            error: None,
            pick: None,
            judged: false,
            latency: Duration::ZERO,
            sent: Sent::default(),
            grpc,
            tunnelled: false,
            by_caller: false,
            delayed: false,
            story: None,
        }
    }

    /// Tells the balancer.
    pub fn judge(&mut self, success: bool) {
        if let Some(pick) = &mut self.pick
            && !std::mem::replace(&mut self.judged, true)
        {
            let latency = self.latency;
            pick.record(balance::Outcome { success, latency }, Instant::now());
        }
    }

    fn settle(self, outcome: Outcome) {
        let delay = self.delayed.then_some(ProxyError::FaultDelay);
        let outcome = Outcome {
            error: outcome.error.or(self.error).or(delay),
            request_bytes: self.sent.get(),
            ..outcome
        };
        self.request.finish(outcome);
        if let Some(story) = self.story {
            story.end(outcome);
        }
    }

    /// The row for an answer whose body failed.
    fn broken(&self, error: &BodyError) -> ProxyError {
        match error {
            BodyError::Http2(_) if self.tunnelled => ProxyError::TunnelReset,
            BodyError::Framing | BodyError::TooLarge => ProxyError::UpstreamProtocol,
            BodyError::Limit => ProxyError::WorkloadLimit,
            _ => ProxyError::UpstreamReset,
        }
    }
}

/// A request that has become a connection of another protocol: settled when that has ended.
struct Tail {
    record: Option<Record>,
    status: u16,
    traffic: Traffic,
}

impl Drop for Tail {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            record.settle(Outcome {
                status: self.status,
                error: self.traffic.cut.get().copied(),
                response_bytes: self.traffic.down.get(),
                ..Outcome::default()
            });
        }
    }
}

/// `grpc-status`, from headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// Codes that are the server's fault, as a 5xx is (gRPC, "Status codes and their use"): UNKNOWN,
/// DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS.
pub const fn is_failure(code: u8) -> bool {
    matches!(code, 2 | 4 | 13 | 14 | 15)
}

struct Watched<H> {
    body: Body,
    record: Option<Record>,
    status: u16,
    grpc_status: Option<u8>,
    bytes: u64,
    deadline: Option<(Pin<Box<Sleep>>, ProxyError)>,
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
        let of_caller = match error {
            Some(ProxyError::Cancelled) => true,
            Some(ProxyError::RequestTimeout) => record.by_caller,
            _ => false,
        };
        if !record.judged && !of_caller {
            let failed = self.grpc_status.is_some_and(is_failure);
            record.judge(error.is_none() && !failed);
        }
        let grpc_status = self.grpc_status.filter(|_| record.grpc);
        record.settle(Outcome {
            status: self.status,
            grpc_status,
            error,
            response_bytes: self.bytes,
            ..Outcome::default()
        });
    }

    /// Whether a bound has been passed.
    fn late(&mut self, cx: &mut Context<'_>) -> Option<ProxyError> {
        if let Some((deadline, error)) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Some(*error);
        }
        let (after, idle) = self.idle.as_mut()?;
        while idle.as_mut().poll(cx).is_ready() {
            // The request may move where the answer does not.
            let sent = self.record.as_ref().and_then(|r| r.sent.moved());
            let until = sent.map(|moved| moved + *after);
            match until.filter(|until| *until > Clock::now()) {
                Some(until) => idle.as_mut().reset(until),
                None => return Some(ProxyError::IdleTimeout),
            }
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
                    idle.as_mut().reset(Clock::now() + *after);
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
            Some(Err(error)) => {
                let record = this.record.as_ref();
                let error = record.map_or(ProxyError::UpstreamReset, |r| r.broken(error));
                this.settle(Some(error));
            }
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
    progress: Sent,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.progress.end();
    }
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
                this.progress.pass(data.len());
            } else if let Some(trailers) = frame.trailers_mut() {
                // An app may put them with the headers.
                wire::strip(trailers);
            }
        }
        if frame.is_none() || this.body.is_end_stream() {
            this.progress.end();
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
        let absorbed = self.body.poll_absorb(cx, account);
        if self.body.is_end_stream() {
            // Whoever reads it need not ask for more.
            self.progress.end();
        }
        absorbed
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::pin::pin;

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

    fn record(telemetry: &Telemetry, grpc: bool) -> Record {
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
        let request = telemetry.http.meter(&labels).start(&http::Method::POST);
        Record::new(request, grpc)
    }

    fn silent(telemetry: &Telemetry, grpc: bool) -> Response<Body> {
        let at = Clock::now() + Duration::from_secs(1);
        let bounds = Bounds::default().by(at, ProxyError::RequestTimeout);
        let silent = Response::new(Body::boxed(Silent));
        watch(silent, record(telemetry, grpc), bounds, ())
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_idle_where_neither_side_sends() {
        let telemetry = Telemetry::new();
        let bounds = Bounds {
            deadline: None,
            idle: Some(Duration::from_secs(1)),
        };
        let (mut record, silent) = (record(&telemetry, false), Body::boxed(Silent));
        record.sent = Sent::timed();
        let sent = record.sent.clone();
        let response = watch(Response::new(silent), record, bounds, ());
        let begun = Clock::now();
        let sending = async {
            for _ in 0..5 {
                sleep(Duration::from_millis(900)).await;
                sent.pass(1);
            }
            pending::<()>().await;
        };
        let mut body = response.into_body();
        tokio::select! {
            frame = body.frame() => assert!(matches!(frame, Some(Err(BodyError::Timeout)))),
            () = sending => {}
        }
        let took = begun.elapsed();
        assert!((5400..5600).contains(&took.as_millis()), "{took:?}");
        assert!(
            telemetry
                .encode()
                .contains(r#"response_flags="idle_timeout"} 1"#)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_has_ended_once_and_for_all_who_wait() {
        let mut sent = Sent::default();
        sent.ended().await;
        let mut body = sent.count(Body::boxed(Silent));
        {
            let mut ended = pin!(sent.ended());
            tokio::select! {
                biased;
                () = &mut ended => panic!("it has not ended"),
                frame = body.frame() => panic!("{frame:?}"),
                () = sleep(Duration::from_secs(1)) => {}
            }
            drop(body);
            ended.await;
        }
        sent.ended().await;
    }

    #[tokio::test]
    async fn a_body_that_is_here_is_counted_at_once_and_stays_as_it_is() {
        let mut sent = Sent::default();
        let body = sent.count(Body::full("four"));
        assert_eq!((sent.get(), sent.has_ended()), (4, true));
        assert_eq!(body.as_full().unwrap(), "four");
    }

    #[test]
    fn what_broke_an_answer_is_told_apart() {
        let telemetry = Telemetry::new();
        let mut record = record(&telemetry, false);
        let gone = || BodyError::Http2(h2::Reason::INTERNAL_ERROR.into());
        assert_eq!(record.broken(&gone()), ProxyError::UpstreamReset);
        record.tunnelled = true;
        assert_eq!(record.broken(&gone()), ProxyError::TunnelReset);
        assert_eq!(
            record.broken(&BodyError::Framing),
            ProxyError::UpstreamProtocol
        );
        assert_eq!(
            record.broken(&BodyError::Truncated),
            ProxyError::UpstreamReset
        );
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
