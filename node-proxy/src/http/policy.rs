//! What is in force for a Service port or a route's rule, defaults filled in.
//!
//! Four writers come together: the Service's `TrafficPolicy`, its `XBackendTrafficPolicy` (GEP-3388,
//! GEP-1619), the route's rule (GEP-1731 `retry`, GEP-1742 `timeouts`, GEP-1619) and the `TrafficPolicy`
//! of that rule. A field of the Gateway API wins wherever it is set. Of the two `TrafficPolicy`s the
//! rule's wins: for timeouts field by field, otherwise a whole section at a time, so that what is
//! written next to each other is in force together. Circuit breaking, in-flight and rate limits
//! are states of a Service's endpoints and callers; a rule's `TrafficPolicy` does not change them. Balancing and the
//! retry budget are the backend's own, unless the rule's `TrafficPolicy` has them ([`ByRule`]).
//!
//! Of several `TrafficPolicy`s for one target each field is that of the first which sets it ([`together()`]).
//!
//! The controller has validated every value. What is out of range nevertheless is clamped, never refused:
//! an odd policy must not cost a Service its traffic.

mod merge;
mod together;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use mesh_api::identity::Identity;

use super::limits::{InFlight, Overload, Permit};
use super::retry::{Backoff, BudgetState};
use crate::balance;
pub use merge::effective;
pub use together::together;

/// The effective policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// How the Service's endpoints are chosen and left out.
    pub balance: balance::Policy,
    /// What is sent again.
    pub retry: Retry,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Requests in flight from this node to the Service.
    pub limits: Limits,
    /// Requests that a pod of the Service takes; judged at the callee's node. Default: any.
    pub rate_limit: Option<Arc<RateLimit>>,
    /// Failures made on purpose. Default: none.
    pub fault: Option<Fault>,
    /// What counts instead of the backend's own.
    pub by_rule: ByRule,
}

/// What a rule's own `TrafficPolicy` says of what is otherwise that of the Service which a request goes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ByRule {
    /// How endpoints are chosen; when they are left out is the Service's.
    pub balance: Option<balance::Policy>,
    /// How many retries the Service takes.
    pub budget: Option<Budget>,
}

impl ByRule {
    /// The balancing of a request to a Service with this policy.
    pub fn balance<'a>(&self, backend: &'a Policy) -> Cow<'a, balance::Policy> {
        match &self.balance {
            None => Cow::Borrowed(&backend.balance),
            Some(own) => Cow::Owned(balance::Policy {
                breaker: backend.balance.breaker,
                ..own.clone()
            }),
        }
    }

    /// The retry budget of a request to a Service with this policy. `retryConstraint` wins wherever it is set. There is one
    /// count of a Service's requests, so the interval is always the Service's.
    pub fn budget(&self, backend: &Policy) -> Budget {
        let of_service = backend.retry.budget;
        match self.budget {
            Some(own) if of_service.over == OverBudget::Original => Budget {
                interval: of_service.interval,
                ..own
            },
            _ => of_service,
        }
    }
}

/// What is sent again, how often, and when.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// How often a request is tried again. Default 2: three tries, as for a TCP connection. 0: never.
    pub attempts: u32,
    /// No connection could be opened, so nothing was sent. Default true.
    pub connect_failure: bool,
    /// The peer says that it did not process the request (RFC 9113, section 8.7). Default true.
    pub refused_stream: bool,
    /// The connection or stream broke before the answer's headers; the request may have been carried out.
    /// Default false: only a reused connection that closed under an idempotent request counts.
    pub reset_before_headers: bool,
    /// Statuses of answers that are tried again. Default none.
    pub statuses: Arc<[StatusCode]>,
    /// gRPC codes of answers that are tried again, a bit each. Default none.
    pub grpc_codes: u32,
    /// Pause before a retry.
    pub backoff: Backoff,
    /// Largest body that is kept to be sent again. Default 64 KiB, as Linkerd.
    pub max_body: usize,
    /// How many retries the Service takes.
    pub budget: Budget,
}

/// Pause grows from this: Linkerd's 25 ms.
pub const BACKOFF_BASE: Duration = Duration::from_millis(25);
/// Pause grows to this: Linkerd's 250 ms.
pub const BACKOFF_MAX: Duration = Duration::from_millis(250);
/// More than this is never kept of a body, whatever the policy says.
pub const MAX_BODY_BOUND: usize = 1 << 20;

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 2,
            connect_failure: true,
            refused_stream: true,
            reset_before_headers: false,
            statuses: Arc::new([]),
            grpc_codes: 0,
            backoff: Backoff {
                least: Duration::ZERO,
                base: BACKOFF_BASE,
                max: BACKOFF_MAX,
            },
            max_body: 64 << 10,
            budget: Budget::default(),
        }
    }
}

