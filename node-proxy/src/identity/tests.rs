use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use futures::future::BoxFuture;
use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, KeyPair, SanType,
};
use rustls_pki_types::CertificateSigningRequestDer;
use time::OffsetDateTime;
use tokio::sync::Semaphore;

use super::*;

/// A CA in this process that does what it is told, in order; then it issues for an hour.
struct FakeCa {
    root: Mutex<(rcgen::Issuer<'static, KeyPair>, Vec<u8>)>,
    answers: Mutex<VecDeque<Answer>>,
    issued: watch::Sender<usize>,
    reachable: watch::Sender<bool>,
    asked: AtomicUsize,
    gate: Option<Semaphore>,
}

#[derive(Clone)]
enum Answer {
    /// Valid from so many seconds ago for so many from now on.
    Life(i64, i64),
    For(&'static str),
    Refuse(&'static str),
}

fn root() -> (rcgen::Issuer<'static, KeyPair>, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let der = params.self_signed(&key).unwrap().der().to_vec();
    (rcgen::Issuer::new(params, key), der)
}

impl FakeCa {
    fn new(answers: impl IntoIterator<Item = Answer>) -> Arc<Self> {
        Arc::new(Self::ungated(answers))
    }

    fn ungated(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self {
            root: Mutex::new(root()),
            answers: Mutex::new(answers.into_iter().collect()),
            issued: watch::Sender::new(0),
            reachable: watch::Sender::new(true),
            asked: AtomicUsize::new(0),
            gate: None,
        }
    }

    fn away() -> Arc<Self> {
        let ca = Self::new([]);
        ca.reachable.send_replace(false);
        ca
    }

    async fn has_issued(&self, count: usize) {
        within(self.issued.subscribe().wait_for(|n| *n >= count))
            .await
            .unwrap();
    }
}

impl Issuer for FakeCa {
    fn reachable(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.reachable.subscribe().wait_for(|r| *r).await.unwrap();
        })
    }

