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

use super::arm::{FIRST_CORE, PORT, ROUTES, SECOND_CORE};
use super::process::{self, succeed};
use super::{Error, Options, io};
use crate::load::{Case, Plan};

/// A running lab; taken down when dropped.
pub(super) struct Lab {
    warren: PathBuf,
}

/// Which of the lab's pods.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Un-meshed, on two nodes.
    Plain,
    /// Meshed, on two nodes.
    Meshed,
    /// The same client, and a server on its node.
    SameNode,
}

/// How the client of one namespace of the lab reaches its server.
pub(super) struct Way {
    pub(super) client: PathBuf,
    pub(super) proxies: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Pod {
    name: String,
    namespace: String,
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

    /// Clients and the first node's proxy on the first core, servers and the second's on the second.
    fn pin(&self) -> Result<(), Error> {
        for node in self.nodes()? {
            let first = node.name == "node-1";
            let core = if first { FIRST_CORE } else { SECOND_CORE };
            process::pin(node.proxy_supervisor_pid, core)?;
        }
        for pod in self.pods()? {
            let client = pod.name == "client";
            process::pin(pod.pid, if client { FIRST_CORE } else { SECOND_CORE })?;
        }
        Ok(())
    }

    pub(super) fn way(&self, side: Side) -> Result<Way, Error> {
        let namespace = side.namespace();
        let pods = self.pods()?;
        let client = pods
            .iter()
            .find(|pod| pod.namespace == namespace && pod.name == "client");
        let client =
            client.ok_or_else(|| Error::Other(format!("the lab has no pod {namespace}/client")))?;
        let nodes = self.nodes()?;
        let proxies = nodes
            .iter()
            .filter(|node| match side {
                Side::Plain => false,
                Side::Meshed => true,
                Side::SameNode => node.name == "node-1",
            })
            .map(|node| process::tree(node.proxy_supervisor_pid))
            .collect();
        Ok(Way {
            client: client.netns.clone(),
            proxies,
        })
    }

    /// The Service to address.
    pub(super) fn target(side: Side, plan: &Plan) -> SocketAddr {
        SocketAddr::new(cluster_ip(side, front(side, plan)), PORT)
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

impl Side {
    fn namespace(self) -> &'static str {
        match self {
            Side::Plain => "plain",
            Side::Meshed | Side::SameNode => "meshed",
        }
    }
}

/// Each way to look at the server is a Service of its own. Its position in the list is in its address.
fn fronts() -> Vec<Front> {
    let kinds = [("http", "HTTPRoute"), ("grpc", "GRPCRoute")];
    let http = kinds.into_iter().flat_map(|(name, kind)| {
        ROUTES.into_iter().map(move |routes| Front {
            name: format!("{name}-{routes}"),
            protocol: "http",
            kind,
            routes,
        })
    });
    let tcp = Front {
        name: "tcp".into(),
        protocol: "tcp",
        kind: "",
        routes: 0,
    };
    std::iter::once(tcp).chain(http).collect()
}

struct Front {
    name: String,
    /// `appProtocol` of its port.
    protocol: &'static str,
    /// Of the routes attached to it.
    kind: &'static str,
    routes: usize,
}

fn front(side: Side, plan: &Plan) -> usize {
    let wanted = match (side, plan.case) {
        (Side::Plain, _) => "tcp".to_owned(),
        (_, Case::Http1 | Case::Http2) => format!("http-{}", plan.routes),
        (_, Case::Grpc) => format!("grpc-{}", plan.routes),
        _ => "tcp".into(),
    };
    fronts()
        .iter()
        .position(|front| front.name == wanted)
        .expect("plans have the numbers of `ROUTES`")
}

fn cluster_ip(side: Side, front: usize) -> IpAddr {
    IpAddr::from([10, 96, 77 + side as u8, 1 + front as u8])
}

fn manifests(this: &Path) -> String {
    let mut text = String::new();
    for (side, meshed) in [(Side::Meshed, true), (Side::Plain, false)] {
        text += &NAMESPACE
            .replace("MESH", if meshed { "enabled" } else { "disabled" })
            .replace("NAMESPACE", side.namespace());
        text += &server(side, "server", "node-2", this);
        text += &services(side, "server");
        if meshed {
            text += &server(side, "local", "node-1", this);
            text += &services(Side::SameNode, "local");
        }
    }
    text
}

fn server(side: Side, name: &str, node: &str, this: &Path) -> String {
    SERVER
        .replace("NAMESPACE", side.namespace())
        .replace("NAME", name)
        .replace("NODE", node)
        .replace("PORT", &PORT.to_string())
        .replace("PROGRAM", &this.display().to_string())
}

fn services(side: Side, server: &str) -> String {
    let mut text = String::new();
    for (index, front) in fronts().into_iter().enumerate() {
        let name = format!("{server}-{}", front.name);
        text += &SERVICE
            .replace("NAMESPACE", side.namespace())
            .replace("CLUSTER_IP", &cluster_ip(side, index).to_string())
            .replace("NAME", &name)
            .replace("SERVER", server)
            .replace("PROTOCOL", front.protocol)
            .replace("PORT", &PORT.to_string());
        for route in 1..=front.routes {
            // Of all of them the last one matches what is sent.
            let last = route == front.routes;
            let matching = match (front.kind, last) {
                ("HTTPRoute", true) => r#"path: {type: PathPrefix, value: "/bench"}"#.to_owned(),
                ("HTTPRoute", false) => {
                    format!(r#"path: {{type: PathPrefix, value: "/route-{route}"}}"#)
                }
                (_, true) => "method: {service: bench.Echo, method: Say}".to_owned(),
                (_, false) => format!("method: {{service: bench.Route{route}, method: Say}}"),
            };
            text += &ROUTE
                .replace("KIND", front.kind)
                .replace("ROUTE", &format!("{name}-{route:03}"))
                .replace("NAMESPACE", side.namespace())
                .replace("NAME", &name)
                .replace("BACKEND", &format!("{server}-http-0"))
                .replace("MATCH", &matching)
                .replace("PORT", &PORT.to_string());
        }
    }
    text
}

const NAME: &str = "bench";
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
"#;
const SERVER: &str = r#"---
apiVersion: v1
kind: Pod
metadata: { name: NAME, namespace: NAMESPACE, labels: { app: NAME } }
spec:
  nodeName: NODE
  serviceAccountName: server
  containers:
    - name: server
      image: none
      command: [PROGRAM, serve, --listen, "0.0.0.0:PORT"]
      readinessProbe: { tcpSocket: { port: PORT } }
"#;
const SERVICE: &str = r#"---
apiVersion: v1
kind: Service
metadata: { name: NAME, namespace: NAMESPACE }
spec:
  clusterIP: CLUSTER_IP
  selector: { app: SERVER }
  ports: [{ name: main, port: PORT, appProtocol: PROTOCOL }]
"#;
const ROUTE: &str = r#"---
apiVersion: gateway.networking.k8s.io/v1
kind: KIND
metadata: { name: ROUTE, namespace: NAMESPACE }
spec:
  parentRefs: [{ group: "", kind: Service, name: NAME }]
  rules:
    - matches: [{ MATCH }]
      backendRefs: [{ name: BACKEND, port: PORT }]
"#;
