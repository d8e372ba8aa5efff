use std::collections::VecDeque;
use std::convert::Infallible;

use futures::FutureExt;
use http_body_util::BodyExt;

use super::*;

/// A body of given frames. `None` in the queue: nothing yet, once.
struct Frames {
    frames: VecDeque<Option<Frame<Bytes>>>,
    hint: SizeHint,
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.frames.pop_front() {
            Some(Some(frame)) => Poll::Ready(Some(Ok(frame))),
            Some(None) => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

fn frames(parts: &[&'static str]) -> Frames {
    Frames {
        frames: parts
            .iter()
            .map(|part| Some(Frame::data(Bytes::from_static(part.as_bytes()))))
            .collect(),
        hint: SizeHint::new(),
    }
}

fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "1".parse().unwrap());
    trailers
}

async fn next(attempt: &mut Attempt<Frames>) -> Option<Bytes> {
    attempt
        .frame()
        .await
        .map(|frame| frame.unwrap().into_data().unwrap())
}

async fn all(attempt: Attempt<Frames>) -> (Bytes, Option<HeaderMap>) {
    let collected = attempt.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    (collected.to_bytes(), trailers)
}

#[tokio::test]
async fn every_try_sends_the_same_with_trailers() {
    let mut body = frames(&["hello ", "world"]);
    body.frames.push_back(Some(Frame::trailers(trailers())));
    let replay = Replay::new(body, 64);
    for _ in 0..3 {
        let sent = all(replay.attempt().unwrap()).await;
        assert_eq!(sent, ("hello world".into(), Some(trailers())));
    }
}

#[tokio::test]
async fn a_try_goes_on_where_the_one_before_it_stopped() {
    let mut body = frames(&["a", "b"]);
    body.frames.push_back(None);
    body.frames.push_back(Some(Frame::data("c".into())));
    let replay = Replay::new(body, 64);
    let mut first = replay.attempt().unwrap();
    assert_eq!(next(&mut first).await, Some("a".into()));
    let mut second = replay.attempt().unwrap();
    assert!(first.frame().now_or_never().is_none(), "no longer served");
    assert_eq!(next(&mut second).await, Some("a".into()));
    assert_eq!(next(&mut second).await, Some("b".into()));
    assert_eq!(all(replay.attempt().unwrap()).await.0, "abc");
}

#[tokio::test]
async fn past_the_bound_the_stream_goes_on_and_cannot_be_sent_again() {
    let replay = Replay::new(frames(&["1234", "5678", "9"]), 8);
    let mut first = replay.attempt().unwrap();
    next(&mut first).await;
    next(&mut first).await;
    assert!(replay.is_replayable(), "exactly the bound");
    assert_eq!(replay.kept(), 8);
    assert_eq!(next(&mut first).await, Some("9".into()));
    assert!(!replay.is_replayable());
    assert_eq!(replay.kept(), 0);
    assert_eq!(next(&mut first).await, None);
    assert!(replay.attempt().is_none());
}

#[tokio::test]
async fn past_the_bound_in_the_second_try() {
    let replay = Replay::new(frames(&["1234", "5678", "9"]), 8);
    let mut first = replay.attempt().unwrap();
    next(&mut first).await;
    assert_eq!(all(replay.attempt().unwrap()).await.0, "123456789");
    assert!(replay.attempt().is_none());
}

#[tokio::test]
async fn a_body_that_says_it_is_too_long_is_not_kept() {
    let mut body = frames(&["123", "456"]);
    body.hint = SizeHint::with_exact(6);
    let replay = Replay::new(body, 5);
    assert!(!replay.is_replayable());
    let attempt = replay.attempt().expect("the first");
    assert_eq!(attempt.size_hint().exact(), Some(6));
    assert_eq!(all(attempt).await.0, "123456");
    assert!(replay.attempt().is_none());
}

#[tokio::test]
async fn many_tiny_frames_are_bounded() {
    let tiny = vec!["x"; MAX_FRAMES + 1];
    let replay = Replay::new(frames(&tiny), 64 << 10);
    assert_eq!(all(replay.attempt().unwrap()).await.0.len(), MAX_FRAMES + 1);
    assert!(!replay.is_replayable());
}

#[tokio::test]
async fn what_is_known_of_the_length_stays_exact() {
    let mut body = frames(&["abc"]);
    body.hint = SizeHint::with_exact(3);
    let replay = Replay::new(body, 64);
    let attempt = replay.attempt().unwrap();
    assert_eq!(attempt.size_hint().exact(), Some(3));
    assert!(!attempt.is_end_stream());
    assert_eq!(all(attempt).await.0, "abc");
    let again = replay.attempt().unwrap();
    assert_eq!(again.size_hint().exact(), Some(3));
    assert!(!again.is_end_stream());
    let empty = Replay::new(frames(&[]), 64);
    assert!(empty.attempt().unwrap().is_end_stream());
    assert!(empty.attempt().unwrap().is_end_stream());
}

#[tokio::test]
async fn after_the_last_try_nothing_is_kept() {
    let replay = Replay::new(frames(&["a", "b", "c"]), 64);
    let mut first = replay.attempt().unwrap();
    next(&mut first).await;
    replay.commit();
    assert_eq!(replay.kept(), 0);
    assert!(replay.attempt().is_none());
    assert_eq!(all(first).await.0, "bc");
    // A second try has yet to send what the first one did.
    let replay = Replay::new(frames(&["a", "b", "c"]), 64);
    next(&mut replay.attempt().unwrap()).await;
    let second = replay.attempt().unwrap();
    replay.commit();
    assert_eq!(all(second).await.0, "abc");
    assert!(replay.attempt().is_none());
}
