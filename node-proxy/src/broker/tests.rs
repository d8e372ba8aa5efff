//! The client against an agent made here, over a real socket.

use std::collections::HashSet;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use futures::future::BoxFuture;
use mesh_api::identity::Identity;
use mesh_api::proto::Resource;
use mesh_api::proto::broker::{
    Ack, AddPod, Drain, Hello, HostListeners, Listener as Kind, Offer, RemovePod, Resume,
    SnapshotEnd, Sockets, ToAgent, ToProxy, Welcome, to_agent, to_proxy,
};
use mesh_api::proto::mesh::{MeshConfig, NodePod};
use mesh_api::seqpacket::Listener;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::*;
use crate::budget::Limits;
use crate::connections::Connections;
use crate::identity::{Identities, IssueError, Issuer};
use crate::pods::{Host, Pods};
use crate::process::lifecycle::Phase;
use crate::stock;
use crate::table::{self, Table};
use crate::telemetry::Telemetry;
use crate::telemetry::access_log::{AccessLog, Format};
use crate::tunnel::tls::ServerConfigs;
use crate::worker::{Context, Workers};

const PATIENCE: Duration = Duration::from_secs(10);

/// A CA that signs once it has permits.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    root: Vec<u8>,
    permits: Semaphore,
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
struct Proxy {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    agents: Option<Listener>,
    broker: Arc<Broker>,
    authority: Arc<Authority>,
    /// What the lifecycle told the workers.
    accepts: Arc<Mutex<Vec<bool>>>,
    task: JoinHandle<std::convert::Infallible>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    fn start() -> Self {
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
        let table = Table::new("node-1");
        let supply = Supply::new(10_000, stock::Metrics::default());
        let (pods, host) = (Pods::new(), Host::new(&supply));
        let telemetry = Telemetry::new();
        let context = Context {
            node: "node-1".into(),
            table: Arc::clone(&table),
            identities: Arc::clone(&identities),
            pods: Arc::clone(&pods),
            host: Arc::clone(&host),
            access_log: AccessLog::start(Format::Off, Arc::clone(&telemetry)).unwrap(),
            telemetry,
            server_configs: ServerConfigs::default(),
            connections: Arc::new(Connections::default()),
        };
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
    fn able() -> Self {
        let proxy = Self::start();
        proxy.load_table();
        proxy.authority.permits.add_permits(1000);
        proxy
    }

    fn load_table(&self) {
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
    async fn agent(&self) -> (Agent, Hello) {
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
    async fn agent_with(&self, pods: &[&Listeners]) -> Agent {
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

    async fn phase(&self, expected: Phase) {
        let mut phase = self.broker.lifecycle.subscribe();
        let reached = phase.wait_for(|phase| *phase == expected);
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap()
            .unwrap();
    }
}

/// The agent's end of a connection.
struct Agent {
    connection: Connection,
    next_id: u64,
}

impl Agent {
    async fn send(&mut self, body: to_proxy::Body, fds: &[OwnedFd]) -> u64 {
        self.next_id += 1;
        let message = ToProxy {
            id: self.next_id,
            body: Some(body),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection.send(&message, &fds).await.unwrap();
        self.next_id
    }

    async fn acknowledge(&mut self, of: u64) {
        self.send(
            to_proxy::Body::Ack(Ack {
                of,
                error: String::new(),
            }),
            &[],
        )
        .await;
    }

    async fn receive(&mut self) -> (ToAgent, Vec<OwnedFd>) {
        let received = tokio::time::timeout(PATIENCE, self.connection.receive::<ToAgent>()).await;
        received
            .expect("a message in time")
            .unwrap()
            .expect("an open connection")
    }

    /// The next message for which `wanted` gives something. Others are skipped.
    async fn expect<T>(
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
    async fn answer_to(&mut self, id: u64) -> String {
        let wanted = |body: &to_agent::Body| match body {
            to_agent::Body::Ack(ack) if ack.of == id => Some(ack.error.clone()),
            _ => None,
        };
        self.expect(wanted).await.0
    }

    async fn ready(&mut self) {
        self.expect(|body| matches!(body, to_agent::Body::Ready(_)).then_some(()))
            .await;
    }

    async fn drained(&mut self) -> String {
        let wanted = |body: &to_agent::Body| match body {
            to_agent::Body::PodDrained(pod) => Some(pod.uid.clone()),
            _ => None,
        };
        self.expect(wanted).await.0
    }

    async fn offer(&mut self) -> (Offer, Vec<OwnedFd>) {
        let wanted = |body: &to_agent::Body| match body {
            to_agent::Body::Offer(offer) => Some(offer.clone()),
            _ => None,
        };
        self.expect(wanted).await
    }
}

/// Listeners as the agent opens them.
struct Listeners {
    uid: String,
    kinds: Vec<i32>,
    sockets: Vec<OwnedFd>,
}

impl Listeners {
    fn open(uid: &str, kinds: &[Kind]) -> Self {
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

    fn pod(uid: &str) -> Self {
        Self::open(uid, &[Kind::Outbound, Kind::Inbound, Kind::Hbone])
    }

    fn host() -> Self {
        Self::open("", &[Kind::TunnelV4])
    }

    fn as_pod(&self) -> to_proxy::Body {
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

    fn as_host(&self) -> to_proxy::Body {
        let host_addresses = vec![vec![10, 0, 0, 9]];
        to_proxy::Body::HostListeners(HostListeners {
            listeners: self.kinds.clone(),
            host_addresses,
        })
    }
}

fn without_listeners(body: to_proxy::Body) -> to_proxy::Body {
    match body {
        to_proxy::Body::AddPod(add) => to_proxy::Body::AddPod(AddPod {
            listeners: vec![],
            ..add
        }),
        other => other,
    }
}

fn ports(sockets: &[OwnedFd]) -> Vec<u16> {
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

fn remove(uid: &str) -> to_proxy::Body {
    to_proxy::Body::RemovePod(RemovePod { uid: uid.into() })
}

#[tokio::test]
async fn a_pod_is_acknowledged_when_table_and_certificate_are_there_and_ready_follows_the_last() {
    let proxy = Proxy::start();
    let (mut agent, hello) = proxy.agent().await;
    assert!(
        hello.held_pods.is_empty() && !hello.holds_host_listeners && !hello.instance.is_empty()
    );
    agent
        .send(to_proxy::Body::Welcome(Welcome::default()), &[])
        .await;
    let (first, second, host) = (
        Listeners::pod("one"),
        Listeners::pod("two"),
        Listeners::host(),
    );
    agent.send(host.as_host(), &host.sockets).await;
    let one = agent.send(first.as_pod(), &first.sockets).await;
    let two = agent.send(second.as_pod(), &second.sockets).await;
    let end = agent
        .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
        .await;

    let mut pods = HashSet::from([one, two]);
    let mut complete = false;
    loop {
        let (message, _) = agent.receive().await;
        match message.body.unwrap() {
            to_agent::Body::Ack(ack) if ack.of == end => {
                assert_eq!(pods.len(), 2, "nothing is served without a table");
                assert!(!proxy.broker.state().borrow().ready);
                proxy.load_table();
                proxy.authority.permits.add_permits(1);
                complete = true;
            }
            to_agent::Body::Ack(ack) if pods.remove(&ack.of) => {
                assert!(complete && ack.error.is_empty(), "{ack:?}");
            }
            to_agent::Body::Ready(_) => {
                assert!(
                    pods.is_empty(),
                    "both share an identity, so one certificate serves both"
                );
                break;
            }
            _ => {}
        }
    }
    assert!(proxy.broker.state().borrow().ready);
    let pods = &proxy.broker.roster.parts.pods;
    assert!(pods.by_address([10, 0, 0, 1].into()).is_some());
    assert_eq!(
        **proxy.broker.roster.parts.host.addresses.load(),
        [std::net::IpAddr::from([10, 0, 0, 9])]
    );
}

#[tokio::test]
async fn nothing_is_accepted_before_the_certificates_of_all_pods_are_there() {
    let proxy = Proxy::start();
    proxy.load_table();
    proxy.authority.permits.add_permits(1);
    let (mut agent, _) = proxy.agent().await;
    agent
        .send(to_proxy::Body::Welcome(Welcome::default()), &[])
        .await;
    let (host, one, two) = (
        Listeners::host(),
        Listeners::pod("one"),
        Listeners::pod("two"),
    );
    agent.send(host.as_host(), &host.sockets).await;
    let one = agent.send(one.as_pod(), &one.sockets).await;
    let as_another = match two.as_pod() {
        to_proxy::Body::AddPod(mut add) => {
            add.pod.as_mut().unwrap().service_account = "another".into();
            to_proxy::Body::AddPod(add)
        }
        other => other,
    };
    let two = agent.send(as_another, &two.sockets).await;
    agent
        .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
        .await;
    // One of the two identities has its certificate.
    let identities = Arc::clone(&proxy.broker.roster.parts.identities);
    let mut changed = identities.changed();
    let one_is_held = |_: &u64| {
        let held = |account| {
            let identity = Identity::new("cluster.local", "demo", account).unwrap();
            identities.get(&identity).is_some()
        };
        held("web") != held("another")
    };
    let held = tokio::time::timeout(PATIENCE, changed.wait_for(one_is_held)).await;
    held.unwrap().unwrap();
    agent.send(remove("other"), &[]).await;
    loop {
        let (message, _) = agent.receive().await;
        match message.body.unwrap() {
            to_agent::Body::Ack(ack) => assert!(ack.of != one && ack.of != two, "served too early"),
            to_agent::Body::PodDrained(_) => break,
            _ => {}
        }
    }
    proxy.authority.permits.add_permits(1);
    let mut acknowledged = HashSet::new();
    while acknowledged.len() < 2 {
        let (message, _) = agent.receive().await;
        if let Some(to_agent::Body::Ack(ack)) = message.body
            && (ack.of == one || ack.of == two)
        {
            assert_eq!(ack.error, "");
            acknowledged.insert(ack.of);
        }
    }
}

#[tokio::test]
async fn a_restarted_agent_is_offered_what_it_lacks_and_the_very_same_sockets() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    drop(agent);

    let (mut agent, hello) = proxy.agent().await;
    assert_eq!(
        (hello.held_pods, hello.holds_host_listeners),
        (vec!["one".to_owned()], true)
    );
    let want = Welcome {
        want_pods: vec!["one".into()],
        want_host_listeners: true,
    };
    agent.send(to_proxy::Body::Welcome(want), &[]).await;
    let (offer, sockets) = agent.offer().await;
    assert_eq!(
        (offer.pod_uid.as_str(), &offer.listeners),
        ("one", &pod.kinds)
    );
    assert_eq!(ports(&sockets), ports(&pod.sockets));
    let (offer, sockets) = agent.offer().await;
    assert_eq!((offer.pod_uid.as_str(), sockets.len()), ("", 1));

    // It is served all along; the new agent needs no descriptor to hear so.
    let add = agent.send(without_listeners(pod.as_pod()), &[]).await;
    assert_eq!(agent.answer_to(add).await, "");
    agent
        .send(to_proxy::Body::SnapshotEnd(SnapshotEnd {}), &[])
        .await;
    agent.ready().await;
}

#[tokio::test]
async fn a_removed_pod_is_reported_as_drained_after_its_last_captured_connection() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    let served = proxy.broker.roster.parts.pods.by_uid("one").unwrap();
    let connection = served.captured.enter();

    let removed = agent.send(remove("one"), &[]).await;
    assert_eq!(agent.answer_to(removed).await, "");
    assert!(proxy.broker.roster.parts.pods.by_uid("one").is_none());
    // A pod nobody knows is drained.
    agent.send(remove("other"), &[]).await;
    assert_eq!(agent.drained().await, "other");
    // The agent is replaced, the connection ends, and the next agent is told.
    drop(agent);
    let mut agent = proxy.agent_with(&[]).await;
    agent.ready().await;
    drop(connection);
    assert_eq!(agent.drained().await, "one");
}

#[tokio::test]
async fn a_pod_that_comes_back_keeps_its_account_and_is_not_reported() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    let served = proxy.broker.roster.parts.pods.by_uid("one").unwrap();
    let connection = served.captured.enter();
    let removed = agent.send(remove("one"), &[]).await;
    assert_eq!(agent.answer_to(removed).await, "");
    assert!(*served.leaving.borrow(), "its connections are told");
    let again = Listeners::pod("one");
    let add = agent.send(again.as_pod(), &again.sockets).await;
    assert_eq!(agent.answer_to(add).await, "");
    assert!(!*served.leaving.borrow(), "new ones need not end");
    drop(connection);
    assert!(Arc::ptr_eq(
        &served,
        &proxy.broker.roster.parts.pods.by_uid("one").unwrap()
    ));
    agent.send(remove("other"), &[]).await;
    assert_eq!(agent.drained().await, "other", "and not `one`");
}

#[tokio::test]
async fn a_pod_is_found_by_addresses_that_are_told_of_after_it() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[]).await;
    let to_proxy::Body::AddPod(mut early) = pod.as_pod() else {
        unreachable!("as_pod makes no other")
    };
    early.pod.as_mut().unwrap().addresses.clear();
    let early = to_proxy::Body::AddPod(early);
    let add = agent.send(early, &pod.sockets).await;
    assert_eq!(agent.answer_to(add).await, "");
    let pods = &proxy.broker.roster.parts.pods;
    let address = "10.0.0.1".parse().unwrap();
    assert!(pods.by_address(address).is_none());
    let update = agent.send(without_listeners(pod.as_pod()), &[]).await;
    assert_eq!(agent.answer_to(update).await, "");
    assert!(pods.by_address(address).is_some());
    agent.send(remove("one"), &[]).await;
    assert_eq!(agent.drained().await, "one");
    assert!(pods.by_address(address).is_none());
}

#[tokio::test]
async fn pods_that_a_snapshot_does_not_name_leave() {
    let proxy = Proxy::able();
    let (one, two) = (Listeners::pod("one"), Listeners::pod("two"));
    let mut agent = proxy.agent_with(&[&one, &two]).await;
    agent.ready().await;
    drop(agent);
    let mut agent = proxy.agent_with(&[&one]).await;
    assert_eq!(agent.drained().await, "two");
    let pods = &proxy.broker.roster.parts.pods;
    assert!(pods.by_uid("one").is_some() && pods.by_uid("two").is_none());
}

#[tokio::test]
async fn drain_and_resume_hold_for_their_connection() {
    let proxy = Proxy::able();
    let mut agent = proxy.agent_with(&[]).await;
    agent.ready().await;
    let drain = agent.send(to_proxy::Body::Drain(Drain {}), &[]).await;
    assert_eq!(agent.answer_to(drain).await, "");
    assert_eq!(*proxy.accepts.lock(), [false]);
    let resume = agent.send(to_proxy::Body::Resume(Resume {}), &[]).await;
    assert_eq!(agent.answer_to(resume).await, "");
    assert_eq!(*proxy.accepts.lock(), [false, true]);

    agent.send(to_proxy::Body::Drain(Drain {}), &[]).await;
    proxy.phase(Phase::Drained).await;
    drop(agent);
    let mut agent = proxy.agent_with(&[]).await;
    agent.ready().await;
    assert_eq!(*proxy.accepts.lock(), [false, true, false, true]);

    // What an operator drained stays so, and is not said to be ready.
    proxy.broker.lifecycle.drain();
    drop(agent);
    let mut agent = proxy.agent_with(&[]).await;
    agent.send(remove("other"), &[]).await;
    assert_eq!(agent.drained().await, "other");
    assert_eq!(proxy.broker.lifecycle.phase(), Phase::Drained);
    proxy.broker.lifecycle.resume();
    agent.ready().await;
}

#[tokio::test]
async fn sockets_are_asked_for_and_go_to_the_stock_that_lacks_them() {
    let proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    let mut filled = HashSet::new();
    let mut refused = false;
    while filled.len() < 2 {
        let (message, _) = agent.receive().await;
        let Some(to_agent::Body::NeedSockets(need)) = message.body else {
            continue;
        };
        if need.pod_uid.is_empty() && !std::mem::replace(&mut refused, true) {
            // Asked for again before long.
            let answer = Sockets {
                of: message.id,
                error: "out of descriptors".into(),
            };
            agent.send(to_proxy::Body::Sockets(answer), &[]).await;
            continue;
        }
        let sockets: Vec<OwnedFd> = (0..need.count)
            .map(|_| std::fs::File::open("/dev/null").unwrap().into())
            .collect();
        let answer = Sockets {
            of: message.id,
            error: String::new(),
        };
        agent.send(to_proxy::Body::Sockets(answer), &sockets).await;
        filled.insert(need.pod_uid);
    }
    let stock = &proxy.broker.roster.parts.host.stock;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    assert!(stock.take(false, deadline).await.is_some());
    let pod = proxy.broker.roster.parts.pods.by_uid("one").unwrap();
    assert!(pod.stock.take(false, deadline).await.is_some());
}

#[tokio::test]
async fn faulty_messages_are_answered_with_the_fault_and_cost_nothing_else() {
    let proxy = Proxy::able();
    let good = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[]).await;
    let faults: [(to_proxy::Body, Vec<OwnedFd>, &str); 5] = [
        (good.as_pod(), vec![], "3 listeners are named and 0 came"),
        (
            without_listeners(good.as_pod()),
            vec![],
            "LISTENER_OUTBOUND is missing",
        ),
        (
            good.as_pod(),
            (0..3)
                .map(|_| std::fs::File::open("/dev/null").unwrap().into())
                .collect(),
            "LISTENER_OUTBOUND is not a listening socket",
        ),
        (
            match Listeners::open("one", &[Kind::TunnelV4; 3]).as_pod() {
                to_proxy::Body::AddPod(add) => to_proxy::Body::AddPod(add),
                other => other,
            },
            Listeners::pod("one").sockets,
            "a listener of kind 4 does not belong here",
        ),
        (
            to_proxy::Body::AddPod(AddPod::default()),
            vec![],
            "AddPod without a pod",
        ),
    ];
    for (body, sockets, fault) in faults {
        let id = agent.send(body, &sockets).await;
        let answer = agent.answer_to(id).await;
        assert!(answer.contains(fault), "{answer}");
    }
    // From an agent that knows more than this proxy.
    agent
        .connection
        .send(&ToProxy { id: 7, body: None }, &[])
        .await
        .unwrap();
    assert!(agent.answer_to(7).await.contains("does not know"));
    agent.acknowledge(4711).await;
    let add = agent.send(good.as_pod(), &good.sockets).await;
    assert_eq!(agent.answer_to(add).await, "");
}

#[tokio::test]
async fn garbage_and_truncated_packets_end_the_connection_and_nothing_else() {
    use nix::sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, send,
        socket,
    };
    use std::os::fd::AsRawFd;

    let mut proxy = Proxy::able();
    let pod = Listeners::pod("one");
    let mut agent = proxy.agent_with(&[&pod]).await;
    agent.ready().await;
    // The next agents speak without the library.
    proxy.agents = None;
    drop(agent);
    std::fs::remove_file(&proxy.socket).unwrap();
    let raw = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(raw.as_raw_fd(), &UnixAddr::new(&proxy.socket).unwrap()).unwrap();
    listen(&raw, Backlog::new(8).unwrap()).unwrap();
    let garbage: Vec<u8> = vec![0xff; 100];
    let oversized: Vec<u8> = vec![0; mesh_api::seqpacket::MAX_BYTES + 1];
    let packets = [garbage, oversized, vec![0x0a, 0x7f]];
    let raw = tokio::task::spawn_blocking(move || {
        for packet in packets {
            // Blocks until the client has come back.
            let connection = accept(raw.as_raw_fd()).unwrap();
            send(connection, &packet, MsgFlags::MSG_NOSIGNAL).unwrap();
            // Its Hello, and then the end it puts to this.
            let mut buffer = [0u8; 4096];
            while nix::sys::socket::recv(connection, &mut buffer, MsgFlags::empty())
                .is_ok_and(|n| n > 0)
            {}
            nix::unistd::close(connection).unwrap();
        }
        raw
    });
    tokio::time::timeout(PATIENCE, raw).await.unwrap().unwrap();

    std::fs::remove_file(&proxy.socket).unwrap();
    proxy.agents = Some(Listener::bind(&proxy.socket).unwrap());
    let (_agent, hello) = proxy.agent().await;
    assert_eq!(hello.held_pods, ["one"]);
    assert!(
        proxy
            .broker
            .roster
            .parts
            .pods
            .by_address([10, 0, 0, 1].into())
            .is_some()
    );
}
