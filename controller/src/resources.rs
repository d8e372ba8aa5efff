//! From the model and the enrolment records to the resources that nodes are sent.
//!
//! Pure: equal input gives equal resources, versions included. A version is a hash of the content, so that
//! what a node holds can be compared with what it should hold on any replica and after any restart.
//! Tables that did not change are shared with the snapshot before, so that a stream sees at the cost of one
//! comparison that it has nothing to send.

mod concerns;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
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
    /// Which workloads changed of late.
    pub workload_changes: Changes,
    /// Which slices changed of late.
    pub slice_changes: Changes,
}

/// Which resources of a table were added, changed or removed in the last snapshots, so that a stream need not look
/// at all of them.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Everything after this snapshot is on record; `None`: nothing is.
    from: Option<u64>,
    /// By snapshot, the oldest first.
    recent: VecDeque<(u64, Arc<[Arc<str>]>)>,
}

impl Changes {
    /// Everything that changed after snapshot `seq`, some of it repeatedly; `None`: that is too long ago.
    pub fn since(&self, seq: u64) -> Option<impl Iterator<Item = &Arc<str>>> {
        let covered = self.from.is_some_and(|from| from <= seq);
        let recent = self.recent.iter().skip_while(move |(of, _)| *of <= seq);
        covered.then(|| recent.flat_map(|(_, names)| names.iter()))
    }

    /// The record that goes on with snapshot `seq`.
    fn next(&self, seq: u64, old: &Arc<Table>, new: &Arc<Table>) -> Self {
        let mut next = self.clone();
        next.from.get_or_insert(seq - 1);
        if !Arc::ptr_eq(old, new) {
            next.recent.push_back((seq, differences(old, new)));
        }
        let mut names: usize = next.recent.iter().map(|(_, names)| names.len()).sum();
        while names > MAX_CHANGES || next.recent.len() > MAX_CHANGED {
            let Some((seq, oldest)) = next.recent.pop_front() else {
                break;
            };
            names -= oldest.len();
            next.from = Some(seq);
        }
        next
    }
}

#[cfg(test)]
impl Changes {
    /// The record that goes on with a snapshot in which these changed, and began with the first.
    pub(crate) fn with(&self, seq: u64, names: &[&str]) -> Self {
        let mut next = self.clone();
        next.from.get_or_insert(0);
        let names = names.iter().map(|name| Arc::from(*name)).collect();
        next.recent.push_back((seq, names));
        next
    }
}

/// The names whose resources are not the same in both tables.
fn differences(old: &Table, new: &Table) -> Arc<[Arc<str>]> {
    let mut names = Vec::new();
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let before = old.next_if(|_| order.is_le());
        let after = new.next_if(|_| order.is_ge());
        if before.map(|(_, r)| r) != after.map(|(_, r)| r)
            && let Some((name, _)) = after.or(before)
        {
            names.push(name.clone());
        }
    }
    names.into()
}

/// Up to this many Services every node gets them all.
pub const ALL_SERVICES: usize = 1000;
/// How many snapshots, and changes in them, are on record.
const MAX_CHANGED: usize = 512;
const MAX_CHANGES: usize = 8192;
/// Name of the MeshConfig resource.
pub const MESH_CONFIG: &str = "mesh";

/// Builds snapshots. What was made of a pod, Service or slice is used again as long as nothing that it depends
/// on changes: of fifty thousand pods an edit changes one.
#[derive(Debug, Default)]
pub struct Builder {
    model: Option<Arc<Model>>,
    pods: BTreeMap<Arc<str>, Made>,
}

/// What was made of a pod, and of what.
#[derive(Debug)]
struct Made {
    pod: Arc<Pod>,
    addresses: Vec<IpAddr>,
    published: Option<(EnrolmentState, TunnelKind)>,
    enrolled: bool,
    workload: Option<Arc<Resource>>,
    node_pod: Arc<Resource>,
}

impl Builder {
    /// The snapshot that follows `previous`.
    pub fn build(
        &mut self,
        model: &Arc<Model>,
        enrolment: &Enrolment,
        trust_bundle: &[Vec<u8>],
        previous: &Snapshot,
    ) -> Snapshot {
        let old = self.model.replace(model.clone());
        let made = std::mem::take(&mut self.pods);
        let old = old.as_deref();
        let (snapshot, made) = build(model, enrolment, trust_bundle, previous, (old, made));
        self.pods = made;
        snapshot
    }
}

