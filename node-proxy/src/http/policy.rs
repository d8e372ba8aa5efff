//! What is in force for a Service port or a route's rule, defaults filled in.
//!
//! Four writers come together: the Service's `TrafficPolicy`, its `XBackendTrafficPolicy` (GEP-3388,
//! GEP-1619), the route's rule (GEP-1731 `retry`, GEP-1742 `timeouts`, GEP-1619) and the `TrafficPolicy`
//! of that rule. A field of the Gateway API wins wherever it is set. Of the two `TrafficPolicy`s the
//! rule's wins: for timeouts field by field, otherwise a whole section at a time, so that what is
//! written next to each other is in force together. Circuit breaking, in-flight and rate limits
//! are states of a Service's endpoints and callers; a rule's `TrafficPolicy` does not change them.
//!
//! The controller has validated every value. What is out of range nevertheless is clamped, never refused:
//! an odd policy must not cost a Service its traffic.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use http::header::HeaderName;
use mesh_api::identity::Identity;
use mesh_api::proto::mesh;

use super::limits::{InFlight, Overload, Permit};
use super::retry::{Backoff, BudgetState};
use crate::balance;

/// The effective policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// How endpoints are chosen and left out.
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
    /// Requests of one session stay with one endpoint. Default: none.
    pub session: Option<Session>,
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

/// `None`: not bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// The whole request, retries included, to the end of the answer. Default none.
    pub request: Option<Duration>,
    /// One try. Default none.
    pub per_try: Option<Duration>,
    /// From the end of the request to the answer's headers. Default none.
    pub response_headers: Option<Duration>,
    /// A stream on which nothing moves. Default none.
    pub idle: Option<Duration>,
    /// Until there is a connection. Default 10 s.
    pub connect: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            request: None,
            per_try: None,
            response_headers: None,
            idle: None,
            connect: Some(Duration::from_secs(10)),
        }
    }
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

/// Session persistence (GEP-1619).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// What carries the session.
    pub kind: SessionKind,
    /// Its end, however much it is used. `None`: none.
    pub absolute_timeout: Option<Duration>,
}

/// What carries a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionKind {
    /// A cookie of that name. `permanent`: with the absolute timeout as its `Max-Age`.
    Cookie {
        /// Default [`SESSION_COOKIE`].
        name: Arc<str>,
        /// Outlives the browser's session.
        permanent: bool,
    },
    /// A header of that name. Default [`SESSION_HEADER`].
    Header(HeaderName),
}

/// Cookie of a session where the user named none.
pub const SESSION_COOKIE: &str = "warren-session";
/// Header of a session where the user named none. Not `warren-`: those never come from an app.
pub const SESSION_HEADER: HeaderName = HeaderName::from_static("x-session-id");

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
    pub fn request(&self, policy: &Policy, now: Instant) {
        self.budget.request(&policy.retry.budget, now);
    }

    /// Takes a retry from the budget. `false`: over budget, see [`Budget::over`].
    #[must_use]
    pub fn try_retry(&self, policy: &Policy, now: Instant) -> bool {
        self.budget.try_retry(&policy.retry.budget, now)
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

/// The policy in force. `service`, `backend`: those of the Service; `rule`, `rule_policy`: those of the
/// route's rule.
pub fn effective(
    service: Option<&mesh::TrafficPolicy>,
    backend: Option<&mesh::BackendTrafficPolicy>,
    rule: Option<&mesh::RouteRule>,
    rule_policy: Option<&mesh::TrafficPolicy>,
) -> Policy {
    // Where only one of the two can say it, or a section is taken as a whole.
    fn section<'a, T>(
        rule: Option<&'a mesh::TrafficPolicy>,
        service: Option<&'a mesh::TrafficPolicy>,
        of: impl Fn(&'a mesh::TrafficPolicy) -> Option<&'a T>,
    ) -> Option<&'a T> {
        rule.and_then(&of).or_else(|| service.and_then(&of))
    }
    let persistence = rule
        .and_then(|rule| rule.session_persistence.as_ref())
        .or_else(|| backend.and_then(|backend| backend.session_persistence.as_ref()));
    Policy {
        balance: balance_policy(
            section(rule_policy, service, |p| p.load_balancing.as_ref()),
            service.and_then(|p| p.circuit_breaking.as_ref()),
        ),
        retry: retry(
            section(rule_policy, service, |p| p.retry.as_ref()),
            section(rule_policy, service, |p| {
                p.retry.as_ref().and_then(|retry| retry.budget.as_ref())
            }),
            backend.and_then(|backend| backend.retry_constraint.as_ref()),
            rule.and_then(|rule| rule.retry.as_ref()),
        ),
        timeouts: timeouts(
            service.and_then(|p| p.timeouts.as_ref()),
            rule_policy.and_then(|p| p.timeouts.as_ref()),
            rule,
        ),
        limits: service
            .and_then(|p| p.limits.as_ref())
            .map_or_else(Limits::default, limits),
        rate_limit: service
            .and_then(|p| p.rate_limit.as_ref())
            .map(|rates| Arc::new(rate_limit(rates))),
        fault: section(rule_policy, service, |p| p.fault.as_ref()).map(fault),
        session: persistence.map(session),
    }
}

