//! The server: answers `GET` with a fixed response, drains uploads, fills downloads.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::{BULK_BUFFER, DOWNLOAD, UPLOAD, http2};

/// Serves until the process is ended. A connection that fails ends alone.
pub async fn serve(address: SocketAddr) -> io::Result<()> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(BACKLOG)?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            // The client counts what failed; a reset here is its business.
            let _ = connection(stream).await;
        });
    }
}

async fn connection(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0u8; 1024];
    let length = stream.read(&mut first).await?;
    match first[..length].first() {
        None => Ok(()),
        Some(&UPLOAD) => drain(stream, length as u64).await,
        Some(&DOWNLOAD) => fill(stream).await,
        Some(b'P') => http2::serve(stream, &first[..length]).await,
        Some(_) => answer(stream, first, length).await,
    }
}

/// HTTP/1.1 without bodies in requests. `Connection: close` is honoured, as a real server does.
async fn answer(
    mut stream: TcpStream,
    mut buffer: [u8; 1024],
    mut length: usize,
) -> io::Result<()> {
    loop {
        while let Some(end) = find(&buffer[..length], b"\r\n\r\n") {
            let close = find(&buffer[..end], b"\r\nConnection: close").is_some();
            stream.write_all(RESPONSE).await?;
            if close {
                return stream.shutdown().await;
            }
            buffer.copy_within(end + 4..length, 0);
            length -= end + 4;
        }
        if length == buffer.len() {
            return Err(io::Error::other("request head over 1024 bytes"));
        }
        match stream.read(&mut buffer[length..]).await? {
            0 => return Ok(()),
            more => length += more,
        }
    }
}

async fn drain(mut stream: TcpStream, mut total: u64) -> io::Result<()> {
    let mut buffer = vec![0; BULK_BUFFER];
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => total += length as u64,
        }
    }
    stream.write_all(&total.to_be_bytes()).await?;
    stream.shutdown().await
}

async fn fill(mut stream: TcpStream) -> io::Result<()> {
    let buffer = vec![0; BULK_BUFFER];
    loop {
        stream.write_all(&buffer).await?;
    }
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|w| w == needle)
}

/// 128 bytes of body, as small answers of an API are.
const RESPONSE: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 128\r\n\r\n\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const BACKLOG: u32 = 4096;
