//! `TrafficPolicy` of `warren-mesh.io/v1alpha1`: what the Gateway API has no field for.
//!
//! One object says for Services, or for rules of routes, how requests are balanced, retried, timed out, limited
//! and, on purpose, failed. Everything is optional; what is not set is as without the policy. Where the
//! Gateway API has a field and it is set (HTTPRoute `retry` and `timeouts`, XBackendTrafficPolicy
//! `retryConstraint`), that one counts. The CRD is `deploy/crds/trafficpolicies.warren-mesh.io.yaml`; fields,
//! defaults and ranges are there, here and in `docs/reference/traffic-policy.md`, which also says how several
//! policies come together: keep them equal.

pub(crate) mod check;

use serde::{Deserialize, Serialize};

use super::gateway::{Custom, Fraction};

/// How traffic to a Service, or of a route's rule, is treated.
pub type TrafficPolicy = Custom<TrafficPolicySpec>;

/// What a TrafficPolicy says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficPolicySpec {
    /// What it is for, in its own namespace: 1 to 16.
    #[serde(default)]
    pub target_refs: Vec<TargetReference>,
    /// Which endpoint a request goes to.
    pub load_balancing: Option<LoadBalancing>,
    /// Which requests are tried again.
    pub retry: Option<Retry>,
    /// How long things may take.
    pub timeouts: Option<Timeouts>,
    /// When an endpoint gets no more requests for a while. Services only.
    pub circuit_breaking: Option<CircuitBreaking>,
    /// How many requests may be under way. Services only.
    pub limits: Option<Limits>,
    /// How many requests in a time the Service's pods take. Services only.
    pub rate_limit: Option<RateLimit>,
    /// Failures on purpose.
    pub fault_injection: Option<FaultInjection>,
}

/// An object the policy is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetReference {
    /// Empty for Services, `gateway.networking.k8s.io` for routes.
    #[serde(default)]
    pub group: String,
    /// `Service`, `HTTPRoute` or `GRPCRoute`.
    pub kind: String,
    /// Name of the object.
    pub name: String,
    /// Service: name of a port. Route: name of a rule. All unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
}

/// Which endpoint a request goes to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    /// `PeakEWMA` (unless set), `LeastRequest`, `RingHash`, `Random` or `RoundRobin`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// What requests are told apart by. Needed for `RingHash`, and only for it.
    pub hash_key: Option<HashKey>,
    /// How long the share of a new endpoint grows. Duration, 0s to 1h; unless set the type's own way.
    pub slow_start: Option<String>,
}

/// What requests are told apart by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HashKey {
    /// `Header`, `Cookie` or `SourceIP`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name of the header or cookie; not with `SourceIP`.
    pub name: Option<String>,
}

/// Which requests are tried again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Retry {
    /// How often a request is tried again. 0 to 10; 0 switches retries off.
    pub attempts: Option<i64>,
    /// `ConnectFailure`, `RefusedStream`, `ResetBeforeHeaders`. An HTTPRoute's `retry` means all three.
    #[serde(default)]
    pub conditions: Vec<String>,
    /// HTTP status codes, 400 to 599.
    #[serde(default)]
    pub status_codes: Vec<i64>,
    /// gRPC status codes by name, such as `UNAVAILABLE`.
    #[serde(default)]
    pub grpc_codes: Vec<String>,
    /// How long to wait before a retry.
    pub backoff: Option<Backoff>,
    /// Largest request body that is kept to be sent again. Bytes, 0 to 1,048,576.
    pub max_body_bytes: Option<i64>,
    /// How far retries may add to the load.
    pub budget: Option<Budget>,
}

/// How long to wait before a retry: doubled each time, with full jitter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backoff {
    /// Bound of the first pause. Duration, 1ms to 1m.
    pub base: Option<String>,
    /// Bound of all pauses. Duration, 1ms to 5m, at least `base`.
    pub max: Option<String>,
}

/// Retries allowed: a share of the requests, but at least some a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// Percent of the requests of the last `interval`. 0 to 100, default 20.
    pub percent: Option<i64>,
    /// So many retries a second are allowed whatever the share is: a floor, nothing that is added to it. 0 to
    /// 1,000,000, default 10.
    pub min_per_second: Option<i64>,
    /// Duration, 1s to 1h, default 10s.
    pub interval: Option<String>,
}

