//! Metrics of requests.
//!
//! A request is counted by an [`InFlight`] guard that is made from the [`RequestMeter`] of its labels. The meter
//! is found once for each set of labels: a [`MeterCache`], one a connection, compares pointers; behind it is a
//! map for the process. From there a request takes a handful of atomic additions and one uncontended lock
//! of its meter: no allocation, no hashing, nothing that is shared by all requests.
//!
//! Two kinds of label sets: counters of requests have all labels ([`RequestLabels`] and [`Outcome`]);
//! histograms, the gauge and the counters of retries, a series of which is some fifty lines, have no
//! principals, backend, protocol or outcome.
//!
//! Invariants:
//! - every request that was started is counted exactly once, also when its task is dropped;
//! - no label value comes from the wire but the status and gRPC status, of which one meter keeps at most
//!   [`MAX_OUTCOMES`]; so one workload cannot use up the series of all.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use parking_lot::RwLock;

use super::histogram::{Durations, Sizes};
use super::series::{Bounds, Metric, Series, take};
use super::{Party, Reporter, Security, UNKNOWN};

mod encode;

/// What a request is counted under, beside its outcome. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestLabels {
    /// Which half this is.
    pub reporter: Reporter,
    /// The caller.
    pub source: Party,
    /// The callee; unknown until an endpoint has been picked.
    pub destination: Party,
    /// `name.namespace` of the Service that was addressed.
    pub service: Option<Arc<str>>,
    /// `namespace/name` of the route whose rule matched; `None` without a route.
    pub route: Option<Arc<str>>,
    /// `name.namespace:port` of the backend that was picked; `None` without a route.
    pub backend: Option<Arc<str>>,
    /// What the caller speaks.
    pub protocol: Protocol,
    /// How the request travels.
    pub security: Security,
}

/// What a caller speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.0 and 1.1
    Http1,
    /// HTTP/2, not gRPC
    Http2,
    /// gRPC: HTTP/2 with a content type of `application/grpc`
    Grpc,
}

impl Protocol {
    /// Label value, and the access log's.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Status that the caller was sent; 0 if it was sent none.
    pub status: u16,
    /// `grpc-status` of a gRPC request, from trailers or headers. Only what fits a byte is a status.
    pub grpc_status: Option<u8>,
    /// Why the proxy ended the request, or what it did to it.
    pub error: Option<ProxyError>,
    /// Body bytes from the caller.
    pub request_bytes: u64,
    /// Body bytes to the caller.
    pub response_bytes: u64,
}

/// All metrics of requests.
#[derive(Debug)]
pub struct HttpTelemetry {
    meters: Series<RequestLabels, RequestMeter>,
    totals: Series<TotalsLabels, Totals>,
    budget: Arc<Budget>,
    epoch: Instant,
    expiry: Duration,
}

impl HttpTelemetry {
    pub(super) fn new(bounds: Bounds) -> Arc<Self> {
        let budget = Arc::new(Budget {
            series: AtomicUsize::new(0),
            limit: bounds.series,
            other: Default::default(),
        });
        let epoch = Instant::now();
        // Meters hold their totals, and have waited out the expiry.
        let totals = Series::new(bounds.histograms, Duration::ZERO, |_| Totals::default());
        let other = |reporter| RequestMeter {
            reporter,
            totals: totals.other(reporter),
            outcomes: RwLock::default(),
            room: 0,
            budget: Arc::clone(&budget),
            epoch,
            used: AtomicU32::new(0),
        };
        Arc::new(Self {
            meters: Series::new(bounds.series, bounds.expiry, other),
            totals,
            budget,
            epoch,
            expiry: bounds.expiry,
        })
    }

    /// The meter of these labels. Hashes them all: see [`MeterCache`].
    pub fn meter(&self, labels: &RequestLabels) -> Arc<RequestMeter> {
        self.meter_at(labels, Instant::now())
    }

    fn meter_at(&self, labels: &RequestLabels, now: Instant) -> Arc<RequestMeter> {
        let reporter = labels.reporter;
        self.meters.get(labels, reporter, now, || RequestMeter {
            reporter,
            totals: self
                .totals
                .get(&TotalsLabels::of(labels), reporter, now, Totals::default),
            outcomes: RwLock::default(),
            room: MAX_OUTCOMES,
            budget: Arc::clone(&self.budget),
            epoch: self.epoch,
            used: AtomicU32::new(0),
        })
    }

    /// Ends what has not been used for the expiry.
    fn sweep(&self, now: Instant) {
        if let Some(since) = now.checked_sub(self.expiry) {
            for (_, meter) in self.meters.all() {
                meter.sweep(since);
            }
        }
        self.meters.sweep(now);
        self.totals.sweep(now);
    }
}

/// Counts the requests of one set of labels.
#[derive(Debug)]
pub struct RequestMeter {
    reporter: Reporter,
    totals: Arc<Totals>,
    outcomes: RwLock<Vec<Counted>>,
    /// How many outcomes this meter may tell apart.
    room: usize,
    budget: Arc<Budget>,
    epoch: Instant,
    /// When its last request ended, in seconds since the epoch.
    used: AtomicU32,
}

