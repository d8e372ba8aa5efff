//! A body that comes in over an HTTP/1 connection, and where its connection goes afterwards.
//!
//! The reader moves into the body. When the last byte was taken, or the body is dropped, it goes to its
//! [`Owner`]: back to the server for the next request, or with the writer to the pool of app connections.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

use super::chunked::{Chunked, Step};
use super::client::Returning;
use super::head::Framing;
use super::reader::Reader;
use crate::http::body::BodyError;

const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What is left of a body.
#[derive(Debug)]
pub(super) enum Rest {
    Length(u64),
    Chunked(Chunked),
    Close,
}

impl From<Framing> for Rest {
    fn from(framing: Framing) -> Self {
        match framing {
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunked::new()),
            Framing::Close => Self::Close,
        }
    }
}

impl Rest {
    /// Takes what was read already.
    pub(super) fn step(&mut self, reader: &mut Reader) -> Result<Step, BodyError> {
        match self {
            Self::Length(0) => Ok(Step::End(None)),
            Self::Length(left) => {
                let have = reader.buffered().len();
                if have == 0 {
                    return Ok(Step::NeedMore);
                }
                let length = usize::try_from(*left).map_or(have, |left| left.min(have));
                *left -= length as u64;
                Ok(Step::Data(reader.take(length)))
            }
            Self::Chunked(chunked) => chunked.step(reader),
            Self::Close if reader.buffered().is_empty() => Ok(Step::NeedMore),
            Self::Close => Ok(Step::Data(reader.take(reader.buffered().len()))),
        }
    }
}

/// Whom the reader goes to.
#[derive(Debug)]
pub(super) enum Owner {
    Server(Arc<Lent>),
    Client(Box<Returning>),
}

/// The body of a request or response that comes in over HTTP/1.
#[derive(Debug)]
pub struct IncomingBody {
    reader: Option<Reader>,
    rest: Rest,
    owner: Option<Owner>,
    /// Found behind the last data, not handed out yet.
    trailers: Option<HeaderMap>,
    /// As `trailers`: what the bytes behind the last data turned out to be.
    failure: Option<BodyError>,
    idle: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
    /// Since when the next byte has been waited for.
    waiting: Option<Instant>,
}

impl IncomingBody {
    pub(super) fn new(
        reader: Reader,
        framing: Framing,
        owner: Owner,
        idle: Option<Duration>,
    ) -> Self {
        Self {
            reader: Some(reader),
            rest: framing.into(),
            owner: Some(owner),
            trailers: None,
            failure: None,
            idle,
            timer: None,
            waiting: None,
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(trailers) = self.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Some(Err(failure)));
        }
        loop {
            let Some(reader) = &mut self.reader else {
                return Poll::Ready(None);
            };
            match self.rest.step(reader) {
                Err(error) => return Poll::Ready(Some(Err(self.fail(error)))),
                Ok(Step::Data(data)) => {
                    self.look_for_end();
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Ok(Step::End(trailers)) => {
                    self.end();
                    return Poll::Ready(trailers.map(|t| Ok(Frame::trailers(t))));
                }
                Ok(Step::NeedMore) => {}
            }
            if let Some(Owner::Server(lent)) = &self.owner {
                lent.ask_to_continue(reader);
            }
            match reader.poll_fill(cx) {
                Poll::Ready(Ok(0)) if matches!(self.rest, Rest::Close) => {
                    self.end();
                    return Poll::Ready(None);
                }
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Some(Err(self.fail(BodyError::Truncated))));
                }
                Poll::Ready(Ok(_)) => self.waiting = None,
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Some(Err(self.fail(BodyError::Io(error)))));
                }
                Poll::Pending => {
                    if self.poll_idle(cx).is_pending() {
                        return Poll::Pending;
                    }
                    return Poll::Ready(Some(Err(self.fail(BodyError::Timeout))));
                }
            }
        }
    }

    /// Takes the end from what was read, so that whoever sends the last data on knows that it is.
    fn look_for_end(&mut self) {
        let Some(reader) = &mut self.reader else {
            return;
        };
        // Data must stay where it is; only lines are looked at.
        let at_end = match &self.rest {
            Rest::Length(left) => *left == 0,
            Rest::Chunked(chunked) => chunked.may_end(reader.buffered()),
            Rest::Close => false,
        };
        if !at_end {
            return;
        }
        match self.rest.step(reader) {
            Ok(Step::End(trailers)) => {
                self.trailers = trailers;
                self.end();
            }
            // `may_end` has excluded data.
            Ok(Step::NeedMore | Step::Data(_)) => {}
            Err(error) => self.failure = Some(self.fail(error)),
        }
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(idle) = self.idle else {
            return Poll::Pending;
        };
        let deadline = *self.waiting.get_or_insert_with(Instant::now) + idle;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        // It is left to run while bytes come, and set anew when it ends too early.
        loop {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
    }

    fn end(&mut self) {
        self.timer = None;
        if let (Some(reader), Some(owner)) = (self.reader.take(), self.owner.take()) {
            match owner {
                Owner::Server(lent) => lent.give_back(reader, None),
                Owner::Client(returning) => returning.ended(reader),
            }
        }
    }

    /// What follows cannot be understood: the connection ends with this body.
    fn fail(&mut self, error: BodyError) -> BodyError {
        self.timer = None;
        match (self.reader.take(), self.owner.take()) {
            (Some(reader), Some(Owner::Server(lent))) => lent.broken(reader),
            (Some(reader), Some(Owner::Client(returning))) => returning.failed(reader),
            _ => {}
        }
        error
    }
}

