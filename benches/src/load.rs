//! The load: a server and a client of our own, small enough to know what they cost.
//!
//! The client runs one [`Case`] against one address and speaks two lines to whoever started it:
//! `start` when the warm-up is over (or all idle connections stand), then its [`Outcome`] as JSON.
//! So the harness can read the proxies' counters exactly around the measured time.

mod client;
mod http2;
mod latency;
mod server;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use client::run;
pub use latency::Latencies;
pub use server::serve;

/// What the client does.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// One stream, client to server, as fast as it goes.
    Bulk,
    /// One stream, server to client.
    BulkDown,
    /// Closed loop: each connection sends its next request when the last one is answered.
    Requests,
    /// Open loop: requests leave at a fixed rate whether or not earlier ones are answered; latency
    /// counts from the time a request was due.
    Open,
    /// A new connection for each request; closed loop.
    Connect,
    /// Connections that answered one request and then stay open.
    Idle,
    /// As `Requests`, to a port whose requests a proxy looks into.
    Http1,
    /// The same in HTTP/2 with prior knowledge, one stream at a time on each connection.
    Http2,
    /// Unary gRPC calls, one at a time on each connection.
    Grpc,
}

impl Case {
    /// Whether a proxy is to look into the requests.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http1 | Self::Http2 | Self::Grpc)
    }
}

/// One invocation of the client.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What to do.
    pub case: Case,
    /// Connections at once.
    pub connections: usize,
    /// Routes attached to what the client addresses, for HTTP; the last one matches.
    pub routes: usize,
    /// Requests per second, for [`Case::Open`].
    pub rate: u32,
    /// Load before the measured time.
    pub warm_up: Duration,
    /// Measured time.
    pub duration: Duration,
}

/// What the client saw in the measured time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Measured time in seconds.
    pub seconds: f64,
    /// Requests answered.
    pub requests: u64,
    /// Bytes sent or received by a bulk case.
    pub bytes: u64,
    /// Connections or requests that failed.
    pub errors: u64,
    /// The first failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_error: Option<String>,
    /// Of requests; of connect + request for [`Case::Connect`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Quantiles>,
}

/// Microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Longest.
    pub max: f64,
}

/// Bytes of each read and write of a bulk stream.
const BULK_BUFFER: usize = 256 * 1024;
/// First byte of a stream the server only reads; it answers EOF with the count.
const UPLOAD: u8 = b'U';
/// First byte of a stream the server fills until it is closed.
const DOWNLOAD: u8 = b'D';
