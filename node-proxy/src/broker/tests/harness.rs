//! The broker's client with all that it works on, and an agent for it, over a real socket.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use futures::future::BoxFuture;
use mesh_api::identity::Identity;
use mesh_api::proto::Resource;
use mesh_api::proto::broker::{
    Ack, AddPod, Hello, HostListeners, Listener as Kind, Offer, RemovePod, SnapshotEnd, ToAgent,
    ToProxy, Welcome, to_agent, to_proxy,
};
use mesh_api::proto::mesh::{MeshConfig, NodePod};
use mesh_api::seqpacket::Listener;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::broker::*;
use crate::budget::Limits;
use crate::identity::{Identities, IssueError, Issuer};
use crate::process::lifecycle::Phase;
use crate::worker::Workers;
use crate::{stock, table, testing};

pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A CA that signs once it has permits.
pub(super) struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    root: Vec<u8>,
    pub(super) permits: Semaphore,
}

impl Issuer for Authority {
    fn reachable(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn issue(
        &self,
        identity: &Identity,
        csr: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<Vec<u8>>, IssueError>> {
        let uri = identity.as_str().to_owned();
        Box::pin(async move {
            self.permits.acquire().await.unwrap().forget();
            let mut request =
                rcgen::CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
            request.params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
            Ok(vec![
                request.signed_by(&self.issuer).unwrap().der().to_vec(),
            ])
        })
    }
}

/// A proxy's insides around a running client, and the socket its agent listens on.
pub(super) struct Proxy {
    _directory: tempfile::TempDir,
    pub(super) socket: PathBuf,
    pub(super) agents: Option<Listener>,
    pub(super) broker: Arc<Broker>,
    pub(super) authority: Arc<Authority>,
    /// What the lifecycle told the workers.
    pub(super) accepts: Arc<Mutex<Vec<bool>>>,
    task: JoinHandle<std::convert::Infallible>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub(super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("broker.sock");
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().to_vec();
        let issuer = rcgen::Issuer::new(params, key);
        let authority = Arc::new(Authority {
            issuer,
            root,
            permits: Semaphore::new(0),
        });
        let issuer: Arc<dyn Issuer> = Arc::clone(&authority) as _;
        let identities = Identities::new(
            &directory.path().join("secrets"),
            issuer,
            Arc::new(std::time::SystemTime::now),
        );
        let supply = Supply::new(10_000, stock::Metrics::default());
        let context = testing::context(Arc::clone(&identities), &supply);
        let (pods, host) = (Arc::clone(&context.pods), Arc::clone(&context.host));
        let table = Arc::clone(&context.table);
        let workers = Workers::start(1, context).unwrap();
        let accepts = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&accepts);
        let lifecycle = Arc::new(Lifecycle::new(move |accept| told.lock().push(accept)));
        let limits = Limits::default().resolved(10_000);
        let parts = Parts {
            pods,
            host,
            supply: Arc::clone(&supply),
            table,
            identities,
            workers,
            limits,
        };
        let roster = Roster::new(parts);
        let agents = Listener::bind(&socket).unwrap();
        let metrics = Metrics::default();
        let broker = Arc::new(Broker::new(
            socket.clone(),
            roster,
            supply,
            lifecycle,
            metrics,
        ));
        let running = Arc::clone(&broker);
        let task = tokio::spawn(async move { running.run().await });
        Self {
            _directory: directory,
            socket,
            agents: Some(agents),
            broker,
            authority,
            accepts,
            task,
        }
    }

    /// As [`Proxy::start`], with a table and a CA that signs.
    pub(super) fn able() -> Self {
        let proxy = Self::start();
        proxy.load_table();
        proxy.authority.permits.add_permits(1000);
        proxy
    }

    pub(super) fn load_table(&self) {
        let table = &self.broker.roster.parts.table;
        let mesh = MeshConfig {
            trust_domain: "cluster.local".into(),
            trust_bundle: vec![self.authority.root.clone().into()],
            ..MeshConfig::default()
        };
        let update = mesh_api::client::delta::Update {
            name: "mesh".into(),
            version: "1".into(),
            aliases: vec![],
            value: prost::Message::encode_to_vec(&mesh).into(),
        };
        let applied = table.apply(MeshConfig::TYPE_URL, &[update], &[]);
        assert!(applied.result().is_ok());
        for kind in table::Kind::ALL {
            table.complete(kind.type_url());
        }
    }

    /// The next agent.
    pub(super) async fn agent(&self) -> (Agent, Hello) {
        let accepted = tokio::time::timeout(PATIENCE, self.agents.as_ref().unwrap().accept());
        let mut agent = Agent {
            connection: accepted.await.unwrap().unwrap(),
            next_id: 100,
        };
        let (message, _) = agent.receive().await;
        let Some(to_agent::Body::Hello(hello)) = message.body else {
            panic!("{message:?}")
        };
        agent.acknowledge(message.id).await;
        (agent, hello)
    }

    /// An agent that has sent its whole snapshot of these pods.
    pub(super) async fn agent_with(&self, pods: &[&Listeners]) -> Agent {
        let (mut agent, _) = self.agent().await;
        agent
            .send(to_proxy::Body::Welcome(Welcome::default()), &[])
            .await;
        let host = Listeners::host();
        agent.send(host.as_host(), &host.sockets).await;
        for pod in pods {
            agent.send(pod.as_pod(), &pod.sockets).await;
        }
        agent
            .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
            .await;
        agent
    }

    pub(super) async fn phase(&self, expected: Phase) {
        let mut phase = self.broker.lifecycle.subscribe();
        let reached = phase.wait_for(|phase| *phase == expected);
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap()
            .unwrap();
    }
}

/// The agent's end of a connection.
pub(super) struct Agent {
    pub(super) connection: Connection,
    pub(super) next_id: u64,
}

impl Agent {
    pub(super) async fn send(&mut self, body: to_proxy::Body, fds: &[OwnedFd]) -> u64 {
        self.next_id += 1;
        let message = ToProxy {
            id: self.next_id,
            body: Some(body),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection.send(&message, &fds).await.unwrap();
        self.next_id
    }

    pub(super) async fn acknowledge(&mut self, of: u64) {
        self.send(
            to_proxy::Body::Ack(Ack {
                of,
                error: String::new(),
            }),
            &[],
        )
        .await;
    }

    pub(super) async fn receive(&mut self) -> (ToAgent, Vec<OwnedFd>) {
        let received = tokio::time::timeout(PATIENCE, self.connection.receive::<ToAgent>()).await;
        received
            .expect("a message in time")
            .unwrap()
            .expect("an open connection")
    }

    /// The next message for which `wanted` gives something. Others are skipped.
    pub(super) async fn expect<T>(
        &mut self,
        wanted: impl Fn(&to_agent::Body) -> Option<T>,
    ) -> (T, Vec<OwnedFd>) {
        loop {
            let (message, fds) = self.receive().await;
            let body = message.body.unwrap();
            if let Some(found) = wanted(&body) {
                if message.id != 0 {
                    self.acknowledge(message.id).await;
                }
                return (found, fds);
            }
        }
    }

    /// Its acknowledgement's error.
    pub(super) async fn answer_to(&mut self, id: u64) -> String {
        let wanted = |body: &to_agent::Body| match body {
            to_agent::Body::Ack(ack) if ack.of == id => Some(ack.error.clone()),
            _ => None,
        };
        self.expect(wanted).await.0
    }

    pub(super) async fn ready(&mut self) {
        self.expect(|body| matches!(body, to_agent::Body::Ready(_)).then_some(()))
            .await;
    }

    pub(super) async fn drained(&mut self) -> String {
        let wanted = |body: &to_agent::Body| match body {
            to_agent::Body::PodDrained(pod) => Some(pod.uid.clone()),
            _ => None,
        };
        self.expect(wanted).await.0
    }

    pub(super) async fn offer(&mut self) -> (Offer, Vec<OwnedFd>) {
        let wanted = |body: &to_agent::Body| match body {
            to_agent::Body::Offer(offer) => Some(offer.clone()),
            _ => None,
        };
        self.expect(wanted).await
    }
}

/// Listeners as the agent opens them.
pub(super) struct Listeners {
    pub(super) uid: String,
    pub(super) kinds: Vec<i32>,
    pub(super) sockets: Vec<OwnedFd>,
}

impl Listeners {
    pub(super) fn open(uid: &str, kinds: &[Kind]) -> Self {
        let open = |_: &Kind| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener.into()
        };
        Self {
            uid: uid.into(),
            kinds: kinds.iter().map(|kind| *kind as i32).collect(),
            sockets: kinds.iter().map(open).collect(),
        }
    }

