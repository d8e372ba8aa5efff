use std::time::Duration;

use mesh_api::identity::NodeRole;
use mesh_api::proto::control::PodReport;

use super::*;
use crate::model::{self, Settings};
use crate::providers::Objects;

/// A pod `u` on node-1, meshed or not.
fn model(meshed: bool) -> Model {
    let label = if meshed { "enabled" } else { "disabled" };
    let pod: k8s_openapi::api::core::v1::Pod = serde_norway::from_str(&format!(
        "metadata: {{name: web, namespace: demo, uid: u, labels: {{warren-mesh.io/mesh: {label}}}}}\n\
         spec: {{nodeName: node-1, containers: [{{name: c}}]}}"
    ))
    .unwrap();
    let objects = Objects {
        pods: [(("demo".to_owned(), "web".to_owned()), pod.into())].into(),
        ..Default::default()
    };
    let settings = Settings {
        trust_domain: "cluster.local".into(),
        mode: mesh_api::proto::mesh::Mode::Permissive,
    };
    model::build(&objects, &settings)
}

struct World {
    enrolment: Enrolment,
    fleet: Fleet,
    model: Model,
    seq: u64,
    now: Instant,
    /// What the last report brought.
    news: bool,
}

impl World {
    fn new() -> Self {
        Self {
            enrolment: Enrolment::default(),
            fleet: Fleet::default(),
            model: model(true),
            seq: 0,
            now: Instant::now(),
            news: false,
        }
    }

    /// Steps until nothing moves, as the hub does; the phase of the pod.
    fn settle(&mut self) -> Phase {
        while self
            .enrolment
            .step(&self.model, &self.fleet, self.seq + 1, self.now)
        {
            self.seq += 1;
        }
        self.enrolment.record("u").map_or(Phase::Off, |r| r.phase)
    }

    fn open(&mut self, node: &str, role: NodeRole) -> StreamId {
        self.fleet.open(node, role, self.now)
    }

    /// The stream has everything there is.
    fn ack(&mut self, id: StreamId) {
        let progress = Progress {
            handed: Some(self.seq),
            acked: self.seq,
            ..Progress::default()
        };
        self.fleet.progress(id, progress, self.now);
    }

    fn report(&mut self, state: Option<PodState>) {
        let pod = |state: PodState| PodReport {
            uid: "u".into(),
            state: state.into(),
            reason: "why".into(),
        };
        let report = NodeReport {
            pods: state.map(pod).into_iter().collect(),
            ..Default::default()
        };
        let (news, strangers) = self.enrolment.report("node-1", &report, &self.fleet);
        assert!(strangers.is_empty());
        self.news = news;
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.fleet.expire(self.now);
    }

    fn enforced() -> (Self, StreamId, StreamId) {
        let mut world = World::new();
        let (agent, proxy) = (
            world.open("node-1", NodeRole::Agent),
            world.open("node-1", NodeRole::Proxy),
        );
        assert_eq!(world.settle(), Phase::Wanted);
        world.report(Some(PodState::Ready));
        assert_eq!(world.settle(), Phase::Tunnel);
        world.ack(proxy);
        assert_eq!(world.settle(), Phase::Enforced);
        world.ack(proxy);
        (world, agent, proxy)
    }
}

#[test]
fn a_report_is_news_when_a_pod_may_move_or_has_failed() {
    let mut world = World::new();
    world.settle();
    let is_news = |world: &mut World, state| {
        world.report(state);
        world.news
    };
    assert!(is_news(&mut world, Some(PodState::Failed)));
    assert!(
        !is_news(&mut world, Some(PodState::Failed)),
        "the same again"
    );
    assert!(is_news(&mut world, Some(PodState::Ready)));
    assert_eq!(world.settle(), Phase::Enforced);
    assert!(
        !is_news(&mut world, Some(PodState::Ready)),
        "it is where it is to be"
    );
    assert!(!is_news(&mut world, None), "absence moves nothing");
}

#[test]
fn only_the_last_to_get_further_is_told_of() {
    let mut fleet = Fleet::default();
    let now = Instant::now();
    let ids = ["a", "b"].map(|node| fleet.open(node, NodeRole::Proxy, now));
    let at = |seq| Progress {
        handed: Some(seq),
        acked: seq,
        mesh_acked: Some(seq),
        ..Progress::default()
    };
    for id in ids {
        fleet.progress(id, at(1), now);
    }
    assert!(!fleet.progress(ids[0], at(2), now));
    assert!(!fleet.all_handed(2));
    assert!(fleet.progress(ids[1], at(2), now));
    assert!(fleet.all_handed(2));
    assert!(!fleet.progress(ids[1], at(2), now), "no further");
    let rejecting = Progress {
        rejected: ["u".into()].into(),
        ..at(2)
    };
    assert!(fleet.progress(ids[0], rejecting, now));
    assert!(!fleet.known(now).unwrap().hold("u", 2));
    fleet.progress(ids[1], at(3), now);
    fleet.close(ids[0], now);
    assert!(fleet.all_handed(3), "one that is gone holds up nobody");
}

#[test]
fn a_failure_is_kept_and_moves_nothing() {
    let mut world = World::new();
    world.settle();
    world.report(Some(PodState::Failed));
    assert_eq!(world.settle(), Phase::Wanted);
    assert_eq!(
        world.enrolment.record("u").unwrap().failure.as_deref(),
        Some("why")
    );
    world.report(Some(PodState::Ready));
    // No proxy at all: nobody to wait for.
    assert_eq!(world.settle(), Phase::Enforced);
    assert_eq!(world.enrolment.record("u").unwrap().failure, None);
}

