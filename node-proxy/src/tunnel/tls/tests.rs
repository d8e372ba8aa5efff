//! A resumed session dies with either certificate and at every change of the trust bundle. What two ends speak is what both
//! know.

use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::identity::Identities;
use crate::testing;

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    der: Vec<u8>,
}

fn ca() -> Ca {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let der = params.self_signed(&key).unwrap().der().to_vec();
    Ca {
        issuer: Issuer::new(params, key),
        der,
    }
}

impl Ca {
    /// Good for `seconds` from now on.
    fn issue(&self, account: &str, seconds: i64, generation: u64) -> LocalIdentity {
        let identity = Identity::new("cluster.local", "demo", account).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().unwrap())];
        let now = OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::hours(1);
        params.not_after = now + time::Duration::seconds(seconds);
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let end = not_after(&leaf).unwrap();
        let key = key.serialize_der().try_into().unwrap();
        let certified = CertifiedKey::from_der(vec![leaf], key, &provider()).unwrap();
        LocalIdentity {
            identity,
            certified: Arc::new(certified),
            not_after: SystemTime::UNIX_EPOCH + end,
            generation,
        }
    }
}

/// What both ends go by.
struct Roots {
    identities: Arc<Identities>,
    _directory: tempfile::TempDir,
}

impl Roots {
    fn of(bundle: &[&Ca]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let roots = Self {
            identities: testing::identities(directory.path()),
            _directory: directory,
        };
        roots.replace(bundle);
        roots
    }

    fn replace(&self, bundle: &[&Ca]) {
        let bundle: Vec<Vec<u8>> = bundle.iter().map(|ca| ca.der.clone()).collect();
        self.identities.set_trust("cluster.local", &bundle);
    }

    fn now(&self) -> Arc<Trust> {
        self.identities.trust().unwrap()
    }
}

/// One connection: what each end says of the other after the handshake.
async fn connect(
    client: &Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    trust: &Trust,
) -> (Result<Peer, Error>, Result<Peer, Error>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = "web.id.warren-mesh.io".try_into().unwrap();
    let dial = async {
        let mut tls = TlsConnector::from(Arc::clone(client))
            .connect(name, near)
            .await
            .unwrap();
        // The tickets come before the first byte.
        tls.read_u8().await.unwrap();
        peer(tls.get_ref().1, PeerRole::Server, trust)
    };
    let accept = async {
        let mut tls = TlsAcceptor::from(server).accept(far).await.unwrap();
        let said = peer(tls.get_ref().1, PeerRole::Client, trust);
        tls.write_u8(1).await.unwrap();
        tls.flush().await.unwrap();
        said
    };
    tokio::join!(dial, accept)
}

fn resumed((client, server): (Result<Peer, Error>, Result<Peer, Error>)) -> bool {
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(client.resumed, server.resumed);
    assert_eq!(client.identity.service_account(), "web");
    assert_eq!(server.identity.service_account(), "client");
    client.resumed
}

fn dialling(local: &LocalIdentity, trust: &Trust, callee: &LocalIdentity) -> Arc<ClientConfig> {
    Arc::new(client_config(local, trust, &callee.identity, Kind::Warren).unwrap())
}

#[tokio::test]
async fn sessions_end_with_a_renewal_at_either_end_and_with_the_trust_bundle() {
    let (ca, next) = (ca(), ca());
    let roots = Roots::of(&[&ca]);
    let trust = roots.now();
    let (caller, callee) = (ca.issue("client", 3600, 1), ca.issue("web", 3600, 2));
    let servers = ServerConfigs::default();
    let server =
        |local: &LocalIdentity, trust: &Trust| servers.get(local, trust, Kind::Warren).unwrap();
    let client = dialling(&caller, &trust, &callee);

    assert!(!resumed(
        connect(&client, server(&callee, &trust), &trust).await
    ));
    assert!(resumed(
        connect(&client, server(&callee, &trust), &trust).await
    ));

    let renewed = ca.issue("web", 3600, 3);
    assert!(
        !resumed(connect(&client, server(&renewed, &trust), &trust).await),
        "the server's certificate was renewed"
    );
    assert!(resumed(
        connect(&client, server(&renewed, &trust), &trust).await
    ));

    let again = dialling(&ca.issue("client", 3600, 4), &trust, &callee);
    assert!(
        !resumed(connect(&again, server(&renewed, &trust), &trust).await),
        "the client's certificate was renewed"
    );

    roots.replace(&[&ca, &next]);
    let trust = roots.now();
    assert!(
        !resumed(connect(&again, server(&renewed, &trust), &trust).await),
        "the trust bundle was changed"
    );

    // Even where the session is still known, the peer must be of a root that is trusted now.
    roots.replace(&[&next]);
    let without = roots.now();
    let (client_says, server_says) = connect(&again, server(&renewed, &trust), &without).await;
    for said in [client_says, server_says] {
        let refusal = tls_refusal(&said.unwrap_err());
        assert_eq!(refusal.result, "peer_unknown_ca");
    }
}

#[tokio::test]
async fn a_session_does_not_outlive_the_certificate_it_was_made_with() {
    let ca = ca();
    let roots = Roots::of(&[&ca]);
    let trust = roots.now();
    for (callers, callees) in [(2, 3600), (3600, 2)] {
        let (caller, callee) = (ca.issue("client", callers, 1), ca.issue("web", callees, 2));
        let servers = ServerConfigs::default();
        let server = || servers.get(&callee, &trust, Kind::Warren).unwrap();
        let client = dialling(&caller, &trust, &callee);
        assert!(!resumed(connect(&client, server(), &trust).await));

        let end = caller.not_after.min(callee.not_after) + Duration::from_secs(1);
        while SystemTime::now() < end {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (client_says, server_says) = connect(&client, server(), &trust).await;
        let (refuses, accepts) = match callers < callees {
            true => (server_says, client_says),
            false => (client_says, server_says),
        };
        let refusal = tls_refusal(&refuses.unwrap_err());
        assert_eq!(refusal.error, ProxyError::CertificateExpired);
        assert_eq!(refusal.result, "peer_expired");
        assert!(
            accepts.unwrap().resumed,
            "it was the session that was refused"
        );
    }
}

#[tokio::test]
async fn hbone_peers_are_given_no_session() {
    let ca = ca();
    let roots = Roots::of(&[&ca]);
    let trust = roots.now();
    let (caller, callee) = (ca.issue("client", 3600, 1), ca.issue("web", 3600, 2));
    let servers = ServerConfigs::default();
    let config = client_config(&caller, &trust, &callee.identity, Kind::Hbone).unwrap();
    let client = Arc::new(config);
    for _ in 0..2 {
        let server = servers.get(&callee, &trust, Kind::Hbone).unwrap();
        assert!(!resumed(connect(&client, server, &trust).await));
    }
}

#[tokio::test]
async fn both_ends_speak_what_both_know() {
    let ca = ca();
    let roots = Roots::of(&[&ca]);
    let trust = roots.now();
    let (caller, callee) = (ca.issue("client", 3600, 1), ca.issue("web", 3600, 2));
    let newest = ServerConfigs::default()
        .get(&callee, &trust, Kind::Warren)
        .unwrap();
    let mut older = (*newest).clone();
    older.alpn_protocols = vec![ALPN_WARREN.into()];
    for (server, expected) in [(newest, true), (Arc::new(older), false)] {
        let client = dialling(&caller, &trust, &callee);
        let (near, far) = connect(&client, server, &trust).await;
        assert_eq!(near.unwrap().large_heads, expected);
        assert_eq!(far.unwrap().large_heads, expected);
    }
}
