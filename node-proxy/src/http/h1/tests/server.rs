//! The server's side: what clients send and are answered.

use std::time::Duration;

use futures::poll;

use super::*;

fn serve(socket: TcpStream) -> Server {
    Server::new(socket, Bytes::new(), Limits::default())
}

fn ok(body: impl Into<Bytes>) -> Response<Body> {
    Response::new(Body::full(body))
}

async fn next(server: &mut Server) -> Request<Body> {
    server.next().await.unwrap().expect("a request")
}

#[tokio::test]
async fn requests_are_answered_one_after_the_other_also_when_sent_ahead() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(
            b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /3 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
        .await
        .unwrap();
    let request = next(&mut server).await;
    assert_eq!(request.uri(), "/1");
    assert_eq!(server.respond(ok("one")).await.unwrap(), Reuse::Yes);
    let request = next(&mut server).await;
    assert_eq!(
        (request.uri().path(), request.method()),
        ("/2", &Method::POST)
    );
    assert_eq!(collect(request.into_body()).await.unwrap().0, b"abc");
    assert_eq!(server.respond(ok("")).await.unwrap(), Reuse::Yes);
    assert_eq!(next(&mut server).await.uri(), "/3");
    assert_eq!(server.respond(ok("end")).await.unwrap(), Reuse::No);
    drop(server);
    assert_eq!(
        read_to_end(&mut client).await,
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none\
         HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n\
         HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nend"
    );
}

#[tokio::test]
async fn the_end_between_requests_is_no_error_and_within_a_head_it_is() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client.write_all(b"\r\n").await.unwrap();
    drop(client);
    assert!(server.next().await.unwrap().is_none());
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client.write_all(b"GET / HT").await.unwrap();
    client.shutdown().await.unwrap();
    assert!(matches!(server.next().await, Err(Error::Io(_))));
}

const CHUNKED: &str = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
     5\r\nhello\r\n6 ; x=\"y\"\r\n world\r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\nx-sum: 2\r\n\r\n";

#[tokio::test]
async fn trailers_that_http2_does_not_carry_are_dropped() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\
              Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nConnection: close\r\n\
              Transfer-Encoding: chunked\r\nUpgrade: x\r\nTE: gzip\r\nX-Sum: 1\r\n\r\n",
        )
        .await
        .unwrap();
    let request = next(&mut server).await;
    let (data, trailers) = collect(request.into_body()).await.unwrap();
    assert_eq!(data, b"hi");
    assert_eq!(trailers.unwrap(), map(&[("x-sum", "1")]));
}