/// How long things may take. Durations, 0s to 24h; 0s: without end, but for `connect`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timeouts {
    /// The whole request, retries included. Default: without end.
    pub request: Option<String>,
    /// Each attempt, to the end of its answer; not longer than `request`. Default: without end.
    pub per_try: Option<String>,
    /// Until the head of the response. Default: without end.
    pub response_headers: Option<String>,
    /// A stream on which nothing moves. Default: without end.
    pub idle: Option<String>,
    /// Until there is a connection to the app, on whichever node. Default 10s, which is also the most: 0s and what
    /// is longer mean 10s.
    pub connect: Option<String>,
}

/// When an endpoint gets no more requests for a while. The breaker is off unless one of `consecutiveFailures`
/// and `minSuccessPercent` is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CircuitBreaking {
    /// So many failures one after the other. 1 to 1,000.
    pub consecutive_failures: Option<i64>,
    /// A lower share of good answers in the window, in percent. 1 to 100.
    pub min_success_percent: Option<i64>,
    /// With fewer requests in the window the share is not judged. 1 to 1,000,000. Needs `minSuccessPercent`.
    pub min_requests: Option<i64>,
    /// Over which the share is judged. Duration, 1s to 1h. Needs `minSuccessPercent`.
    pub window: Option<String>,
    /// For how long, the first time. Duration, 100ms to 1h.
    pub base_ejection: Option<String>,
    /// For how long at most. Duration, 100ms to 24h, at least `baseEjection`.
    pub max_ejection: Option<String>,
    /// Largest share of the endpoints that is out at once, in percent. 0 to 100.
    pub max_ejected_percent: Option<i64>,
}

/// How many requests may be under way, for each node that calls.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Requests to the Service that are in flight at once. 1 to 1,000,000.
    pub max_in_flight: Option<i64>,
    /// Requests that wait for one of those to end. 0 to 1,000,000. Needs `maxInFlight`.
    pub max_pending: Option<i64>,
    /// How long they wait. Duration, 1ms to 1m. Needs `maxInFlight`.
    pub pending_timeout: Option<String>,
}

/// How many requests in a time each of the Service's pods takes; judged at its node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    /// Of all callers.
    pub total: Option<Rate>,
    /// Of each caller identity.
    pub per_caller: Option<Rate>,
    /// Instead of `perCaller` for these callers. At most 64, each service account once.
    #[serde(default)]
    pub overrides: Vec<RateOverride>,
}

/// Requests in a time, spread evenly (GCRA).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rate {
    /// Requests in each interval. 1 to 1,000,000.
    pub requests: i64,
    /// Duration, 1ms to 24h, default 1s.
    pub interval: Option<String>,
    /// Requests that may come at once. 1 to 1,000,000, default: `requests`.
    pub burst: Option<i64>,
}

/// A rate for one service account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RateOverride {
    /// Who calls.
    pub service_account: ServiceAccountReference,
    /// What it may.
    pub rate: Rate,
}

/// A service account of any namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccountReference {
    /// The policy's own unless set.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
}

/// Failures on purpose, to test what callers do then.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FaultInjection {
    /// Requests wait before they go on.
    pub delay: Option<Delay>,
    /// Requests are answered with a failure.
    pub abort: Option<Abort>,
}

/// Requests wait before they go on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Delay {
    /// For how long. Duration, 1ms to 5m.
    pub duration: String,
    /// Which share of the requests, in percent. 0 to 100, default 100; not with `fraction`.
    pub percent: Option<i64>,
    /// The same as a fraction; counted in hundredths of a percent, rounded up.
    pub fraction: Option<Fraction>,
}

/// Requests are answered with a failure.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Abort {
    /// HTTP status of the answer. 400 to 599, default 503.
    pub http_status: Option<i64>,
    /// gRPC status of the answer to gRPC requests, by name; unless set what `httpStatus` means there.
    pub grpc_status: Option<String>,
    /// Which share of the requests, in percent. 0 to 100, default 100; not with `fraction`.
    pub percent: Option<i64>,
    /// The same as a fraction; counted in hundredths of a percent, rounded up.
    pub fraction: Option<Fraction>,
}

/// The number of a gRPC status (gRPC's `statuscodes.md`).
pub(crate) fn grpc_code(name: &str) -> Option<u32> {
    let found = GRPC_CODES.iter().position(|known| *known == name);
    found.and_then(|i| u32::try_from(i).ok())
}

/// In the order of their numbers.
pub(crate) const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
