//! The one streaming body type.
//!
//! Whatever a message came in over, its body is a [`Body`]: data in [`Bytes`], then trailers perhaps. Nothing
//! is read before it is asked for, and an HTTP/2 peer is given window only for what was taken, so
//! back-pressure reaches the sender. What waits because a receiver takes nothing is charged ([`Body::hold`]).

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, header};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{sleep, timeout};

use super::h1::IncomingBody;
use crate::budget::{Account, Resource};

mod ahead;
mod behind;
mod exchange;

use ahead::Ahead;
use behind::Behind;
use exchange::OnEnd;
pub use exchange::{ExchangeError, Held, exchange};

/// How long a receiver may take nothing while its workload has as much waiting as it may.
const PATIENCE: Duration = Duration::from_secs(5);

/// A body of a request or response.
#[derive(Debug, Default)]
pub struct Body(Inner);

#[derive(Default)]
enum Inner {
    #[default]
    Empty,
    Full(Bytes),
    Http1(Box<IncomingBody>),
    Http2(Http2Body),
    Boxed(BoxedBody),
    Passing(Box<dyn Passing + Send + Unpin>),
}

type BoxedBody = Pin<Box<dyn http_body::Body<Data = Bytes, Error = BodyError> + Send>>;

/// A body that passes another one on.
pub trait Passing: http_body::Body<Data = Bytes, Error = BodyError> {
    /// [`Body::poll_absorb`] of the other.
    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()>;
}

/// Why a body could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The peer ended the connection before the body's end.
    #[error("the body was cut short")]
    Truncated,
    /// Chunks that are not chunks, or more or fewer bytes than were announced.
    #[error("malformed body")]
    Framing,
    /// A bound was met: of a chunk's extensions, of trailers, or of whoever reads the body.
    #[error("too large")]
    TooLarge,
    /// The HTTP/2 stream was reset.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// The HTTP/2 connection failed.
    #[error("the HTTP/2 connection failed: {0}")]
    Http2(h2::Error),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// Nothing came for too long.
    #[error("nothing came for too long")]
    Timeout,
    /// Whoever read it gave up.
    #[error("cancelled")]
    Cancelled,
    /// The workload has as much waiting as it may.
    #[error("too much waits for receivers that do not read")]
    Limit,
}

impl BodyError {
    /// Whether the sender of the body is to blame, and not the way here or the reader.
    pub fn is_peer_fault(&self) -> bool {
        match self {
            Self::Truncated | Self::Framing | Self::TooLarge | Self::Reset(_) | Self::Timeout => {
                true
            }
            Self::Http2(_) | Self::Io(_) | Self::Cancelled | Self::Limit => false,
        }
    }

    /// Value of a metric label.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Framing => "framing",
            Self::TooLarge => "too_large",
            Self::Reset(_) => "reset",
            Self::Http2(_) => "http2",
            Self::Io(_) => "io",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Limit => "limit",
        }
    }

    /// What an HTTP/2 stream is reset with that was to carry the body on.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Reset(reason) => *reason,
            Self::Cancelled | Self::Timeout | Self::Limit => Reason::CANCEL,
            Self::Truncated | Self::Framing | Self::TooLarge | Self::Http2(_) | Self::Io(_) => {
                Reason::INTERNAL_ERROR
            }
        }
    }
}

impl From<h2::Error> for BodyError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Http2(error),
        }
    }
}

impl Body {
    /// No body.
    pub const fn empty() -> Self {
        Self(Inner::Empty)
    }

