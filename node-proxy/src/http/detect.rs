//! From the first bytes of a connection to its protocol.
//!
//! TLS is known by its ClientHello (RFC 8446 4.1.2), HTTP/2 by its whole preface (RFC 9113 3.4). HTTP/1 is what common
//! servers take for a request, since what is not led to our HTTP/1 reaches the app as raw bytes, forged headers of the
//! mesh included. Our HTTP/1 then refuses what it does not read itself. A first line is HTTP/1 that has, in this order,
//!
//! - any number of empty lines and blanks (nginx, Node.js and hyper skip CR LF, Python and Ruby blanks);
//! - a method: one token, of any length;
//! - blanks, then a target: anything visible;
//! - blanks, then `HTTP/` in any case. Behind a target that begins with `/` or has a scheme it may come later in the line.
//!
//! A line that is over before that is opaque (`GET /key` to Redis), and so is one at the first byte that excludes it:
//! other protocols wait for nothing but the end of a line, and none of binary data. [`MAX_PEEK`] bytes that may still become
//! a request are HTTP/1, which refuses them, unless they are one single word: that is data. Not protected here are servers
//! that take a method of 16 KiB or one that is no token, that read headers behind a line of two words (HTTP/0.9), or that
//! skip control characters before a request (Netty). To callers of a Service whose port is declared HTTP, and to those without
//! a proxy of ours, only the last are open, behind what passes for a ClientHello.
//!
//! A packet may be cut anywhere: the same bytes lead to the same answer however they arrive.

/// Bytes that are enough to say what it is; those behind them are not looked at.
pub const MAX_PEEK: usize = 16 * 1024;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const VERSION: &[u8] = b"HTTP/";

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const MAX_RECORD: usize = 16 * 1024;
const SERVER_NAME: u16 = 0;
const MAX_NAME: usize = 253;

/// What a connection speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 or 1.1, or what may be taken for it.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS.
    Tls {
        /// The server's name in lower case, if the client says one that can be a host's name.
        sni: Option<Box<str>>,
    },
    /// Anything else.
    Opaque,
}

