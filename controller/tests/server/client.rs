//! The client that agents and proxies use, against the real server.

use std::collections::{BTreeSet, HashMap};

use crate::common::{DEMO, Lab, WEB, report, soon};
use mesh_api::client::delta::{self, Sink, Subscriptions, Update};
use mesh_api::client::{ClientConfig, Controller};
use mesh_api::identity::NodeRole;
use mesh_api::proto::Resource;
use mesh_api::proto::control::enrolment_client::EnrolmentClient;
use mesh_api::proto::control::{PodState, RegisterPodRequest};
use mesh_api::proto::mesh::{EnrolmentState, MeshConfig, Workload};
use prost::Message;
use tokio::sync::{mpsc, watch};

fn connect(lab: &Lab, role: NodeRole) -> Controller {
    let letter = if role == NodeRole::Proxy { 'p' } else { 'a' };
    let token_file = lab.path(&format!("token-{letter}"));
    std::fs::write(&token_file, format!("{letter}1\n")).unwrap();
    Controller::start(ClientConfig {
        address: lab.controller.address().to_string(),
        trust_bundle: lab.path("ca/bundle.pem"),
        token_file,
        node: "node-1".into(),
        role,
        credentials_dir: None,
    })
}

/// Hands every update of the table to the test.
struct Table(mpsc::UnboundedSender<(Vec<Workload>, Vec<String>)>);

impl Sink for Table {
    fn known(&self, _: &str) -> HashMap<String, String> {
        HashMap::new()
    }

    fn apply(
        &mut self,
        url: &str,
        upserts: Vec<Update>,
        removed: Vec<String>,
    ) -> Result<(), String> {
        if url == Workload::TYPE_URL {
            let decode = |u: Update| Workload::decode(u.value).unwrap();
            let _ = self
                .0
                .send((upserts.into_iter().map(decode).collect(), removed));
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_node_enrols_a_pod_with_the_client_of_the_mesh() {
    let lab = Lab::start(DEMO).await;
    let (proxy, agent) = (
        connect(&lab, NodeRole::Proxy),
        connect(&lab, NodeRole::Agent),
    );
    let all = BTreeSet::from(["*".to_owned()]);
    let subscriptions = Subscriptions::from([
        (Workload::TYPE_URL, all.clone()),
        (MeshConfig::TYPE_URL, all),
    ]);
    let (_subscriptions, receiver) = watch::channel(subscriptions);
    let (sender, mut updates) = mpsc::unbounded_channel();
    let run = tokio::spawn(delta::run(proxy, receiver, Table(sender)));
    let (table, _) = soon("first table", updates.recv()).await.unwrap();
    assert!(table.is_empty());

    let mut calls = EnrolmentClient::new(soon("channel", agent.channel()).await);
    let request = RegisterPodRequest {
        uid: WEB.into(),
        namespace: "demo".into(),
        name: "web".into(),
        addresses: vec![vec![10, 1, 1, 2]],
    };
    let pod = calls
        .register_pod(request)
        .await
        .unwrap()
        .into_inner()
        .pod
        .unwrap();
    assert!(pod.enrolled);
    calls
        .report(report(&[(WEB, PodState::Ready)]))
        .await
        .unwrap();
    for expected in [EnrolmentState::Tunnel, EnrolmentState::Enforced] {
        let (table, _) = soon("update", updates.recv()).await.unwrap();
        assert_eq!(table[0].state(), expected);
    }
    std::fs::remove_file(lab.path("manifests/demo.yaml")).unwrap();
    let (_, removed) = soon("removal", updates.recv()).await.unwrap();
    assert_eq!(removed, [WEB]);
    run.abort();
}
