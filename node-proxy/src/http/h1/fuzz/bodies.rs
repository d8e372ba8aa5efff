//! Bodies: the same data, trailers and end however the bytes are cut, what the second reader finds, and never more held
//! than a line or a trailer section.

use std::cell::OnceCell;

use http::HeaderMap;
use tokio::runtime::Runtime;

use super::strict;
use crate::fuzz::{Input, segments};
use crate::http::h1::chunked::Step;
use crate::http::h1::head::Framing;
use crate::http::h1::incoming::Rest;
use crate::http::h1::reader::Reader;

/// What is held of a chunked body that needs more: a size line, or trailers.
const MOST_HELD: usize = 16 * 1024;

#[derive(Debug, PartialEq, Eq)]
struct Read {
    data: Vec<u8>,
    /// `None`: it needs more.
    end: Option<Result<(Option<HeaderMap>, usize), ()>>,
}

pub(crate) fn body(bytes: &[u8]) {
    let mut input = Input(bytes);
    let framing = match input.byte() {
        kind if kind < 0x80 => Framing::Chunked,
        0xff => Framing::Close,
        kind => Framing::Length(u64::from(kind & 0x7f) * 3),
    };
    let cuts = input.cuts();
    let bytes = input.0;
    let at_once = read(framing, bytes, &[]);
    let cut = read(framing, bytes, &cuts);
    assert_eq!(at_once, cut);
    let ended = at_once.end.as_ref().and_then(|end| end.as_ref().ok());
    match framing {
        Framing::Length(length) => {
            let expected = &bytes[..bytes.len().min(length as usize)];
            assert_eq!(at_once.data, expected);
            assert_eq!(ended.is_some(), expected.len() as u64 == length);
        }
        Framing::Close => assert!(at_once.data == bytes && at_once.end.is_none()),
        Framing::Chunked => {
            let Some((trailers, length)) = ended else {
                return;
            };
            let strict = strict::chunked(bytes).expect("read, and malformed to the second reader");
            assert_eq!(strict.data, at_once.data);
            assert_eq!(strict.length, *length);
            for (name, value) in trailers.iter().flatten() {
                assert!(strict.trailers.iter().any(|(n, v)| {
                    n.eq_ignore_ascii_case(name.as_str().as_bytes()) && *v == value.as_bytes()
                }));
            }
        }
    }
}

fn read(framing: Framing, bytes: &[u8], cuts: &[usize]) -> Read {
    with_reader(|reader| {
        let mut rest = Rest::from(framing);
        let mut read = Read {
            data: Vec::new(),
            end: None,
        };
        let mut came = 0;
        for segment in segments(bytes, cuts) {
            reader.feed(segment);
            came += segment.len();
            loop {
                let may_end = match &rest {
                    Rest::Chunked(chunked) => chunked.may_end(reader.buffered()),
                    Rest::Length(_) | Rest::Close => false,
                };
                match rest.step(reader) {
                    Ok(Step::Data(data)) => {
                        assert!(!may_end, "data where none was to be");
                        assert!(!data.is_empty());
                        read.data.extend_from_slice(&data);
                    }
                    Ok(Step::NeedMore) => {
                        assert!(reader.buffered().len() <= MOST_HELD);
                        break;
                    }
                    Ok(Step::End(trailers)) => {
                        read.end = Some(Ok((trailers, came - reader.buffered().len())));
                        return read;
                    }
                    Err(_) => {
                        read.end = Some(Err(()));
                        return read;
                    }
                }
            }
        }
        if bytes.is_empty() && matches!(rest.step(reader), Ok(Step::End(None))) {
            read.end = Some(Ok((None, 0)));
        }
        read
    })
}

/// A reader whose socket says nothing: one for each thread, since a socket is the dearest part of it.
fn with_reader<T>(run: impl FnOnce(&mut Reader) -> T) -> T {
    thread_local!(static SILENT: OnceCell<(Runtime, tokio::net::TcpStream)> = const { OnceCell::new() });
    thread_local!(static READER: std::cell::RefCell<Option<Reader>> = const { std::cell::RefCell::new(None) });
    let mut reader = READER.take().unwrap_or_else(|| {
        SILENT.with(|silent| {
            let (near, far) = super::connections::pair();
            let (runtime, _) = silent.get_or_init(|| {
                let runtime = super::connections::runtime();
                let far = {
                    let _entered = runtime.enter();
                    tokio::net::TcpStream::from_std(far).expect("a socket")
                };
                (runtime, far)
            });
            let _entered = runtime.enter();
            let near = tokio::net::TcpStream::from_std(near).expect("a socket");
            Reader::new(near.into_split().0, &[])
        })
    });
    reader.skip(reader.buffered().len());
    let result = run(&mut reader);
    READER.set(Some(reader));
    result
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let chunked = |cuts: &[u8], text: &str| {
        let count = cuts.len() as u8;
        [&[0, count][..], cuts, text.as_bytes()].concat()
    };
    let many = "1;x=y\r\na\r\n".repeat(20) + "0\r\n\r\n";
    vec![
        chunked(&[0], "5\r\nhello\r\n0\r\n\r\n"),
        chunked(
            &[3, 1],
            "A;q=1\r\n0123456789\r\n0\r\nX-Sum: 1\r\nContent-Length: 4\r\n\r\nGET /",
        ),
        chunked(&[], "5\r\nhello\r\n0\r\n\r\n"),
        chunked(&[7], &many),
        chunked(&[2], "5\nhello\r\n0\r\n\r\n"),
        chunked(&[2], "5 \r\nhello\r\n0\r\n\r\n"),
        chunked(&[], "0\r\n\r\n"),
        chunked(&[1], "10000000000000000\r\nx"),
        [&[0x82, 1, 2][..], b"hello world"].concat(),
        [&[0xff, 1, 2][..], b"hello world"].concat(),
    ]
}
