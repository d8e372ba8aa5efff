//! What the types cannot tell: names, ports, addresses, and Warren's own labels and annotations.
//!
//! Only rules that Kubernetes' API server has too, and Warren's own; what it would take is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use mesh_api::names::{MESH_LABEL, MODE_LABEL};

use super::object::Object;
use crate::model::{
    Exclusions, FieldMistake, mesh_label, mode_label, probe_mistakes, tunnel_annotation,
};
use crate::providers::field::{Found, Step, below, steps};
use crate::providers::{gateway, traffic_policy};

/// Everything that is wrong with an object.
pub(super) fn mistakes(object: &Object) -> Vec<Found> {
    let mut found = Vec::new();
    metadata(object, &mut found);
    match object {
        Object::Namespace(o) => {
            let labels = o.metadata.labels.as_ref();
            label(labels, MESH_LABEL, mesh_label, &mut found);
            label(labels, MODE_LABEL, mode_label, &mut found);
        }
        Object::Node(o) => node(o, &mut found),
        Object::Pod(o) => {
            pod_metadata(&o.metadata, &[], &mut found);
            pod_spec(o.spec.as_ref(), &["spec".into()], &mut found);
            pod_status(o, &mut found);
        }
        Object::Deployment(o) => {
            let template = o.spec.as_ref().map(|s| &s.template);
            let mut at = steps!["spec", "template"];
            if let Some(metadata) = template.and_then(|t| t.metadata.as_ref()) {
                pod_metadata(metadata, &at, &mut found);
            }
            at.push("spec".into());
            pod_spec(template.and_then(|t| t.spec.as_ref()), &at, &mut found);
            if o.spec
                .as_ref()
                .and_then(|s| s.replicas)
                .is_some_and(|n| n < 0)
            {
                found.push((steps!["spec", "replicas"], "expected 0 or more".into()));
            }
        }
        Object::Service(o) => service(o, &mut found),
        Object::EndpointSlice(o) => slice(o, &mut found),
        Object::ServiceAccount(_) => {}
        Object::HttpRoute(o) => found.extend(gateway::check::http_route(&o.spec)),
        Object::GrpcRoute(o) => found.extend(gateway::check::grpc_route(&o.spec)),
        Object::TlsRoute(o) => found.extend(gateway::check::tls_route(&o.spec)),
        Object::TcpRoute(o) => found.extend(gateway::check::tcp_route(&o.spec)),
        Object::BackendTrafficPolicy(o) => {
            found.extend(gateway::check::backend_traffic_policy(&o.spec));
        }
        Object::TrafficPolicy(o) => found.extend(traffic_policy::check::mistakes(&o.spec)),
    }
    found
}

fn metadata(object: &Object, found: &mut Vec<Found>) {
    let metadata = object.metadata();
    let name = metadata.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        found.push((
            steps!["metadata", "name"],
            "expected the name of the object".into(),
        ));
    } else if !is_dns_name(name) {
        let message = format!("expected a name of a-z, 0-9, '-' and '.', found {name:?}");
        found.push((steps!["metadata", "name"], message));
    }
    if let Some(namespace) = &metadata.namespace
        && (!is_dns_name(namespace) || namespace.contains('.'))
    {
        let message = format!("expected a name of a-z, 0-9 and '-', found {namespace:?}");
        found.push((steps!["metadata", "namespace"], message));
    }
}

fn pod_metadata(
    metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    at: &[Step],
    found: &mut Vec<Found>,
) {
    let mut own = Vec::new();
    label(metadata.labels.as_ref(), MESH_LABEL, mesh_label, &mut own);
    if let Some(annotations) = &metadata.annotations {
        let (_, mut mistakes) = Exclusions::read(annotations);
        mistakes.extend(tunnel_annotation(annotations).err());
        for FieldMistake { key, message } in mistakes {
            own.push((steps!["metadata", "annotations", key], message));
        }
    }
    found.extend(
        own.into_iter()
            .map(|(path, message)| (below(at, path), message)),
    );
}

fn pod_spec(spec: Option<&k8s::PodSpec>, at: &[Step], found: &mut Vec<Found>) {
    let Some(spec) = spec else {
        found.push((at.to_vec(), "expected what the pod runs".into()));
        return;
    };
    if spec.containers.is_empty() {
        found.push((
            below(at, steps!["containers"]),
            "expected at least one container".into(),
        ));
    }
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let mut names = BTreeSet::new();
    for (list, containers) in [
        ("containers", spec.containers.as_slice()),
        ("initContainers", init),
    ] {
        for (i, container) in containers.iter().enumerate() {
            let name = below(at, steps![list, i, "name"]);
            if container.name.is_empty() {
                found.push((name, "expected the name of the container".into()));
            } else if !names.insert(&container.name) {
                found.push((
                    name,
                    format!("{:?} is taken by another container", container.name),
                ));
            }
            for (j, p) in container.ports.iter().flatten().enumerate() {
                let path = below(at, steps![list, i, "ports", j, "containerPort"]);
                port(p.container_port, path, found);
            }
        }
    }
    for mistake in probe_mistakes(spec) {
        let path = steps![mistake.list, mistake.index, mistake.field];
        found.push((below(at, path), mistake.message));
    }
}

