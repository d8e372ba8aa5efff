//! A controller for tests: the gRPC services over real TLS, with a CA of its own, doing what a test
//! says. Also used by the tests of the node proxy.

#![allow(dead_code)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_api::client::ClientConfig;
use mesh_api::identity::{NodeIdentity, NodeRole};
use mesh_api::proto;
use mesh_api::proto::control::certificates_server::{Certificates, CertificatesServer};
use mesh_api::proto::control::{IssueNodeRequest, IssueResponse, IssueWorkloadRequest, Role};
use mesh_api::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_api::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_api::{names, tls};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, IsCa, Issuer,
    KeyPair, SanType,
};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, Server};
use tonic::{Request, Response, Status, Streaming};

/// Asked of `IssueWorkload` it answers with the caller's name as an `ALREADY_EXISTS`.
pub(crate) const WHO_AM_I: &str = "who-am-i";

/// The controller. Stopped when dropped.
pub(crate) struct Fake {
    dir: tempfile::TempDir,
    address: SocketAddr,
    state: Arc<State>,
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    server: Option<Task>,
}

/// Ends a task when dropped.
pub(crate) struct Task(pub(crate) JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// No test waits longer than this for something that must happen.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("happens in time")
}

type Responder = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;
type Hook = Box<dyn FnOnce(&State) + Send>;

/// What the services do and what was done to them.
pub(crate) struct State {
    /// Signs the server's own certificate.
    root: Ca,
    /// Signs clients' certificates.
    clients: Mutex<Arc<Ca>>,
    told: Mutex<Told>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responder: watch::Sender<Option<Responder>>,
    failed: watch::Sender<usize>,
}

