//! The standard gRPC health check (grpc.health.v1.Health/Check), just enough of it for a probe.

use bytes::{BufMut, Bytes, BytesMut};
use tokio::net::TcpStream;

/// Asks whether a service is serving.
pub(crate) async fn check(stream: TcpStream, authority: &str, service: &str) -> Result<(), String> {
    let failed = |e: h2::Error| format!("gRPC health check: {e}");
    let (mut client, connection) = h2::client::handshake(stream).await.map_err(failed)?;
    let ask = async {
        let request =
            http::Request::post(format!("http://{authority}/grpc.health.v1.Health/Check"))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("user-agent", "kube-probe/1.36")
                .body(())
                .map_err(|e| e.to_string())?;
        let (response, mut send) = client.send_request(request, false).map_err(failed)?;
        send.send_data(message(service), true).map_err(failed)?;
        let mut body = response.await.map_err(failed)?.into_body();
        let mut answer = BytesMut::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(failed)?;
            // Fails only for more than was received.
            let _ = body.flow_control().release_capacity(chunk.len());
            if answer.len() + chunk.len() > MAX_ANSWER {
                return Err("gRPC health check: the answer is too long".into());
            }
            answer.extend_from_slice(&chunk);
        }
        let trailers = body.trailers().await.map_err(failed)?;
        let status = trailers
            .as_ref()
            .and_then(|t| t.get("grpc-status")?.to_str().ok());
        match status {
            Some("0") if is_serving(&answer) => Ok(()),
            Some("0") => Err("gRPC health check: not serving".into()),
            other => Err(format!(
                "gRPC health check: status {}",
                other.unwrap_or("missing")
            )),
        }
    };
    tokio::select! {
        answer = ask => answer,
        ended = connection => Err(format!(
            "gRPC health check: the connection ended{}",
            ended.err().map(|e| format!(": {e}")).unwrap_or_default()
        )),
    }
}

/// `HealthCheckRequest { service = 1 }` with gRPC's five bytes before it.
fn message(service: &str) -> Bytes {
    // A Kubernetes manifest's service name is shorter than 128 bytes, so its length is one byte.
    let service = &service.as_bytes()[..service.len().min(127)];
    let mut body = BytesMut::new();
    if !service.is_empty() {
        body.put_u8(0x0a);
        body.put_u8(service.len() as u8);
        body.put_slice(service);
    }
    let mut message = BytesMut::new();
    message.put_u8(0);
    message.put_u32(body.len() as u32);
    message.put_slice(&body);
    message.freeze()
}

/// `HealthCheckResponse { status = 1 }` with SERVING (1).
fn is_serving(answer: &[u8]) -> bool {
    answer.get(5..) == Some(&[0x08, 0x01])
}

const MAX_ANSWER: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_grpc_wants_them() {
        assert_eq!(&message("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&message("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert!(is_serving(&[0, 0, 0, 0, 2, 8, 1]));
        assert!(!is_serving(&[0, 0, 0, 0, 2, 8, 2]) && !is_serving(&[]));
    }

    #[tokio::test]
    async fn a_server_is_asked_and_believed() {
        for (answer, status, good) in [
            (&[0, 0, 0, 0, 2, 8, 1][..], "0", true),
            (&[0, 0, 0, 0, 2, 8, 2][..], "0", false),
            (&[], "12", false),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = async {
                let (stream, _) = listener.accept().await.unwrap();
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                    let head = http::Response::new(());
                    let mut send = respond.send_response(head, false).unwrap();
                    send.send_data(Bytes::from_static(answer), false).unwrap();
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", status.parse().unwrap());
                    send.send_trailers(trailers).unwrap();
                }
            };
            let client = async {
                let stream = TcpStream::connect(address).await.unwrap();
                check(stream, &address.to_string(), "web").await
            };
            let (result, ()) = tokio::join!(client, server);
            assert_eq!(result.is_ok(), good, "{result:?}");
        }
    }
}
