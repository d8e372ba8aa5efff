//! The tries of one request: endpoint, attempt, and whether and when there is another.

use std::future::pending;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::StatusCode;
use http::header::HeaderMap;
use http::request::Parts;
use http_body::Body as _;
use mesh_api::errors::ProxyError;
use tokio::time::{Instant as Clock, sleep};

use super::plan::{Goal, Plan};
use super::{Exchange, Stop};
use crate::balance::{Pick, PickContext};
use crate::budget::Account;
use crate::http::BoxedRequest;
use crate::http::attempt::{Answer, Failed, Way};
use crate::http::body::Body;
use crate::http::policy::{OverBudget, Policy, Timeouts};
use crate::http::retry::{Cause, Pushback, Replay, Told, should_retry};
use crate::http::watched::{Sent, grpc_status, is_failure};

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
        let of_request = self.bounds;
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
            let begun = Clock::now();
            let result = self.attempt(plan, goal, to, request).await;
            self.record.latency = begun.elapsed();
            let outcome = Outcome::of(&result, self.record.grpc);
            if result.is_ok() {
                self.session.count(&self.labels);
                // The answer's body is part of the try.
                self.bounds = match policy.timeouts.per_try {
                    Some(limit) => of_request.by(begun + limit, ProxyError::TryTimeout),
                    None => of_request,
                };
            }
            if outcome.of_client {
                self.record.pick = None;
            }
            let failed = result.as_ref().err().map(|failed| failed.error);
            let Some(cause) = outcome.cause else {
                source.commit();
                return give(result, to);
            };
            let pause = should_retry(
                policy,
                retries,
                cause,
                outcome.told,
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
            let over_deadline = of_request
                .deadline
                .is_some_and(|(deadline, _)| Clock::now() + pause >= deadline);
            if over_deadline {
                self.record.judge(outcome.success);
                return give(result, to);
            }
            if let Err(over) = goal.take_retry(plan) {
                self.record.request.retry_budget_exhausted();
                self.record.judge(outcome.success);
                return match over {
                    OverBudget::Unavailable => Err(ProxyError::RetryBudget.into()),
                    OverBudget::Original => give(result, to),
                };
            }
            if matches!(cause, Cause::IdleClosed) && retries == 0 {
                // A race that any server may win: it says nothing of the endpoint, to which a session may belong.
                self.record.pick = None;
            } else {
                self.record.judge(outcome.success);
                tried.push(to);
            }
            self.record.request.retried();
            if let Some(story) = &mut self.record.story {
                story.retries += 1;
            }
            last = failed.or(last);
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
        let policy = plan.policy.by_rule.balance(&rules.policy);
        let hash = policy.hash_key.as_ref();
        let info = self.session.pod.info.load();
        let session = plan.session.map(|token| token.endpoint);
        let mut context = PickContext {
            policy: &policy,
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
        self.record.tunnelled = way.is_tunnel();
        let timeouts = &plan.policy.timeouts;
        let service = match goal {
            Goal::Port(port) => Some(port),
            Goal::Address(_) => None,
        };
        let sending = way.send(&caller, service, request, timeouts.connect);
        if timeouts.per_try.is_none() && timeouts.response_headers.is_none() {
            return sending.await;
        }
        let error = {
            let mut sending = pin!(sending);
            tokio::select! {
                biased;
                sent = &mut sending => return sent,
                error = late(timeouts, &self.record.sent) => error,
            }
        };
        Err(Failed {
            error,
            cause: Some(Cause::Timeout),
        })
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

/// Waits until a try has had no answer for too long.
async fn late(timeouts: &Timeouts, sent: &Sent) -> ProxyError {
    let a_try = async {
        match timeouts.per_try {
            Some(limit) => sleep(limit).await,
            None => pending().await,
        }
    };
    let headers = async {
        let Some(limit) = timeouts.response_headers else {
            return pending().await;
        };
        sent.ended().await;
        sleep(limit).await;
    };
    tokio::select! {
        biased;
        () = headers => ProxyError::ResponseHeadersTimeout,
        () = a_try => ProxyError::TryTimeout,
    }
}

impl Goal {
    /// Takes a retry out of the Service's budget, or says what is done where none is left. A pod that is called by its
    /// address has no budget.
    fn take_retry(&self, plan: &Plan) -> Result<(), OverBudget> {
        let Self::Port(port) = self else {
            return Ok(());
        };
        let budget = plan.policy.by_rule.budget(&port.http.load().policy);
        match port.state.try_retry(&budget, Instant::now()) {
            true => Ok(()),
            false => Err(budget.over),
        }
    }
}

fn give(result: Result<Answer, Failed>, to: SocketAddr) -> Result<(Answer, SocketAddr), Stop> {
    match result {
        Ok(answer) => Ok((answer, to)),
        Err(failed) => Err(failed.error.into()),
    }
}

/// How a try ended.
struct Outcome {
    /// What it may be tried again for.
    cause: Option<Cause>,
    told: Told,
    /// Whether the endpoint did its part.
    success: bool,
    /// It says something of the client, and nothing of the endpoint.
    of_client: bool,
}

impl Outcome {
    fn of(result: &Result<Answer, Failed>, grpc: bool) -> Self {
        match result {
            Ok(answered) => Self::of_answer(answered, grpc),
            Err(failed) => Self {
                cause: failed.cause,
                told: Told {
                    status: StatusCode::from_u16(failed.error.status())
                        .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                    grpc_code: grpc.then(|| failed.error.grpc_status().into()),
                },
                success: false,
                of_client: is_of_client(failed.error),
            },
        }
    }

    fn of_answer(answered: &Answer, grpc: bool) -> Self {
        let headers = answered.response.headers();
        let status = answered.response.status();
        let code = grpc_status(headers).filter(|_| grpc);
        let failure = status.is_client_error() || status.is_server_error();
        let answered_so = failure || code.is_some_and(|code| code != 0);
        Self {
            cause: answered_so.then(|| Cause::Answer {
                pushback: Pushback::of(headers, SystemTime::now()),
            }),
            told: Told {
                status,
                grpc_code: code.map(u32::from),
            },
            success: !status.is_server_error() && !code.is_some_and(is_failure),
            of_client: answered.error.is_some_and(is_of_client),
        }
    }
}

/// Rows about the request's own sender.
const fn is_of_client(error: ProxyError) -> bool {
    matches!(
        error,
        ProxyError::BodyTooLarge
            | ProxyError::MalformedRequest
            | ProxyError::SlowRequest
            | ProxyError::WorkloadLimit
            | ProxyError::Cancelled
    )
}