impl http_body::Body for IncomingBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.get_mut().poll_data(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.reader.is_none() && self.trailers.is_none() && self.failure.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.rest {
            Rest::Length(left) => SizeHint::with_exact(*left),
            Rest::Chunked(_) | Rest::Close if self.reader.is_none() => SizeHint::with_exact(0),
            Rest::Chunked(_) | Rest::Close => SizeHint::default(),
        }
    }
}

impl Drop for IncomingBody {
    fn drop(&mut self) {
        let (Some(reader), Some(owner)) = (self.reader.take(), self.owner.take()) else {
            return;
        };
        match owner {
            Owner::Server(lent) => {
                let rest = std::mem::replace(&mut self.rest, Rest::Length(0));
                lent.give_back(reader, Some(rest));
            }
            Owner::Client(returning) => returning.failed(reader),
        }
    }
}

/// Where a server's reader comes back to.
#[derive(Debug, Default)]
pub(super) struct Lent(Mutex<LentState>);

#[derive(Debug, Default)]
struct LentState {
    back: Option<Returned>,
    waker: Option<Waker>,
    asked: Asked,
    /// What the socket did not take of a 100.
    unsent: &'static [u8],
}

/// Where the client stands that wants to be asked for its body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Asked {
    /// It does not want to, or was, or has its answer.
    #[default]
    Done,
    Waits,
}

/// A reader after its body.
#[derive(Debug)]
pub(super) enum Returned {
    /// What is left of the body, if it was dropped early.
    Usable(Reader, Option<Rest>),
    Broken(Reader),
}

impl Lent {
    pub(super) fn new(expects_continue: bool) -> Arc<Self> {
        let lent = Self::default();
        if expects_continue {
            lent.0.lock().asked = Asked::Waits;
        }
        Arc::new(lent)
    }

    /// Writes a 100 when the body is wanted for the first time. Nothing else is being written then.
    fn ask_to_continue(&self, reader: &Reader) {
        let mut state = self.0.lock();
        if state.asked == Asked::Done {
            return;
        }
        state.asked = Asked::Done;
        let socket: &tokio::net::TcpStream = reader.io.as_ref();
        // A socket that has failed says so when it is read.
        let written = crate::tcp::write_some(socket, CONTINUE).unwrap_or(CONTINUE.len());
        state.unsent = &CONTINUE[written..];
    }

    /// From now on the server writes. Whether the client still waits to be asked, and what must be written
    /// first.
    pub(super) fn answering(&self) -> (bool, &'static [u8]) {
        let mut state = self.0.lock();
        let waits = std::mem::take(&mut state.asked) == Asked::Waits;
        (waits, std::mem::take(&mut state.unsent))
    }

    fn give_back(&self, reader: Reader, rest: Option<Rest>) {
        self.put(Returned::Usable(reader, rest));
    }

    fn broken(&self, reader: Reader) {
        self.put(Returned::Broken(reader));
    }

    fn put(&self, returned: Returned) {
        let waker = {
            let mut state = self.0.lock();
            state.back = Some(returned);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Looks at what has come back, without taking it.
    pub(super) fn peek<T>(&self, look: impl FnOnce(Option<&Returned>) -> T) -> T {
        look(self.0.lock().back.as_ref())
    }

    /// Whatever has come back.
    pub(super) fn take(&self) -> Option<Returned> {
        self.0.lock().back.take()
    }

    /// The reader, if the body was read to its end.
    pub(super) fn take_ended(&self) -> Option<Reader> {
        let mut state = self.0.lock();
        match state.back.take() {
            Some(Returned::Usable(reader, None)) => Some(reader),
            other => {
                state.back = other;
                None
            }
        }
    }

    /// As [`Lent::take_ended`], when that is so.
    pub(super) fn poll_ended(&self, cx: &Context<'_>) -> Poll<Reader> {
        if let Some(reader) = self.take_ended() {
            return Poll::Ready(reader);
        }
        self.0.lock().waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Waits for the reader.
    pub(super) async fn returned(&self) -> Returned {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            match state.back.take() {
                Some(returned) => Poll::Ready(returned),
                None => {
                    state.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// Takes what is left of a body, up to `most` bytes, so that the connection can be used again.
pub(super) async fn drain(reader: &mut Reader, mut rest: Rest, most: usize) -> io::Result<bool> {
    let mut drained = 0;
    loop {
        match rest.step(reader) {
            Ok(Step::End(_)) => return Ok(true),
            Ok(Step::Data(data)) => {
                drained += data.len();
                if drained > most {
                    return Ok(false);
                }
            }
            Ok(Step::NeedMore) => {
                if poll_fn(|cx| reader.poll_fill(cx)).await? == 0 {
                    return Ok(false);
                }
            }
            Err(_) => return Ok(false),
        }
    }
}
