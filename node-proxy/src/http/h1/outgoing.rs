//! Writes a message: its head together with what there is of its body, then the rest as it comes.
//!
//! Small pieces are gathered, so that a message that is here takes one system call; large ones are written
//! from where they are. Nothing is asked of the body while the socket does not take what is there; what waits is
//! charged to the workload ([`Body::hold`]).

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::Body as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use super::case::HeaderCase;
use super::encode;
use super::head::Framing;
use crate::budget::Account;
use crate::http::body::{Body, BodyError};
use crate::tcp::QuietHalf;

/// Data up to this size is copied behind what waits to be written.
pub(super) const SMALL: usize = 16 * 1024;
/// What is gathered before it is written in any case.
const GATHERED: usize = 32 * 1024;

/// Why a message was not written to its end.
#[derive(Debug)]
pub(super) enum Failure {
    Io(io::Error),
    /// The receiver takes nothing.
    Stalled,
    Body(BodyError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The writing half of a connection. Dropping it sends nothing: the connection ends with its reader, or as
/// was asked for.
#[derive(Debug)]
pub(super) struct Writer {
    io: QuietHalf,
    /// How long the receiver may take nothing. None: for ever.
    stall: Option<Duration>,
    /// Whom what waits for the receiver is charged to.
    account: Option<Arc<Account>>,
}

impl AsRef<TcpStream> for Writer {
    fn as_ref(&self) -> &TcpStream {
        self.socket()
    }
}

impl Writer {
    pub(super) fn new(
        io: OwnedWriteHalf,
        stall: Option<Duration>,
        account: Option<Arc<Account>>,
    ) -> Self {
        Self {
            io: QuietHalf::new(io),
            stall,
            account,
        }
    }

    pub(super) fn charge_to(&mut self, account: &Arc<Account>) {
        self.account = Some(Arc::clone(account));
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.io.as_ref()
    }

    /// The socket with the half that reads. None if they are not of one.
    pub(super) fn reunite(self, read: OwnedReadHalf) -> Option<TcpStream> {
        self.io.reunite(read)
    }

    /// Writes `head`, then all of `body`.
    pub(super) async fn message(
        &self,
        head: Vec<u8>,
        body: &mut Body,
        framing: Framing,
        case: Option<HeaderCase>,
    ) -> Result<(), Failure> {
        let mut out = head;
        let mut left = match framing {
            Framing::Length(length) => length,
            Framing::Chunked | Framing::Close => u64::MAX,
        };
        while !body.is_end_stream() {
            let frame = match body.frame_now().await {
                Some(frame) => frame,
                None => {
                    self.behind(&out, body).await?;
                    out = Vec::new();
                    body.frame().await
                }
            };
            let frame = match frame {
                None => break,
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    // What came before it is still the receiver's.
                    self.behind(&out, body).await?;
                    return Err(Failure::Body(error));
                }
            };
            match frame.into_data() {
                Ok(data) => {
                    let length = data.len() as u64;
                    if length > left {
                        self.behind(&out, body).await?;
                        return Err(Failure::Body(BodyError::Framing));
                    }
                    left -= length;
                    self.data(&mut out, data, framing, body).await?;
                }
                Err(frame) => {
                    if framing == Framing::Chunked
                        && let Ok(trailers) = frame.into_trailers()
                    {
                        out.extend_from_slice(b"0\r\n");
                        encode::trailers(&mut out, case.as_ref(), &trailers);
                        return self.behind(&out, body).await;
                    }
                    break;
                }
            }
        }
        match framing {
            Framing::Length(_) if left > 0 => {
                self.behind(&out, body).await?;
                return Err(Failure::Body(BodyError::Truncated));
            }
            Framing::Length(_) | Framing::Close => {}
            Framing::Chunked => out.extend_from_slice(b"0\r\n\r\n"),
        }
        self.behind(&out, body).await
    }

    async fn data(
        &self,
        out: &mut Vec<u8>,
        data: Bytes,
        framing: Framing,
        body: &mut Body,
    ) -> Result<(), Failure> {
        if data.is_empty() {
            // An empty chunk would be the last.
            return Ok(());
        }
        let chunked = framing == Framing::Chunked;
        if chunked {
            push_size(out, data.len());
        }
        let end: &[u8] = if chunked { b"\r\n" } else { b"" };
        if data.len() <= SMALL {
            out.extend_from_slice(&data);
            out.extend_from_slice(end);
            if out.len() >= GATHERED {
                self.behind(out, body).await?;
                out.clear();
            }
            return Ok(());
        }
        self.gather([out.as_slice(), &data, end], body).await?;
        out.clear();
        Ok(())
    }

    /// Writes all of `bytes`.
    pub(super) async fn all(&self, bytes: &[u8]) -> Result<(), Failure> {
        self.behind(bytes, &mut Body::empty()).await
    }

    /// Writes all of `bytes`, which `body` follows.
    async fn behind(&self, bytes: &[u8], body: &mut Body) -> Result<(), Failure> {
        self.gather([bytes, b"", b""], body).await
    }

    async fn gather(&self, parts: [&[u8]; 3], body: &mut Body) -> Result<(), Failure> {
        let mut parts = parts;
        while parts.iter().any(|part| !part.is_empty()) {
            let written = if parts[1].is_empty() && parts[2].is_empty() {
                self.socket().try_write(parts[0])
            } else {
                self.socket().try_write_vectored(&parts.map(IoSlice::new))
            };
            match written {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(mut written) => {
                    for part in &mut parts {
                        let now = written.min(part.len());
                        part.advance(now);
                        written -= now;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let length = parts.iter().map(|part| part.len()).sum();
                    // Boxed: what it takes to wait is large, and seldom needed.
                    let held = Box::pin(body.hold(self.account.as_ref(), length, self.writable()));
                    held.await.map_err(Failure::Body)??;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn writable(&self) -> Result<(), Failure> {
        match self.stall {
            None => self.socket().writable().await?,
            Some(stall) => timeout(stall, self.socket().writable())
                .await
                .map_err(|_late| Failure::Stalled)??,
        }
        Ok(())
    }
}

/// A chunk's size line.
fn push_size(out: &mut Vec<u8>, length: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let significant = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    for position in (0..significant).rev() {
        out.push(DIGITS[length >> (position * 4) & 0xf]);
    }
    out.extend_from_slice(b"\r\n");
}
