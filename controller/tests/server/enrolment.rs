//! Enrolment as nodes see it: streams, registrations, reports, and a controller that restarts.

use crate::common::{CLIENT, DEMO, Lab, Stream, WEB, decode, versions};
use mesh_api::proto::control::{PodState, Role};
use mesh_api::proto::discovery::DeltaDiscoveryRequest;
use mesh_api::proto::mesh::{EnrolmentState, NodePod, TunnelKind, Workload};
use tonic::Code;

/// Two proxies that have the (empty) table.
async fn proxies(lab: &Lab) -> (Stream, Stream) {
    let (mut one, mut two) = (lab.proxy("node-1").await, lab.proxy("node-2").await);
    for proxy in [&mut one, &mut two] {
        proxy.subscribe::<Workload>(&["*"]).await;
        let (table, removed) = proxy.take::<Workload>().await;
        assert_eq!((table.len(), removed.len()), (0, 0));
    }
    (one, two)
}

async fn state(proxy: &mut Stream) -> EnrolmentState {
    let (table, _) = proxy.take::<Workload>().await;
    assert_eq!(table.len(), 1, "{table:?}");
    table[0].state()
}

#[tokio::test]
async fn a_pod_is_enforced_once_every_node_knows_it() {
    let lab = Lab::start(DEMO).await;
    let (mut one, mut two) = proxies(&lab).await;
    let mut agent = lab.agent("node-1").await;
    let pod = agent.register(WEB, "web", [10, 1, 1, 2]).await.unwrap();
    assert!(pod.enrolled);
    assert_eq!(pod.addresses, [&[10u8, 1, 1, 2][..]]);
    assert_eq!(
        (pod.service_account.as_str(), pod.owner.as_str()),
        ("web", "web")
    );

    // The answer to the report comes when the change was handed to both, before they accept it.
    agent.report(&[(WEB, PodState::Ready)]).await;
    let first = one.next::<Workload>().await;
    let workload: &Workload = &decode(&first)[0];
    assert_eq!(workload.state(), EnrolmentState::Tunnel);
    assert_eq!(workload.tunnel(), TunnelKind::Warren);
    assert_eq!(
        (workload.uid.as_str(), workload.node.as_str()),
        (WEB, "node-1")
    );
    let node_addresses: Vec<usize> = workload.node_addresses.iter().map(|a| a.len()).collect();
    assert_eq!(node_addresses, [4, 16]);
    assert_eq!(state(&mut two).await, EnrolmentState::Tunnel);
    assert_eq!(lab.phase(WEB), "tunnel", "node-1 has not accepted");
    one.ack::<Workload>(&first).await;

    lab.until_phase(WEB, "enforced").await;
    assert_eq!(state(&mut one).await, EnrolmentState::Enforced);
    assert_eq!(state(&mut two).await, EnrolmentState::Enforced);
}

#[tokio::test]
async fn a_pod_leaves_only_when_every_node_knows_it() {
    let lab = Lab::start(DEMO).await;
    let (mut one, mut two) = proxies(&lab).await;
    let mut agent = lab.agent("node-1").await;
    agent.stream.subscribe::<NodePod>(&["*"]).await;
    agent.stream.take::<NodePod>().await;
    agent.register(WEB, "web", [10, 1, 1, 2]).await.unwrap();
    agent.stream.take::<NodePod>().await;
    agent.report(&[(WEB, PodState::Ready)]).await;
    for expected in [EnrolmentState::Tunnel, EnrolmentState::Enforced] {
        assert_eq!(state(&mut one).await, expected);
        assert_eq!(state(&mut two).await, expected);
    }

    lab.edit(
        "labels: {app: web}}",
        "labels: {app: web, warren-mesh.io/mesh: disabled}}",
    );
    assert_eq!(state(&mut one).await, EnrolmentState::Leaving);
    let last = two.next::<Workload>().await;
    assert_eq!(
        decode::<Workload>(&last)[0].state(),
        EnrolmentState::Leaving
    );
    // Captured as long as one node may not know.
    assert_eq!(lab.phase(WEB), "leaving");
    two.ack::<Workload>(&last).await;

    let response = agent.stream.next::<NodePod>().await;
    assert!(!decode::<NodePod>(&response)[0].enrolled);
    // A report from before the agent took that in means nothing.
    agent.report(&[]).await;
    assert_eq!(lab.phase(WEB), "withdrawn");
    agent.stream.ack::<NodePod>(&response).await;
    // The connections of before still run.
    lab.until("acked", |s| {
        let agent = s["streams"]
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["role"] == "agent");
        agent.is_some_and(|a| a["acked"].as_u64() >= a["handed"].as_u64())
    })
    .await;
    agent.report(&[(WEB, PodState::Leaving)]).await;
    assert_eq!(lab.phase(WEB), "withdrawn");
    agent.report(&[]).await;
    assert_eq!(lab.phase(WEB), "off");
    let (_, removed) = one.take::<Workload>().await;
    assert_eq!(removed, [WEB]);
}

#[tokio::test]
async fn a_failure_counts_until_it_is_over_or_its_pod_is_gone() {
    let lab = Lab::start(DEMO).await;
    let mut agent = lab.agent("node-1").await;
    agent.register(WEB, "web", [10, 1, 1, 2]).await.unwrap();
    let failures = || lab.metric("warren_controller_enrolment_failures");
    for (state, expected) in [
        (PodState::Failed, 1.),
        (PodState::Failed, 1.),
        (PodState::Ready, 0.),
        (PodState::Failed, 1.),
    ] {
        agent.report(&[(WEB, state)]).await;
        assert_eq!(failures(), expected);
    }
    lab.edit(WEB, "00000000-0000-0000-0000-0000000000cc");
    lab.until("another pod", |status| !status.to_string().contains(WEB))
        .await;
    assert_eq!(failures(), 0.);
}

