//! Services: their addresses, and their EndpointSlices as the endpoint-slice controller would write them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::cluster::{Cluster, Key, Phase, PodRecord};
use super::deployments::selects;
use super::plan::Plan;

/// Label that says which Service a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Sets cluster IPs and node ports: those of the existing object of that name are kept, those the user wrote
/// are honoured, the rest is given out. Both families unless `ipFamilyPolicy` or `ipFamilies` say otherwise.
pub(crate) fn assign(
    service: &mut Service,
    existing: Option<&Service>,
    others: &BTreeMap<Key, Service>,
    plan: Plan,
) -> Result<(), String> {
    let old = existing.and_then(|s| s.spec.as_ref());
    let spec = service.spec.get_or_insert_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        return Ok(());
    }
    assign_node_ports(service, existing, others)?;
    let spec = service.spec.get_or_insert_default();
    let mut ips: Vec<String> = spec.cluster_ips.clone().unwrap_or_default();
    if let Some(ip) = spec
        .cluster_ip
        .clone()
        .filter(|ip| !ip.is_empty() && !ips.contains(ip))
    {
        ips.insert(0, ip);
    }
    let families = families(
        spec.ip_family_policy.as_deref(),
        spec.ip_families.as_deref(),
        &ips,
    );
    if ips.iter().any(|ip| ip == "None") {
        ips = vec!["None".into()];
    } else {
        let used = used_addresses(others);
        for ip in &ips {
            if used.contains(ip) {
                return Err(format!("spec.clusterIPs: {ip} is another Service's"));
            }
        }
        if ips.is_empty() {
            let kept = old.and_then(|s| s.cluster_ips.clone()).unwrap_or_default();
            ips.extend(kept.into_iter().filter(|ip| ip != "None"));
        }
        let wanted = |ip: &String| families.iter().any(|f| *f == family_of(ip));
        ips.retain(wanted);
        let missing: Vec<&str> = families
            .iter()
            .copied()
            .filter(|family| !ips.iter().any(|ip| family_of(ip) == *family))
            .collect();
        if !missing.is_empty() {
            let pair = (FIRST_GIVEN..u16::MAX)
                .map(|i| plan.cluster_ip(i).both().map(|ip| ip.to_string()))
                .find(|pair| !pair.iter().any(|ip| used.contains(ip) || ips.contains(ip)))
                .ok_or("all cluster IPs are given out")?;
            for family in missing {
                ips.extend(pair.iter().filter(|ip| family_of(ip) == family).cloned());
            }
        }
        ips.sort_by_key(|ip| families.iter().position(|f| *f == family_of(ip)));
    }
    let policy = if families.len() > 1 {
        "PreferDualStack"
    } else {
        "SingleStack"
    };
    spec.ip_family_policy.get_or_insert_with(|| policy.into());
    spec.ip_families = Some(families.into_iter().map(str::to_owned).collect());
    spec.cluster_ip = ips.first().cloned();
    spec.cluster_ips = Some(ips);
    Ok(())
}

/// Left free below: addresses that people like to choose themselves.
const FIRST_GIVEN: u16 = 10;

fn families(policy: Option<&str>, asked: Option<&[String]>, ips: &[String]) -> Vec<&'static str> {
    let mut families: Vec<&'static str> = Vec::new();
    let names = asked.unwrap_or_default().iter().map(String::as_str);
    let of_ips = ips
        .iter()
        .filter(|ip| *ip != "None")
        .map(|ip| family_of(ip));
    for name in names.chain(of_ips) {
        let family = if name == "IPv6" { "IPv6" } else { "IPv4" };
        if !families.contains(&family) {
            families.push(family);
        }
    }
    let single = policy == Some("SingleStack") || (policy.is_none() && asked.is_some());
    if families.is_empty() {
        families.push("IPv4");
    }
    if !single {
        let other = if families[0] == "IPv4" {
            "IPv6"
        } else {
            "IPv4"
        };
        if families.len() == 1 {
            families.push(other);
        }
    } else {
        families.truncate(1);
    }
    families
}

