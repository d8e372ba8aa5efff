use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use h2::server::SendResponse;
use http::{HeaderValue, Request, Response};
use tokio::sync::mpsc;

use super::*;
use crate::budget::Limits;
use crate::http::h1::OnInterim;
use crate::http::watched::Sent;

type Accepted = (Request<RecvStream>, SendResponse<Bytes>);

/// A connection with small windows: its client's side, and what its server is asked.
async fn connected(window: u32) -> (h2::client::SendRequest<Bytes>, mpsc::Receiver<Accepted>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (asked, requests) = mpsc::channel(8);
    tokio::spawn(async move {
        let mut server = h2::server::Builder::new()
            .initial_window_size(window)
            .handshake::<_, Bytes>(far)
            .await
            .unwrap();
        while let Some(Ok(accepted)) = server.accept().await {
            asked.send(accepted).await.unwrap();
        }
    });
    let (send, connection) = h2::client::Builder::new()
        .initial_window_size(window)
        .handshake(near)
        .await
        .unwrap();
    tokio::spawn(connection);
    (send.ready().await.unwrap(), requests)
}

fn post(body: Body) -> Request<Body> {
    Request::post("http://a/").body(body).unwrap()
}

fn streamed(parts: Vec<Result<Frame<Bytes>, BodyError>>) -> Body {
    Body::boxed(http_body_util::StreamBody::new(futures::stream::iter(
        parts,
    )))
}

fn data(bytes: &'static str) -> Result<Frame<Bytes>, BodyError> {
    Ok(Frame::data(Bytes::from_static(bytes.as_bytes())))
}

fn account() -> Arc<Account> {
    bounded(1 << 20)
}

fn bounded(buffered_bytes: usize) -> Arc<Account> {
    let limits = Limits {
        buffered_bytes,
        ..Limits::default()
    };
    Account::new("demo".into(), "web".into(), &limits)
}

fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers
}

#[tokio::test]
async fn what_is_known_of_a_body_is_exact() {
    let body = Body::full("");
    assert!(body.is_end_stream());
    let mut body = Body::full("abc");
    assert_eq!(
        (body.is_end_stream(), body.size_hint().exact()),
        (false, Some(3))
    );
    assert_eq!(body.as_full().unwrap(), "abc");
    let mut again = body.try_clone().unwrap();
    for body in [&mut body, &mut again] {
        assert_eq!(
            body.frame().await.unwrap().unwrap().into_data().unwrap(),
            "abc"
        );
        assert!(body.is_end_stream());
        assert!(body.frame().await.is_none());
    }
    let mut body = streamed(vec![]);
    assert!(body.as_full().is_none() && body.try_clone().is_none());
    assert!(matches!(body.frame_now().await, Some(None)));
    let mut never = Body::boxed(http_body_util::StreamBody::new(futures::stream::pending::<
        Result<Frame<Bytes>, BodyError>,
    >()));
    assert!(never.frame_now().await.is_none());
}

