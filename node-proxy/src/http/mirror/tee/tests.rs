use futures::FutureExt;

use super::*;
use crate::budget::Limits;

type Part = Result<Frame<Bytes>, BodyError>;

/// Of unknown length.
fn streamed(parts: Vec<Part>) -> Body {
    Body::boxed(http_body_util::StreamBody::new(futures::stream::iter(
        parts,
    )))
}

fn data(bytes: impl Into<Bytes>) -> Part {
    Ok(Frame::data(bytes.into()))
}

fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "1".parse().unwrap());
    trailers
}

fn account(buffered_bytes: usize) -> Arc<Account> {
    let limits = Limits {
        buffered_bytes,
        ..Limits::default()
    };
    Account::new("demo".into(), "web".into(), &limits)
}

fn used(account: &Account) -> usize {
    account.used(Resource::BufferedBytes)
}

/// Reads all of it.
async fn read(mut body: Body) -> (usize, Option<HeaderMap>) {
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        match frame.unwrap().into_data() {
            Ok(data) => length += data.len(),
            Err(frame) => return (length, frame.into_trailers().ok()),
        }
    }
    (length, None)
}

#[tokio::test]
async fn a_body_of_unknown_length_is_copied_whole_with_its_trailers() {
    let account = account(1 << 20);
    let last = Ok(Frame::trailers(trailers()));
    let (body, awaited) = tee(streamed(vec![data("hello "), data("world"), last]));
    assert_eq!(body.size_hint().upper(), None);
    let second = awaited.clone();
    let (read_of, first, second) =
        tokio::join!(read(body), awaited.whole(&account), second.whole(&account));
    assert_eq!(read_of, (11, Some(trailers())), "the request's own");
    for whole in [first.unwrap(), second.unwrap()] {
        assert_eq!(whole.data, "hello world");
        assert_eq!(read(whole.body()).await, (11, Some(trailers())));
    }
}

#[tokio::test]
async fn what_is_kept_is_charged_until_the_copy_is_through() {
    let account = account(1 << 20);
    let (mut body, awaited) = tee(streamed(vec![data("abc"), data("de")]));
    body.frame().await;
    assert_eq!(used(&account), 0, "not known yet whom to charge");
    let mut waiting = Box::pin(awaited.whole(&account));
    assert!(waiting.as_mut().now_or_never().is_none());
    assert_eq!(used(&account), 3);
    body.frame().await;
    assert_eq!(used(&account), 5);
    assert!(waiting.as_mut().now_or_never().is_none(), "not at its end");
    assert!(body.frame().await.is_none());
    assert_eq!(waiting.await.unwrap().data, "abcde");
    drop(body);
    assert_eq!(used(&account), 5);
    drop(awaited);
    assert_eq!(used(&account), 0);
}

#[tokio::test]
async fn past_the_bound_it_passes_whole_and_is_not_copied() {
    let account = account(1 << 20);
    for (last, copied) in [(MAX_BODY - 40_000, true), (MAX_BODY - 39_999, false)] {
        let parts = vec![data(vec![b'x'; 40_000]), data(vec![b'y'; last])];
        let (mut body, awaited) = tee(streamed(parts));
        let mut waiting = Box::pin(awaited.whole(&account));
        body.frame().await;
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(used(&account), 40_000);
        let frame = body.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap().len(), last);
        if !copied {
            assert_eq!(used(&account), 0, "given up at once");
        }
        assert_eq!(read(body).await, (0, None));
        assert_eq!(waiting.await.is_some(), copied);
        drop(awaited);
        assert_eq!(used(&account), 0);
    }
}

#[tokio::test]
async fn one_that_fails_or_is_dropped_is_not_copied() {
    let account = account(1 << 20);
    for fails in [true, false] {
        let (mut body, awaited) = tee(streamed(vec![data("abc"), Err(BodyError::Truncated)]));
        let mut waiting = Box::pin(awaited.whole(&account));
        body.frame().await;
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(used(&account), 3);
        if fails {
            let failed = body.frame().await;
            assert!(matches!(failed, Some(Err(BodyError::Truncated))));
        }
        drop(body);
        assert_eq!(used(&account), 0);
        assert!(waiting.await.is_none());
    }
}

#[tokio::test]
async fn without_room_in_the_account_it_passes_whole_and_is_not_copied() {
    for room in [1, 4] {
        let account = account(room);
        let (mut body, awaited) = tee(streamed(vec![data("abc"), data("de")]));
        body.frame().await;
        let mut waiting = Box::pin(awaited.whole(&account));
        let whole = waiting.as_mut().now_or_never();
        // What has passed already is too much, or what follows.
        assert_eq!(whole.is_some(), room < 3);
        assert_eq!(read(body).await, (2, None));
        assert_eq!(used(&account), 0);
        if whole.is_none() {
            assert!(waiting.await.is_none());
        }
    }
}

#[tokio::test]
async fn nothing_is_kept_when_nobody_waits() {
    let account = account(1 << 20);
    let (mut body, awaited) = tee(streamed(vec![data("abc"), data("de")]));
    body.frame().await;
    let mut waiting = Box::pin(awaited.whole(&account));
    assert!(waiting.as_mut().now_or_never().is_none());
    assert_eq!(used(&account), 3);
    drop(waiting);
    drop(awaited);
    assert_eq!(used(&account), 0);
    assert_eq!(read(body).await, (2, None));
}

#[tokio::test]
async fn an_end_that_is_not_read_is_one() {
    let account = account(1 << 20);
    // Known with the last data.
    let (mut body, awaited) = tee(Body::full("abc"));
    body.frame().await;
    assert!(body.is_end_stream());
    assert_eq!(awaited.whole(&account).await.unwrap().data, "abc");
    drop(awaited);
    // Came on its own.
    let (body, awaited) = tee(Body::empty());
    drop(body);
    assert!(awaited.whole(&account).await.unwrap().data.is_empty());
}