    /// All of it.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() {
            Self::empty()
        } else {
            Self(Inner::Full(bytes))
        }
    }

    /// The body of a message whose `headers` came on this stream.
    pub fn http2(stream: RecvStream, headers: &HeaderMap) -> Self {
        if stream.is_end_stream() {
            return Self::empty();
        }
        let length = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        Self(Inner::Http2(Http2Body {
            stream,
            left: length,
            taken: 0,
            ahead: None,
            data_ended: false,
            on_end: None,
        }))
    }

    /// As [`Body::http2`]; `on_end` hears of the end, and of a body that was dropped before.
    fn http2_of_exchange(stream: RecvStream, headers: &HeaderMap, mut on_end: OnEnd) -> Self {
        let mut body = Self::http2(stream, headers);
        match &mut body.0 {
            Inner::Http2(body) => body.on_end = Some(on_end),
            _ => on_end.ended(),
        }
        body
    }

    /// Any other.
    pub fn boxed(
        body: impl http_body::Body<Data = Bytes, Error = BodyError> + Send + 'static,
    ) -> Self {
        Self(Inner::Boxed(Box::pin(body)))
    }

    /// One that passes another on.
    pub fn passing(body: impl Passing + Send + Unpin + 'static) -> Self {
        Self(Inner::Passing(Box::new(body)))
    }

    /// This one, with `first` before it.
    pub fn after(self, first: Bytes) -> Self {
        match (first.is_empty(), self.is_end_stream()) {
            // What has ended is known to be of no length.
            (_, true) => Self::full(first),
            (true, false) => self,
            (false, false) => Self::passing(Behind { first, body: self }),
        }
    }

    pub(super) fn http1(body: IncomingBody) -> Self {
        Self(Inner::Http1(Box::new(body)))
    }

    /// The same again, where all of it is here.
    pub fn try_clone(&self) -> Option<Self> {
        match &self.0 {
            Inner::Empty => Some(Self::empty()),
            Inner::Full(bytes) => Some(Self(Inner::Full(bytes.clone()))),
            Inner::Http1(_) | Inner::Http2(_) | Inner::Boxed(_) | Inner::Passing(_) => None,
        }
    }

    /// All of it, where all of it is here; without trailers then.
    pub fn as_full(&self) -> Option<&Bytes> {
        static NOTHING: Bytes = Bytes::new();
        match &self.0 {
            Inner::Empty => Some(&NOTHING),
            Inner::Full(bytes) => Some(bytes),
            Inner::Http1(_) | Inner::Http2(_) | Inner::Boxed(_) | Inner::Passing(_) => None,
        }
    }

    /// The next frame; None at the end. Cancelling it loses nothing.
    pub async fn frame(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next frame if it is here, or the end (`Some(None)`); otherwise None, without waiting.
    pub async fn frame_now(&mut self) -> Option<Option<Result<Frame<Bytes>, BodyError>>> {
        poll_fn(|cx| {
            Poll::Ready(match self.poll_next(cx) {
                Poll::Ready(frame) => Some(frame),
                Poll::Pending => None,
            })
        })
        .await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Inner::Empty => Poll::Ready(None),
            Inner::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.0 = Inner::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Inner::Http1(body) => Pin::new(&mut **body).poll_frame(cx),
            Inner::Http2(body) => body.poll_frame(cx),
            Inner::Boxed(body) => body.as_mut().poll_frame(cx),
            Inner::Passing(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    /// Waits for a receiver that does not take what there is, `length` bytes of it. That is charged to the account
    /// meanwhile, and so is what comes in over HTTP/2: the sender goes on until its window is full. While the account
    /// has no room the receiver has [`PATIENCE`], so that one that is slow is not taken for one that stands still.
    pub async fn hold<T>(
        &mut self,
        account: Option<&Arc<Account>>,
        length: usize,
        receiver: impl Future<Output = T>,
    ) -> Result<T, BodyError> {
        let Some(account) = account else {
            return Ok(receiver.await);
        };
        let mut held = account.open_charge(Resource::BufferedBytes);
        let mut full = held.add(length).is_err();
        let mut patience = None;
        let mut receiver = std::pin::pin!(receiver);
        poll_fn(|cx| {
            if let Poll::Ready(ready) = receiver.as_mut().poll(cx) {
                return Poll::Ready(Ok(ready));
            }
            full = full || self.poll_absorb(cx, account).is_ready();
            if !full {
                return Poll::Pending;
            }
            let late = patience.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
            late.as_mut().poll(cx).map(|()| Err(BodyError::Limit))
        })
        .await
    }

    /// Takes in what has come over HTTP/2, charged to the account until it is asked for. Ready: the account has no
    /// room for the last of it.
    pub fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        match &mut self.0 {
            // A socket is not read before it is asked for.
            Inner::Empty | Inner::Full(_) | Inner::Http1(_) | Inner::Boxed(_) => Poll::Pending,
            Inner::Http2(body) => body.poll_absorb(cx, account),
            Inner::Passing(body) => body.poll_absorb(cx, account),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.get_mut().poll_next(cx)
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Http1(body) => body.is_end_stream(),
            Inner::Http2(body) => body.is_end_stream(),
            Inner::Boxed(body) => body.is_end_stream(),
            Inner::Passing(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Http1(body) => body.size_hint(),
            Inner::Http2(body) => body
                .left
                .map_or_else(SizeHint::default, SizeHint::with_exact),
            Inner::Boxed(body) => body.size_hint(),
            Inner::Passing(body) => body.size_hint(),
        }
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Empty => "Empty",
            Self::Full(_) => "Full",
            Self::Http1(_) => "Http1",
            Self::Http2(_) => "Http2",
            Self::Boxed(_) => "Boxed",
            Self::Passing(_) => "Passing",
        })
    }
}

/// The receiving side of an HTTP/2 stream.
struct Http2Body {
    stream: RecvStream,
    /// What Content-Length says is still to come; h2 holds the peer to it.
    left: Option<u64>,
    /// Handed out, but the peer has no window for it again yet.
    taken: usize,
    /// Taken in before it was asked for.
    ahead: Option<Box<Ahead>>,
    data_ended: bool,
    on_end: Option<OnEnd>,
}

