use mesh_api::identity::NodeRole;
use mesh_api::proto::control::{NodeReport, PodReport, PodState};
use serde_json::json;

use super::super::{Peer, Progress, StreamId};
use super::*;
use crate::model::{self, Settings};
use crate::providers::Objects;

/// Pods by UID: node, address in its status (or none), annotation.
fn model(pods: &[(&str, &str, &str, &str)]) -> Model {
    let mut objects = Objects::default();
    for (uid, node, address, annotation) in pods {
        let mut pod = json!({
            "metadata": {
                "name": uid, "namespace": "demo", "uid": uid,
                "labels": { "warren-mesh.io/mesh": "enabled" }, "annotations": {},
            },
            "spec": { "nodeName": node, "containers": [{ "name": "c" }] },
        });
        if !address.is_empty() {
            pod["status"] = json!({ "podIP": address });
        }
        if !annotation.is_empty() {
            pod["metadata"]["annotations"]["warren-mesh.io/enrolled"] = json!(annotation);
        }
        let pod = serde_json::from_value(pod).unwrap();
        let name = ("demo".to_owned(), (*uid).to_owned());
        objects.pods.insert(name, Arc::new(pod));
    }
    let settings = Settings {
        trust_domain: "cluster.local".into(),
        mode: mesh_api::proto::mesh::Mode::Permissive,
    };
    model::build(&objects, &settings)
}

/// One replica with the agent and the proxy of node-1, and what comes back from the API server.
struct Replica {
    enrolment: Enrolment,
    recording: Recording,
    fleet: Fleet,
    peers: Peers,
    seq: u64,
    now: Instant,
    proxy: StreamId,
}

impl Replica {
    fn new() -> Self {
        let (mut fleet, now) = (Fleet::default(), Instant::now());
        fleet.open("node-1", NodeRole::Agent, now);
        let proxy = fleet.open("node-1", NodeRole::Proxy, now);
        Self {
            enrolment: Enrolment::default(),
            recording: Recording::default(),
            fleet,
            peers: Peers::default(),
            seq: 0,
            now,
            proxy,
        }
    }

    /// The pods were read up to `version`; what is to be written now.
    fn read(&mut self, model: &Model, version: u64) -> Vec<Recorded> {
        self.seq += 1;
        let at = (self.seq, version);
        self.enrolment.mirror(model, &mut self.recording, at);
        self.step(model)
    }

    fn step(&mut self, model: &Model) -> Vec<Recorded> {
        let others = (&self.fleet, &self.peers);
        while self
            .enrolment
            .propose(model, &mut self.recording, others, self.seq, self.now)
        {}
        let writes = self.recording.unsent(self.now);
        writes.into_iter().map(|w| w.recorded).collect()
    }

    fn ready(&mut self, uid: &str) {
        let pod = PodReport {
            uid: uid.into(),
            state: PodState::Ready.into(),
            reason: String::new(),
        };
        let report = NodeReport {
            pods: vec![pod],
            ready: true,
            ..NodeReport::default()
        };
        self.enrolment.report("node-1", &report, &self.fleet);
    }

    fn acked(&mut self) {
        let progress = Progress {
            acked: self.seq,
            ..Progress::default()
        };
        self.fleet.progress(self.proxy, progress, self.now);
    }

    fn phase(&self, uid: &str) -> Phase {
        self.enrolment.record(uid).unwrap().phase
    }
}

fn recorded(phase: Phase) -> Recorded {
    Recorded {
        addresses: Vec::new(),
        phase: Some(phase),
    }
}

#[test]
fn a_move_is_done_when_it_comes_back_and_not_before() {
    let mut replica = Replica::new();
    let plain = model(&[("u", "node-1", "10.0.0.1", "")]);
    assert_eq!(
        replica.read(&plain, 1),
        [],
        "nobody else need know that it is wanted"
    );
    assert_eq!(replica.phase("u"), Phase::Wanted);
    replica.ready("u");
    assert_eq!(replica.step(&plain), [recorded(Phase::Tunnel)]);
    assert_eq!(replica.phase("u"), Phase::Wanted);
    assert_eq!(replica.step(&plain), [], "it is written once");
    replica.now += RESEND;
    assert_eq!(
        replica.step(&plain).len(),
        1,
        "and again if it does not come back"
    );

    let tunnel = model(&[("u", "node-1", "10.0.0.1", "{\"phase\":\"tunnel\"}")]);
    assert_eq!(replica.read(&tunnel, 2), []);
    assert_eq!(replica.phase("u"), Phase::Tunnel);
    replica.acked();
    assert_eq!(replica.step(&tunnel), [recorded(Phase::Enforced)]);
}

