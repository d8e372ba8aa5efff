//! The client's side: what apps are asked and answer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::response;
use parking_lot::Mutex;

use super::*;

/// A connection to an app, and where it comes back to.
fn client(stream: TcpStream) -> (Client, Home, Arc<Mutex<Vec<Client>>>) {
    let back = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&back);
    let home: Home = Arc::new(move |client| kept.lock().push(client));
    (Client::new(stream), home, back)
}

fn get(path: &str) -> Request<Body> {
    Request::builder()
        .uri(path)
        .header("host", "a")
        .body(Body::empty())
        .unwrap()
}

fn post(body: Body) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri("/")
        .header("host", "a")
        .body(body)
        .unwrap()
}

#[tokio::test]
async fn a_connection_carries_one_request_after_the_other() {
    let (mut app, stream) = pair().await;
    let (mut client, home, back) = client(stream);
    for (path, answer, body) in [
        (
            "/1",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
            "abc",
        ),
        (
            "/2",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n",
            "abcd",
        ),
        ("/3", "HTTP/1.1 204 No Content\r\n\r\n", ""),
        (
            "/4",
            "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
            "",
        ),
    ] {
        let app = async {
            let head = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
            read_exactly(&mut app, &head).await;
            for part in answer.as_bytes().chunks(7) {
                app.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (response, ()) =
            tokio::join!(client.send(get(path).into(), Some(Arc::clone(&home))), app);
        let response = response.unwrap();
        assert!(response.extensions().get::<HeaderCase>().is_some());
        let heard = collect(response.into_body()).await.unwrap().0;
        assert_eq!(heard, body.as_bytes());
        client = back.lock().pop().expect("the connection is back");
        assert!(client.is_idle());
    }
    drop(app);
    tokio::task::yield_now().await;
    std::future::poll_fn(|cx| client.poll_closed(cx)).await;
    assert!(!client.is_idle());
}

#[tokio::test]
async fn connections_that_cannot_be_used_again_do_not_come_back() {
    for (answer, body) in [
        ("HTTP/1.1 200 OK\r\n\r\nabc", Some("abc")),
        (
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
            Some("abc"),
        ),
        (
            "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
            Some("abc"),
        ),
        // Bytes that nobody asked for: the answer to the next request, of this one's making.
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n",
            Some("abc"),
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", None),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            None,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcX",
            None,
        ),
    ] {
        let (mut app, stream) = pair().await;
        let (client, home, back) = client(stream);
        let app = async {
            read_exactly(&mut app, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            app.write_all(answer.as_bytes()).await.unwrap();
            app.shutdown().await.unwrap();
        };
        let (response, ()) = tokio::join!(client.send(get("/").into(), Some(home)), app);
        let heard = collect(response.unwrap().into_body()).await;
        match body {
            Some(body) => assert_eq!(heard.unwrap().0, body.as_bytes()),
            None => assert!(heard.unwrap_err().is_peer_fault(), "{answer}"),
        }
        assert!(back.lock().is_empty(), "{answer}");
    }
}

#[tokio::test]
async fn requests_are_written_as_they_came() {
    let case = HeaderCase::decode(&HeaderValue::from_static("l,X-ID")).unwrap();
    let with = |mut request: Request<Body>, case: &HeaderCase| {
        request.extensions_mut().insert(case.clone());
        request
    };
    let plain = HeaderCase::default();
    let mut absolute = get("http://b:81/x?y");
    absolute.extensions_mut().insert(AbsoluteForm);
    let mut old = get("/");
    *old.version_mut() = Version::HTTP_10;
    let from_http2 = Request::builder()
        .version(Version::HTTP_2)
        .uri("https://u@b:81/x?y")
        .header("te", "trailers")
        .header("x-id", "1")
        .body(Body::empty())
        .unwrap();
    let mut lying = post(Body::full("abc"));
    lying.headers_mut().extend(map(&[
        ("content-length", "9"),
        ("transfer-encoding", "x"),
        ("connection", "y"),
    ]));
    let announced = |length: &str, body| {
        let mut request = post(body);
        let length = length.parse().unwrap();
        request.headers_mut().insert("content-length", length);
        request
    };
    for (request, expected) in [
        (
            with(from_http2, &case),
            "GET /x?y HTTP/1.1\r\nhost: b:81\r\nte: trailers\r\nX-ID: 1\r\nconnection: TE\r\n\r\n",
        ),
        (absolute, "GET http://b:81/x?y HTTP/1.1\r\nHost: a\r\n\r\n"),
        (
            old,
            "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
        ),
        (
            with(lying, &plain),
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        ),
        (
            post(Body::empty()),
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            post(streamed(&[b"ab", b"c"], Some(map(&[("x-sum", "1")])))),
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\nX-Sum: 1\r\n\r\n",
        ),
        (
            announced("3", streamed(&[b"ab", b"c"], None)),
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        ),
        (
            Request::builder()
                .method("OPTIONS")
                .uri("*")
                .body(Body::empty())
                .unwrap(),
            "OPTIONS * HTTP/1.1\r\nHost: \r\n\r\n",
        ),
    ] {
        let (mut app, stream) = pair().await;
        let (client, home, _back) = client(stream);
        let app = async {
            read_exactly(&mut app, expected).await;
            app.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
                .await
                .unwrap();
        };
        let (response, ()) = tokio::join!(client.send(request.into(), Some(home)), app);
        assert_eq!(response.unwrap().status(), 204);
    }
}

#[tokio::test]
async fn a_kept_connection_that_closes_gives_the_request_back() {
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let app_answers = async {
        read_exactly(&mut app, "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
    };
    let (response, ()) = tokio::join!(client.send(get("/1").into(), Some(home)), app_answers);
    response.unwrap();
    let client = back.lock().pop().unwrap();
    drop(app);
    let request = post(Body::full("abc"));
    let failed = client.send(request.into(), None).await.unwrap_err();
    assert!(failed.reused && !failed.answered);
    assert!(matches!(failed.error, SendError::Closed | SendError::Io(_)));
    let again = failed.request.unwrap();
    assert_eq!(again.head.method, Method::POST);
    assert_eq!(collect(again.body).await.unwrap().0, b"abc");
}

#[tokio::test]
async fn what_is_no_answer_is_refused() {
    for answer in [
        "SSH-2.0-OpenSSH\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        &"HTTP/1.1 103 Early Hints\r\n\r\n".repeat(40),
        &format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(101)),
        &format!("HTTP/1.1 200 OK\r\nX: {}\r\n", "y".repeat(70_000)),
    ] {
        let (mut app, stream) = pair().await;
        let (client, home, back) = client(stream);
        app.write_all(answer.as_bytes()).await.unwrap();
        let failed = client.send(get("/").into(), Some(home)).await.unwrap_err();
        assert!(matches!(failed.error, SendError::Refused(_)), "{answer}");
        assert!(failed.answered && failed.request.is_none());
        assert!(back.lock().is_empty());
    }
    // Nothing at all, or half a head.
    for (answer, answered) in [("", false), ("HTTP/1.1 200 OK\r\n", true)] {
        let (mut app, stream) = pair().await;
        let (client, home, _back) = client(stream);
        let app = async {
            read_exactly(&mut app, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            app.write_all(answer.as_bytes()).await.unwrap();
            drop(app);
        };
        let (failed, ()) = tokio::join!(client.send(get("/").into(), Some(home)), app);
        let failed = failed.unwrap_err();
        assert!(matches!(failed.error, SendError::Closed));
        assert_eq!((failed.answered, failed.reused), (answered, false));
        assert_eq!(failed.request.is_some(), !answered);
    }
}

/// A body that is fed by the test.
fn fed() -> (tokio::sync::mpsc::Sender<&'static [u8]>, Body) {
    let (feed, fed) = tokio::sync::mpsc::channel::<&'static [u8]>(1);
    let frames = futures::stream::unfold(fed, |mut fed| async {
        let bytes = fed.recv().await?;
        let frame = http_body::Frame::data(Bytes::from_static(bytes));
        Some((Ok(frame), fed))
    });
    let body = http_body_util::StreamBody::new(frames);
    (feed, Body::boxed(body))
}

#[tokio::test]
async fn request_and_answer_stream_at_the_same_time() {
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let (feed, body) = fed();
    let app_begins = async {
        read_exactly(
            &mut app,
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        .await;
        app.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await
            .unwrap();
    };
    let (response, ()) = tokio::join!(client.send(post(body).into(), Some(home)), app_begins);
    let mut answer = response.unwrap().into_body();
    // The answer has begun; the request goes on without it being read.
    feed.send(b"one").await.unwrap();
    read_exactly(&mut app, "3\r\none\r\n").await;
    app.write_all(b"3\r\nONE\r\n").await.unwrap();
    let frame = answer.frame().await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "ONE");
    feed.send(b"two").await.unwrap();
    drop(feed);
    read_exactly(&mut app, "3\r\ntwo\r\n0\r\n\r\n").await;
    tokio::task::yield_now().await;
    app.write_all(b"0\r\n\r\n").await.unwrap();
    assert!(answer.frame().await.is_none());
    assert_eq!(back.lock().len(), 1, "both have ended");
}

#[tokio::test]
async fn an_answer_that_is_dropped_ends_the_request() {
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let (feed, body) = fed();
    app.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        .await
        .unwrap();
    let response = client.send(post(body).into(), Some(home)).await.unwrap();
    drop(response);
    feed.closed().await;
    let mut heard = Vec::new();
    let ended = app.read_to_end(&mut heard).await;
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert!(back.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_answer_before_the_end_of_the_request_bounds_what_follows() {
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let (feed, body) = fed();
    app.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        .await
        .unwrap();
    let response = client.send(post(body).into(), Some(home)).await.unwrap();
    assert_eq!(collect(response.into_body()).await.unwrap().0, b"no");
    assert!(back.lock().is_empty());
    let before = tokio::time::Instant::now();
    feed.closed().await;
    assert_eq!(before.elapsed().as_secs(), 10);
    drop(app);
}

#[tokio::test]
async fn a_request_whose_body_fails_is_not_taken_for_whole() {
    let (mut app, stream) = pair().await;
    let (client, home, _back) = client(stream);
    let frames = [
        Ok(http_body::Frame::data(Bytes::from_static(b"half"))),
        Err(BodyError::Truncated),
    ];
    let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
    let failed = client
        .send(post(Body::boxed(body)).into(), Some(home))
        .await
        .unwrap_err();
    assert!(matches!(
        failed.error,
        SendError::Body(BodyError::Truncated)
    ));
    let mut heard = Vec::new();
    let ended = app.read_to_end(&mut heard).await;
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// Sends to an app that does not answer, and gives up when the app has something to read. How the app finds the end,
/// and how long the kernel would have gone on.
async fn given_up(request: Request<Body>) -> (io::Result<usize>, Option<Duration>) {
    let (mut app, stream) = pair().await;
    let socket = socket2::SockRef::from(&stream).try_clone().unwrap();
    let (client, home, _back) = client(stream);
    let mut sending = Box::pin(client.send(request.into(), Some(home)));
    tokio::select! {
        _ = &mut sending => unreachable!("nobody answers"),
        readable = app.readable() => readable.unwrap(),
    }
    assert!(futures::poll!(&mut sending).is_pending());
    drop(sending);
    let patience = socket.tcp_user_timeout().unwrap();
    drop(socket);
    (app.read_to_end(&mut Vec::new()).await, patience)
}

#[tokio::test]
async fn a_request_that_is_given_up_is_cut_off_unless_it_is_out_whole() {
    let (feed, endless) = fed();
    feed.send(b"some").await.unwrap();
    let (feed, asked_for) = fed();
    feed.send(b"some").await.unwrap();
    let mut expecting = post(asked_for);
    let expect = HeaderValue::from_static("100-continue");
    expecting.headers_mut().insert("expect", expect);
    for (what, request) in [
        ("large", post(Body::full(vec![b'x'; 64 << 20]))),
        ("endless", post(endless)),
        ("held back", expecting),
    ] {
        let (heard, _) = given_up(request).await;
        let error = heard.expect_err(what);
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{what}");
    }
    let (heard, patience) = given_up(post(Body::full(&b"all there is"[..]))).await;
    assert!(heard.unwrap() > 12, "the app may act on what it has");
    assert_eq!(patience, Some(Duration::from_secs(30)));
}

#[tokio::test]
async fn an_app_that_answers_and_closes_without_reading_is_heard() {
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let app = async {
        let mut some = [0; 100];
        assert!(app.read(&mut some).await.unwrap() > 0);
        app.write_all(
            b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno",
        )
        .await
        .unwrap();
        // Reads on as a server that closes properly does, without taking more than it has to.
        app.shutdown().await.unwrap();
        tokio::io::copy(&mut app, &mut tokio::io::sink())
            .await
            .unwrap();
    };
    let request = post(Body::full(vec![b'x'; 8 << 20]));
    let sending = async {
        let response = client.send(request.into(), Some(home)).await.unwrap();
        assert_eq!(response.status(), 413);
        assert_eq!(collect(response.into_body()).await.unwrap().0, b"no");
    };
    tokio::join!(sending, app);
    assert!(back.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_app_that_does_not_read_is_given_up() {
    let (app, socket) = pair().await;
    let (client, home, idle) = client(socket);
    let sent = client
        .send(post(Body::full(vec![0; 64 << 20])).into(), Some(home))
        .await;
    assert!(matches!(sent.unwrap_err().error, SendError::Closed));
    assert!(idle.lock().is_empty());
    drop(app);
}

fn expecting(body: Body, heard: &Arc<Mutex<Vec<response::Parts>>>) -> Request<Body> {
    let mut request = post(body);
    request
        .headers_mut()
        .insert("expect", HeaderValue::from_static("100-continue"));
    let heard = Arc::clone(heard);
    request
        .extensions_mut()
        .insert(OnInterim(Arc::new(move |parts| heard.lock().push(parts))));
    request
}

const EXPECTING: &str =
    "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test]
async fn a_body_waits_for_the_app_to_ask() {
    let heard = Arc::default();
    let asked = Arc::new(AtomicUsize::new(0));
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let count = Arc::clone(&asked);
    let frames = futures::stream::once(async move {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(http_body::Frame::data(Bytes::from_static(b"abc")))
    });
    let body = Body::boxed(http_body_util::StreamBody::new(Box::pin(frames)));
    let app = async {
        read_exactly(&mut app, EXPECTING).await;
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        app.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            .await
            .unwrap();
        read_exactly(&mut app, "3\r\nabc\r\n0\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
    };
    let (response, ()) = tokio::join!(client.send(expecting(body, &heard).into(), Some(home)), app);
    assert_eq!(response.unwrap().status(), 204);
    let statuses: Vec<_> = heard.lock().iter().map(|parts| parts.status).collect();
    assert_eq!(statuses, [StatusCode::EARLY_HINTS, StatusCode::CONTINUE]);
    assert_eq!(back.lock().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_body_is_sent_to_an_app_that_knows_no_100() {
    let heard = Arc::default();
    let (mut app, stream) = pair().await;
    let (client, home, _back) = client(stream);
    let before = tokio::time::Instant::now();
    let app = async {
        read_exactly(&mut app, EXPECTING).await;
        read_exactly(&mut app, "3\r\nabc\r\n0\r\n\r\n").await;
        app.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
    };
    let request = expecting(streamed(&[b"abc"], None), &heard);
    let (response, ()) = tokio::join!(client.send(request.into(), Some(home)), app);
    assert_eq!(response.unwrap().status(), 204);
    assert_eq!(before.elapsed(), Duration::from_secs(1));
}

#[tokio::test]
async fn a_body_that_the_app_does_not_want_is_not_sent() {
    let heard = Arc::default();
    let (mut app, stream) = pair().await;
    let (client, home, back) = client(stream);
    let app_refuses = async {
        read_exactly(&mut app, EXPECTING).await;
        app.write_all(b"HTTP/1.1 417 No\r\nContent-Length: 2\r\n\r\n")
            .await
            .unwrap();
    };
    let request = expecting(streamed(&[b"abc"], None), &heard);
    let (response, ()) = tokio::join!(client.send(request.into(), Some(home)), app_refuses);
    let body = response.unwrap().into_body();
    // The connection stays whole until the answer is.
    for _ in 0..5 {
        tokio::task::yield_now().await;
    }
    app.write_all(b"no").await.unwrap();
    assert_eq!(collect(body).await.unwrap().0, b"no");
    assert!(back.lock().is_empty());
    assert_eq!(read_to_end(&mut app).await, "");
}

#[tokio::test]
async fn an_upgrade_and_a_connect_give_the_connection_away() {
    let mut upgrade = get("/");
    upgrade
        .headers_mut()
        .insert("upgrade", HeaderValue::from_static("echo"));
    let connect = Request::builder()
        .method(Method::CONNECT)
        .uri("b:1")
        .body(Body::empty())
        .unwrap();
    for (request, expected, answer) in [
        (
            upgrade,
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\nahead",
        ),
        (
            connect,
            "CONNECT b:1 HTTP/1.1\r\nHost: b:1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nahead",
        ),
    ] {
        let (mut app, stream) = pair().await;
        let (client, home, back) = client(stream);
        let app_answers = async {
            read_exactly(&mut app, expected).await;
            app.write_all(answer.as_bytes()).await.unwrap();
        };
        let (response, ()) = tokio::join!(client.send(request.into(), Some(home)), app_answers);
        let response = response.unwrap();
        let upgraded = response.extensions().get::<Upgraded>().unwrap();
        let mut raw = upgraded.take().unwrap();
        assert!(upgraded.take().is_none());
        if raw.ahead.is_empty() {
            read_exactly(&mut raw.stream, "ahead").await;
        } else {
            assert_eq!(raw.ahead, "ahead");
        }
        raw.stream.write_all(b"raw").await.unwrap();
        read_exactly(&mut app, "raw").await;
        assert!(back.lock().is_empty());
    }
}
