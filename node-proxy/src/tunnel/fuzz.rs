//! `forwarded` as peers of other makes may write it.

use http::HeaderMap;
use http::header::FORWARDED;

use super::{claimed_source, forwarded as written};

/// A claim that is understood is one address, which is written and understood again as the same.
pub(crate) fn forwarded(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    let Ok(value) = http::HeaderValue::from_bytes(bytes) else {
        return;
    };
    headers.insert(FORWARDED, value);
    let Ok(Some(source)) = claimed_source(&headers) else {
        return;
    };
    assert_eq!(source, source.to_canonical());
    let text = String::from_utf8_lossy(bytes).to_ascii_lowercase();
    assert!(
        text.split([';', ','])
            .any(|pair| pair.trim().starts_with("for"))
    );
    let value = written(source).parse().expect("digits and brackets");
    headers.insert(FORWARDED, value);
    assert_eq!(claimed_source(&headers), Ok(Some(source)));
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "for=10.0.0.1",
        "for=\"[fd00::1]\"",
        "for=\"10.0.0.1:4711\";host=web.demo",
        "proto=http; For=\"[fd00::1]:80\", for=10.0.0.9",
        "for=unknown",
        "by=10.0.0.1",
        "for=\"[::ffff:10.0.0.1]\"",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
