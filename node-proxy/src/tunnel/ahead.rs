//! A connection that takes in what comes while its peer takes nothing.
//!
//! The HTTP/2 library reads nothing while an answer of its own waits to be written: to a PING, for one. If both
//! ends of a tunnel are full, and have such an answer to write, neither reads before the other does, and the tunnel stands
//! still until it is given up. So what comes is read while a write waits, into memory: enough for the peer's kernel to take
//! what the peer has begun to write, whereupon the peer writes its answer and reads again.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tcp::with_scratch;

/// Most bytes that are taken in ahead. A kernel wakes a writer when a third of its send buffer is free, and offers
/// a window when a sixteenth of its receive buffer is: 1.3 and 2 MiB of the largest there are by default
/// (`net.ipv4.tcp_wmem`, `net.ipv4.tcp_rmem`).
const MOST: usize = 4 << 20;
/// Of all connections of the process. Beyond, a tunnel that stands still is found by its keepalive.
const MOST_OF_ALL: usize = 64 << 20;
/// What is taken in before others on the thread work.
const PIECE: usize = 64 * 1024;

static ALL: AtomicUsize = AtomicUsize::new(0);

/// Reads ahead while a write waits.
#[derive(Debug)]
pub struct ReadsAhead<T> {
    io: T,
    ahead: VecDeque<Bytes>,
    /// Bytes of `ahead`, and of all connections.
    length: usize,
    all: &'static AtomicUsize,
    /// The stream has ended, or failed, behind what is ahead.
    end: Option<io::Result<()>>,
}

impl<T> ReadsAhead<T> {
    /// Nothing is ahead yet.
    pub fn new(io: T) -> Self {
        Self::counted(io, &ALL)
    }

    fn counted(io: T, all: &'static AtomicUsize) -> Self {
        Self {
            io,
            ahead: VecDeque::new(),
            length: 0,
            all,
            end: None,
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.ahead.push_back(Bytes::copy_from_slice(bytes));
        self.length += bytes.len();
        self.all.fetch_add(bytes.len(), Ordering::Relaxed);
    }

    /// As much of what is ahead as there is room for. `false`: nothing is.
    fn take(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let Some(first) = self.ahead.front_mut() else {
            return false;
        };
        let length = first.len().min(buffer.remaining());
        buffer.put_slice(&first[..length]);
        first.advance(length);
        if first.is_empty() {
            self.ahead.pop_front();
        }
        self.length -= length;
        self.all.fetch_sub(length, Ordering::Relaxed);
        true
    }
}

impl<T> Drop for ReadsAhead<T> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.length, Ordering::Relaxed);
    }
}

