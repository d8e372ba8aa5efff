//! A connection to an app: one request at a time, its answer's body streamed.
//!
//! The head goes out with what there is of the body in one write. A body that is still coming in is sent
//! while the answer is waited for; if the answer's head comes first, a task sends the rest, so that an app
//! that answers while it reads is not waited for by a caller that reads while it sends. The task ends with
//! the body, with the connection, some time after the answer, or when the answer is dropped.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::header;
use http::{Method, Response, StatusCode, Version, request, response};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::encode::{self, Connection, Says};
use super::head::{self, Framing, Head, Scan};
use super::incoming::{IncomingBody, Owner};
use super::outgoing::{Failure, SMALL, Writer};
use super::reader::Reader;
use super::{Limits, Refused};
use crate::http::BoxedRequest;
use crate::http::apps::Holding;
use crate::http::body::{Body, BodyError};
use crate::tcp::{self, Ending};

use self::upload::{Running, Uploaded, stream, upload};

mod upload;

/// Interim responses to one request.
const MOST_INTERIM: usize = 32;

/// The client's side of one connection to an app.
#[derive(Debug)]
pub struct Client {
    reader: Reader,
    writer: Writer,
    limits: Arc<Limits>,
    /// It has carried a request before.
    used: bool,
    holding: Option<Holding>,
}

/// Called with the connection when an answer has ended and it can be used again.
pub type Home = Arc<dyn Fn(Client) + Send + Sync>;

/// Extension of a request: called with each interim response (1xx, not 101) of the app.
#[derive(Clone)]
pub struct OnInterim(pub Arc<dyn Fn(response::Parts) + Send + Sync>);

impl std::fmt::Debug for OnInterim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnInterim")
    }
}

/// Extension of a response that made the connection one of raw bytes: a 101, or a 2xx to CONNECT.
#[derive(Clone, Debug)]
pub struct Upgraded(Arc<Mutex<Option<Raw>>>);

/// A connection that is HTTP no more.
#[derive(Debug)]
pub struct Raw {
    /// The connection.
    pub stream: TcpStream,
    /// What was read ahead.
    pub ahead: Bytes,
    /// To be held as long as the stream.
    pub holding: Option<Holding>,
}

impl Upgraded {
    /// The connection, once.
    pub fn take(&self) -> Option<Raw> {
        self.0.lock().take()
    }
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The app closed the connection.
    #[error("the app closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// What the app sent is not HTTP/1, or means two things.
    #[error("response refused: {0}")]
    Refused(Refused),
    /// The request's own body failed.
    #[error("the request's body failed: {0}")]
    Body(BodyError),
}

/// A request that got no answer.
#[derive(Debug)]
pub struct FailedSend {
    /// Why.
    pub error: SendError,
    /// Whether the connection had carried a request before.
    pub reused: bool,
    /// Whether any byte of an answer came.
    pub answered: bool,
    /// The request, if nothing of its body is lost and no byte of an answer came.
    pub request: Option<BoxedRequest>,
}

impl Client {
    /// On an open connection.
    pub fn new(stream: TcpStream) -> Self {
        Self::with(stream, None, Arc::default())
    }

    /// On an open connection that is charged to a workload.
    pub fn with(stream: TcpStream, holding: Option<Holding>, limits: Arc<Limits>) -> Self {
        let (read, write) = stream.into_split();
        let account = holding.as_ref().map(|h| Arc::clone(h.account()));
        Self {
            reader: Reader::new(read, &[]),
            writer: Writer::new(write, Some(limits.body_idle), account),
            limits,
            used: false,
            holding,
        }
    }

    /// Sends a request and waits for the head of the answer, without limit of time: dropping the future
    /// closes the connection. When the answer's body has ended, `home` gets the connection if it can be
    /// used again.
    pub async fn send(
        mut self,
        request: BoxedRequest,
        home: Option<Home>,
    ) -> Result<Response<Body>, FailedSend> {
        let reused = std::mem::replace(&mut self.used, true);
        let BoxedRequest { mut head, body } = request;
        let again = body.try_clone();
        let mut progress = Progress::default();
        match self.exchange(&mut head, body, home, &mut progress).await {
            Ok(response) => Ok(response),
            Err(error) => {
                let again = again.filter(|_| !progress.answered);
                Err(FailedSend {
                    error,
                    reused,
                    answered: progress.answered,
                    request: again.map(|body| BoxedRequest { head, body }),
                })
            }
        }
    }

