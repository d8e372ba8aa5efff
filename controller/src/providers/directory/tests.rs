mod routes;

use super::*;

fn parse(text: &str) -> (Vec<String>, Vec<String>) {
    let parsed = parse_text(Path::new("m.yaml"), text);
    (
        parsed
            .documents
            .iter()
            .map(|d| format!("{}:{}", d.line, d.object.key()))
            .collect(),
        parsed.mistakes.iter().map(Mistake::to_string).collect(),
    )
}

#[test]
fn documents_of_a_file_with_their_lines() {
    let (documents, mistakes) = parse(
        "# a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n---\napiVersion: v1\nkind: Pod\n\
         metadata: {name: web}\nspec: {containers: [{name: a}]}\n---\n",
    );
    assert_eq!(mistakes, Vec::<String>::new());
    assert_eq!(documents, ["3:Namespace demo", "11:Pod default/web"]);
}

#[test]
fn all_mistakes_are_reported_and_cost_only_their_document() {
    let (documents, mistakes) = parse(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  lables: {a: b}\nspec:\n  ports:\n  - port: http\n    nodePort: x\n\
         ---\nkind: Pod\n  apiVersion: v1\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n",
    );
    assert_eq!(documents, ["14:Namespace demo"]);
    assert_eq!(mistakes.len(), 4, "{mistakes:#?}");
    assert!(mistakes[0].starts_with("m.yaml:5: Service default/web: metadata.lables: there is no"));
    assert!(mistakes[1].starts_with("m.yaml:8: Service default/web: spec.ports[0].port: invalid"));
    assert!(mistakes[2].starts_with("m.yaml:9: Service default/web: spec.ports[0].nodePort: inv"));
    assert!(mistakes[3].starts_with("m.yaml:12: cannot be parsed: "));
}