#[tokio::test]
async fn a_restart_of_the_controller_changes_nothing() {
    let lab = Lab::start(DEMO).await;
    let (mut one, mut two) = proxies(&lab).await;
    let (mut agent, mut other) = (lab.agent("node-1").await, lab.agent("node-2").await);
    agent.register(WEB, "web", [10, 1, 1, 2]).await.unwrap();
    agent.report(&[(WEB, PodState::Ready)]).await;
    for proxy in [&mut one, &mut two] {
        assert_eq!(state(proxy).await, EnrolmentState::Tunnel);
    }
    let enforced = one.next::<Workload>().await;
    one.ack::<Workload>(&enforced).await;
    assert_eq!(state(&mut two).await, EnrolmentState::Enforced);
    other
        .register(CLIENT, "client", [10, 1, 2, 2])
        .await
        .unwrap();
    other.report(&[(CLIENT, PodState::Ready)]).await;
    let tunnel = one.next::<Workload>().await;
    assert_eq!(
        decode::<Workload>(&tunnel)[0].state(),
        EnrolmentState::Tunnel
    );
    drop((one, two, agent, other));

    let lab = lab.restart().await;
    assert_eq!(
        (lab.phase(WEB), lab.phase(CLIENT)),
        ("enforced".into(), "tunnel".into())
    );
    let mut known = versions(&enforced);
    known.extend(versions(&tunnel));
    let mut one = lab.proxy("node-1").await;
    one.resume::<Workload>(&["*"], known).await;
    let (table, removed) = one.take::<Workload>().await;
    assert_eq!((table.len(), removed.len()), (0, 0), "everything was known");
    // Node-2 took part before, so it is waited for although it is not back yet.
    assert_eq!(lab.phase(CLIENT), "tunnel");
    let mut two = lab.proxy("node-2").await;
    two.subscribe::<Workload>(&["*"]).await;
    let (table, _) = two.take::<Workload>().await;
    assert_eq!(table.len(), 2);
    lab.until_phase(CLIENT, "enforced").await;
    assert_eq!(lab.phase(WEB), "enforced");
}

#[tokio::test]
async fn only_pods_of_the_own_node_are_registered_and_reported() {
    let lab = Lab::start(DEMO).await;
    let (mut agent, mut other) = (lab.agent("node-1").await, lab.agent("node-2").await);
    let refused = other.register(WEB, "web", [10, 1, 1, 2]).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("no pod demo/web"), "{refused}");

    agent.register(WEB, "web", [10, 1, 1, 2]).await.unwrap();
    let taken = other
        .register(CLIENT, "client", [10, 1, 1, 2])
        .await
        .unwrap_err();
    assert_eq!(taken.code(), Code::FailedPrecondition);
    assert!(
        taken
            .message()
            .contains("belongs to pod demo/web on node node-1"),
        "{taken}"
    );

    other.report(&[(WEB, PodState::Ready)]).await;
    assert_eq!(lab.phase(WEB), "wanted");
}

#[tokio::test]
async fn a_pod_may_be_registered_before_its_manifest_is_seen() {
    let lab = Lab::start(DEMO).await;
    let mut agent = lab.agent("node-1").await;
    let late = "00000000-0000-0000-0000-0000000000cc";
    let registered = agent.register(late, "late", [10, 1, 1, 3]);
    let written = async {
        lab.write(
            "manifests/late.yaml",
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: late, namespace: demo, uid: {late}}}\n\
                 spec: {{nodeName: node-1, containers: [{{name: late}}]}}\n"
            ),
        );
    };
    let (pod, ()) = tokio::join!(registered, written);
    assert!(pod.unwrap().enrolled);
}

#[tokio::test]
async fn a_pod_that_speaks_hbone_is_published_from_its_manifest() {
    let lab = Lab::start(DEMO).await;
    let (mut one, _two) = proxies(&lab).await;
    lab.write(
        "manifests/hbone.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: peer, namespace: demo, annotations: {warren-mesh.io/tunnel: hbone}}\n\
         spec: {nodeName: node-2, serviceAccountName: peer, containers: [{name: peer}]}\n\
         status: {podIPs: [{ip: 10.1.2.9}]}\n",
    );
    let (table, _) = one.take::<Workload>().await;
    assert_eq!(table[0].name, "peer");
    assert_eq!(table[0].state(), EnrolmentState::Tunnel);
    assert_eq!(table[0].tunnel(), TunnelKind::Hbone);
    assert_eq!(table[0].addresses, [&[10u8, 1, 2, 9][..]]);
}

#[tokio::test]
async fn a_report_is_answered_only_when_every_node_was_handed_the_change() {
    let lab = Lab::start(DEMO).await;
    let (mut one, _two) = proxies(&lab).await;
    let mut agent = lab.agent("node-1").await;
    agent.register(WEB, "web", [10, 1, 1, 2]).await.unwrap();
    // Node-1 has a response of the table in its hands and has not answered, so it is sent no other.
    one.request::<Workload>(DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["nobody".into()],
        ..Default::default()
    })
    .await;
    let held = one.next::<Workload>().await;
    let reported = tokio::spawn(async move {
        agent.report(&[(WEB, PodState::Ready)]).await;
        agent
    });
    lab.until_phase(WEB, "tunnel").await;
    // Time enough for an answer that does not wait.
    lab.node("node-2", Role::Agent).await;
    assert!(!reported.is_finished());
    one.ack::<Workload>(&held).await;
    let _agent = crate::common::soon("the answer", reported).await.unwrap();
    assert_eq!(state(&mut one).await, EnrolmentState::Tunnel);
}
