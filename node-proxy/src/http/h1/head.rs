//! From the bytes of a head to a request or response and what it says of its body and connection.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri, Version, request, response};
use std::mem::MaybeUninit;

use super::case::HeaderCase;
use super::hop::tokens;
use super::{Limits, MOST_HEADERS, Refused};

/// Largest Content-Length.
const MOST_LENGTH: u64 = i64::MAX.unsigned_abs();

/// Extension of a request whose target was in absolute form (RFC 9112 3.2.2); it is written so again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AbsoluteForm;

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes.
    Length(u64),
    /// As the chunks say.
    Chunked,
    /// With the connection.
    Close,
}

/// A head that was understood.
#[derive(Debug)]
pub(super) struct Head<P> {
    pub(super) parts: P,
    pub(super) framing: Framing,
    /// The connection can be used again, as far as this side says.
    pub(super) keep_alive: bool,
}

/// Looks for the end of a head, line by line, without looking at a byte twice.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scan {
    at: usize,
    line: usize,
    /// The end of the first line; 0 before it was seen.
    first: usize,
}

impl Scan {
    /// The length of the head once it is whole. `strict`: every line must end with CR LF.
    pub(super) fn find(&mut self, bytes: &[u8], strict: bool) -> Result<Option<usize>, Refused> {
        while let Some(found) = memchr::memchr(b'\n', &bytes[self.at..]) {
            let end = self.at + found;
            let with_cr = end > self.line && bytes[end - 1] == b'\r';
            if strict && !with_cr {
                return Err(Refused::BareLineFeed);
            }
            let empty = end - usize::from(with_cr) == self.line;
            self.at = end + 1;
            self.line = self.at;
            if self.first == 0 {
                self.first = self.at;
            }
            if empty {
                return Ok(Some(self.at));
            }
        }
        self.at = bytes.len();
        Ok(None)
    }

    /// Whether no line has been seen yet.
    pub(super) fn is_new(&self) -> bool {
        self.first == 0
    }

    /// What a head is refused with that is over `most` bytes.
    pub(super) fn too_large(&self, most: usize) -> Refused {
        if self.first == 0 || self.first > most {
            Refused::LineTooLong
        } else {
            Refused::HeadTooLarge
        }
    }
}

/// Parses a whole head of a request.
pub(super) fn request(bytes: &Bytes, limits: &Limits) -> Result<Head<request::Parts>, Refused> {
    let mut headers = [const { MaybeUninit::uninit() }; MOST_HEADERS];
    let headers = &mut headers[..limits.headers.min(MOST_HEADERS)];
    let mut parsed = httparse::Request::new(&mut []);
    let status = httparse::ParserConfig::default().parse_request_with_uninit_headers(
        &mut parsed,
        bytes,
        headers,
    );
    if status.map_err(refused)?.is_partial() {
        return Err(Refused::StartLine);
    }
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(Refused::StartLine);
    };
    let version = version(minor);
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| Refused::StartLine)?;
    let (mut map, case, says) = collect(bytes, parsed.headers)?;
    let (uri, absolute) = uri(bytes, &method, target)?;
    host(&mut map, &uri, absolute, says.hosts, version)?;
    let framing = says.framing(version)?.unwrap_or(Framing::Length(0));

    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.method = method;
    parts.uri = uri;
    parts.version = version;
    parts.headers = map;
    parts.extensions.insert(case);
    if absolute {
        parts.extensions.insert(AbsoluteForm);
    }
    Ok(Head {
        parts,
        framing,
        keep_alive: says.keep_alive(version),
    })
}

/// Parses a whole head of a response to `method`.
pub(super) fn response(
    bytes: &Bytes,
    limits: &Limits,
    method: &Method,
) -> Result<Head<response::Parts>, Refused> {
    let mut headers = [const { MaybeUninit::uninit() }; MOST_HEADERS];
    let headers = &mut headers[..limits.headers.min(MOST_HEADERS)];
    let mut parsed = httparse::Response::new(&mut []);
    let status = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut parsed,
        bytes,
        headers,
    );
    if status.map_err(refused)?.is_partial() {
        return Err(Refused::StartLine);
    }
    let (Some(code), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(Refused::StartLine);
    };
    let status = StatusCode::from_u16(code).map_err(|_| Refused::StartLine)?;
    let version = version(minor);
    let (headers, case, says) = collect(bytes, parsed.headers)?;
    let raw = status == StatusCode::SWITCHING_PROTOCOLS
        || (*method == Method::CONNECT && status.is_success());
    let framing = if raw || has_no_body(method, status) {
        // A length here is of the body there would be; it need only be well-formed.
        if !raw {
            says.framing(version)?;
        }
        Framing::Length(0)
    } else {
        says.framing(version)?.unwrap_or(Framing::Close)
    };
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.status = status;
    parts.version = version;
    parts.headers = headers;
    parts.extensions.insert(case);
    Ok(Head {
        parts,
        framing,
        keep_alive: says.keep_alive(version) && framing != Framing::Close,
    })
}

/// Whether a response to `method` with `status` never has a body (RFC 9112 6.3, rule 1).
pub(crate) fn has_no_body(method: &Method, status: StatusCode) -> bool {
    *method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
}

/// What the headers say of body and connection.
#[derive(Debug, Default)]
struct Says {
    length: Option<u64>,
    encoded: bool,
    close: bool,
    keep_alive: bool,
    hosts: usize,
}

