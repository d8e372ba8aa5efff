//! The one table of what can go wrong with a connection or stream: HTTP status on the tunnel,
//! `warren-proxy-error` value and metric label.

/// Why a proxy refused or ended a connection or stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProxyError {
    /// The CONNECT had no usable target or source.
    BadRequest,
    /// The stream's target is not a pod of this node with the identity the tunnel was opened to.
    NotLocal,
    /// The claimed source address does not belong to the caller's identity.
    SourceMismatch,
    /// The source address is in no table, also after waiting for it.
    UnknownSource,
    /// Plaintext where a tunnel is required.
    PlaintextRefused,
    /// A target that is one of the mesh's own ports or a loopback address.
    ForbiddenTarget,
    /// The app refused the connection.
    ConnectRefused,
    /// The app did not accept within the connect timeout.
    ConnectTimeout,
    /// Any other failure to reach the app.
    ConnectFailed,
    /// The Service has no endpoint that could be used.
    NoEndpoint,
    /// No socket of the pod's namespace came within the connect timeout.
    NoSocket,
    /// No certificate for the identity on this node.
    NoCertificate,
    /// The peer's node could not be reached.
    TunnelConnect,
    /// The TLS handshake with the peer failed.
    TunnelHandshake,
    /// The peer proved another identity than the one asked for.
    TunnelIdentity,
    /// A certificate of either side has expired.
    CertificateExpired,
    /// The tunnel ended under the stream.
    TunnelReset,
    /// The peer's proxy answered with a status that no row of this table explains.
    PeerRefused,
    /// A limit of the workload was reached.
    WorkloadLimit,
    /// No table has been loaded yet.
    NotReady,
    /// The proxy is shutting down.
    Draining,
    /// A fault in the proxy.
    Internal,
}

impl ProxyError {
    /// Every row.
    pub const ALL: [ProxyError; 22] = [
        Self::BadRequest,
        Self::NotLocal,
        Self::SourceMismatch,
        Self::UnknownSource,
        Self::PlaintextRefused,
        Self::ForbiddenTarget,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::NoEndpoint,
        Self::NoSocket,
        Self::NoCertificate,
        Self::TunnelConnect,
        Self::TunnelHandshake,
        Self::TunnelIdentity,
        Self::CertificateExpired,
        Self::TunnelReset,
        Self::PeerRefused,
        Self::WorkloadLimit,
        Self::NotReady,
        Self::Draining,
        Self::Internal,
    ];

    /// HTTP status of the answer on the tunnel.
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::NotLocal
            | Self::SourceMismatch
            | Self::UnknownSource
            | Self::PlaintextRefused
            | Self::ForbiddenTarget
            | Self::TunnelIdentity
            | Self::CertificateExpired => 403,
            Self::WorkloadLimit => 429,
            Self::Internal => 500,
            Self::ConnectTimeout => 504,
            Self::ConnectRefused
            | Self::ConnectFailed
            | Self::NoEndpoint
            | Self::NoSocket
            | Self::NoCertificate
            | Self::TunnelConnect
            | Self::TunnelHandshake
            | Self::TunnelReset
            | Self::PeerRefused
            | Self::NotReady
            | Self::Draining => 503,
        }
    }

    /// Value of `warren-proxy-error`, of the metric label `reason` and of the access log's `error`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::NotLocal => "not_local",
            Self::SourceMismatch => "source_mismatch",
            Self::UnknownSource => "unknown_source",
            Self::PlaintextRefused => "plaintext_refused",
            Self::ForbiddenTarget => "forbidden_target",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::NoEndpoint => "no_endpoint",
            Self::NoSocket => "no_socket",
            Self::NoCertificate => "no_certificate",
            Self::TunnelConnect => "tunnel_connect",
            Self::TunnelHandshake => "tunnel_handshake",
            Self::TunnelIdentity => "tunnel_identity",
            Self::CertificateExpired => "certificate_expired",
            Self::TunnelReset => "tunnel_reset",
            Self::PeerRefused => "peer_refused",
            Self::WorkloadLimit => "workload_limit",
            Self::NotReady => "not_ready",
            Self::Draining => "draining",
            Self::Internal => "internal",
        }
    }

    /// The row with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.name() == name)
    }

    /// Whether another endpoint of the same Service may be tried: nothing reached an app.
    pub const fn retryable(self) -> bool {
        match self {
            Self::ConnectRefused
            | Self::ConnectTimeout
            | Self::ConnectFailed
            | Self::NoSocket
            | Self::TunnelConnect
            | Self::TunnelHandshake
            | Self::TunnelIdentity
            | Self::CertificateExpired
            | Self::TunnelReset
            | Self::NotReady
            | Self::Draining
            | Self::NotLocal
            | Self::PeerRefused => true,
            Self::BadRequest
            | Self::SourceMismatch
            | Self::UnknownSource
            | Self::PlaintextRefused
            | Self::ForbiddenTarget
            | Self::NoEndpoint
            | Self::NoCertificate
            | Self::WorkloadLimit
            | Self::Internal => false,
        }
    }

    /// What an operator should look at.
    pub const fn hint(self) -> &'static str {
        match self {
            Self::BadRequest => "the peer's proxy is not compatible with this one",
            Self::NotLocal => "the caller's table is stale, or the peer is not what it claims",
            Self::SourceMismatch => "the caller's node claims an address of another identity",
            Self::UnknownSource => {
                "the caller's pod has not reached this node's table; is the controller up?"
            }
            Self::PlaintextRefused => {
                "both pods are meshed, or the mode is strict; enrol the caller or relax the mode"
            }
            Self::ForbiddenTarget => {
                "the target is a port of the mesh itself or a loopback address"
            }
            Self::ConnectRefused => "the app does not listen on that port",
            Self::ConnectTimeout => "the app or its node does not answer",
            Self::ConnectFailed => "the app's node could not connect to it",
            Self::NoEndpoint => "the Service has no ready endpoint of the caller's address family",
            Self::NoSocket => "the agent is away or out of descriptors; check warren-cni",
            Self::NoCertificate => {
                "the controller signs for pods bound to this node only; is it up?"
            }
            Self::TunnelConnect => {
                "port 15008 of the peer's node cannot be reached; a firewall or NetworkPolicy?"
            }
            Self::TunnelHandshake => {
                "the peer does not trust this mesh's roots, or is not a Warren node"
            }
            Self::TunnelIdentity => "the peer's node has no certificate for the callee's identity",
            Self::CertificateExpired => {
                "check the clocks of both nodes and that the controller renews"
            }
            Self::TunnelReset => "the peer's proxy restarted or the link failed",
            Self::PeerRefused => "see the log of the peer's proxy",
            Self::WorkloadLimit => {
                "the workload reached a limit of its budget; see warren_workload_* metrics"
            }
            Self::NotReady => "the proxy has not loaded its table yet",
            Self::Draining => "the proxy is being replaced",
            Self::Internal => "a fault in the proxy; please report it",
        }
    }
}

impl std::fmt::Display for ProxyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name(), self.hint())
    }
}

impl std::error::Error for ProxyError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_again() {
        for error in ProxyError::ALL {
            assert_eq!(ProxyError::from_name(error.name()), Some(error));
        }
    }
}