impl Http2Body {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Whoever asks for more has done with what it was given.
        let taken = std::mem::take(&mut self.taken);
        if taken > 0 {
            // Fails only when more is released than was received.
            let _ = self.stream.flow_control().release_capacity(taken);
        }
        if let Some(ahead) = &mut self.ahead {
            match ahead.next() {
                Some(Ok(data)) => return Poll::Ready(Some(Ok(self.give(data)))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.ahead = None,
            }
        }
        while !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Poll::Ready(Some(Ok(self.give(data)))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.data_ended = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx));
        if trailers.is_ok() {
            self.ended();
        }
        Poll::Ready(match trailers {
            Ok(Some(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Ok(None) => None,
            Err(error) => Some(Err(error.into())),
        })
    }
}

impl Http2Body {
    fn give(&mut self, data: Bytes) -> Frame<Bytes> {
        self.taken = data.len();
        self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
        if self.is_end_stream() {
            self.ended();
        }
        Frame::data(data)
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.as_ref().is_none_or(|ahead| ahead.is_empty()) && self.stream.is_end_stream()
    }

    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        while !self.data_ended {
            let data = match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => continue,
                data => data,
            };
            let ahead = self
                .ahead
                .get_or_insert_with(|| Box::new(Ahead::new(account)));
            self.data_ended = !matches!(data, Some(Ok(_)));
            if ahead.put(data).is_err() {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    fn ended(&mut self) {
        if let Some(mut on_end) = self.on_end.take() {
            on_end.ended();
        }
    }
}

/// Why a body did not get through to an HTTP/2 stream. The stream has been reset.
#[derive(Debug, thiserror::Error)]
pub enum PumpError {
    /// The body failed.
    #[error("the body failed: {0}")]
    Body(BodyError),
    /// The receiver reset the stream.
    #[error("the receiver reset the stream: {0}")]
    Reset(Reason),
    /// The receiver gave no window for too long.
    #[error("the receiver does not read")]
    Stalled,
    /// The connection of the stream failed.
    #[error("the stream failed: {0}")]
    Stream(h2::Error),
}

/// Sends a body to its end, no faster than the receiver takes it; what waits for it is charged to `account`. The last
/// data ends the stream where it is known to be the last. `stall`: how long the receiver may leave data without
/// window; `None`: for ever.
pub async fn pump(
    mut body: Body,
    to: &mut SendStream<Bytes>,
    account: Option<&Arc<Account>>,
    stall: Option<Duration>,
) -> Result<(), PumpError> {
    let result = async {
        loop {
            if body.is_end_stream() {
                return to.send_data(Bytes::new(), true).map_err(stream_error);
            }
            let frame = poll_fn(|cx| {
                if let Poll::Ready(frame) = body.poll_next(cx) {
                    return Poll::Ready(Ok(frame));
                }
                // The receiver's reset must not go unnoticed until there is something to send.
                to.poll_reset(cx).map(|reset| {
                    Err(match reset {
                        Ok(reason) => PumpError::Reset(reason),
                        Err(error) => stream_error(error),
                    })
                })
            });
            let Some(frame) = frame.await? else {
                return to.send_data(Bytes::new(), true).map_err(stream_error);
            };
            match frame.map_err(PumpError::Body)?.into_data() {
                Ok(data) => {
                    let last = body.is_end_stream();
                    send(data, last, to, &mut body, account, stall).await?;
                    if last {
                        return Ok(());
                    }
                }
                Err(frame) => {
                    // Data or trailers: there is no third kind.
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return to.send_trailers(trailers).map_err(stream_error);
                }
            }
        }
    }
    .await;
    if let Err(error) = &result {
        to.send_reset(match error {
            PumpError::Body(error) => error.reason(),
            PumpError::Reset(_) | PumpError::Stalled | PumpError::Stream(_) => Reason::CANCEL,
        });
    }
    result
}

/// Sends data as the window allows.
async fn send(
    mut data: Bytes,
    last: bool,
    to: &mut SendStream<Bytes>,
    body: &mut Body,
    account: Option<&Arc<Account>>,
    stall: Option<Duration>,
) -> Result<(), PumpError> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        if to.capacity() == 0 {
            let capacity = poll_fn(|cx| to.poll_capacity(cx));
            let held = body.hold(account, data.len(), capacity);
            let held = match stall {
                Some(stall) => timeout(stall, held)
                    .await
                    .map_err(|_late| PumpError::Stalled)?,
                None => held.await,
            };
            match held.map_err(PumpError::Body)? {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(stream_error(error)),
                None => return Err(PumpError::Reset(Reason::CANCEL)),
            }
        }
        let now = data.split_to(to.capacity().min(data.len()));
        if now.is_empty() {
            continue;
        }
        let ends = last && data.is_empty();
        to.send_data(now, ends).map_err(stream_error)?;
    }
    Ok(())
}

fn stream_error(error: h2::Error) -> PumpError {
    match error.reason() {
        Some(reason) if error.is_reset() => PumpError::Reset(reason),
        _ => PumpError::Stream(error),
    }
}

#[cfg(test)]
mod tests;
