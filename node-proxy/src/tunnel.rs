//! Tunnels between nodes: TLS 1.3 with the identities of the two workloads, HTTP/2 inside, one stream a
//! connection.
//!
//! Between Warren nodes the ALPN is `warren/2` (`warren/1` if one of them is older), the address the node's;
//! the server name selects the callee's certificate. HBONE peers speak ALPN `h2` at the pod's address,
//! without server name (istio's HBONE; `docs/architecture.md`).

use std::net::{IpAddr, SocketAddr};

use h2::Reason;
use http::HeaderMap;
use mesh_api::errors::ProxyError;

pub mod admission;
pub mod ahead;
pub mod dial;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod pool;
pub mod relay;
pub mod serve;
pub mod tls;

/// Window of one stream: what a receiver that does not read can make the other side's proxy hold.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Window of a connection: the largest there is, so that streams which do not read never hold up the
/// others. Memory is bounded by the stream windows and the workload's budget instead.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Largest frame either side may send.
pub const MAX_FRAME: u32 = 64 * 1024;
/// Payload of a DATA frame that fills, with its head of 9 bytes, four TLS records of 16 KiB, which is what the TLS
/// library takes at once. One byte more would cost a record and a system call more.
pub const FULL_FRAME: usize = 64 * 1024 - 9;
/// What one stream may hold unsent.
pub const SEND_BUFFER: usize = 256 * 1024;
/// What one receive call on a tunnel's socket may bring. The TLS library asks for 4 KiB at a time, so many records
/// would cost as many system calls.
pub const READ_AHEAD: usize = 64 * 1024;
/// Streams a server takes on one tunnel.
pub const MAX_STREAMS: u32 = 4096;
/// Largest header list: of an app's request, and what the proxies add.
pub const MAX_HEADER_LIST: u32 = 80 * 1024;

/// Value of the `forwarded` header that names the caller (RFC 7239, section 6: IPv6 in brackets, quoted).
pub fn forwarded(source: IpAddr) -> String {
    match source {
        IpAddr::V4(v4) => format!("for={v4}"),
        IpAddr::V6(v6) => format!("for=\"[{v6}]\""),
    }
}

/// The caller named by the first `for=` of a `forwarded` header. `Ok(None)`: there is no such header.
pub fn claimed_source(headers: &HeaderMap) -> Result<Option<IpAddr>, ProxyError> {
    let Some(value) = headers.get(http::header::FORWARDED) else {
        return Ok(None);
    };
    let first = value
        .to_str()
        .map_err(|_| ProxyError::BadRequest)?
        .split(',')
        .next()
        .unwrap_or_default();
    for pair in first.split(';') {
        let Some((name, value)) = pair.trim().split_once('=') else {
            continue;
        };
        if !name.eq_ignore_ascii_case("for") {
            continue;
        }
        let node = value.trim_matches('"');
        let bare = node
            .strip_prefix('[')
            .and_then(|n| n.strip_suffix(']'))
            .unwrap_or(node);
        let address = bare
            .parse::<IpAddr>()
            .or_else(|_| node.parse::<SocketAddr>().map(|a| a.ip()));
        return address
            .map(|a| Some(a.to_canonical()))
            .map_err(|_| ProxyError::BadRequest);
    }
    Ok(None)
}

/// The reason a proxy resets a stream with when it gives up, and when the app's connection was reset.
pub const ABORT: Reason = Reason::CANCEL;

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(value: &str) -> Result<Option<IpAddr>, ProxyError> {
        let mut headers = HeaderMap::new();
        headers.insert(http::header::FORWARDED, value.parse().unwrap());
        claimed_source(&headers)
    }

    #[test]
    fn sources_go_out_and_come_back() {
        for address in ["10.0.0.1", "fd00::1"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(claim(&forwarded(address)), Ok(Some(address)));
        }
        assert_eq!(
            claim("for=\"10.0.0.1:4711\";host=web.demo"),
            Ok(Some("10.0.0.1".parse().unwrap()))
        );
        assert_eq!(
            claim("proto=http; For=\"[fd00::1]:80\", for=10.0.0.9"),
            Ok(Some("fd00::1".parse().unwrap()))
        );
        assert_eq!(claim("by=10.0.0.1"), Ok(None));
        assert_eq!(claim("for=unknown"), Err(ProxyError::BadRequest));
        assert_eq!(claim("for=_hidden"), Err(ProxyError::BadRequest));
        assert_eq!(claimed_source(&HeaderMap::new()), Ok(None));
    }
}
