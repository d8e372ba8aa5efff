use super::*;
use crate::resources::Resource as Encoded;

// The session over the real server is tested in tests/discovery.rs; here what is hard to bring about there.

fn snapshot(seq: u64, workloads: impl IntoIterator<Item = (String, usize)>) -> Arc<Snapshot> {
    let resource = |(name, size): (String, usize)| {
        let encoded = Encoded {
            version: format!("v{size}").into(),
            body: vec![0; size].into(),
        };
        (Arc::from(name), Arc::new(encoded))
    };
    Arc::new(Snapshot {
        seq,
        workloads: Arc::new(workloads.into_iter().map(resource).collect()),
        ..Default::default()
    })
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: Kind::Workload.type_url().into(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn answer(nonce: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: Kind::Workload.type_url().into(),
        response_nonce: nonce.into(),
        ..Default::default()
    }
}

fn one(session: &mut Session, snapshot: &Arc<Snapshot>) -> DeltaDiscoveryResponse {
    let mut responses = session.responses(snapshot);
    assert_eq!(responses.len(), 1);
    responses.remove(0).1
}

#[test]
fn a_large_table_comes_in_parts_and_counts_only_as_a_whole() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let table = snapshot(7, (0..5).map(|i| (format!("w{i}"), MAX_BYTES / 2 - 100)));
    let mut names = BTreeSet::new();
    for part in 0..3 {
        let response = one(&mut session, &table);
        let more = response
            .system_version_info
            .ends_with(mesh_api::client::delta::MORE);
        assert_eq!(more, part < 2);
        names.extend(response.resources.iter().map(|r| r.name.clone()));
        assert_eq!(session.progress().acked, 0, "part {part}");
        assert_eq!(
            session.progress().handed,
            Some(if part < 2 { 0 } else { 7 })
        );
        // Nothing more before the answer.
        assert!(session.responses(&table).is_empty());
        session.request(answer(&response.nonce)).unwrap();
    }
    assert_eq!(names.len(), 5);
    assert_eq!(session.progress().acked, 7);
    assert!(session.responses(&table).is_empty());
}

/// `snapshot` as the one that follows another, with the record of what changed.
fn then(
    before: &Snapshot,
    workloads: impl IntoIterator<Item = (String, usize)>,
    changed: &[&str],
) -> Arc<Snapshot> {
    let next = snapshot(before.seq + 1, workloads);
    let workload_changes = before.workload_changes.with(next.seq, changed);
    Arc::new(Snapshot {
        workload_changes,
        ..(*next).clone()
    })
}

#[test]
fn after_the_first_table_only_what_is_on_record_is_looked_at() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let first = snapshot(1, [("a".into(), 1), ("b".into(), 1), ("c".into(), 1)]);
    let response = one(&mut session, &first);
    session.request(answer(&response.nonce)).unwrap();
    // `c` changed as well, but nothing says so.
    let second = then(
        &first,
        [("a".into(), 2), ("c".into(), 2), ("d".into(), 1)],
        &["a", "b", "d"],
    );
    let response = one(&mut session, &second);
    let names: Vec<&str> = response.resources.iter().map(|r| &*r.name).collect();
    assert_eq!(names, ["a", "d"]);
    assert_eq!(response.removed_resources, ["b"]);
    session.request(answer(&response.nonce)).unwrap();
    assert_eq!(session.progress().acked, 2);
    // Two at once; `e` came and went between them.
    let third = then(
        &second,
        [("a".into(), 3), ("c".into(), 2)],
        &["a", "d", "e"],
    );
    let fourth = then(&third, [("a".into(), 4), ("c".into(), 2)], &["a", "e"]);
    let response = one(&mut session, &fourth);
    assert_eq!(response.resources.len(), 1);
    assert_eq!(response.resources[0].version, "v4");
    assert_eq!(response.removed_resources, ["d"]);
}

#[test]
fn a_first_table_is_finished_as_it_was_begun() {
    let half = MAX_BYTES / 2 - 100;
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let first = snapshot(1, (0..5).map(|i| (format!("w{i}"), half)));
    let response = one(&mut session, &first);
    assert_eq!(response.resources.len(), 2);
    session.request(answer(&response.nonce)).unwrap();
    // Meanwhile the first one, which was sent, and the last one, which was not, change.
    let sizes = [half - 1, half, half, half, half - 1];
    let sizes = sizes.into_iter().enumerate();
    let second = then(
        &first,
        sizes.map(|(i, s)| (format!("w{i}"), s)),
        &["w0", "w4"],
    );
    let mut versions = BTreeMap::new();
    for seq in [0, 1] {
        let response = one(&mut session, &second);
        versions.extend(response.resources.into_iter().map(|r| (r.name, r.version)));
        assert_eq!(session.progress().acked, 0);
        session.request(answer(&response.nonce)).unwrap();
        assert_eq!(session.progress().acked, seq);
    }
    assert_eq!(versions["w4"], format!("v{half}"), "as it was");
    let response = one(&mut session, &second);
    let names: Vec<&str> = response.resources.iter().map(|r| &*r.name).collect();
    assert_eq!(names, ["w0", "w4"]);
    session.request(answer(&response.nonce)).unwrap();
    assert_eq!(session.progress().acked, 2);
    assert!(session.responses(&second).is_empty());
}

