//! One request and its answer over an HTTP/2 connection of ours.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, SendStream};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::{Body, BodyError, PumpError, pump};
use crate::budget::Account;
use crate::http::frames::STALL;
use crate::http::h1::{CONTINUE_WAIT, OnInterim, expects_continue};
use crate::http::{BoxedRequest, wire};

/// What is held until the answer has ended: a place on the connection, a charge.
pub type Held = Box<dyn Send + Sync>;

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The connection takes no request any more; nothing of this one was sent.
    #[error("the connection takes no request: {0}")]
    Unusable(h2::Error),
    /// The peer reset the stream before its answer. `REFUSED_STREAM`: it did nothing with the request.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Connection(h2::Error),
    /// The request's own body failed.
    #[error("the request's body failed: {0}")]
    Body(BodyError),
}

impl ExchangeError {
    /// Whether the peer has certainly done nothing with the request (RFC 9113 8.7).
    pub fn is_unprocessed(&self) -> bool {
        match self {
            Self::Unusable(_) => true,
            Self::Reset(reason) => *reason == Reason::REFUSED_STREAM,
            Self::Connection(error) => {
                error.is_remote() && error.is_go_away() && error.reason() == Some(Reason::NO_ERROR)
            }
            Self::Body(_) => false,
        }
    }

    fn from_h2(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Connection(error),
        }
    }
}

