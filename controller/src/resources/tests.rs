use std::fmt::Write as _;
use std::path::Path;

use mesh_api::proto::mesh::{
    BackendTrafficPolicy, EndpointSlice, Mode, Route, Service, TrafficPolicy,
};
use prost::Message;

use super::*;
use crate::enrolment::Stored;
use crate::model::{self, Settings};
use crate::providers::directory::{Reader, parse_text};
use crate::watch::Changes;

const MANIFESTS: &str = include_str!("testdata/mesh.yaml");
const STORED: &str = r#"{"nodes": [], "pods": {
    "uid-web": {"node": "node-1", "addresses": [], "phase": "enforced"},
    "uid-out": {"node": "node-1", "addresses": ["10.1.1.3"], "phase": "withdrawn"},
    "uid-db": {"node": "node-2", "addresses": ["10.1.2.2"], "phase": "tunnel"},
    "uid-stale": {"node": "node-3", "addresses": [], "phase": "leaving"}
}}"#;

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".into(),
        mode: Mode::Permissive,
    }
}

fn model(manifests: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("m.yaml"), manifests).unwrap();
    let mut reader = Reader::new(dir.path());
    let objects = reader.read(&Changes::Unknown).unwrap();
    assert_eq!(reader.mistakes(), []);
    model::build(&objects, &settings())
}

fn enrolment() -> Enrolment {
    let stored: Stored = serde_json::from_str(STORED).unwrap();
    Enrolment::restore(&stored)
}

/// `UPDATE_GOLDEN=1 cargo test` writes the file anew; review its diff.
#[test]
fn golden() {
    let model = model(MANIFESTS);
    let snapshot = build(&model, &enrolment(), &[vec![1, 2, 3]], &Snapshot::default());
    let text = render(&model, &snapshot);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/resources/testdata/mesh.golden");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    for (line, (is, should)) in text.lines().zip(golden.lines()).enumerate() {
        assert_eq!(is, should, "{}:{}", path.display(), line + 1);
    }
    assert_eq!(text.len(), golden.len());
}

/// As the first snapshot of a process, but after `previous`.
fn build(
    model: &Model,
    enrolment: &Enrolment,
    trust_bundle: &[Vec<u8>],
    previous: &Snapshot,
) -> Snapshot {
    let model = Arc::new(model.clone());
    Builder::default().build(&model, enrolment, trust_bundle, previous)
}

#[test]
fn an_unchanged_table_is_shared_and_a_small_edit_is_a_small_change() {
    let enrolment = enrolment();
    let first = build(&model(MANIFESTS), &enrolment, &[], &Snapshot::default());
    let same = build(&model(MANIFESTS), &enrolment, &[], &first);
    assert_eq!(same.seq, first.seq + 1);
    assert!(Arc::ptr_eq(&first.workloads, &same.workloads));
    assert!(Arc::ptr_eq(&first.services, &same.services));
    assert!(Arc::ptr_eq(&first.mesh, &same.mesh));
    assert!(Arc::ptr_eq(
        &first.node_pods["node-1"],
        &same.node_pods["node-1"]
    ));

    let edited = MANIFESTS.replace("ports: \"25\"", "ports: \"26\"");
    let next = build(&model(&edited), &enrolment, &[], &same);
    let changed: Vec<_> = next
        .workloads
        .iter()
        .filter(|(uid, resource)| same.workloads.get(*uid) != Some(resource))
        .map(|(uid, _)| &**uid)
        .collect();
    assert_eq!(changed, ["uid-web"]);
    assert!(Arc::ptr_eq(&same.services, &next.services));
    assert!(Arc::ptr_eq(
        &same.node_pods["node-2"],
        &next.node_pods["node-2"]
    ));
    assert!(!Arc::ptr_eq(
        &same.node_pods["node-1"],
        &next.node_pods["node-1"]
    ));
}

#[test]
fn a_version_says_the_content_and_nothing_else() {
    let parsed = parse_text(Path::new("m.yaml"), MANIFESTS);
    assert_eq!(parsed.mistakes, []);
    let a = build(&model(MANIFESTS), &enrolment(), &[], &Snapshot::default());
    // Another order of documents, other labels that are not used.
    let mut documents: Vec<&str> = MANIFESTS.split("\n---\n").collect();
    documents.reverse();
    let shuffled = documents
        .join("\n---\n")
        .replace("labels: {app: web,", "labels: {tier: x,");
    let b = build(&model(&shuffled), &enrolment(), &[], &Snapshot::default());
    assert_eq!(a.workloads, b.workloads);
    assert_eq!(a.slices, b.slices);
}