fn balance_policy(
    load_balancing: Option<&mesh::LoadBalancing>,
    circuit_breaking: Option<&mesh::CircuitBreaking>,
) -> balance::Policy {
    let mut policy = balance::Policy::default();
    if let Some(wanted) = load_balancing {
        use mesh::LoadBalancer;
        policy.algorithm = match wanted.r#type() {
            LoadBalancer::Unspecified | LoadBalancer::PeakEwma => balance::Algorithm::PeakEwma,
            LoadBalancer::LeastRequest => balance::Algorithm::LeastRequest,
            LoadBalancer::RingHash => balance::Algorithm::RingHash,
            LoadBalancer::Random => balance::Algorithm::Random,
            LoadBalancer::RoundRobin => balance::Algorithm::RoundRobin,
        };
        policy.hash_key = match wanted.hash_key() {
            mesh::HashKey::Unspecified => None,
            mesh::HashKey::Header => wanted.hash_name.parse().ok().map(balance::HashKey::Header),
            mesh::HashKey::Cookie => {
                Some(balance::HashKey::Cookie(wanted.hash_name.as_str().into()))
            }
            mesh::HashKey::Source => Some(balance::HashKey::Source),
        };
        policy.slow_start = wanted.slow_start_ms.and_then(set_millis);
    }
    policy.breaker = circuit_breaking.map(|wanted| {
        let defaults = balance::Breaker::default();
        let base = wanted
            .base_ejection_ms
            .and_then(set_millis)
            .unwrap_or(defaults.base_ejection);
        let max = wanted
            .max_ejection_ms
            .and_then(set_millis)
            .unwrap_or(defaults.max_ejection);
        balance::Breaker {
            consecutive_failures: wanted
                .consecutive_failures
                .unwrap_or(defaults.consecutive_failures),
            min_success_percent: wanted.min_success_percent.map(|percent| percent.min(100)),
            min_requests: wanted.min_requests.unwrap_or(defaults.min_requests).max(1),
            window: wanted
                .window_ms
                .and_then(set_millis)
                .unwrap_or(defaults.window),
            base_ejection: base,
            max_ejection: max.max(base),
            max_ejected_percent: wanted
                .max_ejected_percent
                .unwrap_or(defaults.max_ejected_percent)
                .min(100),
        }
    });
    policy
}

fn retry(
    policy: Option<&mesh::RetryPolicy>,
    budget: Option<&mesh::RetryBudget>,
    constraint: Option<&mesh::RetryConstraint>,
    route: Option<&mesh::RouteRetry>,
) -> Retry {
    let mut retry = Retry {
        budget: retry_budget(budget, constraint),
        ..Retry::default()
    };
    if let Some(policy) = policy {
        retry.attempts = policy.attempts.unwrap_or(retry.attempts);
        if !policy.conditions.is_empty() {
            let has = |condition| policy.conditions().any(|c| c == condition);
            retry.connect_failure = has(mesh::RetryCondition::ConnectFailure);
            retry.refused_stream = has(mesh::RetryCondition::RefusedStream);
            retry.reset_before_headers = has(mesh::RetryCondition::ResetBeforeHeaders);
        }
        retry.statuses = statuses(&policy.status_codes);
        retry.grpc_codes = policy
            .grpc_codes
            .iter()
            .filter(|code| **code < u32::BITS)
            .fold(0, |set, code| set | 1 << code);
        if let Some(base) = policy.backoff_base_ms {
            retry.backoff.base = millis(base);
        }
        if let Some(max) = policy.backoff_max_ms {
            retry.backoff.max = millis(max);
        }
        retry.backoff.max = retry.backoff.max.max(retry.backoff.base);
        if let Some(max) = policy.max_body_bytes {
            retry.max_body =
                usize::try_from(max).map_or(MAX_BODY_BOUND, |max| max.min(MAX_BODY_BOUND));
        }
    }
    if let Some(route) = route {
        retry.attempts = route.attempts.unwrap_or(retry.attempts);
        if !route.codes.is_empty() {
            retry.statuses = statuses(&route.codes);
        }
        // GEP-1731: with the stanza, every kind of connection error is tried again.
        retry.connect_failure = true;
        retry.refused_stream = true;
        retry.reset_before_headers = true;
        if let Some(least) = route.backoff_ms.map(millis) {
            // GEP-1731: never sooner; what comes on top keeps callers apart.
            retry.backoff = Backoff {
                least,
                base: least / 4,
                max: least.max(BACKOFF_MAX),
            };
        }
    }
    retry
}

