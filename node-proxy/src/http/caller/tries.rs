//! The tries of one request: endpoint, attempt, and whether and when there is another.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::header::HeaderMap;
use http::request::Parts;
use http_body::Body as _;
use mesh_api::errors::ProxyError;
use tokio::time::Instant as Clock;

use super::plan::{Goal, Plan};
use super::{Exchange, Stop};
use crate::balance::{Pick, PickContext};
use crate::budget::Account;
use crate::http::BoxedRequest;
use crate::http::attempt::{Answer, Failed, Way};
use crate::http::body::Body;
use crate::http::policy::{OverBudget, Policy};
use crate::http::retry::{Cause, Pushback, Replay, should_retry};
use crate::http::watched::grpc_status;

/// No connect timeout is set: longer than any socket of the stock takes.
const LONG: Duration = Duration::from_secs(3600);

impl Exchange<'_> {
    /// Tries until there is an answer to give.
    pub(super) async fn tries(
        &mut self,
        plan: &Plan,
        goal: &Goal,
        parts: &Parts,
        body: Body,
    ) -> Result<(Answer, SocketAddr), Stop> {
        let policy = &plan.policy;
        let mut source = Source::new(body, policy, &self.session.pod.account);
        let mut tried = Vec::new();
        let mut retries = 0;
        let mut last: Option<ProxyError> = None;
        loop {
            let (pick, to) = match self.endpoint(plan, goal, &parts.headers, &tried) {
                Some(found) => found,
                None => return Err(last.unwrap_or(ProxyError::NoEndpoint).into()),
            };
            self.record.pick = pick;
            self.record.judged = false;
            let Some(body) = source.body() else {
                return Err(last.unwrap_or(ProxyError::Internal).into());
            };
            let head = Box::new(parts.clone());
            let request = BoxedRequest { head, body };
            let begun = Instant::now();
            let result = self.attempt(plan, goal, to, request).await;
            self.record.latency = begun.elapsed();
            if result.is_ok() {
                self.session.count(&self.labels);
            }
            let (cause, failed) = match &result {
                Ok(answered) => (answer_cause(answered, self.record.grpc), None),
                Err(failed) => (failed.cause, Some(failed.error)),
            };
            let Some(cause) = cause else {
                source.commit();
                return give(result, to);
            };
            let pause = should_retry(
                policy,
                retries,
                cause,
                &parts.method,
                source.is_replayable(),
                &mut rand::rng(),
            );
            let Some(pause) = pause else {
                source.commit();
                if failed.is_some() {
                    self.record.judge(false);
                }
                return give(result, to);
            };
            let over_deadline = self
                .bounds
                .deadline
                .is_some_and(|deadline| Clock::now() + pause >= deadline);
            if over_deadline || !may_retry(plan, goal) {
                if !over_deadline {
                    self.record.request.retry_budget_exhausted();
                }
                if failed.is_some() {
                    self.record.judge(false);
                }
                if policy.retry.budget.over == OverBudget::Unavailable && !over_deadline {
                    return Err(ProxyError::RetryBudget.into());
                }
                return give(result, to);
            }
            self.record.judge(false);
            self.record.request.retried();
            if let Some(story) = &mut self.record.story {
                story.retries += 1;
            }
            last = failed.or(last);
            tried.push(to);
            retries += 1;
            drop(result);
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// The next endpoint. One that failed is tried again only where there is no other.
    fn endpoint(
        &self,
        plan: &Plan,
        goal: &Goal,
        headers: &HeaderMap,
        tried: &[SocketAddr],
    ) -> Option<(Option<Pick>, SocketAddr)> {
        let port = match goal {
            Goal::Address(to) => return Some((None, *to)),
            Goal::Port(port) => port,
        };
        let rules = port.http.load();
        let policy = &rules.policy.balance;
        let hash = policy.hash_key.as_ref();
        let info = self.session.pod.info.load();
        let session = plan.session.map(|token| token.endpoint);
        let mut context = PickContext {
            policy,
            v6: self.session.v6,
            tried,
            hash: hash.and_then(|key| key.of(headers, self.session.source.ip())),
            session,
            node: &self.session.worker.context.node,
            zone: &info.zone,
            local_only: port.internal_traffic_local,
            now: Instant::now(),
        };
        let mut pick = port.endpoints.pick_with(&context);
        if pick.is_none() && !tried.is_empty() {
            context.tried = &[];
            pick = port.endpoints.pick_with(&context);
        }
        let pick = pick?;
        let to = pick.address();
        Some((Some(pick), to))
    }

    async fn attempt(
        &mut self,
        plan: &Plan,
        goal: &Goal,
        to: SocketAddr,
        request: BoxedRequest,
    ) -> Result<Answer, Failed> {
        let session = self.session;
        let caller = session.caller();
        let way = Way::to(&caller, to).map_err(Failed::unsent)?;
        self.labels.destination = way.party.clone();
        self.labels.security = way.security;
        self.record.request.move_to(&session.meter(&self.labels));
        if let Some(story) = &mut self.record.story {
            story.labels = self.labels.clone();
            story.destination = to;
        }
        let timeouts = &plan.policy.timeouts;
        let service = match goal {
            Goal::Port(port) => Some(port),
            Goal::Address(_) => None,
        };
        let connect = timeouts.connect.unwrap_or(LONG);
        let sending = way.send(&caller, service, request, connect);
        let (limit, error) = match (timeouts.per_try, timeouts.response_headers) {
            (None, None) => return sending.await,
            (Some(a), Some(b)) if b < a => (b, ProxyError::ResponseHeadersTimeout),
            (Some(a), _) => (a, ProxyError::TryTimeout),
            (None, Some(b)) => (b, ProxyError::ResponseHeadersTimeout),
        };
        tokio::time::timeout(limit, sending)
            .await
            .unwrap_or(Err(Failed {
                error,
                cause: Some(Cause::Timeout),
            }))
    }
}

/// A body, as often as it is needed.
enum Source {
    Empty,
    Once(Option<Body>),
    Replay(Replay<Body>),
}

impl Source {
    fn new(body: Body, policy: &Policy, account: &Arc<Account>) -> Self {
        if body.is_end_stream() {
            Self::Empty
        } else if policy.retry.attempts == 0 {
            Self::Once(Some(body))
        } else {
            Self::Replay(Replay::new(body, policy.retry.max_body).charged_to(account))
        }
    }

    fn body(&mut self) -> Option<Body> {
        match self {
            Self::Empty => Some(Body::empty()),
            Self::Once(body) => body.take(),
            Self::Replay(replay) => replay.attempt().map(Body::passing),
        }
    }

    /// There is no further try: what goes on does so without being kept.
    fn commit(&self) {
        if let Self::Replay(replay) = self {
            replay.commit();
        }
    }

    fn is_replayable(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Once(body) => body.is_some(),
            Self::Replay(replay) => replay.is_replayable(),
        }
    }
}

/// Whether the Service's budget has a retry left; a pod that is called by its address has none.
fn may_retry(plan: &Plan, goal: &Goal) -> bool {
    match goal {
        Goal::Port(port) => port.state.try_retry(&plan.policy, Instant::now()),
        Goal::Address(_) => true,
    }
}

fn give(result: Result<Answer, Failed>, to: SocketAddr) -> Result<(Answer, SocketAddr), Stop> {
    match result {
        Ok(answer) => Ok((answer, to)),
        Err(failed) => Err(failed.error.into()),
    }
}

/// What an answer may be tried again for.
fn answer_cause(answered: &Answer, grpc: bool) -> Option<Cause> {
    let headers = answered.response.headers();
    let status = answered.response.status();
    let grpc_code = grpc_status(headers).filter(|_| grpc).map(u32::from);
    let failure = status.is_client_error() || status.is_server_error();
    (failure || grpc_code.is_some_and(|code| code != 0)).then(|| Cause::Answer {
        status,
        grpc_code,
        pushback: Pushback::of(headers, SystemTime::now()),
    })
}