#[test]
fn an_edit_of_a_route_changes_that_route_only() {
    let enrolment = enrolment();
    let first = build(&model(MANIFESTS), &enrolment, &[], &Snapshot::default());
    let edited = MANIFESTS.replace("weight: 9", "weight: 8");
    let next = build(&model(&edited), &enrolment, &[], &first);
    let changed: Vec<_> = next
        .routes
        .iter()
        .filter(|(name, resource)| first.routes.get(*name) != Some(resource))
        .map(|(name, _)| &**name)
        .collect();
    assert_eq!(changed, ["httproute/demo/web"]);
    assert!(Arc::ptr_eq(&first.concerns, &next.concerns));
    assert!(Arc::ptr_eq(&first.services, &next.services));
    assert!(Arc::ptr_eq(&first.traffic_policies, &next.traffic_policies));
    assert!(Arc::ptr_eq(
        &first.backend_traffic_policies,
        &next.backend_traffic_policies
    ));
    // And what only says that it is another object changes nothing.
    let renumbered = MANIFESTS.replace("generation: 3", "generation: 4");
    let same = build(&model(&renumbered), &enrolment, &[], &first);
    assert!(Arc::ptr_eq(&first.routes, &same.routes));
}

fn render(model: &Model, snapshot: &Snapshot) -> String {
    let mut text = String::new();
    for (name, resource) in &*snapshot.mesh {
        let m = MeshConfig::decode(resource.body.clone()).unwrap();
        writeln!(
            text,
            "MeshConfig {name}: {} bundle={} complete={} nodes={}\n",
            m.trust_domain,
            m.trust_bundle.len(),
            m.services_complete,
            ips(&m.node_addresses)
        )
        .unwrap();
    }
    for (name, resource) in &*snapshot.workloads {
        let w = Workload::decode(resource.body.clone()).unwrap();
        writeln!(
            text,
            "Workload {name}: {}/{} sa={} owner={}",
            w.namespace, w.name, w.service_account, w.owner
        )
        .unwrap();
        writeln!(
            text,
            "  {:?} {:?} at {} on {} via {}",
            w.state(),
            w.tunnel(),
            ips(&w.addresses),
            w.node,
            ips(&w.node_addresses)
        )
        .unwrap();
        writeln!(
            text,
            "  excludes in={:?} out={:?} to={:?}\n",
            w.exclude_inbound_ports, w.exclude_outbound_ports, w.exclude_outbound_cidrs
        )
        .unwrap();
    }
    for (node, pods) in &*snapshot.node_pods {
        for (name, resource) in &**pods {
            let p = NodePod::decode(resource.body.clone()).unwrap();
            writeln!(
                text,
                "NodePod {node} {name}: {}/{} sa={} owner={}",
                p.namespace, p.name, p.service_account, p.owner
            )
            .unwrap();
            writeln!(
                text,
                "  enrolled={} {:?} namespace={} at {} zone={:?}",
                p.enrolled,
                p.mode(),
                p.namespace_opted_in,
                ips(&p.addresses),
                p.zone
            )
            .unwrap();
            writeln!(
                text,
                "  excludes in={:?} out={:?} to={:?}",
                p.exclude_inbound_ports, p.exclude_outbound_ports, p.exclude_outbound_cidrs
            )
            .unwrap();
            for probe in p.probes {
                writeln!(text, "  probe {} {:?}", probe.port, probe.handler.unwrap()).unwrap();
            }
            text.push('\n');
        }
    }
    for (name, resource) in &*snapshot.services {
        let s = Service::decode(resource.body.clone()).unwrap();
        writeln!(text, "Service {name}: {}", ips(&s.addresses)).unwrap();
        for p in s.ports {
            writeln!(
                text,
                "  port {:?} {} node={} app={:?}",
                p.name, p.port, p.node_port, p.app_protocol
            )
            .unwrap();
        }
    }
    let mut owners: Vec<_> = snapshot.service_by_address.iter().collect();
    owners.sort();
    writeln!(text, "addresses {owners:?}\n").unwrap();
    for (name, resource) in &*snapshot.slices {
        let s = EndpointSlice::decode(resource.body.clone()).unwrap();
        writeln!(text, "EndpointSlice {name} of {}", s.service).unwrap();
        for p in s.ports {
            writeln!(text, "  port {:?} {}", p.name, p.port).unwrap();
        }
        for e in s.endpoints {
            let address = ips(std::slice::from_ref(&e.address));
            writeln!(
                text,
                "  {address} ready={} serving={} terminating={} node={:?} zone={:?}",
                e.ready, e.serving, e.terminating, e.node, e.zone
            )
            .unwrap();
        }
    }
    text.push('\n');
    render_table::<Route>(&mut text, "Route", &snapshot.routes);
    render_table::<BackendTrafficPolicy>(
        &mut text,
        "BackendTrafficPolicy",
        &snapshot.backend_traffic_policies,
    );
    render_table::<TrafficPolicy>(&mut text, "TrafficPolicy", &snapshot.traffic_policies);
    writeln!(text, "concerns {:#?}", snapshot.concerns).unwrap();
    for status in &model.statuses {
        writeln!(text, "status {}", status.key()).unwrap();
        for parent in &status.parents {
            let of = serde_json::to_string(&parent.parent_ref).unwrap();
            writeln!(text, "  {of}").unwrap();
            for c in &parent.conditions {
                let line = format!("    {}={} {}: {}", c.kind, c.status, c.reason, c.message);
                writeln!(text, "{}", line.trim_end()).unwrap();
            }
        }
    }
    writeln!(text, "\nnamespaces {:?}", snapshot.namespaces_of_node).unwrap();
    let of_model = model.warnings.iter().map(ToString::to_string);
    for warning in of_model.chain(snapshot.warnings.iter().cloned()) {
        writeln!(text, "warning {warning}").unwrap();
    }
    text
}

