//! A declared gRPC probe (gRPC Health Checking Protocol, `grpc.health.v1.Health/Check`): the request is
//! taken apart, compared with what the pod declares, and asked anew of the app.

use std::future::poll_fn;

use bytes::{BufMut, Bytes, BytesMut};
use h2::RecvStream;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use mesh_api::errors::ProxyError;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

pub(super) const CHECK: &str = "/grpc.health.v1.Health/Check";
/// A health check names a service; nothing longer passes.
const MAX_MESSAGE: usize = 1024;

#[derive(Clone, PartialEq, Eq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// Serves one connection that began with the HTTP/2 preface. `declared`: services that may be asked for.
pub(super) async fn serve(
    prober: impl AsyncRead + AsyncWrite + Unpin,
    app: TcpStream,
    declared: &[&str],
) -> Result<(), ProxyError> {
    let refused = |_| ProxyError::PlaintextRefused;
    let mut server = h2::server::Builder::new()
        .max_concurrent_streams(1)
        .max_header_list_size(4096)
        .initial_window_size(MAX_MESSAGE as u32)
        .handshake::<_, Bytes>(prober)
        .await
        .map_err(refused)?;
    let Some(first) = server.accept().await else {
        return Err(ProxyError::PlaintextRefused);
    };
    let (request, mut respond) = first.map_err(refused)?;
    let exchange = async {
        let (parts, body) = request.into_parts();
        let asked = read_message(body)
            .await
            .and_then(|m| HealthCheckRequest::decode(m).ok());
        let allowed = parts.method == Method::POST
            && parts.uri.path() == CHECK
            && asked
                .as_ref()
                .is_some_and(|a| declared.contains(&a.service.as_str()));
        let Some(asked) = asked.filter(|_| allowed) else {
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::FORBIDDEN;
            // The prober may have gone.
            let _ = respond.send_response(response, true);
            return Err(ProxyError::PlaintextRefused);
        };
        let answer = ask(app, parts.uri, asked).await?;
        let mut send = respond
            .send_response(answer.head, false)
            .map_err(|_| ProxyError::ConnectFailed)?;
        send.send_data(answer.body, false)
            .map_err(|_| ProxyError::ConnectFailed)?;
        send.send_trailers(answer.trailers)
            .map_err(|_| ProxyError::ConnectFailed)
    };
    let mut exchange = std::pin::pin!(exchange);
    let mut result = None;
    // One exchange; whatever else the prober asks for is not answered.
    loop {
        tokio::select! {
            ended = &mut exchange, if result.is_none() => {
                result = Some(ended);
                server.graceful_shutdown();
            }
            next = server.accept() => match next {
                Some(Ok(_another)) => return Err(ProxyError::PlaintextRefused),
                Some(Err(_)) | None => return result.unwrap_or(Err(ProxyError::PlaintextRefused)),
            },
        }
    }
}

struct Answer {
    head: Response<()>,
    body: Bytes,
    trailers: HeaderMap,
}

async fn ask(
    app: TcpStream,
    uri: http::Uri,
    asked: HealthCheckRequest,
) -> Result<Answer, ProxyError> {
    let failed = |_| ProxyError::ConnectFailed;
    let (send, connection) = h2::client::handshake(app).await.map_err(failed)?;
    let exchange = async {
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_2;
        let headers = request.headers_mut();
        headers.insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("application/grpc"),
        );
        headers.insert(http::header::TE, http::HeaderValue::from_static("trailers"));
        let mut send = send.ready().await.map_err(failed)?;
        let (response, mut body) = send.send_request(request, false).map_err(failed)?;
        let mut message = BytesMut::with_capacity(5 + asked.encoded_len());
        message.put_u8(0);
        message.put_u32(u32::try_from(asked.encoded_len()).map_err(|_| ProxyError::BadRequest)?);
        asked
            .encode(&mut message)
            .map_err(|_| ProxyError::BadRequest)?;
        body.send_data(message.freeze(), true).map_err(failed)?;
        let (head, mut body) = response.await.map_err(failed)?.into_parts();
        let mut bytes = BytesMut::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(failed)?;
            if bytes.len() + chunk.len() > MAX_MESSAGE {
                return Err(ProxyError::ConnectFailed);
            }
            body.flow_control()
                .release_capacity(chunk.len())
                .map_err(failed)?;
            bytes.extend_from_slice(&chunk);
        }
        let trailers = poll_fn(|cx| body.poll_trailers(cx))
            .await
            .map_err(failed)?
            .unwrap_or_default();
        Ok(Answer {
            head: Response::from_parts(head, ()),
            body: bytes.freeze(),
            trailers,
        })
    };
    let mut connection = std::pin::pin!(connection);
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        _ended = &mut connection => exchange.await,
    }
}

/// The one uncompressed message of a body.
async fn read_message(mut body: RecvStream) -> Option<Bytes> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.ok()?;
        if bytes.len() + chunk.len() > MAX_MESSAGE {
            return None;
        }
        body.flow_control().release_capacity(chunk.len()).ok()?;
        bytes.extend_from_slice(&chunk);
    }
    only_message(&bytes.freeze())
}

/// The message of a body that is one (gRPC over HTTP/2, "Length-Prefixed-Message"): not compressed, nothing behind it.
fn only_message(bytes: &Bytes) -> Option<Bytes> {
    let length = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?);
    let complete = bytes[0] == 0 && usize::try_from(length).ok()? == bytes.len() - 5;
    complete.then(|| bytes.slice(5..))
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    /// What a prober that asks for `service` hears of an app that answers SERVING.
    async fn probe(service: &str, path: &str) -> Result<Answer, ProxyError> {
        let (prober, at_proxy) = pair().await;
        let (to_app, app) = pair().await;
        let answering = async {
            // Closed unused when the check was refused.
            let Ok(mut server) = h2::server::handshake(app).await else {
                return;
            };
            while let Some(Ok((request, mut respond))) = server.accept().await {
                assert_eq!(request.uri().path(), CHECK);
                let mut send = respond.send_response(Response::new(()), false).unwrap();
                send.send_data(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]), false)
                    .unwrap();
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                send.send_trailers(trailers).unwrap();
            }
        };
        let asked = HealthCheckRequest {
            service: service.into(),
        };
        let asking = ask(prober, format!("http://pod{path}").parse().unwrap(), asked);
        let declared = ["", "db"];
        let serving = serve(at_proxy, to_app, &declared);
        let (answer, served, ()) = tokio::join!(asking, serving, answering);
        served.and(answer)
    }

    #[tokio::test]
    async fn a_declared_check_is_answered_by_the_app() {
        let answer = probe("db", CHECK).await.unwrap();
        assert_eq!(
            (&answer.body[..], &answer.trailers["grpc-status"]),
            (&[0, 0, 0, 0, 2, 8, 1][..], &"0".parse().unwrap())
        );
    }

    #[tokio::test]
    async fn another_service_or_method_is_refused() {
        assert!(matches!(
            probe("secret", CHECK).await,
            Err(ProxyError::PlaintextRefused)
        ));
        assert!(matches!(
            probe("db", "/shop.Orders/Delete").await,
            Err(ProxyError::PlaintextRefused)
        ));
    }
}
