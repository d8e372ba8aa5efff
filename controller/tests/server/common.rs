//! A real controller on a loopback port, and nodes that speak to it over real TLS.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use mesh_api::names::CONTROLLER_NAME;
use mesh_api::proto::control::certificates_client::CertificatesClient;
use mesh_api::proto::control::enrolment_client::EnrolmentClient;
use mesh_api::proto::control::{
    IssueNodeRequest, IssueResponse, IssueWorkloadRequest, NodeReport, PodReport, PodState,
    RegisterPodRequest, Role,
};
use mesh_api::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_api::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as XdsStatus,
};
use mesh_api::proto::{Resource, mesh};
use mesh_api::tls;
use prost::Message;
use rcgen::{CertificateParams, KeyPair};
use rustls::ClientConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};
use warren_controller::config::Config;
use warren_controller::run::Controller;

/// Longer than anything takes; reaching it is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("did not happen in time: {what}"),
    }
}

/// A controller with its directories.
pub(crate) struct Lab {
    pub(crate) dir: TempDir,
    pub(crate) controller: Controller,
}

pub(crate) const TOKENS: &str =
    "node-1 proxy p1\nnode-1 agent a1\nnode-2 proxy p2\nnode-2 agent a2\n";

/// Two nodes, a meshed namespace with `web` on node-1 and `client` on node-2, and a Service.
pub(crate) const DEMO: &str = include_str!("demo.yaml");

pub(crate) const WEB: &str = "00000000-0000-0000-0000-0000000000aa";
pub(crate) const CLIENT: &str = "00000000-0000-0000-0000-0000000000bb";

impl Lab {
    pub(crate) async fn start(manifests: &str) -> Self {
        let dir = TempDir::new().unwrap();
        for sub in ["manifests", "ca", "state"] {
            std::fs::create_dir(dir.path().join(sub)).unwrap();
        }
        std::fs::write(dir.path().join("manifests/demo.yaml"), manifests).unwrap();
        std::fs::write(dir.path().join("tokens"), TOKENS).unwrap();
        let controller = Controller::start(&config(&dir)).await.unwrap();
        Self { dir, controller }
    }

    /// Stops the controller and starts another on the same directories.
    pub(crate) async fn restart(self) -> Self {
        let Self { dir, controller } = self;
        controller.stop().await;
        let controller = Controller::start(&config(&dir)).await.unwrap();
        Self { dir, controller }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Replaces a file as editors do, by rename.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(&temporary, &path).unwrap();
    }

