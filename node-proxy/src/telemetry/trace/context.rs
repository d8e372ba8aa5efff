//! `traceparent` and `tracestate` (W3C Trace Context, Recommendation of 2021, and level 2's random flag).

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Ids have at least 56 random bits, their last (Trace Context level 2, 3.2.2.3).
pub(super) const RANDOM_RANGE: u64 = 1 << 56;

const SAMPLED: u8 = 1;
const RANDOM: u8 = 2;

/// Id of a trace; not all zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

/// Id of a span; not all zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SpanId([u8; 8]);

/// What a `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TraceContext {
    pub(super) trace_id: TraceId,
    pub(super) span_id: SpanId,
    flags: u8,
}

impl TraceContext {
    /// What the headers say; `None` if they say nothing valid, in which case a new trace may begin.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => Self::parse(value.as_bytes()),
            _ => None,
        }
    }

    /// Section 3.2: `version "-" trace-id "-" parent-id "-" trace-flags`, in lower case. Versions after 00 may
    /// have more behind another dash.
    fn parse(value: &[u8]) -> Option<Self> {
        let (fields, rest) = value.split_at_checked(LENGTH)?;
        let version = hex::<1>(&fields[..2])?[0];
        let more = match version {
            0 => rest.is_empty(),
            0xff => false,
            _ => rest.is_empty() || rest[0] == b'-',
        };
        let dashes = [2, 35, 52].into_iter().all(|i| fields[i] == b'-');
        let trace_id = hex::<16>(&fields[3..35])?;
        let span_id = hex::<8>(&fields[36..52])?;
        let flags = hex::<1>(&fields[53..])?[0];
        let valid = more && dashes && trace_id != [0; 16] && span_id != [0; 8];
        valid.then_some(Self {
            trace_id: TraceId(trace_id),
            span_id: SpanId(span_id),
            // What other versions' flags mean is not known here.
            flags: flags & (SAMPLED | RANDOM),
        })
    }

    /// A new trace; sampled if its random part is below the threshold.
    pub(super) fn begin(threshold: u64) -> Self {
        let id: u128 = rand::random();
        // All zero is not valid, and as likely as anything else.
        let trace_id = TraceId(id.max(1).to_be_bytes());
        let sampled = (id as u64) % RANDOM_RANGE < threshold;
        Self {
            trace_id,
            span_id: SpanId::random(),
            flags: RANDOM | if sampled { SAMPLED } else { 0 },
        }
    }

    /// A span of the same trace.
    pub(super) fn child(self) -> Self {
        Self {
            span_id: SpanId::random(),
            ..self
        }
    }

    pub(super) fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }

    pub(super) fn flags(self) -> u8 {
        self.flags
    }

    /// Value of `traceparent`.
    pub(super) fn header(self) -> HeaderValue {
        let mut text = *b"00-................................-................-00";
        write_hex(&self.trace_id.0, &mut text[3..35]);
        write_hex(&self.span_id.0, &mut text[36..52]);
        write_hex(&[self.flags], &mut text[53..]);
        // Only digits and dashes.
        HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

/// Of a `traceparent` of version 00.
const LENGTH: usize = 55;

/// The vendors' state of the trace, if it is valid.
pub(super) fn state(headers: &HeaderMap) -> Option<String> {
    let mut state = String::new();
    for value in headers.get_all(TRACESTATE) {
        if !state.is_empty() {
            state.push(',');
        }
        state.push_str(value.to_str().ok()?);
    }
    is_state(&state).then_some(state)
}

/// Section 3.3.1: at most 32 members `key=value` between commas; empty members are allowed, a key occurs once.
fn is_state(text: &str) -> bool {
    let members: Vec<&str> = text
        .split(',')
        .map(|member| member.trim_matches([' ', '\t']))
        .filter(|member| !member.is_empty())
        .take(MAX_MEMBERS + 1)
        .collect();
    let key = |member: &'_ str| member.find('=').unwrap_or(member.len());
    let repeated = |i: usize, member: &str| {
        let before = members[..i].iter();
        before
            .into_iter()
            .any(|m| m[..key(m)] == member[..key(member)])
    };
    members.len() <= MAX_MEMBERS
        && members.iter().all(|member| is_member(member))
        && !members
            .iter()
            .enumerate()
            .any(|(i, member)| repeated(i, member))
}

const MAX_MEMBERS: usize = 32;

fn is_member(member: &str) -> bool {
    let Some((key, value)) = member.split_once('=') else {
        return false;
    };
    let in_key = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"_-*/".contains(&c);
    let part = |part: &str, most: usize, digit: bool| {
        let first = part.bytes().next();
        (1..=most).contains(&part.len())
            && part.bytes().all(in_key)
            && first.is_some_and(|c| c.is_ascii_lowercase() || digit && c.is_ascii_digit())
    };
    let key_valid = match key.split_once('@') {
        Some((tenant, system)) => part(tenant, 241, true) && part(system, 14, false),
        None => part(key, 256, false),
    };
    // The end was trimmed, so the last character is no space.
    let in_value = |c: u8| (b' '..=b'~').contains(&c) && c != b',' && c != b'=';
    key_valid && (1..=256).contains(&value.len()) && value.bytes().all(in_value)
}

impl SpanId {
    fn random() -> Self {
        Self(rand::random::<u64>().max(1).to_be_bytes())
    }

    pub(super) fn to_vec(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl TraceId {
    pub(super) fn to_vec(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl From<[u8; 16]> for TraceId {
    fn from(id: [u8; 16]) -> Self {
        Self(id)
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// `N` bytes from digits in lower case.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn write_hex(bytes: &[u8], digits: &mut [u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (byte, pair) in bytes.iter().zip(digits.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_context_survives_the_wire() {
        let context = TraceContext::parse(VALID.as_bytes()).unwrap();
        assert!(context.is_sampled());
        assert_eq!(
            context.trace_id.to_string(),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!(context.header(), VALID);
        let child = context.child();
        assert_eq!(child.trace_id, context.trace_id);
        assert_ne!(child.span_id, context.span_id);
    }

    /// The cases of the test suite of w3c/trace-context.
    #[test]
    fn only_valid_contexts_are_taken() {
        let accepted = [
            VALID,
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings",
        ];
        for value in accepted {
            assert!(TraceContext::parse(value.as_bytes()).is_some(), "{value}");
        }
        let refused = [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.extra",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b.-01",
        ];
        for value in refused {
            assert!(TraceContext::parse(value.as_bytes()).is_none(), "{value}");
        }
    }

    #[test]
    fn two_parents_are_none() {
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, HeaderValue::from_static(VALID));
        assert!(TraceContext::of(&headers).is_some());
        headers.append(TRACEPARENT, HeaderValue::from_static(VALID));
        assert!(TraceContext::of(&headers).is_none());
    }

    #[test]
    fn states_are_judged_by_the_grammar() {
        let key = "a".repeat(256);
        let long = format!("{key}=1");
        let many: Vec<String> = (0..32).map(|i| format!("k{i}=1")).collect();
        for state in [
            "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
            "foo=1 , \t bar=2,",
            "1a-2@v=x y",
            &long,
            &many.join(","),
        ] {
            assert!(is_state(state), "{state}");
        }
        let too_many = format!("{},last=1", many.join(","));
        for state in [
            "foo",
            "foo=",
            "=1",
            "Foo=1",
            "1foo=1",
            "foo=1,foo=2",
            "foo=a=b",
            "foo @v=1",
            "foo@=1",
            "@v=1",
            "foo@abcdefghijklmno=1",
            &format!("a{long}"),
            &too_many,
        ] {
            assert!(!is_state(state), "{state}");
        }
    }

    #[test]
    fn the_share_of_new_traces_is_what_was_asked_for() {
        let sampled = |ratio: f64| {
            let threshold = (ratio * RANDOM_RANGE as f64) as u64;
            let trace = |_| TraceContext::begin(threshold).is_sampled();
            (0..10_000).map(trace).filter(|sampled| *sampled).count()
        };
        assert_eq!(sampled(0.0), 0);
        assert_eq!(sampled(1.0), 10_000);
        // Six standard deviations.
        assert!((740..=1260).contains(&sampled(0.1)));
    }
}