fn pod_status(pod: &k8s::Pod, found: &mut Vec<Found>) {
    let Some(status) = &pod.status else { return };
    for (i, ip) in status.pod_ips.iter().flatten().enumerate() {
        address(&ip.ip, steps!["status", "podIPs", i, "ip"], found);
    }
    if let Some(ip) = &status.pod_ip {
        address(ip, steps!["status", "podIP"], found);
    }
}

fn node(node: &k8s::Node, found: &mut Vec<Found>) {
    let addresses = node
        .status
        .iter()
        .flat_map(|s| s.addresses.iter().flatten());
    for (i, a) in addresses
        .enumerate()
        .filter(|(_, a)| a.type_ == "InternalIP")
    {
        address(
            &a.address,
            steps!["status", "addresses", i, "address"],
            found,
        );
    }
}

fn service(service: &k8s::Service, found: &mut Vec<Found>) {
    let Some(spec) = &service.spec else {
        found.push((steps!["spec"], "expected what the Service is for".into()));
        return;
    };
    let external = spec.type_.as_deref() == Some("ExternalName");
    let ports = spec.ports.as_deref().unwrap_or_default();
    if ports.is_empty() && !external && spec.cluster_ip.as_deref() != Some("None") {
        found.push((steps!["spec", "ports"], "expected at least one port".into()));
    }
    let mut names = BTreeSet::new();
    for (i, p) in ports.iter().enumerate() {
        port(p.port, steps!["spec", "ports", i, "port"], found);
        if let Some(number) = p.node_port.filter(|n| *n != 0) {
            port(number, steps!["spec", "ports", i, "nodePort"], found);
        }
        protocol(
            p.protocol.as_deref(),
            steps!["spec", "ports", i, "protocol"],
            found,
        );
        let name = p.name.as_deref().unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            let message = "expected a name, as there are several ports";
            found.push((steps!["spec", "ports", i, "name"], message.into()));
        } else if !names.insert(name) {
            let message = format!("{name:?} is taken by another port");
            found.push((steps!["spec", "ports", i, "name"], message));
        }
    }
    let is_address = |text: &&String| !text.is_empty() && *text != "None";
    if let Some(ip) = spec.cluster_ip.as_ref().filter(is_address) {
        address(ip, steps!["spec", "clusterIP"], found);
    }
    for (field, list) in [
        ("clusterIPs", &spec.cluster_ips),
        ("externalIPs", &spec.external_ips),
    ] {
        for (i, ip) in list
            .iter()
            .flatten()
            .enumerate()
            .filter(|(_, ip)| is_address(ip))
        {
            address(ip, steps!["spec", field, i], found);
        }
    }
}

fn slice(slice: &EndpointSlice, found: &mut Vec<Found>) {
    let v4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        "FQDN" => return,
        other => {
            let message = format!("expected IPv4, IPv6 or FQDN, found {other:?}");
            found.push((steps!["addressType"], message));
            return;
        }
    };
    for (i, p) in slice.ports.iter().flatten().enumerate() {
        if let Some(number) = p.port {
            port(number, steps!["ports", i, "port"], found);
        }
        protocol(p.protocol.as_deref(), steps!["ports", i, "protocol"], found);
    }
    for (i, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        if endpoint.addresses.is_empty() {
            let message = "expected at least one address";
            found.push((steps!["endpoints", i, "addresses"], message.into()));
        }
        for (j, text) in endpoint.addresses.iter().enumerate() {
            if !text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4() == v4) {
                let path = steps!["endpoints", i, "addresses", j];
                let message = format!("expected an {} address, found {text:?}", slice.address_type);
                found.push((path, message));
            }
        }
    }
}

fn label<T>(
    labels: Option<&BTreeMap<String, String>>,
    key: &'static str,
    read: impl Fn(&str) -> Result<T, FieldMistake>,
    found: &mut Vec<Found>,
) {
    if let Some(value) = labels.and_then(|l| l.get(key))
        && let Err(mistake) = read(value)
    {
        found.push((steps!["metadata", "labels", key], mistake.message));
    }
}

fn port(number: i32, path: Vec<Step>, found: &mut Vec<Found>) {
    if !(1..=65535).contains(&number) {
        let message = format!("expected a port from 1 to 65535, found {number}");
        found.push((path, message));
    }
}

fn protocol(protocol: Option<&str>, path: Vec<Step>, found: &mut Vec<Found>) {
    if let Some(other) = protocol.filter(|p| !["", "TCP", "UDP", "SCTP"].contains(p)) {
        found.push((path, format!("expected TCP, UDP or SCTP, found {other:?}")));
    }
}

fn address(text: &str, path: Vec<Step>, found: &mut Vec<Found>) {
    if text.parse::<IpAddr>().is_err() {
        found.push((path, format!("expected an IP address, found {text:?}")));
    }
}

/// DNS-1123 subdomain.
pub(crate) fn is_dns_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    name.len() <= 253
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(inner)
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}