    async fn exchange(
        self,
        parts: &mut request::Parts,
        mut body: Body,
        home: Option<Home>,
        progress: &mut Progress,
    ) -> Result<Response<Body>, SendError> {
        // Not taken apart: each part would be held twice while the answer is waited for.
        let (head, framing) = encode_request(parts, &body);
        // Until there is an answer somebody may give up.
        let mut reader = Ending::new(self.reader, tcp::let_go);
        let (read, sent) = match framing {
            // What fits into the socket's buffer needs nobody to read it.
            Some(framing) if body.as_full().is_none_or(|full| full.len() > SMALL) => {
                let upload = upload(self.writer, head, body, framing, parts);
                let limits = &self.limits;
                Box::pin(stream(&mut reader, limits, parts, upload, progress)).await?
            }
            framing => {
                let framing = framing.unwrap_or(Framing::Length(0));
                let writer = Ending::new(self.writer, tcp::reset_on_close);
                let written = writer.message(head, &mut body, framing, None).await;
                drop(body);
                let sent = match &written {
                    Ok(()) => Sent::Whole(writer.finished()),
                    Err(_) => Sent::Part { _writer: writer },
                };
                // An app that answers without reading may have closed: its answer is read all the same.
                progress.failed = written.err();
                let read = read_head(&mut reader, &self.limits, parts, None, progress).await;
                (read, sent)
            }
        };
        let head = progress.blame(read)?;
        let returning = Returning {
            limits: self.limits,
            used: self.used,
            holding: self.holding,
            home: home.filter(|_| head.keep_alive),
            sent,
        };
        returning.answer(reader.finished(), parts, head)
    }

    /// Whether the connection is as it was left: open, and nothing came that nobody asked for.
    pub fn is_idle(&mut self) -> bool {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        self.reader.buffered().is_empty() && self.reader.poll_fill(&mut cx).is_pending()
    }

    /// Ends when the app closes the idle connection or sends what nobody asked for.
    pub fn poll_closed(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<()> {
        self.reader.poll_fill(cx).map(|_closed| ())
    }
}

/// A connection whose reader is with the body of an answer.
pub(in crate::http::h1) struct Returning {
    limits: Arc<Limits>,
    used: bool,
    holding: Option<Holding>,
    home: Option<Home>,
    sent: Sent,
}

impl std::fmt::Debug for Returning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Returning")
    }
}

/// Where the writer is.
enum Sent {
    /// The request is out.
    Whole(Writer),
    /// It is not, and never will be.
    Part { _writer: Ending<Writer> },
    /// With the body of the request.
    Upload(Arc<Mutex<Uploaded>>, Option<Running>),
}

impl Returning {
    /// Makes the response from its head.
    fn answer(
        self,
        mut reader: Reader,
        request: &request::Parts,
        head: Head<response::Parts>,
    ) -> Result<Response<Body>, SendError> {
        let Head {
            mut parts, framing, ..
        } = head;
        let connect = request.method == Method::CONNECT;
        if parts.status == StatusCode::SWITCHING_PROTOCOLS || (connect && parts.status.is_success())
        {
            let asked = connect || request.headers.contains_key(header::UPGRADE);
            let writer = self.sent.into_writer().filter(|_| asked);
            let (read, ahead) = reader.into_parts();
            let stream = writer.and_then(|writer| writer.reunite(read));
            let raw = Raw {
                stream: stream.ok_or(SendError::Refused(Refused::Unexpected))?,
                ahead,
                holding: self.holding,
            };
            parts
                .extensions
                .insert(Upgraded(Arc::new(Mutex::new(Some(raw)))));
            return Ok(Response::from_parts(parts, Body::empty()));
        }
        if let Framing::Length(length) = framing {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if length <= reader.buffered().len() {
                let body = Body::full(reader.take(length));
                self.ended(reader);
                return Ok(Response::from_parts(parts, body));
            }
        }
        let owner = Owner::Client(Box::new(self));
        let body = IncomingBody::new(reader, framing, owner, None);
        Ok(Response::from_parts(parts, Body::http1(body)))
    }

    /// The answer was read to its end.
    pub(super) fn ended(self, reader: Reader) {
        let Self {
            limits,
            used,
            holding,
            home,
            sent,
        } = self;
        // Bytes behind the answer belong to no request: such a connection is not to be trusted.
        if let (Some(writer), Some(home)) = (sent.into_writer(), home)
            && reader.buffered().is_empty()
        {
            home(Client {
                reader,
                writer,
                limits,
                used,
                holding,
            });
        }
    }

