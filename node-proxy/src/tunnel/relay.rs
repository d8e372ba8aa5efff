//! Copies bytes between a socket and a stream of a tunnel.
//!
//! As between two sockets (`crate::tcp`): no buffer while idle, back-pressure both ways through HTTP/2
//! flow control, END_STREAM for FIN and RST_STREAM for RST. What waits because a receiver is slow is
//! charged to the workload.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;

use bytes::{Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use tokio::net::TcpStream;

use super::ABORT;
use crate::budget::Charge;
use crate::tcp::{Broken, CHUNK, finish_writing, reset_on_close, with_scratch, write_some};
use crate::telemetry::Meter;

/// A read of at least this size is a bulk transfer: the next one goes straight into memory that HTTP/2
/// sends from, which saves a copy and costs a large allocation.
const BULK: usize = 16 * 1024;

/// Copies both ways until both sides have finished. On an error socket and stream are reset.
///
/// `to_tunnel` counts bytes from the socket to the tunnel.
pub async fn relay(
    socket: &TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    to_tunnel: &Meter,
    from_tunnel: &Meter,
    mut buffered: [Charge; 2],
) -> Result<(), Broken> {
    let [up, down] = &mut buffered;
    let result = tokio::try_join!(
        into_tunnel(socket, send, to_tunnel, up),
        out_of_tunnel(receive, socket, from_tunnel, down)
    );
    if result.is_err() {
        reset_on_close(socket);
        send.send_reset(ABORT);
    }
    result.map(|_| ())
}

async fn into_tunnel(
    from: &TcpStream,
    to: &mut SendStream<Bytes>,
    count: &Meter,
    buffered: &mut Charge,
) -> Result<(), Broken> {
    let mut bulk = false;
    loop {
        to.reserve_capacity(CHUNK);
        if to.capacity() == 0 {
            // The stream's buffer is full: that much is held for a tunnel that does not drain.
            buffered.add(super::SEND_BUFFER).map_err(Broken::Limit)?;
            while to.capacity() == 0 {
                match poll_fn(|cx| to.poll_capacity(cx)).await {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Err(Broken::Stream),
                }
            }
            buffered.release(super::SEND_BUFFER);
        }
        tokio::select! {
            biased;
            readable = from.readable() => readable?,
            _reset = poll_fn(|cx| to.poll_reset(cx)) => return Err(Broken::Stream),
        }
        let capacity = to.capacity().min(CHUNK);
        let chunk = if bulk {
            read_bulk(from, capacity)
        } else {
            read_small(from, capacity)
        };
        match chunk {
            Ok(chunk) if chunk.is_empty() => {
                return to.send_data(Bytes::new(), true).map_err(|_| Broken::Stream);
            }
            Ok(chunk) => {
                bulk = chunk.len() >= BULK;
                count.add(chunk.len());
                to.send_data(chunk, false).map_err(|_| Broken::Stream)?;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn read_small(from: &TcpStream, limit: usize) -> io::Result<Bytes> {
    with_scratch(|scratch| {
        let length = from.try_read(&mut scratch[..limit])?;
        Ok(Bytes::copy_from_slice(&scratch[..length]))
    })
}

fn read_bulk(from: &TcpStream, limit: usize) -> io::Result<Bytes> {
    use bytes::BufMut;
    let mut chunk = BytesMut::with_capacity(limit);
    from.try_read_buf(&mut (&mut chunk).limit(limit))?;
    Ok(chunk.freeze())
}

async fn out_of_tunnel(
    from: &mut RecvStream,
    to: &TcpStream,
    count: &Meter,
    buffered: &mut Charge,
) -> Result<(), Broken> {
    while let Some(chunk) = from.data().await {
        let chunk = chunk.map_err(|_| Broken::Stream)?;
        count.add(chunk.len());
        let written = write_some(to, &chunk)?;
        release(from, written)?;
        if written < chunk.len() {
            write_backlog(from, to, chunk.slice(written..), count, buffered).await?;
        }
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
