//! The two plain HTTP ports: metrics with a status page, and health.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Body, content type and status of an answer.
pub(crate) struct Page {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
}

/// Answers `GET` with what `page` has for a path, until the future is dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    page: impl Fn(&str) -> Option<Page> + Send + Sync + 'static,
) {
    let page = Arc::new(page);
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // The semaphore is never closed.
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let page = page.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, &*page);
                async move { Ok::<_, Infallible>(answer) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(socket), service);
            if let Err(error) = served.await {
                tracing::debug!("metrics or health connection: {error}");
            }
            drop(permit);
        });
    }
}

fn answer(
    request: &Request<Incoming>,
    page: &impl Fn(&str) -> Option<Page>,
) -> Response<Full<Bytes>> {
    let page = match *request.method() {
        Method::GET | Method::HEAD => page(request.uri().path()).unwrap_or(Page {
            status: StatusCode::NOT_FOUND,
            content_type: "text/plain",
            body: "there is no such page\n".into(),
        }),
        _ => Page {
            status: StatusCode::METHOD_NOT_ALLOWED,
            content_type: "text/plain",
            body: "only GET\n".into(),
        },
    };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    let content_type = hyper::header::HeaderValue::from_static(page.content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

const CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
