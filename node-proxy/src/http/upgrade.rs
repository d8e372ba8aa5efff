//! Connections that stop being HTTP: upgrades (RFC 9110, section 7.8), WebSocket among them, and CONNECT.
//!
//! At either end of a tunnel such a connection is a request whose body and whose answer's body both go on
//! for as long as it lives (RFC 8441): what the client sends is the one, what the app sends the other. So
//! back-pressure, limits and the end of either direction are those of bodies.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http_body::Frame;
use mesh_api::errors::ProxyError;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;
use tokio_util::io::poll_read_buf;

use super::apps::Holding;
use super::body::{Body, BodyError, Held, Passing};
use super::h1;
use super::watched::{Sent, still};
use crate::budget::Account;
use crate::tcp::{Ending, QuietHalf, failed, finish_writing, reset_on_close, write_some};

/// Extension of an answer after which the connection carries raw bytes.
#[derive(Clone)]
pub struct Upgraded(Arc<Mutex<Option<Open>>>);

/// A way, and what is held for as long as it is used.
struct Open {
    way: Way,
    held: Vec<Held>,
    traffic: Traffic,
}

/// What goes over an upgraded connection.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// What the client sends.
    pub up: Sent,
    /// What the app sends.
    pub down: Sent,
    /// Why the proxy has ended it.
    pub cut: Arc<OnceLock<ProxyError>>,
    /// How long neither may send nothing.
    idle: Option<Duration>,
}

impl std::fmt::Debug for Upgraded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Upgraded")
    }
}

/// How the bytes go on.
#[derive(Debug)]
enum Way {
    /// A connection of this process to the app.
    Raw(h1::Raw),
    /// A stream of a tunnel.
    Stream {
        to: oneshot::Sender<Body>,
        from: Body,
    },
}

/// Most bytes of one read.
const CHUNK: usize = 16 * 1024;

impl Upgraded {
    /// Over an open connection.
    pub fn raw(raw: h1::Raw) -> Self {
        Self::new(Way::Raw(raw))
    }

    /// Over a stream: `to` takes what the client sends, `from` is what the app sends.
    pub fn stream(to: oneshot::Sender<Body>, from: Body) -> Self {
        Self::new(Way::Stream { to, from })
    }

    fn new(way: Way) -> Self {
        let open = Open {
            way,
            held: Vec::new(),
            traffic: Traffic {
                up: Sent::timed(),
                down: Sent::timed(),
                ..Traffic::default()
            },
        };
        Self(Arc::new(Mutex::new(Some(open))))
    }

    /// What counts its bytes. `idle`: how long neither side may send nothing, if that is bounded.
    pub fn counted(&self, idle: Option<Duration>) -> Traffic {
        let mut open = self.0.lock();
        let Some(Open { traffic, .. }) = &mut *open else {
            return Traffic::default();
        };
        traffic.idle = idle.or(traffic.idle);
        traffic.clone()
    }

    /// Holds something until the connection has ended: charges, guards.
    pub fn hold(&self, held: impl Send + Sync + 'static) {
        if let Some(open) = &mut *self.0.lock() {
            open.held.push(Box::new(held));
        }
    }

    /// The open connection, if it is one, what counts its bytes, and what is to be held as long.
    pub fn into_raw(self) -> Option<(h1::Raw, Traffic, Vec<Held>)> {
        match self.0.lock().take()? {
            Open {
                way: Way::Raw(raw),
                held,
                traffic,
            } => Some((raw, traffic, held)),
            Open { .. } => None,
        }
    }

