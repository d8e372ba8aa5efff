//! What an answer says about trying again: `Retry-After` (RFC 9110, section 10.2.3) and
//! `grpc-retry-pushback-ms` (gRFC A6).

use std::time::{Duration, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName};

/// A caller is not kept waiting for longer than this. Whoever asks for more gets no retry from the proxy;
/// the caller sees the header and can come back itself.
pub const LONGEST_PUSHBACK: Duration = Duration::from_secs(5);

const GRPC_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// What an answer says about trying again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pushback {
    /// Nothing.
    #[default]
    None,
    /// Not sooner than this.
    After(Duration),
    /// Not at all, or not for longer than [`LONGEST_PUSHBACK`].
    Never,
}

impl Pushback {
    /// What an answer's headers say.
    pub fn of(headers: &HeaderMap, now: SystemTime) -> Self {
        if let Some(value) = headers.get(GRPC_PUSHBACK) {
            // gRFC A6: negative or unreadable means "do not retry".
            return value
                .to_str()
                .ok()
                .map(str::trim)
                .filter(|value| value.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|value| value.parse().ok())
                .map_or(Self::Never, |millis| {
                    Self::bounded(Duration::from_millis(millis))
                });
        }
        let Some(value) = headers.get(RETRY_AFTER).and_then(|v| v.to_str().ok()) else {
            return Self::None;
        };
        let value = value.trim();
        if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
            // Too many digits for a number is a long time.
            return value.parse().map_or(Self::Never, |seconds| {
                Self::bounded(Duration::from_secs(seconds))
            });
        }
        match httpdate::parse_http_date(value) {
            Ok(date) => Self::bounded(date.duration_since(now).unwrap_or_default()),
            // Unreadable: as if it were not there.
            Err(_) => Self::None,
        }
    }

    fn bounded(pause: Duration) -> Self {
        if pause > LONGEST_PUSHBACK {
            Self::Never
        } else {
            Self::After(pause)
        }
    }
}
