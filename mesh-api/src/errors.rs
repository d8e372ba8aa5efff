//! The one table of what can go wrong with a connection, stream or request: HTTP status of the answer,
//! gRPC status, `warren-proxy-error` value, metric label, log level.

use tracing::Level;

/// Declares [`ProxyError`] and its columns, so that a row stands in one place.
macro_rules! proxy_errors {
    ($($(#[$doc:meta])* $row:ident: $name:literal, $status:literal, $grpc:ident, $retryable:ident, $level:ident, $hint:literal;)*) => {
        /// Why a proxy refused or ended a connection, stream or request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ProxyError {
            $($(#[$doc])* $row,)*
        }

        impl ProxyError {
            /// Every row.
            pub const ALL: [ProxyError; [$(Self::$row),*].len()] = [$(Self::$row),*];

            /// HTTP status of the answer, on the tunnel and to an app. For [`Self::FaultAbort`] it is what is
            /// answered unless the policy says otherwise; [`Self::FaultDelay`] is never the cause of an answer.
            pub const fn status(self) -> u16 {
                match self { $(Self::$row => $status,)* }
            }

            /// `grpc-status` of the answer to a gRPC request, as trailers-only response with HTTP status 200.
            pub const fn grpc_status(self) -> u8 {
                match self { $(Self::$row => grpc::$grpc,)* }
            }

            /// Value of `warren-proxy-error`, of the metric labels `reason` and `response_flags` and of the access
            /// log's `error`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$row => $name,)* }
            }

            /// Whether another endpoint of the same Service may be tried: nothing reached an app.
            pub const fn retryable(self) -> bool {
                match self { $(Self::$row => retryable::$retryable,)* }
            }

            /// How it is logged: `DEBUG` what happens in a healthy mesh, `INFO` what the client or a policy
            /// caused, `WARN` what an operator should look at, `ERROR` faults of the proxy.
            pub const fn level(self) -> Level {
                match self { $(Self::$row => Level::$level,)* }
            }

            /// What an operator should look at.
            pub const fn hint(self) -> &'static str {
                match self { $(Self::$row => $hint,)* }
            }
        }
    };
}

// Name, HTTP status, gRPC status, retryable, log level, hint.
proxy_errors! {
    /// The CONNECT had no usable target or source.
    BadRequest: "bad_request", 400, INTERNAL, no, WARN,
        "the peer's proxy is not compatible with this one";
    /// The stream's target is not a pod of this node with the identity the tunnel was opened to.
    NotLocal: "not_local", 403, UNAVAILABLE, yes, WARN,
        "the caller's table is stale, or the peer is not what it claims";
    /// The claimed source address does not belong to the caller's identity.
    SourceMismatch: "source_mismatch", 403, PERMISSION_DENIED, no, WARN,
        "the caller's node claims an address of another identity";
    /// The source address is in no table, also after waiting for it.
    UnknownSource: "unknown_source", 403, PERMISSION_DENIED, no, WARN,
        "the caller's pod has not reached this node's table; is the controller up?";
    /// Plaintext where a tunnel is required.
    PlaintextRefused: "plaintext_refused", 403, PERMISSION_DENIED, no, WARN,
        "both pods are meshed, or the mode is strict; enrol the caller or relax the mode";
    /// A target that is one of the mesh's own ports or a loopback address.
    ForbiddenTarget: "forbidden_target", 403, PERMISSION_DENIED, no, WARN,
        "the target is a port of the mesh itself or a loopback address";
    /// The app refused the connection.
    ConnectRefused: "connect_refused", 503, UNAVAILABLE, yes, WARN,
        "the app does not listen on that port";
    /// The app did not accept within the connect timeout.
    ConnectTimeout: "connect_timeout", 504, UNAVAILABLE, yes, WARN,
        "the app or its node does not answer";
    /// Any other failure to reach the app.
    ConnectFailed: "connect_failed", 503, UNAVAILABLE, yes, WARN,
        "the app's node could not connect to it";
    /// The Service has no endpoint that could be used.
    NoEndpoint: "no_endpoint", 503, UNAVAILABLE, no, WARN,
        "the Service has no ready endpoint of the caller's address family";
    /// No socket of the pod's namespace came within the connect timeout.
    NoSocket: "no_socket", 503, UNAVAILABLE, yes, WARN,
        "the agent is away or out of descriptors; check warren-cni";
    /// No certificate for the identity on this node.
    NoCertificate: "no_certificate", 503, UNAVAILABLE, no, WARN,
        "the controller signs for pods bound to this node only; is it up?";
    /// The peer's node could not be reached.
    TunnelConnect: "tunnel_connect", 503, UNAVAILABLE, yes, WARN,
        "port 15008 of the peer's node cannot be reached; a firewall or NetworkPolicy?";
    /// The TLS handshake with the peer failed.
    TunnelHandshake: "tunnel_handshake", 503, UNAVAILABLE, yes, WARN,
        "the peer does not trust this mesh's roots, or is not a Warren node";
    /// The peer proved another identity than the one asked for.
    TunnelIdentity: "tunnel_identity", 403, UNAVAILABLE, yes, WARN,
        "the peer's node has no certificate for the callee's identity";
    /// A certificate of either side has expired.
    CertificateExpired: "certificate_expired", 403, UNAVAILABLE, yes, WARN,
        "check the clocks of both nodes and that the controller renews";
    /// The tunnel ended under the stream.
    TunnelReset: "tunnel_reset", 503, UNAVAILABLE, yes, WARN,
        "the peer's proxy restarted or the link failed";
    /// The peer's proxy answered with a status that no row of this table explains.
    PeerRefused: "peer_refused", 503, UNAVAILABLE, yes, WARN,
        "see the log of the peer's proxy";
    /// A limit of the workload was reached.
    WorkloadLimit: "workload_limit", 429, RESOURCE_EXHAUSTED, no, WARN,
        "the workload reached a limit of its budget; see warren_workload_* metrics";
    /// No table has been loaded yet.
    NotReady: "not_ready", 503, UNAVAILABLE, yes, WARN,
        "the proxy has not loaded its table yet";
    /// No rule of the Service's routes matches the request.
    NoRoute: "no_route", 404, UNIMPLEMENTED, no, INFO,
        "routes are attached to the Service, and none of their rules matches this request";
    /// The backend that was picked does not exist, is of an unknown kind, or needs a ReferenceGrant.
    InvalidBackend: "invalid_backend", 500, UNAVAILABLE, no, WARN,
        "see condition ResolvedRefs in the status of the route";
    /// The rule cannot be carried out: an unknown filter or a field that is not valid.
    InvalidRule: "invalid_rule", 500, INTERNAL, no, WARN,
        "see condition Accepted in the status of the route";
    /// The request, retries included, took longer than its timeout.
    RequestTimeout: "request_timeout", 504, DEADLINE_EXCEEDED, no, INFO,
        "the request timeout of the route or policy, or the caller's grpc-timeout, has passed";
    /// The last try took longer than the timeout of a try.
    TryTimeout: "try_timeout", 504, DEADLINE_EXCEEDED, no, INFO,
        "the backendRequest timeout of the route or policy has passed";
    /// The response's headers did not come in time.
    ResponseHeadersTimeout: "response_headers_timeout", 504, DEADLINE_EXCEEDED, no, INFO,
        "the response headers timeout of the policy has passed";
    /// Nothing moved on the stream for too long.
    IdleTimeout: "idle_timeout", 504, DEADLINE_EXCEEDED, no, INFO,
        "neither side sent anything for the stream idle timeout of the policy";
    /// The callee's rate limit for this caller is used up.
    RateLimited: "rate_limited", 429, RESOURCE_EXHAUSTED, no, INFO,
        "the rate limit of the policy; Retry-After says when to come again";
    /// Too many requests wait for the Service, or this one has waited too long.
    QueueFull: "queue_full", 503, UNAVAILABLE, no, WARN,
        "the pending queue of the policy is full: the Service is slower than its callers";
    /// A retry was due and the Service's retry budget is used up.
    RetryBudget: "retry_budget", 503, UNAVAILABLE, no, WARN,
        "too large a share of the Service's requests are retries: it is failing";
    /// Fault injection ended the request; the policy says with which status.
    FaultAbort: "fault_abort", 503, UNAVAILABLE, no, DEBUG,
        "a TrafficPolicy injects faults";
    /// Fault injection delayed the request. Never why one fails: the response is the app's own.
    FaultDelay: "fault_delay", 200, OK, no, DEBUG,
        "a TrafficPolicy injects delays";
    /// Bytes that are not a valid request.
    MalformedRequest: "malformed_request", 400, INTERNAL, no, INFO,
        "the client broke RFC 9112 or RFC 9113; smuggling shapes are refused, too";
    /// The request's headers, or its target, exceed the bound.
    HeadersTooLarge: "headers_too_large", 431, RESOURCE_EXHAUSTED, no, INFO,
        "the client sends more header bytes than the proxy holds for one request";
    /// The request's headers or body came too slowly.
    SlowRequest: "slow_request", 408, DEADLINE_EXCEEDED, no, INFO,
        "the client did not finish its request in time";
    /// The app's answer is not valid HTTP.
    UpstreamProtocol: "upstream_protocol", 502, INTERNAL, no, WARN,
        "the app broke RFC 9112 or RFC 9113; is the port's appProtocol right?";
    /// The app refused the HTTP/2 stream, or its GOAWAY leaves it out: it did nothing with the request (RFC 9113, 8.7).
    RefusedStream: "refused_stream", 503, UNAVAILABLE, yes, WARN,
        "the app refused the stream or is shutting down";
    /// The app closed a connection that it had kept open, under a request that may not be sent once more.
    IdleClosed: "idle_closed", 502, UNAVAILABLE, no, WARN,
        "the app closed a kept connection; is its keep-alive timeout too short?";
    /// The app closed or reset the connection before its answer was complete.
    UpstreamReset: "upstream_reset", 502, UNAVAILABLE, no, WARN,
        "the app closed or reset the connection; did it crash?";
    /// The request's body exceeds a bound.
    BodyTooLarge: "body_too_large", 413, RESOURCE_EXHAUSTED, no, INFO,
        "the request's body is larger than the policy or protocol allows";
    /// A version of HTTP, or an upgrade, that the proxy does not carry.
    UnsupportedProtocol: "unsupported_protocol", 505, UNIMPLEMENTED, no, INFO,
        "HTTP/1.0, 1.1 and 2 are carried; anything else must be an opaque port";
    /// The caller went away before the answer was complete.
    Cancelled: "cancelled", 499, CANCELLED, no, DEBUG,
        "the client closed the connection or reset the stream; does it time out too soon?";
    /// A fault in the proxy.
    Internal: "internal", 500, INTERNAL, no, ERROR,
        "a fault in the proxy; please report it";
}

impl ProxyError {
    /// The row with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.name() == name)
    }

    /// Its place in [`Self::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl std::fmt::Display for ProxyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name(), self.hint())
    }
}

