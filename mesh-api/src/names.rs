//! Names and numbers that more than one process or a user relies on.

use std::net::IpAddr;

/// Label on a namespace or pod: `enabled` or `disabled`; the pod's wins.
pub const MESH_LABEL: &str = "warren-mesh.io/mesh";
/// Label on a namespace: `permissive` or `strict`; overrides the mesh-wide mode.
pub const MODE_LABEL: &str = "warren-mesh.io/mode";
/// Annotation on a pod: inbound ports that are not captured, comma-separated.
pub const EXCLUDE_INBOUND_PORTS: &str = "warren-mesh.io/exclude-inbound-ports";
/// Annotation on a pod: outbound ports that are not captured, comma-separated.
pub const EXCLUDE_OUTBOUND_PORTS: &str = "warren-mesh.io/exclude-outbound-ports";
/// Annotation on a pod: destinations that are not captured, comma-separated CIDRs.
pub const EXCLUDE_OUTBOUND_CIDRS: &str = "warren-mesh.io/exclude-outbound-cidrs";
/// Annotation on a pod that terminates HBONE itself: `hbone`. It is not captured; meshed callers
/// reach it over HBONE at its own address.
pub const TUNNEL_ANNOTATION: &str = "warren-mesh.io/tunnel";
/// Annotation on a pod, written by the controller: the addresses its agent registered, and its phase.
pub const ENROLLED_ANNOTATION: &str = "warren-mesh.io/enrolled";
/// Taint of nodes whose agent cannot enrol pods.
pub const NOT_READY_TAINT: &str = "warren-mesh.io/not-ready";

/// Warren's own namespace; never enrolled.
pub const SYSTEM_NAMESPACE: &str = "warren-system";
/// DNS name in the controller's certificate.
pub const CONTROLLER_NAME: &str = "warren-controller.warren-system.svc";
/// Trust domain unless configured.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// In a pod's namespace: outbound capture.
pub const OUTBOUND_PORT: u16 = 15001;
/// In a pod's namespace: inbound plaintext capture.
pub const INBOUND_PORT: u16 = 15006;
/// In a pod's namespace: HBONE; on the node's address: the tunnel.
pub const TUNNEL_PORT: u16 = 15008;
/// On the proxy's own pod address: Prometheus metrics.
pub const METRICS_PORT: u16 = 15020;
/// On the proxy's and the controller's address: health.
pub const HEALTH_PORT: u16 = 15021;
/// The controller's gRPC port: discovery and certificates.
pub const CONTROLLER_PORT: u16 = 15012;
/// The controller's metrics.
pub const CONTROLLER_METRICS_PORT: u16 = 15014;

/// Connection mark of delivered connections whose replies must be re-routed, and their packet mark.
pub const DELIVERED_MARK: u32 = 0x111;
/// Routing table that sends marked replies back to the proxy's sockets.
pub const ROUTE_TABLE: u32 = 100;

/// ALPN between Warren nodes.
pub const ALPN_WARREN: &[u8] = b"warren/1";
/// ALPN between Warren nodes of which both also take large heads before the body of a message.
pub const ALPN_WARREN_2: &[u8] = b"warren/2";
/// ALPN of HBONE peers.
pub const ALPN_HBONE: &[u8] = b"h2";
/// Response header naming the cause of an answer that the proxy made itself.
pub const PROXY_ERROR_HEADER: &str = "warren-proxy-error";
/// Request header that tells the app who calls.
pub const CLIENT_ID_HEADER: &str = "warren-client-id";

/// Values of a Service port's `appProtocol` that mean HTTP without TLS (KEP-3726, GEP-1911 and the IANA
/// service names).
const HTTP_APP_PROTOCOLS: [&str; 8] = [
    "http",
    "http2",
    "h2c",
    "grpc",
    "grpc-web",
    "ws",
    "kubernetes.io/h2c",
    "kubernetes.io/ws",
];

/// User that node proxies run as.
pub const PROXY_UID: u32 = 65532;

/// Whether an `appProtocol` says that its port speaks HTTP without TLS. It has no case; none at all says nothing.
pub fn is_http(app_protocol: &str) -> bool {
    HTTP_APP_PROTOCOLS
        .iter()
        .any(|known| known.eq_ignore_ascii_case(app_protocol))
}

/// Reads an address of 4 or 16 bytes as protobuf messages carry it.
pub fn address_from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// Writes an address as protobuf messages carry it. IPv4-mapped IPv6 addresses become IPv4.
pub fn address_to_bytes(address: IpAddr) -> bytes::Bytes {
    match address.to_canonical() {
        IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_app_protocols_that_mean_http() {
        for name in [
            "http",
            "HTTP2",
            "h2c",
            "gRPC",
            "grpc-web",
            "WS",
            "Kubernetes.io/WS",
        ] {
            assert!(is_http(name), "{name}");
        }
        for name in [
            "",
            "https",
            "wss",
            "kubernetes.io/wss",
            "kubernetes.io/http",
            "tcp",
        ] {
            assert!(!is_http(name), "{name}");
        }
    }
}
