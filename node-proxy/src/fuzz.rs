//! What the fuzzer checks of this crate's parsers: properties, with seeds to start from. The seeds are also checked
//! in `cargo test`.

use crate::http::{caller, detect, frames, h1, route, wire};
use crate::probe::grpc;
use crate::telemetry::trace;
use crate::{table, tunnel};

/// Name, check, seeds.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate's.
pub const TARGETS: &[Target] = &[
    (
        "h1_request",
        h1::fuzz::heads::request,
        h1::fuzz::heads::request_seeds,
    ),
    (
        "h1_response",
        h1::fuzz::heads::response,
        h1::fuzz::heads::response_seeds,
    ),
    ("h1_body", h1::fuzz::bodies::body, h1::fuzz::bodies::seeds),
    (
        "h1_server",
        h1::fuzz::connections::server,
        h1::fuzz::connections::server_seeds,
    ),
    (
        "h1_client",
        h1::fuzz::connections::client,
        h1::fuzz::connections::client_seeds,
    ),
    (
        "h1_case",
        h1::fuzz::heads::case,
        h1::fuzz::heads::case_seeds,
    ),
    ("h2_frames", frames::fuzz::frames, frames::fuzz::seeds),
    ("opening", detect::fuzz::opening, detect::fuzz::seeds),
    (
        "wire_request",
        wire::fuzz::request,
        wire::fuzz::request_seeds,
    ),
    (
        "wire_response",
        wire::fuzz::response,
        wire::fuzz::response_seeds,
    ),
    ("wire_head", wire::fuzz::head, wire::fuzz::head_seeds),
    ("forwarded", tunnel::fuzz::forwarded, tunnel::fuzz::seeds),
    ("timing", caller::fuzz::timing, caller::fuzz::seeds),
    ("grpc_message", grpc::fuzz::message, grpc::fuzz::seeds),
    ("trace", trace::fuzz::context, trace::fuzz::seeds),
    (
        "session",
        route::session::fuzz::session,
        route::session::fuzz::seeds,
    ),
    ("route", route::fuzz::route, route::fuzz::seeds),
    ("table", table::fuzz::table, table::fuzz::seeds),
    ("table_log", table::log::fuzz::log, table::log::fuzz::seeds),
];

/// Parts of an input.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// As many bytes as the next two say, or what there is.
    pub(crate) fn part(&mut self) -> &'a [u8] {
        let wanted = usize::from(u16::from_be_bytes([self.byte(), self.byte()]));
        let (part, rest) = self.0.split_at(wanted.min(self.0.len()));
        self.0 = rest;
        part
    }

    /// Where to cut what follows: lengths of segments, by which the rest is then cut over and over.
    pub(crate) fn cuts(&mut self) -> Vec<usize> {
        let count = self.byte() % 8;
        (0..count).map(|_| usize::from(self.byte()) + 1).collect()
    }
}

/// `bytes` in segments of these lengths, over and over; whole without any.
pub(crate) fn segments<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut lengths = cuts.iter().copied().cycle();
    let mut rest = bytes;
    let mut segments = Vec::new();
    while !rest.is_empty() {
        let length = lengths.next().unwrap_or(rest.len()).min(rest.len());
        let (segment, after) = rest.split_at(length);
        segments.push(segment);
        rest = after;
    }
    segments
}

/// The reverse of [`Input::part`].
pub(crate) fn part(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).expect("a short seed");
    [&length.to_be_bytes()[..], bytes].concat()
}

/// Headers of lines `name: value`; lines that are none are left out.
pub(crate) fn headers(lines: &[u8]) -> http::HeaderMap {
    let mut map = http::HeaderMap::new();
    for line in lines.split(|b| *b == b'\n').take(64) {
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            continue;
        };
        let name = http::HeaderName::from_bytes(&line[..colon]);
        let value = http::HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            map.append(name, value);
        }
    }
    map
}

#[test]
fn seeds_have_the_properties() {
    for (name, check, seeds) in TARGETS {
        for (number, seed) in seeds().iter().enumerate() {
            println!("{name} {number}");
            check(seed);
        }
    }
}
