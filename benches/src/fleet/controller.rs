//! The real `warren-controller`, as a process of its own, and what the system knows of it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_api::client::ClientConfig;
use mesh_api::identity::NodeRole;
use serde::Serialize;
use serde_json::{Value, json};

use super::world::{World, node_name, uid};
use crate::harness::process::{Process, command, succeed};
use crate::harness::{Error, io};

pub(super) struct Controller {
    process: Process,
    address: SocketAddr,
    directory: PathBuf,
    log: PathBuf,
}

/// What the process has used.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Usage {
    pub(super) rss_mib: f64,
    pub(super) peak_rss_mib: f64,
    pub(super) cpu_seconds: f64,
}

impl Controller {
    /// Starts it on the manifests in `directory`, with every pod enrolled already, as after a restart; waits
    /// until it is ready.
    pub(super) fn start(
        binaries: &Path,
        directory: &Path,
        world: &World,
        limit: Duration,
    ) -> Result<Self, Error> {
        let write = |name: &str, text: String| {
            let path = directory.join(name);
            fs::write(&path, text).map_err(io(format!("write {}", path.display())))
        };
        for below in ["ca", "state", "tokens"] {
            let path = directory.join(below);
            fs::create_dir_all(&path).map_err(io(format!("make {}", path.display())))?;
        }
        let nodes: Vec<String> = (0..world.size.nodes).map(node_name).collect();
        let mut tokens = String::new();
        for (node, role) in nodes.iter().flat_map(|node| ROLES.map(|role| (node, role))) {
            let token = format!("{node}-{role}");
            tokens.push_str(&format!("{node} {role} {token}\n"));
            write(&format!("tokens/{token}"), token)?;
        }
        write("tokens.txt", tokens)?;
        let pods = world.present().map(|(number, pod)| {
            let stored = json!({"node": node_name(pod.node), "addresses": [], "phase": "enforced"});
            (uid(number), stored)
        });
        let pods: serde_json::Map<String, Value> = pods.collect();
        let state = json!({"nodes": BTreeSet::from_iter(&nodes), "pods": pods});
        write("state/enrolled.json", state.to_string())?;
        let [address, metrics, health] = free_addresses()?;
        let config = json!({
            "listen": address,
            "metricsListen": metrics,
            "healthListen": health,
            "provider": {"directory": directory.join("manifests")},
            "ca": {"directory": directory.join("ca")},
            "tokens": directory.join("tokens.txt"),
            "stateDir": directory.join("state"),
        });
        write("controller.yaml", config.to_string())?;
        let log = directory.join("controller.log");
        let mut start = command("setpriv --pdeathsig KILL");
        start
            .arg(binaries.join("warren-controller"))
            .arg("--config")
            .arg(directory.join("controller.yaml"));
        let process = Process::spawn(&mut start, &log)?;
        let mut controller = Self {
            process,
            address,
            directory: directory.to_owned(),
            log,
        };
        controller.wait(limit)?;
        Ok(controller)
    }

    fn wait(&mut self, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        loop {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            if log.contains("controller ready") {
                return Ok(());
            }
            if self.process.has_ended() || Instant::now() > deadline {
                return Err(Error::Other(format!(
                    "the controller did not get ready in {limit:?}; see {}",
                    self.log.display()
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How a process of a node reaches it.
    pub(super) fn client(&self, node: usize, role: NodeRole) -> ClientConfig {
        let node = node_name(node);
        ClientConfig {
            address: self.address.to_string(),
            trust_bundle: self.directory.join("ca/root.crt"),
            token_file: self.directory.join(format!("tokens/{node}-{role}")),
            node,
            role,
            credentials_dir: None,
        }
    }

    pub(super) fn usage(&self) -> Result<Usage, Error> {
        let pid = self.process.pid();
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).map_err(io(format!("read {path}; did the controller end?")))
        };
        let status = read("status")?;
        let mib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
            kib.unwrap_or(f64::NAN) / 1024.0
        };
        // The name in parentheses may hold spaces. utime and stime are fields 14 and 15, in ticks of 10 ms.
        let stat = read("stat")?;
        let ticks = stat.rsplit(')').next().unwrap_or_default();
        let ticks = ticks.split_whitespace().skip(11).take(2);
        let ticks: f64 = ticks.filter_map(|t| t.parse::<f64>().ok()).sum();
        Ok(Usage {
            rss_mib: mib("VmRSS:"),
            peak_rss_mib: mib("VmHWM:"),
            cpu_seconds: ticks / 100.0,
        })
    }

    /// Bytes that all present connections have brought to the nodes, TLS and HTTP/2 included.
    pub(super) fn bytes_sent(&self) -> Result<u64, Error> {
        let port = self.address.port();
        let text = succeed(&mut command(&format!("ss -tinH dport = :{port}")))?;
        let counts = text
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("bytes_received:")?.parse::<u64>().ok());
        Ok(counts.sum())
    }

    /// Lines of its log that say that something went wrong, the first of them.
    pub(super) fn complaints(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let bad = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
        log.lines()
            .filter(bad)
            .take(10)
            .map(str::to_owned)
            .collect()
    }
}

/// Three ports that nobody listens on now.
fn free_addresses() -> Result<[SocketAddr; 3], Error> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io("bind to loopback"));
    let listeners = [bind()?, bind()?, bind()?];
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); 3];
    for (address, listener) in addresses.iter_mut().zip(&listeners) {
        *address = listener.local_addr().map_err(io("name a listener"))?;
    }
    Ok(addresses)
}

const ROLES: [NodeRole; 2] = [NodeRole::Proxy, NodeRole::Agent];
