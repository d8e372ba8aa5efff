//! Enrolment where every replica sees it: at the pods.

use mesh_api::proto::control::PodState;
use mesh_api::proto::mesh::{EnrolmentState, NodePod, Workload};
use serde_json::json;
use tonic::Code;

use crate::common::{Agent, Stream};
use crate::servers;
use crate::world::{PODS, recorded_in};

/// Accepts tables until the pod is in the state that is wanted.
async fn until_state(proxy: &mut Stream, wanted: EnrolmentState) {
    loop {
        let (table, _) = proxy.take::<Workload>().await;
        if table.first().is_some_and(|w| w.state() == wanted) {
            return;
        }
    }
}

async fn subscribed(mut proxy: Stream) -> Stream {
    proxy.subscribe::<Workload>(&["*"]).await;
    proxy.take::<Workload>().await;
    proxy
}

async fn following(mut agent: Agent) -> Agent {
    agent.stream.subscribe::<NodePod>(&["*"]).await;
    agent.stream.take::<NodePod>().await;
    agent
}

#[tokio::test]
async fn a_pod_is_enrolled_on_record_and_stays_so_through_a_restart() {
    let server = servers!();
    server.populate().await;
    let lab = server.controller("a").await;
    let mut proxy = subscribed(server.proxy(&lab, 1).await).await;
    let mut agent = following(server.agent(&lab, 1).await).await;
    // CNI ADD comes before the kubelet says anything of the pod.
    let uid = server.pod("demo", "web", "node-1", "web").await;
    let pod = agent.register(&uid, "web", [10, 1, 1, 2]).await.unwrap();
    assert!(pod.enrolled);
    assert_eq!(pod.addresses, [&[10u8, 1, 1, 2][..]]);
    assert_eq!(
        server.recorded("web").await,
        json!({ "addresses": ["10.1.1.2"] })
    );
    server.running("web", "10.1.1.2").await;

    agent.report(&[(&uid, PodState::Ready)]).await;
    until_state(&mut proxy, EnrolmentState::Enforced).await;
    let enforced = json!({ "addresses": ["10.1.1.2"], "phase": "enforced" });
    assert_eq!(server.recorded("web").await, enforced);

    // Another process takes up where this one stopped: no node hears anything else.
    lab.controller.stop().await;
    let lab = server.controller("a").await;
    let mut proxy = server.proxy(&lab, 1).await;
    proxy.subscribe::<Workload>(&["*"]).await;
    let (table, _) = proxy.take::<Workload>().await;
    assert_eq!(table[0].state(), EnrolmentState::Enforced);
    assert_eq!(table[0].addresses, [&[10u8, 1, 1, 2][..]]);

    // Out again, while it runs.
    let mut agent = following(server.agent(&lab, 1).await).await;
    agent.report(&[(&uid, PodState::Ready)]).await;
    let label = json!({ "metadata": { "labels": { "warren-mesh.io/mesh": "disabled" } } });
    server.patch(&format!("{PODS}/web"), label).await;
    until_state(&mut proxy, EnrolmentState::Leaving).await;
    lab.until_phase(&uid, "withdrawn").await;
    let (pods, _) = agent.stream.take::<NodePod>().await;
    assert!(!pods[0].enrolled);
    agent.report(&[]).await;
    let gone = |pod: &serde_json::Value| recorded_in(pod) == json!({ "addresses": ["10.1.1.2"] });
    server.until(&format!("{PODS}/web"), gone).await;
    lab.controller.stop().await;
}

#[tokio::test]
async fn a_pod_is_enforced_once_the_nodes_of_every_replica_know() {
    let server = servers!();
    server.populate().await;
    let (one, two) = tokio::join!(server.controller("a"), server.controller("b"));
    let mut near = subscribed(server.proxy(&one, 1).await).await;
    let mut agent = following(server.agent(&one, 1).await).await;
    let mut far = subscribed(server.proxy(&two, 2).await).await;
    let uid = server.pod("demo", "web", "node-1", "web").await;
    agent.register(&uid, "web", [10, 1, 1, 2]).await.unwrap();
    agent.report(&[(&uid, PodState::Ready)]).await;

    until_state(&mut near, EnrolmentState::Tunnel).await;
    // The other replica publishes it too; its node has not accepted yet.
    let response = far.next::<Workload>().await;
    one.until_phase(&uid, "tunnel").await;
    two.until_phase(&uid, "tunnel").await;
    // Every renewal of the other's Lease is a chance to go wrong.
    let lease = "/apis/coordination.k8s.io/v1/namespaces/warren-system/leases/warren-controller-b";
    for _ in 0..2 {
        let before = server.get(lease).await.unwrap()["spec"]["renewTime"].clone();
        server
            .until(lease, |l| l["spec"]["renewTime"] != before)
            .await;
    }
    assert_eq!(one.phase(&uid), "tunnel", "node-2 does not know yet");
    far.ack::<Workload>(&response).await;
    until_state(&mut far, EnrolmentState::Enforced).await;
    until_state(&mut near, EnrolmentState::Enforced).await;
    one.controller.stop().await;
    two.controller.stop().await;
}

#[tokio::test]
async fn nobody_is_told_of_addresses_that_are_not_on_record() {
    let mut server = servers!();
    server.populate().await;
    let lab = server.controller("a").await;
    let mut agent = following(server.agent(&lab, 1).await).await;
    let uid = server.pod("demo", "web", "node-1", "web").await;
    lab.until_phase(&uid, "wanted").await;
    server.kill();
    let refused = agent
        .register(&uid, "web", [10, 1, 1, 2])
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    // A watch may rest for as long as one attempt waits; an agent asks again.
    server.restart().await;
    let mut attempts = 1;
    while let Err(refused) = agent.register(&uid, "web", [10, 1, 1, 2]).await {
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        assert!(attempts < 3, "{refused}");
        attempts += 1;
    }
    assert_eq!(
        server.recorded("web").await,
        json!({ "addresses": ["10.1.1.2"] })
    );
    lab.controller.stop().await;
}
