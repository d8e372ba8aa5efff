//! From the first bytes of a connection to its protocol.
//!
//! Only what cannot be anything else is named: an HTTP/1 request line up to `HTTP/1.` (RFC 9112 3), the
//! whole HTTP/2 preface (RFC 9113 3.4), a TLS ClientHello (RFC 8446 4.1.2). The first byte that excludes
//! all three makes the connection opaque, so other protocols wait for nothing. A packet may be cut
//! anywhere: the same bytes lead to the same answer however they arrive.

/// Bytes that are enough to say what it is: longer openings are opaque, or TLS without a name.
pub const MAX_PEEK: usize = 16 * 1024;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HTTP1: &[u8] = b"HTTP/1.";
/// Longer than every registered method; a token of more bytes is something else.
const MAX_METHOD: usize = 32;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const MAX_RECORD: usize = 16 * 1024;
const SERVER_NAME: u16 = 0;
const MAX_NAME: usize = 253;

/// What a connection speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 or 1.1.
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
    match request_line(bytes) {
        None if bytes.len() >= MAX_PEEK => Some(Protocol::Opaque),
        other => other,
    }
}

fn request_line(bytes: &[u8]) -> Option<Protocol> {
    let mut rest = bytes;
    let method = rest.iter().position(|b| !is_token(*b));
    if method.unwrap_or(rest.len()) > MAX_METHOD {
        return Some(Protocol::Opaque);
    }
    let method = method?;
    if method == 0 || rest[method] != b' ' {
        return Some(Protocol::Opaque);
    }
    rest = &rest[method + 1..];
    let target = rest.iter().position(|b| *b <= b' ' || *b == 0x7f)?;
    if target == 0 || rest[target] != b' ' {
        return Some(Protocol::Opaque);
    }
    rest = &rest[target + 1..];
    if rest.starts_with(HTTP1) {
        Some(Protocol::Http1)
    } else if HTTP1.starts_with(rest) {
        None
    } else {
        Some(Protocol::Opaque)
    }
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
        Hello::Complete(message) => Some(Protocol::Tls {
            sni: server_name(&message),
        }),
        Hello::Partial if bytes.len() >= MAX_PEEK => Some(Protocol::Tls { sni: None }),
        Hello::Partial => None,
        Hello::Other => Some(Protocol::Opaque),
    }
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
