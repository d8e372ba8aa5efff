use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use h2::Reason;
use h2::server::SendResponse;
use http::Request;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};

use super::*;
use crate::budget::{self, Resource};
use crate::http::callee::failure;
use crate::pods::PodInfo;
use crate::stock::{self, Supply};
use crate::testing;

/// The request that a failure brings back.
fn request_of(error: AppError) -> Option<BoxedRequest> {
    match error {
        AppError::Connect(_, request) | AppError::ClosedIdle(request) => request,
        AppError::Http1(_) | AppError::Http2(_) => None,
    }
}

/// A pod with some sockets, in the test's own namespace.
fn pod(sockets: usize) -> (Arc<Pod>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let identities = testing::identities(directory.path());
    let supply = Supply::new(10_000, stock::Metrics::default());
    let info = PodInfo {
        namespace: "demo".into(),
        name: "web".into(),
        service_account: "web".into(),
        owner: "web".into(),
        addresses: vec![],
        strict: false,
        exclude_inbound_ports: vec![],
        exclude_outbound_ports: vec![],
        exclude_outbound_cidrs: vec![],
        probes: vec![],
        zone: "".into(),
    };
    let identity = info.identity("cluster.local").unwrap();
    let limits = budget::Limits::default().resolved(10_000);
    let pod = Pod::new("uid".into(), info, identity, &identities, &supply, &limits);
    let made = (0..sockets).map(|_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.into()
    });
    pod.stock.fill(false, made.collect());
    (pod, directory)
}

fn key(pod: &Arc<Pod>, to: SocketAddr, version: Version) -> AppKey {
    AppKey {
        pod: Arc::clone(pod),
        from: None,
        to,
        version,
        counted: None,
        probe: false,
    }
}

fn get() -> BoxedRequest {
    let request = Request::builder().uri("/").header("host", "a");
    request.body(Body::empty()).unwrap().into()
}

async fn text(response: Response<Body>) -> Bytes {
    let mut body = response.into_body();
    match body.frame().await {
        Some(frame) => frame.unwrap().into_data().unwrap(),
        None => Bytes::new(),
    }
}

fn has_open(apps: &Apps, key: &AppKey) -> bool {
    let mut state = apps.shared.state.lock();
    let shelf = state.shelves.get_mut(&Key::from(key)).unwrap();
    shelf.idle.iter_mut().any(|(client, _)| client.is_idle())
}

/// Waits until every connection of the pod has ended.
async fn closed(pod: &Pod) {
    tokio::time::timeout(Duration::from_secs(5), async {
        while pod.account.used(Resource::Socket) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("all connections end");
}

/// An HTTP/1 app that answers each request with the number of its connection; `served`: so many requests
/// a connection, then it closes.
async fn app(served: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let number = count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                for _ in 0..served {
                    let mut heard = Vec::new();
                    while !heard.ends_with(b"\r\n\r\n") {
                        match stream.read(&mut buffer).await {
                            Ok(length @ 1..) => heard.extend_from_slice(&buffer[..length]),
                            _ => return,
                        }
                    }
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{number}");
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            });
        }
    });
    (address, accepted)
}

#[tokio::test]
async fn a_connection_is_used_again_by_the_same_caller_only() {
    let (pod, _directory) = pod(4);
    let (address, accepted) = app(100).await;
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_11);
    for _ in 0..5 {
        let response = apps.send(&key, get()).await.unwrap();
        assert_eq!(apps.idle(), 1);
        assert_eq!(text(response).await, "0");
    }
    assert_eq!(accepted.load(Ordering::Relaxed), 1);
    assert_eq!(pod.account.used(Resource::Socket), 1);
    // Nobody else's: another address of the caller is another key.
    let other = AppKey {
        from: Some("127.0.0.9".parse().unwrap()),
        ..key.clone()
    };
    assert!(apps.shared.take(&Key::from(&other)).0.is_none());
    drop(apps);
    assert_eq!(pod.account.used(Resource::Socket), 0);
}

