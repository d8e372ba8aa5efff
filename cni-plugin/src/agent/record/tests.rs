use super::*;

fn record() -> PodRecord {
    PodRecord {
        uid: "0f-1".into(),
        namespace: "demo".into(),
        name: "web".into(),
        container_id: "c1".into(),
        netns: NetnsRecord {
            path: "/run/netns/x".into(),
            id: super::super::netns::Netns::host().unwrap().id(),
        },
        addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        registered: true,
        pod: Some(NodePod {
            uid: "0f-1".into(),
            enrolled: true,
            ..NodePod::default()
        }),
        phase: Phase::Enrolled,
        applied: None,
    }
}

#[test]
fn what_is_kept_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let mark = store.mark().unwrap();
    assert_eq!(mark.0 & 0xcf00, 0);
    store.put(&record()).unwrap();

    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.mark().unwrap(), mark);
    assert_eq!(store.pods().unwrap(), [record()]);
    store.remove("0f-1").unwrap();
    store.remove("0f-1").unwrap();
    assert!(store.pods().unwrap().is_empty());
}

#[test]
fn a_broken_record_does_not_hide_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    store.put(&record()).unwrap();
    fs::write(directory.path().join("pods/other.json"), "{").unwrap();
    assert_eq!(store.pods().unwrap(), [record()]);
}

#[test]
fn uids_that_are_paths_are_no_uids() {
    for uid in ["", "..", "a/b", ".x", "a b"] {
        assert!(!is_uid(uid), "{uid:?}");
    }
    assert!(is_uid("6d6f3a5e-0000-4000-8000-000000000001"));
}
