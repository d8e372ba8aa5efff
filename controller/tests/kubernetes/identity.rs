//! Who gets which certificate, and where the root is kept.

use mesh_api::proto::control::Role;
use mesh_api::proto::mesh::MeshConfig;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::{Value, json};
use tonic::Code;

use crate::apiserver::ApiServer;
use crate::common::{Lab, csr, issue_workload, soon};
use crate::servers;
use crate::world::SYSTEM_PODS;

async fn refused(lab: &Lab, node: &str, role: Role, token: &str) -> String {
    let key = KeyPair::generate().unwrap();
    let refused = lab
        .issue_node(node, role, token, csr(&key))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    refused.message().to_owned()
}

#[tokio::test]
async fn a_token_opens_only_what_it_is_for() {
    let server = servers!();
    server.populate().await;
    let lab = server.controller("a").await;
    let good = server
        .token(
            "warren-node-proxy",
            "warren-node-proxy-1",
            "warren-controller",
        )
        .await;
    let key = KeyPair::generate().unwrap();
    lab.issue_node("node-1", Role::Proxy, &good, csr(&key))
        .await
        .unwrap();

    let said = refused(&lab, "node-2", Role::Proxy, &good).await;
    assert!(said.contains("it is bound to node node-1"), "{said}");
    let said = refused(&lab, "node-1", Role::Agent, &good).await;
    assert!(
        said.contains("it is that of system:serviceaccount:warren-system:warren-node-proxy"),
        "{said}"
    );

    let elsewhere = server
        .token("warren-node-proxy", "warren-node-proxy-1", "vault")
        .await;
    let said = refused(&lab, "node-1", Role::Proxy, &elsewhere).await;
    assert!(said.contains("the API server says"), "{said}");

    server
        .pod("warren-system", "stranger", "node-1", "default")
        .await;
    let stranger = server
        .token("default", "stranger", "warren-controller")
        .await;
    let said = refused(&lab, "node-1", Role::Proxy, &stranger).await;
    assert!(
        said.contains("system:serviceaccount:warren-system:default"),
        "{said}"
    );

    let said = refused(&lab, "node-1", Role::Proxy, "garbage").await;
    assert!(said.contains("the API server says"), "{said}");
    let said = refused(&lab, "node-1", Role::Proxy, "").await;
    assert!(said.contains("there is none"), "{said}");

    // The token outlives its pod, but is good for nothing then, even if another has the name.
    server
        .delete(&format!("{SYSTEM_PODS}/warren-node-proxy-1"))
        .await;
    let said = refused(&lab, "node-1", Role::Proxy, &good).await;
    assert!(is_of_no_pod(&said), "{said}");
    server
        .pod(
            "warren-system",
            "warren-node-proxy-1",
            "node-1",
            "warren-node-proxy",
        )
        .await;
    let said = refused(&lab, "node-1", Role::Proxy, &good).await;
    assert!(is_of_no_pod(&said), "{said}");
    lab.controller.stop().await;
}

/// The API server keeps a verdict for ten seconds; until then the pod that is gone is found missing here.
fn is_of_no_pod(said: &str) -> bool {
    let missed = said.contains("its pod warren-node-proxy-1 with UID") && said.contains("is gone");
    missed || said.contains("the API server says")
}

#[tokio::test]
async fn an_identity_is_signed_for_the_node_of_its_pods_and_no_other() {
    let server = servers!();
    server.populate().await;
    server.pod("demo", "web", "node-1", "web").await;
    let lab = server.controller("a").await;
    let web = "spiffe://cluster.local/ns/demo/sa/web";
    let one = server.channel(&lab, 1).await;
    let two = server.channel(&lab, 2).await;
    issue_workload(&one, web).await.unwrap();
    let refused = issue_workload(&two, web).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    server.delete("/api/v1/namespaces/demo/pods/web").await;
    lab.until("the pod is gone", |status| status["pods"] == json!([]))
        .await;
    let refused = issue_workload(&one, web).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    lab.controller.stop().await;
}

const SECRET: &str = "/api/v1/namespaces/warren-system/secrets/warren-root";
const BUNDLE: &str = "/api/v1/namespaces/warren-system/configmaps/warren-trust-bundle";

async fn bundle(server: &ApiServer, roots: usize) -> Value {
    let whole = |map: &Value| {
        let text = map["data"]["bundle.pem"].as_str().unwrap_or_default();
        text.matches("BEGIN").count() == roots
    };
    server.until(BUNDLE, whole).await
}

#[tokio::test]
async fn replicas_share_one_root_and_follow_the_users() {
    let server = servers!();
    server.populate().await;
    // At the same time: one of them is first.
    let (one, two) = tokio::join!(server.controller("a"), server.controller("b"));
    assert_eq!(
        one.controller.authority().bundle(),
        two.controller.authority().bundle()
    );
    let secret = server.get(SECRET).await.unwrap();
    assert_eq!(secret["type"], "kubernetes.io/tls");
    bundle(&server, 1).await;

    // A node that holds the first bundle keeps the new root from signing.
    let mut proxy = server.proxy(&two, 1).await;
    proxy.subscribe::<MeshConfig>(&["*"]).await;
    let (config, _) = proxy.take::<MeshConfig>().await;
    assert_eq!(config[0].trust_bundle.len(), 1);

    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "the user's");
    let root = params.self_signed(&key).unwrap();
    let data = json!({ "tls.crt": root.pem(), "tls.key": key.serialize_pem() });
    server.patch(SECRET, json!({ "stringData": data })).await;
    let map = bundle(&server, 2).await;
    let retired = map["data"]["retired.pem"].as_str().unwrap();
    assert_eq!(retired.matches("BEGIN").count(), 1);
    let response = proxy.next::<MeshConfig>().await;
    let signer = |lab: &Lab| lab.metric("warren_controller_root_not_after_timestamp_seconds ");
    let end = root_end(root.der());
    assert!(
        signer(&one) != end && signer(&two) != end,
        "node-1 does not trust it yet"
    );
    proxy.ack::<MeshConfig>(&response).await;
    for lab in [&one, &two] {
        let signs = async {
            while signer(lab) != end {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        soon("the new root signs", signs).await;
        assert_eq!(lab.controller.authority().bundle().len(), 2);
    }

    // A mistake leaves what is in use in force.
    let broken = json!({ "stringData": { "tls.key": "nonsense" } });
    server.patch(SECRET, broken).await;
    let problem = json!({ "stringData": { "tls.key": key.serialize_pem() } });
    server.patch(SECRET, problem).await;
    // A root that is taken out of the retired ones is not trusted any more.
    server
        .patch(BUNDLE, json!({ "data": { "retired.pem": "" } }))
        .await;
    bundle(&server, 1).await;
    one.controller.stop().await;
    two.controller.stop().await;
}

fn root_end(der: &[u8]) -> f64 {
    mesh_api::tls::not_after(&der.to_vec().into())
        .unwrap()
        .as_secs() as f64
}
