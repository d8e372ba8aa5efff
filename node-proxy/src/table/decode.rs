//! Resources as the controller sends them -> the types of the table. Everything that is not as the
//! protocol says is an error that names the field.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::identity::Identity;
use mesh_api::names::address_from_bytes;
use mesh_api::proto::mesh;
use mesh_api::proto::mesh::{EnrolmentState, TunnelKind};
use mesh_api::tls;
use prost::Message;

use super::{Mesh, TrafficDistribution, Workload};
use crate::http::route::Session;

/// A Service before it is joined to its endpoints.
pub(super) struct ServiceSpec {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: Vec<PortSpec>,
    pub(super) internal_traffic_local: bool,
    pub(super) traffic_distribution: TrafficDistribution,
}

pub(super) struct PortSpec {
    pub(super) port: u16,
    pub(super) name: Arc<str>,
    pub(super) node_port: Option<u16>,
    pub(super) app_protocol: Arc<str>,
}

/// An EndpointSlice.
pub(super) struct Slice {
    /// Resource name of its Service.
    pub(super) service: Arc<str>,
    /// Port name -> port of the endpoints.
    pub(super) ports: Vec<(Arc<str>, u16)>,
    pub(super) endpoints: Vec<SliceEndpoint>,
}

pub(super) struct SliceEndpoint {
    pub(super) address: IpAddr,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    pub(super) node: Arc<str>,
    pub(super) zone: Arc<str>,
    pub(super) for_zones: Vec<Arc<str>>,
    pub(super) for_nodes: Vec<Arc<str>>,
}

pub(super) fn workload(
    name: &str,
    value: &[u8],
    trust_domain: &str,
    interner: &mut Interner,
) -> Result<Workload, String> {
    let w = mesh::Workload::decode(value).map_err(|e| e.to_string())?;
    named(name, &w.uid, "uid")?;
    let identity =
        Identity::new(trust_domain, &w.namespace, &w.service_account).map_err(|e| e.to_string())?;
    let state = match w.state() {
        EnrolmentState::Unspecified => return Err(unknown("state", w.state)),
        state => state,
    };
    let tunnel = match w.tunnel() {
        TunnelKind::Unspecified => return Err(unknown("tunnel", w.tunnel)),
        tunnel => tunnel,
    };
    let node_addresses = addresses("nodeAddresses", &w.node_addresses)?;
    if w.addresses.is_empty() {
        return Err("addresses: a pod has at least one".into());
    }
    if tunnel == TunnelKind::Warren && (w.node.is_empty() || node_addresses.is_empty()) {
        return Err("node, nodeAddresses: needed for a tunnel to the node".into());
    }
    let name = filled("name", &w.name)?;
    let owner = if w.owner.is_empty() { name } else { &w.owner };
    Ok(Workload {
        uid: w.uid.as_str().into(),
        identity: interner.identity(identity),
        name: name.into(),
        owner: interner.text(owner),
        addresses: addresses("addresses", &w.addresses)?,
        node: interner.text(&w.node),
        node_addresses,
        state,
        tunnel,
        exclude_inbound_ports: ports("excludeInboundPorts", &w.exclude_inbound_ports)?,
        exclude_outbound_ports: ports("excludeOutboundPorts", &w.exclude_outbound_ports)?,
        exclude_outbound_cidrs: w
            .exclude_outbound_cidrs
            .iter()
            .map(|c| {
                c.parse::<IpNet>()
                    .map_err(|_| format!("excludeOutboundCidrs: {c:?} is no CIDR"))
            })
            .collect::<Result<_, _>>()?,
    })
}

