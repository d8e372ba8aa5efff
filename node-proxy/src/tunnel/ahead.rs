//! A connection that takes in what comes while its peer takes nothing.
//!
//! The HTTP/2 library reads nothing while an answer of its own waits to be written: to a PING, for one. If both
//! ends of a tunnel are full, and have such an answer to write, neither reads before the other does, and the tunnel stands
//! still until it is given up. So what comes is read while a write waits, into memory: enough for the peer's kernel to take
//! what the peer has begun to write, whereupon the peer writes its answer and reads again.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tcp::with_scratch;

/// Most bytes that are taken in ahead. A kernel wakes a writer when a third of its send buffer is free, and offers
/// a window when a sixteenth of its receive buffer is: 1.3 and 2 MiB of the largest there are by default
/// (`net.ipv4.tcp_wmem`, `net.ipv4.tcp_rmem`).
const MOST: usize = 4 << 20;

/// Reads ahead while a write waits.
#[derive(Debug)]
pub struct ReadsAhead<T> {
    io: T,
    ahead: VecDeque<u8>,
    /// The stream has ended, or failed, behind what is ahead.
    end: Option<io::Result<()>>,
}

impl<T: AsyncRead + Unpin> ReadsAhead<T> {
    /// Nothing is ahead yet.
    pub fn new(io: T) -> Self {
        Self {
            io,
            ahead: VecDeque::new(),
            end: None,
        }
    }

    /// To be called when a write waits: the task is woken for what comes, too.
    fn take_in(&mut self, cx: &mut Context<'_>) {
        while self.end.is_none() && self.ahead.len() < MOST {
            let read = with_scratch(|scratch| {
                let mut buffer = ReadBuf::new(scratch);
                let read = Pin::new(&mut self.io).poll_read(cx, &mut buffer);
                self.ahead.extend(buffer.filled());
                read.map_ok(|()| buffer.filled().len())
            });
            match read {
                Poll::Ready(Ok(0)) => self.end = Some(Ok(())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => self.end = Some(Err(error)),
                Poll::Pending => return,
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadsAhead<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let (first, _) = this.ahead.as_slices();
            let length = first.len().min(buffer.remaining());
            buffer.put_slice(&first[..length]);
            this.ahead.drain(..length);
            if this.ahead.is_empty() {
                this.ahead = VecDeque::new();
            }
            return Poll::Ready(Ok(()));
        }
        match this.end.take() {
            Some(end) => Poll::Ready(end),
            None => Pin::new(&mut this.io).poll_read(cx, buffer),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ReadsAhead<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        if written.is_pending() {
            this.take_in(cx);
        }
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, bytes);
        if written.is_pending() {
            this.take_in(cx);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.io).poll_flush(cx);
        if flushed.is_pending() {
            this.take_in(cx);
        }
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use h2::{RecvStream, SendStream};
    use http::{Request, Response};
    use tokio::time::timeout;

    use super::*;

    /// What one end of the connection holds of the other's.
    const PIPE: usize = 4096;

    /// Sends without end, and reads what comes without end.
    async fn flood(mut to: SendStream<Bytes>, mut from: RecvStream) {
        let sending = async {
            let data = Bytes::from_static(&[7; 16 * 1024]);
            loop {
                to.reserve_capacity(data.len());
                while to.capacity() < data.len() {
                    let more = std::future::poll_fn(|cx| to.poll_capacity(cx)).await;
                    more.unwrap().unwrap();
                }
                to.send_data(data.clone(), false).unwrap();
            }
        };
        let reading = async {
            while let Some(data) = from.data().await {
                let _ = from.flow_control().release_capacity(data.unwrap().len());
            }
        };
        tokio::join!(sending, reading);
    }

    async fn pings(mut ping: h2::PingPong) {
        for _ in 0..50 {
            ping.ping(h2::Ping::opaque()).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn two_full_ends_that_ping_each_other_go_on() {
        let (near, far) = tokio::io::duplex(PIPE);
        tokio::spawn(async move {
            let mut server = h2::server::handshake(ReadsAhead::new(far)).await.unwrap();
            let ping = server.ping_pong().unwrap();
            tokio::spawn(pings(ping));
            while let Some(accepted) = server.accept().await {
                let (request, mut respond) = accepted.unwrap();
                let to = respond.send_response(Response::new(()), false).unwrap();
                tokio::spawn(flood(to, request.into_body()));
            }
        });
        let (send, mut connection) = h2::client::handshake(ReadsAhead::new(near)).await.unwrap();
        let ping = connection.ping_pong().unwrap();
        tokio::spawn(async move { connection.await.unwrap() });
        let mut send = send.ready().await.unwrap();
        let (response, to) = send.send_request(Request::new(()), false).unwrap();
        tokio::spawn(async move { flood(to, response.await.unwrap().into_body()).await });
        let pinged = timeout(Duration::from_secs(60), pings(ping)).await;
        pinged.expect("the connection stands still");
    }
}
