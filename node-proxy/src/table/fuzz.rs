//! The table under whatever a controller may send, valid or not, in any order.

use bytes::Bytes;
use mesh_api::client::delta::Update;
use mesh_api::names::address_to_bytes;
use mesh_api::proto::mesh;
use prost::Message;

use super::{Kind, Table};
use crate::fuzz::{Input, part};

/// What is not valid is refused and leaves what was held; what is valid is held; and the Services, with what is attached to
/// them, do not depend on the order in which all of it came.
pub(crate) fn table(bytes: &[u8]) {
    let mut input = Input(bytes);
    let table = Table::new("node-1");
    let mut sent = Vec::new();
    while !input.0.is_empty() && sent.len() < 32 {
        let head = input.byte();
        let kind = Kind::ALL[usize::from(head & 0x7f) % Kind::ALL.len()];
        let value = input.part();
        let Some(name) = name(kind, value) else {
            continue;
        };
        let before = table.known(kind.type_url());
        if head & 0x80 != 0 {
            table.apply(kind.type_url(), &[], std::slice::from_ref(&name));
            let removed = kind != Kind::MeshConfig;
            assert!(!removed || !table.known(kind.type_url()).contains_key(&name));
            continue;
        }
        let update = Update {
            name: name.clone(),
            version: sent.len().to_string(),
            aliases: vec![],
            value: Bytes::copy_from_slice(value),
        };
        let applied = table.apply(kind.type_url(), std::slice::from_ref(&update), &[]);
        let now = table.known(kind.type_url());
        match applied
            .rejected
            .iter()
            .any(|rejected| rejected.name == name)
        {
            true => assert!(
                now.get(&name)
                    .is_none_or(|version| before.get(&name) == Some(version))
            ),
            false if kind == Kind::Workload => {}
            false => assert_eq!(now.get(&name), Some(&update.version)),
        }
        sent.push((kind, update));
    }
    let held: Vec<&(Kind, Update)> = sent
        .iter()
        .filter(|(kind, update)| {
            // Of pods that claim one address the last has it.
            let known = table.known(kind.type_url());
            *kind != Kind::Workload && known.get(&update.name) == Some(&update.version)
        })
        .collect();
    let forwards = services(held.iter().copied());
    assert_eq!(services(held.iter().copied().rev()), forwards);
    assert_eq!(table.dump()["services"], forwards);
}

fn services<'a>(updates: impl Iterator<Item = &'a (Kind, Update)>) -> serde_json::Value {
    let table = Table::new("node-1");
    for (kind, update) in updates {
        let applied = table.apply(kind.type_url(), std::slice::from_ref(update), &[]);
        assert_eq!(applied.rejected, [], "it was taken before");
    }
    table.dump()["services"].take()
}

