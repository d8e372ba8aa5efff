//! What lies between a socket and `h2`: bounds that `h2` leaves to its user.
//!
//! - Frames that bring nothing (SETTINGS, PING, WINDOW_UPDATE, PRIORITY, empty DATA, frames of unknown types) cost us work and
//!   cost their sender nothing (RFC 9113, section 10.5). Each uses up some of an allowance that requests, their data and every byte
//!   sent to the peer fill again: a peer that is sent much may acknowledge much. nginx bounds them likewise.
//! - A peer that takes nothing of what is written for [`STALL`] has gone.
//!
//! Either ends the connection. The streams that the peer opens are counted too: those that `h2` refuses itself (headers over the
//! bound or not valid, too many streams at once) it tells nobody of.
//!
//! Frames are looked at as they pass, however they are cut; nothing is kept but a frame's header.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// Neither a byte nor window of a peer that has something to take.
pub const STALL: Duration = Duration::from_secs(300);

/// The allowance of a new connection, and the most there is: 10,000 frames, where a client at rest sends a PING now and then.
const MOST: i64 = 10_000 * FRAME;
const FRAME: i64 = 8;
/// PING and SETTINGS are answered. With the answer's own bytes a PING that follows each message of a few bytes is paid for:
/// gRPC clients estimate the bandwidth like that.
const ANSWERED: i64 = 24;
/// A block of headers is a request.
const REQUEST: i64 = 32;
/// For each second.
const REFILL: i64 = 100 * FRAME;

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Abuse {
    /// The allowance is used up.
    #[error("too many frames that bring nothing")]
    Flood,
    /// Nothing was taken for [`STALL`].
    #[error("the peer does not read")]
    Stalled,
}

impl Abuse {
    /// Value of the metric label `reason`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flood => "flood",
            Self::Stalled => "stalled",
        }
    }
}

/// What was seen of a peer, for whoever has given the connection to `h2`, which keeps of an error no more than its text.
#[derive(Debug, Default)]
pub struct Seen {
    streams: AtomicU64,
    abuse: OnceLock<Abuse>,
}

impl Seen {
    /// Streams that the peer opened.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Why the connection ended, if it was this.
    pub fn abuse(&self) -> Option<Abuse> {
        self.abuse.get().copied()
    }

    fn ends(&self, abuse: Abuse) -> io::Error {
        // The first reason is the one.
        let _ = self.abuse.set(abuse);
        io::Error::other(abuse)
    }
}

/// A connection whose frames are watched.
#[derive(Debug)]
pub struct Frames<T> {
    io: T,
    scan: Scan,
    left: i64,
    refilled: Instant,
    last_stream: u32,
    seen: Arc<Seen>,
    /// Since when the peer has taken nothing.
    waiting: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<T> Frames<T> {
    /// Watches what a client sends: the preface first.
    pub fn of_client(io: T, seen: Arc<Seen>) -> Self {
        Self {
            io,
            scan: Scan::after(PREFACE),
            left: MOST,
            refilled: Instant::now(),
            last_stream: 0,
            seen,
            waiting: None,
            timer: None,
        }
    }

    fn received(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self {
            scan,
            left,
            last_stream,
            seen,
            ..
        } = self;
        scan.feed(bytes, |frame| {
            *left = (*left + frame.worth()).min(MOST);
            if frame.kind == HEADERS && frame.stream > *last_stream {
                *last_stream = frame.stream;
                seen.streams.fetch_add(1, Ordering::Relaxed);
            }
        });
        if *left >= 0 {
            return Ok(());
        }
        let passed = self.refilled.elapsed();
        self.refilled += passed;
        let refill = i64::try_from(passed.as_millis()).unwrap_or(i64::MAX);
        *left = left
            .saturating_add(refill.saturating_mul(REFILL) / 1000)
            .min(MOST);
        if *left < 0 {
            return Err(self.seen.ends(Abuse::Flood));
        }
        Ok(())
    }

    fn sent(&mut self, bytes: usize) {
        self.waiting = None;
        // A write is far shorter than 2^63 bytes.
        self.left = (self.left + bytes as i64).min(MOST);
    }

    fn written(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(bytes)) => self.sent(bytes),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => ready!(self.poll_stalled(cx))?,
        }
        written
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let deadline = *self.waiting.get_or_insert_with(Instant::now) + STALL;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        // It is left to run while the peer reads, and set anew when it ends too early.
        loop {
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(Err(self.seen.ends(Abuse::Stalled)));
            }
            timer.as_mut().reset(deadline);
        }
    }
}

/// What is looked at of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    length: u32,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Frame {
    /// What it adds to the allowance.
    fn worth(self) -> i64 {
        match self.kind {
            DATA if self.length > 0 || self.flags & END_STREAM != 0 => FRAME,
            HEADERS => REQUEST,
            SETTINGS | PING => -ANSWERED,
            _ => -FRAME,
        }
    }
}

/// Finds the frames in a stream of bytes.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Bytes before the next header.
    skip: usize,
    header: [u8; HEADER],
    have: usize,
}

impl Scan {
    pub(crate) fn after(bytes: usize) -> Self {
        Self {
            skip: bytes,
            header: [0; HEADER],
            have: 0,
        }
    }

    pub(crate) fn feed(&mut self, mut bytes: &[u8], mut found: impl FnMut(Frame)) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = (HEADER - self.have).min(bytes.len());
            if taken == 0 {
                return;
            }
            self.header[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEADER {
                let [a, b, c, kind, flags, stream @ ..] = self.header;
                let length = u32::from_be_bytes([0, a, b, c]);
                self.have = 0;
                // 24 bits.
                self.skip = length as usize;
                found(Frame {
                    length,
                    kind,
                    flags,
                    stream: u32::from_be_bytes(stream) & !RESERVED,
                });
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Frames<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buffer))?;
        Poll::Ready(this.received(&buffer.filled()[before..]))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Frames<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.written(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, parts);
        this.written(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// Of the client's connection preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// Of a frame's header (RFC 9113, section 4.1).
const HEADER: usize = 9;
/// The first bit of a stream's number.
const RESERVED: u32 = 1 << 31;
/// Kinds of frames, and a flag (RFC 9113, section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const END_STREAM: u8 = 1;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
