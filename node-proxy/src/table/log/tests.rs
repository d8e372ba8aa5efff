use super::*;

fn resource(name: &str, version: &str) -> Resource {
    Resource {
        name: name.into(),
        version: version.into(),
        ..Default::default()
    }
}

fn change(kind: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.into(),
        resources,
        removed_resources: removed.iter().map(|n| (*n).into()).collect(),
        ..Default::default()
    }
}

/// Type, name, version of everything in the file.
fn held(path: &Path) -> Vec<(String, String, String)> {
    let (responses, _log) = Log::open(path).unwrap();
    let flat = |response: DeltaDiscoveryResponse| {
        let kind = response.type_url;
        response
            .resources
            .into_iter()
            .map(move |r| (kind.clone(), r.name, r.version))
    };
    responses.into_iter().flat_map(flat).collect()
}

fn entry(kind: &str, name: &str, version: &str) -> (String, String, String) {
    (kind.into(), name.into(), version.into())
}

fn with_two_changes() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state").join("table.log");
    let (responses, mut log) = Log::open(&path).unwrap();
    assert!(responses.is_empty());
    log.append(&change(
        "pods",
        vec![resource("a", "1"), resource("b", "1")],
        &[],
    ));
    log.append(&change("pods", vec![resource("b", "2")], &["a"]));
    drop(log);
    (directory, path)
}

#[test]
fn changes_are_held_across_restarts() {
    let (_directory, path) = with_two_changes();
    assert_eq!(held(&path), [entry("pods", "b", "2")]);
    assert_eq!(
        held(&path),
        [entry("pods", "b", "2")],
        "the file that was written anew"
    );
    let (_, mut log) = Log::open(&path).unwrap();
    log.append(&change("services", vec![resource("s", "1")], &[]));
    drop(log);
    assert_eq!(
        held(&path),
        [entry("pods", "b", "2"), entry("services", "s", "1")]
    );
}

#[test]
fn a_type_without_resources_is_held_as_such() {
    let (_directory, path) = with_two_changes();
    let (_, mut log) = Log::open(&path).unwrap();
    log.append(&change("services", vec![], &[]));
    drop(log);
    let (responses, _log) = Log::open(&path).unwrap();
    let types: Vec<_> = responses.iter().map(|r| r.type_url.as_str()).collect();
    assert_eq!(types, ["pods", "services"]);
}

#[test]
fn a_type_of_which_a_part_is_held_is_dropped() {
    let (_directory, path) = with_two_changes();
    let (_, mut log) = Log::open(&path).unwrap();
    let mut part = change("services", vec![resource("s", "1")], &[]);
    part.system_version_info = "+".into();
    log.append(&part);
    drop(log);
    assert_eq!(
        read(&path).unwrap().into_responses().len(),
        2,
        "it is in the file"
    );
    assert_eq!(held(&path), [entry("pods", "b", "2")]);
}

#[test]
fn a_change_cut_short_is_left_out() {
    let (_directory, path) = with_two_changes();
    let full = std::fs::read(&path).unwrap();
    for cut in 1..5 {
        std::fs::write(&path, &full[..full.len() - cut]).unwrap();
        assert_eq!(
            held(&path),
            [entry("pods", "a", "1"), entry("pods", "b", "1")]
        );
    }
}

#[test]
fn a_damaged_file_counts_as_empty() {
    let (_directory, path) = with_two_changes();
    let full = std::fs::read(&path).unwrap();
    let mut damaged = [
        full.clone(),
        full.clone(),
        vec![],
        b"something else entirely".to_vec(),
    ];
    damaged[0][MAGIC.len() + HEADER as usize + 2] ^= 1;
    damaged[1][3] ^= 1;
    for content in damaged {
        std::fs::write(&path, &content).unwrap();
        assert!(read(&path).is_err());
        assert_eq!(held(&path), []);
        // What was begun anew is good.
        assert_eq!(held(&path), []);
    }
}

#[test]
fn the_file_does_not_grow_without_end() {
    let (_directory, path) = with_two_changes();
    let (_, log) = Log::open(&path).unwrap();
    let long = "v".repeat(4096);
    for n in 0..2000 {
        let body = change("pods", vec![resource("b", &format!("{long}{n}"))], &[]).encode_to_vec();
        // More than may wait for the disk: handed over as they are taken.
        log.records.as_ref().unwrap().send(body).unwrap();
    }
    drop(log);
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < 2 * SLACK, "{size}");
    assert_eq!(held(&path), [entry("pods", "b", &format!("{long}1999"))]);
}

#[test]
fn a_process_that_is_replaced_leaves_the_successors_file_alone() {
    let (_directory, path) = with_two_changes();
    let (_, mut old) = Log::open(&path).unwrap();
    let (_, mut new) = Log::open(&path).unwrap();
    // More than twice what it holds: the old process would write its file anew.
    let long = "x".repeat(64 * 1024);
    for _ in 0..40 {
        old.append(&change("pods", vec![resource("c", &long)], &[]));
    }
    drop(old);
    new.append(&change("pods", vec![resource("d", "1")], &[]));
    drop(new);
    assert_eq!(
        held(&path),
        [entry("pods", "b", "2"), entry("pods", "d", "1")]
    );
}
