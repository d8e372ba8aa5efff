//! Who gets which certificate, over the real server, and what it is good for.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::{CLIENT, Credentials, DEMO, Lab, Stream, WEB, csr, issue_workload, soon};
use mesh_api::proto::control::enrolment_client::EnrolmentClient;
use mesh_api::proto::control::{RegisterPodRequest, Role};
use mesh_api::proto::mesh::NodePod;
use mesh_api::tls;
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::Code;

const WEB_ID: &str = "spiffe://cluster.local/ns/demo/sa/web";
const CLIENT_ID: &str = "spiffe://cluster.local/ns/demo/sa/client";

#[tokio::test]
async fn a_token_is_good_for_one_node_and_one_role() {
    let lab = Lab::start(DEMO).await;
    let key = KeyPair::generate().unwrap();
    for (node, role, token) in [
        ("node-1", Role::Proxy, "wrong"),
        ("node-1", Role::Proxy, ""),
        ("node-2", Role::Proxy, "p1"),
        ("node-1", Role::Agent, "p1"),
        ("node-3", Role::Proxy, "p1"),
    ] {
        let refused = lab
            .issue_node(node, role, token, csr(&key))
            .await
            .unwrap_err();
        assert_eq!(
            refused.code(),
            Code::Unauthenticated,
            "{node} {role:?} {token}: {refused}"
        );
    }
    let refused = lab
        .issue_node("node-1", Role::Unspecified, "p1", csr(&key))
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    let refused = lab
        .issue_node("node-1/agent", Role::Proxy, "p1", csr(&key))
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    let line = "warren_controller_certificates_refused_total{kind=\"node\",reason=\"token\"}";
    assert_eq!(lab.metric(line), 5.0);

    let issued = lab
        .issue_node("node-1", Role::Proxy, "p1", csr(&key))
        .await
        .unwrap();
    let leaf = CertificateDer::from(issued.chain[0].clone());
    assert_eq!(
        tls::uri_name(&leaf).unwrap(),
        "spiffe://cluster.local/warren/node/node-1/proxy"
    );
    // Tokens are read anew: one that was taken out is good no more.
    lab.write("tokens", "node-1 agent a1\n");
    let refused = lab.issue_node("node-1", Role::Proxy, "p1", csr(&key)).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn an_identity_is_signed_only_where_a_pod_of_it_is() {
    let lab = Lab::start(DEMO).await;
    let node_1 = lab.node("node-1", Role::Proxy).await;
    assert!(issue_workload(&node_1, WEB_ID).await.is_ok());

    for identity in [
        CLIENT_ID,
        "spiffe://other.domain/ns/demo/sa/web",
        "spiffe://cluster.local/ns/x/sa/web",
    ] {
        let refused = issue_workload(&node_1, identity).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Code::PermissionDenied,
            "{identity}: {refused}"
        );
    }
    let refused = issue_workload(&node_1, "spiffe://cluster.local/warren/node/node-2/proxy").await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    let agent = lab.node("node-1", Role::Agent).await;
    let refused = issue_workload(&agent, WEB_ID).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let anonymous = lab.channel(None).await.unwrap();
    let refused = issue_workload(&anonymous, WEB_ID).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    // The pod moves: the right moves with it.
    lab.edit("nodeName: node-1\n", "nodeName: node-2\n");
    lab.until("web on node-2", |s| {
        s["pods"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| p["uid"] == WEB && p["node"] == "node-2")
    })
    .await;
    let refused = issue_workload(&node_1, WEB_ID).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let node_2 = lab.node("node-2", Role::Proxy).await;
    assert!(issue_workload(&node_2, WEB_ID).await.is_ok());
}