    pub(super) fn pod(uid: &str) -> Self {
        Self::open(uid, &[Kind::Outbound, Kind::Inbound, Kind::Hbone])
    }

    pub(super) fn host() -> Self {
        Self::open("", &[Kind::TunnelV4])
    }

    pub(super) fn as_pod(&self) -> to_proxy::Body {
        let pod = NodePod {
            uid: self.uid.clone(),
            namespace: "demo".into(),
            name: self.uid.clone(),
            service_account: "web".into(),
            addresses: vec![vec![10, 0, 0, 1].into()],
            enrolled: true,
            ..NodePod::default()
        };
        to_proxy::Body::AddPod(AddPod {
            pod: Some(pod),
            listeners: self.kinds.clone(),
        })
    }

    pub(super) fn as_host(&self) -> to_proxy::Body {
        let host_addresses = vec![vec![10, 0, 0, 9]];
        to_proxy::Body::HostListeners(HostListeners {
            listeners: self.kinds.clone(),
            host_addresses,
        })
    }
}

pub(super) fn without_listeners(body: to_proxy::Body) -> to_proxy::Body {
    match body {
        to_proxy::Body::AddPod(add) => to_proxy::Body::AddPod(AddPod {
            listeners: vec![],
            ..add
        }),
        other => other,
    }
}

pub(super) fn ports(sockets: &[OwnedFd]) -> Vec<u16> {
    let port = |fd: &OwnedFd| {
        socket2::SockRef::from(fd)
            .local_addr()
            .unwrap()
            .as_socket()
            .unwrap()
            .port()
    };
    sockets.iter().map(port).collect()
}

pub(super) fn remove(uid: &str) -> to_proxy::Body {
    to_proxy::Body::RemovePod(RemovePod { uid: uid.into() })
}
