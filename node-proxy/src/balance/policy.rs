//! How a Service's endpoints are chosen and when one is left out: values with every default filled in.
//!
//! The numbers are chosen together: an endpoint that was slow or failed is tried again early enough to be
//! back within 10 s of its recovery, and seldom enough that at most 1 % of the traffic meets it until then.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header::{COOKIE, HeaderName};

use super::hash;

/// What is in force for the endpoints of a Service port.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// How one of several is chosen.
    pub algorithm: Algorithm,
    /// What [`Algorithm::RingHash`] hashes. `None`: nothing, so requests are spread by load.
    pub hash_key: Option<HashKey>,
    /// How long a new endpoint's share grows. Default: none.
    pub slow_start: Option<Duration>,
    /// When an endpoint is left out. Default: never.
    pub breaker: Option<Breaker>,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// Two choices; the one that is expected to answer sooner: see `balance::load`. The default.
    #[default]
    PeakEwma,
    /// Two choices; the one with less open work.
    LeastRequest,
    /// By a key of the request (rendezvous hashing): the same key, the same endpoint, and a change of the
    /// set moves only the keys of the endpoint that came or went.
    RingHash,
    /// Any.
    Random,
    /// One after the other.
    RoundRobin,
}

/// The part of a request whose value decides on the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// A header.
    Header(HeaderName),
    /// A cookie.
    Cookie(Arc<str>),
    /// The caller's pod address.
    Source,
}

impl HashKey {
    /// The hash of a request. `None`: the request does not have the key.
    pub fn of(&self, headers: &HeaderMap, source: IpAddr) -> Option<u64> {
        match self {
            Self::Header(name) => headers.get(name).map(|value| hash::of(value.as_bytes())),
            Self::Cookie(name) => cookie(headers, name).map(hash::of),
            Self::Source => Some(match source {
                IpAddr::V4(address) => hash::of(&address.octets()),
                IpAddr::V6(address) => hash::of(&address.octets()),
            }),
        }
    }
}

/// The value of a cookie (RFC 6265, section 4.2.1).
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers
        .get_all(COOKIE)
        .iter()
        .flat_map(|header| header.as_bytes().split(|byte| *byte == b';'))
        .find_map(|pair| {
            pair.trim_ascii()
                .strip_prefix(name.as_bytes())?
                .strip_prefix(b"=")
        })
}

/// When an endpoint is ejected and how it comes back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Breaker {
    /// Failures in a row that eject an endpoint. Default 5, as Envoy; 0: not judged.
    pub consecutive_failures: u32,
    /// Success rate in percent under which an endpoint is ejected. Default: not judged.
    pub min_success_percent: Option<u32>,
    /// Requests in the window below which the rate is not judged. Default 5, as Linkerd.
    pub min_requests: u32,
    /// Over which the rate is judged. Default 10 s, as Linkerd.
    pub window: Duration,
    /// Length of the first ejection. Default 1 s, as Linkerd.
    pub base_ejection: Duration,
    /// Each ejection that follows lasts twice as long, up to this. Default 8 s: with probation at most
    /// 10 s pass from an endpoint's recovery to its return (Linkerd and Envoy leave it out for minutes).
    pub max_ejection: Duration,
    /// Largest share of the endpoints that is ejected at once, rounded down. Default 50. With 100 all
    /// may be: requests then get no endpoint but for those that try one.
    pub max_ejected_percent: u32,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            min_success_percent: None,
            min_requests: 5,
            window: Duration::from_secs(10),
            base_ejection: Duration::from_secs(1),
            max_ejection: Duration::from_secs(8),
            max_ejected_percent: 50,
        }
    }
}

impl Breaker {
    /// How many of `count` endpoints may be ejected at once.
    pub fn allowed(&self, count: usize) -> usize {
        count * self.max_ejected_percent.min(100) as usize / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_requests() {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", "ann".parse().unwrap());
        headers.append(COOKIE, "a=1; session=ann; b=2".parse().unwrap());
        let source = "10.0.0.1".parse().unwrap();
        let header = HashKey::Header("x-user".parse().unwrap());
        let cookie = HashKey::Cookie("session".into());
        assert_eq!(header.of(&headers, source), Some(hash::of(b"ann")));
        assert_eq!(cookie.of(&headers, source), Some(hash::of(b"ann")));
        assert_eq!(HashKey::Cookie("ses".into()).of(&headers, source), None);
        assert_eq!(
            HashKey::Source.of(&headers, source),
            Some(hash::of(&[10, 0, 0, 1]))
        );
        assert_eq!(header.of(&HeaderMap::new(), source), None);
    }

    #[test]
    fn the_share_is_rounded_down() {
        let breaker = Breaker::default();
        let allowed: Vec<_> = (0..6).map(|count| breaker.allowed(count)).collect();
        assert_eq!(allowed, [0, 0, 1, 1, 2, 2]);
    }
}