impl<T: AsyncRead + Unpin> ReadsAhead<T> {
    /// To be called when a write waits: the task is woken for what comes, too.
    fn take_in(&mut self, cx: &mut Context<'_>) {
        let before = self.length;
        while self.end.is_none()
            && self.length < MOST
            && self.all.load(Ordering::Relaxed) < MOST_OF_ALL
        {
            if self.length - before >= PIECE {
                // The write still waits when the task goes on.
                return cx.waker().wake_by_ref();
            }
            let read = with_scratch(|scratch| {
                let mut buffer = ReadBuf::new(scratch);
                let read = Pin::new(&mut self.io).poll_read(cx, &mut buffer);
                let filled = buffer.filled();
                if !filled.is_empty() {
                    self.put(filled);
                }
                read.map_ok(|()| filled.len())
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
        if this.take(buffer) {
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
    use std::future::poll_fn;
    use std::time::Duration;

    use bytes::Bytes;
    use h2::{RecvStream, SendStream};
    use http::{Request, Response};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;
    use tokio::time::timeout;

    use super::*;
    use crate::tcp::CHUNK;

    /// Bytes between the two ends.
    const PIPE: usize = 4096;
    /// Bytes that come before anybody pings.
    const UNDER_WAY: usize = 1 << 20;

    /// Sends without end, and reads what comes without end. `came`: how much did.
    async fn flood(mut to: SendStream<Bytes>, mut from: RecvStream, came: watch::Sender<usize>) {
        let sending = async {
            let data = Bytes::from_static(&[7; 16 * 1024]);
            loop {
                to.reserve_capacity(data.len());
                let more = poll_fn(|cx| to.poll_capacity(cx)).await;
                let now = more.unwrap().unwrap().min(data.len());
                to.send_data(data.slice(..now), false).unwrap();
            }
        };
        let reading = async {
            while let Some(data) = from.data().await {
                let length = data.unwrap().len();
                from.flow_control().release_capacity(length).unwrap();
                came.send_modify(|came| *came += length);
            }
        };
        tokio::join!(sending, reading);
    }

    async fn pings(mut ping: h2::PingPong, came: watch::Sender<usize>) {
        let mut came = came.subscribe();
        came.wait_for(|came| *came > UNDER_WAY).await.unwrap();
        for _ in 0..50 {
            ping.ping(h2::Ping::opaque()).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn two_full_ends_that_ping_each_other_go_on() {
        let (near, far) = tokio::io::duplex(PIPE);
        tokio::spawn(async move {
            let mut server = h2::server::handshake(ReadsAhead::new(far)).await.unwrap();
            let came = watch::Sender::new(0);
            tokio::spawn(pings(server.ping_pong().unwrap(), came.clone()));
            while let Some(accepted) = server.accept().await {
                let (request, mut respond) = accepted.unwrap();
                let to = respond.send_response(Response::new(()), false).unwrap();
                tokio::spawn(flood(to, request.into_body(), came.clone()));
            }
        });
        let (send, mut connection) = h2::client::handshake(ReadsAhead::new(near)).await.unwrap();
        let ping = connection.ping_pong().unwrap();
        tokio::spawn(async move { connection.await.unwrap() });
        let mut send = send.ready().await.unwrap();
        let (response, to) = send.send_request(Request::new(()), false).unwrap();
        let came = watch::Sender::new(0);
        let told = came.clone();
        tokio::spawn(async move { flood(to, response.await.unwrap().into_body(), told).await });
        let pinged = timeout(Duration::from_secs(60), pings(ping, came)).await;
        pinged.expect("the connection stands still");
    }

    /// Writes until nothing is taken in any more. How much was.
    async fn blocked<T>(near: &mut ReadsAhead<T>) -> usize
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let mut quiet = 0;
        while quiet < 100 {
            let before = near.length;
            poll_fn(|cx| {
                while Pin::new(&mut *near).poll_write(cx, &[0; PIPE]).is_ready() {}
                Poll::Ready(())
            })
            .await;
            quiet = if near.length == before { quiet + 1 } else { 0 };
            tokio::task::yield_now().await;
        }
        near.length
    }

    #[tokio::test]
    async fn what_is_taken_in_is_bounded_and_comes_in_order() {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let (near, mut far) = tokio::io::duplex(PIPE);
        let mut near = ReadsAhead::counted(near, &COUNT);
        let sent: Vec<u8> = (0..2 * MOST).map(|at| (at % 251) as u8).collect();
        let expected = sent.clone();
        let sending = tokio::spawn(async move { far.write_all(&sent).await.unwrap() });
        let ahead = blocked(&mut near).await;
        assert!((MOST..MOST + CHUNK).contains(&ahead), "{ahead} bytes");
        assert_eq!(COUNT.load(Ordering::Relaxed), ahead);
        let mut came = Vec::new();
        near.read_to_end(&mut came).await.unwrap();
        assert!(came == expected, "{} bytes", came.len());
        assert_eq!(COUNT.load(Ordering::Relaxed), 0);
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn the_end_comes_behind_what_was_taken_in() {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let (near, mut far) = tokio::io::duplex(PIPE);
        let mut near = ReadsAhead::counted(near, &COUNT);
        far.write_all(b"last words").await.unwrap();
        far.shutdown().await.unwrap();
        assert_eq!(blocked(&mut near).await, 10);
        let mut came = String::new();
        near.read_to_string(&mut came).await.unwrap();
        assert_eq!(came, "last words");
        assert_eq!(near.read(&mut [0; 10]).await.unwrap(), 0, "for ever after");
    }

    #[tokio::test]
    async fn all_connections_together_are_bounded_too() {
        static COUNT: AtomicUsize = AtomicUsize::new(MOST_OF_ALL - 5);
        let (near, mut far) = tokio::io::duplex(PIPE);
        let mut near = ReadsAhead::counted(near, &COUNT);
        far.write_all(b"one piece").await.unwrap();
        assert_eq!(blocked(&mut near).await, 9);
        far.write_all(b"another").await.unwrap();
        assert_eq!(blocked(&mut near).await, 9);
        drop(near);
        assert_eq!(COUNT.load(Ordering::Relaxed), MOST_OF_ALL - 5);
    }
}