    pub(crate) fn edit(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path("manifests/demo.yaml")).unwrap();
        assert!(text.contains(from), "{from}");
        self.write("manifests/demo.yaml", &text.replace(from, to));
    }

    /// Waits until the state is as wanted; looked at whenever something moves.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) {
        let hub = self.controller.hub();
        let (mut snapshots, mut progress) = (hub.snapshots(), hub.progress());
        let reached = async {
            while !wanted(&hub.status()) {
                tokio::select! {
                    changed = snapshots.changed() => changed.unwrap(),
                    changed = progress.changed() => changed.unwrap(),
                }
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("never came to pass: {what}; {:#}", hub.status());
        }
    }

    pub(crate) async fn until_phase(&self, uid: &str, phase: &str) {
        self.until(&format!("{uid} {phase}"), |status| {
            phase_of(status, uid) == phase
        })
        .await;
    }

    pub(crate) fn phase(&self, uid: &str) -> String {
        phase_of(&self.controller.hub().status(), uid)
    }

    /// A metric's value; 0 if it was never counted.
    pub(crate) fn metric(&self, line: &str) -> f64 {
        let text = self.controller.hub().metrics().encode();
        let found = text.lines().find_map(|l| l.strip_prefix(line));
        found.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    pub(crate) async fn channel(
        &self,
        credentials: Option<Credentials>,
    ) -> Result<Channel, tonic::transport::Error> {
        let bundle = self.controller.authority().bundle();
        self.channel_trusting(credentials, &bundle).await
    }

    pub(crate) async fn channel_trusting(
        &self,
        credentials: Option<Credentials>,
        bundle: &[Vec<u8>],
    ) -> Result<Channel, tonic::transport::Error> {
        let roots = tls::roots(bundle.iter().map(Vec::as_slice)).unwrap();
        let builder = ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match credentials {
            None => builder.with_no_client_auth(),
            Some(c) => builder.with_client_auth_cert(c.chain, c.key).unwrap(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let address = self.controller.address();
        Endpoint::from_static("http://controller")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let connector = connector.clone();
                async move {
                    let socket = TcpStream::connect(address).await?;
                    let name = ServerName::try_from(CONTROLLER_NAME).unwrap();
                    let stream = connector.connect(name, socket).await?;
                    Ok::<_, std::io::Error>(TokioIo::new(stream))
                }
            }))
            .await
    }

    /// Gets a node certificate and connects with it.
    pub(crate) async fn node(&self, node: &str, role: Role) -> Channel {
        let credentials = self.node_credentials(node, role).await;
        soon("connect", self.channel(Some(credentials)))
            .await
            .unwrap()
    }

    pub(crate) async fn node_credentials(&self, node: &str, role: Role) -> Credentials {
        let number = node.strip_prefix("node-").unwrap();
        let letter = if role == Role::Proxy { 'p' } else { 'a' };
        let token = format!("{letter}{number}");
        let key = KeyPair::generate().unwrap();
        let response = self
            .issue_node(node, role, &token, csr(&key))
            .await
            .unwrap();
        Credentials::new(&response, &key)
    }

    pub(crate) async fn issue_node(
        &self,
        node: &str,
        role: Role,
        token: &str,
        csr: Vec<u8>,
    ) -> Result<IssueResponse, Status> {
        let channel = self.channel(None).await.unwrap();
        let request = IssueNodeRequest {
            token: token.into(),
            node: node.into(),
            role: role.into(),
            csr,
        };
        let answer = CertificatesClient::new(channel).issue_node(request).await;
        answer.map(tonic::Response::into_inner)
    }

    pub(crate) async fn proxy(&self, node: &str) -> Stream {
        Stream::open(self.node(node, Role::Proxy).await, node).await
    }

    pub(crate) async fn agent(&self, node: &str) -> Agent {
        let channel = self.node(node, Role::Agent).await;
        Agent {
            stream: Stream::open(channel.clone(), node).await,
            calls: EnrolmentClient::new(channel),
        }
    }
}

pub(crate) fn config(dir: &TempDir) -> Config {
    let loopback = ([127, 0, 0, 1], 0).into();
    let mut config = Config {
        listen: loopback,
        metrics_listen: loopback,
        health_listen: loopback,
        tokens: Some(dir.path().join("tokens")),
        state_dir: Some(dir.path().join("state")),
        ..Config::default()
    };
    config.provider.directory = Some(dir.path().join("manifests"));
    config.ca.directory = Some(dir.path().join("ca"));
    config
}

fn phase_of(status: &serde_json::Value, uid: &str) -> String {
    let pods = status["pods"].as_array().unwrap();
    let pod = pods.iter().find(|p| p["uid"] == uid);
    pod.map_or("absent", |p| p["phase"].as_str().unwrap())
        .to_owned()
}

pub(crate) fn csr(key: &KeyPair) -> Vec<u8> {
    // Asks for names it must not get.
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.serialize_request(key).unwrap().der().to_vec()
}

