//! From the model and the enrolment records to the resources that nodes are sent.
//!
//! Pure: equal input gives equal resources, versions included. A version is a hash of the content, so that
//! what a node holds can be compared with what it should hold on any replica and after any restart.
//! Tables that did not change are shared with the snapshot before, so that a stream sees at the cost of one
//! comparison that it has nothing to send.

mod concerns;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_api::names::{address_from_bytes, address_to_bytes};
use mesh_api::proto::Resource as Typed;
use mesh_api::proto::mesh::{EnrolmentState, MeshConfig, NodePod, TunnelKind, Workload};
use sha2::{Digest, Sha256};

pub use self::concerns::Concerns;
use crate::enrolment::{Enrolment, Record};
use crate::model::{Model, Pod};

/// One resource, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Hash of the body.
    pub version: Arc<str>,
    /// The encoded message.
    pub body: Bytes,
}

/// Resources of one type by name.
pub type Table = BTreeMap<Arc<str>, Arc<Resource>>;

/// Everything that nodes may ask for, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts up with every change in this process.
    pub seq: u64,
    /// All meshed pods, by UID.
    pub workloads: Arc<Table>,
    /// By node: the pods bound to it, by UID.
    pub node_pods: Arc<BTreeMap<String, Arc<Table>>>,
    /// By `namespace/name`.
    pub services: Arc<Table>,
    /// Which Service an address belongs to.
    pub service_by_address: Arc<HashMap<IpAddr, Arc<str>>>,
    /// By `namespace/slice`.
    pub slices: Arc<Table>,
    /// The Service (`namespace/name`) of each slice.
    pub service_of_slice: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    /// By `kind/namespace/name`.
    pub routes: Arc<Table>,
    /// By `namespace/name`.
    pub backend_traffic_policies: Arc<Table>,
    /// By `namespace/name`.
    pub traffic_policies: Arc<Table>,
    /// Who must know of a route or policy if not every node is sent all.
    pub concerns: Arc<Concerns>,
    /// The namespaces that have a pod on a node.
    pub namespaces_of_node: Arc<BTreeMap<String, BTreeSet<String>>>,
    /// Whether `*` holds all Services.
    pub services_complete: bool,
    /// The one MeshConfig.
    pub mesh: Arc<Table>,
    /// What could not be published as written, for the log.
    pub warnings: Vec<String>,
}

/// Up to this many Services every node gets them all.
pub const ALL_SERVICES: usize = 1000;
/// Name of the MeshConfig resource.
pub const MESH_CONFIG: &str = "mesh";

