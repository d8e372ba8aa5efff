use std::collections::BTreeMap;

use mesh_api::names::{
    EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_CIDRS, EXCLUDE_OUTBOUND_PORTS, SYSTEM_NAMESPACE,
};

use super::*;

// What a good object becomes is in the golden test of `resources`. Here: objects with mistakes, which a
// directory would not let through but Kubernetes does.

fn objects(label: Option<(&str, &str)>, pod: &str) -> Objects {
    let labels = label.map(|(k, v)| BTreeMap::from([(k.to_owned(), v.to_owned())]));
    let mut namespace = k8s_openapi::api::core::v1::Namespace::default();
    namespace.metadata.labels = labels;
    let pod: k8s_openapi::api::core::v1::Pod = serde_norway::from_str(pod).unwrap();
    Objects {
        namespaces: [("demo".to_owned(), namespace.into())].into(),
        pods: [(("demo".to_owned(), "web".to_owned()), pod.into())].into(),
        ..Default::default()
    }
}

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".into(),
        mode: Mode::Permissive,
    }
}

const POD: &str = "
metadata: {name: web, namespace: demo, uid: u}
spec: {nodeName: n, containers: [{name: c}]}
";

#[test]
fn what_follows_is_what_would_be_built_anew() {
    const MESH: &str = MESH_LABEL;
    let odd = POD.replace("uid: u", "uid: u, labels: {warren-mesh.io/mesh: maybe}");
    let steps = [
        objects(None, POD),
        objects(Some((MESH, "enabled")), POD),
        objects(Some((MESH, "enabled")), &odd),
        objects(Some((MODE_LABEL, "Strict")), &odd),
    ];
    let mut before: Option<(Objects, Model)> = None;
    for mut now in steps {
        for round in 0..3 {
            // Another pod comes and goes, the rest are the same manifests.
            let other = ("demo".to_owned(), "other".to_owned());
            match round {
                1 => {
                    let other_pod = POD
                        .replace("name: web", "name: other")
                        .replace("uid: u", "uid: v");
                    let pod: k8s::Pod = serde_norway::from_str(&other_pod).unwrap();
                    now.pods.insert(other, pod.into());
                }
                _ => drop(now.pods.remove(&other)),
            }
            let anew = build(&now, &settings());
            if let Some((old_objects, old)) = &before {
                assert_eq!(rebuild(&now, &settings(), (old_objects, old)), anew);
            }
            before = Some((now.clone(), anew));
        }
    }
    let (_, model) = before.unwrap();
    assert!(!model.warnings.is_empty());
    let quiet = self::objects(None, POD);
    let first = build(&quiet, &settings());
    let next = rebuild(&quiet, &settings(), (&quiet, &first));
    assert!(
        Arc::ptr_eq(&first.pods["u"], &next.pods["u"]),
        "not built again"
    );
}

#[test]
fn a_mode_that_does_not_exist_is_strict() {
    let model = build(&objects(Some((MODE_LABEL, "Strict")), POD), &settings());
    assert_eq!(model.pods["u"].mode, Mode::Strict);
    let warnings: Vec<String> = model.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        ["Namespace demo: warren-mesh.io/mode: expected permissive or strict, found \"Strict\""]
    );
}

#[test]
fn a_label_that_means_nothing_does_not_opt_in() {
    let model = build(&objects(Some((MESH_LABEL, "true")), POD), &settings());
    assert!(!model.pods["u"].opted_in);
    assert_eq!(model.warnings.len(), 1);
    // The pod's own mistake leaves its namespace's word.
    let pod = POD.replace("uid: u", "uid: u, labels: {warren-mesh.io/mesh: 'on'}");
    let model = build(&objects(Some((MESH_LABEL, "enabled")), &pod), &settings());
    assert!(model.pods["u"].opted_in);
    assert!(
        model.warnings[0]
            .to_string()
            .starts_with("Pod demo/web: warren-mesh.io/mesh: expected enabled or")
    );
}

#[test]
fn switched_off_nobody_is_in_the_mesh_whatever_else_asks_for_it() {
    let pod = POD.replace("uid: u", "uid: u, labels: {warren-mesh.io/mesh: enabled}");
    let mut objects = objects(Some((MESH_LABEL, "enabled")), &pod);
    assert!(build(&objects, &settings()).pods["u"].opted_in);
    let mut system = k8s_openapi::api::core::v1::Namespace::default();
    let off = (MESH_LABEL.to_owned(), "disabled".to_owned());
    system.metadata.labels = Some([off].into());
    let name = SYSTEM_NAMESPACE.to_owned();
    objects.namespaces.insert(name, system.into());
    let model = build(&objects, &settings());
    assert!(!model.pods["u"].opted_in);
    assert!(model.warnings.is_empty(), "{:?}", model.warnings);
}