/// What a resource must be called by its content.
fn name(kind: Kind, value: &[u8]) -> Option<String> {
    Some(match kind {
        Kind::MeshConfig => "mesh".into(),
        Kind::Workload => mesh::Workload::decode(value).ok()?.uid,
        Kind::Service => {
            let s = mesh::Service::decode(value).ok()?;
            format!("{}/{}", s.namespace, s.name)
        }
        Kind::EndpointSlice => {
            let s = mesh::EndpointSlice::decode(value).ok()?;
            format!("{}/{}", s.namespace, s.name)
        }
        Kind::Route => {
            let r = mesh::Route::decode(value).ok()?;
            let kind = r
                .kind()
                .as_str_name()
                .replace("ROUTE_KIND_", "")
                .to_lowercase();
            format!("{kind}route/{}/{}", r.namespace, r.name)
        }
        Kind::BackendTrafficPolicy => {
            let p = mesh::BackendTrafficPolicy::decode(value).ok()?;
            format!("{}/{}", p.namespace, p.name)
        }
        Kind::TrafficPolicy => {
            let p = mesh::TrafficPolicy::decode(value).ok()?;
            format!("{}/{}", p.namespace, p.name)
        }
    })
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let address = |text: &str| address_to_bytes(text.parse().expect("an address"));
    let (namespace, name) = (String::from("demo"), String::from("web"));
    let settings = mesh::MeshConfig {
        trust_domain: "cluster.local".into(),
        trust_bundle: vec![root()],
        services_complete: true,
        node_addresses: vec![address("192.168.0.1")],
    };
    let workload = mesh::Workload {
        uid: "uid-1".into(),
        namespace: namespace.clone(),
        name: name.clone(),
        service_account: "web".into(),
        addresses: vec![address("10.1.0.5"), address("fd00::5")],
        node: "node-1".into(),
        node_addresses: vec![address("192.168.0.1")],
        state: mesh::EnrolmentState::Enforced.into(),
        tunnel: mesh::TunnelKind::Warren.into(),
        exclude_inbound_ports: vec![9000],
        exclude_outbound_cidrs: vec!["10.9.0.0/16".into()],
        ..Default::default()
    };
    let service = mesh::Service {
        namespace: namespace.clone(),
        name: name.clone(),
        addresses: vec![address("10.96.0.10")],
        ports: vec![mesh::ServicePort {
            name: "http".into(),
            port: 80,
            node_port: 30080,
            app_protocol: "http".into(),
        }],
        traffic_distribution: "PreferSameZone".into(),
        ..Default::default()
    };
    let slice = mesh::EndpointSlice {
        namespace: namespace.clone(),
        name: "web-1".into(),
        service: name.clone(),
        ports: vec![mesh::EndpointPort {
            name: "http".into(),
            port: 8080,
        }],
        endpoints: vec![mesh::Endpoint {
            address: address("10.1.0.5"),
            ready: true,
            serving: true,
            ..Default::default()
        }],
    };
    let route = |name: &str, from: &str, created: i64| mesh::Route {
        kind: mesh::RouteKind::Http.into(),
        namespace: from.into(),
        name: name.into(),
        created,
        parents: vec![mesh::RouteParent {
            namespace: "demo".into(),
            service: "web".into(),
            ..Default::default()
        }],
        rules: vec![mesh::RouteRule {
            backends: vec![mesh::RouteBackend {
                namespace: "demo".into(),
                service: "web".into(),
                port: 80,
                weight: 1,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let policy = mesh::TrafficPolicy {
        namespace: namespace.clone(),
        name: "p".into(),
        targets: vec![mesh::PolicyTarget {
            kind: mesh::PolicyTargetKind::Service.into(),
            name: name.clone(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let backend_policy = mesh::BackendTrafficPolicy {
        namespace,
        name: "b".into(),
        services: vec![name],
        session_persistence: Some(mesh::SessionPersistence::default()),
        ..Default::default()
    };
    let op = |kind: Kind, message: &[u8]| {
        let number = Kind::ALL
            .iter()
            .position(|k| *k == kind)
            .expect("one of all");
        [&[number as u8][..], &part(message)].concat()
    };
    let (older, newer) = (route("a", "demo", 1), route("b", "demo", 2));
    let consumer = route("c", "other", 3);
    let all = [
        op(Kind::Workload, &workload.encode_to_vec()),
        op(Kind::MeshConfig, &settings.encode_to_vec()),
        op(Kind::Service, &service.encode_to_vec()),
        op(Kind::EndpointSlice, &slice.encode_to_vec()),
        op(Kind::Route, &newer.encode_to_vec()),
        op(Kind::Route, &older.encode_to_vec()),
        op(Kind::Route, &consumer.encode_to_vec()),
        op(Kind::TrafficPolicy, &policy.encode_to_vec()),
        op(Kind::BackendTrafficPolicy, &backend_policy.encode_to_vec()),
    ];
    let mut removal = all[2].clone();
    removal[0] |= 0x80;
    let mut seeds = vec![all.concat(), [all.concat(), removal].concat()];
    seeds.extend(all);
    seeds
}

fn root() -> Bytes {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).expect("a certificate");
    Bytes::copy_from_slice(root.der())
}