/// A document, and the mistakes in it as `line: field: beginning of the message`.
#[test]
fn mistakes_in_documents() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n";
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n";
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: e}\n";
    let cases: Vec<(String, Vec<&str>)> = vec![
        ("a: b\n".into(), vec!["1: kind: expected the kind of the object"]),
        ("- a\n".into(), vec!["1: kind: expected the kind of the object"]),
        ("kind: Pod\nmetadata: {name: p}\n".into(), vec!["1: apiVersion: expected v1"]),
        (
            "apiVersion: apps/v1beta1\nkind: Deployment\nmetadata: {name: p}\n".into(),
            vec!["1: apiVersion: expected apps/v1"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: Demo\n  labels:\n    warren-mesh.io/mesh: yes please\n    warren-mesh.io/mode: loose\n".into(),
            vec![
                "4: metadata.name: expected a name of a-z",
                "6: metadata.labels[\"warren-mesh.io/mesh\"]: expected enabled or disabled, found \"yes please\"",
                "7: metadata.labels[\"warren-mesh.io/mode\"]: expected permissive or strict, found \"loose\"",
            ],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: d, labels: {a: 1}}\n".into(),
            vec!["3: metadata.labels.a: invalid type: integer `1`, expected a string"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {}\n".into(),
            vec!["3: metadata.name: expected the name of the object"],
        ),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, name: b}\n".into(),
            vec!["3: : cannot be parsed: "],
        ),
        (format!("{pod}  containers: []\n"), vec!["5: spec.containers: expected at least one"]),
        (
            format!("{pod}  containers:\n  - name: a\n    ports: [{{containerPort: 0}}]\n  - name: a\n"),
            vec![
                "7: spec.containers[0].ports[0].containerPort: expected a port from 1 to 65535, found 0",
                "8: spec.containers[1].name: \"a\" is taken by another container",
            ],
        ),
        (
            format!("{pod}  containers:\n  - name: a\n    livenessProbe:\n      httpGet: {{port: web}}\n"),
            vec!["8: spec.containers[0].livenessProbe: the container has no port named \"web\""],
        ),
        (
            format!("{pod}  containers:\n  - nmae: a\n    image: x\n"),
            vec![
                "6: spec.containers[0].name: expected the name of the container",
                "6: spec.containers[0].nmae: there is no such field",
            ],
        ),
        (
            format!("{pod}  containers: web\n  nodeName: [n]\n"),
            vec!["5: spec.containers: invalid type", "6: spec.nodeName: invalid type"],
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations:\n    warren-mesh.io/exclude-inbound-ports: a,80\n    warren-mesh.io/tunnel: gre\nspec: {containers: [{name: a}]}\nstatus: {podIPs: [{ip: 10.1.1}]}\n".into(),
            vec![
                "6: metadata.annotations[\"warren-mesh.io/exclude-inbound-ports\"]: expected ports",
                "7: metadata.annotations[\"warren-mesh.io/tunnel\"]: expected hbone, found \"gre\"",
                "9: status.podIPs[0].ip: expected an IP address, found \"10.1.1\"",
            ],
        ),
        (
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec:\n  replicas: -1\n  selector: {}\n  template:\n    metadata: {labels: {warren-mesh.io/mesh: maybe}}\n    spec: {containers: []}\n".into(),
            vec![
                "5: spec.replicas: expected 0 or more",
                "8: spec.template.metadata.labels[\"warren-mesh.io/mesh\"]: expected enabled or",
                "9: spec.template.spec.containers: expected at least one container",
            ],
        ),
        (
            format!("{service}  clusterIP: '10.96'\n  ports:\n  - port: 80\n  - {{port: 99999, protocol: tcp, name: b}}\n  - {{port: 1, name: b}}\n"),
            vec![
                "5: spec.clusterIP: expected an IP address, found \"10.96\"",
                "7: spec.ports[0].name: expected a name, as there are several ports",
                "8: spec.ports[1].port: expected a port from 1 to 65535, found 99999",
                "8: spec.ports[1].protocol: expected TCP, UDP or SCTP, found \"tcp\"",
                "9: spec.ports[2].name: \"b\" is taken by another port",
            ],
        ),
        (format!("{service}  selector: {{a: b}}\n"), vec!["5: spec.ports: expected at least one"]),
        (
            format!("{slice}addressType: IPv6\nendpoints:\n- addresses: [10.1.1.1]\n- addresses: []\n"),
            vec![
                "6: endpoints[0].addresses[0]: expected an IPv6 address, found \"10.1.1.1\"",
                "7: endpoints[1].addresses: expected at least one address",
            ],
        ),
        (
            format!("{slice}addressType: IPv5\nendpoints: []\n"),
            vec!["4: addressType: expected IPv4, IPv6 or FQDN, found \"IPv5\""],
        ),
        (
            "apiVersion: v1\nkind: Node\nmetadata: {name: n}\nstatus:\n  addresses:\n  - {type: InternalIP, address: here}\n  - {type: Hostname, address: here}\n".into(),
            vec!["6: status.addresses[0].address: expected an IP address, found \"here\""],
        ),
        (
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: ok}}\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: d, lables: {}}\n".into(),
            vec!["7: items[1].metadata.lables: there is no such field"],
        ),
    ];
    for (text, expected) in cases {
        let parsed = parse_text(Path::new("m.yaml"), &text);
        let found: Vec<String> = parsed
            .mistakes
            .iter()
            .map(|m| format!("{}: {}: {}", m.line, m.field, m.message))
            .collect();
        assert_eq!(found.len(), expected.len(), "{text}\n{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{text}\n{found}\n{expected}");
        }
    }
}

#[test]
fn what_kubernetes_takes_is_taken() {
    let (documents, mistakes) = parse(
        "%YAML 1.1\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, creationTimestamp: null, annotations: {}}\n\
         spec:\n  containers: [{name: a, resources: {limits: {cpu: 1, memory: 1.5}}}]\n  volumes: [{name: v, emptyDir: {sizeLimit: 5}}]\n\
         status: {fromTheFuture: 1}\n\
         ---\napiVersion: other.example/v1\nkind: Service\nmetadata: {name: x}\nfoo: bar\n\
         ---\n# nothing\n---\nbase: &base {app: web}\nkind: Unknown\n\
         ---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: n\n  labels: {<<: {a: b}, c: d}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: None}\n\
         --- {apiVersion: v1, kind: Namespace, metadata: {name: flow}}\n",
    );
    assert_eq!(mistakes, Vec::<String>::new());
    let kinds: Vec<&str> = documents
        .iter()
        .map(|d| d.split_once(':').unwrap().1)
        .collect();
    assert_eq!(
        kinds,
        [
            "Pod default/p",
            "Namespace n",
            "Service default/s",
            "Namespace flow"
        ]
    );
}