#[tokio::test]
async fn a_chunked_body_is_the_same_wherever_it_is_cut() {
    for cut in 1..CHUNKED.len() {
        let (mut client, socket) = pair().await;
        let mut server = serve(socket);
        let (first, second) = CHUNKED.as_bytes().split_at(cut);
        let writing = async {
            client.write_all(first).await.unwrap();
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            client.write_all(second).await.unwrap();
            client
                .write_all(b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
                .await
                .unwrap();
        };
        let reading = async {
            let request = next(&mut server).await;
            let (data, trailers) = collect(request.into_body()).await.unwrap();
            assert_eq!(data, b"hello world", "cut at {cut}");
            let trailers = trailers.expect("trailers");
            let sums: Vec<_> = trailers.get_all("x-sum").iter().collect();
            assert_eq!(sums, ["1", "2"]);
            assert_eq!(trailers.len(), 2, "a length is no trailer");
            server.respond(ok("")).await.unwrap();
            assert_eq!(next(&mut server).await.uri(), "/next", "cut at {cut}");
        };
        tokio::join!(writing, reading);
    }
}

#[tokio::test]
async fn malformed_chunks_fail_the_body_and_the_connection() {
    let many = format!("1;{}\r\na\r\n", "x".repeat(200)).repeat(100);
    let trailers = format!("0\r\nX: {}\r\n\r\n", "y".repeat(20_000));
    for chunks in [
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhelloX\r\n0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "\r\nhello",
        "g\r\n",
        "+5\r\nhello\r\n",
        "-1\r\n",
        "0x5\r\nhello\r\n",
        " 5\r\nhello\r\n",
        "5 \r\nhello\r\n",
        "5\t\r\nhello\r\n",
        "5 5\r\nhello\r\n",
        "5;a\u{0}\r\nhello\r\n",
        "5;a\rb\r\nhello\r\n",
        "00000000000000005\r\nhello\r\n",
        "fffffffffffffffff\r\n",
        "0\r\nX : a\r\n\r\n",
        "0\r\nX: a\n\r\n",
        "0\r\n X: a\r\n\r\n",
        "0\r\nX\r\n\r\n",
        &many,
        &trailers,
        &format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(300)),
    ] {
        let (mut client, socket) = pair().await;
        let mut server = serve(socket);
        client
            .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await
            .unwrap();
        let request = next(&mut server).await;
        client.write_all(chunks.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let error = collect(request.into_body()).await.unwrap_err();
        assert!(
            matches!(error, BodyError::Framing | BodyError::TooLarge),
            "{chunks:?}: {error:?}"
        );
        assert_eq!(
            server.respond(ok("")).await.unwrap(),
            Reuse::No,
            "{chunks:?}"
        );
        assert!(server.next().await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_body_that_ends_early_is_truncated() {
    for head in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let (mut client, socket) = pair().await;
        let mut server = serve(socket);
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n5\r\nhel");
        client.write_all(head.as_bytes()).await.unwrap();
        drop(client);
        let request = next(&mut server).await;
        let error = collect(request.into_body()).await.unwrap_err();
        assert!(matches!(error, BodyError::Truncated));
        assert!(error.is_peer_fault());
    }
}

#[tokio::test]
async fn a_large_body_streams_while_its_answer_goes_out() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    let block = vec![b'x'; 1 << 20];
    let talking = async {
        let head = format!(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
            block.len()
        );
        let (mut read, mut write) = client.split();
        let sending = async {
            write.write_all(head.as_bytes()).await.unwrap();
            write.write_all(&block).await.unwrap();
        };
        let mut heard = vec![0; block.len() + 60];
        let receiving = async {
            let mut length = 0;
            while !heard[..length].ends_with(b"xx") || length < block.len() + 40 {
                length += read.read(&mut heard[length..]).await.unwrap();
                if length >= block.len() + 45 {
                    break;
                }
            }
            length
        };
        tokio::join!(sending, receiving).1
    };
    let serving = async {
        let request = next(&mut server).await;
        // The echo's length is known from the request.
        server
            .respond(Response::new(request.into_body()))
            .await
            .unwrap()
    };
    let (length, reuse) = tokio::join!(talking, serving);
    assert_eq!(reuse, Reuse::Yes);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 1 << 20);
    assert_eq!(length, head.len() + (1 << 20));
}

#[tokio::test]
async fn bodies_are_framed_for_the_client_that_asked() {
    let trailers = Some(map(&[("x-sum", "7")]));
    for (request, response, expected) in [
        (
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            Response::new(streamed(&[b"ab", b"", b"cde"], trailers.clone())),
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\nX-Sum: 7\r\n\r\n",
        ),
        (
            "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            Response::new(streamed(&[b"ab", b"cde"], trailers.clone())),
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcde",
        ),
        (
            "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            ok("abc"),
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            Response::builder()
                .header("content-length", "5")
                .body(streamed(&[b"ab", b"cde"], trailers))
                .unwrap(),
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            // What the headers say cannot contradict the body.
            Response::builder()
                .header("content-length", "5")
                .header("content-length", "6")
                .header("transfer-encoding", "chunked")
                .header("connection", "keep-alive")
                .body(Body::full("abc"))
                .unwrap(),
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        ),
        (
            "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
            Response::builder()
                .header("content-length", "1000")
                .body(Body::empty())
                .unwrap(),
            "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
        ),
        (
            "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
            ok("not written"),
            "HTTP/1.1 200 OK\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            Response::builder()
                .status(304)
                .header("content-length", "1000")
                .body(Body::empty())
                .unwrap(),
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 1000\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            Response::builder()
                .status(204)
                .header("content-length", "0")
                .body(Body::empty())
                .unwrap(),
            "HTTP/1.1 204 No Content\r\n\r\n",
        ),
    ] {
        let (mut client, socket) = pair().await;
        let mut server = serve(socket);
        client.write_all(request.as_bytes()).await.unwrap();
        next(&mut server).await;
        let mut response = response;
        if expected.contains("content-length") {
            let lower = HeaderCase::decode(&HeaderValue::from_static("l")).unwrap();
            response.extensions_mut().insert(lower);
        }
        let reuse = server.respond(response).await.unwrap();
        assert_eq!(reuse == Reuse::No, expected.contains("close"), "{expected}");
        drop(server);
        assert_eq!(read_to_end(&mut client).await, expected);
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_seen_to() {
    for (version, framed) in [("1.1", true), ("1.0", false)] {
        let (mut client, socket) = pair().await;
        let mut server = serve(socket);
        let head = format!("GET / HTTP/{version}\r\nHost: a\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        next(&mut server).await;
        let frames = [
            Ok(http_body::Frame::data(Bytes::from_static(b"half"))),
            Err(BodyError::Truncated),
        ];
        let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
        let response = Response::new(Body::boxed(body));
        assert!(matches!(
            server.respond(response).await,
            Err(Error::Body(BodyError::Truncated))
        ));
        drop(server);
        let mut heard = Vec::new();
        let ended = client.read_to_end(&mut heard).await;
        if framed {
            assert!(heard.ends_with(b"4\r\nhalf\r\n"), "without a last chunk");
        } else {
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    }
    // Fewer bytes than announced.
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    next(&mut server).await;
    let response = Response::builder()
        .header("content-length", "5")
        .body(streamed(&[b"abc"], None))
        .unwrap();
    assert!(server.respond(response).await.is_err());
}

#[tokio::test]
async fn the_body_is_asked_for_once_when_it_is_wanted() {
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
    // By reading.
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client.write_all(head).await.unwrap();
    let mut body = next(&mut server).await.into_body();
    {
        let mut frame = std::pin::pin!(body.frame());
        assert!(poll!(&mut frame).is_pending());
    }
    read_exactly(&mut client, "HTTP/1.1 100 Continue\r\n\r\n").await;
    let interim = Response::builder().status(100).body(()).unwrap();
    server.interim(interim.into_parts().0).await.unwrap();
    client.write_all(b"abc").await.unwrap();
    assert_eq!(collect(body).await.unwrap().0, b"abc");
    assert_eq!(server.respond(ok("")).await.unwrap(), Reuse::Yes);
    read_exactly(&mut client, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;

    // By the app's own 100, and other interim responses beside.
    client.write_all(head).await.unwrap();
    let request = next(&mut server).await;
    for status in [103, 100] {
        let interim = Response::builder()
            .status(status)
            .header("link", "x")
            .body(())
            .unwrap();
        server.interim(interim.into_parts().0).await.unwrap();
    }
    read_exactly(
        &mut client,
        "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\nLink: x\r\n\r\n",
    )
    .await;
    client.write_all(b"abc").await.unwrap();
    assert_eq!(collect(request.into_body()).await.unwrap().0, b"abc");
    server.respond(ok("")).await.unwrap();
    read_exactly(&mut client, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;

    // Not at all: whether the body comes cannot be known, so the connection ends.
    client.write_all(head).await.unwrap();
    drop(next(&mut server).await);
    assert_eq!(server.respond(ok("")).await.unwrap(), Reuse::No);
}

#[tokio::test]
async fn what_is_unread_of_a_small_body_is_skipped_and_of_a_large_one_ends_the_connection() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        .await
        .unwrap();
    drop(next(&mut server).await);
    assert_eq!(server.respond(ok("")).await.unwrap(), Reuse::Yes);
    client.write_all(&[b'x'; 1000]).await.unwrap();
    client
        .write_all(b"POST /next HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nx")
        .await
        .unwrap();
    let request = next(&mut server).await;
    assert_eq!(request.uri(), "/next");
    drop(request);
    assert_eq!(server.respond(ok("")).await.unwrap(), Reuse::No);
}

#[tokio::test]
async fn a_closing_connection_lets_its_last_answer_through() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n")
        .await
        .unwrap();
    drop(next(&mut server).await);
    let mut response = ok("too large");
    *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
    assert_eq!(server.respond(response).await.unwrap(), Reuse::No);
    let client = async {
        client.write_all(&vec![b'x'; 200_000]).await.unwrap();
        let heard = read_to_end(&mut client).await;
        assert!(heard.ends_with("too large"), "{heard}");
        drop(client);
    };
    tokio::join!(server.close(), client);
}

#[tokio::test]
async fn names_are_spelled_as_they_came() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHOST: a\r\nx-Request-ID: 1\r\nAccept: x\r\n\r\n")
        .await
        .unwrap();
    let request = next(&mut server).await;
    let case = request.extensions().get::<HeaderCase>().unwrap();
    assert_eq!(
        case.names(request.headers()),
        ["HOST", "x-Request-ID", "Accept"]
    );
    let mut response = ok("");
    response.headers_mut().insert("etag", "1".parse().unwrap());
    response
        .extensions_mut()
        .insert(HeaderCase::decode(&HeaderValue::from_static("T,ETag")).unwrap());
    server.respond(response).await.unwrap();
    read_exactly(
        &mut client,
        "HTTP/1.1 200 OK\r\nETag: 1\r\nContent-Length: 0\r\n\r\n",
    )
    .await;
}

#[tokio::test]
async fn an_upgrade_and_a_connect_leave_raw_bytes() {
    for (request, status, expected) in [
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nahead",
            101,
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\nraw",
        ),
        (
            "CONNECT b:1 HTTP/1.1\r\nHost: b\r\n\r\nahead",
            200,
            "HTTP/1.1 200 OK\r\n\r\nraw",
        ),
    ] {
        let (mut client, socket) = pair().await;
        let mut server = serve(socket);
        client.write_all(request.as_bytes()).await.unwrap();
        let mut request = next(&mut server).await;
        let upgrade = remove_hop_by_hop(request.headers_mut());
        let mut response = Response::builder().status(status);
        if let Some(upgrade) = upgrade {
            response = response.header("upgrade", upgrade);
        }
        let response = response.body(Body::empty()).unwrap();
        assert_eq!(server.respond(response).await.unwrap(), Reuse::Raw);
        let (mut raw, ahead) = server.into_raw().unwrap();
        assert_eq!(ahead, "ahead");
        raw.write_all(b"raw").await.unwrap();
        drop(raw);
        assert_eq!(read_to_end(&mut client).await, expected);
    }
}

#[tokio::test]
async fn heads_over_the_bounds_are_refused() {
    let limits = Limits {
        head: 1000,
        headers: 5,
        ..Limits::default()
    };
    let long = "x".repeat(1000);
    for (head, status) in [
        (format!("GET /{long}"), 414),
        (format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"), 414),
        (format!("GET / HTTP/1.1\r\nX: {long}"), 431),
        (
            format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(5)),
            431,
        ),
    ] {
        let (mut client, socket) = pair().await;
        let mut server = Server::new(socket, Bytes::new(), limits.clone());
        client.write_all(head.as_bytes()).await.unwrap();
        let error = server.next().await.unwrap_err();
        assert_eq!(error.status().unwrap().as_u16(), status, "{head}");
        let mut response = ok("");
        *response.status_mut() = error.status().unwrap();
        assert_eq!(server.respond(response).await.unwrap(), Reuse::No);
        drop(server);
    }
    let (mut client, socket) = pair().await;
    let prefix = Bytes::from_static(b"GET /pre");
    let mut server = Server::new(socket, prefix, limits);
    client.write_all(b"fix HTTP/1.0\r\n\r\n").await.unwrap();
    let request = next(&mut server).await;
    assert_eq!(
        (request.uri().path(), request.version()),
        ("/prefix", Version::HTTP_10)
    );
}

#[tokio::test(start_paused = true)]
async fn slow_heads_idle_connections_and_slow_bodies_end() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let before = tokio::time::Instant::now();
    let error = server.next().await.unwrap_err();
    assert!(matches!(error, Error::Refused(Refused::SlowHead)));
    assert_eq!(before.elapsed().as_secs(), 10);

    let (client, socket) = pair().await;
    let mut server = serve(socket);
    let before = tokio::time::Instant::now();
    assert!(server.next().await.unwrap().is_none());
    assert_eq!(before.elapsed().as_secs(), 3600);
    drop(client);

    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1")
        .await
        .unwrap();
    let mut body = next(&mut server).await.into_body();
    body.frame().await.unwrap().unwrap();
    // Only the time in which somebody waits counts.
    tokio::time::advance(Duration::from_secs(1000)).await;
    let before = tokio::time::Instant::now();
    let error = body.frame().await.unwrap().unwrap_err();
    assert!(matches!(error, BodyError::Timeout));
    assert_eq!(before.elapsed().as_secs(), 300);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_given_up() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    next(&mut server).await;
    let response = ok(vec![0; 64 << 20]);
    assert!(matches!(
        server.respond(response).await,
        Err(Error::Stalled)
    ));
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed_while_it_is_served() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na")
        .await
        .unwrap();
    let request = next(&mut server).await;
    let mut gone = Box::pin(server.gone());
    assert!(poll!(&mut gone).is_pending());
    client.write_all(b"bc").await.unwrap();
    assert_eq!(collect(request.into_body()).await.unwrap().0, b"abc");
    // What was sent ahead is no end.
    client
        .write_all(b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    for _ in 0..5 {
        tokio::task::yield_now().await;
        assert!(poll!(&mut gone).is_pending());
    }
    tcp::reset_on_close(&client);
    drop(client);
    gone.await;
    // It was read ahead, and is not lost.
    assert_eq!(next(&mut server).await.uri(), "/2");
}

#[tokio::test]
async fn a_reset_is_noticed_while_nobody_reads_the_body() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\na")
        .await
        .unwrap();
    let _request = next(&mut server).await;
    let mut gone = Box::pin(server.gone());
    assert!(poll!(&mut gone).is_pending());
    tcp::reset_on_close(&client);
    drop(client);
    gone.await;
}

/// Lets the server see what has come, as while an app works on the request.
async fn look(server: &mut Server) {
    let mut gone = Box::pin(server.gone());
    for _ in 0..20 {
        assert!(poll!(&mut gone).is_pending(), "taken for gone");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_sends_nothing_more_is_answered() {
    for request in [
        "GET / HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ] {
        // With the end together with the request, and while that is worked on.
        for together in [true, false] {
            let (mut client, socket) = pair().await;
            let mut server = serve(socket);
            client.write_all(request.as_bytes()).await.unwrap();
            if together {
                client.shutdown().await.unwrap();
            }
            let body = next(&mut server).await.into_body();
            let expected: &[u8] = if request.starts_with("POST") {
                b"abc"
            } else {
                b""
            };
            assert_eq!(collect(body).await.unwrap().0, expected, "{request}");
            if !together {
                look(&mut server).await;
                client.shutdown().await.unwrap();
            }
            look(&mut server).await;
            assert_eq!(server.respond(ok("answer")).await.unwrap(), Reuse::No);
            server.close().await;
            let heard = read_to_end(&mut client).await;
            assert!(
                heard.contains("Connection: close\r\n"),
                "{request}: {heard}"
            );
            assert!(heard.ends_with("\r\n\r\nanswer"), "{request}: {heard}");
        }
    }
}

#[tokio::test]
async fn all_that_was_sent_ahead_of_the_end_is_answered() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    let batch = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\
         POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
         GET /3 HTTP/1.1\r\nHost: a\r\n\r\n";
    client.write_all(batch.as_bytes()).await.unwrap();
    client.shutdown().await.unwrap();
    for (path, reuse) in [("/1", Reuse::Yes), ("/2", Reuse::Yes), ("/3", Reuse::No)] {
        let request = next(&mut server).await;
        assert_eq!(request.uri(), path);
        collect(request.into_body()).await.unwrap();
        look(&mut server).await;
        assert_eq!(server.respond(ok("x")).await.unwrap(), reuse, "{path}");
    }
    server.close().await;
    assert_eq!(
        read_to_end(&mut client).await,
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx\
         HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx\
         HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
    );
}

#[tokio::test]
async fn a_reset_is_noticed_behind_the_end_of_what_a_client_sends() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    next(&mut server).await;
    client.shutdown().await.unwrap();
    look(&mut server).await;
    tcp::reset_on_close(&client);
    drop(client);
    server.gone().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_sends_nothing_more_is_not_worked_for_for_ever() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    next(&mut server).await;
    client.shutdown().await.unwrap();
    let before = tokio::time::Instant::now();
    server.gone().await;
    assert_eq!(before.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn a_reset_is_noticed_while_an_answer_pauses() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    next(&mut server).await;
    let (_rest, body) = crate::http::upgrade::deferred();
    let mut answering = Box::pin(server.respond(Response::new(body)));
    assert!(poll!(&mut answering).is_pending());
    read_exactly(&mut client, "HTTP/1.1 200 OK\r\n").await;
    tcp::reset_on_close(&client);
    drop(client);
    let ended = answering.await;
    assert!(matches!(ended, Err(Error::Io(_))), "{ended:?}");
}

#[tokio::test]
async fn an_idle_connection_holds_no_buffer() {
    let (mut client, socket) = pair().await;
    let mut server = serve(socket);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    drop(next(&mut server).await);
    server.respond(ok("")).await.unwrap();
    assert_eq!(server.buffered_capacity(), 0);
    let future = server.next();
    assert!(
        std::mem::size_of_val(&future) < 1024,
        "{}",
        std::mem::size_of_val(&future)
    );
}