fn build(
    model: &Model,
    enrolment: &Enrolment,
    trust_bundle: &[Vec<u8>],
    previous: &Snapshot,
    (old, mut old_made): (Option<&Model>, BTreeMap<Arc<str>, Made>),
) -> (Snapshot, BTreeMap<Arc<str>, Made>) {
    let mut warnings = Vec::new();
    let (mut workloads, mut node_pods) = (Table::new(), BTreeMap::<String, Table>::new());
    let mut namespaces_of_node = BTreeMap::<String, BTreeSet<String>>::new();
    let owners = address_owners(model, enrolment, &mut warnings);
    let mut all_made = BTreeMap::new();
    let same_nodes = old.is_some_and(|old| old.nodes == model.nodes && old.zones == model.zones);
    let same_node = |node: &str| {
        let one = |old: &Model| {
            old.nodes.get(node) == model.nodes.get(node)
                && old.zones.get(node) == model.zones.get(node)
        };
        same_nodes || old.is_some_and(one)
    };
    for (uid, pod) in &model.pods {
        let record = enrolment.record(uid);
        let addresses = addresses(pod, record).iter().copied();
        let addresses = addresses.filter(|a| owners.get(a).is_some_and(|owner| *owner == uid));
        let captured = record.and_then(Record::published);
        let published = match captured {
            Some(state) => Some((state, TunnelKind::Warren)),
            None if pod.opted_in && pod.hbone => Some((EnrolmentState::Tunnel, TunnelKind::Hbone)),
            None => None,
        };
        let enrolled = record.is_some_and(Record::enrolled);
        let same = |made: &Made| {
            Arc::ptr_eq(&made.pod, pod)
                && made.published == published
                && made.enrolled == enrolled
                && made.addresses.iter().copied().eq(addresses.clone())
                && same_node(&pod.node)
        };
        let made = match old_made.remove(uid).filter(same) {
            Some(made) => made,
            None => Made::new(model, pod, addresses.collect(), published, enrolled),
        };
        if let Some(workload) = &made.workload {
            if !model.nodes.contains_key(&pod.node)
                && matches!(published, Some((_, TunnelKind::Warren)))
            {
                warnings.push(format!(
                    "Pod {}/{}: node {} is unknown, so no tunnel can reach the pod; apply its Node",
                    pod.namespace, pod.name, pod.node
                ));
            }
            workloads.insert(uid.clone(), workload.clone());
        }
        node_pods
            .entry(pod.node.clone())
            .or_default()
            .insert(uid.clone(), made.node_pod.clone());
        namespaces_of_node
            .entry(pod.node.clone())
            .or_default()
            .insert(pod.namespace.clone());
        all_made.insert(uid.clone(), made);
    }
    let services_complete = model.services.len() <= ALL_SERVICES;
    let services = table(
        &model.services,
        old.map(|m| &m.services),
        &previous.services,
    );
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
    let slices = table(&model.slices, old.map(|m| &m.slices), &previous.slices);
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
    let routes = table(&model.routes, old.map(|m| &m.routes), &previous.routes);
    let backend_traffic_policies = table(
        &model.backend_traffic_policies,
        old.map(|m| &m.backend_traffic_policies),
        &previous.backend_traffic_policies,
    );
    let traffic_policies = table(
        &model.traffic_policies,
        old.map(|m| &m.traffic_policies),
        &previous.traffic_policies,
    );
    let mesh = mesh_config(model, trust_bundle, services_complete);
    let old_pods = &previous.node_pods;
    let node_pods = node_pods
        .into_iter()
        .map(|(node, table)| {
            let shared = old_pods.get(&node).filter(|old| ***old == table);
            (node, shared.cloned().unwrap_or_else(|| Arc::new(table)))
        })
        .collect();
    let seq = previous.seq + 1;
    let workloads = share(workloads, &previous.workloads);
    let slices = share(slices, &previous.slices);
    let snapshot = Snapshot {
        seq,
        workload_changes: (previous.workload_changes).next(seq, &previous.workloads, &workloads),
        slice_changes: (previous.slice_changes).next(seq, &previous.slices, &slices),
        workloads,
        node_pods: share(node_pods, &previous.node_pods),
        services: share(services, &previous.services),
        service_by_address: share(service_by_address, &previous.service_by_address),
        slices,
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
    };
    (snapshot, all_made)
}

impl Made {
    fn new(
        model: &Model,
        pod: &Arc<Pod>,
        addresses: Vec<IpAddr>,
        published: Option<(EnrolmentState, TunnelKind)>,
        enrolled: bool,
    ) -> Self {
        let encoded: Vec<Bytes> = addresses.iter().map(|a| address_to_bytes(*a)).collect();
        let workload = published
            .filter(|_| !addresses.is_empty())
            .map(|(state, tunnel)| encode(&workload(model, pod, encoded.clone(), state, tunnel)));
        Self {
            pod: pod.clone(),
            node_pod: encode(&node_pod(model, pod, encoded, enrolled)),
            addresses,
            published,
            enrolled,
            workload,
        }
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
fn address_owners<'a>(
    model: &'a Model,
    enrolment: &Enrolment,
    warnings: &mut Vec<String>,
) -> HashMap<IpAddr, &'a Arc<str>> {
    let recorded = |uid: &str| {
        enrolment
            .record(uid)
            .is_some_and(|r| !r.addresses.is_empty())
    };
    let mut owners: HashMap<IpAddr, &Arc<str>> = HashMap::with_capacity(model.pods.len());
    for (uid, pod) in &model.pods {
        for address in addresses(pod, enrolment.record(uid)) {
            match owners.get(address) {
                None => {
                    owners.insert(*address, uid);
                }
                Some(other) if *other == uid => {}
                Some(other) => {
                    let (winner, loser) = match recorded(uid) && !recorded(other) {
                        true => (uid, *other),
                        false => (*other, uid),
                    };
                    let name = |uid: &str| {
                        let pod = model.pods.get(uid);
                        pod.map_or(uid.into(), |p| format!("{}/{}", p.namespace, p.name))
                    };
                    warnings.push(format!(
                        "Pod {}: {address} belongs to Pod {}, which keeps it",
                        name(loser),
                        name(winner)
                    ));
                    owners.insert(*address, winner);
                }
            }
        }
    }
    owners
}

/// Encodes what is not as it was in `old`, of which `encoded` was made.
fn table<T: Typed + PartialEq>(
    messages: &BTreeMap<String, T>,
    old: Option<&BTreeMap<String, T>>,
    encoded: &Table,
) -> Table {
    let made = messages.iter().map(|(name, message)| {
        let same = old.and_then(|old| old.get(name)) == Some(message);
        let known = encoded.get_key_value(name.as_str()).filter(|_| same);
        match known {
            Some((name, resource)) => (name.clone(), resource.clone()),
            None => (Arc::from(name.as_str()), encode(message)),
        }
    });
    made.collect()
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