#[test]
fn a_first_table_that_is_broken_off_goes_on_with_what_is_asked_for_then() {
    let half = MAX_BYTES / 2 - 100;
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let table = snapshot(1, (0..3).map(|i| (format!("w{i}"), half)));
    let response = one(&mut session, &table);
    assert_eq!(response.resources.len(), 2);
    session.request(answer(&response.nonce)).unwrap();
    session.request(subscribe(&["w1"])).unwrap();
    let response = one(&mut session, &table);
    let names: BTreeSet<&str> = response.resources.iter().map(|r| &*r.name).collect();
    assert_eq!(
        names,
        ["w1", "w2"].into(),
        "the rest, and what was asked for"
    );
}

#[test]
fn what_is_large_waits_while_it_is_held_back() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let table = snapshot(1, [("a".into(), 1)]);
    session.hold_back(true);
    assert!(session.responses(&table).is_empty());
    assert!(session.has_first_tables_to_send());
    session.hold_back(false);
    let response = one(&mut session, &table);
    assert!(
        session.has_first_tables_to_send(),
        "until it is acknowledged"
    );
    session.request(answer(&response.nonce)).unwrap();
    assert!(!session.has_first_tables_to_send());
}

#[test]
fn a_resource_larger_than_a_part_travels_alone() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let table = snapshot(1, [("a".into(), MAX_BYTES * 2), ("b".into(), 1)]);
    let first = one(&mut session, &table);
    assert_eq!(first.resources.len(), 1);
    session.request(answer(&first.nonce)).unwrap();
    assert_eq!(one(&mut session, &table).resources[0].name, "b");
}

#[test]
fn an_answer_of_another_stream_is_nobodys() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let response = one(&mut session, &snapshot(1, []));
    assert_eq!(session.request(answer("99")).unwrap(), None);
    assert_eq!(session.progress().acked, 0);
    let ack = session.request(answer(&response.nonce)).unwrap();
    assert_eq!(ack, Some(Answer::Ack(Kind::Workload)));
    assert_eq!(
        session.request(answer(&response.nonce)).unwrap(),
        None,
        "once"
    );
}

#[test]
fn a_rejected_name_is_unknown_until_a_later_version_is_accepted() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["*"])).unwrap();
    let response = one(&mut session, &snapshot(1, [("a".into(), 1)]));
    let mut nack = answer(&response.nonce);
    nack.error_detail = Some(mesh_api::proto::discovery::Status {
        code: 3,
        message: "no".into(),
    });
    session.request(nack).unwrap();
    let rejected: Vec<Arc<str>> = session.progress().rejected.into_iter().collect();
    assert_eq!(rejected, ["a".into()]);
    // Something else changes and is accepted.
    let response = one(
        &mut session,
        &snapshot(2, [("a".into(), 1), ("b".into(), 1)]),
    );
    assert_eq!(response.resources.len(), 1);
    session.request(answer(&response.nonce)).unwrap();
    assert_eq!(session.progress().rejected.len(), 1);
    let response = one(
        &mut session,
        &snapshot(3, [("a".into(), 2), ("b".into(), 1)]),
    );
    session.request(answer(&response.nonce)).unwrap();
    assert!(session.progress().rejected.is_empty());
}

#[test]
fn a_name_that_is_not_there_is_answered_and_followed() {
    let mut session = Session::new("n", NodeRole::Proxy);
    session.request(subscribe(&["a"])).unwrap();
    let response = one(&mut session, &snapshot(1, [("b".into(), 1)]));
    assert_eq!(
        (response.resources.len(), &*response.removed_resources),
        (0, &["a".to_owned()][..])
    );
    session.request(answer(&response.nonce)).unwrap();
    let response = one(
        &mut session,
        &snapshot(2, [("a".into(), 1), ("b".into(), 1)]),
    );
    assert_eq!(response.resources[0].name, "a");
    assert_eq!(response.resources[0].aliases, Vec::<String>::new());
}

#[test]
fn the_number_of_names_is_bounded() {
    let mut session = Session::new("n", NodeRole::Proxy);
    let names: Vec<String> = (0..=MAX_NAMES).map(|i| i.to_string()).collect();
    let request = DeltaDiscoveryRequest {
        resource_names_subscribe: names,
        ..subscribe(&[])
    };
    assert_eq!(session.request(request), Err(Violation::TooManyNames));
}
