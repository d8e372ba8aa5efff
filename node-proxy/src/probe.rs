//! Probes of the kubelet. In strict mode, from the node's own addresses exactly what the pod declares passes, and
//! nothing else; otherwise that is not counted as a caller's.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use http::request::Parts;
use mesh_api::errors::ProxyError;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::deliver;
use crate::pods::{Pod, PodInfo, ProbeKind};
use crate::tcp::{self, finish_writing, with_scratch, write_some};

pub(crate) mod grpc;

/// A probe that takes longer has failed at the kubelet long before.
const TIMEOUT: Duration = Duration::from_secs(60);
const MAX_HEAD: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;
/// First bytes of an HTTP/2 client up to the first empty line (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// Serves a connection from one of the node's addresses.
pub async fn serve(
    pod: &Arc<Pod>,
    info: &PodInfo,
    socket: &mut TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Result<(), ProxyError> {
    let declared: Vec<&ProbeKind> = info
        .probes
        .iter()
        .filter(|p| p.port == destination.port())
        .map(|p| &p.kind)
        .collect();
    if declared.is_empty() {
        return Err(ProxyError::PlaintextRefused);
    }
    match timeout(TIMEOUT, probe(pod, &declared, socket, peer, destination)).await {
        Ok(result) => result,
        Err(_late) => Err(ProxyError::ConnectTimeout),
    }
}

/// Whether a request to this port is what the pod declares as a probe of it.
pub fn is_declared(info: &PodInfo, port: u16, request: &Parts) -> bool {
    let path = request.uri.path_and_query().map(|path| path.as_str());
    let declared = |kind: &ProbeKind| match kind {
        ProbeKind::HttpGet(declared) => {
            request.method == Method::GET && path == Some(declared.as_str())
        }
        ProbeKind::Grpc(_) => path == Some(grpc::CHECK),
        ProbeKind::TcpSocket => false,
    };
    let mut of_port = info.probes.iter().filter(|probe| probe.port == port);
    of_port.any(|probe| declared(&probe.kind))
}

async fn probe(
    pod: &Arc<Pod>,
    declared: &[&ProbeKind],
    socket: &mut TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Result<(), ProxyError> {
    let mut app = deliver::to_app_for(pod, peer.ip(), destination, true).await?;
    let head = read_head(socket)
        .await
        .map_err(|_| ProxyError::PlaintextRefused)?;
    if head.is_empty() {
        // A TCP probe connects and sends nothing.
        let tcp = declared
            .iter()
            .any(|kind| matches!(kind, ProbeKind::TcpSocket));
        return if tcp {
            Ok(())
        } else {
            Err(ProxyError::PlaintextRefused)
        };
    }
    if let Some(rest) = head.strip_prefix(HTTP2_PREFACE) {
        let services: Vec<&str> = declared
            .iter()
            .filter_map(|kind| match kind {
                ProbeKind::Grpc(service) => Some(service.as_str()),
                ProbeKind::HttpGet(_) | ProbeKind::TcpSocket => None,
            })
            .collect();
        if services.is_empty() {
            return Err(ProxyError::PlaintextRefused);
        }
        let (read, write) = socket.split();
        // The preface has been read already; HTTP/2 wants to see it.
        let read = AsyncReadExt::chain(HTTP2_PREFACE, AsyncReadExt::chain(rest, read));
        let (app, _charge) = app.into_stream();
        return grpc::serve(tokio::io::join(read, write), app, &services).await;
    }
    let path = request_path(&head).ok_or(ProxyError::PlaintextRefused)?;
    let http = declared
        .iter()
        .any(|kind| matches!(kind, ProbeKind::HttpGet(declared) if *declared == path));
    if !http {
        return Err(ProxyError::PlaintextRefused);
    }
    let io = |_: io::Error| ProxyError::ConnectFailed;
    if write_some(app.stream(), &head).map_err(io)? < head.len() {
        // A head of 8 KiB always fits an empty socket buffer.
        return Err(ProxyError::Internal);
    }
    answer(app.stream(), socket).await.map_err(io)
}

/// Copies the answer until the app or the prober closes; a prober that sends more is cut off.
async fn answer(app: &TcpStream, prober: &TcpStream) -> io::Result<()> {
    loop {
        tokio::select! {
            readable = app.readable() => {
                readable?;
                let step: io::Result<_> = with_scratch(|scratch| {
                    let length = app.try_read(scratch)?;
                    let written = write_some(prober, &scratch[..length])?;
                    Ok((length, scratch[written..length].to_vec()))
                });
                match step {
                    Ok((0, _)) => return finish_writing(prober),
                    Ok((_, mut rest)) => {
                        while !rest.is_empty() {
                            prober.writable().await?;
                            rest.drain(..write_some(prober, &rest)?);
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
            }
            readable = prober.readable() => {
                readable?;
                match with_scratch(|scratch| prober.try_read(scratch)) {
                    Ok(0) => return Ok(()),
                    Ok(_) => {
                        tcp::reset_on_close(prober);
                        return Ok(());
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }
}

/// Reads until the end of the head; empty if the prober closed without sending.
async fn read_head(socket: &TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        socket.readable().await?;
        let limit = MAX_HEAD - head.len();
        if limit == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let read: io::Result<usize> = with_scratch(|scratch| {
            let length = socket.try_read(&mut scratch[..limit])?;
            head.extend_from_slice(&scratch[..length]);
            Ok(length)
        });
        match read {
            Ok(0) => return Ok(head),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(head)
}

/// The target of a GET without a body and with nothing behind it.
fn request_path(head: &[u8]) -> Option<String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(length) = request.parse(head).ok()? else {
        return None;
    };
    let names_body = |h: &httparse::Header<'_>| {
        h.name.eq_ignore_ascii_case("transfer-encoding")
            || h.name.eq_ignore_ascii_case("upgrade")
            || (h.name.eq_ignore_ascii_case("content-length") && h.value != b"0")
    };
    let bodiless = !request.headers.iter().any(names_body);
    (length == head.len() && bodiless && request.method == Some("GET"))
        .then(|| request.path.unwrap_or_default().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_get_is_a_probe() {
        let path = |head: &str| request_path(head.as_bytes());
        assert_eq!(
            path("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_deref(),
            Some("/healthz")
        );
        for head in [
            "POST /healthz HTTP/1.1\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
            "GET /healthz HTTP/1.1\r\n\r\nGET /secret HTTP/1.1\r\n\r\n",
            "\u{16}\u{3}\u{1}\r\n\r\n",
        ] {
            assert_eq!(path(head), None, "{head:?}");
        }
    }
}