    /// Copies both ways until both have ended. `ahead`: what was read of the client already.
    /// What waits is charged to `account`.
    pub async fn relay(
        self,
        client: TcpStream,
        ahead: Bytes,
        account: &Arc<Account>,
    ) -> io::Result<()> {
        let open = self.0.lock().take();
        let Some(Open {
            way,
            held: _held,
            traffic,
        }) = open
        else {
            return Ok(());
        };
        let relaying = copy(way, traffic.clone(), client, ahead, account);
        let Some(idle) = traffic.idle else {
            return relaying.await;
        };
        let directions = [&traffic.up, &traffic.down];
        tokio::select! {
            relayed = relaying => relayed,
            () = still(idle, &directions) => {
                traffic.cut.get_or_init(|| ProxyError::IdleTimeout);
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }
}

async fn copy(
    way: Way,
    traffic: Traffic,
    client: TcpStream,
    ahead: Bytes,
    account: &Arc<Account>,
) -> io::Result<()> {
    let Traffic {
        mut up, mut down, ..
    } = traffic;
    let (read, write) = client.into_split();
    match way {
        Way::Raw(raw) => {
            let sent = Body::boxed(Incoming::new(read, None)).after(ahead);
            let sent = up.count(sent);
            let (from_app, to_app) = raw.stream.into_split();
            let received = Body::boxed(Incoming::new(from_app, raw.holding));
            let received = down.count(received.after(raw.ahead));
            let account = Some(account);
            let up = write_body(sent, to_app, account);
            tokio::try_join!(up, write_body(received, write, account)).map(|_| ())
        }
        Way::Stream { to, from } => {
            let (held, ended) = oneshot::channel();
            let sent = Body::boxed(Incoming {
                from: read,
                _holding: None,
                _held: Some(held),
            });
            let sent = up.count(sent.after(ahead));
            if to.send(sent).is_err() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            write_body(down.count(from), write, Some(account)).await?;
            // The client's own direction is sent elsewhere; the connection is not over before it is. Nothing
            // is ever said: the sender is dropped.
            let _dropped = ended.await;
            Ok(())
        }
    }
}

/// The app's connection as the two bodies of a stream: what it sends, and the work of writing what comes.
pub fn split(
    raw: h1::Raw,
    traffic: Traffic,
    incoming: Body,
) -> (Body, impl Future<Output = io::Result<()>>) {
    let Traffic {
        mut up, mut down, ..
    } = traffic;
    let incoming = up.count(incoming);
    let (read, write) = raw.stream.into_split();
    let account = raw
        .holding
        .as_ref()
        .map(|holding| Arc::clone(holding.account()));
    let outgoing = Body::boxed(Incoming::new(read, raw.holding)).after(raw.ahead);
    let outgoing = down.count(outgoing);
    let writing = async move { write_body(incoming, write, account.as_ref()).await };
    (outgoing, writing)
}

/// A body that is known later. Ends, cut short, if it never is.
pub fn deferred() -> (oneshot::Sender<Body>, Body) {
    let (known, body) = oneshot::channel();
    (known, Body::passing(Deferred::Waiting(body)))
}

async fn write_body(
    mut body: Body,
    to: OwnedWriteHalf,
    account: Option<&Arc<Account>>,
) -> io::Result<()> {
    let to = Ending::new(QuietHalf::new(to), reset_on_close);
    loop {
        let frame = tokio::select! {
            biased;
            frame = body.frame() => frame,
            // The other direction may not read just now.
            error = failed(to.as_ref()) => return Err(error),
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(io::Error::other)?;
        let Ok(mut data) = frame.into_data() else {
            continue;
        };
        loop {
            data.advance(write_some(to.as_ref(), &data)?);
            if data.is_empty() {
                break;
            }
            let held = body.hold(account, data.len(), to.as_ref().writable()).await;
            held.map_err(io::Error::other)??;
        }
    }
    finish_writing(to.as_ref())?;
    to.finished();
    Ok(())
}

/// What a socket brings.
struct Incoming {
    from: OwnedReadHalf,
    _holding: Option<Holding>,
    /// Whoever waits for the end of this.
    _held: Option<oneshot::Sender<()>>,
}

impl Incoming {
    fn new(from: OwnedReadHalf, holding: Option<Holding>) -> Self {
        Self {
            from,
            _holding: holding,
            _held: None,
        }
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        // Asked for before there is memory to read into: an idle connection holds none.
        ready!(this.from.as_ref().poll_read_ready(cx)).map_err(BodyError::Io)?;
        let mut chunk = BytesMut::with_capacity(CHUNK);
        match ready!(poll_read_buf(Pin::new(&mut this.from), cx, &mut chunk)) {
            Ok(0) => Poll::Ready(None),
            Ok(_) => Poll::Ready(Some(Ok(Frame::data(chunk.freeze())))),
            Err(error) => Poll::Ready(Some(Err(BodyError::Io(error)))),
        }
    }
}

enum Deferred {
    Waiting(oneshot::Receiver<Body>),
    Known(Body),
}

impl Passing for Deferred {
    fn poll_absorb(&mut self, cx: &mut Context<'_>, account: &Arc<Account>) -> Poll<()> {
        match self {
            Self::Known(body) => body.poll_absorb(cx, account),
            Self::Waiting(_) => Poll::Pending,
        }
    }
}

impl http_body::Body for Deferred {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            match &mut *self {
                Self::Known(body) => return Pin::new(body).poll_frame(cx),
                Self::Waiting(body) => match ready!(Pin::new(body).poll(cx)) {
                    Ok(body) => *self = Self::Known(body),
                    Err(_never) => return Poll::Ready(Some(Err(BodyError::Truncated))),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::budget::Limits;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, server) = tokio::join!(client, listener.accept());
        (client.unwrap(), server.unwrap().0)
    }

    #[tokio::test]
    async fn what_is_held_is_held_until_both_directions_have_ended() {
        let (mut client, served) = pair().await;
        let (proxy, mut app) = pair().await;
        let upgraded = Upgraded::raw(h1::Raw {
            stream: proxy,
            ahead: Bytes::from_static(b"hello"),
            holding: None,
        });
        let guard = Arc::new(());
        upgraded.hold(Arc::clone(&guard));
        let relaying = tokio::spawn(async move {
            let account = Account::new("demo".into(), "web".into(), &Limits::default());
            let ahead = Bytes::from_static(b"early");
            upgraded.relay(served, ahead, &account).await
        });
        let mut said = [0; 5];
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
        app.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"early");
        client.shutdown().await.unwrap();
        assert_eq!(app.read(&mut said).await.unwrap(), 0);
        assert_eq!(Arc::strong_count(&guard), 2, "the app may still speak");
        app.shutdown().await.unwrap();
        relaying.await.unwrap().unwrap();
        assert_eq!(Arc::strong_count(&guard), 1);
    }

    fn upgraded(app: TcpStream) -> (Upgraded, Arc<Account>) {
        let upgraded = Upgraded::raw(h1::Raw {
            stream: app,
            ahead: Bytes::new(),
            holding: None,
        });
        let account = Account::new("demo".into(), "web".into(), &Limits::default());
        (upgraded, account)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_nothing_moves_is_ended() {
        let ((_client, served), (proxy, _app)) = (pair().await, pair().await);
        let (upgraded, account) = upgraded(proxy);
        let traffic = upgraded.counted(Some(Duration::from_secs(60)));
        let relayed = upgraded.relay(served, Bytes::new(), &account).await;
        assert_eq!(relayed.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(traffic.cut.get(), Some(&ProxyError::IdleTimeout));
    }

    #[tokio::test]
    async fn a_reset_reaches_an_app_that_reads() {
        let (client, served) = pair().await;
        let (proxy, mut app) = pair().await;
        let (upgraded, account) = upgraded(proxy);
        let reading = tokio::spawn(async move { app.read_to_end(&mut Vec::new()).await });
        crate::tcp::reset_on_close(&client);
        drop(client);
        let relayed = upgraded.relay(served, Bytes::new(), &account).await;
        relayed.unwrap_err();
        let heard = reading.await.unwrap();
        assert_eq!(heard.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_reset_is_noticed_while_the_app_takes_nothing() {
        let (client, served) = pair().await;
        let (proxy, mut app) = pair().await;
        let (upgraded, account) = upgraded(proxy);
        let leaving = async {
            crate::tcp::tests::fill(&client).await;
            crate::tcp::reset_on_close(&client);
            drop(client);
        };
        let relaying = upgraded.relay(served, Bytes::new(), &account);
        let (ended, ()) = tokio::join!(relaying, leaving);
        ended.unwrap_err();
        let heard = app.read_to_end(&mut Vec::new()).await;
        assert_eq!(heard.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