/// Most outcomes (method, status, gRPC status, flag) of one meter; more are counted as `other`.
pub const MAX_OUTCOMES: usize = 64;

impl RequestMeter {
    /// A request begins now.
    pub fn start(self: &Arc<Self>, method: &http::Method) -> InFlight {
        self.start_at(method, Instant::now())
    }

    /// A request has begun, before its labels were known.
    pub fn start_at(self: &Arc<Self>, method: &http::Method, started: Instant) -> InFlight {
        self.totals.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight {
            meter: Arc::clone(self),
            method: MethodClass::of(method),
            started,
            headers: None,
            outcome: None,
        }
    }

    fn count(&self, key: OutcomeKey, now: Instant) {
        let now = seconds(self.epoch, now);
        touch(&self.used, now);
        let find = |outcomes: &[Counted]| {
            let counted = outcomes.iter().find(|c| c.key == key);
            counted.inspect(|c| c.count(now)).is_some()
        };
        if find(&self.outcomes.read()) {
            return;
        }
        let mut outcomes = self.outcomes.write();
        if find(&outcomes) {
            return;
        }
        if outcomes.len() < self.room && take(&self.budget.series, self.budget.limit) {
            let counted = Counted {
                key,
                count: AtomicU64::new(0),
                used: AtomicU32::new(0),
            };
            counted.count(now);
            outcomes.push(counted);
        } else {
            self.budget.other[self.reporter as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Ends outcomes that were not seen after `since`.
    fn sweep(&self, since: Instant) {
        let mut outcomes = self.outcomes.write();
        let before = outcomes.len();
        outcomes.retain(|counted| self.is_after(&counted.used, since));
        let ended = before - outcomes.len();
        self.budget.series.fetch_sub(ended, Ordering::Relaxed);
    }

    fn is_after(&self, used: &AtomicU32, since: Instant) -> bool {
        let used = Duration::from_secs(used.load(Ordering::Relaxed).into());
        self.epoch + used > since
    }
}

impl Metric for RequestMeter {
    fn used_since(&self, since: Instant) -> bool {
        self.is_after(&self.used, since)
    }
}

impl Drop for RequestMeter {
    fn drop(&mut self) {
        let ended = self.outcomes.get_mut().len();
        self.budget.series.fetch_sub(ended, Ordering::Relaxed);
    }
}

/// A request that is being carried: in the gauge until it is dropped. Dropped without
/// [`finish`](Self::finish) it counts as [`ProxyError::Cancelled`] with no status.
#[derive(Debug)]
pub struct InFlight {
    meter: Arc<RequestMeter>,
    method: MethodClass,
    started: Instant,
    headers: Option<Instant>,
    outcome: Option<Outcome>,
}

impl InFlight {
    /// When the request began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// More is known of the request: it is counted with that meter instead.
    pub fn move_to(&mut self, meter: &Arc<RequestMeter>) {
        if Arc::ptr_eq(&self.meter, meter) {
            return;
        }
        meter.totals.in_flight.fetch_add(1, Ordering::Relaxed);
        let before = std::mem::replace(&mut self.meter, Arc::clone(meter));
        before.totals.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// The final response's headers are known: the response's own duration begins. Of several calls the
    /// last counts.
    pub fn headers(&mut self) {
        self.headers = Some(Instant::now());
    }

    /// The request is tried once more.
    pub fn retried(&self) {
        self.meter.totals.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// It should have been tried once more, and the Service's budget was used up.
    pub fn retry_budget_exhausted(&self) {
        let count = &self.meter.totals.retry_budget_exhausted;
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// The request has ended, its response's last byte included.
    pub fn finish(mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let now = Instant::now();
        let outcome = self.outcome.unwrap_or(Outcome {
            error: Some(ProxyError::Cancelled),
            ..Outcome::default()
        });
        let totals = &self.meter.totals;
        totals.in_flight.fetch_sub(1, Ordering::Relaxed);
        totals.duration.record(now.duration_since(self.started));
        if let Some(headers) = self.headers {
            totals.response_duration.record(now.duration_since(headers));
        }
        totals.request_bytes.record(outcome.request_bytes);
        totals.response_bytes.record(outcome.response_bytes);
        let key = OutcomeKey {
            method: self.method,
            status: outcome.status,
            grpc_status: outcome.grpc_status,
            error: outcome.error,
        };
        self.meter.count(key, now);
    }
}

/// The meters that a connection, or any other owner of requests with much the same labels, used last.
///
/// Labels are compared by their pointers, which a connection gets from the same table, route and identity for
/// each of its requests; equal labels behind other pointers are found in the map of the process. Holds no meter
/// alive, so an idle connection keeps no series.
#[derive(Debug, Default)]
pub struct MeterCache {
    entries: Vec<(RequestLabels, Weak<RequestMeter>)>,
    next: usize,
}

/// Routes, backends and endpoints of one connection's requests vary a little.
const CACHED: usize = 16;

impl MeterCache {
    /// The meter of these labels.
    pub fn get(&mut self, http: &HttpTelemetry, labels: &RequestLabels) -> Arc<RequestMeter> {
        let known = self.entries.iter().position(|(l, _)| l.is_same(labels));
        let meter = known.and_then(|i| self.entries[i].1.upgrade());
        if let Some(meter) = meter {
            return meter;
        }
        let meter = http.meter(labels);
        let entry = (labels.clone(), Arc::downgrade(&meter));
        match known {
            Some(index) => self.entries[index] = entry,
            None if self.entries.len() < CACHED => self.entries.push(entry),
            None => {
                self.entries[self.next] = entry;
                self.next = (self.next + 1) % CACHED;
            }
        }
        meter
    }
}

impl RequestLabels {
    /// Whether all parts are the same objects: equal, and found out without reading them.
    fn is_same(&self, other: &Self) -> bool {
        let Self {
            reporter,
            source,
            destination,
            service,
            route,
            backend,
            protocol,
            security,
        } = self;
        *reporter == other.reporter
            && *protocol == other.protocol
            && *security == other.security
            && same(
                destination.workload.as_deref(),
                other.destination.workload.as_deref(),
            )
            && same(backend.as_deref(), other.backend.as_deref())
            && same(route.as_deref(), other.route.as_deref())
            && same(service.as_deref(), other.service.as_deref())
            && same(source.workload.as_deref(), other.source.workload.as_deref())
            && same(principal(destination), principal(&other.destination))
            && same(principal(source), principal(&other.source))
    }
}

fn same(a: Option<&str>, b: Option<&str>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

fn principal(party: &Party) -> Option<&str> {
    party.identity.as_ref().map(|identity| identity.as_str())
}

/// What is counted for each outcome.
#[derive(Debug)]
struct Counted {
    key: OutcomeKey,
    count: AtomicU64,
    /// Seconds since the epoch of the process's metrics.
    used: AtomicU32,
}

impl Counted {
    fn count(&self, now: u32) {
        self.count.fetch_add(1, Ordering::Relaxed);
        touch(&self.used, now);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OutcomeKey {
    method: MethodClass,
    status: u16,
    grpc_status: Option<u8>,
    error: Option<ProxyError>,
}

/// What all meters share.
#[derive(Debug)]
struct Budget {
    /// Series of `http_requests` that exist.
    series: AtomicUsize,
    limit: usize,
    /// Requests beyond it, by reporter.
    other: [AtomicU64; 2],
}

/// What is counted with fewer labels.
#[derive(Debug, Default)]
struct Totals {
    in_flight: AtomicI64,
    retries: AtomicU64,
    retry_budget_exhausted: AtomicU64,
    duration: Durations,
    response_duration: Durations,
    request_bytes: Sizes,
    response_bytes: Sizes,
}

impl Totals {
    fn is_used(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) != 0 || !self.duration.is_empty()
    }
}

impl Metric for Totals {}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TotalsLabels {
    reporter: Reporter,
    source_workload: Option<Arc<str>>,
    source_namespace: Namespace,
    destination_workload: Option<Arc<str>>,
    destination_namespace: Namespace,
    service: Option<Arc<str>>,
    route: Option<Arc<str>>,
}

/// The namespace of an identity, without a copy of its name.
#[derive(Clone, Debug)]
struct Namespace(Option<Identity>);

impl Namespace {
    fn as_str(&self) -> &str {
        self.0.as_ref().map_or(UNKNOWN, Identity::namespace)
    }
}

impl PartialEq for Namespace {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Namespace {}

impl std::hash::Hash for Namespace {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl TotalsLabels {
    fn of(labels: &RequestLabels) -> Self {
        Self {
            reporter: labels.reporter,
            source_workload: labels.source.workload.clone(),
            source_namespace: Namespace(labels.source.identity.clone()),
            destination_workload: labels.destination.workload.clone(),
            destination_namespace: Namespace(labels.destination.identity.clone()),
            service: labels.service.clone(),
            route: labels.route.clone(),
        }
    }
}

/// Methods that are told apart; any other is one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MethodClass {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Patch,
    Options,
    Other,
}

impl MethodClass {
    fn of(method: &http::Method) -> Self {
        match *method {
            http::Method::GET => Self::Get,
            http::Method::HEAD => Self::Head,
            http::Method::POST => Self::Post,
            http::Method::PUT => Self::Put,
            http::Method::DELETE => Self::Delete,
            http::Method::PATCH => Self::Patch,
            http::Method::OPTIONS => Self::Options,
            _ => Self::Other,
        }
    }
}

/// Rounded up, so that what was used a moment ago is not older than it is.
fn seconds(epoch: Instant, now: Instant) -> u32 {
    // 136 years.
    now.duration_since(epoch).as_secs() as u32 + 1
}

/// Writes only once a second: the line is shared by all threads that use the meter.
fn touch(used: &AtomicU32, now: u32) {
    if used.load(Ordering::Relaxed) != now {
        used.store(now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