/// As they are, without what is unset.
fn render_table<T: Typed + std::fmt::Debug>(text: &mut String, name: &str, table: &Table) {
    for (key, resource) in table {
        let message = T::decode(resource.body.clone()).unwrap();
        writeln!(text, "{name} {key}").unwrap();
        let unset = [": None,", ": [],", ": \"\",", ": 0,", ": false,"];
        let debug = format!("{message:#?}");
        for line in debug
            .lines()
            .filter(|l| !unset.iter().any(|u| l.ends_with(u)))
        {
            writeln!(text, "  {line}").unwrap();
        }
        text.push('\n');
    }
}

fn ips(addresses: &[Bytes]) -> String {
    let texts: Vec<String> = addresses
        .iter()
        .map(|a| address_from_bytes(a).unwrap().to_string())
        .collect();
    texts.join(",")
}

#[test]
fn what_is_used_again_is_what_would_be_made_anew() {
    let mut builder = Builder::default();
    let mut before = Snapshot::default();
    let edits = [
        ("", ""),
        ("ports: \"25\"", "ports: \"26\""),
        ("weight: 9", "weight: 8"),
        ("10.1.2.2", "10.1.2.9"),
    ];
    let stored = ["\"tunnel\"", "\"enforced\"", "\"leaving\""];
    for (edit, (old, new)) in edits.into_iter().enumerate() {
        let model = Arc::new(model(&MANIFESTS.replace(old, new)));
        for phase in stored {
            let stored = serde_json::from_str(&STORED.replace("\"tunnel\"", phase)).unwrap();
            let enrolment = Enrolment::restore(&stored);
            let next = builder.build(&model, &enrolment, &[], &before);
            let anew = build(&model, &enrolment, &[], &Snapshot::default());
            let tables = |s: &Snapshot| {
                let tables = [&s.workloads, &s.services, &s.slices, &s.routes, &s.mesh];
                (tables.map(Arc::clone), s.node_pods.clone())
            };
            assert_eq!(tables(&next), tables(&anew), "edit {edit}, {phase}");
            // And the record of changes leads from the table before to this one.
            if before.seq > 0 {
                let names = next.workload_changes.since(before.seq).unwrap();
                let names: BTreeSet<_> = names.cloned().collect();
                let differ =
                    |uid: &&Arc<str>| before.workloads.get(*uid) != next.workloads.get(*uid);
                let all: BTreeSet<_> = before
                    .workloads
                    .keys()
                    .chain(next.workloads.keys())
                    .collect();
                let should: BTreeSet<_> = all.into_iter().filter(differ).cloned().collect();
                assert_eq!(names, should, "edit {edit}, {phase}");
            }
            before = next;
        }
    }
}

#[test]
fn changes_of_long_ago_are_not_on_record() {
    let table = |version: u64| {
        let resource = Resource {
            version: version.to_string().into(),
            body: Bytes::new(),
        };
        Arc::new(Table::from([("a".into(), Arc::new(resource))]))
    };
    let names = |changes: &super::Changes, seq| changes.since(seq).map(|names| names.count());
    let mut changes = super::Changes::default();
    assert_eq!(
        names(&changes, 0),
        None,
        "nothing is known of what was before"
    );
    let newest = MAX_CHANGED as u64 + 10;
    for seq in 1..=newest {
        changes = changes.next(seq, &table(seq - 1), &table(seq));
    }
    assert_eq!(names(&changes, newest), Some(0));
    assert_eq!(names(&changes, newest - 3), Some(3));
    assert_eq!(names(&changes, 10), Some(MAX_CHANGED));
    assert_eq!(names(&changes, 9), None);
}
