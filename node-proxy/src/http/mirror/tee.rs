//! A body of unknown length on its way, and what is kept of it for copies.
//!
//! Nothing waits: frames are kept as they pass. There is a copy when the body has ended whole; none when it grows past
//! the bound, fails, or is dropped before its end, and what was kept is dropped then. It belongs to the copies that wait
//! for it: when the last of them has gone, nothing is kept. It is charged to their workload until then.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{MAX_BODY, Whole};
use crate::budget::{Account, Charge, Resource};
use crate::http::body::{Body, BodyError, Passing};
use crate::http::size;

/// Keeps what passes through `body`. Returns the body to go on with.
pub(super) fn tee(body: Body) -> (Body, Awaited) {
    let shared = Arc::new(Shared {
        kept: Mutex::new(Kept {
            state: State::Passing(BytesMut::new()),
            size: 0,
            charge: None,
        }),
        settled: Notify::new(),
    });
    let tee = Tee {
        body,
        shared: Arc::downgrade(&shared),
    };
    (Body::passing(tee), Awaited(shared))
}

/// What a copy waits for. An extension of its request.
#[derive(Clone, Debug)]
pub(super) struct Awaited(Arc<Shared>);

impl Awaited {
    /// Waits for the body's end. What is kept is charged to the account from the first call on, until the last clone
    /// of this is dropped. `None`: there is no copy.
    pub(super) async fn whole(&self, account: &Arc<Account>) -> Option<Whole> {
        // Made before the look: it hears of an end from now on.
        let settled = self.0.settled.notified();
        let passing = {
            let mut kept = self.0.kept.lock();
            kept.charge_to(account);
            matches!(kept.state, State::Passing(_))
        };
        if passing {
            settled.await;
        }
        let kept = self.0.kept.lock();
        match &kept.state {
            State::Whole(whole) => Some(whole.clone()),
            State::Passing(_) | State::Gone => None,
        }
    }
}

#[derive(Debug)]
struct Shared {
    kept: Mutex<Kept>,
    /// The body is no longer passing.
    settled: Notify,
}

#[derive(Debug)]
struct Kept {
    state: State,
    /// Bytes, of trailers too.
    size: usize,
    charge: Option<Charge>,
}

#[derive(Debug)]
enum State {
    Passing(BytesMut),
    Whole(Whole),
    /// There is no copy.
    Gone,
}

impl Kept {
    fn charge_to(&mut self, account: &Arc<Account>) {
        if self.charge.is_some() {
            return;
        }
        let mut charge = account.open_charge(Resource::BufferedBytes);
        match charge.add(self.size) {
            Ok(()) => self.charge = Some(charge),
            Err(_) => self.give_up(),
        }
    }

    fn add(&mut self, frame: &Frame<Bytes>) {
        let State::Passing(data) = &mut self.state else {
            return;
        };
        let length = frame
            .data_ref()
            .map(Bytes::len)
            .or_else(|| frame.trailers_ref().map(size))
            .unwrap_or(0);
        if length > MAX_BODY - self.size
            || self.charge.as_mut().is_some_and(|c| c.add(length).is_err())
        {
            return self.give_up();
        }
        self.size += length;
        if let Some(bytes) = frame.data_ref() {
            data.extend_from_slice(bytes);
        } else {
            self.end(frame.trailers_ref().cloned());
        }
    }

    fn end(&mut self, trailers: Option<HeaderMap>) {
        if let State::Passing(data) = &mut self.state {
            let data = std::mem::take(data).freeze();
            self.state = State::Whole(Whole { data, trailers });
        }
    }

    fn give_up(&mut self) {
        self.state = State::Gone;
        self.size = 0;
        self.charge = None;
    }
}

struct Tee {
    body: Body,
    /// Dead: nothing is kept any more.
    shared: Weak<Shared>,
}

impl Tee {
    /// `None`: the end.
    fn see(&mut self, frame: Option<&Result<Frame<Bytes>, BodyError>>) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let passing = {
            let mut kept = shared.kept.lock();
            match frame {
                Some(Ok(frame)) => {
                    kept.add(frame);
                    // Whoever reads it need not ask for more.
                    if self.body.is_end_stream() {
                        kept.end(None);
                    }
                }
                Some(Err(_)) => kept.give_up(),
                None => kept.end(None),
            }
            matches!(kept.state, State::Passing(_))
        };
        if !passing {
            self.shared = Weak::new();
            shared.settled.notify_waiters();
        }
    }
}

impl http_body::Body for Tee {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        this.see(frame.as_ref());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Passing for Tee {
    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        self.body.poll_absorb(cx, account)
    }
}

impl Drop for Tee {
    fn drop(&mut self) {
        // An end that came on its own may have been looked for instead of read.
        if self.body.is_end_stream() {
            self.see(None);
        } else {
            self.see(Some(&Err(BodyError::Cancelled)));
        }
    }
}

#[cfg(test)]
mod tests;
