//! What both sides of a connection must do, over real sockets.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::http::body::Body;
use crate::tcp;

mod client;
mod parse;
mod server;

/// A connected pair.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    near.set_nodelay(true).unwrap();
    (near, listener.accept().await.unwrap().0)
}

/// Reads until the socket holds nothing more of what was written so far.
async fn read_exactly(from: &mut TcpStream, expected: &str) {
    let mut heard = vec![0; expected.len()];
    from.read_exact(&mut heard).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&heard), expected);
}

async fn read_to_end(from: &mut TcpStream) -> String {
    let mut heard = Vec::new();
    from.read_to_end(&mut heard).await.unwrap();
    String::from_utf8(heard).unwrap()
}

/// All data and the trailers of a body.
async fn collect(mut body: Body) -> Result<(Vec<u8>, Option<HeaderMap>), BodyError> {
    let (mut data, mut trailers) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(bytes) => data.extend_from_slice(&bytes),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((data, trailers))
}

/// A body of these frames that is not known before it is asked for.
fn streamed(parts: &[&'static [u8]], trailers: Option<HeaderMap>) -> Body {
    let mut frames: Vec<_> = parts
        .iter()
        .map(|part| Ok(http_body::Frame::data(Bytes::from_static(part))))
        .collect();
    frames.extend(trailers.map(|trailers| Ok(http_body::Frame::trailers(trailers))));
    Body::boxed(http_body_util::StreamBody::new(futures::stream::iter(
        frames,
    )))
}

fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        })
        .collect()
}
