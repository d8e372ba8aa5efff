//! Copies bytes between a socket and a stream of a tunnel.
//!
//! As between two sockets (`crate::tcp`): no buffer while idle, back-pressure both ways through HTTP/2
//! flow control, END_STREAM for FIN and RST_STREAM for RST. What waits because a receiver is slow is
//! charged to the workload.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;
use tokio_util::io::poll_read_buf;

use super::{ABORT, FULL_FRAME};
use crate::budget::Charge;
use crate::tcp::{Broken, failed, finish_writing, poll_read, reset_on_close, write_some};
use crate::telemetry::Meter;
use crate::turns::pause;

/// A read of at least this size is a bulk transfer: the next one goes straight into memory that HTTP/2
/// sends from, which saves a copy and costs a large allocation.
const BULK: usize = 16 * 1024;

/// Copies both ways until both sides have finished. On an error socket and stream are reset.
///
/// `to_tunnel` counts bytes from the socket to the tunnel.
pub async fn relay(
    socket: &mut TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    to_tunnel: &Meter,
    from_tunnel: &Meter,
    mut buffered: [Charge; 2],
) -> Result<(), Broken> {
    let [up, down] = &mut buffered;
    let (from_socket, to_socket) = socket.split();
    let result = tokio::try_join!(
        into_tunnel(from_socket, send, to_tunnel, up),
        out_of_tunnel(receive, to_socket.as_ref(), from_tunnel, down)
    );
    if result.is_err() {
        reset_on_close(socket);
        send.send_reset(ABORT);
    }
    result.map(|_| ())
}

async fn into_tunnel(
    mut from: ReadHalf<'_>,
    to: &mut SendStream<Bytes>,
    count: &Meter,
    buffered: &mut Charge,
) -> Result<(), Broken> {
    let mut bulk = false;
    loop {
        to.reserve_capacity(FULL_FRAME);
        if to.capacity() == 0 {
            // The window or the stream's buffer is used up. How much of it waits here HTTP/2 does not tell: no more than
            // the buffer, nor than was ever sent.
            let sent = usize::try_from(count.get()).unwrap_or(usize::MAX);
            let held = sent.min(super::SEND_BUFFER);
            buffered.add(held).map_err(Broken::Limit)?;
            while to.capacity() == 0 {
                let capacity = tokio::select! {
                    biased;
                    capacity = poll_fn(|cx| to.poll_capacity(cx)) => capacity,
                    error = failed(from.as_ref()) => return Err(error.into()),
                };
                match capacity {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Err(Broken::Stream),
                }
            }
            buffered.release(held);
        }
        let limit = to.capacity().min(FULL_FRAME);
        let chunk = poll_fn(|cx| {
            let read = if bulk {
                poll_read_bulk(cx, &mut from, limit)
            } else {
                poll_read(cx, &mut from, limit, Bytes::copy_from_slice)
            };
            if let Poll::Ready(chunk) = read {
                return Poll::Ready(chunk.map_err(Broken::Io));
            }
            // Nothing to read: the peer's reset must not go unnoticed until there is.
            to.poll_reset(cx).map(|_| Err(Broken::Stream))
        });
        let chunk = chunk.await?;
        if chunk.is_empty() {
            return to.send_data(Bytes::new(), true).map_err(|_| Broken::Stream);
        }
        bulk = chunk.len() >= BULK;
        count.add(chunk.len());
        to.send_data(chunk, false).map_err(|_| Broken::Stream)?;
    }
}

fn poll_read_bulk(
    cx: &mut Context<'_>,
    from: &mut ReadHalf<'_>,
    limit: usize,
) -> Poll<io::Result<Bytes>> {
    let mut chunk = BytesMut::with_capacity(limit);
    let read = poll_read_buf(Pin::new(from), cx, &mut (&mut chunk).limit(limit));
    read.map_ok(|_length| chunk.freeze())
}

async fn out_of_tunnel(
    from: &mut RecvStream,
    to: &TcpStream,
    count: &Meter,
    buffered: &mut Charge,
) -> Result<(), Broken> {
    let mut done = 0;
    while let Some(chunk) = from.data().await {
        let chunk = chunk.map_err(|_| Broken::Stream)?;
        count.add(chunk.len());
        done += chunk.len();
        let written = write_some(to, &chunk)?;
        release(from, written)?;
        if written < chunk.len() {
            write_backlog(from, to, chunk.slice(written..), count, buffered).await?;
        }
        pause(&mut done).await;
    }
    Ok(finish_writing(to)?)
}

/// The receiver is slow. Keeps taking what arrives (flow control bounds it), so that every byte held is
/// charged, until the backlog is gone.
async fn write_backlog(
    from: &mut RecvStream,
    to: &TcpStream,
    first: Bytes,
    count: &Meter,
    buffered: &mut Charge,
) -> Result<(), Broken> {
    buffered.add(first.len()).map_err(Broken::Limit)?;
    let mut backlog = VecDeque::from([first]);
    let mut ended = false;
    while let Some(front) = backlog.front_mut() {
        tokio::select! {
            biased;
            writable = to.writable() => {
                writable?;
                let written = write_some(to, front)?;
                if written == front.len() {
                    backlog.pop_front();
                } else {
                    *front = front.slice(written..);
                }
                buffered.release(written);
                release(from, written)?;
            }
            chunk = from.data(), if !ended => match chunk {
                None => ended = true,
                Some(chunk) => {
                    let chunk = chunk.map_err(|_| Broken::Stream)?;
                    count.add(chunk.len());
                    buffered.add(chunk.len()).map_err(Broken::Limit)?;
                    backlog.push_back(chunk);
                }
            },
        }
    }
    Ok(())
}

fn release(from: &mut RecvStream, bytes: usize) -> Result<(), Broken> {
    from.flow_control()
        .release_capacity(bytes)
        .map_err(|_| Broken::Stream)
}

#[cfg(test)]
mod tests;
