//! A request's body that can be sent again.
//!
//! It is kept while the first try sends it, so that nothing waits for it to be complete. Past the bound
//! what was kept is dropped and the body goes on as a stream that cannot be sent again; one that says
//! up front that it is longer is not kept at all. A try that comes after another starts with what was
//! kept and goes on with the rest of the stream where the one before it stopped.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use crate::budget::{Account, Charge, Resource};
use crate::http::body::{self, Passing};
use crate::http::size;

/// Frames that are kept at most, so that a body of many tiny ones is bounded too.
const MAX_FRAMES: usize = 1024;
/// A frame smaller than this is copied: kept as it is, it would keep the whole buffer it was read into.
const COPY_BELOW: usize = 4096;

/// A body, and what was kept of it.
#[derive(Debug)]
pub struct Replay<B>(Arc<Mutex<State<B>>>);

/// The body as one try sends it. Only the latest is served: one that was abandoned for it stays pending.
#[derive(Debug)]
pub struct Attempt<B> {
    state: Arc<Mutex<State<B>>>,
    number: u32,
    /// Kept frames that were sent already.
    next: usize,
}

#[derive(Debug)]
struct State<B> {
    body: B,
    /// `None`: past the bound, or not wanted any more.
    kept: Option<Vec<Bytes>>,
    trailers: Option<HeaderMap>,
    room: usize,
    /// For what is kept, if someone is charged.
    charge: Option<Charge>,
    /// The stream has ended; with an error it cannot be sent again.
    ended: bool,
    attempts: u32,
}

impl<B: Body<Data = Bytes> + Unpin> Replay<B> {
    /// Keeps up to `max` bytes.
    pub fn new(body: B, max: usize) -> Self {
        let too_long = usize::try_from(body.size_hint().lower()).map_or(true, |lower| lower > max);
        Self(Arc::new(Mutex::new(State {
            ended: body.is_end_stream(),
            body,
            kept: (!too_long).then(Vec::new),
            trailers: None,
            room: max,
            charge: None,
            attempts: 0,
        })))
    }

    /// Charges what is kept to a workload; what it has no room for is not kept.
    pub fn charged_to(self, account: &Arc<Account>) -> Self {
        self.0.lock().charge = Some(account.open_charge(Resource::BufferedBytes));
        self
    }

    /// The body for the next try. `None`: it cannot be sent again.
    pub fn attempt(&self) -> Option<Attempt<B>> {
        let mut state = self.0.lock();
        if state.attempts > 0 && state.kept.is_none() {
            return None;
        }
        state.attempts += 1;
        Some(Attempt {
            number: state.attempts,
            next: 0,
            state: Arc::clone(&self.0),
        })
    }

    /// Whether it could be sent again now.
    pub fn is_replayable(&self) -> bool {
        self.0.lock().kept.is_some()
    }

    /// There will be no further try: keeps no more, and drops what was kept as soon as the try that is on
    /// its way has sent it. To be called when an answer is passed on.
    pub fn commit(&self) {
        let mut state = self.0.lock();
        if state.attempts <= 1 {
            state.forget();
        } else {
            // A later try may still be sending it; it is dropped with the last of both.
            state.room = 0;
        }
    }

    /// Bytes that are kept.
    #[cfg(test)]
    pub fn kept(&self) -> u64 {
        self.0
            .lock()
            .kept
            .as_ref()
            .map_or(0, |kept| kept.iter().map(|frame| frame.len() as u64).sum())
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Attempt<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let mut state = this.state.lock();
        if state.attempts != this.number {
            return Poll::Pending;
        }
        if let Some(kept) = &state.kept {
            if let Some(frame) = kept.get(this.next) {
                this.next += 1;
                return Poll::Ready(Some(Ok(Frame::data(frame.clone()))));
            }
            if state.ended {
                let trailers = (this.next == kept.len())
                    .then(|| state.trailers.clone())
                    .flatten();
                // One past the frames: sent.
                this.next = kept.len() + 1;
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
            }
        } else if state.ended {
            return Poll::Ready(None);
        }
        let frame = match ready!(Pin::new(&mut state.body).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                state.ended = true;
                state.forget();
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                state.ended = true;
                if let Some(kept) = &state.kept {
                    this.next = kept.len() + 1;
                }
                return Poll::Ready(None);
            }
        };
        state.keep(&frame);
        this.next = state.kept.as_ref().map_or(0, Vec::len);
        if frame.is_trailers() {
            state.ended = true;
            this.next += 1;
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        let state = self.state.lock();
        if state.attempts != self.number {
            return false;
        }
        match &state.kept {
            Some(kept) => {
                let trailers_left = state.trailers.is_some() && self.next <= kept.len();
                self.next >= kept.len()
                    && !trailers_left
                    && (state.ended || state.body.is_end_stream())
            }
            None => state.ended || state.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.state.lock();
        let left: u64 = state.kept.as_ref().map_or(0, |kept| {
            kept.iter().skip(self.next).map(|f| f.len() as u64).sum()
        });
        if state.ended {
            return SizeHint::with_exact(left);
        }
        let rest = state.body.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + left);
        }
        hint.set_lower(rest.lower() + left);
        hint
    }
}

impl Passing for Attempt<body::Body> {
    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.attempts != self.number {
            return Poll::Pending;
        }
        state.body.poll_absorb(cx, account)
    }
}

impl<B> State<B> {
    fn forget(&mut self) {
        self.kept = None;
        self.charge = None;
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(kept) = &mut self.kept else { return };
        let size = frame
            .data_ref()
            .map(Buf::remaining)
            .or_else(|| frame.trailers_ref().map(size))
            .unwrap_or(0);
        let charged = self.charge.as_mut().is_none_or(|c| c.add(size).is_ok());
        if size > self.room || kept.len() >= MAX_FRAMES || !charged {
            return self.forget();
        }
        self.room -= size;
        if let Some(data) = frame.data_ref() {
            kept.push(if size < COPY_BELOW {
                Bytes::copy_from_slice(data)
            } else {
                data.clone()
            });
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
    }
}

#[cfg(test)]
mod tests;
