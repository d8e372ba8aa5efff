//! Large heads cross a tunnel before the body of their message: HPACK would encode each of their bytes by Huffman's code
//! and decode it again, in the tasks that drive the tunnel, while all other streams wait.
//!
//! `warren-head` says how many bytes of DATA they are. Each header is the length of its name (2 bytes, big-endian), the
//! length of its value (4 bytes), name and value. What is short stays where it is, but for a length, which HTTP/2 would
//! hold the DATA to.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use mesh_api::errors::ProxyError;
use mesh_api::headers::is_reserved;
use tokio::time::timeout;

use crate::http::body::Body;
use crate::http::h1::is_ours;
use crate::http::size;
use crate::tunnel::MAX_HEADER_LIST;

/// How many bytes of a large head are before the body.
pub const HEAD: HeaderName = HeaderName::from_static("warren-head");
/// A head below this goes as it is: HPACK's table holds half of it (RFC 9113, 6.5.2).
const LARGE: usize = 8 * 1024;
/// Values from this length on are taken out of a large head.
const LONG: usize = 64;
/// What a header counts beside its name and value (RFC 9113, 6.5.2).
const OVERHEAD: usize = 32;
/// Until all of a head is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes what is long off a large head, and puts it before the body, if the peer knows to look for it there.
pub fn pack(known: bool, headers: &mut HeaderMap, body: Body) -> Body {
    let size = size(headers);
    if !known || size < LARGE {
        return body;
    }
    let moved: Vec<HeaderName> = headers
        .keys()
        .filter(|n| goes(headers, n))
        .cloned()
        .collect();
    let mut out = BytesMut::with_capacity(size + moved.len() * 8);
    for name in &moved {
        for value in headers.get_all(name) {
            let key = name.as_str().as_bytes();
            // A name is below 64 KiB (`HeaderName`), a value below the limit of a head.
            out.put_u16(u16::try_from(key.len()).unwrap_or(u16::MAX));
            out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
            out.put_slice(key);
            out.put_slice(value.as_bytes());
        }
        headers.remove(name);
    }
    if out.is_empty() {
        return body;
    }
    headers.insert(HEAD, HeaderValue::from(out.len()));
    body.after(out.freeze())
}

/// All values of a name go together: their order matters.
fn goes(headers: &HeaderMap, name: &HeaderName) -> bool {
    let length: usize = headers.get_all(name).iter().map(HeaderValue::len).sum();
    (length >= LONG || *name == header::CONTENT_LENGTH) && !is_reserved(name.as_str())
}

/// How many bytes of the head are before the body.
pub fn packed(headers: &mut HeaderMap) -> Result<usize, ProxyError> {
    let Some(value) = headers.remove(HEAD) else {
        return Ok(0);
    };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length
        .filter(|length| *length <= MAX_HEADER_LIST as usize)
        .ok_or(ProxyError::BadRequest)
}

/// Puts what is before the body back into the head.
pub async fn unpack(
    length: usize,
    headers: &mut HeaderMap,
    mut body: Body,
) -> Result<Body, ProxyError> {
    if length == 0 {
        return Ok(body);
    }
    let reading = timeout(PATIENCE, read(length, &mut body));
    let (packed, rest) = reading.await.map_err(|_late| ProxyError::SlowRequest)??;
    parse(packed, headers).ok_or(ProxyError::BadRequest)?;
    Ok(body.after(rest))
}

/// So many bytes, and what came with the last of them.
async fn read(length: usize, body: &mut Body) -> Result<(Bytes, Bytes), ProxyError> {
    let mut all = BytesMut::new();
    while all.len() < length {
        let frame = body.frame().await.ok_or(ProxyError::BadRequest)?;
        let frame = frame.map_err(|_| ProxyError::TunnelReset)?;
        let data = frame.into_data().map_err(|_| ProxyError::BadRequest)?;
        if all.is_empty() && data.len() >= length {
            let mut first = data;
            let rest = first.split_off(length);
            return Ok((first, rest));
        }
        all.extend_from_slice(&data);
    }
    let rest = all.split_off(length);
    Ok((all.freeze(), rest.freeze()))
}

/// `None`: not what [`pack`] makes.
pub(super) fn parse(mut packed: Bytes, headers: &mut HeaderMap) -> Option<()> {
    let mut size = 0;
    while !packed.is_empty() {
        let (name, rest) = packed.split_first_chunk::<2>()?;
        let (value, _) = rest.split_first_chunk::<4>()?;
        let name = usize::from(u16::from_be_bytes(*name));
        let value = usize::try_from(u32::from_be_bytes(*value)).ok()?;
        if packed.len() - 6 < name.checked_add(value)? {
            return None;
        }
        size += name + value + OVERHEAD;
        if size > MAX_HEADER_LIST as usize {
            return None;
        }
        let name = HeaderName::from_lowercase(&packed[6..6 + name]).ok()?;
        let _ = packed.split_to(6 + name.as_str().len());
        if is_forbidden(&name) {
            return None;
        }
        let value = HeaderValue::from_maybe_shared(packed.split_to(value)).ok()?;
        headers.try_append(name, value).ok()?;
    }
    Some(())
}