/// Retries allowed: `percent` of the requests (first tries) of the last `interval`, but at least
/// `floor` in every `floor_interval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Default 20, as GEP-3388: an outage is met with at most 1.2 times the load.
    pub percent: u32,
    /// Default 10 s, as GEP-3388.
    pub interval: Duration,
    /// Default 10, as GEP-3388.
    pub floor: u32,
    /// Default 1 s, as GEP-3388.
    pub floor_interval: Duration,
    /// What the caller gets over budget.
    pub over: OverBudget,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            percent: 20,
            interval: Duration::from_secs(10),
            floor: 10,
            floor_interval: Duration::from_secs(1),
            over: OverBudget::Original,
        }
    }
}

/// What the caller gets where the budget forbids a retry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverBudget {
    /// The answer or failure that would have been tried again. The default.
    #[default]
    Original,
    /// 503: `retryConstraint` is set (GEP-3388).
    Unavailable,
}

/// `None`: not bounded, but for connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// The whole request, retries included, to the end of the answer. Default none.
    pub request: Option<Duration>,
    /// One try, to the end of its answer. Default none.
    pub per_try: Option<Duration>,
    /// From the end of the request to the answer's headers. Default none.
    pub response_headers: Option<Duration>,
    /// A stream on which nothing moves. Default none.
    pub idle: Option<Duration>,
    /// Until there is a connection to the app. Default 10 s, which is also the most.
    pub connect: Option<Duration>,
}

/// Requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests of this node to the Service at once. Default: not limited.
    pub max_in_flight: Option<usize>,
    /// Requests that wait for one of those to end. Default 100, as Linkerd.
    pub max_pending: usize,
    /// How long they wait. Default 1 s: short, so that a full Service is said to be full.
    pub pending_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_in_flight: None,
            max_pending: 100,
            pending_timeout: Duration::from_secs(1),
        }
    }
}

/// Rates that a pod takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RateLimit {
    /// Of all callers together.
    pub total: Option<Rate>,
    /// Of each caller identity; those without one count as one.
    pub per_caller: Option<Rate>,
    /// Instead of `per_caller`, by namespace and service account.
    pub overrides: Vec<((String, String), Rate)>,
}

impl RateLimit {
    /// The rate of one caller.
    pub fn of(&self, caller: Option<&Identity>) -> Option<Rate> {
        caller
            .and_then(|caller| {
                self.overrides
                    .iter()
                    .find(|((namespace, account), _)| {
                        *namespace == caller.namespace() && *account == caller.service_account()
                    })
                    .map(|(_, rate)| *rate)
            })
            .or(self.per_caller)
    }
}

/// `requests` in each `interval`, evenly spread; `burst` may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// 0: none at all.
    pub requests: u32,
    /// More than zero.
    pub interval: Duration,
    /// At least 1.
    pub burst: u32,
}

/// Failures made on purpose. Shares are hundredths of a percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Share of the requests that is delayed.
    pub delay_share: u32,
    /// By how much.
    pub delay: Duration,
    /// Share of the requests that is aborted, after the delay if both.
    pub abort_share: u32,
    /// What they are answered with.
    pub abort: Abort,
}

/// The answer to an aborted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Status of the answer.
    pub status: StatusCode,
    /// Code for gRPC requests; `None`: `status` also for them.
    pub grpc_code: Option<u32>,
}

/// What is counted for a Service port. Lives on when its policy changes.
#[derive(Debug, Default)]
pub struct State {
    budget: BudgetState,
    in_flight: Arc<InFlight>,
}

impl State {
    /// Nothing counted.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a request (not its retries) into the budget.
    pub fn request(&self, budget: &Budget, now: Instant) {
        self.budget.request(budget, now);
    }

    /// Takes a retry from the budget. `false`: over budget, see [`Budget::over`].
    #[must_use]
    pub fn try_retry(&self, budget: &Budget, now: Instant) -> bool {
        self.budget.try_retry(budget, now)
    }

    /// Waits for a place among the requests in flight; the permit is the place. Cancel-safe.
    pub async fn admit(&self, policy: &Policy) -> Result<Permit, Overload> {
        self.in_flight.acquire(&policy.limits).await
    }

    /// Requests in flight and waiting. Both 0 where there is no limit.
    pub fn in_flight(&self) -> (usize, usize) {
        self.in_flight.used()
    }
}

/// All requests, in hundredths of a percent.
pub const WHOLE: u32 = 10_000;

#[cfg(test)]
mod tests;
