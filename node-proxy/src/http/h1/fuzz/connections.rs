//! Whole connections, over real sockets: the same exchanges however the bytes are cut, and those that the second reader
//! finds in them. Where one ends and the next begins is what request smuggling is about.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use super::strict::{self, Length};
use crate::fuzz::{Input, segments};
use crate::http::body::Body;
use crate::http::h1::{Client, Limits, Reuse, SendError, Server};

/// What a request or response was taken for.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    /// Method and target, or status.
    what: String,
    /// `Err`: it did not end.
    body: Result<(Vec<u8>, Option<HeaderMap>), ()>,
}

pub(crate) fn server(bytes: &[u8]) {
    let mut input = Input(bytes);
    let cuts = input.cuts();
    let bytes = input.0;
    let (requests, end, answers) = serve(bytes, &[]);
    let cut = serve(bytes, &cuts);
    assert_eq!((&requests, end), (&cut.0, cut.1));

    let mut rest = bytes;
    for request in &requests {
        while let Some(after) = rest.strip_prefix(b"\r\n") {
            rest = after;
        }
        let end = after_head(rest).expect("a request, and no head to the second reader");
        let head = strict::head(&rest[..end], false)
            .expect("a request, and malformed to the second reader");
        let [method, target, version] = head.start;
        let what = [method, target].map(String::from_utf8_lossy).join(" ");
        assert_eq!(request.what, what);
        let minor = u8::from(version == b"HTTP/1.1");
        let length = head
            .length(minor)
            .expect("a request, and ambiguous to the second reader");
        rest = &rest[end..];
        let Ok((data, trailers)) = &request.body else {
            break;
        };
        rest = &rest[same_body(rest, length, data, trailers.as_ref(), Length::Bytes(0))..];
    }

    // Each is answered once, with what it brought; what is refused is answered too.
    let mut answers = &answers[..];
    for request in &requests {
        let Ok((data, _)) = &request.body else { return };
        let end = after_head(answers).expect("an answer");
        let head = strict::head(&answers[..end], false).expect("a strict answer");
        answers = &answers[end..];
        if request.what.starts_with("HEAD ") {
            continue;
        }
        assert_eq!(head.length(1), Some(Length::Bytes(data.len() as u64)));
        answers = answers.strip_prefix(&data[..]).expect("what was sent");
    }
    if let Some(status) = end {
        let end = after_head(answers).expect("an answer to what is refused");
        let head = strict::head(&answers[..end], false).expect("a strict answer");
        assert_eq!(head.start[1], status.as_str().as_bytes());
        answers = &answers[end..];
    }
    assert!(answers.is_empty(), "{}", answers.escape_ascii());
}

/// The requests of a connection, what its end was refused with, and the answers.
fn serve(bytes: &[u8], cuts: &[usize]) -> (Vec<Message>, Option<StatusCode>, Vec<u8>) {
    over(bytes, cuts, async |socket| {
        let mut server = Server::new(socket, Bytes::new(), Limits::default());
        let mut requests = Vec::new();
        loop {
            match server.next().await {
                Ok(Some(request)) => {
                    let what = format!("{} {}", request.method(), target(&request));
                    let (body, echo) = match read(request.into_body()).await {
                        Ok((data, trailers)) => (Ok((data.clone(), trailers)), data),
                        Err(()) => (Err(()), Vec::new()),
                    };
                    requests.push(Message { what, body });
                    let mut response = Response::new(Body::full(echo));
                    // A tunnel would be another protocol.
                    *response.status_mut() = StatusCode::FORBIDDEN;
                    match server.respond(response).await {
                        Ok(Reuse::Yes) => {}
                        Ok(Reuse::No) => {
                            server.close().await;
                            return (requests, None);
                        }
                        Ok(Reuse::Raw) => panic!("nothing was upgraded"),
                        Err(_) => return (requests, None),
                    }
                }
                Ok(None) => return (requests, None),
                Err(error) => {
                    let status = error.status();
                    if let Some(status) = status {
                        let mut response = Response::new(Body::empty());
                        *response.status_mut() = status;
                        let _ = server.respond(response).await;
                        server.close().await;
                    }
                    return (requests, status);
                }
            }
        }
    })
    .flat()
}

/// As it was written: what an absolute target becomes is the codec's to know.
fn target(request: &Request<Body>) -> String {
    let uri = request.uri();
    if uri.scheme().is_some() || *request.method() == Method::CONNECT {
        return uri.to_string();
    }
    uri.path_and_query()
        .map(ToString::to_string)
        .unwrap_or_default()
}

pub(crate) fn client(bytes: &[u8]) {
    let mut input = Input(bytes);
    let method = if input.byte() % 4 == 0 {
        Method::HEAD
    } else {
        Method::GET
    };
    let cuts = input.cuts();
    let bytes = input.0;
    let (answer, home) = ask(&method, bytes, &[]);
    let (cut, _) = ask(&method, bytes, &cuts);
    assert_eq!(answer, cut);
    let Ok(answer) = answer else { return };
    if answer.what == "101" {
        return;
    }
    let mut rest = bytes;
    let (minor, length) = loop {
        let end = after_head(rest).expect("an answer, and no head to the second reader");
        let head = strict::head(&rest[..end], true)
            .expect("an answer, and malformed to the second reader");
        rest = &rest[end..];
        let [version, status, _] = head.start;
        if status.first() == Some(&b'1') {
            continue;
        }
        assert_eq!(answer.what.as_bytes(), status);
        let bodiless = method == Method::HEAD || status == b"204" || status == b"304";
        let minor = u8::from(version == b"HTTP/1.1");
        if bodiless {
            break (minor, Length::Bytes(0));
        }
        break (
            minor,
            head.length(minor)
                .expect("an answer, and ambiguous to the second reader"),
        );
    };
    let Ok((data, trailers)) = &answer.body else {
        return;
    };
    let unsaid = Length::Unsaid;
    let used = same_body(rest, length, data, trailers.as_ref(), unsaid);
    // A connection with something left on it answers the next request with it.
    assert!(!home || (used == rest.len() && length != Length::Unsaid && minor <= 1));
}