/// Stands in for a workload that is not valid and was not known before: its addresses are in the
/// mesh and nothing can reach them, because plaintext to them must not be the answer to a mistake.
/// `None`: not even the addresses can be read.
pub(super) fn quarantined(name: &str, value: &[u8], trust_domain: &str) -> Option<Workload> {
    let w = mesh::Workload::decode(value).ok()?;
    let addresses: Vec<_> = w
        .addresses
        .iter()
        .filter_map(|b| address("addresses", b).ok())
        .collect();
    let identity = Identity::new(trust_domain, &w.namespace, &w.service_account).ok()?;
    (!addresses.is_empty()).then(|| Workload {
        uid: name.into(),
        identity,
        name: w.name.as_str().into(),
        owner: w.name.as_str().into(),
        addresses,
        node: "".into(),
        node_addresses: Vec::new(),
        state: EnrolmentState::Enforced,
        tunnel: TunnelKind::Warren,
        exclude_inbound_ports: Vec::new(),
        exclude_outbound_ports: Vec::new(),
        exclude_outbound_cidrs: Vec::new(),
    })
}

pub(super) fn service(
    name: &str,
    value: &[u8],
    interner: &mut Interner,
) -> Result<ServiceSpec, String> {
    let s = mesh::Service::decode(value).map_err(|e| e.to_string())?;
    filled("namespace", &s.namespace)?;
    filled("name", &s.name)?;
    named(
        name,
        &format!("{}/{}", s.namespace, s.name),
        "namespace/name",
    )?;
    let mut declared = HashSet::new();
    let mut ports = Vec::with_capacity(s.ports.len());
    for p in &s.ports {
        let number = port("ports.port", p.port)?;
        if !declared.insert(number) {
            return Err(format!("ports.port: {number} is declared twice"));
        }
        ports.push(PortSpec {
            port: number,
            name: interner.text(&p.name),
            node_port: match p.node_port {
                0 => None,
                n => Some(port("ports.nodePort", n)?),
            },
            app_protocol: interner.text(&p.app_protocol),
        });
    }
    Ok(ServiceSpec {
        namespace: interner.text(&s.namespace),
        name: s.name.as_str().into(),
        addresses: addresses("addresses", &s.addresses)?,
        ports,
        internal_traffic_local: s.internal_traffic_local,
        traffic_distribution: match s.traffic_distribution.as_str() {
            "PreferSameZone" | "PreferClose" => TrafficDistribution::PreferSameZone,
            "PreferSameNode" => TrafficDistribution::PreferSameNode,
            // A preference that is not known is none (KEP-4444).
            _ => TrafficDistribution::Any,
        },
    })
}

pub(super) fn slice(name: &str, value: &[u8], interner: &mut Interner) -> Result<Slice, String> {
    let s = mesh::EndpointSlice::decode(value).map_err(|e| e.to_string())?;
    named(
        name,
        &format!("{}/{}", s.namespace, s.name),
        "namespace/name",
    )?;
    filled("service", &s.service)?;
    let slice_ports = s
        .ports
        .iter()
        .map(|p| Ok((interner.text(&p.name), port("ports.port", p.port)?)))
        .collect::<Result<_, String>>()?;
    let endpoints = s
        .endpoints
        .iter()
        .map(|e| {
            Ok(SliceEndpoint {
                address: address("endpoints.address", &e.address)?,
                ready: e.ready,
                serving: e.serving,
                terminating: e.terminating,
                node: interner.text(&e.node),
                zone: interner.text(&e.zone),
                for_zones: e.for_zones.iter().map(|z| interner.text(z)).collect(),
                for_nodes: e.for_nodes.iter().map(|n| interner.text(n)).collect(),
            })
        })
        .collect::<Result<_, String>>()?;
    Ok(Slice {
        service: interner.text(&format!("{}/{}", s.namespace, s.service)),
        ports: slice_ports,
        endpoints,
    })
}

