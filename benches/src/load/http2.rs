//! HTTP/2 with prior knowledge and unary gRPC, for both the client and the server.

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use super::client::Carry;

/// A client's connection. Its frames are moved by a task that ends with it.
pub(super) struct Connection {
    send: SendRequest<Bytes>,
    grpc: bool,
}

impl Connection {
    pub(super) async fn open(target: SocketAddr, grpc: bool) -> io::Result<Self> {
        let stream = TcpStream::connect(target).await?;
        stream.set_nodelay(true)?;
        let (send, connection) = h2::client::handshake(stream)
            .await
            .map_err(io::Error::other)?;
        // What ends the connection ends its request, which tells.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self { send, grpc })
    }

    async fn exchange(&mut self) -> Result<(), h2::Error> {
        futures::future::poll_fn(|context| self.send.poll_ready(context)).await?;
        let (response, mut body) = self.send.send_request(request(self.grpc), !self.grpc)?;
        if self.grpc {
            body.send_data(Bytes::from_static(MESSAGE), true)?;
        }
        let (head, mut body) = response.await?.into_parts();
        let mut length = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            length += data.len();
            body.flow_control().release_capacity(data.len())?;
        }
        let trailers = body.trailers().await?;
        let status = trailers.as_ref().and_then(|t| t.get("grpc-status"));
        let whole = if self.grpc {
            status.is_some_and(|status| status == "0") && length == MESSAGE.len()
        } else {
            length == BODY.len()
        };
        match head.status.is_success() && whole {
            true => Ok(()),
            false => Err(h2::Reason::INTERNAL_ERROR.into()),
        }
    }
}

impl Carry for Connection {
    async fn request(&mut self) -> io::Result<()> {
        self.exchange().await.map_err(io::Error::other)
    }
}

fn request(grpc: bool) -> Request<()> {
    let mut request = Request::new(());
    let headers = if grpc {
        *request.method_mut() = Method::POST;
        *request.uri_mut() = http::Uri::from_static("http://server.bench/bench.Echo/Say");
        [("content-type", "application/grpc"), ("te", "trailers")]
    } else {
        *request.uri_mut() = http::Uri::from_static("http://server.bench/bench");
        [("user-agent", "warren-bench"), ("accept", "*/*")]
    };
    for (name, value) in headers {
        request
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    request
}

/// Serves a connection of which the first bytes have been read.
pub(super) async fn serve(stream: TcpStream, first: &[u8]) -> io::Result<()> {
    let (read, write) = stream.into_split();
    let stream = tokio::io::join(io::Cursor::new(first.to_vec()).chain(read), write);
    let mut connection = h2::server::handshake(stream)
        .await
        .map_err(io::Error::other)?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted.map_err(io::Error::other)?;
        // An answer is written at once unless the body of a call is still on its way.
        if request.method() == Method::POST {
            tokio::spawn(call(request, respond));
        } else {
            answer(respond).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn answer(mut respond: h2::server::SendResponse<Bytes>) -> Result<(), h2::Error> {
    let response = Response::builder().header("content-type", "text/plain");
    let mut body = respond.send_response(response.body(()).unwrap_or_default(), false)?;
    body.send_data(Bytes::from_static(BODY), true)
}

/// The client counts what failed.
async fn call(
    mut request: Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    while let Some(data) = request.body_mut().data().await {
        let length = data?.len();
        request.body_mut().flow_control().release_capacity(length)?;
    }
    let response = Response::builder().header("content-type", "application/grpc");
    let mut body = respond.send_response(response.body(()).unwrap_or_default(), false)?;
    body.send_data(Bytes::from_static(MESSAGE), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    body.send_trailers(trailers)
}

/// As long as the body in HTTP/1.1.
const BODY: &[u8] = &[b'0'; 128];
/// gRPC's frame: not compressed, length 64.
const MESSAGE: &[u8] = &{
    let mut message = [b'0'; 69];
    message[0] = 0;
    message[1] = 0;
    message[2] = 0;
    message[3] = 0;
    message[4] = 64;
    message
};