/// What the answer was taken for, and whether the connection is kept for the next request.
fn ask(method: &Method, bytes: &[u8], cuts: &[usize]) -> (Result<Message, &'static str>, bool) {
    let kept = Arc::new(AtomicBool::new(false));
    let home = {
        let kept = Arc::clone(&kept);
        Arc::new(move |mut client: Client| kept.store(client.is_idle(), Ordering::Relaxed))
    };
    let (answer, _) = over(bytes, cuts, async |socket| {
        let mut request = Request::new(Body::empty());
        *request.method_mut() = method.clone();
        let sent = Client::new(socket).send(request.into(), Some(home)).await;
        match sent {
            Ok(response) => {
                let what = response.status().as_str().to_owned();
                let body = read(response.into_body()).await;
                Ok(Message { what, body })
            }
            Err(failed) => Err(match failed.error {
                SendError::Refused(_) => "refused",
                _ => "closed",
            }),
        }
    });
    (answer, kept.load(Ordering::Relaxed))
}

/// That `data` is what the second reader finds; bytes of it. `unsaid`: what a head without a length means.
fn same_body(
    rest: &[u8],
    length: Length,
    data: &[u8],
    trailers: Option<&HeaderMap>,
    unsaid: Length,
) -> usize {
    let length = if length == Length::Unsaid {
        unsaid
    } else {
        length
    };
    match length {
        Length::Bytes(length) => {
            assert_eq!(data.len() as u64, length);
            assert_eq!(data, &rest[..data.len()]);
            data.len()
        }
        Length::Unsaid => {
            assert_eq!(data, rest);
            rest.len()
        }
        Length::Chunked => {
            let strict = strict::chunked(rest).expect("a body, and malformed to the second reader");
            assert_eq!(strict.data, data);
            for (name, value) in trailers.into_iter().flatten() {
                assert!(strict.trailers.iter().any(|(n, v)| {
                    n.eq_ignore_ascii_case(name.as_str().as_bytes()) && *v == value.as_bytes()
                }));
            }
            strict.length
        }
    }
}

fn after_head(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let end = at + bytes[at..].iter().position(|b| *b == b'\n')?;
        let line = &bytes[at..end];
        at = end + 1;
        if line.is_empty() || line == b"\r" {
            return Some(at);
        }
    }
}

async fn read(mut body: Body) -> Result<(Vec<u8>, Option<HeaderMap>), ()> {
    let (mut data, mut trailers) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.map_err(|_| ())?.into_data() {
            Ok(bytes) => data.extend_from_slice(&bytes),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((data, trailers))
}

/// Runs `near` on one end of a connection whose other end sends `bytes`, then nothing. Also what came back.
fn over<T>(bytes: &[u8], cuts: &[usize], near: impl AsyncFnOnce(TcpStream) -> T) -> (T, Vec<u8>) {
    thread_local!(static RUNTIME: Runtime = runtime());
    let (ours, theirs) = pair();
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let ours = TcpStream::from_std(ours).expect("a socket");
            let mut theirs = TcpStream::from_std(theirs).expect("a socket");
            let far = async {
                for segment in segments(bytes, cuts) {
                    if theirs.write_all(segment).await.is_err() {
                        break;
                    }
                    // Twice: the socket is seen to be readable, and is read.
                    tokio::task::yield_now().await;
                    tokio::task::yield_now().await;
                }
                // It may have been closed already.
                let _ = socket2::SockRef::from(&theirs).shutdown(Shutdown::Write);
                let mut heard = Vec::new();
                let _ = theirs.read_to_end(&mut heard).await;
                heard
            };
            tokio::join!(near(ours), far)
        })
    })
}

pub(super) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// A connected pair. The kernel makes one of unix sockets much faster, and they behave the same.
pub(super) fn pair() -> (std::net::TcpStream, std::net::TcpStream) {
    let (a, b) = UnixStream::pair().expect("a pair of sockets");
    let socket = |socket: UnixStream| {
        socket.set_nonblocking(true).expect("a socket");
        std::net::TcpStream::from(OwnedFd::from(socket))
    };
    (socket(a), socket(b))
}

trait Flat<A, B, C> {
    fn flat(self) -> (A, B, C);
}

impl<A, B, C> Flat<A, B, C> for ((A, B), C) {
    fn flat(self) -> (A, B, C) {
        let ((a, b), c) = self;
        (a, b, c)
    }
}

pub(crate) fn server_seeds() -> Vec<Vec<u8>> {
    [
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /3 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        "POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\nHEAD /h HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /e HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhiGET /n HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /s HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /0 HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /1 HTTP/1.0\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /t HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nshort",
        "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
    ]
    .iter()
    .flat_map(|text| [[&[0][..], text.as_bytes()].concat(), [&[2, 6, 1][..], text.as_bytes()].concat()])
    .collect()
}

pub(crate) fn client_seeds() -> Vec<Vec<u8>> {
    [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX: y\r\n\r\n",
        "HTTP/1.0 200 OK\n\nuntil the end",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nraw",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
    ]
    .iter()
    .flat_map(|text| [[&[0, 0][..], text.as_bytes()].concat(), [&[1, 2, 5, 0][..], text.as_bytes()].concat()])
    .collect()
}