fn retry_budget(
    budget: Option<&mesh::RetryBudget>,
    constraint: Option<&mesh::RetryConstraint>,
) -> Budget {
    let mut effective = Budget::default();
    if let Some(constraint) = constraint {
        return Budget {
            percent: constraint.budget_percent.min(100),
            interval: set_millis(constraint.budget_interval_ms).unwrap_or(effective.interval),
            floor: constraint.min_retry_count,
            floor_interval: set_millis(constraint.min_retry_interval_ms)
                .unwrap_or(effective.floor_interval),
            over: OverBudget::Unavailable,
        };
    }
    if let Some(budget) = budget {
        effective.percent = budget.percent.unwrap_or(effective.percent).min(100);
        effective.floor = budget.min_per_second.unwrap_or(effective.floor);
        effective.interval = budget
            .interval_ms
            .and_then(set_millis)
            .unwrap_or(effective.interval);
    }
    effective
}

fn statuses(codes: &[u32]) -> Arc<[StatusCode]> {
    codes
        .iter()
        .filter_map(|code| StatusCode::from_u16(u16::try_from(*code).ok()?).ok())
        .collect()
}

fn timeouts(
    service: Option<&mesh::TimeoutPolicy>,
    rule: Option<&mesh::TimeoutPolicy>,
    route: Option<&mesh::RouteRule>,
) -> Timeouts {
    let mut timeouts = Timeouts::default();
    // The more specific comes later and wins; 0 takes a timeout away.
    let mut set = |of: fn(&mut Timeouts) -> &mut Option<Duration>, wanted: Option<u64>| {
        if let Some(wanted) = wanted {
            *of(&mut timeouts) = set_millis(wanted);
        }
    };
    for policy in [service, rule].into_iter().flatten() {
        let mesh::TimeoutPolicy {
            request_ms,
            per_try_ms,
            response_headers_ms,
            idle_ms,
            connect_ms,
        } = *policy;
        set(|t| &mut t.request, request_ms);
        set(|t| &mut t.per_try, per_try_ms);
        set(|t| &mut t.response_headers, response_headers_ms);
        set(|t| &mut t.idle, idle_ms);
        set(|t| &mut t.connect, connect_ms);
    }
    if let Some(route) = route {
        set(|t| &mut t.request, route.request_timeout_ms);
        set(|t| &mut t.per_try, route.backend_request_timeout_ms);
    }
    timeouts
}

fn limits(wanted: &mesh::LimitPolicy) -> Limits {
    let defaults = Limits::default();
    Limits {
        max_in_flight: wanted.max_in_flight.map(|max| max as usize),
        max_pending: wanted
            .max_pending
            .map_or(defaults.max_pending, |max| max as usize),
        pending_timeout: wanted
            .pending_timeout_ms
            .map_or(defaults.pending_timeout, millis),
    }
}

fn rate_limit(wanted: &mesh::RateLimitPolicy) -> RateLimit {
    let rate = |rate: &mesh::Rate| Rate {
        requests: rate.requests,
        interval: set_millis(rate.interval_ms).unwrap_or(Duration::from_secs(1)),
        burst: rate.burst.max(1),
    };
    RateLimit {
        total: wanted.total.as_ref().map(rate),
        per_caller: wanted.per_caller.as_ref().map(rate),
        overrides: wanted
            .overrides
            .iter()
            .filter_map(|o| {
                let caller = (o.namespace.clone(), o.service_account.clone());
                Some((caller, rate(o.rate.as_ref()?)))
            })
            .collect(),
    }
}

fn fault(wanted: &mesh::FaultInjection) -> Fault {
    let status = u16::try_from(wanted.abort_status)
        .ok()
        .and_then(|status| StatusCode::from_u16(status).ok())
        .filter(|status| status.as_u16() >= 200)
        .unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    Fault {
        delay_share: wanted.delay_share.min(WHOLE),
        delay: millis(wanted.delay_ms),
        abort_share: wanted.abort_share.min(WHOLE),
        abort: Abort {
            status,
            grpc_code: wanted.abort_grpc_code,
        },
    }
}

fn session(wanted: &mesh::SessionPersistence) -> Session {
    let name = wanted.session_name.as_str();
    let kind = match wanted.r#type() {
        mesh::SessionPersistenceType::Cookie => SessionKind::Cookie {
            name: if name.is_empty() {
                SESSION_COOKIE
            } else {
                name
            }
            .into(),
            permanent: wanted.permanent,
        },
        mesh::SessionPersistenceType::Header => {
            SessionKind::Header(name.parse().unwrap_or(SESSION_HEADER))
        }
    };
    Session {
        kind,
        absolute_timeout: set_millis(wanted.absolute_timeout_ms),
    }
}

/// All requests, in hundredths of a percent.
pub const WHOLE: u32 = 10_000;

/// Longer than this is as good as for ever, and still safe to add to a point in time.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis).min(LONGEST)
}

/// `None` for 0, which means "none" in every policy.
fn set_millis(value: u64) -> Option<Duration> {
    (value > 0).then(|| millis(value))
}

#[cfg(test)]
mod tests;
