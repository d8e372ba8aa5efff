//! The reading half of a connection and what was read ahead.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio_util::io::poll_read_buf;

use crate::tcp::{CHUNK, with_scratch};

/// A read of at least this size is a bulk transfer: the next goes straight into memory that is handed on.
const BULK: usize = 16 * 1024;

/// Reads into this thread's scratch buffer and keeps a copy of exactly what came, so that a connection
/// that waits owns no buffer.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) io: OwnedReadHalf,
    buffer: BytesMut,
    eof: bool,
    bulk: bool,
}

impl AsRef<TcpStream> for Reader {
    fn as_ref(&self) -> &TcpStream {
        self.io.as_ref()
    }
}

impl Reader {
    pub(super) fn new(io: OwnedReadHalf, prefix: &[u8]) -> Self {
        Self {
            io,
            buffer: BytesMut::from(prefix),
            eof: false,
            bulk: false,
        }
    }

    /// What was read and not taken yet.
    pub(super) fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Takes the first `length` bytes.
    pub(super) fn take(&mut self, length: usize) -> Bytes {
        if length == self.buffer.len() {
            // The whole allocation, without making it a shared one.
            return std::mem::take(&mut self.buffer).freeze();
        }
        self.buffer.split_to(length).freeze()
    }

    /// Drops the first `length` bytes.
    pub(super) fn skip(&mut self, length: usize) {
        drop(self.take(length));
    }

    /// Reads once. 0 at the end of the stream, then and ever after.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        let read = if self.bulk && self.buffer.is_empty() {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            let limited = &mut (&mut chunk).limit(CHUNK);
            let read = ready!(poll_read_buf(Pin::new(&mut self.io), cx, limited))?;
            self.buffer = chunk;
            read
        } else {
            let Self { io, buffer, .. } = self;
            ready!(with_scratch(|scratch| {
                let mut read = ReadBuf::new(scratch);
                ready!(Pin::new(io).poll_read(cx, &mut read))?;
                buffer.extend_from_slice(read.filled());
                Poll::Ready(io::Result::Ok(read.filled().len()))
            }))?
        };
        self.bulk = read >= BULK;
        self.eof = read == 0;
        Poll::Ready(Ok(read))
    }

    /// Whether the end of the stream was read, and nothing before it is left.
    pub(super) fn has_ended(&self) -> bool {
        self.eof && self.buffer.is_empty()
    }

    /// As if it had been read.
    #[cfg(any(test, fuzzing))]
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }

    pub(super) fn into_parts(self) -> (OwnedReadHalf, Bytes) {
        (self.io, self.buffer.freeze())
    }
}
