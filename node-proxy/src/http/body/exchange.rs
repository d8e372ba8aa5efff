//! One request and its answer over an HTTP/2 connection of ours.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use h2::Reason;
use h2::client::SendRequest;
use http::{Request, Response};
use http_body::Body as _;
use tokio::task::AbortHandle;

use super::{Body, BodyError, PumpError, pump};
use crate::budget::Account;
use crate::http::BoxedRequest;
use crate::http::frames::STALL;
use crate::http::h1::OnInterim;

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
/// waiting is charged to `account`.
pub async fn exchange(
    send: &mut SendRequest<Bytes>,
    request: BoxedRequest,
    held: Option<Held>,
    account: Arc<Account>,
) -> Result<Response<Body>, ExchangeError> {
    let BoxedRequest { mut head, body } = request;
    let interim = head.extensions.remove::<OnInterim>();
    let request = Request::from_parts(*head, ());
    let ended = body.is_end_stream();
    let (mut response, mut stream) = send
        .send_request(request, ended)
        .map_err(ExchangeError::Unusable)?;
    let mut upload = (!ended).then(|| {
        Box::pin(async move { pump(body, &mut stream, Some(&account), Some(STALL)).await })
    });
    let head = poll_fn(|cx| {
        loop {
            match response.poll_informational(cx) {
                Poll::Ready(Some(Ok(head))) => {
                    if let Some(OnInterim(call)) = &interim {
                        call(head.into_parts().0);
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
