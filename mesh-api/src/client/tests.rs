use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::delta::{Sink, Subscriptions, Update};
use super::*;
use crate::proto::Resource as _;
use crate::proto::control::IssueWorkloadRequest;
use crate::proto::control::certificates_client::CertificatesClient;
use crate::proto::discovery::DeltaDiscoveryResponse;
use crate::proto::mesh;
use fake::{Fake, within};

mod fake;

/// Whom the controller takes the caller for.
async fn proven(controller: &Controller) -> Result<String, tonic::Status> {
    let mut client = CertificatesClient::new(controller.channel().await);
    let request = IssueWorkloadRequest {
        identity: fake::WHO_AM_I.into(),
        csr: Vec::new(),
    };
    match client.issue_workload(request).await {
        Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(status.message().into()),
        Err(status) => Err(status),
        Ok(_) => Ok(String::new()),
    }
}

async fn until_connected(controller: &Controller, connected: bool) {
    let mut watch = controller.connected();
    within(watch.wait_for(|c| *c == connected)).await.unwrap();
}

#[tokio::test]
async fn a_node_proves_itself_with_the_certificate_it_got_for_its_token() {
    let fake = Fake::start().await;
    let controller = Controller::start(fake.client(NodeRole::Agent));
    assert_eq!(
        within(proven(&controller)).await.unwrap(),
        "spiffe://cluster.local/warren/node/node-1/agent"
    );
    let file = fake.secrets().join("node-agent.pem");
    let mode = std::fs::metadata(file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_restarted_process_goes_on_with_its_certificate() {
    let fake = Fake::start().await;
    for _ in 0..2 {
        let controller = Controller::start(fake.client(NodeRole::Proxy));
        within(proven(&controller)).await.unwrap();
    }
    assert_eq!(fake.issued_to_nodes(), 1);
}

#[tokio::test]
async fn an_unusable_kept_certificate_is_replaced() {
    let fake = Fake::start().await;
    std::fs::create_dir_all(fake.secrets()).unwrap();
    std::fs::write(fake.secrets().join("node-proxy.pem"), "no PEM").unwrap();
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    within(proven(&controller)).await.unwrap();
    assert_eq!(fake.issued_to_nodes(), 1);
}

#[tokio::test]
async fn the_certificate_is_renewed_at_half_its_life_with_a_fresh_token() {
    let fake = Fake::start().await;
    // Issued as if an hour ago, for an hour and a half: due at once.
    fake.set_life(3600, 1800);
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    fake.on_issue_node(|fake| fake.set_life(0, 3600));
    let mut links = controller.links();
    let first = within(controller.link()).await.generation;
    fake.set_token("token-2");
    let newer = |link: &Option<Link>| link.as_ref().is_some_and(|l| l.generation > first);
    within(links.wait_for(newer)).await.unwrap();
    assert_eq!(fake.issued_to_nodes(), 2);
    within(proven(&controller)).await.unwrap();
}

#[tokio::test]
async fn it_reconnects_when_the_controller_is_back() {
    let mut fake = Fake::start().await;
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    within(proven(&controller)).await.unwrap();
    let channel = controller.channel().await;
    fake.stop().await;
    until_connected(&controller, false).await;
    let late = CertificatesClient::new(channel)
        .issue_workload(IssueWorkloadRequest::default())
        .await;
    assert!(late.is_err(), "a channel belongs to one connection");
    fake.resume().await;
    within(proven(&controller)).await.unwrap();
    assert_eq!(fake.issued_to_nodes(), 1);
}

#[tokio::test]
async fn a_certificate_that_is_refused_is_replaced() {
    let mut fake = Fake::start().await;
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    within(proven(&controller)).await.unwrap();
    fake.stop().await;
    fake.forget_old_clients();
    fake.resume().await;
    let answer = async {
        // The first connection ends when the controller has judged the certificate.
        loop {
            if let Ok(name) = proven(&controller).await {
                return name;
            }
        }
    };
    within(answer).await;
    assert_eq!(fake.issued_to_nodes(), 2);
}

#[tokio::test]
async fn the_token_goes_to_the_controller_only() {
    let fake = Fake::start().await;
    let other = Fake::start().await;
    let mut config = fake.client(NodeRole::Proxy);
    let right = std::fs::read(&config.trust_bundle).unwrap();
    config.trust_bundle = fake.dir().join("wrong.pem");
    std::fs::copy(
        other.client(NodeRole::Proxy).trust_bundle,
        &config.trust_bundle,
    )
    .unwrap();
    let controller = Controller::start(config.clone());
    within(fake.handshake_failed()).await;
    assert_eq!(fake.calls(), 0);
    // Put right, it is used without a restart.
    std::fs::write(&config.trust_bundle, right).unwrap();
    within(proven(&controller)).await.unwrap();
}

/// A sink that knows what it is told to.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    versions: HashMap<String, String>,
    removed: Vec<String>,
    complete: usize,
    reject: Option<String>,
}

impl Sink for Store {
    fn known(&self, type_url: &str) -> HashMap<String, String> {
        match type_url == mesh::Workload::TYPE_URL {
            true => self.0.lock().versions.clone(),
            false => HashMap::new(),
        }
    }

    fn apply(&mut self, _: &str, upserts: Vec<Update>, removed: Vec<String>) -> Result<(), String> {
        let mut held = self.0.lock();
        for update in upserts {
            held.versions.insert(update.name, update.version);
        }
        for name in &removed {
            held.versions.remove(name);
        }
        held.removed.extend(removed);
        held.reject.take().map_or(Ok(()), Err)
    }

    fn complete(&mut self, _: &str) {
        self.0.lock().complete += 1;
    }
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn subscriptions() -> Subscriptions {
    BTreeMap::from([
        (mesh::Service::TYPE_URL, names(&["*"])),
        (mesh::Workload::TYPE_URL, names(&["*"])),
    ])
}

fn response(nonce: &str, resources: &[(&str, &str)]) -> DeltaDiscoveryResponse {
    fake::response::<mesh::Workload>(nonce, resources.iter().map(|(n, v)| (*n, *v, Vec::new())))
}

#[tokio::test]
async fn updates_are_answered_by_nonce_and_not_asked_for_again() {
    let mut fake = Fake::start().await;
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    let store = Store::default();
    let (_keep, wanted) = watch::channel(subscriptions());
    let _task = fake::Task(tokio::spawn(delta::run(controller, wanted, store.clone())));

    for type_url in [mesh::Service::TYPE_URL, mesh::Workload::TYPE_URL] {
        let first = fake.request().await;
        assert_eq!(first.type_url, type_url);
        assert_eq!(first.resource_names_subscribe, ["*"]);
        assert!(first.initial_resource_versions.is_empty());
        assert_eq!(first.node.unwrap().id, "node-1");
    }
    fake.respond(response("n1", &[("a", "1"), ("b", "1")]))
        .await;
    let ack = fake.request().await;
    assert_eq!(
        (ack.response_nonce.as_str(), ack.error_detail),
        ("n1", None)
    );
    assert_eq!(store.0.lock().complete, 1);

    store.0.lock().reject = Some("c: bad".into());
    let mut part = response("n2", &[("c", "1")]);
    part.system_version_info = "7+".into();
    part.removed_resources = vec!["b".into()];
    fake.respond(part).await;
    let nack = fake.request().await;
    assert_eq!(nack.response_nonce, "n2");
    assert_eq!(nack.error_detail.unwrap().message, "c: bad");
    assert_eq!(store.0.lock().complete, 1, "there is more to come");
    store.0.lock().versions.remove("c");

    fake.stop().await;
    fake.resume().await;
    let again = [fake.request().await, fake.request().await];
    assert!(again[0].initial_resource_versions.is_empty());
    let held = HashMap::from([("a".to_owned(), "1".to_owned())]);
    assert_eq!(again[1].initial_resource_versions, held);
    assert_eq!(again[1].response_nonce, "");
}

#[tokio::test]
async fn subscriptions_change_while_the_stream_runs() {
    let mut fake = Fake::start().await;
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    let (change, wanted) = watch::channel(subscriptions());
    let run = tokio::spawn(delta::run(controller, wanted, Store::default()));
    for _ in 0..2 {
        fake.request().await;
    }
    let service = mesh::Service::TYPE_URL;
    change.send_modify(|s| *s.get_mut(service).unwrap() = names(&["*", "address/10.0.0.1"]));
    let more = fake.request().await;
    assert_eq!(more.type_url, service);
    assert_eq!(more.resource_names_subscribe, ["address/10.0.0.1"]);
    assert!(more.resource_names_unsubscribe.is_empty());
    change.send_modify(|s| *s.get_mut(service).unwrap() = names(&["*"]));
    let fewer = fake.request().await;
    assert_eq!(fewer.resource_names_unsubscribe, ["address/10.0.0.1"]);
    drop(change);
    within(run).await.unwrap();
}

#[tokio::test]
async fn a_renewed_certificate_moves_the_stream_to_its_connection() {
    let mut fake = Fake::start().await;
    fake.set_life(3600, 1800);
    fake.on_issue_node(|fake| fake.set_life(0, 3600));
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    let (_keep, wanted) = watch::channel(subscriptions());
    let _task = fake::Task(tokio::spawn(delta::run(
        controller,
        wanted,
        Store::default(),
    )));
    // Two types on each of two streams.
    for _ in 0..4 {
        fake.request().await;
    }
    assert_eq!(fake.issued_to_nodes(), 2);
}

#[tokio::test]
async fn a_controller_with_a_new_root_is_found_by_the_mounted_bundle() {
    let mut fake = Fake::start().await;
    let controller = Controller::start(fake.client(NodeRole::Proxy));
    within(proven(&controller)).await.unwrap();
    fake.stop().await;
    until_connected(&controller, false).await;
    let other = Fake::start().await;
    let bundle = std::fs::read(other.client(NodeRole::Proxy).trust_bundle).unwrap();
    drop(controller);
    // The bundle that was kept is of the old one, as is the node certificate.
    let mut config = other.client(NodeRole::Proxy);
    config.credentials_dir = Some(fake.secrets());
    assert_ne!(
        std::fs::read(fake.secrets().join("trust-bundle.pem")).unwrap(),
        bundle
    );
    let controller = Controller::start(config);
    within(async { while proven(&controller).await.is_err() {} }).await;
}