#[tokio::test]
async fn a_connection_that_the_app_closed_is_not_used() {
    let (pod, _directory) = pod(4);
    let (address, accepted) = app(1).await;
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_11);
    for number in ["0", "1", "2"] {
        assert_eq!(text(apps.send(&key, get()).await.unwrap()).await, number);
        // The runtime hears of the end before the next request.
        tokio::time::timeout(Duration::from_secs(5), async {
            while has_open(&apps, &key) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
    }
    assert_eq!(accepted.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_connection_that_ends_as_it_is_used_gives_the_request_back() {
    let (pod, _directory) = pod(4);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_11);
    let app = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            .await
            .unwrap();
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
    };
    let asking = async {
        assert_eq!(text(apps.send(&key, get()).await.unwrap()).await, "ok");
        apps.send(&key, get()).await.unwrap_err()
    };
    let ((), error) = tokio::join!(app, asking);
    assert!(matches!(error, AppError::ClosedIdle(Some(_))));
    assert_eq!(request_of(error).unwrap().head.uri, "/");
    // A new connection that does the same is the app's failure.
    let app = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
    };
    let ((), failed) = tokio::join!(app, apps.send(&key, get()));
    assert!(matches!(failed, Err(AppError::Http1(SendError::Closed))));
}

#[tokio::test]
async fn no_connection_is_an_error_of_the_table_with_the_request() {
    let (pod, _directory) = pod(4);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let apps = Apps::default();
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let error = apps
            .send(&key(&pod, address, version), get())
            .await
            .unwrap_err();
        assert_eq!(failure(&error), ProxyError::ConnectRefused);
        assert!(matches!(error, AppError::Connect(..)));
        assert!(request_of(error).is_some());
    }
    assert_eq!(pod.account.used(Resource::Socket), 0);
}

#[tokio::test(start_paused = true)]
async fn a_connection_comes_in_time_or_not_at_all() {
    let (pod, _directory) = pod(0);
    let apps = Apps::new(Duration::from_secs(2));
    let before = Instant::now();
    let to = "127.0.0.1:1".parse().unwrap();
    for (version, seconds) in [(Version::HTTP_11, 2), (Version::HTTP_2, 4)] {
        let error = apps.send(&key(&pod, to, version), get()).await.unwrap_err();
        assert_eq!(failure(&error), ProxyError::ConnectTimeout);
        assert_eq!(before.elapsed().as_secs(), seconds);
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connections_are_bounded_and_close_after_a_minute() {
    let (pod, _directory) = pod(MOST_IDLE + 4);
    let (address, accepted) = app(100).await;
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_11);
    let all = (0..MOST_IDLE + 4).map(|_| apps.send(&key, get()));
    for response in futures::future::join_all(all).await {
        text(response.unwrap()).await;
    }
    assert_eq!(accepted.load(Ordering::Relaxed), MOST_IDLE + 4);
    assert_eq!(apps.idle(), MOST_IDLE);
    assert_eq!(pod.account.used(Resource::Socket), MOST_IDLE);
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(apps.idle(), MOST_IDLE);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(apps.idle(), 0);
    assert_eq!(pod.account.used(Resource::Socket), 0);
    let state = apps.shared.state.lock();
    assert!(state.shelves.is_empty() && state.idle_of_pod.is_empty() && state.sweeper.is_none());
}

/// The number of a connection, and a request on it.
type Asked = (usize, Request<h2::RecvStream>, SendResponse<Bytes>);

/// An HTTP/2 app that takes `streams` at a time; each request comes out of the channel.
async fn app2(streams: u32) -> (SocketAddr, mpsc::Receiver<Asked>, Arc<Notify>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, requests) = mpsc::channel(64);
    let leave = Arc::new(Notify::new());
    let leaving = Arc::clone(&leave);
    tokio::spawn(async move {
        for number in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            let (asked, leaving) = (asked.clone(), Arc::clone(&leaving));
            tokio::spawn(async move {
                let mut server = h2::server::Builder::new()
                    .max_concurrent_streams(streams)
                    .handshake::<_, Bytes>(stream)
                    .await
                    .unwrap();
                loop {
                    tokio::select! {
                        accepted = server.accept() => match accepted {
                            Some(Ok((request, respond))) => {
                                asked.send((number, request, respond)).await.unwrap();
                            }
                            _ => return,
                        },
                        () = leaving.notified() => server.graceful_shutdown(),
                    }
                }
            });
        }
    });
    (address, requests, leave)
}

