//! HTTP requests that come through a tunnel, each a stream of its own.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::request::Parts;
use http::{Method, Request, Response};

use super::{Judged, Tunnel};
use crate::http::answer::{self, is_grpc};
use crate::http::body::Body;
use crate::http::callee::{self, Call};
use crate::http::connection::{Interims, Told};
use crate::http::h1;
use crate::http::upgrade::{self, Upgraded};
use crate::http::{connection, wire};
use crate::pods::Pod;
use crate::telemetry::Security;

impl Tunnel {
    /// An HTTP request of its own.
    pub(super) async fn request(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
    ) {
        let mut flow = self.flow();
        let context = Arc::clone(&self.worker.context);
        let (mut parts, stream) = request.into_parts();
        let body = Body::http2(stream, &parts.headers);
        let admitted = async {
            let packed = wire::packed(&mut parts.headers)?;
            let envelope = wire::open(&mut parts)?;
            flow.destination_address = envelope.target;
            let judged = self.judge(envelope.target, Some(envelope.source), &mut flow);
            let judged = judged.await?;
            let body = wire::unpack(packed, &mut parts.headers, body).await?;
            Ok((judged, envelope, body))
        };
        let (judged, envelope, body) = match admitted.await {
            Ok(judged) => judged,
            Err(error) => {
                flow.fail(&context, error);
                let response = answer::refusal(error, is_grpc(&parts.headers));
                return connection::send(response, &mut respond, None).await;
            }
        };
        let Judged {
            pod,
            source,
            charge,
            captured,
        } = judged;
        let call = Call {
            caller: flow.source,
            source,
            target: envelope.target,
            service: envelope
                .service
                .and_then(|reference| context.table.service_port(envelope.target, &reference)),
            security: Security::MutualTls,
            connect: envelope.connect,
            alone: !envelope.retries,
        };
        self.serve_request(&pod, &call, (parts, body), &mut respond)
            .await;
        drop((charge, captured));
    }

    async fn serve_request(
        &self,
        pod: &Arc<Pod>,
        call: &Call,
        (mut parts, mut body): (Parts, Body),
        respond: &mut SendResponse<Bytes>,
    ) {
        let method = parts.method.clone();
        // What an upgraded connection brings follows on the stream.
        let follows = wire::is_upgrade(&parts).then(|| std::mem::take(&mut body));
        let interims = Interims::default();
        parts.extensions.insert(interims.sink());
        let request = Request::from_parts(parts, body).into();
        let response = {
            let mut delivering = pin!(callee::deliver(&self.worker, pod, call, request));
            loop {
                tokio::select! {
                    biased;
                    told = interims.or_end(&mut delivering) => match told {
                        Told::Interim(head) => connection::inform(head, respond),
                        Told::End(response) => break response,
                    },
                    // The caller gave up.
                    _reset = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return,
                }
            }
        };
        while let Some(head) = interims.take() {
            connection::inform(head, respond);
        }
        let (mut parts, body) = response.into_parts();
        let upgraded = parts.extensions.remove::<Upgraded>();
        wire::seal_response(&mut parts);
        let account = Some(&pod.account);
        match (upgraded.and_then(Upgraded::into_raw), follows) {
            (Some((raw, traffic, _held)), Some(follows)) => {
                // A length of what is no body; HTTP/2 would hold the stream to it.
                parts.headers.remove(http::header::CONTENT_LENGTH);
                let (sends, writing) = upgrade::split(raw, traffic, follows);
                let sends = wire::pack(self.peer.large_heads, &mut parts.headers, sends);
                let response = Response::from_parts(parts, sends);
                // Either direction may end before the other; what breaks one ends both. Boxed: few requests need it.
                let sending = async {
                    connection::send(response, respond, account).await;
                    Ok(())
                };
                let both = Box::pin(async { tokio::try_join!(sending, writing) });
                if let Err(error) = both.await {
                    tracing::debug!(pod = %pod.uid, %error, "upgraded connection ended");
                }
            }
            _ => {
                // No DATA may follow on the head of an answer that has no body.
                let body = match h1::has_no_body(&method, parts.status) {
                    true => body,
                    false => wire::pack(self.peer.large_heads, &mut parts.headers, body),
                };
                connection::send(Response::from_parts(parts, body), respond, account).await;
            }
        }
    }
}

/// Anything but the CONNECT of a TCP connection.
pub(super) fn is_request(request: &Request<RecvStream>) -> bool {
    request.method() != Method::CONNECT || request.extensions().get::<h2::ext::Protocol>().is_some()
}