    fn issue(
        &self,
        identity: &Identity,
        csr: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<Vec<u8>>, IssueError>> {
        let mut uri = identity.to_string();
        Box::pin(async move {
            self.asked.fetch_add(1, Ordering::Relaxed);
            if let Some(gate) = &self.gate {
                gate.acquire().await.unwrap().forget();
            }
            let answer = self
                .answers
                .lock()
                .pop_front()
                .unwrap_or(Answer::Life(0, 3600));
            let (before, after) = match answer {
                Answer::Refuse(why) => return Err(IssueError::Refused(why.into())),
                Answer::Life(before, after) => (before, after),
                Answer::For(other) => {
                    uri = other.into();
                    (0, 3600)
                }
            };
            let csr = CertificateSigningRequestDer::from(csr);
            let mut csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
            let now = OffsetDateTime::now_utc();
            csr.params = CertificateParams::default();
            csr.params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
            csr.params.not_before = now - time::Duration::seconds(before);
            csr.params.not_after = now + time::Duration::seconds(after);
            let der = csr.signed_by(&self.root.lock().0).unwrap().der().to_vec();
            self.issued.send_modify(|n| *n += 1);
            Ok(vec![der])
        })
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("happens in time")
}

fn identities(directory: &Path, ca: &Arc<FakeCa>) -> Arc<Identities> {
    Identities::new(directory, Arc::clone(ca) as _, Arc::new(SystemTime::now))
}

fn web() -> Identity {
    Identity::new("cluster.local", "demo", "web").unwrap()
}

fn files(directory: &Path) -> usize {
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}

fn metrics(identities: &Arc<Identities>) -> String {
    let mut registry = Registry::with_prefix("warren");
    identities.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

#[tokio::test]
async fn a_certificate_lives_as_long_as_its_guards() {
    let directory = tempfile::tempdir().unwrap();
    let all = identities(directory.path(), &FakeCa::new([]));
    let (first, second) = (all.acquire(web()), all.acquire(web()));
    let local = within(all.ready(&web())).await;
    assert_eq!(local.identity, web());
    assert!(all.by_server_name(&web().server_name()).is_some());
    assert!(all.by_server_name("other.id.warren-mesh.io").is_none());
    let mode = std::fs::metadata(all.path(&web()))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = metrics(&all);
    assert!(
        text.contains("warren_certificates{state=\"valid\"} 1"),
        "{text}"
    );
    assert!(
        text.contains("warren_certificate_issues_total{result=\"ok\"} 1"),
        "{text}"
    );
    let expiry = "warren_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/demo/sa/web\"}";
    assert!(text.contains(expiry), "{text}");

    drop(first);
    assert!(all.get(&web()).is_some());
    drop(second);
    assert!(all.get(&web()).is_none());
    assert!(all.by_server_name(&web().server_name()).is_none());
    assert_eq!(files(directory.path()), 0);
}

#[tokio::test]
async fn a_restarted_proxy_needs_no_controller() {
    let directory = tempfile::tempdir().unwrap();
    let before = {
        let all = identities(directory.path(), &FakeCa::new([]));
        let _guard = all.acquire(web());
        let local = within(all.ready(&web())).await;
        all.keep_files(true);
        local
    };
    let all = identities(directory.path(), &FakeCa::away());
    let _guard = all.acquire(web());
    let after = within(all.ready(&web())).await;
    assert_eq!(before.certified.cert, after.certified.cert);
}

#[tokio::test]
async fn a_process_that_drains_leaves_the_keys_to_the_one_that_accepts() {
    let directory = tempfile::tempdir().unwrap();
    let old = identities(directory.path(), &FakeCa::new([]));
    let guard = old.acquire(web());
    within(old.ready(&web())).await;
    old.keep_files(true);
    // A pod of that identity came, the one it knew has gone.
    let new = identities(directory.path(), &FakeCa::away());
    let _guard = new.acquire(web());
    within(new.ready(&web())).await;
    drop(guard);
    old.wipe_unwanted();
    assert_eq!(files(directory.path()), 1);

    // It accepts again.
    let guard = old.acquire(web());
    within(old.ready(&web())).await;
    old.keep_files(false);
    drop(guard);
    assert_eq!(files(directory.path()), 0);
}

#[tokio::test]
async fn a_kept_file_of_no_use_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let all = identities(directory.path(), &FakeCa::new([]));
    std::fs::write(all.path(&web()), "no PEM").unwrap();
    let _guard = all.acquire(web());
    within(all.ready(&web())).await;
}

#[tokio::test]
async fn it_is_renewed_with_a_new_key_past_half_its_life() {
    let directory = tempfile::tempdir().unwrap();
    let ca = FakeCa::new([Answer::Life(3600, 1800)]);
    let all = identities(directory.path(), &ca);
    let mut changed = all.changed();
    let _guard = all.acquire(web());
    let first = within(all.ready(&web())).await;
    let newer = || {
        all.get(&web())
            .is_some_and(|l| l.generation > first.generation)
    };
    let renewed = async {
        while !newer() {
            changed.changed().await.unwrap();
        }
    };
    within(renewed).await;
    let second = all.get(&web()).unwrap();
    assert_ne!(
        first.certified.key.public_key(),
        second.certified.key.public_key()
    );
    assert!(second.not_after > first.not_after);
    assert_eq!(*ca.issued.borrow(), 2, "and no more than needed");
    let kept = Credentials::load(&all.path(&web())).unwrap().unwrap();
    assert_eq!(kept.certified.cert, second.certified.cert);
}

#[tokio::test]
async fn a_refusal_is_retried_and_keeps_the_valid_one() {
    let directory = tempfile::tempdir().unwrap();
    let refused = Answer::Refuse("no pod of this node has the identity");
    let ca = FakeCa::new([refused.clone(), Answer::Life(3600, 1800), refused]);
    let all = identities(directory.path(), &ca);
    let _guard = all.acquire(web());
    assert!(metrics(&all).contains("warren_certificates{state=\"pending\"} 1"));
    let first = within(all.ready(&web())).await;
    ca.has_issued(1).await;
    assert_eq!(all.get(&web()).unwrap().generation, first.generation);
    ca.has_issued(2).await;
    let text = metrics(&all);
    assert!(
        text.contains("warren_certificate_issues_total{result=\"refused\"} 2"),
        "{text}"
    );
}

#[tokio::test]
async fn a_certificate_for_somebody_else_is_not_taken() {
    let directory = tempfile::tempdir().unwrap();
    let ca = FakeCa::new([Answer::For("spiffe://cluster.local/ns/demo/sa/db")]);
    let all = identities(directory.path(), &ca);
    let _guard = all.acquire(web());
    ca.has_issued(2).await;
    let local = within(all.ready(&web())).await;
    let uri = mesh_api::tls::uri_name(&local.certified.cert[0]).unwrap();
    assert_eq!(uri, web().as_str());
    assert!(metrics(&all).contains("warren_certificate_issues_total{result=\"refused\"} 1"));
}

#[tokio::test]
async fn an_expired_certificate_is_shown_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let ahead = Arc::new(AtomicU64::new(0));
    let clock: Clock = {
        let ahead = Arc::clone(&ahead);
        Arc::new(move || SystemTime::now() + Duration::from_secs(ahead.load(Ordering::Relaxed)))
    };
    let all = Identities::new(directory.path(), FakeCa::new([]), clock);
    let _guard = all.acquire(web());
    let local = within(all.ready(&web())).await;
    ahead.store(7200, Ordering::Relaxed);
    assert_eq!(all.get(&web()).unwrap().generation, local.generation);
    assert!(metrics(&all).contains("warren_certificates{state=\"expired\"} 1"));
    assert_eq!(all.dump()[web().as_str()]["state"], "expired");
}

#[tokio::test]
async fn an_expired_file_is_not_taken_up() {
    let directory = tempfile::tempdir().unwrap();
    {
        let ca = FakeCa::new([Answer::Life(7200, -3600)]);
        let all = identities(directory.path(), &ca);
        let _guard = all.acquire(web());
        within(all.ready(&web())).await;
        all.keep_files(true);
    }
    let ca = FakeCa::new([]);
    let all = identities(directory.path(), &ca);
    let _guard = all.acquire(web());
    let local = within(all.ready(&web())).await;
    assert!(local.not_after > SystemTime::now());
}

#[tokio::test]
async fn a_certificate_of_a_root_that_is_gone_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let ca = FakeCa::new([]);
    let all = identities(directory.path(), &ca);
    let bundle = |ca: &FakeCa| vec![ca.root.lock().1.clone()];
    all.set_trust("cluster.local", &bundle(&ca));
    let trust = all.trust().unwrap();
    all.set_trust("cluster.local", &bundle(&ca));
    assert_eq!(
        all.trust().unwrap().generation,
        trust.generation,
        "the same is no change"
    );
    let _guard = all.acquire(web());
    within(all.ready(&web())).await;

