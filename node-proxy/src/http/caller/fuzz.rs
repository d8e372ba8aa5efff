//! Times that callers and apps name: `grpc-timeout`, `retry-after`, `grpc-retry-pushback-ms`.

use std::time::{Duration, SystemTime};

use http::HeaderMap;

use super::grpc_timeout;
use crate::http::retry::{LONGEST_PUSHBACK, Pushback};

/// By the grammar (gRPC over HTTP/2: one to eight digits and a unit; RFC 9110, section 10.2.3), and bounded.
pub(crate) fn timing(bytes: &[u8]) {
    let Ok(value) = http::HeaderValue::from_bytes(bytes) else {
        return;
    };
    let with = |name: &'static str| {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.clone());
        headers
    };
    if let Some(timeout) = grpc_timeout(&with("grpc-timeout")) {
        let (digits, unit) = bytes.split_at(bytes.len() - 1);
        assert!((1..=8).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit));
        assert!(b"HMSmun".contains(&unit[0]));
        assert!(timeout <= Duration::from_secs(99_999_999 * 3600));
    }
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_700);
    for name in ["retry-after", "grpc-retry-pushback-ms"] {
        if let Pushback::After(pause) = Pushback::of(&with(name), now) {
            assert!(pause <= LONGEST_PUSHBACK);
            let text = bytes.trim_ascii();
            let digits = text.iter().all(u8::is_ascii_digit);
            assert!(digits || (name == "retry-after" && text.ends_with(b"GMT") || text.len() > 20));
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "250m",
        "99999999H",
        "1n",
        "5",
        "-1",
        "Sun, 06 Nov 1994 08:48:22 GMT",
        "Sunday, 06-Nov-94 08:48:22 GMT",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
