//! A reading of RFC 9112 that takes nothing a careful server would not.

/// A head.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head<'a> {
    /// Of the start line, between single spaces; a reason phrase is one part.
    pub(super) start: [&'a [u8]; 3],
    /// Values without whitespace around them.
    pub(super) fields: Vec<(&'a [u8], &'a [u8])>,
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    Bytes(u64),
    Chunked,
    /// The head says nothing.
    Unsaid,
}

/// One whole head. `bare`: lines may end without CR.
pub(super) fn head(bytes: &[u8], bare: bool) -> Option<Head<'_>> {
    let mut lines = lines(bytes, bare)?.into_iter();
    let line = lines.next()?;
    let first = line.iter().position(|b| *b == b' ')?;
    let rest = &line[first + 1..];
    let second = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
    let third = rest.get(second + 1..).unwrap_or_default();
    let fields = fields(lines)?;
    Some(Head {
        start: [&line[..first], &rest[..second], third],
        fields,
    })
}

/// Header or trailer lines up to the empty one, which must be the last.
fn fields<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Option<Vec<(&'a [u8], &'a [u8])>> {
    let mut fields = Vec::new();
    let mut ended = false;
    for line in lines {
        if ended {
            return None;
        }
        if line.is_empty() {
            ended = true;
            continue;
        }
        let colon = line.iter().position(|b| *b == b':')?;
        let (name, value) = (&line[..colon], trimmed(&line[colon + 1..]));
        let text = |b: &u8| *b == b'\t' || (*b >= b' ' && *b != 0x7f);
        if name.is_empty() || !name.iter().all(token) || !value.iter().all(text) {
            return None;
        }
        fields.push((name, value));
    }
    ended.then_some(fields)
}

fn lines(bytes: &[u8], bare: bool) -> Option<Vec<&[u8]>> {
    let text = bytes.strip_suffix(b"\n")?;
    text.split(|b| *b == b'\n')
        .map(|line| match line.strip_suffix(b"\r") {
            Some(line) => Some(line),
            None => bare.then_some(line),
        })
        .map(|line| line.filter(|line| !line.contains(&b'\r')))
        .collect()
}

fn token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

fn trimmed(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

impl Head<'_> {
    /// The values of a header.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.fields
            .iter()
            .filter(move |(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, value)| *value)
    }

    /// RFC 9112, section 6.3. `None`: it may be read in two ways.
    pub(super) fn length(&self, minor: u8) -> Option<Length> {
        let encodings: Vec<_> = self.all("transfer-encoding").collect();
        let lengths: Vec<_> = self.all("content-length").collect();
        match (&encodings[..], &lengths[..]) {
            ([], []) => Some(Length::Unsaid),
            ([only], []) => {
                (minor == 1 && only.eq_ignore_ascii_case(b"chunked")).then_some(Length::Chunked)
            }
            ([], [first, ..]) => {
                let digits = !first.is_empty() && first.iter().all(u8::is_ascii_digit);
                let number = std::str::from_utf8(first).ok()?.parse().ok()?;
                // Equal by value, however many zeros.
                let same = lengths.iter().all(|other| {
                    other.iter().all(u8::is_ascii_digit)
                        && std::str::from_utf8(other).ok().and_then(|o| o.parse().ok())
                            == Some(number)
                });
                (digits && same).then_some(Length::Bytes(number))
            }
            _ => None,
        }
    }
}

/// What a chunked body is (RFC 9112, section 7.1).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunks<'a> {
    pub(super) data: Vec<u8>,
    /// The trailer section.
    pub(super) trailers: Vec<(&'a [u8], &'a [u8])>,
    /// Bytes of the message.
    pub(super) length: usize,
}

/// A whole chunked body at the beginning of `bytes`.
pub(super) fn chunked(bytes: &[u8]) -> Option<Chunks<'_>> {
    let mut data = Vec::new();
    let mut at = 0;
    loop {
        let line = line(bytes, at)?;
        at += line.len() + 2;
        let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let size = std::str::from_utf8(&line[..digits]).ok()?;
        let size = usize::try_from(u64::from_str_radix(size, 16).ok()?).ok()?;
        let extension = trimmed(&line[digits..]);
        let text = |b: &u8| *b == b'\t' || (*b >= b' ' && *b != 0x7f);
        if digits < line.len() && (!extension.starts_with(b";") || !line[digits..].iter().all(text))
        {
            return None;
        }
        if size == 0 {
            break;
        }
        data.extend_from_slice(bytes.get(at..at.checked_add(size)?)?);
        at += size;
        bytes[at..].strip_prefix(b"\r\n")?;
        at += 2;
    }
    let begin = at;
    loop {
        let line = line(bytes, at)?;
        at += line.len() + 2;
        if line.is_empty() {
            let section = lines(&bytes[begin..at], false)?;
            return Some(Chunks {
                data,
                trailers: fields(section.into_iter())?,
                length: at,
            });
        }
    }
}

/// The line that begins at `at`, if it is whole.
fn line(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|b| *b == b'\n')?;
    rest[..end]
        .strip_suffix(b"\r")
        .filter(|line| !line.contains(&b'\r'))
}
