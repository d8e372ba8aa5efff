//! Rotation of the root: trusted everywhere before it signs anything, and the old one long after.

use crate::common::{DEMO, Lab, Stream, bundle_of, issue_workload};
use mesh_api::proto::control::Role;
use mesh_api::proto::mesh::MeshConfig;
use mesh_api::tls;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use rustls_pki_types::{CertificateDer, UnixTime};
use warren_controller::ca::files;

const WEB_ID: &str = "spiffe://cluster.local/ns/demo/sa/web";

fn replace_root(lab: &Lab) -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "a root of the user's");
    let cert = params.self_signed(&key).unwrap();
    // In two steps, as people do; between them the files do not fit and nothing must happen.
    lab.write("ca/root.key", &key.serialize_pem());
    lab.write("ca/root.crt", &cert.pem());
    cert.der().to_vec()
}

async fn config(proxy: &mut Stream) -> MeshConfig {
    proxy.take::<MeshConfig>().await.0.remove(0)
}

/// Whether a freshly signed leaf is the given root's.
async fn signed_by(lab: &Lab, node: &tonic::transport::Channel, root: &[u8]) -> bool {
    let (issued, _) = issue_workload(node, WEB_ID).await.unwrap();
    assert_eq!(issued.trust_bundle, lab.controller.authority().bundle());
    let leaf = CertificateDer::from(issued.chain[0].clone());
    let roots = tls::roots([root]).unwrap();
    tls::verify_chain(&roots, tls::PeerRole::Server, &leaf, &[], UnixTime::now()).is_ok()
}

#[tokio::test]
async fn a_new_root_signs_only_when_every_node_trusts_it() {
    let lab = Lab::start(DEMO).await;
    let old = lab.controller.authority().bundle().remove(0);
    let node = lab.node("node-1", Role::Proxy).await;
    let mut one = Stream::open(node.clone(), "node-1").await;
    let mut two = lab.proxy("node-2").await;
    for proxy in [&mut one, &mut two] {
        proxy.subscribe::<MeshConfig>(&["*"]).await;
        assert_eq!(config(proxy).await.trust_bundle, [&old[..]]);
    }
    let new = replace_root(&lab);
    assert_eq!(config(&mut one).await.trust_bundle, [&new[..], &old[..]]);
    let unanswered = two.next::<MeshConfig>().await;
    assert!(
        signed_by(&lab, &node, &old).await,
        "node-2 may not trust the new root yet"
    );
    two.ack::<MeshConfig>(&unanswered).await;
    crate::common::soon("promotion", async {
        while !signed_by(&lab, &node, &new).await {}
    })
    .await;
    // What nodes read for first contact, and what a client that trusts the new root alone sees.
    let bundle: Vec<Vec<u8>> = bundle_of(&lab.path("ca/bundle.pem"))
        .iter()
        .map(|der| der.to_vec())
        .collect();
    assert_eq!(bundle, [new.clone(), old.clone()]);
    crate::common::soon("the controller's own certificate", async {
        while lab
            .channel_trusting(None, std::slice::from_ref(&new))
            .await
            .is_err()
        {}
    })
    .await;
    // Certificates of the old root open connections still, also after a restart.
    let lab = lab.restart().await;
    assert_eq!(lab.controller.authority().bundle(), [new, old]);
}

#[tokio::test]
async fn a_root_is_distrusted_by_taking_it_out_of_the_retired() {
    let lab = Lab::start(DEMO).await;
    let mut proxy = lab.proxy("node-1").await;
    proxy.subscribe::<MeshConfig>(&["*"]).await;
    config(&mut proxy).await;
    let new = replace_root(&lab);
    assert_eq!(config(&mut proxy).await.trust_bundle.len(), 2);
    lab.write("ca/retired.pem", "");
    assert_eq!(config(&mut proxy).await.trust_bundle, [&new[..]]);
}

#[tokio::test]
async fn a_broken_root_changes_nothing() {
    let lab = Lab::start(DEMO).await;
    let old = lab.controller.authority().bundle();
    lab.write("ca/root.crt", "nonsense");
    let error = files::read(&lab.path("ca"), "cluster.local")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("root.crt: expected a certificate in PEM"),
        "{error}"
    );
    assert_eq!(lab.controller.authority().bundle(), old);
    let node = lab.node("node-1", Role::Proxy).await;
    assert!(signed_by(&lab, &node, &old[0]).await);
}