#[tokio::test]
async fn a_workload_certificate_proves_the_workload_and_nothing_else() {
    let lab = Lab::start(DEMO).await;
    let (node_1, node_2) = (
        lab.node("node-1", Role::Proxy).await,
        lab.node("node-2", Role::Proxy).await,
    );
    let (web, web_key) = issue_workload(&node_1, WEB_ID).await.unwrap();
    let (client, client_key) = issue_workload(&node_2, CLIENT_ID).await.unwrap();

    let leaf = CertificateDer::from(web.chain[0].clone());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let life = Duration::from_secs(24 * 3600);
    let end = tls::not_after(&leaf).unwrap();
    assert!(
        end <= now + life && end + Duration::from_secs(60) > now + life,
        "24 hours"
    );
    let begin = tls::not_before(&leaf).unwrap();
    assert!(
        begin <= now - Duration::from_secs(300),
        "back-dated by five minutes"
    );
    let name = ServerName::try_from("evil.example").unwrap();
    let end_entity = webpki::EndEntityCert::try_from(&leaf).unwrap();
    assert!(
        end_entity.verify_is_valid_for_subject_name(&name).is_err(),
        "names are ours alone"
    );

    let roots = tls::roots(web.trust_bundle.iter().map(Vec::as_slice)).unwrap();
    let builder = || rustls::ServerConfig::builder_with_provider(tls::provider());
    let web = Credentials::new(&web, &web_key);
    let server = builder()
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(tls::UriClientVerifier::new(
            roots.clone(),
            "cluster.local",
            true,
        ))
        .with_single_cert(web.chain, web.key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let connect = |expected: &'static str| {
        let credentials = Credentials::new(&client, &client_key);
        let config = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(tls::UriServerVerifier::new(roots.clone(), expected))
            .with_client_auth_cert(credentials.chain, credentials.key)
            .unwrap();
        TlsConnector::from(Arc::new(config))
    };
    let (a, b) = tokio::io::duplex(65536);
    let name = ServerName::try_from("x.id.warren-mesh.io").unwrap();
    let (accepted, connected) =
        tokio::join!(acceptor.accept(a), connect(WEB_ID).connect(name.clone(), b));
    connected.unwrap();
    let accepted = accepted.unwrap();
    let caller = &accepted.get_ref().1.peer_certificates().unwrap()[0];
    assert_eq!(tls::uri_name(caller).unwrap(), CLIENT_ID);

    let (a, b) = tokio::io::duplex(65536);
    let (_, refused) = tokio::join!(acceptor.accept(a), connect(CLIENT_ID).connect(name, b));
    assert!(refused.is_err(), "web is not client");
}

#[tokio::test]
async fn a_signing_request_must_be_signed_by_its_key() {
    let lab = Lab::start(DEMO).await;
    let mut damaged = csr(&KeyPair::generate().unwrap());
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    for bad in [damaged, Vec::new(), vec![0x30; 100], vec![0; 20_000]] {
        let refused = lab
            .issue_node("node-1", Role::Proxy, "p1", bad)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
}

#[tokio::test]
async fn a_certificate_of_another_root_is_refused_in_the_handshake() {
    let lab = Lab::start(DEMO).await;
    let key = KeyPair::generate().unwrap();
    let root = Issuer::new(CertificateParams::default(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::default();
    let uri = "spiffe://cluster.local/warren/node/node-1/proxy";
    params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
    let leaf = params.signed_by(&key, &root).unwrap();
    let credentials = Credentials {
        chain: vec![leaf.der().clone()],
        key: rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
    };
    // In TLS 1.3 the client hears of it with its first call.
    if let Ok(channel) = lab.channel(Some(credentials)).await {
        assert!(issue_workload(&channel, WEB_ID).await.is_err());
    }
    let failed = "warren_controller_tls_handshakes_total{result=\"failed\"}";
    soon("counted", async {
        while lab.metric(failed) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_workload_certificate_opens_nothing_at_the_controller() {
    let lab = Lab::start(DEMO).await;
    let proxy = lab.node("node-2", Role::Proxy).await;
    let (issued, key) = issue_workload(&proxy, CLIENT_ID).await.unwrap();
    let channel = lab
        .channel(Some(Credentials::new(&issued, &key)))
        .await
        .unwrap();
    let refused = issue_workload(&channel, CLIENT_ID).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = Stream::try_open(channel.clone(), "node-2")
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let request = RegisterPodRequest {
        uid: CLIENT.into(),
        ..Default::default()
    };
    let refused = EnrolmentClient::new(channel)
        .register_pod(request)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_stream_is_for_its_own_node_and_role() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.node = "node-2".into();
    proxy.subscribe::<NodePod>(&["*"]).await;
    let ended = soon("end", proxy.responses.message()).await.unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied);
    assert!(ended.message().contains("node node-1"), "{ended}");

    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<NodePod>(&["*"]).await;
    let ended = soon("end", proxy.responses.message()).await.unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied);
}
