use super::*;
use crate::lab::cluster::Life;
use crate::lab::translation;

/// A ready pod labelled `app: web`.
pub(crate) fn pod(node: &str, ips: &[&str]) -> PodRecord {
    let manifest = serde_json::from_value(serde_json::json!({
        "metadata": {"name": "p", "uid": format!("uid-{}", ips.join("-")), "labels": {"app": "web"}},
        "spec": {"nodeName": node, "containers": [
            {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}
        ]},
    }))
    .unwrap();
    PodRecord {
        manifest,
        written: None,
        owner: None,
        life: Life {
            phase: Phase::Running,
            ready: true,
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ..Life::default()
        },
        stop: tokio::sync::watch::channel(None).0,
    }
}

fn service(spec: serde_json::Value) -> Service {
    let mut service: Service = serde_json::from_value(serde_json::json!({ "spec": spec })).unwrap();
    let none = BTreeMap::new();
    assign(&mut service, None, &none, Plan::new(0)).unwrap();
    service
}

fn cluster(spec: serde_json::Value) -> Cluster {
    let mut cluster = Cluster::new();
    cluster
        .services
        .insert(("demo".into(), "web".into()), service(spec));
    let pods = [
        ("a", "node-1", "10.202.1.5", "fd57::1:5"),
        ("b", "node-2", "10.202.2.5", "fd57::2:5"),
    ];
    for (name, node, v4, v6) in pods {
        cluster
            .pods
            .insert(("demo".into(), name.into()), pod(node, &[v4, v6]));
    }
    cluster
}

fn web() -> serde_json::Value {
    serde_json::json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]})
}

fn ips(service: &Service) -> Vec<String> {
    addresses(service).iter().map(ToString::to_string).collect()
}

#[test]
fn addresses_are_given_out_kept_and_honoured() {
    let first = service(web());
    assert_eq!(ips(&first), ["10.96.0.10", "fd57:7261:0:ffff::a"]);
    let others = BTreeMap::from([(("demo".to_owned(), "web".to_owned()), first.clone())]);
    let mut second: Service = serde_json::from_value(serde_json::json!({"spec": web()})).unwrap();
    assign(&mut second, None, &others, Plan::new(0)).unwrap();
    assert_eq!(ips(&second), ["10.96.0.11", "fd57:7261:0:ffff::b"]);

    let mut again: Service = serde_json::from_value(serde_json::json!({"spec": web()})).unwrap();
    let none = BTreeMap::new();
    assign(&mut again, Some(&second), &none, Plan::new(0)).unwrap();
    assert_eq!(ips(&again), ips(&second));

    let own = serde_json::json!({"clusterIP": "10.96.77.1", "ports": [{"port": 80}]});
    assert_eq!(
        ips(&service(own.clone())),
        ["10.96.77.1", "fd57:7261:0:ffff::a"]
    );
    let mut taken: Service = serde_json::from_value(serde_json::json!({"spec": own})).unwrap();
    let others = BTreeMap::from([(("x".to_owned(), "y".to_owned()), taken.clone())]);
    let mut others = others;
    for other in others.values_mut() {
        assign(other, None, &none, Plan::new(0)).unwrap();
    }
    let error = assign(&mut taken, None, &others, Plan::new(0)).unwrap_err();
    assert!(error.contains("10.96.77.1"), "{error}");
}

#[test]
fn families_follow_the_policy() {
    let single = serde_json::json!({"ipFamilyPolicy": "SingleStack", "ports": [{"port": 80}]});
    assert_eq!(ips(&service(single)), ["10.96.0.10"]);
    let v6 = serde_json::json!({"ipFamilies": ["IPv6"], "ports": [{"port": 80}]});
    assert_eq!(ips(&service(v6)), ["fd57:7261:0:ffff::a"]);
    let both = serde_json::json!({
        "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"], "ports": [{"port": 80}]
    });
    assert_eq!(ips(&service(both)), ["fd57:7261:0:ffff::a", "10.96.0.10"]);
    let headless = service(serde_json::json!({"clusterIP": "None", "ports": [{"port": 80}]}));
    assert!(is_headless(&headless) && ips(&headless).is_empty());
}