    *ca.root.lock() = root();
    all.set_trust("cluster.local", &bundle(&ca));
    assert!(all.trust().unwrap().generation > trust.generation);
    ca.has_issued(2).await;
    all.set_trust("cluster.local", &[b"garbage".to_vec()]);
    assert!(all.trust().is_some(), "the last good one stays");
}

#[tokio::test]
async fn few_requests_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let ca = Arc::new(FakeCa {
        gate: Some(Semaphore::new(0)),
        ..FakeCa::ungated([])
    });
    let all = identities(directory.path(), &ca);
    let name = |n: usize| Identity::new("cluster.local", "demo", &format!("sa-{n}")).unwrap();
    let guards: Vec<_> = (0..20).map(|n| all.acquire(name(n))).collect();
    // Everything that can run without the CA answering has run.
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    assert_eq!(ca.asked.load(Ordering::Relaxed), MAX_REQUESTS);
    ca.gate.as_ref().unwrap().add_permits(100);
    for n in 0..20 {
        within(all.ready(&name(n))).await;
    }
    drop(guards);
    assert_eq!(files(directory.path()), 0);
}

#[tokio::test]
async fn keys_of_pods_that_left_meanwhile_are_wiped() {
    let directory = tempfile::tempdir().unwrap();
    let all = identities(directory.path(), &FakeCa::new([]));
    let _guard = all.acquire(web());
    within(all.ready(&web())).await;
    let left = directory.path().join("workload-left.pem");
    let node = directory.path().join("node-proxy.pem");
    std::fs::write(&left, "").unwrap();
    std::fs::write(&node, "").unwrap();
    all.wipe_unwanted();
    assert!(!left.exists());
    assert!(node.exists() && all.path(&web()).exists());
}

#[tokio::test]
async fn an_answer_that_comes_too_late_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let ca = Arc::new(FakeCa {
        gate: Some(Semaphore::new(0)),
        ..FakeCa::ungated([])
    });
    let all = identities(directory.path(), &ca);
    let guard = all.acquire(web());
    while ca.asked.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    drop(guard);
    // The same identity is wanted again before the first answer.
    let _guard = all.acquire(web());
    ca.gate.as_ref().unwrap().add_permits(2);
    within(all.ready(&web())).await;
    assert_eq!(files(directory.path()), 1);
}