pub(super) fn mesh(name: &str, value: &[u8]) -> Result<Mesh, String> {
    let m = mesh::MeshConfig::decode(value).map_err(|e| e.to_string())?;
    named(name, "mesh", "name")?;
    Identity::new(&m.trust_domain, "x", "x").map_err(|_| {
        format!(
            "trustDomain: {:?} is not made of a-z 0-9 . - _",
            m.trust_domain
        )
    })?;
    tls::roots(m.trust_bundle.iter().map(|der| der.as_ref()))
        .map_err(|e| format!("trustBundle: {e}"))?;
    Ok(Mesh {
        trust_domain: m.trust_domain,
        trust_bundle: m.trust_bundle.iter().map(|der| der.to_vec()).collect(),
        services_complete: m.services_complete,
        node_addresses: addresses("nodeAddresses", &m.node_addresses)?
            .into_iter()
            .collect(),
    })
}

/// With the session persistence it declares.
pub(super) fn backend_policy(
    name: &str,
    value: &[u8],
) -> Result<(mesh::BackendTrafficPolicy, Option<Arc<Session>>), String> {
    let p = mesh::BackendTrafficPolicy::decode(value).map_err(|e| e.to_string())?;
    let own = format!("{}/{}", p.namespace, p.name);
    named(name, &own, "namespace/name")?;
    for service in &p.services {
        filled("services", service)?;
    }
    let session = p.session_persistence.as_ref();
    let session = session
        .map(|s| Session::compile(s, &own, None))
        .transpose()?;
    Ok((p, session.map(Arc::new)))
}

pub(super) fn traffic_policy(name: &str, value: &[u8]) -> Result<mesh::TrafficPolicy, String> {
    let p = mesh::TrafficPolicy::decode(value).map_err(|e| e.to_string())?;
    named(
        name,
        &format!("{}/{}", p.namespace, p.name),
        "namespace/name",
    )?;
    for target in &p.targets {
        filled("targets.name", &target.name)?;
        if target.kind() == mesh::PolicyTargetKind::Unspecified {
            return Err(unknown("targets.kind", target.kind));
        }
    }
    Ok(p)
}

/// Keeps one copy of texts and identities that many resources share.
#[derive(Default)]
pub(super) struct Interner {
    texts: HashSet<Arc<str>>,
    identities: HashSet<Identity>,
    prune_at: usize,
}

impl Interner {
    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= self.prune_at {
            self.texts.retain(|t| Arc::strong_count(t) > 1);
            self.prune_at = (self.texts.len() * 2).max(256);
        }
        let text: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&text));
        text
    }

    fn identity(&mut self, identity: Identity) -> Identity {
        if let Some(known) = self.identities.get(&identity) {
            return known.clone();
        }
        self.identities.insert(identity.clone());
        identity
    }

    /// Forgets the identities that nothing uses any more.
    pub(super) fn keep_identities<'a>(&mut self, used: impl Iterator<Item = &'a Identity>) {
        self.identities = used.cloned().collect();
    }

    pub(super) fn identities(&self) -> usize {
        self.identities.len()
    }
}

fn named(resource: &str, own: &str, field: &str) -> Result<(), String> {
    if resource == own {
        Ok(())
    } else {
        Err(format!("{field}: {own:?} is not the resource's name"))
    }
}

fn filled<'a>(field: &str, text: &'a str) -> Result<&'a str, String> {
    if text.is_empty() {
        Err(format!("{field}: empty"))
    } else {
        Ok(text)
    }
}

fn unknown(field: &str, value: i32) -> String {
    format!("{field}: {value} is not known to this proxy")
}

fn address(field: &str, bytes: &[u8]) -> Result<IpAddr, String> {
    address_from_bytes(bytes)
        .map(|a| a.to_canonical())
        .ok_or_else(|| format!("{field}: {} bytes are no IP address", bytes.len()))
}

fn addresses(field: &str, all: &[bytes::Bytes]) -> Result<Vec<IpAddr>, String> {
    all.iter().map(|bytes| address(field, bytes)).collect()
}

fn port(field: &str, number: u32) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{field}: {number} is no port")),
    }
}

fn ports(field: &str, all: &[u32]) -> Result<Vec<u16>, String> {
    all.iter().map(|n| port(field, *n)).collect()
}