/// Says what begins with `bytes`. None: too few to say; never for [`MAX_PEEK`] bytes or more.
pub fn detect(bytes: &[u8]) -> Option<Protocol> {
    let bytes = &bytes[..bytes.len().min(MAX_PEEK)];
    let first = *bytes.first()?;
    if first == HANDSHAKE {
        return tls(bytes);
    }
    if bytes.starts_with(PREFACE) {
        return Some(Protocol::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    request_line(bytes)
}

fn request_line(bytes: &[u8]) -> Option<Protocol> {
    let is_full = bytes.len() >= MAX_PEEK;
    let undecided = is_full.then_some(Protocol::Http1);
    let before = bytes.iter().take_while(|b| is_blank(**b) || **b == b'\n');
    let line = &bytes[before.count()..];
    if line.is_empty() {
        return undecided;
    }
    let method = line.iter().take_while(|b| is_token(**b)).count();
    let (method, rest) = line.split_at(method);
    let Some(after) = rest.first() else {
        // Data without any blank, rather than a method.
        return is_full.then_some(Protocol::Opaque);
    };
    if method.is_empty() || !is_blank(*after) {
        return Some(Protocol::Opaque);
    }
    let rest = without_blanks(rest);
    let Some(end) = rest
        .iter()
        .position(|b| is_blank(*b) || b.is_ascii_control())
    else {
        return undecided;
    };
    let (target, rest) = rest.split_at(end);
    if target.starts_with(b"/") || target.windows(3).any(|part| part == b"://") {
        // A NUL ends what git's own protocol says first: `0032git-upload-pack /project.git`.
        let is_git = method
            .get(4..)
            .is_some_and(|name| name.starts_with(b"git-"));
        let end = rest.iter().position(|b| *b == b'\n' || (*b == 0 && is_git));
        let line = &rest[..end.unwrap_or(rest.len())];
        let is_version = |part: &[u8]| is_blank(part[0]) && part[1..].eq_ignore_ascii_case(VERSION);
        if line.windows(1 + VERSION.len()).any(is_version) {
            return Some(Protocol::Http1);
        }
        return match end {
            Some(_) => Some(Protocol::Opaque),
            None => undecided,
        };
    }
    let version = without_blanks(rest);
    let length = version.len().min(VERSION.len());
    let ends_with_blank = version.len() < rest.len();
    if !ends_with_blank || !version[..length].eq_ignore_ascii_case(&VERSION[..length]) {
        Some(Protocol::Opaque)
    } else if length == VERSION.len() {
        Some(Protocol::Http1)
    } else {
        undecided
    }
}

/// What servers read as a space in a request line (RFC 9112 3: SP, HTAB, VT, FF, bare CR). Python takes more for one.
const fn is_blank(byte: u8) -> bool {
    matches!(
        byte,
        b' ' | b'\t' | 0x0b | 0x0c | b'\r' | 0x1c..=0x1f | 0x85 | 0xa0
    )
}

fn without_blanks(bytes: &[u8]) -> &[u8] {
    let blanks = bytes.iter().take_while(|b| is_blank(**b)).count();
    &bytes[blanks..]
}

/// A character of a method or header name (RFC 9110 5.6.2).
pub(super) const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

fn tls(bytes: &[u8]) -> Option<Protocol> {
    match client_hello(bytes) {
        Hello::Complete(message) if !is_skipped(&message) => Some(Protocol::Tls {
            sni: server_name(&message),
        }),
        Hello::Partial if bytes.len() < MAX_PEEK => None,
        Hello::Partial if !is_skipped(bytes) => Some(Protocol::Tls { sni: None }),
        Hello::Complete(_) | Hello::Partial | Hello::Other => Some(Protocol::Opaque),
    }
}

/// Whether all of this is what some servers skip before a request. No random of 32 bytes is.
fn is_skipped(bytes: &[u8]) -> bool {
    let skipped = |b: &u8| b.is_ascii_control() || is_blank(*b) || matches!(b, 0x80..=0x9f);
    bytes.iter().all(skipped)
}

enum Hello {
    /// The handshake message without its header.
    Complete(Vec<u8>),
    Partial,
    Other,
}

/// Puts the first handshake message together from the records it came in.
fn client_hello(mut bytes: &[u8]) -> Hello {
    let mut message = Vec::new();
    loop {
        let header = &bytes[..bytes.len().min(5)];
        for (at, byte) in header.iter().enumerate() {
            let possible = match at {
                0 => *byte == HANDSHAKE,
                1 => *byte == 3,
                2 => *byte <= 4,
                3 => usize::from(*byte) << 8 <= MAX_RECORD,
                _ => true,
            };
            if !possible {
                return Hello::Other;
            }
        }
        let [_, _, _, high, low] = *header else {
            return Hello::Partial;
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length == 0 || length > MAX_RECORD {
            return Hello::Other;
        }
        let payload = &bytes[5..];
        message.extend_from_slice(&payload[..payload.len().min(length)]);
        if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Hello::Other;
        }
        if let [_, a, b, c, ..] = message[..] {
            let total = 4 + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
            if message.len() >= total {
                message.truncate(total);
                message.drain(..4);
                return Hello::Complete(message);
            }
        }
        if payload.len() <= length {
            return Hello::Partial;
        }
        bytes = &payload[length..];
    }
}

/// The name in a ClientHello (RFC 6066 3).
fn server_name(hello: &[u8]) -> Option<Box<str>> {
    let mut fields = Fields(hello);
    fields.take(2 + 32)?;
    fields.vector8()?;
    fields.vector16()?;
    fields.vector8()?;
    let mut extensions = Fields(fields.vector16()?);
    loop {
        let kind = extensions.number16()?;
        let extension = extensions.vector16()?;
        if kind != SERVER_NAME {
            continue;
        }
        let mut names = Fields(Fields(extension).vector16()?);
        // 0: host_name, the only kind there is.
        if names.take(1)? != [0] {
            return None;
        }
        return host_name(names.vector16()?);
    }
}

fn host_name(name: &[u8]) -> Option<Box<str>> {
    let valid = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if name.is_empty() || name.len() > MAX_NAME || !name.iter().all(valid) {
        return None;
    }
    let name = std::str::from_utf8(name).ok()?;
    Some(name.to_ascii_lowercase().into())
}

/// Reads TLS's length-prefixed fields.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number16(&mut self) -> Option<u16> {
        let bytes = self.take(2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self) -> Option<&'a [u8]> {
        let length = self.take(1)?[0];
        self.take(length.into())
    }

    fn vector16(&mut self) -> Option<&'a [u8]> {
        let length = self.number16()?;
        self.take(length.into())
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