#[test]
fn json_is_read_with_its_lines() {
    let text = "{\n\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n\
        {\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"\\ud83d\\ude00\"}},\n\
        {\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"n\"}}]}\n";
    let parsed = parse_text(Path::new("m.json"), text);
    assert_eq!(parsed.documents.len(), 1);
    assert_eq!(parsed.mistakes[0].line, 3);
    assert_eq!(parsed.mistakes[0].field, "items[0].metadata.name");
    let broken = parse_text(Path::new("m.json"), "{\n\"a\": \n}");
    assert_eq!((broken.mistakes[0].line, broken.mistakes.len()), (3, 1));
}

mod reading {
    use super::*;
    use crate::watch::Changes;

    fn names(objects: &crate::providers::Objects) -> Vec<&str> {
        objects.namespaces.keys().map(String::as_str).collect()
    }

    fn namespace(name: &str, label: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{warren-mesh.io/mesh: {label}}}}}\n---\n"
        )
    }

    fn meshed(objects: &crate::providers::Objects, name: &str) -> bool {
        let labels = objects.namespaces[name].metadata.labels.as_ref().unwrap();
        labels["warren-mesh.io/mesh"] == "enabled"
    }

    #[test]
    fn a_mistake_leaves_the_rest_and_the_last_good_version_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        let mut reader = Reader::new(dir.path());
        write(
            &(namespace("a", "enabled") + &namespace("b", "enabled") + &namespace("c", "enabled")),
        );
        assert_eq!(
            names(&reader.read(&Changes::Unknown).unwrap()),
            ["a", "b", "c"]
        );

        // `a` is mistaken, `b` changes, `c` goes.
        write(&(namespace("a", "perhaps") + &namespace("b", "disabled")));
        let objects = reader.read(&Changes::Unknown).unwrap();
        assert_eq!(names(&objects), ["a", "b"]);
        assert!(meshed(&objects, "a") && !meshed(&objects, "b"));
        assert_eq!(reader.mistakes().len(), 1);

        // Which document it is cannot be told: none of the file goes.
        write("kind: [\n---\n");
        assert_eq!(names(&reader.read(&Changes::Unknown).unwrap()), ["a", "b"]);
        // Repaired.
        write(&namespace("b", "enabled"));
        let objects = reader.read(&Changes::Unknown).unwrap();
        assert_eq!(names(&objects), ["b"]);
        assert!(meshed(&objects, "b") && reader.mistakes().is_empty());
        // A document that was never good is not in force.
        write(&(namespace("b", "enabled") + &namespace("d", "perhaps")));
        assert_eq!(names(&reader.read(&Changes::Unknown).unwrap()), ["b"]);
    }

    #[test]
    fn a_directory_that_cannot_be_read_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let manifests = dir.path().join("m");
        std::fs::create_dir(&manifests).unwrap();
        std::fs::write(manifests.join("a.yaml"), namespace("a", "enabled")).unwrap();
        let mut reader = Reader::new(&manifests);
        reader.read(&Changes::Unknown).unwrap();
        std::fs::rename(&manifests, dir.path().join("away")).unwrap();
        assert!(reader.read(&Changes::Unknown).is_err());
        std::fs::rename(dir.path().join("away"), &manifests).unwrap();
        assert_eq!(names(&reader.read(&Changes::Unknown).unwrap()), ["a"]);
    }

    #[test]
    fn the_first_of_two_documents_of_an_object_wins() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("a.yml"), namespace("a", "enabled")).unwrap();
        std::fs::write(dir.path().join("sub/b.yaml"), namespace("a", "disabled")).unwrap();
        for ignored in [".hidden.yaml", "notes.txt"] {
            std::fs::write(dir.path().join(ignored), namespace("x", "enabled")).unwrap();
        }
        let mut reader = Reader::new(dir.path());
        let objects = reader.read(&Changes::Unknown).unwrap();
        assert_eq!(names(&objects), ["a"]);
        assert!(meshed(&objects, "a"));
        let mistake = reader.mistakes()[0].to_string();
        assert!(
            mistake.contains("sub/b.yaml:1: Namespace a: is already described at"),
            "{mistake}"
        );
        assert_eq!(load_dir(dir.path()).unwrap().documents.len(), 1);
    }

    #[test]
    fn a_pod_without_uid_is_given_one_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let pod =
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: a}]}\n";
        std::fs::write(dir.path().join("a.yaml"), pod).unwrap();
        let uid = || {
            let objects = Reader::new(dir.path()).read(&Changes::Unknown).unwrap();
            let pod = &objects.pods[&("default".to_owned(), "p".to_owned())];
            pod.metadata.uid.clone().unwrap()
        };
        assert_eq!(uid(), uid());
        assert_eq!(uid().len(), 36);
    }
}