struct Told {
    token: String,
    /// Validity of issued certificates: seconds before and after now.
    life: (i64, i64),
    refuse: Option<Status>,
    nodes: usize,
    workloads: HashMap<String, usize>,
    calls: usize,
    hook: Option<Hook>,
    sockets: Vec<std::net::TcpStream>,
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (sender, requests) = mpsc::channel(1024);
        let state = Arc::new(State {
            root: ca(),
            clients: Mutex::new(Arc::new(ca())),
            told: Mutex::new(Told {
                token: String::new(),
                life: (60, 3600),
                refuse: None,
                nodes: 0,
                workloads: HashMap::new(),
                calls: 0,
                hook: None,
                sockets: Vec::new(),
            }),
            requests: sender,
            responder: watch::Sender::new(None),
            failed: watch::Sender::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut fake = Self {
            dir,
            address: listener.local_addr().unwrap(),
            state,
            requests,
            server: None,
        };
        fake.serve(listener);
        fake.set_token("token-1");
        fake.write_bundle();
        fake
    }

    /// Configuration of a client of this controller, on node `node-1`.
    pub(crate) fn client(&self, role: NodeRole) -> ClientConfig {
        ClientConfig {
            address: self.address.to_string(),
            trust_bundle: self.dir.path().join("bundle.pem"),
            token_file: self.dir.path().join("token"),
            node: "node-1".into(),
            role,
            credentials_dir: Some(self.secrets()),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn secrets(&self) -> PathBuf {
        self.dir.path().join("secrets")
    }

    /// The root of the server's certificate, DER.
    fn root(&self) -> Vec<u8> {
        self.state.root.der.to_vec()
    }

    /// All roots, DER.
    pub(crate) fn bundle(&self) -> Vec<bytes::Bytes> {
        let clients = self.state.clients.lock().der.to_vec();
        vec![self.root().into(), clients.into()]
    }

    /// Closes the listener and every connection.
    pub(crate) async fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.0.abort();
            let _ = (&mut server.0).await;
        }
        for socket in self.state.told.lock().sockets.drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.state.responder.send_replace(None);
    }

    /// Listens again, on the same port.
    pub(crate) async fn resume(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.serve(socket.listen(64).unwrap());
    }

    /// The next discovery request.
    pub(crate) async fn request(&mut self) -> DeltaDiscoveryRequest {
        within(self.requests.recv()).await.unwrap()
    }

    /// Sends on the newest discovery stream, waiting for one.
    pub(crate) async fn respond(&self, response: DeltaDiscoveryResponse) {
        let mut responders = self.state.responder.subscribe();
        let responder = within(responders.wait_for(Option::is_some))
            .await
            .unwrap()
            .clone();
        responder.unwrap().send(Ok(response)).await.unwrap();
    }

    /// Changes the token, here and in the file.
    pub(crate) fn set_token(&self, token: &str) {
        self.state.told.lock().token = token.into();
        std::fs::write(self.dir.path().join("token"), format!("{token}\n")).unwrap();
    }

    /// Certificates issued from now on began `before` seconds ago and end in `after`.
    pub(crate) fn set_life(&self, before: i64, after: i64) {
        self.state.set_life(before, after);
    }

    /// Refuses workload certificates with this, or no longer.
    pub(crate) fn refuse(&self, status: Option<Status>) {
        self.state.told.lock().refuse = status;
    }

    /// Runs after the next node certificate was issued.
    pub(crate) fn on_issue_node(&self, hook: impl FnOnce(&State) + Send + 'static) {
        self.state.told.lock().hook = Some(Box::new(hook));
    }

    /// Certificates issued so far are not taken any more. The server keeps its own.
    pub(crate) fn forget_old_clients(&self) {
        *self.state.clients.lock() = Arc::new(ca());
    }

    pub(crate) fn issued_to_nodes(&self) -> usize {
        self.state.told.lock().nodes
    }

    pub(crate) fn issued_to(&self, identity: &str) -> usize {
        self.state
            .told
            .lock()
            .workloads
            .get(identity)
            .copied()
            .unwrap_or_default()
    }

    /// Calls of `IssueNode` and `IssueWorkload`, whatever came of them.
    pub(crate) fn calls(&self) -> usize {
        self.state.told.lock().calls
    }

    /// Waits for a client that gave up its handshake.
    pub(crate) async fn handshake_failed(&self) {
        self.state
            .failed
            .subscribe()
            .wait_for(|n| *n > 0)
            .await
            .unwrap();
    }

    fn write_bundle(&self) {
        let pem = mesh_api::client::credentials::bundle_to_pem(&[self.root()]);
        std::fs::write(self.dir.path().join("bundle.pem"), pem).unwrap();
    }

    fn serve(&mut self, listener: TcpListener) {
        let state = self.state.clone();
        let (accepted, connections) = mpsc::channel(16);
        let tls = TlsAcceptor::from(Arc::new(state.server_config()));
        let accept = {
            let state = state.clone();
            async move {
                loop {
                    let socket = listener.accept().await.unwrap().0.into_std().unwrap();
                    state.told.lock().sockets.push(socket.try_clone().unwrap());
                    let socket = TcpStream::from_std(socket).unwrap();
                    match tls.accept(socket).await {
                        Ok(stream) => {
                            let _ = accepted.send(Ok::<_, std::io::Error>(Stream(stream))).await;
                        }
                        Err(_) => state.failed.send_modify(|n| *n += 1),
                    }
                }
            }
        };
        let server = Server::builder()
            .add_service(CertificatesServer::new(Service(state.clone())))
            .add_service(AggregatedDiscoveryServiceServer::new(Service(state)))
            .serve_with_incoming(ReceiverStream::new(connections));
        self.server = Some(Task(tokio::spawn(async move {
            tokio::select! {
                () = accept => {}
                _ = server => {}
            }
        })));
    }
}

impl State {
    pub(crate) fn set_life(&self, before: i64, after: i64) {
        self.told.lock().life = (before, after);
    }

    /// Signs a request for a URI. DER.
    fn sign(&self, csr: &[u8], uri: &str) -> Vec<u8> {
        let csr = CertificateSigningRequestDer::from(csr);
        let mut csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let (before, after) = self.told.lock().life;
        csr.params = params(before, after, vec![SanType::URI(uri.try_into().unwrap())]);
        csr.signed_by(&self.clients.lock().issuer)
            .unwrap()
            .der()
            .to_vec()
    }