/// Builds the snapshot that follows `previous`.
pub fn build(
    model: &Model,
    enrolment: &Enrolment,
    trust_bundle: &[Vec<u8>],
    previous: &Snapshot,
) -> Snapshot {
    let mut warnings = Vec::new();
    let (mut workloads, mut node_pods) = (Table::new(), BTreeMap::<String, Table>::new());
    let mut namespaces_of_node = BTreeMap::<String, BTreeSet<String>>::new();
    let owners = address_owners(model, enrolment, &mut warnings);
    for (uid, pod) in &model.pods {
        let record = enrolment.record(uid);
        let addresses = addresses(pod, record)
            .iter()
            .filter(|a| owners.get(a) == Some(uid))
            .map(|a| address_to_bytes(*a))
            .collect::<Vec<_>>();
        let captured = record.and_then(Record::published);
        let published = match captured {
            Some(state) => Some((state, TunnelKind::Warren)),
            None if pod.opted_in && pod.hbone => Some((EnrolmentState::Tunnel, TunnelKind::Hbone)),
            None => None,
        };
        if let Some((state, tunnel)) = published
            && !addresses.is_empty()
        {
            if !model.nodes.contains_key(&pod.node) && tunnel == TunnelKind::Warren {
                warnings.push(format!(
                    "Pod {}/{}: node {} is unknown, so no tunnel can reach the pod; apply its Node",
                    pod.namespace, pod.name, pod.node
                ));
            }
            let message = workload(model, pod, addresses.clone(), state, tunnel);
            workloads.insert(uid.clone(), encode(&message));
        }
        let message = node_pod(model, pod, addresses, record.is_some_and(Record::enrolled));
        node_pods
            .entry(pod.node.clone())
            .or_default()
            .insert(uid.clone(), encode(&message));
        namespaces_of_node
            .entry(pod.node.clone())
            .or_default()
            .insert(pod.namespace.clone());
    }
    let services_complete = model.services.len() <= ALL_SERVICES;
    let services = table(&model.services);
    let mut service_by_address = HashMap::new();
    for (name, service) in &model.services {
        for address in service
            .addresses
            .iter()
            .filter_map(|a| address_from_bytes(a))
        {
            let first = service_by_address
                .entry(address)
                .or_insert_with(|| Arc::from(name.as_str()));
            if **first != **name {
                warnings.push(format!(
                    "Service {name}: {address} belongs to Service {first} already, which keeps it"
                ));
            }
        }
    }
    let slices = table(&model.slices);
    let service_of_slice = model
        .slices
        .iter()
        .map(|(name, s)| {
            (
                Arc::from(name.as_str()),
                Arc::from(format!("{}/{}", s.namespace, s.service)),
            )
        })
        .collect();
    let routes = table(&model.routes);
    let backend_traffic_policies = table(&model.backend_traffic_policies);
    let traffic_policies = table(&model.traffic_policies);
    let mesh = mesh_config(model, trust_bundle, services_complete);
    let old_pods = &previous.node_pods;
    let node_pods = node_pods
        .into_iter()
        .map(|(node, table)| {
            let shared = old_pods.get(&node).filter(|old| ***old == table);
            (node, shared.cloned().unwrap_or_else(|| Arc::new(table)))
        })
        .collect();
    Snapshot {
        seq: previous.seq + 1,
        workloads: share(workloads, &previous.workloads),
        node_pods: Arc::new(node_pods),
        services: share(services, &previous.services),
        service_by_address: share(service_by_address, &previous.service_by_address),
        slices: share(slices, &previous.slices),
        service_of_slice: share(service_of_slice, &previous.service_of_slice),
        routes: share(routes, &previous.routes),
        backend_traffic_policies: share(
            backend_traffic_policies,
            &previous.backend_traffic_policies,
        ),
        traffic_policies: share(traffic_policies, &previous.traffic_policies),
        concerns: share(Concerns::new(model), &previous.concerns),
        namespaces_of_node: share(namespaces_of_node, &previous.namespaces_of_node),
        services_complete,
        mesh: share(
            Table::from([(MESH_CONFIG.into(), encode(&mesh))]),
            &previous.mesh,
        ),
        warnings,
    }
}

/// What a pod's agent and proxy must know of it. Also the answer to its registration.
pub fn node_pod_of(model: &Model, pod: &Pod, record: Option<&Record>) -> NodePod {
    let addresses = addresses(pod, record)
        .iter()
        .map(|a| address_to_bytes(*a))
        .collect();
    node_pod(model, pod, addresses, record.is_some_and(Record::enrolled))
}

