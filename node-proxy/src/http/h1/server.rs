//! A client's connection: requests in, answers out, one after the other.
//!
//! A request that was sent ahead (pipelining) waits in the socket until the answer before it is out. A client that has
//! said that it sends nothing more (half-closed) is answered what it asked before. While nothing is asked the connection
//! owns its socket and no buffer.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::{Method, Request, Response, StatusCode, Version, response};
use http_body::Body as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, timeout, timeout_at};

use super::case::HeaderCase;
use super::encode::{self, Connection, Says};
use super::head::{self, Framing, Head, Scan};
use super::hop::tokens;
use super::incoming::{IncomingBody, Lent, Owner, Rest, Returned, drain};
use super::outgoing::{Failure, Writer};
use super::reader::Reader;
use super::{Error, Limits, Refused, expects_continue};
use crate::budget::{Account, Charge, Resource};
use crate::http::body::{Body, BodyError};
use crate::http::limits::MOST_UNCHARGED;
use crate::tcp;

/// An unread request body up to this size is read to its end for the sake of the next request.
const DRAIN: usize = 64 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// Bytes and time that a closing connection reads on, so that its last answer is not lost to a reset.
const LINGER: usize = 256 * 1024;
const LINGER_TIME: Duration = Duration::from_secs(2);

/// What a captured connection can be used for after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Another request.
    Yes,
    /// Nothing: [`Server::close`] it.
    No,
    /// Raw bytes ([`Server::into_raw`]): the answer was a 101, or a 2xx to CONNECT.
    Raw,
}

/// The server's side of one captured connection.
#[derive(Debug)]
pub struct Server {
    /// None: lent to the body of the request.
    reader: Option<Reader>,
    lent: Option<Arc<Lent>>,
    writer: Writer,
    limits: Limits,
    request: Current,
    /// What was read and not asked for, if someone is charged.
    held: Option<Charge>,
}

/// What must be known of a request to answer it.
#[derive(Clone, Debug)]
struct Current {
    method: Method,
    version: Version,
    keep_alive: bool,
    /// It asked for a 100 and its body was not there.
    expects_continue: bool,
}

impl Current {
    /// What a request is answered as that could not be read.
    fn unknown() -> Self {
        Self {
            method: Method::GET,
            version: Version::HTTP_11,
            keep_alive: false,
            expects_continue: false,
        }
    }
}

impl Server {
    /// Serves on `socket`, from which `prefix` was read already.
    pub fn new(socket: TcpStream, prefix: Bytes, limits: Limits) -> Self {
        let (read, write) = socket.into_split();
        Self {
            reader: Some(Reader::new(read, &prefix)),
            lent: None,
            writer: Writer::new(write, Some(limits.body_idle), None),
            limits,
            request: Current::unknown(),
            held: None,
        }
    }

    /// Charges what waits, of the client or for it, to a workload.
    pub fn charged_to(mut self, account: &Arc<Account>) -> Self {
        self.writer.charge_to(account);
        self.held = Some(account.open_charge(Resource::BufferedBytes));
        self
    }

    /// The next request. None: there will be none, and the connection is to be closed. The answer to
    /// [`Error::Refused`] is given by [`Server::respond`], which closes then.
    ///
    /// The extensions hold a [`HeaderCase`], and [`AbsoluteForm`](super::AbsoluteForm) where it applies.
    /// Headers are as they came: hop-by-hop ones are still there. Waits until the body of the request before
    /// has been read or dropped.
    pub async fn next(&mut self) -> Result<Option<Request<Body>>, Error> {
        if self.reader.is_none() && !self.take_back().await {
            return Ok(None);
        }
        self.request = Current::unknown();
        let Some(bytes) = self.read_head().await? else {
            return Ok(None);
        };
        let Head {
            parts,
            framing,
            keep_alive,
        } = head::request(&bytes, &self.limits)?;
        self.request.version = parts.version;
        self.request.keep_alive = keep_alive;
        self.request.method.clone_from(&parts.method);
        let body = self.body(framing, &parts.headers);
        Ok(Some(Request::from_parts(parts, body)))
    }

    /// Whether nothing of a request has come that was not answered.
    pub fn is_idle(&self) -> bool {
        self.reader
            .as_ref()
            .is_some_and(|reader| reader.buffered().is_empty())
    }