#[test]
fn the_nodes_of_other_replicas_must_know_as_well() {
    let mut replica = Replica::new();
    let tunnel = model(&[("u", "node-1", "10.0.0.1", "{\"phase\":\"tunnel\"}")]);
    let mut said = Peer {
        acknowledged: 6,
        renewal: "1".into(),
        ..Peer::default()
    };
    replica.peers.heard("b", said.clone(), replica.now);
    replica.read(&tunnel, 7);
    replica.acked();
    assert_eq!(
        replica.step(&tunnel),
        [],
        "b's nodes have not seen version 7"
    );
    said.acknowledged = 7;
    replica.peers.heard("b", said.clone(), replica.now);
    assert_eq!(replica.step(&tunnel), [recorded(Phase::Enforced)]);

    // One that is silent does not count; said again is no sign of life.
    let mut replica = Replica::new();
    said.acknowledged = 6;
    replica.peers.heard("b", said.clone(), replica.now);
    replica.read(&tunnel, 7);
    replica.acked();
    replica.now += super::super::LEASE;
    replica.peers.heard("b", said, replica.now);
    assert_eq!(replica.step(&tunnel), [recorded(Phase::Enforced)]);
}

#[test]
fn a_replica_decides_only_where_the_agent_is_its_own() {
    let mut replica = Replica::new();
    let elsewhere = model(&[("u", "node-2", "10.0.0.1", "{\"phase\":\"tunnel\"}")]);
    replica.read(&elsewhere, 1);
    replica.acked();
    assert_eq!(replica.step(&elsewhere), []);
    assert_eq!(
        replica.phase("u"),
        Phase::Tunnel,
        "but it publishes what is recorded"
    );
}

#[test]
fn an_address_that_the_status_contradicts_does_not_count() {
    let mut replica = Replica::new();
    let claims = "{\"addresses\":[\"10.0.0.1\"]}";
    let addresses =
        |replica: &Replica, uid: &str| replica.enrolment.record(uid).unwrap().addresses.clone();
    let one: IpAddr = "10.0.0.1".parse().unwrap();
    // Before the kubelet has written the status, the record is all there is.
    replica.read(&model(&[("u", "node-1", "", claims)]), 1);
    assert_eq!(addresses(&replica, "u"), [one]);
    // A pod that claims the address of another.
    replica.read(
        &model(&[("u", "node-1", "", claims), ("v", "node-2", "10.0.0.1", "")]),
        2,
    );
    assert!(addresses(&replica, "u").is_empty());
    // A pod that claims another address than its own.
    replica.read(&model(&[("u", "node-1", "10.0.0.2", claims)]), 3);
    assert!(addresses(&replica, "u").is_empty());
}

#[test]
fn addresses_are_recorded_and_taken_from_the_pod_before() {
    let mut replica = Replica::new();
    let before = "{\"addresses\":[\"10.0.0.1\"],\"phase\":\"tunnel\"}";
    let pods = model(&[("old", "node-1", "", before), ("new", "node-1", "", "")]);
    replica.read(&pods, 1);
    let address: IpAddr = "10.0.0.1".parse().unwrap();
    let propose = |replica: &mut Replica, node: &str| {
        let Replica {
            enrolment,
            recording,
            ..
        } = replica;
        enrolment.propose_addresses(&pods, recording, node, "new", ("demo", "new"), &[address])
    };
    let refused = propose(&mut replica, "node-2").unwrap_err();
    assert!(
        matches!(refused, RegisterError::NotFound { .. }),
        "{refused}"
    );
    propose(&mut replica, "node-1").unwrap();
    let writes = replica.recording.unsent(replica.now);
    let wanted = |uid: &str| {
        let write = writes.iter().find(|w| *w.uid == *uid).unwrap();
        write.recorded.clone()
    };
    assert_eq!(wanted("new").addresses, [address]);
    assert_eq!(wanted("old"), recorded(Phase::Tunnel));
}
