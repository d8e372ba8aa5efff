//! Copies bytes between two sockets.
//!
//! An idle connection owns no buffer: bytes are read into one scratch buffer per thread and written on at
//! once. Only what the receiver does not take is kept, in an allocation of just that size, charged to the
//! workload; nothing more is read until it is gone, so back-pressure reaches the sender. End of stream
//! and reset are passed on as what they are.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mesh_api::errors::ProxyError;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

use crate::budget::Charge;
use crate::telemetry::Meter;
use crate::turns::pause;

mod ending;

pub use ending::{Ending, QuietHalf};

/// Size of a thread's scratch buffer: what one read takes at most.
pub const CHUNK: usize = 64 * 1024;

/// Of each direction. The kernel takes no more than `net.core.rmem_max` and `net.core.wmem_max`, and doubles it for its
/// own use.
const BUFFER: usize = 256 * 1024;

/// How long the kernel keeps what an app does not take of a request that was given up. It would take some three minutes
/// otherwise (`net.ipv4.tcp_orphan_retries`), with memory that no account knows of.
const LAST_BYTES: Duration = Duration::from_secs(30);

const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// How a relay ended when not by both sides finishing.
#[derive(Debug)]
pub enum Broken {
    /// A socket failed: reset by the app, or time-out.
    Io(io::Error),
    /// The tunnel stream was reset.
    Stream,
    /// A limit was reached.
    Limit(ProxyError),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Sets what every socket to an app has: no Nagle delay, keepalive. Sockets accepted from a listener
/// inherit both from it.
pub fn set_options(socket: SockRef<'_>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_nodelay(true)
}

/// Bounds what the kernel holds between a proxy and an app of its node that sends what nobody takes, or does not take
/// what is sent: megabytes otherwise (`net.ipv4.tcp_rmem`, `net.ipv4.tcp_wmem`), which no account knows of. It is one copy
/// away, so more would not be faster. To be called before the connection is there.
pub fn bound_buffers(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_recv_buffer_size(BUFFER)?;
    socket.set_send_buffer_size(BUFFER)
}

/// Makes the kernel send RST when the socket is closed.
pub fn reset_on_close(stream: &TcpStream) {
    // A socket that is already gone needs no reset.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Bounds how long the kernel keeps what it was given for a connection that is about to be closed. Only for what nobody
/// waits for any more: who has taken nothing for [`LAST_BYTES`], before and after, loses the rest.
pub fn let_go(stream: &TcpStream) {
    // A socket that is already gone has nothing left to send.
    let _ = SockRef::from(stream).set_tcp_user_timeout(Some(LAST_BYTES));
}

/// Sends FIN.
pub fn finish_writing(stream: &TcpStream) -> io::Result<()> {
    match SockRef::from(stream).shutdown(Shutdown::Write) {
        // The peer has gone already.
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}

/// Ends when the peer has reset the connection, or is given up. A socket from which nothing is read just now tells
/// it only to who asks for that.
pub async fn failed(socket: &TcpStream) -> io::Error {
    let found = match socket.ready(Interest::ERROR).await {
        Ok(_) => socket.take_error(),
        Err(error) => return error,
    };
    // Whoever read or wrote at the same time may have been told the reason.
    let found = found.unwrap_or_else(Some);
    found.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
}

/// Copies both ways until both sides have finished. On an error both sockets are set to reset.
///
/// `sent` counts bytes from `source` to `destination`.
pub async fn relay(
    source: &mut TcpStream,
    destination: &mut TcpStream,
    sent: &Meter,
    received: &Meter,
    mut buffered: [Charge; 2],
) -> Result<(), Broken> {
    let [up, down] = &mut buffered;
    let (from_source, to_source) = source.split();
    let (from_destination, to_destination) = destination.split();
    let result = tokio::try_join!(
        pump(from_source, to_destination.as_ref(), sent, up),
        pump(from_destination, to_source.as_ref(), received, down)
    );
    if result.is_err() {
        reset_on_close(source);
        reset_on_close(destination);
    }
    result.map(|_| ())
}

async fn pump(
    mut from: ReadHalf<'_>,
    to: &TcpStream,
    count: &Meter,
    buffered: &mut Charge,
) -> Result<(), Broken> {
    let mut done = 0;
    loop {
        pause(&mut done).await;
        let copy = |bytes: &[u8]| -> io::Result<_> {
            let written = write_some(to, bytes)?;
            Ok((bytes.len(), bytes[written..].to_vec()))
        };
        let (length, rest) = poll_fn(|cx| poll_read(cx, &mut from, CHUNK, copy)).await??;
        if length == 0 {
            return Ok(finish_writing(to)?);
        }
        count.add(length);
        done += length;
        if !rest.is_empty() {
            buffered.add(rest.len()).map_err(Broken::Limit)?;
            tokio::select! {
                biased;
                written = write_all(to, &rest) => written?,
                error = failed(from.as_ref()) => return Err(error.into()),
            }
            buffered.release(rest.len());
        }
    }
}

/// Reads at most `limit` bytes into this thread's scratch buffer and hands them to `take`; none at the end
/// of the stream. A read that does not fill the buffer has drained the socket, so the runtime waits
/// for more without asking the kernel a second time.
pub fn poll_read<T>(
    cx: &mut Context<'_>,
    from: &mut ReadHalf<'_>,
    limit: usize,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    with_scratch(|scratch| {
        let mut buffer = ReadBuf::new(&mut scratch[..limit]);
        ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(take(buffer.filled())))
    })
}

/// Runs `read` with this thread's scratch buffer. `read` must not block or re-enter.
pub fn with_scratch<T>(read: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local!(static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into()));
    SCRATCH.with(|scratch| read(&mut scratch.borrow_mut()))
}

/// Writes what the socket takes now.
pub fn write_some(to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match to.try_write(&bytes[written..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => written += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    Ok(written)
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        bytes = &bytes[write_some(to, bytes)?..];
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