fn node_pod(model: &Model, pod: &Pod, addresses: Vec<Bytes>, enrolled: bool) -> NodePod {
    NodePod {
        uid: pod.uid.to_string(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.identity.service_account().into(),
        addresses,
        enrolled,
        mode: pod.mode.into(),
        exclude_inbound_ports: ports(&pod.exclusions.inbound_ports),
        exclude_outbound_ports: ports(&pod.exclusions.outbound_ports),
        exclude_outbound_cidrs: texts(&pod.exclusions.outbound_cidrs),
        probes: pod.probes.clone(),
        owner: pod.owner.clone(),
        zone: model.zones.get(&pod.node).cloned().unwrap_or_default(),
        namespace_opted_in: pod.namespace_opted_in,
    }
}

fn workload(
    model: &Model,
    pod: &Pod,
    addresses: Vec<Bytes>,
    state: EnrolmentState,
    tunnel: TunnelKind,
) -> Workload {
    let node_addresses = model.nodes.get(&pod.node).into_iter().flatten();
    Workload {
        uid: pod.uid.to_string(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.identity.service_account().into(),
        addresses,
        node: pod.node.clone(),
        node_addresses: node_addresses.map(|a| address_to_bytes(*a)).collect(),
        state: state.into(),
        tunnel: tunnel.into(),
        exclude_inbound_ports: ports(&pod.exclusions.inbound_ports),
        exclude_outbound_ports: ports(&pod.exclusions.outbound_ports),
        exclude_outbound_cidrs: texts(&pod.exclusions.outbound_cidrs),
        owner: pod.owner.clone(),
    }
}

fn mesh_config(model: &Model, trust_bundle: &[Vec<u8>], services_complete: bool) -> MeshConfig {
    MeshConfig {
        trust_domain: model.settings.trust_domain.clone(),
        trust_bundle: trust_bundle
            .iter()
            .map(|der| Bytes::from(der.clone()))
            .collect(),
        services_complete,
        node_addresses: model
            .nodes
            .values()
            .flatten()
            .map(|a| address_to_bytes(*a))
            .collect(),
    }
}

/// What a pod's agent recorded, else what its manifest's status says.
fn addresses<'a>(pod: &'a Pod, record: Option<&'a Record>) -> &'a [IpAddr] {
    match record {
        Some(record) if !record.addresses.is_empty() => &record.addresses,
        _ => &pod.addresses,
    }
}

/// Which pod has an address. An address in two manifests is that of the pod whose agent recorded it, as
/// the other's status is stale then.
fn address_owners(
    model: &Model,
    enrolment: &Enrolment,
    warnings: &mut Vec<String>,
) -> HashMap<IpAddr, Arc<str>> {
    let recorded = |uid: &str| {
        enrolment
            .record(uid)
            .is_some_and(|r| !r.addresses.is_empty())
    };
    let mut owners: HashMap<IpAddr, Arc<str>> = HashMap::new();
    for (uid, pod) in &model.pods {
        for address in addresses(pod, enrolment.record(uid)) {
            match owners.get(address) {
                None => {
                    owners.insert(*address, uid.clone());
                }
                Some(other) if other == uid => {}
                Some(other) => {
                    let (winner, loser) = match recorded(uid) && !recorded(other) {
                        true => (uid.clone(), other.clone()),
                        false => (other.clone(), uid.clone()),
                    };
                    let name = |uid: &str| {
                        let pod = model.pods.get(uid);
                        pod.map_or(uid.into(), |p| format!("{}/{}", p.namespace, p.name))
                    };
                    warnings.push(format!(
                        "Pod {}: {address} belongs to Pod {}, which keeps it",
                        name(&loser),
                        name(&winner)
                    ));
                    owners.insert(*address, winner);
                }
            }
        }
    }
    owners
}

fn table<T: Typed>(messages: &BTreeMap<String, T>) -> Table {
    let encoded = messages
        .iter()
        .map(|(name, message)| (Arc::from(name.as_str()), encode(message)));
    encoded.collect()
}

fn encode<T: Typed>(message: &T) -> Arc<Resource> {
    let body = message.encode_to_vec();
    let digest = Sha256::digest(&body);
    let version: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
    Arc::new(Resource {
        version: version.into(),
        body: body.into(),
    })
}

fn share<T: PartialEq>(new: T, old: &Arc<T>) -> Arc<T> {
    if **old == new {
        old.clone()
    } else {
        Arc::new(new)
    }
}

fn ports(ports: &[u16]) -> Vec<u32> {
    ports.iter().map(|p| u32::from(*p)).collect()
}

fn texts(values: &[ipnet::IpNet]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests;
