//! Answers that the proxy makes itself. Each names its cause in `warren-proxy-error`, with the words of the one
//! table in `mesh_api::errors`.

use std::time::Duration;

use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use mesh_api::errors::ProxyError;
use mesh_api::names::PROXY_ERROR_HEADER;

use super::body::Body;

const PROXY_ERROR: HeaderName = HeaderName::from_static(PROXY_ERROR_HEADER);
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Whether a request or response is gRPC, by its content type (gRPC over HTTP/2, "Requests").
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
        // gRPC-Web is another protocol: it has its status in the body.
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The answer for a failure: its status, or for gRPC a trailers-only answer with its gRPC status.
pub fn refusal(error: ProxyError, grpc: bool) -> Response<Body> {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer(status, error.grpc_status(), error, grpc)
}

/// As [`refusal`], with another status than the table's.
pub fn answer(
    status: StatusCode,
    grpc_status: u8,
    error: ProxyError,
    grpc: bool,
) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(PROXY_ERROR, HeaderValue::from_static(error.name()));
    if grpc {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(grpc_status)));
        headers.insert(GRPC_MESSAGE, HeaderValue::from_static(error.hint()));
    } else {
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        *response.status_mut() = status;
    }
    response
}

/// What ends the answer to a gRPC request that failed after its head.
pub fn grpc_trailers(error: ProxyError) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert(
        GRPC_STATUS,
        HeaderValue::from(u16::from(error.grpc_status())),
    );
    trailers.insert(GRPC_MESSAGE, HeaderValue::from_static(error.hint()));
    trailers.insert(PROXY_ERROR, HeaderValue::from_static(error.name()));
    trailers
}

/// Says when to come again, in whole seconds, at least one.
pub fn retry_after(response: &mut Response<Body>, wait: Duration) {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    response
        .headers_mut()
        .insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
}