#[test]
fn a_node_that_vanished_is_waited_for_as_long_as_its_lease() {
    let mut world = World::new();
    let gone = world.open("node-2", NodeRole::Proxy);
    world.settle();
    world.ack(gone);
    world.fleet.close(gone, world.now);
    world.report(Some(PodState::Ready));
    assert_eq!(world.settle(), Phase::Tunnel);
    world.pass(LEASE - Duration::from_millis(1));
    assert_eq!(world.settle(), Phase::Tunnel);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.settle(), Phase::Enforced);
}

#[test]
fn a_node_that_comes_back_must_know_before_it_counts_as_knowing() {
    let mut world = World::new();
    world.fleet.expect(["node-2".to_owned()], world.now);
    world.settle();
    world.report(Some(PodState::Ready));
    assert_eq!(world.settle(), Phase::Tunnel);
    let back = world.open("node-2", NodeRole::Proxy);
    assert_eq!(
        world.settle(),
        Phase::Tunnel,
        "connected is not acknowledged"
    );
    world.ack(back);
    assert_eq!(world.settle(), Phase::Enforced);
}

#[test]
fn a_proxy_that_does_not_answer_holds_nobody_up_for_longer_than_a_lease() {
    let mut world = World::new();
    let stuck = world.open("node-2", NodeRole::Proxy);
    world.settle();
    world.ack(stuck);
    world.report(Some(PodState::Ready));
    assert_eq!(world.settle(), Phase::Tunnel);
    let owes = Progress {
        acked: 1,
        waiting: true,
        ..Progress::default()
    };
    world.fleet.progress(stuck, owes.clone(), world.now);
    world.pass(LEASE / 2);
    // Told again that it owes: the time runs from the first.
    world.fleet.progress(stuck, owes, world.now);
    assert_eq!(world.settle(), Phase::Tunnel);
    world.pass(LEASE / 2);
    assert_eq!(world.settle(), Phase::Enforced);
}

#[test]
fn what_a_proxy_rejected_it_does_not_know() {
    let mut world = World::new();
    let proxy = world.open("node-1", NodeRole::Proxy);
    world.settle();
    world.report(Some(PodState::Ready));
    world.settle();
    let rejected = Progress {
        acked: world.seq,
        rejected: ["u".into()].into(),
        ..Progress::default()
    };
    world.fleet.progress(proxy, rejected, world.now);
    assert_eq!(world.settle(), Phase::Tunnel);
    world.pass(LEASE * 2);
    assert_eq!(world.settle(), Phase::Tunnel);
    world.ack(proxy);
    assert_eq!(world.settle(), Phase::Enforced);
}

#[test]
fn absence_from_a_report_takes_nobody_out() {
    let (mut world, _, _) = World::enforced();
    world.report(None);
    assert_eq!(world.settle(), Phase::Enforced);
}

#[test]
fn a_pod_wanted_again_while_leaving_turns_back() {
    let (mut world, agent, proxy) = World::enforced();
    world.model = model(false);
    assert_eq!(world.settle(), Phase::Leaving);
    world.model = model(true);
    assert_eq!(
        world.settle(),
        Phase::Tunnel,
        "its agent was told nothing yet"
    );
    world.ack(proxy);
    assert_eq!(world.settle(), Phase::Enforced);

    world.ack(proxy);
    world.model = model(false);
    world.settle();
    world.ack(proxy);
    assert_eq!(world.settle(), Phase::Withdrawn);
    world.model = model(true);
    assert_eq!(world.settle(), Phase::Rejoining);
    let record = world.enrolment.record("u").unwrap();
    assert_eq!(
        (record.enrolled(), record.published()),
        (true, Some(EnrolmentState::Leaving))
    );
    // READY as it was before the agent heard of any of it.
    world.report(Some(PodState::Ready));
    assert_eq!(world.settle(), Phase::Rejoining);
    world.ack(agent);
    assert_eq!(world.settle(), Phase::Rejoining);
    world.report(Some(PodState::Ready));
    assert_eq!(world.settle(), Phase::Tunnel);
}

#[test]
fn a_pod_that_is_gone_leaves_at_once() {
    let (mut world, _, _) = World::enforced();
    world.model.pods.clear();
    world.settle();
    assert!(world.enrolment.record("u").is_none());
}

#[test]
fn a_reused_address_belongs_to_the_pod_that_registered_it_last() {
    let mut world = World::new();
    let mut second = (*world.model.pods["u"]).clone();
    second.uid = "v".into();
    second.name = "next".into();
    world.model.pods.insert("v".into(), second.into());
    world.settle();
    let address: IpAddr = [10, 1, 1, 2].into();
    let mut register = |uid: &str, name: &str| {
        let name = ("demo", name);
        world
            .enrolment
            .register(&world.model, "node-1", uid, name, vec![address])
    };
    register("u", "web").unwrap();
    register("v", "next").unwrap();
    assert!(register("v", "web").is_err(), "the name must fit the UID");
    assert!(world.enrolment.record("u").unwrap().addresses.is_empty());
    assert_eq!(world.enrolment.record("v").unwrap().addresses, [address]);
}

#[test]
fn the_store_survives_and_a_damaged_one_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, stored) = Store::open(dir.path()).unwrap();
    assert_eq!(stored, Stored::default());
    let (world, _, _) = World::enforced();
    let stored = Stored {
        nodes: world.fleet.nodes(),
        pods: world.enrolment.to_store(),
    };
    store.write(stored.clone()).unwrap();
    let (_, again) = Store::open(dir.path()).unwrap();
    assert_eq!(again, stored);
    let restored = Enrolment::restore(&again);
    assert_eq!(restored.record("u").unwrap().phase, Phase::Enforced);

    let path = dir.path().join("enrolled.json");
    std::fs::write(&path, "{").unwrap();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("remove it to enrol all pods anew"),
        "{error}"
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{");
}