/// Sends a request and waits for the head of the answer, without limit of time: dropping the future resets
/// the stream, and so does dropping the answer's body before its end. `send` must be ready
/// ([`SendRequest::ready`]). Interim responses go to the request's [`OnInterim`].
///
/// The request's body is sent while the answer is waited for, and in a task of its own if the answer's head
/// comes first; the task ends with the body, with the stream, or when the peer takes nothing for [`STALL`]. What it has
/// waiting is charged to `account`. A body that the caller may want to be asked for is not asked for by this side: it waits
/// for a 100, or a second, and is dropped unread where the answer comes first (RFC 9110 10.1.1).
pub async fn exchange(
    send: &mut SendRequest<Bytes>,
    request: BoxedRequest,
    held: Option<Held>,
    account: Arc<Account>,
) -> Result<Response<Body>, ExchangeError> {
    let BoxedRequest { mut head, mut body } = request;
    let interim = head.extensions.remove::<OnInterim>();
    let ended = body.is_end_stream();
    let packed = head.headers.contains_key(wire::HEAD);
    let (mut go, asked) = if is_to_be_asked_for(&body, &head) {
        let (go, asked) = oneshot::channel();
        (Some(go), Some(asked))
    } else {
        (None, None)
    };
    let request = Request::from_parts(*head, ());
    let (mut response, mut stream) = send
        .send_request(request, ended)
        .map_err(ExchangeError::Unusable)?;
    let mut upload = (!ended).then(|| {
        Box::pin(async move {
            if let Some(asked) = asked {
                if packed {
                    send_packed(&mut body, &mut stream, &account).await?;
                }
                // The final answer may come first: nobody wants the body then.
                if matches!(timeout(CONTINUE_WAIT, asked).await, Ok(Err(_))) {
                    return Ok(());
                }
            }
            pump(body, &mut stream, Some(&account), Some(STALL)).await
        })
    });
    let head = poll_fn(|cx| {
        loop {
            match response.poll_informational(cx) {
                Poll::Ready(Some(Ok(head))) => {
                    let asks = head.status() == StatusCode::CONTINUE;
                    if let Some(OnInterim(call)) = &interim {
                        call(head.into_parts().0);
                    }
                    if asks && let Some(go) = go.take() {
                        // The upload may not have waited so long.
                        let _ = go.send(());
                        // The app's 100 goes first: a body of HTTP/1 that is read before writes one of its own.
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Err(ExchangeError::from_h2(error)));
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        if let Poll::Ready(head) = std::pin::Pin::new(&mut response).poll(cx) {
            return Poll::Ready(head.map_err(ExchangeError::from_h2));
        }
        if let Some(sending) = &mut upload
            && let Poll::Ready(sent) = sending.as_mut().poll(cx)
        {
            upload = None;
            // What the peer says of the stream is heard from the answer.
            if let Err(PumpError::Body(error)) = sent {
                return Poll::Ready(Err(ExchangeError::Body(error)));
            }
        }
        Poll::Pending
    });
    let (parts, stream) = head.await?.into_parts();
    drop(go);
    let upload = upload.map(|upload| {
        tokio::spawn(async move {
            // The stream has been reset with the reason.
            let _ = upload.await;
        })
        .abort_handle()
    });
    let on_end = OnEnd { upload, held };
    let body = Body::http2_of_exchange(stream, &parts.headers, on_end);
    Ok(Response::from_parts(parts, body))
}

/// Whether the sender of a body may wait for a 100. What is here was sent without, and what follows a CONNECT is no body.
fn is_to_be_asked_for(body: &Body, head: &Parts) -> bool {
    head.method != Method::CONNECT
        && body.as_full().is_none()
        && expects_continue(head.version, &head.headers)
}

/// Sends what of a large head is before the body, and nothing of the body.
async fn send_packed(
    body: &mut Body,
    stream: &mut SendStream<Bytes>,
    account: &Arc<Account>,
) -> Result<(), PumpError> {
    let Some(first) = body.frame().await else {
        return Ok(());
    };
    let first = first.map_err(PumpError::Body)?;
    let first = first.into_data().unwrap_or_default();
    let sent = super::send(first, false, stream, body, Some(account), Some(STALL)).await;
    if sent.is_err() {
        stream.send_reset(Reason::CANCEL);
    }
    sent
}

/// What happens when the body of an answer has ended, or is dropped.
pub(super) struct OnEnd {
    upload: Option<AbortHandle>,
    held: Option<Held>,
}

impl OnEnd {
    /// The answer is whole. An upload that is still under way may go on (RFC 9113 8.1).
    pub(super) fn ended(&mut self) {
        self.upload = None;
        self.held = None;
    }
}

impl Drop for OnEnd {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use h2::RecvStream;
    use h2::server::SendResponse;
    use http_body::Frame;
    use tokio::time::Instant;

    use super::*;
    use crate::budget::Limits;

    /// Sends a request over a connection of its own, to `serve`.
    async fn with<T>(
        request: Request<Body>,
        serve: impl AsyncFnOnce(Request<RecvStream>, SendResponse<Bytes>) -> T,
    ) -> (Response<Body>, T) {
        let (near, far) = tokio::io::duplex(1 << 20);
        let serving = async {
            let mut server = h2::server::handshake(far).await.unwrap();
            let (request, respond) = server.accept().await.unwrap().unwrap();
            tokio::spawn(async move { while server.accept().await.is_some() {} });
            serve(request, respond).await
        };
        let asking = async {
            let (send, connection) = h2::client::handshake(near).await.unwrap();
            tokio::spawn(connection);
            let mut send = send.ready().await.unwrap();
            let account = Account::new("demo".into(), "web".into(), &Limits::default());
            exchange(&mut send, request.into(), None, account).await
        };
        let (served, answered) = tokio::join!(serving, asking);
        (answered.unwrap(), served)
    }

    /// A request whose sender waits to be asked, and whether its body was asked for.
    fn waiting() -> (Request<Body>, Arc<AtomicBool>) {
        let read = Arc::new(AtomicBool::new(false));
        let reads = Arc::clone(&read);
        let content = async move {
            reads.store(true, Ordering::Relaxed);
            Ok::<_, BodyError>(Frame::data(Bytes::from_static(b"content")))
        };
        let content = http_body_util::StreamBody::new(futures::stream::once(content));
        let request = Request::post("http://a/").header("expect", "100-Continue");
        (request.body(Body::boxed(content)).unwrap(), read)
    }

    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    fn interim(respond: &mut SendResponse<Bytes>, status: u16) {
        let head = Response::builder().status(status).body(()).unwrap();
        respond.send_informational(head).unwrap();
    }

    #[tokio::test]
    async fn a_body_is_asked_for_by_who_answers_and_by_nobody_else() {
        let (mut request, read) = waiting();
        let passed_on = Arc::new(AtomicBool::new(false));
        let (heard, reads) = (Arc::clone(&passed_on), Arc::clone(&read));
        let on_interim = move |head: http::response::Parts| {
            let asks = head.status == StatusCode::CONTINUE;
            heard.fetch_or(asks, Ordering::Relaxed);
            assert!(
                !reads.load(Ordering::Relaxed),
                "read before it was asked for"
            );
        };
        request
            .extensions_mut()
            .insert(OnInterim(Arc::new(on_interim)));
        let (response, ()) = with(request, async |request, mut respond| {
            assert_eq!(request.headers()["expect"], "100-Continue");
            interim(&mut respond, 103);
            settle().await;
            assert!(!read.load(Ordering::Relaxed), "read without a 100");
            interim(&mut respond, 100);
            let mut body = request.into_body();
            assert_eq!(body.data().await.unwrap().unwrap(), "content");
            let rest = body.data().await;
            assert!(rest.is_none_or(|rest| rest.unwrap().is_empty()));
            respond.send_response(Response::new(()), true).unwrap();
        })
        .await;
        assert_eq!(response.status(), 200);
        assert!(passed_on.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_body_that_nobody_asks_for_is_dropped_unread() {
        let (request, read) = waiting();
        let (response, mut body) = with(request, async |request, mut respond| {
            let refused = Response::builder().status(417).body(()).unwrap();
            let mut to = respond.send_response(refused, false).unwrap();
            to.send_data(Bytes::from_static(b"no"), true).unwrap();
            request.into_body()
        })
        .await;
        assert_eq!(response.status(), 417);
        let mut answer = response.into_body();
        let said = answer.frame().await.unwrap().unwrap();
        assert_eq!(said.into_data().unwrap(), "no");
        drop(answer);
        settle().await;
        assert_eq!(Arc::strong_count(&read), 1, "the body is held");
        assert!(!read.load(Ordering::Relaxed), "the body was read");
        assert!(body.data().await.unwrap().is_err(), "it did not end");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_nobody_asks_for_is_sent_after_a_while() {
        let (request, _read) = waiting();
        let began = Instant::now();
        let (_, waited) = with(request, async |request, mut respond| {
            let data = request.into_body().data().await.unwrap().unwrap();
            assert_eq!(data, "content");
            respond.send_response(Response::new(()), true).unwrap();
            began.elapsed()
        })
        .await;
        assert_eq!(waited.as_secs(), CONTINUE_WAIT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_a_large_head_does_not_wait_and_neither_does_a_body_that_is_here() {
        let (request, read) = waiting();
        let mut request = request.map(|body| body.after(Bytes::from_static(b"head")));
        request
            .headers_mut()
            .insert(wire::HEAD, http::HeaderValue::from_static("4"));
        with(request, async |request, mut respond| {
            let mut body = request.into_body();
            assert_eq!(body.data().await.unwrap().unwrap(), "head");
            settle().await;
            assert!(!read.load(Ordering::Relaxed), "read without a 100");
            interim(&mut respond, 100);
            assert_eq!(body.data().await.unwrap().unwrap(), "content");
            respond.send_response(Response::new(()), true).unwrap();
        })
        .await;
        let request = Request::post("http://a/").header("expect", "100-continue");
        let began = Instant::now();
        with(
            request.body(Body::full("here")).unwrap(),
            async |request, mut respond| {
                let data = request.into_body().data().await.unwrap().unwrap();
                assert_eq!(data, "here");
                respond.send_response(Response::new(()), true).unwrap();
            },
        )
        .await;
        assert!(began.elapsed() < CONTINUE_WAIT);
    }
}
