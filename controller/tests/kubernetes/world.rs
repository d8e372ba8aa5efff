//! What a cluster has: nodes, Warren's own pods on them, a meshed namespace, and controllers.

use mesh_api::proto::control::Role;
use mesh_api::proto::control::enrolment_client::EnrolmentClient;
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::transport::Channel;
use warren_controller::config::{Config, Kubernetes, Provider};
use warren_controller::run::Controller;

use crate::apiserver::ApiServer;
use crate::common::{Agent, Credentials, Lab, Stream, csr, soon};

pub(crate) const PODS: &str = "/api/v1/namespaces/demo/pods";
pub(crate) const SYSTEM_PODS: &str = "/api/v1/namespaces/warren-system/pods";

impl ApiServer {
    /// node-1 and node-2 with Warren's own pods, and the meshed namespace `demo`.
    pub(crate) async fn populate(&self) {
        for account in [
            "warren-cni",
            "warren-node-proxy",
            "warren-controller",
            "default",
        ] {
            let account = json!({ "metadata": { "name": account } });
            self.post("/api/v1/namespaces/warren-system/serviceaccounts", account)
                .await;
        }
        for number in [1, 2] {
            let name = format!("node-{number}");
            self.post("/api/v1/nodes", json!({ "metadata": { "name": name } }))
                .await;
            let address = format!("192.0.2.{number}");
            let addresses = json!([{ "type": "InternalIP", "address": address }]);
            let status = json!({ "status": { "addresses": addresses } });
            self.patch(&format!("/api/v1/nodes/{name}/status"), status)
                .await;
            for account in ["warren-cni", "warren-node-proxy"] {
                self.pod(
                    "warren-system",
                    &format!("{account}-{number}"),
                    &name,
                    account,
                )
                .await;
            }
        }
        let labels = json!({ "metadata": { "labels": { "warren-mesh.io/mesh": "enabled" } } });
        self.patch("/api/v1/namespaces/demo", labels).await;
        let service = json!({
            "metadata": { "name": "web" },
            "spec": { "ports": [{ "name": "http", "port": 80 }] },
        });
        self.post("/api/v1/namespaces/demo/services", service).await;
    }

    /// A pod that is bound to a node; its UID.
    pub(crate) async fn pod(
        &self,
        namespace: &str,
        name: &str,
        node: &str,
        account: &str,
    ) -> String {
        let pod = json!({
            "metadata": { "name": name },
            "spec": {
                "nodeName": node, "serviceAccountName": account,
                "containers": [{ "name": "c", "image": "x" }],
            },
        });
        let pod = self
            .post(&format!("/api/v1/namespaces/{namespace}/pods"), pod)
            .await;
        pod["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    /// What the kubelet writes once a pod runs.
    pub(crate) async fn running(&self, name: &str, address: &str) {
        let ips = json!([{ "ip": address }]);
        let status = json!({ "status": { "phase": "Running", "podIP": address, "podIPs": ips } });
        self.patch(&format!("{PODS}/{name}/status"), status).await;
    }

    /// A token as the kubelet asks for it.
    pub(crate) async fn token(&self, account: &str, pod: &str, audience: &str) -> String {
        let pod = self.get(&format!("{SYSTEM_PODS}/{pod}")).await.unwrap();
        let request = json!({
            "spec": {
                "audiences": [audience], "expirationSeconds": 600,
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod",
                    "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"],
                },
            },
        });
        let path = format!("/api/v1/namespaces/warren-system/serviceaccounts/{account}/token");
        let answer = self.post(&path, request).await;
        answer["status"]["token"].as_str().unwrap().to_owned()
    }

    /// A controller, by the name of its replica.
    pub(crate) async fn controller(&self, replica: &str) -> Lab {
        let dir = TempDir::new().unwrap();
        let controller = soon("start", Controller::start(&self.config(replica)))
            .await
            .unwrap();
        Lab { dir, controller }
    }

    pub(crate) fn config(&self, replica: &str) -> Config {
        let loopback = ([127, 0, 0, 1], 0).into();
        let kubernetes = Kubernetes {
            kubeconfig: Some(self.dir.path().join("controller")),
            replica: Some(replica.into()),
            ..Kubernetes::default()
        };
        Config {
            listen: loopback,
            metrics_listen: loopback,
            health_listen: loopback,
            provider: Provider {
                directory: None,
                kubernetes: Some(kubernetes),
            },
            ..Config::default()
        }
    }

    /// A connection of a node's proxy, with the certificate that its token gives it.
    pub(crate) async fn channel(&self, lab: &Lab, number: u8) -> Channel {
        let credentials = self.credentials(lab, number, Role::Proxy).await;
        soon("connect", lab.channel(Some(credentials)))
            .await
            .unwrap()
    }

    /// The proxy of a node.
    pub(crate) async fn proxy(&self, lab: &Lab, number: u8) -> Stream {
        Stream::open(self.channel(lab, number).await, &format!("node-{number}")).await
    }

    /// The agent of a node likewise.
    pub(crate) async fn agent(&self, lab: &Lab, number: u8) -> Agent {
        let credentials = self.credentials(lab, number, Role::Agent).await;
        let channel = soon("connect", lab.channel(Some(credentials)))
            .await
            .unwrap();
        Agent {
            stream: Stream::open(channel.clone(), &format!("node-{number}")).await,
            calls: EnrolmentClient::new(channel),
        }
    }

    async fn credentials(&self, lab: &Lab, number: u8, role: Role) -> Credentials {
        let account = match role {
            Role::Agent => "warren-cni",
            _ => "warren-node-proxy",
        };
        let pod = format!("{account}-{number}");
        let token = self.token(account, &pod, "warren-controller").await;
        let key = KeyPair::generate().unwrap();
        let node = format!("node-{number}");
        let issued = lab
            .issue_node(&node, role, &token, csr(&key))
            .await
            .unwrap();
        Credentials::new(&issued, &key)
    }

    /// What is recorded at a pod of `demo`.
    pub(crate) async fn recorded(&self, name: &str) -> Value {
        let pod = self.get(&format!("{PODS}/{name}")).await.unwrap();
        recorded_in(&pod)
    }
}

pub(crate) fn recorded_in(pod: &Value) -> Value {
    let text = pod["metadata"]["annotations"]["warren-mesh.io/enrolled"].as_str();
    text.map_or(Value::Null, |text| serde_json::from_str(text).unwrap())
}