    /// The answer was not read to its end: the app is told that nobody wants the rest.
    pub(super) fn failed(self, reader: Reader) {
        tcp::reset_on_close(reader.io.as_ref());
    }
}

impl Sent {
    /// The writer, if the request is out whole. A body that is still on its way may go on for a while.
    fn into_writer(self) -> Option<Writer> {
        match self {
            Self::Whole(writer) => Some(writer),
            Self::Part { .. } => None,
            Self::Upload(uploaded, running) => {
                let writer = uploaded.lock().take_writer();
                if writer.is_none()
                    && let Some(running) = running
                {
                    running.answered();
                }
                writer
            }
        }
    }
}

/// What happened to a request on its way.
#[derive(Debug, Default)]
struct Progress {
    answered: bool,
    failed: Option<Failure>,
}

impl Progress {
    /// The head, or why there is none: what failed first counts.
    fn blame(&mut self, read: ReadHead) -> Result<Head<response::Parts>, SendError> {
        let error = match read {
            Ok(Some(head)) => return Ok(head),
            Ok(None) => SendError::Closed,
            Err(error) => error,
        };
        Err(match (error, self.failed.take()) {
            (SendError::Closed | SendError::Io(_), Some(Failure::Io(error))) => {
                SendError::Io(error)
            }
            (error, _) => error,
        })
    }
}

type ReadHead = Result<Option<Head<response::Parts>>, SendError>;

/// Reads heads up to the final one. None: the app closed the connection before any byte of one.
async fn read_head(
    reader: &mut Reader,
    limits: &Limits,
    request: &request::Parts,
    mut go: Option<oneshot::Sender<()>>,
    progress: &mut Progress,
) -> ReadHead {
    for _ in 0..=MOST_INTERIM {
        let Some(bytes) = read_head_bytes(reader, limits, progress).await? else {
            return Ok(None);
        };
        let head = head::response(&bytes, limits, &request.method).map_err(SendError::Refused)?;
        let status = head.parts.status;
        if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some(head));
        }
        if status == StatusCode::CONTINUE
            && let Some(go) = go.take()
        {
            // The upload may have ended already.
            let _ = go.send(());
        }
        if let Some(OnInterim(call)) = request.extensions.get() {
            call(head.parts);
        }
    }
    Err(SendError::Refused(Refused::Unexpected))
}

async fn read_head_bytes(
    reader: &mut Reader,
    limits: &Limits,
    progress: &mut Progress,
) -> Result<Option<Bytes>, SendError> {
    let mut scan = Scan::default();
    loop {
        let buffered = reader.buffered();
        progress.answered |= !buffered.is_empty();
        // Apps may end lines with a bare LF: nothing is read differently for it (RFC 9112 2.2).
        let found = scan.find(buffered, false).map_err(SendError::Refused)?;
        if let Some(end) = found.filter(|end| *end <= limits.head) {
            return Ok(Some(reader.take(end)));
        }
        if buffered.len() >= limits.head {
            return Err(SendError::Refused(scan.too_large(limits.head)));
        }
        match poll_fn(|cx| reader.poll_fill(cx)).await {
            Ok(0) if reader.buffered().is_empty() => return Ok(None),
            Ok(0) => return Err(SendError::Closed),
            Ok(_) => {}
            Err(error) => return Err(SendError::Io(error)),
        }
    }
}

fn encode_request(parts: &mut request::Parts, body: &Body) -> (Vec<u8>, Option<Framing>) {
    let mut out = Vec::with_capacity(512);
    let (framing, keep_length) = encode::frame(&parts.headers, body, Framing::Chunked);
    if framing == Framing::Chunked || parts.version != Version::HTTP_10 {
        // HTTP/1.0 knows no chunks.
        parts.version = Version::HTTP_11;
    }
    let wants_body = matches!(parts.method, Method::POST | Method::PUT | Method::PATCH);
    // RFC 9110 8.6: no length where no body is meant.
    let written = match framing {
        Framing::Length(0) if !wants_body && !keep_length => None,
        framing => Some(framing),
    };
    let connection = if parts.headers.contains_key(header::UPGRADE) {
        Connection::Upgrade
    } else if parts.version == Version::HTTP_10 {
        Connection::KeepAlive
    } else {
        Connection::Default
    };
    let says = Says {
        framing: written,
        keep_length,
        connection,
    };
    encode::request(&mut out, parts, says);
    (out, written)
}