impl Says {
    /// None: neither a length nor chunks (RFC 9112 6.3).
    fn framing(&self, version: Version) -> Result<Option<Framing>, Refused> {
        match (self.encoded, self.length) {
            (true, Some(_)) => Err(Refused::LengthAndEncoding),
            (true, None) if version == Version::HTTP_10 => Err(Refused::TransferEncoding),
            (true, None) => Ok(Some(Framing::Chunked)),
            (false, length) => Ok(length.map(Framing::Length)),
        }
    }

    fn keep_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::HTTP_11 || self.keep_alive)
    }
}

fn collect(
    bytes: &Bytes,
    parsed: &[httparse::Header<'_>],
) -> Result<(HeaderMap, HeaderCase, Says), Refused> {
    let mut says = Says::default();
    let mut map = HeaderMap::with_capacity(parsed.len());
    for header in parsed {
        let name =
            HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| Refused::HeaderName)?;
        let mut value = HeaderValue::from_maybe_shared(slice(bytes, header.value))
            .map_err(|_| Refused::HeaderValue)?;
        if name == header::CONTENT_LENGTH {
            let length = length(&value)?;
            match says.length.replace(length) {
                // RFC 9110 8.6: repeated and equal, it is kept once.
                Some(before) if before == length => continue,
                Some(_) => return Err(Refused::ContentLength),
                None => {}
            }
            if value.len() > 1 && value.as_bytes().starts_with(b"0") {
                // HTTP/2 peers may not take so many digits.
                value = HeaderValue::from(length);
            }
        } else if name == header::TRANSFER_ENCODING {
            encoding(&value, says.encoded)?;
            says.encoded = true;
        } else if name == header::CONNECTION {
            for option in tokens(&value) {
                says.close |= option.eq_ignore_ascii_case(b"close");
                says.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            }
        } else if name == header::HOST {
            says.hosts += 1;
        }
        map.append(name, value);
    }
    let case = HeaderCase::of(parsed.iter().map(|h| h.name.as_bytes()));
    Ok((map, case, says))
}

/// Digits only: no sign, no list (RFC 9110 8.6). At most 2^63 - 1, which every parser can hold.
fn length(value: &HeaderValue) -> Result<u64, Refused> {
    let digits = value.as_bytes();
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Refused::ContentLength);
    }
    digits
        .iter()
        .try_fold(0u64, |number, digit| {
            number.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
        })
        .filter(|number| *number <= MOST_LENGTH)
        .ok_or(Refused::ContentLength)
}

/// `chunked`, once and alone (RFC 9112 6.1).
fn encoding(value: &HeaderValue, before: bool) -> Result<(), Refused> {
    let is_chunked = |coding: &[u8]| coding.eq_ignore_ascii_case(b"chunked");
    let (mut codings, mut chunked, mut at_end) = (0, 0, false);
    for coding in tokens(value) {
        codings += 1;
        at_end = is_chunked(coding);
        chunked += usize::from(at_end);
    }
    match (at_end, codings) {
        _ if before || !at_end || chunked != 1 => Err(Refused::TransferEncoding),
        (_, 1) if is_chunked(value.as_bytes()) => Ok(()),
        (_, 1) => Err(Refused::TransferEncoding),
        _ => Err(Refused::Coding),
    }
}

fn uri(bytes: &Bytes, method: &Method, target: &str) -> Result<(Uri, bool), Refused> {
    if target.contains('#') {
        return Err(Refused::Target);
    }
    let uri =
        Uri::from_maybe_shared(slice(bytes, target.as_bytes())).map_err(|_| Refused::Target)?;
    let absolute = uri.scheme().is_some();
    let valid = if *method == Method::CONNECT {
        !absolute && uri.authority().is_some() && uri.path_and_query().is_none()
    } else if target == "*" {
        *method == Method::OPTIONS
    } else {
        target.starts_with('/') || (absolute && uri.authority().is_some())
    };
    if valid {
        Ok((uri, absolute))
    } else {
        Err(Refused::Target)
    }
}

/// RFC 9112 3.2: exactly one in HTTP/1.1, never several; an absolute target takes its place.
fn host(
    headers: &mut HeaderMap,
    uri: &Uri,
    absolute: bool,
    count: usize,
    version: Version,
) -> Result<(), Refused> {
    if count > 1 || (count == 0 && version == Version::HTTP_11) {
        return Err(Refused::Host);
    }
    let valid = |b: &u8| {
        b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b'%'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b','
                    | b';'
                    | b'='
                    | b':'
                    | b'['
                    | b']'
            )
    };
    if let Some(host) = headers.get(header::HOST)
        && !host.as_bytes().iter().all(valid)
    {
        return Err(Refused::Host);
    }
    if absolute && let Some(authority) = uri.authority() {
        let host = authority.as_str();
        let host = host.rsplit_once('@').map_or(host, |(_user, host)| host);
        let host = HeaderValue::from_str(host).map_err(|_| Refused::Target)?;
        headers.insert(header::HOST, host);
    }
    Ok(())
}

fn slice(bytes: &Bytes, part: &[u8]) -> Bytes {
    if part.is_empty() {
        // `slice_ref` wants a part of `bytes`; an empty one may be anywhere.
        return Bytes::new();
    }
    bytes.slice_ref(part)
}

fn version(minor: u8) -> Version {
    if minor == 0 {
        Version::HTTP_10
    } else {
        Version::HTTP_11
    }
}

pub(super) fn refused(error: httparse::Error) -> Refused {
    match error {
        httparse::Error::HeaderName => Refused::HeaderName,
        httparse::Error::HeaderValue => Refused::HeaderValue,
        httparse::Error::TooManyHeaders => Refused::TooManyHeaders,
        httparse::Error::Version => Refused::Version,
        httparse::Error::NewLine | httparse::Error::Status | httparse::Error::Token => {
            Refused::StartLine
        }
    }
}
