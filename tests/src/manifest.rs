//! Kubernetes manifests, as small as tests need them.

use serde_json::{Value, json};

use crate::scenario::binary;

/// A Namespace; `labels` such as `("warren-mesh.io/mesh", "enabled")`.
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let labels: serde_json::Map<_, _> = labels
        .iter()
        .map(|(k, v)| ((*k).to_owned(), json!(v)))
        .collect();
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A Namespace that opted in.
pub fn meshed_namespace(name: &str) -> Value {
    namespace(name, &[(mesh_api::names::MESH_LABEL, "enabled")])
}

/// A ServiceAccount.
pub fn account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
}

/// A dual-stack Service of the pods labelled `app: <name>`; ports are (port, target port).
pub fn service(namespace: &str, name: &str, ports: &[(u16, u16)]) -> Value {
    let ports: Vec<Value> = ports
        .iter()
        .map(|(port, target)| json!({"name": format!("p{port}"), "port": port, "targetPort": target}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ipFamilyPolicy": "PreferDualStack", "ports": ports},
    })
}

/// [`service`] with an `appProtocol` where one is given: (port, target port, protocol).
pub fn service_of(namespace: &str, name: &str, ports: &[(u16, u16, Option<&str>)]) -> Value {
    let plain: Vec<(u16, u16)> = ports.iter().map(|(p, t, _)| (*p, *t)).collect();
    let mut service = service(namespace, name, &plain);
    for (at, (_, _, protocol)) in ports.iter().enumerate() {
        if let Some(protocol) = protocol {
            service["spec"]["ports"][at]["appProtocol"] = json!(protocol);
        }
    }
    service
}

/// A Pod with one container.
#[derive(Clone, Debug)]
pub struct Pod(Value);

impl Pod {
    /// A pod that only idles, of service account `name`, labelled `app: <name>`.
    pub fn new(namespace: &str, name: &str, node: &str) -> Self {
        Self(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}, "annotations": {}},
            "spec": {
                "nodeName": node,
                "serviceAccountName": name,
                "restartPolicy": "Always",
                "containers": [{"name": "app", "image": "none", "command": ["sleep", "infinity"]}],
            },
        }))
    }

    /// An idle pod in which the tests run their clients.
    pub fn idle(namespace: &str, name: &str, node: &str) -> Value {
        Self::new(namespace, name, node).build()
    }

    /// The server [`mesh-echo`](../../src/bin/mesh-echo.rs) on its usual ports, ready when it listens.
    pub fn echo(namespace: &str, name: &str, node: &str) -> Self {
        Self::new(namespace, name, node)
            .command(&[&binary("mesh-echo").display().to_string(), "--log"])
            .ready_tcp(ECHO)
    }

    /// The server [`mesh-http`](../../src/bin/mesh-http.rs), ready when it answers.
    pub fn http(namespace: &str, name: &str, node: &str) -> Self {
        Self::new(namespace, name, node)
            .command(&[&binary("mesh-http").display().to_string(), "--name", name])
            .ready_http(crate::http::ADMIN, "/count")
    }

    /// What runs in the container.
    pub fn command(mut self, command: &[&str]) -> Self {
        self.container()["command"] = json!(command);
        self
    }

    /// The service account.
    pub fn account(mut self, name: &str) -> Self {
        self.0["spec"]["serviceAccountName"] = json!(name);
        self
    }

    /// A label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["labels"][key] = json!(value);
        self
    }

    /// An annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["annotations"][key] = json!(value);
        self
    }

    /// A readiness probe that connects to a port.
    pub fn ready_tcp(mut self, port: u16) -> Self {
        self.container()["readinessProbe"] =
            json!({"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 3});
        self
    }

    /// A readiness probe that asks over HTTP.
    pub fn ready_http(mut self, port: u16, path: &str) -> Self {
        self.container()["readinessProbe"] = json!({"httpGet": {"port": port, "path": path}, "periodSeconds": 1, "failureThreshold": 3});
        self
    }

    /// The manifest.
    pub fn build(self) -> Value {
        self.0
    }

    fn container(&mut self) -> &mut Value {
        &mut self.0["spec"]["containers"][0]
    }
}

/// Several documents in one YAML stream (JSON is YAML).
pub fn documents(documents: &[Value]) -> String {
    documents.iter().map(|d| format!("---\n{d}\n")).collect()
}

/// A Service of a `mesh-echo` pod, with all its ports.
pub fn echo_service(namespace: &str, name: &str) -> Value {
    service(
        namespace,
        name,
        &[ECHO, WHO, COUNT, RESET, BLAST, CLOSED].map(|p| (p, p)),
    )
}

/// The topology most tests use: in the meshed namespace `demo`, an idle `client` on node 1, the servers
/// `near` on node 1 and `far` on node 2 with a Service each.
pub fn near_and_far() -> Vec<Value> {
    let mut all = vec![meshed_namespace("demo")];
    all.extend(["client", "near", "far"].map(|name| account("demo", name)));
    all.push(Pod::idle("demo", "client", "node-1"));
    for (name, node) in [("near", "node-1"), ("far", "node-2")] {
        all.push(Pod::echo("demo", name, node).build());
        all.push(echo_service("demo", name));
    }
    all
}

/// The idle pod of [`near_and_far`].
pub const CLIENT: (&str, &str) = ("demo", "client");
/// The server of [`near_and_far`] on node 1.
pub const NEAR: (&str, &str) = ("demo", "near");
/// The server of [`near_and_far`] on node 2.
pub const FAR: (&str, &str) = ("demo", "far");

/// Port of `mesh-echo` that sends back what comes.
pub const ECHO: u16 = 7000;
/// Port of `mesh-echo` that first sends `peer <address>`, then echoes.
pub const WHO: u16 = 7001;
/// Port of `mesh-echo` that reads to the end and then answers how much came.
pub const COUNT: u16 = 7002;
/// Port of `mesh-echo` that resets the connection after one line.
pub const RESET: u16 = 7003;
/// Port of `mesh-echo` that sends as many bytes as the first line asks for.
pub const BLAST: u16 = 7004;
/// A port on which nothing listens.
pub const CLOSED: u16 = 7999;
