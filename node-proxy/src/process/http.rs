//! A small HTTP/1 server for scrapers, the kubelet and operators.
//!
//! Whoever reaches the port may be hostile: at most [`CONNECTIONS`] at once, each with a bounded head, time
//! to send it and life. Request bodies are not read.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

const CONNECTIONS: usize = 32;
const HEAD_TIME: Duration = Duration::from_secs(10);
const LIFE: Duration = Duration::from_secs(300);
const HEAD_BYTES: usize = 16 * 1024;
const BIND_AGAIN: Duration = Duration::from_secs(1);

/// An answer with its whole body.
pub type Answer = Response<Full<Bytes>>;
/// Answers a request from its head alone.
pub type Handler = Arc<dyn Fn(&Request<Incoming>) -> Answer + Send + Sync>;

/// Serves on a TCP address for ever. While the address is taken (by the process this one replaces) it is
/// tried again every second.
pub async fn serve_tcp(name: &'static str, address: SocketAddr, handler: Handler) -> Infallible {
    let mut said = false;
    let listener = loop {
        match bind(address) {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(name, %address, %error, "cannot listen yet; trying again every second");
                }
                tokio::time::sleep(BIND_AGAIN).await;
            }
        }
    };
    tracing::info!(name, %address, "listening");
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            // The semaphore is never closed.
            continue;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = Arc::clone(&handler);
                // Ends within LIFE; the permit bounds how many there are.
                tokio::spawn(async move {
                    connection(stream, handler).await;
                    drop(permit);
                });
            }
            Err(error) => accept_failed(name, &error).await,
        }
    }
}

/// A unix socket whose file goes when it is dropped, unless another process has replaced it.
pub struct UnixServer {
    listener: UnixListener,
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl UnixServer {
    /// Binds with mode 0600. A file that is there is replaced: it is a dead process's, or that of the one
    /// that this process takes over from.
    pub fn bind(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        // Bound aside and moved into place, so that the name always leads to a listening socket.
        let aside = path.with_extension(format!("{}.tmp", std::process::id()));
        match std::fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&aside)?;
        std::fs::set_permissions(&aside, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&aside, path)?;
        Ok(Self {
            listener,
            inode: inode(path),
            path: path.to_owned(),
        })
    }

    /// Serves for ever.
    pub async fn serve(&self, name: &'static str, handler: Handler) -> Infallible {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                // The semaphore is never closed.
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let handler = Arc::clone(&handler);
                    // As above.
                    tokio::spawn(async move {
                        connection(stream, handler).await;
                        drop(permit);
                    });
                }
                Err(error) => accept_failed(name, &error).await,
            }
        }
    }
}

impl Drop for UnixServer {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            // Nobody is left to tell; the next process replaces the file anyway.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Out of descriptors, most likely: without a pause the loop would spin.
async fn accept_failed(name: &str, error: &io::Error) {
    tracing::warn!(name, %error, "accept");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, handler: Handler) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = handler(&request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    // How a scraper's connection ends is of no interest.
    let _ = tokio::time::timeout(LIFE, served).await;
}

/// `[::]` means both families, or IPv4 alone where there is no IPv6.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = match bind_one(address) {
        Err(error)
            if address.is_ipv6()
                && address.ip().is_unspecified()
                && matches!(
                    error.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
        {
            bind_one((Ipv4Addr::UNSPECIFIED, address.port()).into())?
        }
        result => result?,
    };
    TcpListener::from_std(listener)
}

fn bind_one(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// Plain text.
pub fn text(status: StatusCode, body: impl Into<String>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body.into())
}

/// Indented JSON.
pub fn json(value: &serde_json::Value) -> Answer {
    answer(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

/// Any other type.
pub fn answer(status: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    answer
}
