//! Services, EndpointSlices and Nodes, as far as the data plane uses them: TCP ports and addresses.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::api::discovery::v1 as discovery;
use mesh_api::names::address_to_bytes;
use mesh_api::proto::mesh::{Endpoint, EndpointPort, EndpointSlice, Service, ServicePort};

use super::Warning;

/// Label that says which Service a slice belongs to.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// `None`: it is an alias in DNS and has no address of its own.
pub(super) fn service(manifest: &k8s::Service, warnings: &mut Vec<Warning>) -> Option<Service> {
    let namespace = manifest.metadata.namespace.clone()?;
    let name = manifest.metadata.name.clone()?;
    let spec = manifest.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let ingress = manifest
        .status
        .iter()
        .flat_map(|s| &s.load_balancer)
        .flat_map(|l| l.ingress.iter().flatten())
        .flat_map(|i| &i.ip);
    let mut addresses: Vec<IpAddr> = Vec::new();
    let texts = (spec.cluster_ip.iter())
        .chain(spec.cluster_ips.iter().flatten())
        .chain(spec.external_ips.iter().flatten())
        .chain(ingress)
        .filter(|text| !text.is_empty() && *text != "None");
    for text in texts {
        match text.parse::<IpAddr>() {
            Ok(address) if !addresses.contains(&address) => addresses.push(address),
            Ok(_) => {}
            Err(_) => {
                let message = format!("{text:?} is no address and is ignored");
                warnings.push(Warning::new("Service", &namespace, &name, message));
            }
        }
    }
    let ports = spec
        .ports
        .iter()
        .flatten()
        .filter(|p| is_tcp(p.protocol.as_deref()))
        .filter_map(|p| {
            Some(ServicePort {
                name: p.name.clone().unwrap_or_default(),
                port: port(p.port)?,
                node_port: p.node_port.and_then(port).unwrap_or(0),
                app_protocol: p.app_protocol.clone().unwrap_or_default(),
            })
        })
        .collect();
    Some(Service {
        namespace,
        name,
        addresses: addresses.into_iter().map(address_to_bytes).collect(),
        ports,
        internal_traffic_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        traffic_distribution: spec.traffic_distribution.clone().unwrap_or_default(),
    })
}

/// `None`: the slice belongs to no Service or holds no addresses.
pub(super) fn slice(
    manifest: &discovery::EndpointSlice,
    warnings: &mut Vec<Warning>,
) -> Option<EndpointSlice> {
    let namespace = manifest.metadata.namespace.clone()?;
    let name = manifest.metadata.name.clone()?;
    let service = manifest.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
    if !["IPv4", "IPv6"].contains(&manifest.address_type.as_str()) {
        return None;
    }
    let ports = manifest
        .ports
        .iter()
        .flatten()
        .filter(|p| is_tcp(p.protocol.as_deref()))
        .filter_map(|p| {
            Some(EndpointPort {
                name: p.name.clone().unwrap_or_default(),
                port: port(p.port?)?,
            })
        })
        .collect();
    let mut endpoints = Vec::new();
    for endpoint in manifest.endpoints.iter().flatten() {
        // The addresses of one endpoint are interchangeable; consumers use the first.
        let Some(text) = endpoint.addresses.first() else {
            continue;
        };
        let Ok(address) = text.parse() else {
            let message = format!("{text:?} is no address and is ignored");
            warnings.push(Warning::new("EndpointSlice", &namespace, &name, message));
            continue;
        };
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref();
        // An unset condition means ready; an unset `serving` means what `ready` says.
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        endpoints.push(Endpoint {
            address: address_to_bytes(address),
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            node: endpoint.node_name.clone().unwrap_or_default(),
            zone: endpoint.zone.clone().unwrap_or_default(),
            for_zones: hints
                .iter()
                .flat_map(|h| h.for_zones.iter().flatten())
                .map(|zone| zone.name.clone())
                .collect(),
            for_nodes: hints
                .iter()
                .flat_map(|h| h.for_nodes.iter().flatten())
                .map(|node| node.name.clone())
                .collect(),
        });
    }
    Some(EndpointSlice {
        namespace,
        name,
        service: service.clone(),
        ports,
        endpoints,
    })
}

/// The node's InternalIPs, the first of each family: where its tunnel listener is.
pub(super) fn node_addresses(node: &k8s::Node, warnings: &mut Vec<Warning>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let all = node
        .status
        .iter()
        .flat_map(|s| s.addresses.iter().flatten());
    for address in all.filter(|a| a.type_ == "InternalIP") {
        match address.address.parse::<IpAddr>() {
            Ok(ip) if addresses.iter().any(|a| a.is_ipv4() == ip.is_ipv4()) => {}
            Ok(ip) => addresses.push(ip),
            Err(_) => {
                let name = node.metadata.name.as_deref().unwrap_or_default();
                let message = format!(
                    "InternalIP {:?} is no address and is ignored",
                    address.address
                );
                warnings.push(Warning::new("Node", "", name, message));
            }
        }
    }
    addresses
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}

fn port(number: i32) -> Option<u32> {
    u16::try_from(number).ok().filter(|p| *p > 0).map(u32::from)
}