#[test]
fn slices_carry_conditions_and_named_ports() {
    let mut cluster = cluster(web());
    let key = ("demo".to_owned(), "b".to_owned());
    cluster.pods.get_mut(&key).unwrap().life.terminating = true;
    let slices = all_slices(&cluster);
    let names: Vec<_> = slices
        .iter()
        .filter_map(|s| s.metadata.name.as_deref())
        .collect();
    assert_eq!(names, ["web-ipv4", "web-ipv6"]);
    let endpoints = slices[0].endpoints.as_deref().unwrap();
    let conditions: Vec<_> = endpoints
        .iter()
        .map(|e| {
            e.conditions
                .as_ref()
                .map(|c| (c.ready, c.serving, c.terminating))
                .unwrap()
        })
        .collect();
    let yes_no = |a, b, c| (Some(a), Some(b), Some(c));
    assert_eq!(
        conditions,
        [yes_no(true, true, false), yes_no(false, true, true)]
    );
    assert_eq!(slices[0].ports.as_ref().unwrap()[0].port, Some(8080));
    assert_eq!(
        slices[1].endpoints.as_ref().unwrap()[0].addresses,
        ["fd57::1:5"]
    );
}

#[test]
fn translation_balances_over_ready_endpoints() {
    let mut cluster = cluster(serde_json::json!({
        "type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]
    }));
    let rules = translation::rules(&cluster);
    for line in [
        "ip daddr 10.96.0.10 tcp dport 80 dnat ip to numgen random mod 2 map \
         { 0 : 10.202.1.5 . 8080, 1 : 10.202.2.5 . 8080 }",
        "ip6 daddr fd57:7261:0:ffff::a tcp dport 80 dnat ip6 to numgen random mod 2 map \
         { 0 : fd57::1:5 . 8080, 1 : fd57::2:5 . 8080 }",
        "fib daddr type local tcp dport 30000",
        "ip saddr . ip daddr { 10.202.1.5 . 10.202.1.5, 10.202.2.5 . 10.202.2.5 } ct status dnat masquerade",
    ] {
        assert!(rules.contains(line), "{line}\nin\n{rules}");
    }
    for pod in cluster.pods.values_mut() {
        pod.life.ready = false;
    }
    let rules = translation::rules(&cluster);
    assert!(!rules.contains("numgen"), "{rules}");
    assert!(
        rules.contains("ip daddr 10.96.0.10 tcp dport 80 reject with tcp reset"),
        "{rules}"
    );
}

#[test]
fn hints_follow_traffic_distribution() {
    let hints = |distribution: Option<&str>, zones: &[(&str, &str)]| -> Vec<String> {
        let mut spec = web();
        if let Some(distribution) = distribution {
            spec["trafficDistribution"] = distribution.into();
        }
        let mut cluster = cluster(spec);
        cluster.zones = zones
            .iter()
            .map(|(node, zone)| ((*node).to_owned(), (*zone).to_owned()))
            .collect();
        let slices = all_slices(&cluster);
        let endpoints = slices[0].endpoints.iter().flatten();
        let text = |e: &Endpoint| {
            let hints = e.hints.clone().unwrap_or_default();
            let zones = hints.for_zones.unwrap_or_default();
            let nodes = hints.for_nodes.unwrap_or_default();
            let zones: Vec<_> = zones.into_iter().map(|z| z.name).collect();
            let nodes: Vec<_> = nodes.into_iter().map(|n| n.name).collect();
            let zone = e.zone.clone().unwrap_or_default();
            format!("{zone}|{}|{}", zones.join(","), nodes.join(","))
        };
        endpoints.map(text).collect()
    };
    let both = [("node-1", "a"), ("node-2", "b")];
    assert_eq!(hints(None, &both), ["a||", "b||"]);
    for distribution in ["PreferClose", "PreferSameZone"] {
        assert_eq!(hints(Some(distribution), &both), ["a|a|", "b|b|"]);
        // One without a zone: a hint would send its share to the others.
        assert_eq!(hints(Some(distribution), &both[..1]), ["a||", "||"]);
    }
    let same_node = hints(Some("PreferSameNode"), &both);
    assert_eq!(same_node, ["a|a|node-1", "b|b|node-2"]);
    assert_eq!(hints(Some("PreferSameNode"), &[]), ["||node-1", "||node-2"]);
}