impl std::error::Error for ProxyError {}

/// Status codes of gRPC (doc/statuscodes.md of grpc/grpc).
mod grpc {
    pub(super) const OK: u8 = 0;
    pub(super) const CANCELLED: u8 = 1;
    pub(super) const DEADLINE_EXCEEDED: u8 = 4;
    pub(super) const PERMISSION_DENIED: u8 = 7;
    pub(super) const RESOURCE_EXHAUSTED: u8 = 8;
    pub(super) const UNIMPLEMENTED: u8 = 12;
    pub(super) const INTERNAL: u8 = 13;
    pub(super) const UNAVAILABLE: u8 = 14;
}

/// Words of the table.
#[allow(non_upper_case_globals)]
mod retryable {
    pub(super) const yes: bool = true;
    pub(super) const no: bool = false;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_again() {
        for (index, error) in ProxyError::ALL.into_iter().enumerate() {
            assert_eq!(ProxyError::from_name(error.name()), Some(error));
            assert_eq!(error.index(), index);
        }
    }

    #[test]
    fn names_can_be_labels_and_header_values() {
        for error in ProxyError::ALL {
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(error.name().chars().all(plain), "{error}");
        }
    }

    /// gRPC clients see what the HTTP status would have told them (doc/http-grpc-status-mapping.md of
    /// grpc/grpc), or something more exact.
    #[test]
    fn http_and_grpc_status_agree() {
        for error in ProxyError::ALL {
            let expected: &[u8] = match error.status() {
                200 => &[grpc::OK],
                400 => &[grpc::INTERNAL],
                403 => &[grpc::PERMISSION_DENIED, grpc::UNAVAILABLE],
                404 => &[grpc::UNIMPLEMENTED],
                408 => &[grpc::DEADLINE_EXCEEDED],
                413 | 429 | 431 => &[grpc::RESOURCE_EXHAUSTED],
                499 => &[grpc::CANCELLED],
                500 | 502 => &[grpc::INTERNAL, grpc::UNAVAILABLE],
                503 => &[grpc::UNAVAILABLE],
                504 => &[grpc::DEADLINE_EXCEEDED, grpc::UNAVAILABLE],
                505 => &[grpc::UNIMPLEMENTED],
                other => panic!("{error}: unexpected status {other}"),
            };
            assert!(expected.contains(&error.grpc_status()), "{error}");
        }
    }

    /// What is tried again elsewhere must not have reached an app, and must look temporary to a caller
    /// that tries again itself.
    #[test]
    fn retryable_rows_are_unavailable_to_grpc() {
        for error in ProxyError::ALL {
            if error.retryable() {
                assert_eq!(error.grpc_status(), grpc::UNAVAILABLE, "{error}");
            }
        }
        assert!(!ProxyError::UpstreamReset.retryable());
        assert!(!ProxyError::Cancelled.retryable());
    }
}
