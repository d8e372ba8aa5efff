//! Warren's arm: a lab of two nodes, the client's pod on one, the server's on the other, meshed and
//! un-meshed side by side.
//!
//! The load takes the whole real way: capture in the pod's namespace, the Service's address, the
//! tunnel between the nodes' addresses, delivery with the caller's address. That is one link and
//! several more rules and lookups than the yardstick's way.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::arm::{FIRST_CORE, PORT, SECOND_CORE};
use super::process::{self, succeed};
use super::{Error, Options, io};

/// A running lab; taken down when dropped.
pub(super) struct Lab {
    warren: PathBuf,
}

/// How the client of one namespace of the lab reaches its server.
pub(super) struct Way {
    pub(super) client: PathBuf,
    pub(super) target: SocketAddr,
    pub(super) proxies: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Pod {
    name: String,
    namespace: String,
    node: String,
    netns: PathBuf,
    /// 0 without a process.
    pid: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    name: String,
    /// The worker is its child. 0 without a process.
    proxy_supervisor_pid: u32,
}

impl Lab {
    pub(super) fn up(options: &Options) -> Result<Self, Error> {
        let lab = Lab {
            warren: options.binaries.join("warren"),
        };
        if !lab.warren.exists() {
            return Err(Error::Other(format!(
                "{} is missing; build the workspace with the same profile (make bench does)",
                lab.warren.display()
            )));
        }
        // What a killed run left.
        let _ = succeed(&mut lab.lab("down"));
        let this = std::env::current_exe().map_err(io("find this program"))?;
        let manifest = options.work.join("lab.yaml");
        std::fs::write(&manifest, manifests(&this))
            .map_err(io(format!("write {}", manifest.display())))?;
        // The yardstick writes no access log either; the lab's default does.
        let overlay = options.work.join("proxy.yaml");
        std::fs::write(&overlay, "accessLog: off\n")
            .map_err(io(format!("write {}", overlay.display())))?;
        let mut up = lab.lab("up");
        up.args(["--nodes", "2", "--workers", "1"]);
        up.arg("--config")
            .arg(format!("proxy={}", overlay.display()));
        succeed(up.arg("-f").arg(&manifest))?;
        lab.pin()?;
        Ok(lab)
    }

    /// Everything of node 1 on the first core, everything of node 2 on the second.
    fn pin(&self) -> Result<(), Error> {
        let core = |node: &str| {
            if node == "node-1" {
                FIRST_CORE
            } else {
                SECOND_CORE
            }
        };
        for node in self.nodes()? {
            process::pin(node.proxy_supervisor_pid, core(&node.name))?;
        }
        for pod in self.pods()? {
            process::pin(pod.pid, core(&pod.node))?;
        }
        Ok(())
    }

    pub(super) fn way(&self, meshed: bool) -> Result<Way, Error> {
        let namespace = if meshed { MESHED } else { PLAIN };
        let pods = self.pods()?;
        let client = pods
            .iter()
            .find(|pod| pod.namespace == namespace && pod.name == "client");
        let client =
            client.ok_or_else(|| Error::Other(format!("the lab has no pod {namespace}/client")))?;
        let proxies = match meshed {
            false => Vec::new(),
            true => self
                .nodes()?
                .iter()
                .map(|n| process::tree(n.proxy_supervisor_pid))
                .collect(),
        };
        Ok(Way {
            client: client.netns.clone(),
            target: SocketAddr::new(cluster_ip(meshed), PORT),
            proxies,
        })
    }

    /// The cipher as the nodes' own metrics tell it.
    pub(super) fn facts(&self) -> Vec<(String, String)> {
        let version = succeed(Command::new(&self.warren).arg("--version")).unwrap_or_default();
        let mut facts = vec![("warren version".to_owned(), version.trim().to_owned())];
        for node in self.nodes().unwrap_or_default() {
            let metrics = succeed(self.lab("metrics").arg(&node.name)).unwrap_or_default();
            let handshakes = metrics.lines().filter(|line| line.starts_with(HANDSHAKES));
            facts.extend(handshakes.map(|line| (format!("warren {}", node.name), line.to_owned())));
        }
        facts
    }

    fn pods(&self) -> Result<Vec<Pod>, Error> {
        self.get("pods")
    }

    fn nodes(&self) -> Result<Vec<Node>, Error> {
        self.get("nodes")
    }

    fn get<T: serde::de::DeserializeOwned>(&self, what: &str) -> Result<T, Error> {
        let text = succeed(self.lab("get").args([what, "-o", "json"]))?;
        serde_json::from_str(&text)
            .map_err(|e| Error::Other(format!("`warren lab get {what} -o json`: {e}")))
    }

    fn lab(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.warren);
        command
            .args(["lab", verb, "--name", NAME])
            .stdin(std::process::Stdio::null());
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = succeed(&mut self.lab("down"));
    }
}

fn cluster_ip(meshed: bool) -> IpAddr {
    IpAddr::from(if meshed {
        [10, 96, 77, 1]
    } else {
        [10, 96, 77, 2]
    })
}

fn manifests(this: &Path) -> String {
    let mut text = String::new();
    for (namespace, meshed) in [(MESHED, true), (PLAIN, false)] {
        text += &NAMESPACE
            .replace("NAMESPACE", namespace)
            .replace("MESH", if meshed { "enabled" } else { "disabled" })
            .replace("CLUSTER_IP", &cluster_ip(meshed).to_string())
            .replace("PORT", &PORT.to_string())
            .replace("PROGRAM", &this.display().to_string());
    }
    text
}

const NAME: &str = "bench";
const MESHED: &str = "meshed";
const PLAIN: &str = "plain";
const HANDSHAKES: &str = "warren_tunnel_handshakes_total";
const NAMESPACE: &str = r#"---
apiVersion: v1
kind: Namespace
metadata:
  name: NAMESPACE
  labels: { warren-mesh.io/mesh: MESH }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: client, namespace: NAMESPACE }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: server, namespace: NAMESPACE }
---
apiVersion: v1
kind: Pod
metadata: { name: client, namespace: NAMESPACE }
spec:
  nodeName: node-1
  serviceAccountName: client
  containers:
    - { name: client, image: none, command: [sleep, infinity] }
---
apiVersion: v1
kind: Pod
metadata: { name: server, namespace: NAMESPACE, labels: { app: server } }
spec:
  nodeName: node-2
  serviceAccountName: server
  containers:
    - name: server
      image: none
      command: [PROGRAM, serve, --listen, "0.0.0.0:PORT"]
      readinessProbe: { tcpSocket: { port: PORT } }
---
apiVersion: v1
kind: Service
metadata: { name: server, namespace: NAMESPACE }
spec:
  clusterIP: CLUSTER_IP
  selector: { app: server }
  ports: [{ name: tcp, port: PORT, appProtocol: tcp }]
"#;