#[test]
fn a_bad_probe_is_named_and_the_others_count() {
    let pod = POD.replace(
        "{name: c}",
        "{name: c, livenessProbe: {httpGet: {port: http}}, readinessProbe: {tcpSocket: {port: 0}}, \
         startupProbe: {grpc: {port: 9}}}",
    );
    let model = build(&objects(None, &pod), &settings());
    assert_eq!(model.pods["u"].probes.len(), 1);
    let warnings: Vec<String> = model.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "Pod demo/web: spec.containers[0].livenessProbe: the container has no port named \
             \"http\"; this probe is ignored",
            "Pod demo/web: spec.containers[0].readinessProbe: expected a port from 1 to 65535, \
             found 0; this probe is ignored",
        ]
    );
}

#[test]
fn every_bad_exclusion_is_reported_and_the_good_ones_count() {
    let annotations = BTreeMap::from([
        (
            EXCLUDE_INBOUND_PORTS.to_owned(),
            "80,http,0,70000,443".to_owned(),
        ),
        (EXCLUDE_OUTBOUND_PORTS.to_owned(), " ".to_owned()),
        (
            EXCLUDE_OUTBOUND_CIDRS.to_owned(),
            "10.1.2.3/8,,10.0.0.0/33".to_owned(),
        ),
    ]);
    let (exclusions, mistakes) = Exclusions::read(&annotations);
    assert_eq!(exclusions.inbound_ports, [80, 443]);
    assert_eq!(exclusions.outbound_ports, [0u16; 0]);
    let cidrs: Vec<String> = exclusions
        .outbound_cidrs
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(cidrs, ["10.0.0.0/8"]);
    let found: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    let ports = "warren-mesh.io/exclude-inbound-ports: expected ports from 1 to 65535, \
                 comma-separated; found";
    let nets = "warren-mesh.io/exclude-outbound-cidrs: expected networks such as 10.0.0.0/8, \
                comma-separated; found";
    assert_eq!(
        found,
        [
            format!("{ports} \"http\""),
            format!("{ports} \"0\""),
            format!("{ports} \"70000\""),
            format!("{nets} \"\""),
            format!("{nets} \"10.0.0.0/33\""),
        ]
    );
}

#[test]
fn a_pod_that_cannot_have_an_identity_is_left_out_aloud() {
    let pod = POD.replace("spec: {", "spec: {serviceAccountName: 'a b', ");
    let model = build(&objects(Some((MESH_LABEL, "enabled")), &pod), &settings());
    assert!(model.pods.is_empty());
    assert!(
        model.warnings[0]
            .to_string()
            .starts_with("Pod demo/web: is left out of the mesh: identity")
    );
}

#[test]
fn what_a_pod_says_fits_the_packets_of_its_node() {
    use prost::Message as _;
    let cidrs: Vec<String> = (0..10_000)
        .map(|n| {
            format!(
                "fd00:1234:5678:9abc:def0:1234:{:x}:{:x}/128",
                n / 256,
                n % 256
            )
        })
        .collect();
    let ports: Vec<String> = (1..=65_535).map(|n: u32| n.to_string()).collect();
    let probe = |n: usize| {
        let path = "x".repeat(if n == 0 { 600 } else { 500 });
        format!(
            "{{name: c{n}, livenessProbe: {{httpGet: {{port: {}, path: /{path}}}}}}}",
            n + 1
        )
    };
    let containers: Vec<String> = (0..100).map(probe).collect();
    let pod = POD
        .replace(
            "uid: u",
            &format!(
                "uid: u, annotations: {{warren-mesh.io/exclude-outbound-cidrs: '{}', \
                 warren-mesh.io/exclude-inbound-ports: '{1}', \
                 warren-mesh.io/exclude-outbound-ports: '{1}'}}",
                cidrs.join(","),
                ports.join(",")
            ),
        )
        .replace("{name: c}", &containers.join(", "));
    let model = build(&objects(Some((MESH_LABEL, "enabled")), &pod), &settings());
    let size = crate::resources::node_pod_of(&model, &model.pods["u"], None).encoded_len();
    assert!(size < mesh_api::seqpacket::MAX_BYTES * 3 / 4, "{size}");
    let said = |text: &str| {
        let told = model
            .warnings
            .iter()
            .any(|warning| warning.to_string().contains(text));
        assert!(told, "{text}: {:?}", model.warnings);
    };
    said("exclude-outbound-cidrs: expected at most 128 entries, found 10000");
    said("exclude-inbound-ports: expected at most 128 entries, found 65535");
    said("spec.containers[0].livenessProbe: path: expected at most 512 bytes, found 601");
    said("spec.containers[65].livenessProbe: expected at most 64 different probes");
}