#[tokio::test]
async fn http2_requests_share_connections_as_far_as_the_app_allows() {
    let (pod, _directory) = pod(4);
    let (address, mut requests, leave) = app2(2).await;
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_2);
    // The first learns what the app allows.
    let answer = async {
        let (number, request, mut respond) = requests.recv().await.unwrap();
        assert_eq!(number, 0);
        assert_eq!(request.uri(), "http://a/");
        assert!(!request.headers().contains_key("host"));
        respond.send_response(Response::new(()), true).unwrap();
    };
    let (response, ()) = tokio::join!(apps.send(&key, get()), answer);
    assert_eq!(response.unwrap().status(), 200);
    let asking = futures::future::join_all((0..4).map(|_| apps.send(&key, get())));
    let answering = async {
        let mut connections = VecDeque::new();
        let mut open = Vec::new();
        for _ in 0..4 {
            let (number, _request, respond) = requests.recv().await.unwrap();
            connections.push_back(number);
            open.push(respond);
        }
        for mut respond in open {
            respond.send_response(Response::new(()), true).unwrap();
        }
        connections
    };
    let (responses, connections) = tokio::join!(asking, answering);
    assert!(responses.iter().all(Result::is_ok));
    let first = connections.iter().filter(|number| **number == 0).count();
    assert_eq!(first, 2, "{connections:?}");
    assert!(connections.iter().all(|number| *number <= 1));
    assert_eq!(pod.account.used(Resource::Socket), 2);
    drop(responses);

    // A connection that the app leaves is not used for what comes next.
    leave.notify_waiters();
    closed(&pod).await;
    let answer = async {
        let (number, _request, mut respond) = requests.recv().await.unwrap();
        respond.send_response(Response::new(()), true).unwrap();
        number
    };
    let (response, number) = tokio::join!(apps.send(&key, get()), answer);
    response.unwrap();
    assert_eq!(number, 2);
    // The tasks that drive the connections end with the pool.
    assert_eq!(pod.account.used(Resource::Socket), 1);
    drop(apps);
    closed(&pod).await;
}

#[tokio::test]
async fn an_http2_stream_that_is_refused_was_not_processed() {
    let (pod, _directory) = pod(4);
    let (address, mut requests, _leave) = app2(10).await;
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_2);
    let refuse = async {
        let (_, _request, mut respond) = requests.recv().await.unwrap();
        respond.send_reset(Reason::REFUSED_STREAM);
    };
    let (response, ()) = tokio::join!(apps.send(&key, get()), refuse);
    assert_eq!(failure(&response.unwrap_err()), ProxyError::RefusedStream);
}

#[tokio::test]
async fn a_kept_http2_connection_that_breaks_is_told_from_a_new_one() {
    let (pod, _directory) = pod(4);
    for (answers, cause) in [(1, ProxyError::IdleClosed), (0, ProxyError::UpstreamReset)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut server = h2::server::handshake(stream).await.unwrap();
            for _ in 0..answers {
                let (_, mut respond) = server.accept().await.unwrap().unwrap();
                respond.send_response(Response::new(()), true).unwrap();
            }
            let _not_answered = server.accept().await;
        });
        let apps = Apps::default();
        let key = key(&pod, address, Version::HTTP_2);
        for _ in 0..answers {
            apps.send(&key, get()).await.unwrap();
        }
        let error = apps.send(&key, get()).await.unwrap_err();
        assert_eq!(failure(&error), cause, "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_http2_connection_closes_after_a_minute() {
    let (pod, _directory) = pod(4);
    let (address, mut requests, _leave) = app2(10).await;
    let apps = Apps::default();
    let key = key(&pod, address, Version::HTTP_2);
    let answer = async {
        let (_, _request, mut respond) = requests.recv().await.unwrap();
        respond.send_response(Response::new(()), true).unwrap();
    };
    let (response, ()) = tokio::join!(apps.send(&key, get()), answer);
    drop(response.unwrap());
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(pod.account.used(Resource::Socket), 1);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(pod.account.used(Resource::Socket), 0);
    assert!(apps.shared.state.lock().shelves.is_empty());
}