#[tokio::test]
async fn a_body_larger_than_the_window_goes_through_both_ways() {
    let (mut send, mut requests) = connected(1000).await;
    let echo = async {
        let (request, mut respond) = requests.recv().await.unwrap();
        let (parts, stream) = request.into_parts();
        let mut to = respond.send_response(Response::new(()), false).unwrap();
        let body = Body::http2(stream, &parts.headers);
        assert_eq!(body.size_hint().exact(), None);
        pump(body, &mut to, None, None).await.unwrap();
    };
    let large: Vec<_> = (0..50)
        .map(|_| {
            data("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
        })
        .chain([Ok(Frame::trailers(trailers()))])
        .collect();
    let asking = async {
        let response = exchange(&mut send, post(streamed(large)).into(), None, account())
            .await
            .unwrap();
        let mut body = response.into_body();
        let (mut length, mut ended) = (0, None);
        while let Some(frame) = body.frame().await {
            match frame.unwrap().into_data() {
                Ok(data) => length += data.len(),
                Err(frame) => ended = frame.into_trailers().ok(),
            }
        }
        (length, ended)
    };
    let ((), (length, ended)) = tokio::join!(echo, asking);
    assert_eq!((length, ended), (50 * 80, Some(trailers())));
}

#[tokio::test]
async fn the_last_data_ends_the_stream() {
    let (mut send, mut requests) = connected(65_535).await;
    let serving = async {
        let (request, mut respond) = requests.recv().await.unwrap();
        let mut stream = request.into_body();
        let data = stream.data().await.unwrap().unwrap();
        assert_eq!(data, "abc");
        assert!(stream.is_end_stream(), "in one frame");
        let response = Response::builder().header("content-length", "2");
        let mut to = respond
            .send_response(response.body(()).unwrap(), false)
            .unwrap();
        pump(Body::full("ok"), &mut to, None, None).await.unwrap();
    };
    let asking = async {
        let response = exchange(&mut send, post(Body::full("abc")).into(), None, account())
            .await
            .unwrap();
        let mut body = response.into_body();
        assert_eq!(body.size_hint().exact(), Some(2));
        body.frame().await.unwrap().unwrap();
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
    };
    tokio::join!(serving, asking);
}

#[tokio::test]
async fn a_reset_is_heard_on_either_side() {
    // By whoever reads.
    let (mut send, mut requests) = connected(65_535).await;
    let (feed, fed) = mpsc::channel(1);
    let serving = async {
        let (_request, mut respond) = requests.recv().await.unwrap();
        let mut to = respond.send_response(Response::new(()), false).unwrap();
        let frames =
            futures::stream::unfold(fed, |mut fed| async { Some((fed.recv().await?, fed)) });
        let body = Body::boxed(http_body_util::StreamBody::new(frames));
        let error = pump(body, &mut to, None, None).await.unwrap_err();
        assert!(matches!(error, PumpError::Body(BodyError::Truncated)));
    };
    let asking = async {
        let response = exchange(&mut send, post(Body::empty()).into(), None, account())
            .await
            .unwrap();
        let mut body = response.into_body();
        feed.send(data("half")).await.unwrap();
        let half = body.frame().await.unwrap().unwrap();
        assert_eq!(half.into_data().unwrap(), "half");
        feed.send(Err(BodyError::Truncated)).await.unwrap();
        match body.frame().await.unwrap() {
            Err(BodyError::Reset(reason)) => reason,
            other => panic!("{other:?}"),
        }
    };
    let ((), reason) = tokio::join!(serving, asking);
    assert_eq!(reason, Reason::INTERNAL_ERROR);

    // By whoever writes, though it has nothing to write.
    let serving = async {
        let (_request, mut respond) = requests.recv().await.unwrap();
        let mut to = respond.send_response(Response::new(()), false).unwrap();
        let never = Body::boxed(http_body_util::StreamBody::new(futures::stream::pending::<
            Result<Frame<Bytes>, BodyError>,
        >()));
        pump(never, &mut to, None, None).await.unwrap_err()
    };
    let asking = async {
        let response = exchange(&mut send, post(Body::empty()).into(), None, account())
            .await
            .unwrap();
        drop(response);
    };
    let (error, ()) = tokio::join!(serving, asking);
    assert!(matches!(error, PumpError::Reset(Reason::CANCEL)));
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_gives_no_window_is_left() {
    let stall = std::time::Duration::from_secs(300);
    let (mut send, mut requests) = connected(10).await;
    let serving = async {
        let (_request, mut respond) = requests.recv().await.unwrap();
        let mut to = respond.send_response(Response::new(()), false).unwrap();
        pump(Body::full("eleven bytes"), &mut to, None, Some(stall)).await
    };
    let asking = async {
        let began = tokio::time::Instant::now();
        let response = exchange(&mut send, post(Body::empty()).into(), None, account()).await;
        let mut body = response.unwrap().into_body();
        let data = body.frame().await.unwrap().unwrap();
        assert_eq!(data.into_data().unwrap(), "eleven byt");
        // What was handed out is held: no window for the rest until more is asked for.
        tokio::time::sleep(stall * 2).await;
        let failed = body.frame().await.unwrap();
        assert!(matches!(failed, Err(BodyError::Reset(Reason::CANCEL))));
        began.elapsed()
    };
    let (sent, _) = tokio::join!(serving, asking);
    assert!(matches!(sent, Err(PumpError::Stalled)), "{sent:?}");
}

#[tokio::test]
async fn an_unprocessed_request_is_known_as_such() {
    let (mut send, mut requests) = connected(65_535).await;
    for (reason, unprocessed) in [
        (Reason::REFUSED_STREAM, true),
        (Reason::INTERNAL_ERROR, false),
    ] {
        let refusing = async {
            let (_request, mut respond) = requests.recv().await.unwrap();
            respond.send_reset(reason);
        };
        let asking = exchange(&mut send, post(Body::full("abc")).into(), None, account());
        let ((), failed) = tokio::join!(refusing, asking);
        let error = failed.unwrap_err();
        assert!(matches!(error, ExchangeError::Reset(heard) if heard == reason));
        assert_eq!(error.is_unprocessed(), unprocessed);
    }
    let failing = exchange(
        &mut send,
        post(streamed(vec![Err(BodyError::Timeout)])).into(),
        None,
        account(),
    );
    assert!(matches!(
        failing.await,
        Err(ExchangeError::Body(BodyError::Timeout))
    ));
}

#[tokio::test]
async fn interim_responses_reach_whoever_asked_for_them() {
    let (mut send, mut requests) = connected(65_535).await;
    let heard = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&heard);
    let mut request = post(Body::empty());
    request
        .extensions_mut()
        .insert(OnInterim(Arc::new(move |parts| {
            assert_eq!(parts.status, 103);
            count.fetch_add(1, Ordering::Relaxed);
        })));
    let serving = async {
        let (_request, mut respond) = requests.recv().await.unwrap();
        let hints = Response::builder().status(103).body(()).unwrap();
        respond.send_informational(hints).unwrap();
        tokio::task::yield_now().await;
        respond.send_response(Response::new(()), true).unwrap();
    };
    let ((), response) = tokio::join!(
        serving,
        exchange(&mut send, request.into(), None, account())
    );
    assert!(response.unwrap().into_body().is_end_stream());
    assert_eq!(heard.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn what_is_held_is_held_to_the_end_of_the_answer_and_the_upload_with_it() {
    let (mut send, mut requests) = connected(65_535).await;
    let held = Arc::new(());
    let (feed, fed) = mpsc::channel::<&'static str>(1);
    let frames = futures::stream::unfold(fed, |mut fed| async {
        let text = fed.recv().await?;
        Some((data(text), fed))
    });
    let body = Body::boxed(http_body_util::StreamBody::new(frames));
    let serving = async {
        let (request, mut respond) = requests.recv().await.unwrap();
        let to = respond.send_response(Response::new(()), false).unwrap();
        (request, to)
    };
    let guard = Box::new(Arc::clone(&held));
    let ((request, _to), response) = tokio::join!(
        serving,
        exchange(&mut send, post(body).into(), Some(guard), account())
    );
    let response = response.unwrap();
    // The upload goes on while nobody reads the answer.
    feed.send("more").await.unwrap();
    let mut upload = request.into_body();
    assert_eq!(upload.data().await.unwrap().unwrap(), "more");
    assert_eq!(Arc::strong_count(&held), 2);
    drop(response);
    assert_eq!(Arc::strong_count(&held), 1);
    feed.closed().await;
    assert!(upload.data().await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn what_comes_while_the_receiver_takes_nothing_is_charged_and_bounded() {
    for (bound, fits) in [(1 << 20, true), (4_000, false)] {
        let (mut send, mut requests) = connected(65_535).await;
        let account = bounded(bound);
        let used = || account.used(Resource::BufferedBytes);
        let serving = async {
            let (request, mut respond) = requests.recv().await.unwrap();
            let (parts, stream) = request.into_parts();
            // As it is where an answer's bytes are counted on their way.
            let mut body = Sent::default().count(Body::http2(stream, &parts.headers));
            let come = async {
                while used() < 6_000 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            let waited = body.hold(Some(&account), 10, come).await;
            if !fits {
                assert!(matches!(waited, Err(BodyError::Limit)));
                assert_eq!(account.refused(Resource::BufferedBytes), 1);
                drop(body);
                assert_eq!(used(), 0);
                return respond.send_reset(Reason::CANCEL);
            }
            waited.unwrap();
            assert!((6_000..7_000).contains(&used()), "{}", used());
            assert!(!body.is_end_stream());
            let mut length = 0;
            while let Some(frame) = body.frame().await {
                match frame.unwrap().into_data() {
                    Ok(data) => length += data.len(),
                    Err(frame) => assert_eq!(frame.into_trailers().unwrap(), trailers()),
                }
            }
            assert_eq!((length, used()), (6_000, 0));
            respond.send_response(Response::new(()), true).unwrap();
        };
        let body: Vec<_> = (0..3)
            .map(|_| Ok(Frame::data(Bytes::from("0123456789".repeat(200)))))
            .chain([Ok(Frame::trailers(trailers()))])
            .collect();
        let own = self::account();
        let asking = exchange(&mut send, post(streamed(body)).into(), None, own);
        let ((), answered) = tokio::join!(serving, asking);
        assert_eq!(answered.is_ok(), fits);
    }
}