    fn server_config(&self) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let name = SanType::DnsName(names::CONTROLLER_NAME.try_into().unwrap());
        let own = params(60, 3600, vec![name])
            .signed_by(&key, &self.root.issuer)
            .unwrap();
        let clients = tls::roots([self.clients.lock().der.as_ref()]).unwrap();
        let verifier = tls::UriClientVerifier::new(clients, "cluster.local", false);
        let mut config = ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![own.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

struct Service(Arc<State>);

#[tonic::async_trait]
impl Certificates for Service {
    async fn issue_node(
        &self,
        request: Request<IssueNodeRequest>,
    ) -> Result<Response<IssueResponse>, Status> {
        let request = request.into_inner();
        let hook = {
            let mut told = self.0.told.lock();
            told.calls += 1;
            if request.token != told.token {
                return Err(Status::unauthenticated(
                    "the token is not good for this node",
                ));
            }
            told.nodes += 1;
            told.hook.take()
        };
        let role = match request.role() {
            Role::Agent => NodeRole::Agent,
            _ => NodeRole::Proxy,
        };
        let id = NodeIdentity {
            domain: "cluster.local".into(),
            node: request.node.clone(),
            role,
        };
        let chain = vec![self.0.sign(&request.csr, &id.to_string())];
        if let Some(hook) = hook {
            hook(&self.0);
        }
        let trust_bundle = vec![self.0.root.der.to_vec()];
        Ok(Response::new(IssueResponse {
            chain,
            trust_bundle,
        }))
    }

    async fn issue_workload(
        &self,
        request: Request<IssueWorkloadRequest>,
    ) -> Result<Response<IssueResponse>, Status> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        if request.identity == WHO_AM_I {
            return Err(Status::already_exists(peer));
        }
        {
            let mut told = self.0.told.lock();
            told.calls += 1;
            if let Some(refuse) = &told.refuse {
                return Err(refuse.clone());
            }
            *told.workloads.entry(request.identity.clone()).or_default() += 1;
        }
        let chain = vec![self.0.sign(&request.csr, &request.identity)];
        let trust_bundle = vec![self.0.root.der.to_vec()];
        Ok(Response::new(IssueResponse {
            chain,
            trust_bundle,
        }))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        peer(&request)?;
        let (responder, responses) = mpsc::channel(16);
        self.0.responder.send_replace(Some(responder));
        let state = self.0.clone();
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(request)) = incoming.message().await {
                if state.requests.send(request).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// A response with resources of a type: names, versions, encoded messages.
pub(crate) fn response<'a, R: proto::Resource>(
    nonce: &str,
    resources: impl IntoIterator<Item = (&'a str, &'a str, Vec<u8>)>,
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: R::TYPE_URL.into(),
        nonce: nonce.into(),
        resources: resources
            .into_iter()
            .map(|(name, version, value)| Resource {
                name: name.into(),
                version: version.into(),
                resource: Some(prost_types::Any {
                    type_url: R::TYPE_URL.into(),
                    value,
                }),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn peer<T>(request: &Request<T>) -> Result<String, Status> {
    let peer = request.extensions().get::<Peer>().and_then(|p| p.0.clone());
    peer.ok_or_else(|| Status::unauthenticated("a node certificate is needed"))
}

fn ca() -> Ca {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "fake root");
    let der = params.self_signed(&key).unwrap().der().clone();
    Ca {
        issuer: Issuer::new(params, key),
        der,
    }
}

fn params(before: i64, after: i64, names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    let now = OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::seconds(before);
    params.not_after = now + time::Duration::seconds(after);
    params
}

/// A TLS stream that tells tonic who the peer is.
struct Stream(TlsStream<TcpStream>);

#[derive(Clone)]
struct Peer(Option<String>);

impl Connected for Stream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let certificates = self.0.get_ref().1.peer_certificates();
        let leaf = certificates.and_then(<[_]>::first);
        Peer(leaf.and_then(|leaf| tls::uri_name(leaf).ok()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
