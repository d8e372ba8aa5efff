//! The chunked coding (RFC 9112 7.1), read strictly.
//!
//! Sizes are at most 16 hexadecimal digits; extensions are dropped, and bounded both on a line and over the
//! body; every line ends with CR LF. Trailers are bounded, and those that would change framing or routing
//! (RFC 9110 6.5.1), or that HTTP/2 does not carry, are dropped.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::head::Scan;
use super::hop::is_ours;
use super::reader::Reader;
use crate::http::body::BodyError;

/// A chunk's size with its extensions.
const MOST_LINE: usize = 256;
/// All extensions of a body: a body of tiny chunks must not be mostly extensions.
const MOST_EXTENSIONS: usize = 16 * 1024;
const MOST_TRAILER_BYTES: usize = 16 * 1024;
const MOST_TRAILERS: usize = 64;

/// Where in a chunked body the reader stands.
#[derive(Debug)]
pub(super) struct Chunked {
    state: State,
    extensions: usize,
}

#[derive(Debug)]
enum State {
    Size,
    Data(u64),
    DataEnd,
    Trailers(Scan),
    Done,
}

/// What the next bytes of a body are.
#[derive(Debug)]
pub(super) enum Step {
    Data(Bytes),
    End(Option<HeaderMap>),
    NeedMore,
}

impl Chunked {
    pub(super) fn new() -> Self {
        Self {
            state: State::Size,
            extensions: 0,
        }
    }

    /// Takes what it can from what was read.
    pub(super) fn step(&mut self, reader: &mut Reader) -> Result<Step, BodyError> {
        loop {
            match &mut self.state {
                State::Size => {
                    let Some(line) = line(reader.buffered())? else {
                        return Ok(Step::NeedMore);
                    };
                    let (size, extension) = chunk_size(line)?;
                    self.extensions += extension;
                    if self.extensions > MOST_EXTENSIONS {
                        return Err(BodyError::TooLarge);
                    }
                    let length = line.len() + 2;
                    reader.skip(length);
                    self.state = if size == 0 {
                        State::Trailers(Scan::default())
                    } else {
                        State::Data(size)
                    };
                }
                State::Data(left) => {
                    let have = reader.buffered().len();
                    if have == 0 {
                        return Ok(Step::NeedMore);
                    }
                    let length = usize::try_from(*left).map_or(have, |left| left.min(have));
                    let data = reader.take(length);
                    // Not more than `left`, by the line above.
                    *left -= length as u64;
                    if *left == 0 {
                        self.state = State::DataEnd;
                    }
                    return Ok(Step::Data(data));
                }
                State::DataEnd => match reader.buffered() {
                    [b'\r', b'\n', ..] => {
                        reader.skip(2);
                        self.state = State::Size;
                    }
                    [] | [b'\r'] => return Ok(Step::NeedMore),
                    _ => return Err(BodyError::Framing),
                },
                State::Trailers(scan) => {
                    let found = scan.find(reader.buffered(), true);
                    let Some(end) = found.map_err(|_| BodyError::Framing)? else {
                        if reader.buffered().len() > MOST_TRAILER_BYTES {
                            return Err(BodyError::TooLarge);
                        }
                        return Ok(Step::NeedMore);
                    };
                    if end > MOST_TRAILER_BYTES {
                        return Err(BodyError::TooLarge);
                    }
                    let section = reader.take(end);
                    self.state = State::Done;
                    let trailers = (end > 2).then(|| trailers(&section)).transpose()?;
                    return Ok(Step::End(trailers.filter(|trailers| !trailers.is_empty())));
                }
                State::Done => return Ok(Step::End(None)),
            }
        }
    }
}

impl Chunked {
    /// Whether what follows can be taken without meeting data: a step then ends the body, fails, or needs
    /// more.
    pub(super) fn may_end(&self, buffered: &[u8]) -> bool {
        let size = match self.state {
            State::Size => buffered,
            State::DataEnd => match buffered {
                [b'\r', b'\n', rest @ ..] => rest,
                _ => return false,
            },
            State::Data(_) => return false,
            State::Trailers(_) | State::Done => return true,
        };
        size.first() == Some(&b'0')
            && matches!(line(size).map(|l| l.map(chunk_size)), Ok(Some(Ok((0, _)))))
    }
}

/// The first line, without its end.
fn line(bytes: &[u8]) -> Result<Option<&[u8]>, BodyError> {
    let window = &bytes[..bytes.len().min(MOST_LINE)];
    match memchr::memchr(b'\n', window) {
        Some(0) => Err(BodyError::Framing),
        Some(end) if bytes[end - 1] != b'\r' => Err(BodyError::Framing),
        Some(end) => Ok(Some(&bytes[..end - 1])),
        None if bytes.len() >= MOST_LINE => Err(BodyError::TooLarge),
        None => Ok(None),
    }
}

/// The size, and how many bytes of extensions follow it.
fn chunk_size(line: &[u8]) -> Result<(u64, usize), BodyError> {
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    if digits == 0 || digits > 16 {
        return Err(BodyError::Framing);
    }
    let size = line[..digits].iter().fold(0u64, |size, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            _ => (digit | 0x20) - b'a' + 10,
        };
        size << 4 | u64::from(value)
    });
    let rest = &line[digits..];
    let extension = rest.trim_ascii_start();
    let valid = |b: &u8| *b == b'\t' || (*b >= b' ' && *b != 0x7f);
    // Whitespace may stand before an extension (RFC 9112 7.1.1), and nowhere else.
    if !rest.is_empty() && (!extension.starts_with(b";") || !rest.iter().all(valid)) {
        return Err(BodyError::Framing);
    }
    Ok((size, rest.len()))
}

fn trailers(section: &Bytes) -> Result<HeaderMap, BodyError> {
    let mut parsed = [httparse::EMPTY_HEADER; MOST_TRAILERS];
    let fields = match httparse::parse_headers(section, &mut parsed) {
        Ok(httparse::Status::Complete((_, fields))) => fields,
        Err(httparse::Error::TooManyHeaders) => return Err(BodyError::TooLarge),
        Ok(httparse::Status::Partial) | Err(_) => return Err(BodyError::Framing),
    };
    let mut map = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| BodyError::Framing)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| BodyError::Framing)?;
        if !is_forbidden(&name) {
            map.append(name, value);
        }
    }
    Ok(map)
}

/// Fields that must not be trailers (RFC 9110 6.5.1), and those that would be malformed in HTTP/2 (RFC 9113 8.2.2): a
/// body that is whole must not fail on a tunnel for them.
fn is_forbidden(name: &HeaderName) -> bool {
    let others = [
        header::CONTENT_LENGTH,
        header::HOST,
        header::UPGRADE,
        header::TRAILER,
        header::TE,
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        header::CONTENT_ENCODING,
        header::CONTENT_RANGE,
        header::SET_COOKIE,
        header::COOKIE,
        header::EXPECT,
    ];
    is_ours(name) || others.contains(name)
}