fn family_of(ip: &str) -> &'static str {
    if ip.contains(':') { "IPv6" } else { "IPv4" }
}

fn used_addresses(services: &BTreeMap<Key, Service>) -> BTreeSet<String> {
    services
        .values()
        .flat_map(addresses)
        .map(|ip| ip.to_string())
        .collect()
}

fn assign_node_ports(
    service: &mut Service,
    existing: Option<&Service>,
    others: &BTreeMap<Key, Service>,
) -> Result<(), String> {
    let spec = service.spec.get_or_insert_default();
    if !matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer")) {
        return Ok(());
    }
    let mut used: BTreeSet<i32> = others
        .values()
        .flat_map(ports)
        .filter_map(|p| p.node_port)
        .collect();
    for port in spec.ports.iter_mut().flatten() {
        let kept = existing.and_then(|s| ports(s).find(|p| p.port == port.port)?.node_port);
        let free = || NODE_PORTS.clone().find(|p| !used.contains(p));
        let node_port = port.node_port.or(kept).or_else(free);
        let node_port = node_port.ok_or("all node ports are given out")?;
        if !used.insert(node_port) {
            return Err(format!(
                "spec.ports: node port {node_port} is another Service's"
            ));
        }
        port.node_port = Some(node_port);
    }
    Ok(())
}

const NODE_PORTS: std::ops::RangeInclusive<i32> = 30000..=32767;

/// Cluster IPs and external IPs; empty for headless Services.
pub(crate) fn addresses(service: &Service) -> Vec<IpAddr> {
    let spec = service.spec.as_ref();
    let own = spec
        .and_then(|s| s.cluster_ips.as_deref())
        .unwrap_or_default();
    own.iter().filter_map(|ip| ip.parse().ok()).collect()
}

/// Whether it has no address of its own and stands for its pods' addresses.
pub(crate) fn is_headless(service: &Service) -> bool {
    let ip = service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref());
    ip == Some("None")
}

pub(crate) fn ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    service.spec.iter().flat_map(|s| s.ports.iter().flatten())
}

/// Whether a slice is one of a Service's.
pub(crate) fn belongs_to(slice: &EndpointSlice, (namespace, name): &Key) -> bool {
    let labels = slice.metadata.labels.as_ref();
    slice.metadata.namespace.as_ref() == Some(namespace)
        && labels.and_then(|l| l.get(SERVICE_NAME)) == Some(name)
}

/// Whether an endpoint gets new connections. An unset condition means that it does.
pub(crate) fn takes_traffic(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    conditions.and_then(|c| c.ready).unwrap_or(true)
}

/// All slices: the user's own, and those of Services with a selector.
pub(crate) fn all_slices(cluster: &Cluster) -> Vec<EndpointSlice> {
    let made = cluster
        .services
        .iter()
        .flat_map(|(key, service)| slices(cluster, key, service));
    cluster.slices.values().cloned().chain(made).collect()
}

