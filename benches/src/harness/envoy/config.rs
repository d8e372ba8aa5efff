//! The configuration of the two Envoys.
//!
//! Each kind of load has a port at the first Envoy: TCP, and HTTP by the server's protocol and the
//! number of routes. Between the two it is one port for TCP and one for each of the server's protocols.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use serde_json::{Value, json};

use super::{CAPTURE_OFFSET, CLIENT_ID, PORT, ROUTES, SERVER_ID};

/// What a port of the first Envoy does with requests.
pub(super) struct HttpFront {
    pub(super) port: u16,
    /// What the server is spoken to in.
    pub(super) http2: bool,
    pub(super) routes: usize,
}

pub(super) fn http_fronts() -> impl Iterator<Item = HttpFront> {
    let kinds = [false, true]
        .into_iter()
        .flat_map(|http2| ROUTES.into_iter().map(move |routes| (http2, routes)));
    kinds
        .zip(PORT + 1..)
        .map(|((http2, routes), port)| HttpFront {
            port,
            http2,
            routes,
        })
}

/// Beside the client.
pub(super) fn first(work: &Path, server: IpAddr) -> Value {
    let capture = |port: u16| SocketAddr::from(([0, 0, 0, 0], port + CAPTURE_OFFSET));
    let tunnel = |kind: &str, port: u16| {
        let mut cluster = cluster(kind, SocketAddr::new(server, port), kind != TCP);
        cluster["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": "server.bench",
                "common_tls_context": tls(work, "client", SERVER_ID, kind != TCP),
            }
        });
        cluster
    };
    let mut listeners = vec![listener(TCP, capture(PORT), tcp_proxy())];
    for front in http_fronts() {
        let filter = http_proxy(kind(front.http2), front.routes);
        listeners.push(listener(
            &format!("http-{}", front.port),
            capture(front.port),
            filter,
        ));
    }
    let clusters = TUNNELS
        .into_iter()
        .map(|(kind, port)| tunnel(kind, port))
        .collect();
    config(work, "first", listeners, clusters)
}

/// Beside the server.
pub(super) fn second(work: &Path) -> Value {
    let app = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let terminate = |kind: &str, port: u16| {
        let filter = match kind {
            TCP => tcp_proxy(),
            _ => http_proxy(kind, 0),
        };
        let mut listener = listener(kind, SocketAddr::from(([0, 0, 0, 0], port)), filter);
        listener["filter_chains"][0]["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": true,
                "common_tls_context": tls(work, "server", CLIENT_ID, kind != TCP),
            }
        });
        listener
    };
    let listeners = TUNNELS.map(|(kind, port)| terminate(kind, port)).to_vec();
    let clusters = TUNNELS
        .map(|(kind, _)| cluster(kind, app, kind == HTTP2))
        .to_vec();
    config(work, "second", listeners, clusters)
}

fn listener(name: &str, listen: SocketAddr, filter: Value) -> Value {
    json!({"name": name, "address": address(listen), "filter_chains": [{"filters": [filter]}]})
}

fn tcp_proxy() -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "bench",
            "cluster": TCP,
        }
    })
}

/// `routes` of which the last one matches; 0: everything goes to the cluster.
fn http_proxy(cluster: &str, routes: usize) -> Value {
    let to_cluster =
        |prefix: String| json!({"match": {"prefix": prefix}, "route": {"cluster": cluster}});
    let mut table: Vec<Value> = (1..routes)
        .map(|i| to_cluster(format!("/route-{i}")))
        .collect();
    table.push(to_cluster(if routes == 0 { "/" } else { "/bench" }.into()));
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "bench",
            "codec_type": "AUTO",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": table}]},
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
            }],
        }
    })
}

fn cluster(name: &str, upstream: SocketAddr, http2: bool) -> Value {
    // Envoy's defaults would refuse the 1,025th connection or request.
    let unlimited = json!({"thresholds": [{
        "max_connections": 1_000_000, "max_pending_requests": 1_000_000, "max_requests": 1_000_000}]});
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": unlimited,
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}]
        }
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        });
    }
    cluster
}

fn config(work: &Path, side: &str, listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({
        "node": {"id": side, "cluster": "bench"},
        "admin": {"address": {"pipe": {"path": work.join(format!("{side}.sock"))}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        // Without it Envoy warns that its connections are unbounded.
        "overload_manager": {"resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": 1_000_000,
            }
        }]}
    })
}

fn tls(work: &Path, name: &str, peer: &str, http2: bool) -> Value {
    let file = |suffix: &str| json!({"filename": work.join(suffix)});
    json!({
        "alpn_protocols": if http2 { vec!["h2"] } else { Vec::new() },
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": file(&format!("{name}.crt")),
            "private_key": file(&format!("{name}.key")),
        }],
        "validation_context": {
            "trusted_ca": file("root.crt"),
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        }
    })
}

fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn kind(http2: bool) -> &'static str {
    if http2 { HTTP2 } else { HTTP1 }
}

const TCP: &str = "tcp";
const HTTP1: &str = "http1";
const HTTP2: &str = "http2";
/// Kind of traffic and port between the two.
const TUNNELS: [(&str, u16); 3] = [(TCP, 15008), (HTTP1, 15009), (HTTP2, 15010)];