pub(crate) struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Credentials {
    pub(crate) fn new(response: &IssueResponse, key: &KeyPair) -> Self {
        Self {
            chain: response
                .chain
                .iter()
                .map(|der| CertificateDer::from(der.clone()))
                .collect(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        }
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

pub(crate) async fn issue_workload(
    channel: &Channel,
    identity: &str,
) -> Result<(IssueResponse, KeyPair), Status> {
    let key = KeyPair::generate().unwrap();
    let request = IssueWorkloadRequest {
        identity: identity.into(),
        csr: csr(&key),
    };
    let answer = CertificatesClient::new(channel.clone())
        .issue_workload(request)
        .await;
    answer.map(|r| (r.into_inner(), key))
}

pub(crate) fn bundle_of(path: &std::path::Path) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(path)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

/// A discovery stream whose acknowledgements the test decides on.
pub(crate) struct Stream {
    pub(crate) requests: mpsc::Sender<DeltaDiscoveryRequest>,
    pub(crate) responses: Streaming<DeltaDiscoveryResponse>,
    pub(crate) node: String,
}

impl Stream {
    pub(crate) async fn open(channel: Channel, node: &str) -> Self {
        Self::try_open(channel, node).await.unwrap()
    }

    pub(crate) async fn try_open(channel: Channel, node: &str) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let answer = client.delta_aggregated_resources(ReceiverStream::new(outgoing));
        Ok(Self {
            requests,
            responses: soon("stream", answer).await?.into_inner(),
            node: node.into(),
        })
    }

    pub(crate) async fn request<T: Resource>(&self, mut request: DeltaDiscoveryRequest) {
        request.type_url = T::TYPE_URL.into();
        request.node = Some(Node {
            id: self.node.clone(),
        });
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn subscribe<T: Resource>(&self, names: &[&str]) {
        self.resume::<T>(names, HashMap::new()).await;
    }

    pub(crate) async fn resume<T: Resource>(&self, names: &[&str], known: HashMap<String, String>) {
        let request = DeltaDiscoveryRequest {
            resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
            initial_resource_versions: known,
            ..Default::default()
        };
        self.request::<T>(request).await;
    }

    /// The next response; it must be of type `T`.
    pub(crate) async fn next<T: Resource>(&mut self) -> DeltaDiscoveryResponse {
        let response = soon(T::TYPE_URL, self.responses.message())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(response.type_url, T::TYPE_URL, "{response:?}");
        response
    }

    pub(crate) async fn ack<T: Resource>(&self, response: &DeltaDiscoveryResponse) {
        let request = DeltaDiscoveryRequest {
            response_nonce: response.nonce.clone(),
            ..Default::default()
        };
        self.request::<T>(request).await;
    }

    pub(crate) async fn nack<T: Resource>(&self, response: &DeltaDiscoveryResponse, message: &str) {
        let request = DeltaDiscoveryRequest {
            response_nonce: response.nonce.clone(),
            error_detail: Some(XdsStatus {
                code: 3,
                message: message.into(),
            }),
            ..Default::default()
        };
        self.request::<T>(request).await;
    }

    /// The next response, accepted: what it holds, and what it removes.
    pub(crate) async fn take<T: Resource>(&mut self) -> (Vec<T>, Vec<String>) {
        let response = self.next::<T>().await;
        self.ack::<T>(&response).await;
        (decode(&response), response.removed_resources)
    }
}

pub(crate) fn decode<T: Message + Default>(response: &DeltaDiscoveryResponse) -> Vec<T> {
    let value = |r: &mesh_api::proto::discovery::Resource| {
        T::decode(r.resource.as_ref().unwrap().value.as_slice()).unwrap()
    };
    response.resources.iter().map(value).collect()
}

pub(crate) fn versions(response: &DeltaDiscoveryResponse) -> HashMap<String, String> {
    let pair = |r: &mesh_api::proto::discovery::Resource| (r.name.clone(), r.version.clone());
    response.resources.iter().map(pair).collect()
}

/// What a node's agent does, as far as the controller sees it.
pub(crate) struct Agent {
    pub(crate) stream: Stream,
    pub(crate) calls: EnrolmentClient<Channel>,
}

impl Agent {
    pub(crate) async fn register(
        &mut self,
        uid: &str,
        name: &str,
        address: [u8; 4],
    ) -> Result<mesh::NodePod, Status> {
        let request = RegisterPodRequest {
            uid: uid.into(),
            namespace: "demo".into(),
            name: name.into(),
            addresses: vec![address.to_vec()],
        };
        let answer = soon("register", self.calls.register_pod(request)).await?;
        Ok(answer.into_inner().pod.unwrap())
    }

    pub(crate) async fn report(&mut self, pods: &[(&str, PodState)]) {
        let report = report(pods);
        soon("report", self.calls.report(report)).await.unwrap();
    }
}

pub(crate) fn report(pods: &[(&str, PodState)]) -> NodeReport {
    let pod = |(uid, state): &(&str, PodState)| PodReport {
        uid: (*uid).into(),
        state: (*state).into(),
        reason: String::new(),
    };
    NodeReport {
        pods: pods.iter().map(pod).collect(),
        host_addresses: Vec::new(),
        ready: true,
        reason: String::new(),
    }
}