/// What a peer may not say there: a proxy's own word, and what HTTP/2 forbids (RFC 9113, 8.2.2).
fn is_forbidden(name: &HeaderName) -> bool {
    is_reserved(name.as_str()) || is_ours(name) || *name == header::UPGRADE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(&'static str, String)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in of {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn large() -> HeaderMap {
        headers(&[
            ("host", "web".into()),
            ("cookie", "a".repeat(6000)),
            ("content-length", "7".into()),
            ("cookie", "b".into()),
            ("content-type", "application/grpc".into()),
            ("x-token", "c".repeat(3000)),
            ("warren-case", "T".repeat(100)),
        ])
    }

    async fn all(mut body: Body) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(frame) = body.frame().await {
            all.extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
        all
    }

    #[tokio::test]
    async fn a_large_head_arrives_as_it_was_and_the_body_behind_it() {
        let before = large();
        for content in ["content", ""] {
            let mut sent = before.clone();
            let body = pack(true, &mut sent, Body::full(content));
            let mut names: Vec<_> = sent.keys().map(HeaderName::as_str).collect();
            names.sort_unstable();
            assert_eq!(
                names,
                ["content-type", "host", "warren-case", "warren-head"],
                "what is long, and the length, is elsewhere"
            );
            // As one piece and as many.
            let sent_bytes = all(body).await;
            for piece in [500, 4097, usize::MAX] {
                let mut came = sent.clone();
                let mut pieces = sent_bytes.chunks(piece.min(sent_bytes.len())).rev();
                let last = Body::full(Bytes::copy_from_slice(pieces.next().unwrap()));
                let body = pieces.fold(last, |rest, piece| {
                    rest.after(Bytes::copy_from_slice(piece))
                });
                let length = packed(&mut came).unwrap();
                let body = unpack(length, &mut came, body).await.unwrap();
                assert_eq!(came, before);
                let nothing = body.as_full().is_some_and(Bytes::is_empty);
                assert_eq!(
                    nothing,
                    content.is_empty(),
                    "a message without body stays one"
                );
                assert_eq!(all(body).await, content.as_bytes());
            }
        }
    }

    #[tokio::test]
    async fn a_small_head_is_left_alone() {
        let before = headers(&[("host", "web".into()), ("cookie", "a".repeat(LARGE - 20))]);
        let mut sent = before.clone();
        let body = pack(true, &mut sent, Body::full("content"));
        assert_eq!(sent, before);
        assert_eq!(packed(&mut sent), Ok(0));
        assert_eq!(
            all(unpack(0, &mut sent, body).await.unwrap()).await,
            b"content"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_come_is_not_waited_for_without_end() {
        let (_later, body) = crate::http::upgrade::deferred();
        let read = unpack(10, &mut HeaderMap::new(), body).await;
        assert_eq!(read.unwrap_err(), ProxyError::SlowRequest);
    }

    async fn is_refused(length: usize, bytes: Bytes) -> bool {
        let mut headers = HeaderMap::new();
        let read = unpack(length, &mut headers, Body::full(bytes)).await;
        matches!(read, Err(ProxyError::BadRequest))
    }

    #[tokio::test]
    async fn what_pack_does_not_make_is_refused() {
        for length in ["-1", "x", "81921", "18446744073709551616"] {
            let mut headers = headers(&[("warren-head", length.into())]);
            assert_eq!(
                packed(&mut headers),
                Err(ProxyError::BadRequest),
                "{length}"
            );
        }
        let entry = |name: &str, value: &str| {
            let mut bytes = BytesMut::new();
            bytes.put_u16(name.len() as u16);
            bytes.put_u32(value.len() as u32);
            bytes.put_slice(name.as_bytes());
            bytes.put_slice(value.as_bytes());
            bytes.freeze()
        };
        let good = entry("x-a", "1");
        for bad in [
            entry("warren-client-id", "forged"),
            entry("warren_client_id", "forged"),
            entry("transfer-encoding", "chunked"),
            entry("connection", "close"),
            entry("upgrade", "h2c"),
            entry("X-A", "1"),
            entry("x a", "1"),
            entry("", "1"),
            entry("x-a", "1\r\nx-b: 2"),
            good.slice(..good.len() - 1),
            good.slice(..5),
        ] {
            assert!(is_refused(bad.len(), bad.clone()).await, "{bad:?}");
        }
        // As many headers as the bytes have room for, but not HTTP/2's list.
        let many: Vec<u8> = (0..3000).flat_map(|_| entry("a", "")).collect();
        assert!(is_refused(many.len(), many.into()).await);
        // Cut short.
        assert!(is_refused(good.len() + 1, good.clone()).await);
        assert!(!is_refused(good.len(), good).await);
    }
}
