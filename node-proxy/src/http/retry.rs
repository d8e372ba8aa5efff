//! What may be sent again, when, and how often.
//!
//! On by default is only what cannot do harm: a request that never reached an app (no connection, a
//! stream the peer refused), and an idempotent one whose reused connection closed before the first byte
//! of an answer, which is how a server ends an idle connection (RFC 9112, section 9.6; RFC 9110,
//! section 9.2.2). The rest is the user's to allow. Every retry counts against the Service's budget.

mod budget;
mod pushback;
mod replay;

use std::time::Duration;

use http::{Method, StatusCode};
use rand::Rng;

use super::policy::Policy;
pub use budget::BudgetState;
pub use pushback::{LONGEST_PUSHBACK, Pushback};
pub use replay::{Attempt, Replay};

/// How a try ended that may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// There was no connection; nothing was sent.
    ConnectFailure,
    /// The peer did not process the request: `REFUSED_STREAM`, or a GOAWAY that leaves the stream out.
    RefusedStream,
    /// A connection that had been used before closed before the first byte of the answer.
    IdleClosed,
    /// Connection or stream broke before the answer's headers.
    ResetBeforeHeaders,
    /// The per-try or the response-headers timeout ran out before the answer's headers.
    Timeout,
    /// The app answered.
    Answer {
        /// What the answer says about trying again.
        pushback: Pushback,
    },
}

/// What the caller is told if there is no other try: the app's answer, or that of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Status of the answer.
    pub status: StatusCode,
    /// Code of a gRPC answer that has it in its headers (trailers-only).
    pub grpc_code: Option<u32>,
}

/// When to try again: `least`, and a share of `base` that doubles with each retry up to `max`, drawn
/// evenly (full jitter), so that callers that failed together do not return together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Never sooner.
    pub least: Duration,
    /// Largest random pause before the first retry.
    pub base: Duration,
    /// Largest random pause.
    pub max: Duration,
}

impl Backoff {
    /// The pause before retry number `retry` (from 0).
    pub fn pause(&self, retry: u32, rng: &mut impl Rng) -> Duration {
        let most = self
            .base
            .checked_mul(1 << retry.min(30))
            .map_or(self.max, |doubled| doubled.min(self.max));
        self.least + most.mul_f64(rng.random())
    }
}

/// Whether to try again, and after which pause. `retries`: how often the request was tried again already.
/// `replayable`: its body can be sent again from the start. Listed statuses and codes count whoever made the answer: the
/// app, or the proxy for an app that gave none.
///
/// The budget is asked separately ([`super::policy::State::try_retry`]), as the last condition: it counts.
/// The caller gives up instead if the pause goes beyond the request's own timeout.
pub fn should_retry(
    policy: &Policy,
    retries: u32,
    cause: Cause,
    told: Told,
    method: &Method,
    replayable: bool,
    rng: &mut impl Rng,
) -> Option<Duration> {
    let retry = &policy.retry;
    if retries >= retry.attempts || !replayable {
        return None;
    }
    let grpc = |code: u32| code < u32::BITS && retry.grpc_codes & (1 << code) != 0;
    let listed = retry.statuses.contains(&told.status) || told.grpc_code.is_some_and(grpc);
    let mut backoff = retry.backoff;
    let wanted = match cause {
        Cause::ConnectFailure => retry.connect_failure,
        Cause::RefusedStream => retry.refused_stream,
        Cause::IdleClosed => retry.reset_before_headers || method.is_idempotent(),
        Cause::ResetBeforeHeaders | Cause::Timeout => retry.reset_before_headers,
        Cause::Answer { pushback } => {
            match pushback {
                Pushback::None => {}
                Pushback::After(pause) => backoff.least = backoff.least.max(pause),
                Pushback::Never => return None,
            }
            false
        }
    };
    if !wanted && !listed {
        return None;
    }
    let harmless = matches!(
        cause,
        Cause::ConnectFailure | Cause::RefusedStream | Cause::IdleClosed
    );
    // Another endpoint knows nothing of what befell the first: go there at once.
    if harmless && retries == 0 && backoff.least.is_zero() {
        return Some(Duration::ZERO);
    }
    Some(backoff.pause(retries, rng))
}

#[cfg(test)]
mod tests;
