//! An API server made of a function, for tests of single answers. What needs a real one is in
//! `tests/kubernetes`.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// What the API server answers.
pub(crate) enum Answer {
    Json(u16, Value),
    /// Events of a watch, until the sender is gone.
    Watch(mpsc::Receiver<Value>),
}

/// A request: method, path with query, body.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) target: String,
    pub(crate) body: Value,
}

/// A client whose requests `answer` answers, and what was asked so far.
pub(crate) fn client(
    answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static,
) -> (Client, Arc<Mutex<Vec<Asked>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (log, answer) = (asked.clone(), Arc::new(answer));
    let service = tower::service_fn(move |request: Request<Body>| {
        let (log, answer) = (log.clone(), answer.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let asked = Asked {
                method: parts.method,
                target: parts.uri.to_string(),
                body: serde_json::from_slice(&body).unwrap_or_default(),
            };
            log.lock().push(asked.clone());
            Ok::<_, Infallible>(respond(answer(&asked)))
        }
    });
    (Client::new(service, "default"), asked)
}

fn respond(answer: Answer) -> Response<BoxBody<Bytes, Infallible>> {
    match answer {
        Answer::Json(code, value) => {
            let body = Full::new(Bytes::from(value.to_string())).boxed();
            Response::builder().status(code).body(body).unwrap()
        }
        Answer::Watch(events) => {
            let frames = ReceiverStream::new(events)
                .map(|event| Ok(Frame::data(Bytes::from(format!("{event}\n")))));
            Response::new(BodyExt::boxed(StreamBody::new(frames)))
        }
    }
}

/// The answer of an API server that refuses.
pub(crate) fn failure(code: u16, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "reason": reason, "message": reason, "code": code,
    });
    Answer::Json(code, status)
}