/// The slices of one Service: one for each address family and set of target ports.
fn slices(cluster: &Cluster, (namespace, name): &Key, service: &Service) -> Vec<EndpointSlice> {
    let Some(spec) = service.spec.as_ref() else {
        return Vec::new();
    };
    let Some(selector) = spec.selector.as_ref().filter(|s| !s.is_empty()) else {
        return Vec::new();
    };
    let both = ["IPv4".to_owned(), "IPv6".to_owned()];
    let mut slices = Vec::new();
    for family in spec.ip_families.as_deref().unwrap_or(&both) {
        // The same target ports are the rule; a named port may differ from pod to pod.
        let mut groups: Vec<(Vec<EndpointPort>, Vec<Endpoint>)> = Vec::new();
        for ((ns, pod_name), pod) in &cluster.pods {
            let over = matches!(pod.life.phase, Phase::Succeeded | Phase::Failed);
            if ns != namespace || over || !selects(selector, pod.labels()) {
                continue;
            }
            let ip = pod
                .life
                .ips
                .iter()
                .map(ToString::to_string)
                .find(|ip| family_of(ip) == family);
            let Some(ip) = ip else { continue };
            let ports = endpoint_ports(service, pod);
            let publish = spec.publish_not_ready_addresses == Some(true);
            let mut endpoint = endpoint(ns, pod_name, pod, ip, publish);
            endpoint.zone = cluster.zones.get(pod.node()).cloned();
            match groups.iter_mut().find(|(p, _)| *p == ports) {
                Some((_, endpoints)) => endpoints.push(endpoint),
                None => groups.push((ports, vec![endpoint])),
            }
        }
        if groups.is_empty() {
            groups.push((Vec::new(), Vec::new()));
        }
        for (i, (ports, mut endpoints)) in groups.into_iter().enumerate() {
            hint(&mut endpoints, spec.traffic_distribution.as_deref());
            let mut slice = EndpointSlice {
                address_type: family.clone(),
                ports: Some(ports),
                endpoints: Some(endpoints),
                ..EndpointSlice::default()
            };
            let suffix = if i == 0 {
                String::new()
            } else {
                format!("-{i}")
            };
            slice.metadata.namespace = Some(namespace.clone());
            slice.metadata.name = Some(format!("{name}-{}{suffix}", family.to_lowercase()));
            slice.metadata.labels = Some([(SERVICE_NAME.into(), name.clone())].into());
            slices.push(slice);
        }
    }
    slices
}

/// Who should prefer which endpoint, as the endpoint-slice controller says it for `trafficDistribution`
/// (KEP-3015, KEP-4444): every endpoint that takes traffic is for its own zone, with `PreferSameNode` also for
/// its own node. Without a zone for each of them there are no zone hints.
fn hint(endpoints: &mut [Endpoint], distribution: Option<&str>) {
    let by_node = match distribution {
        Some("PreferSameNode") => true,
        Some("PreferSameZone" | "PreferClose") => false,
        _ => return,
    };
    let all_have_zones = endpoints
        .iter()
        .filter(|e| takes_traffic(e))
        .all(|e| e.zone.is_some());
    for endpoint in endpoints.iter_mut().filter(|e| takes_traffic(e)) {
        let zone = endpoint.zone.clone().filter(|_| all_have_zones);
        let node = endpoint.node_name.clone().filter(|_| by_node);
        let hints = EndpointHints {
            for_zones: zone.map(|name| vec![ForZone { name }]),
            for_nodes: node.map(|name| vec![ForNode { name }]),
        };
        let any = hints.for_zones.is_some() || hints.for_nodes.is_some();
        endpoint.hints = any.then_some(hints);
    }
}

fn endpoint(
    namespace: &str,
    name: &str,
    pod: &PodRecord,
    ip: String,
    publish_not_ready: bool,
) -> Endpoint {
    Endpoint {
        addresses: vec![ip],
        conditions: Some(EndpointConditions {
            ready: Some(publish_not_ready || pod.is_ready()),
            serving: Some(publish_not_ready || pod.life.ready),
            terminating: Some(pod.life.terminating),
        }),
        node_name: Some(pod.node().to_owned()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: Some(namespace.into()),
            name: Some(name.into()),
            uid: Some(pod.uid().into()),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

fn endpoint_ports(service: &Service, pod: &PodRecord) -> Vec<EndpointPort> {
    ports(service)
        .filter_map(|port| {
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(target_port(port, pod)?),
                protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".into())),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

/// `None`: the pod has no port of that name.
fn target_port(port: &ServicePort, pod: &PodRecord) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let containers = pod.spec().into_iter().flat_map(|s| &s.containers);
            let mut ports = containers.flat_map(|c| c.ports.iter().flatten());
            let found = ports.find(|p| p.name.as_deref() == Some(name));
            found
                .map(|p| p.container_port)
                .or_else(|| name.parse().ok())
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