    async fn read_head(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(reader) = &mut self.reader else {
            return Ok(None);
        };
        let limits = &self.limits;
        let mut scan = Scan::default();
        let mut deadline = None;
        loop {
            // RFC 9112 2.2: an empty line before a request line is ignored.
            while scan.is_new() && reader.buffered().starts_with(b"\r\n") {
                reader.skip(2);
                scan = Scan::default();
            }
            let buffered = reader.buffered();
            if let Some(end) = scan.find(buffered, true)? {
                if end > limits.head {
                    return Err(scan.too_large(limits.head).into());
                }
                let head = reader.take(end);
                // From here on the request is charged.
                charge(&mut self.held, reader)?;
                return Ok(Some(head));
            }
            if buffered.len() >= limits.head {
                return Err(scan.too_large(limits.head).into());
            }
            let begun = !buffered.is_empty();
            let fill = poll_fn(|cx| reader.poll_fill(cx));
            let read = if begun {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + limits.head_time);
                timeout_at(deadline, fill)
                    .await
                    .map_err(|_late| Refused::SlowHead)??
            } else {
                match timeout(limits.idle, fill).await {
                    Ok(read) => read?,
                    Err(_idle) => return Ok(None),
                }
            };
            if read == 0 {
                return if begun {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                } else {
                    Ok(None)
                };
            }
            charge(&mut self.held, reader)?;
        }
    }

    fn body(&mut self, framing: Framing, headers: &HeaderMap) -> Body {
        let Some(reader) = &mut self.reader else {
            return Body::empty();
        };
        if let Framing::Length(length) = framing {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if length <= reader.buffered().len() {
                return Body::full(reader.take(length));
            }
        }
        let expects =
            reader.buffered().is_empty() && expects_continue(self.request.version, headers);
        self.request.expects_continue = expects;
        let lent = Lent::new(expects);
        self.lent = Some(Arc::clone(&lent));
        let Some(reader) = self.reader.take() else {
            return Body::empty();
        };
        Body::http1(IncomingBody::new(
            reader,
            framing,
            Owner::Server(lent),
            Some(self.limits.body_idle),
        ))
    }

    /// Waits for the reader, and reads what is left of a body that was dropped. False: the connection
    /// cannot go on.
    async fn take_back(&mut self) -> bool {
        let Some(lent) = self.lent.take() else {
            return false;
        };
        match lent.returned().await {
            Returned::Usable(reader, None) => {
                self.reader = Some(reader);
                true
            }
            Returned::Usable(mut reader, Some(rest)) => {
                let draining = timeout(DRAIN_TIME, drain(&mut reader, rest, DRAIN)).await;
                self.reader = Some(reader);
                matches!(draining, Ok(Ok(true)))
            }
            Returned::Broken(reader) => {
                self.reader = Some(reader);
                false
            }
        }
    }

    /// Passes an interim response on (1xx, not 101). Clients of HTTP/1.0 know none (RFC 9110 15.2).
    pub async fn interim(&mut self, response: response::Parts) -> io::Result<()> {
        let status = response.status;
        if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.request.version != Version::HTTP_11 {
            return Ok(());
        }
        let mut out = Vec::new();
        if status == StatusCode::CONTINUE
            && let Some(lent) = &self.lent
        {
            let (waits, unsent) = lent.answering();
            out.extend_from_slice(unsent);
            if !waits && self.request.expects_continue {
                // It has been asked already.
                return self.write(&out).await;
            }
        }
        let says = Says {
            framing: None,
            keep_length: false,
            connection: Connection::Default,
        };
        encode::response(&mut out, &response, says);
        self.write(&out).await
    }

    async fn write(&mut self, out: &[u8]) -> io::Result<()> {
        self.writer.all(out).await.map_err(|failure| match failure {
            Failure::Io(error) => error,
            Failure::Stalled | Failure::Body(_) => io::ErrorKind::TimedOut.into(),
        })
    }

    /// Answers the request that [`Server::next`] gave (or refused), and streams the body as fast as the
    /// client takes it. `Connection: close` in the headers ends the connection. After an error nothing can
    /// be written any more: close the connection; [`Error::Body`] has been made visible to the client as far
    /// as HTTP/1 can (RFC 9112 8).
    pub async fn respond(&mut self, response: Response<Body>) -> Result<Reuse, Error> {
        let (parts, mut body) = response.into_parts();
        let status = parts.status;
        let request = self.request.clone();
        let raw = status == StatusCode::SWITCHING_PROTOCOLS
            || (request.method == Method::CONNECT && status.is_success());
        if raw && !self.settle() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        let bodiless = raw || head::has_no_body(&request.method, status);
        let chunks = request.version == Version::HTTP_11 && parts.version != Version::HTTP_10;
        let otherwise = if chunks {
            Framing::Chunked
        } else {
            Framing::Close
        };
        let (framing, keep_length) = if bodiless {
            let about_body = !raw && status != StatusCode::NO_CONTENT;
            let keep = about_body && encode::announced(&parts.headers).is_some();
            (None, keep)
        } else {
            let (framing, keep_length) = encode::frame(&parts.headers, &body, otherwise);
            (Some(framing), keep_length)
        };
        let mut out = Vec::with_capacity(512);
        let expected = match &self.lent {
            Some(lent) => {
                let (waits, unsent) = lent.answering();
                out.extend_from_slice(unsent);
                waits
            }
            None => false,
        };
        let keep_alive = request.keep_alive
            && framing != Some(Framing::Close)
            // A client that was not asked for its body may or may not send it (RFC 9110 10.1.1).
            && !expected
            && !asks_to_close(&parts.headers)
            && !self.has_ended()
            && self.can_drain();
        // Either side's HTTP/1.0 ends the connection unless it is told otherwise.
        let old = request.version == Version::HTTP_10 || parts.version == Version::HTTP_10;
        let connection = match (raw, keep_alive, old) {
            (true, _, _) if status == StatusCode::SWITCHING_PROTOCOLS => Connection::Upgrade,
            (true, _, _) => Connection::Default,
            (false, true, true) => Connection::KeepAlive,
            // RFC 9110 15.5.22: it must name what to upgrade to.
            (false, true, _)
                if status == StatusCode::UPGRADE_REQUIRED
                    && parts.headers.contains_key(header::UPGRADE) =>
            {
                Connection::Upgrade
            }
            (false, true, _) => Connection::Default,
            (false, false, _) => Connection::Close,
        };
        let says = Says {
            framing,
            keep_length,
            connection,
        };
        encode::response(&mut out, &parts, says);
        let written = match framing {
            None => {
                drop(body);
                self.writer.all(&out).await
            }
            Some(framing) => {
                let case = if body.is_end_stream() {
                    None
                } else {
                    parts.extensions.get::<HeaderCase>().cloned()
                };
                tokio::select! {
                    biased;
                    written = self.writer.message(out, &mut body, framing, case) => written,
                    error = tcp::failed(self.writer.socket()) => Err(error.into()),
                }
            }
        };
        match written {
            Ok(()) if raw => Ok(Reuse::Raw),
            Ok(()) if keep_alive => Ok(Reuse::Yes),
            Ok(()) => Ok(Reuse::No),
            Err(Failure::Io(error)) => Err(error.into()),
            Err(Failure::Stalled) => {
                self.reset();
                Err(Error::Stalled)
            }
            Err(Failure::Body(error)) => {
                // Where the end of the connection would be taken for the end of the body, only a reset
                // tells.
                // A client that does not read would keep the kernel's memory.
                if framing == Some(Framing::Close) || matches!(error, BodyError::Limit) {
                    self.reset();
                }
                Err(Error::Body(error))
            }
        }
    }

    /// Takes the reader back if the body has ended. Whether the connection has it.
    fn settle(&mut self) -> bool {
        if self.reader.is_none()
            && let Some(lent) = &self.lent
            && let Some(reader) = lent.take_ended()
        {
            self.reader = Some(reader);
            self.lent = None;
        }
        self.reader.is_some()
    }

    /// Whether what is unread of the request can be read, as far as is known now.
    fn can_drain(&self) -> bool {
        let Some(lent) = &self.lent else {
            return true;
        };
        lent.peek(|returned| match returned {
            Some(Returned::Broken(_)) => false,
            Some(Returned::Usable(_, Some(Rest::Length(left)))) => *left <= DRAIN as u64,
            Some(Returned::Usable(_, _)) | None => true,
        })
    }

    /// Whether the client sends nothing more, as far as is known now, and all that it sent was taken.
    fn has_ended(&self) -> bool {
        match (&self.reader, &self.lent) {
            (Some(reader), _) => reader.has_ended(),
            (None, Some(lent)) => lent.peek(|returned| match returned {
                Some(Returned::Usable(reader, None)) => reader.has_ended(),
                _ => false,
            }),
            (None, None) => false,
        }
    }

    /// Ends when nobody is there to be answered: the connection has failed, or the client has closed its side for
    /// [`Limits::half_closed`]. The end of what a client sends may be that of a client that only waits for its answer, and
    /// whether it has gone is told by its kernel at the next packet, of the answer or of keepalive. Meant to be waited for
    /// beside the answer, to stop work that nobody waits for; while the request's body is coming in, the body tells of its
    /// end. Cancelling it loses nothing.
    pub async fn gone(&mut self) {
        let most = self.limits.head;
        let patience = self.limits.half_closed;
        // Boxed: what seldom waits holds no room.
        let mut late: Option<Pin<Box<Sleep>>> = None;
        let mut failed = pin!(tcp::failed(self.writer.socket()));
        poll_fn(|cx| {
            if self.reader.is_none()
                && let Some(lent) = &self.lent
                && let Poll::Ready(reader) = lent.poll_ended(cx)
            {
                self.reader = Some(reader);
                self.lent = None;
            }
            // Whoever has the reader else does not read while it waits for its own receiver.
            if let Some(reader) = &mut self.reader {
                // What is sent ahead is read ahead, up to the size of a head.
                while reader.buffered().len() < most {
                    match reader.poll_fill(cx) {
                        Poll::Ready(Ok(0)) => {
                            let late = late.get_or_insert_with(|| Box::pin(sleep(patience)));
                            if late.as_mut().poll(cx).is_ready() {
                                return Poll::Ready(());
                            }
                            break;
                        }
                        Poll::Ready(Ok(_)) if charge(&mut self.held, reader).is_ok() => {}
                        // The workload holds too much already: no more is read.
                        Poll::Ready(Ok(_)) => break,
                        Poll::Ready(Err(_)) => return Poll::Ready(()),
                        // A failure is read, too.
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
            failed.as_mut().poll(cx).map(drop)
        })
        .await;
    }

    /// Closes the connection so that the last answer arrives: says that nothing more comes, then reads for
    /// a moment what the client still sends (RFC 9112 9.6).
    pub async fn close(mut self) {
        if let Some(lent) = self.lent.take() {
            match lent.take() {
                Some(Returned::Usable(reader, _) | Returned::Broken(reader)) => {
                    self.reader = Some(reader);
                }
                None => return,
            }
        }
        let Some(mut reader) = self.reader else {
            return;
        };
        if tcp::finish_writing(self.writer.socket()).is_err() {
            return;
        }
        let _late = timeout(LINGER_TIME, async {
            let mut read = 0;
            while read < LINGER {
                reader.skip(reader.buffered().len());
                match poll_fn(|cx| reader.poll_fill(cx)).await {
                    Ok(0) | Err(_) => return,
                    Ok(length) => read += length,
                }
            }
        })
        .await;
    }

    /// Makes the end of the connection a reset.
    pub fn reset(&self) {
        tcp::reset_on_close(self.writer.socket());
    }

    /// After [`Reuse::Raw`]: the socket and what was read ahead. None if the reader is not here, which
    /// [`Server::respond`] excludes before it says so.
    pub fn into_raw(self) -> Option<(TcpStream, Bytes)> {
        let (read, ahead) = self.reader?.into_parts();
        Some((self.writer.reunite(read)?, ahead))
    }
}

/// Charges what was read and not taken, where it is more than a client usually sends at once.
fn charge(held: &mut Option<Charge>, reader: &Reader) -> Result<(), Refused> {
    let Some(held) = held else {
        return Ok(());
    };
    let length = reader.buffered().len();
    let length = if length < MOST_UNCHARGED { 0 } else { length };
    held.resize(length).map_err(|_| Refused::Limit)
}

fn asks_to_close(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(tokens)
        .any(|option| option.eq_ignore_ascii_case(b"close"))
}

#[cfg(test)]
impl Server {
    /// Bytes of memory that the reader owns.
    pub(super) fn buffered_capacity(&self) -> usize {
        self.reader.as_ref().map_or(0, Reader::capacity)
    }
}
