//! HTTP/1 (RFC 9112): heads, framing, connections.
//!
//! Our own, on `httparse`: the spelling of header names must survive the way through a tunnel, an idle
//! connection must hold next to nothing, and no message may mean two things to two parsers. Whatever is
//! ambiguous is refused (RFC 9112 11): [`Refused`] lists the shapes.
//!
//! - A head is read whole before it is parsed, into memory of its own size; values are slices of it.
//! - A connection is a reader and a writer. The reader travels with an incoming body and comes back when
//!   that has ended or is dropped, so a request may still come in while its answer goes out.
//! - Connection, Keep-Alive, Transfer-Encoding and the length are this module's: what a message says of
//!   them is used here and written anew for the next hop ([`remove_hop_by_hop`] for the rest).

use std::io;
use std::time::Duration;

use http::{HeaderMap, StatusCode, Version, header};
use mesh_api::errors::ProxyError;

use crate::http::body::BodyError;

mod case;
mod chunked;
mod client;
mod encode;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod head;
mod hop;
mod incoming;
mod outgoing;
mod reader;
mod server;
#[cfg(test)]
mod tests;

pub use case::HeaderCase;
pub use client::{Client, FailedSend, Home, OnInterim, Raw, SendError, Upgraded};
pub use head::AbsoluteForm;
pub(crate) use head::has_no_body;
pub(super) use hop::is_ours;
pub use hop::remove_hop_by_hop;
pub use incoming::IncomingBody;
pub use server::{Reuse, Server};

/// Headers of one head that are parsed at all.
const MOST_HEADERS: usize = 256;
/// How long a request that expects a 100 is held back without one.
pub(super) const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// Whether the sender of a request may wait to be asked for its body with a 100 (RFC 9110 10.1.1).
pub(super) fn expects_continue(version: Version, headers: &HeaderMap) -> bool {
    !matches!(version, Version::HTTP_09 | Version::HTTP_10)
        && headers
            .get(header::EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Bounds of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a head. Default 64 KiB.
    pub head: usize,
    /// Headers of a head; 256 at most. Default 100.
    pub headers: usize,
    /// From a head's first byte to its last. Default 10 s.
    pub head_time: Duration,
    /// Without a request. Default 1 h.
    pub idle: Duration,
    /// Without a byte of a body, either way, while one is waited for. Default 5 min.
    pub body_idle: Duration,
    /// Until the answer begins for a client that has closed its sending side: most that do so are gone. Default 10 s.
    pub half_closed: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: 64 * 1024,
            headers: 100,
            head_time: Duration::from_secs(10),
            idle: Duration::from_secs(3600),
            body_idle: Duration::from_secs(300),
            half_closed: Duration::from_secs(10),
        }
    }
}

/// Why a message is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refused {
    /// Not a request line or status line.
    #[error("malformed start line")]
    StartLine,
    /// A target that is none of the four forms (RFC 9112 3.2).
    #[error("malformed request target")]
    Target,
    /// Neither 1.0 nor 1.1.
    #[error("HTTP version not supported")]
    Version,
    /// The start line alone is over the bound.
    #[error("request line too long")]
    LineTooLong,
    /// The head is over the bound.
    #[error("head too large")]
    HeadTooLarge,
    /// More headers than the bound.
    #[error("too many headers")]
    TooManyHeaders,
    /// A line that ends without CR.
    #[error("bare line feed")]
    BareLineFeed,
    /// Not a token, whitespace before the colon, or a folded line.
    #[error("malformed header name")]
    HeaderName,
    /// NUL or another control character.
    #[error("malformed header value")]
    HeaderValue,
    /// None in HTTP/1.1, several, or not a host.
    #[error("missing, repeated or malformed Host")]
    Host,
    /// Not digits, over 2^63 - 1, or several that differ.
    #[error("malformed Content-Length")]
    ContentLength,
    /// Both Content-Length and Transfer-Encoding.
    #[error("Content-Length with Transfer-Encoding")]
    LengthAndEncoding,
    /// Not chunked at the end, twice, or in HTTP/1.0.
    #[error("malformed Transfer-Encoding")]
    TransferEncoding,
    /// A coding other than chunked.
    #[error("transfer coding not implemented")]
    Coding,
    /// The head did not come in time.
    #[error("slow head")]
    SlowHead,
    /// The client's workload holds as much as it may.
    #[error("too much is held for the workload")]
    Limit,
    /// A 101 that was not asked for, too many interim responses, or bytes after the end.
    #[error("unexpected response")]
    Unexpected,
}

impl Refused {
    /// What a client is answered with; a response that is refused is a 502.
    pub const fn status(self) -> StatusCode {
        self.answer().0
    }

    /// What the answer names as its cause, whatever its status.
    pub const fn error(self) -> ProxyError {
        self.answer().1
    }

    const fn answer(self) -> (StatusCode, ProxyError) {
        match self {
            Self::StartLine
            | Self::Target
            | Self::BareLineFeed
            | Self::HeaderName
            | Self::HeaderValue
            | Self::Host
            | Self::ContentLength
            | Self::LengthAndEncoding
            | Self::TransferEncoding => (StatusCode::BAD_REQUEST, ProxyError::MalformedRequest),
            Self::Version => (
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                ProxyError::UnsupportedProtocol,
            ),
            Self::LineTooLong => (StatusCode::URI_TOO_LONG, ProxyError::HeadersTooLarge),
            Self::HeadTooLarge | Self::TooManyHeaders => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                ProxyError::HeadersTooLarge,
            ),
            Self::Coding => (StatusCode::NOT_IMPLEMENTED, ProxyError::UnsupportedProtocol),
            Self::SlowHead => (StatusCode::REQUEST_TIMEOUT, ProxyError::SlowRequest),
            Self::Limit => (StatusCode::TOO_MANY_REQUESTS, ProxyError::WorkloadLimit),
            Self::Unexpected => (StatusCode::BAD_GATEWAY, ProxyError::UpstreamProtocol),
        }
    }

    /// Value of the metric label `reason`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StartLine => "start_line",
            Self::Target => "target",
            Self::Version => "version",
            Self::LineTooLong => "line_too_long",
            Self::HeadTooLarge => "head_too_large",
            Self::TooManyHeaders => "too_many_headers",
            Self::BareLineFeed => "bare_line_feed",
            Self::HeaderName => "header_name",
            Self::HeaderValue => "header_value",
            Self::Host => "host",
            Self::ContentLength => "content_length",
            Self::LengthAndEncoding => "length_and_encoding",
            Self::TransferEncoding => "transfer_encoding",
            Self::Coding => "coding",
            Self::SlowHead => "slow_head",
            Self::Limit => "limit",
            Self::Unexpected => "unexpected",
        }
    }
}

/// Why a captured connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is refused: answer with its status, then close.
    #[error("request refused: {0}")]
    Refused(#[from] Refused),
    /// The client's socket failed, or ended within a head.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client does not take the answer.
    #[error("the client does not read")]
    Stalled,
    /// The answer's body failed after its head went out; the connection must be cut.
    #[error("the answer's body failed: {0}")]
    Body(BodyError),
}

impl Error {
    /// What to answer with, if an answer is still possible.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused(refused) => Some(refused.status()),
            Self::Io(_) | Self::Stalled | Self::Body(_) => None,
        }
    }

    /// Value of the metric label `reason`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused(refused) => refused.name(),
            Self::Io(_) => "io",
            Self::Stalled => "stalled",
            Self::Body(_) => "body",
        }
    }
}
