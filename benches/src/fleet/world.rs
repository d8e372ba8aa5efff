//! The mesh of the simulation: who runs where, who uses what, and the manifests that say so.
//!
//! Everything follows from the numbers in [`Size`] and a fixed seed, so that two runs have the same mesh. Pods of a
//! Service are spread over all nodes, as the scheduler of Kubernetes does. One file holds the pods of a
//! node, one an EndpointSlice, so that an edit is a small one.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use serde::Serialize;
use serde_json::{Value, json};

use crate::harness::{Error, io};

/// How large the mesh is.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Size {
    /// Nodes; all of them are connected.
    pub nodes: usize,
    /// Meshed pods.
    pub pods: usize,
    /// Services, each of `pods / services` pods.
    pub services: usize,
    /// Namespaces, each of `services / namespaces` Services.
    pub namespaces: usize,
    /// Services that the pods of one node call.
    pub used: usize,
}

/// One pod. A pod's place in [`World::pods`] is its number, which its UID and address tell.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pod {
    pub(super) service: usize,
    pub(super) node: usize,
    /// It was deleted.
    gone: bool,
}

pub(super) struct World {
    pub(super) size: Size,
    pub(super) pods: Vec<Pod>,
    /// The numbers of each Service's pods.
    pods_of: Vec<Vec<usize>>,
    /// Which endpoint of each Service is not ready.
    unready: Vec<Option<usize>>,
    /// The Services that the pods of each node call.
    pub(super) used: Vec<BTreeSet<usize>>,
    manifests: PathBuf,
    random: Random,
}

impl World {
    /// Plans the mesh; nothing is written yet.
    pub(super) fn new(size: Size, manifests: &Path) -> Self {
        let mut random = Random(0x5eed);
        let mut pods_of = vec![Vec::new(); size.services];
        let pods = (0..size.pods).map(|number| {
            let service = number % size.services;
            pods_of[service].push(number);
            let node = random.below(size.nodes);
            Pod {
                service,
                node,
                gone: false,
            }
        });
        let pods = pods.collect();
        // Zipf: the Service of rank r is called 1/r as often as the first.
        let mut total = 0.0;
        let weights: Vec<f64> = (1..=size.services)
            .map(|rank| {
                total += 1.0 / rank as f64;
                total
            })
            .collect();
        let used = (0..size.nodes).map(|_| {
            let mut used = BTreeSet::new();
            while used.len() < size.used.min(size.services) {
                let at = random.share() * total;
                used.insert(weights.partition_point(|w| *w < at).min(size.services - 1));
            }
            used
        });
        Self {
            used: used.collect(),
            pods,
            pods_of,
            unready: vec![None; size.services],
            size,
            manifests: manifests.to_owned(),
            random,
        }
    }

    /// Writes all manifests.
    pub(super) fn write(&self) -> Result<(), Error> {
        for below in ["pods", "slices"] {
            let directory = self.manifests.join(below);
            fs::create_dir_all(&directory).map_err(io(format!("make {}", directory.display())))?;
        }
        let namespaces = (0..self.size.namespaces).map(|number| {
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
                "name": namespace_name(number), "labels": {"warren-mesh.io/mesh": "enabled"},
            }})
        });
        self.put("namespaces.json", namespaces.collect())?;
        let nodes = (0..self.size.nodes).map(|number| {
            let addresses = json!([{"type": "InternalIP", "address": address(NODES, number)}]);
            json!({"apiVersion": "v1", "kind": "Node",
                "metadata": {"name": node_name(number)}, "status": {"addresses": addresses}})
        });
        self.put("nodes.json", nodes.collect())?;
        let services = (0..self.size.services).map(|number| self.service(number));
        self.put("services.json", services.collect())?;
        for service in 0..self.size.services {
            self.put(&slice_file(service), vec![self.slice(service)])?;
        }
        let mut of_nodes = vec![Vec::new(); self.size.nodes];
        for (number, pod) in self.pods.iter().enumerate() {
            of_nodes[pod.node].push(self.pod(number));
        }
        for (node, pods) in of_nodes.into_iter().enumerate() {
            self.put(&pod_file(node), pods)?;
        }
        Ok(())
    }

    /// Every pod that is there, with its UID.
    pub(super) fn present(&self) -> impl Iterator<Item = (usize, &Pod)> {
        self.pods.iter().enumerate().filter(|(_, pod)| !pod.gone)
    }

    /// The namespaces that have a pod on a node.
    pub(super) fn namespaces_on(&self, node: usize) -> BTreeSet<usize> {
        let there = self.present().filter(|(_, pod)| pod.node == node);
        there
            .map(|(_, pod)| pod.service % self.size.namespaces)
            .collect()
    }

    /// Makes an endpoint of some Service unready, or another one in its place. Returns the Service, the
    /// edit, and the address that is not ready afterwards.
    pub(super) fn change_endpoint(&mut self) -> Result<(usize, Edit, IpAddr), Error> {
        let service = self.random.below(self.size.services);
        let endpoints = self.pods_of[service].len();
        let next = self.unready[service].map_or(0, |endpoint| (endpoint + 1) % endpoints);
        self.unready[service] = Some(next);
        let edit = self.edit(&slice_file(service), vec![self.slice(service)])?;
        let address = address(PODS, self.pods_of[service][next]);
        Ok((service, edit, address))
    }

    /// Replaces some pod by a new one on the same node. Returns the numbers of both, and the edit.
    pub(super) fn replace_pod(&mut self) -> Result<(usize, usize, Edit), Error> {
        let old = loop {
            let number = self.random.below(self.pods.len());
            if !self.pods[number].gone {
                break number;
            }
        };
        let new = self.pods.len();
        self.pods.push(self.pods[old]);
        self.pods[old].gone = true;
        let node = self.pods[old].node;
        let there = self.present().filter(|(_, pod)| pod.node == node);
        let pods = there.map(|(number, _)| self.pod(number)).collect();
        let edit = self.edit(&pod_file(node), pods)?;
        Ok((old, new, edit))
    }

    fn service(&self, number: usize) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": service_name(number), "namespace": self.namespace_of(number)},
            "spec": {
                "clusterIP": self.service_address(number),
                "selector": {"app": service_name(number)},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "appProtocol": "http"}],
            },
        })
    }

    fn slice(&self, service: usize) -> Value {
        let endpoints = self.pods_of[service].iter().enumerate();
        let endpoints = endpoints.map(|(at, number)| {
            let ready = self.unready[service] != Some(at);
            json!({
                "addresses": [address(PODS, *number)],
                "conditions": {"ready": ready, "serving": ready, "terminating": false},
                "nodeName": node_name(self.pods[*number].node),
            })
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": service_name(service), "namespace": self.namespace_of(service),
                "labels": {"kubernetes.io/service-name": service_name(service)},
            },
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        })
    }

    fn pod(&self, number: usize) -> Value {
        let Pod { service, node, .. } = self.pods[number];
        let app = service_name(service);
        let address = address(PODS, number);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("{app}-5d8f9c7b6d-{number:05}"), "namespace": self.namespace_of(service),
                "uid": uid(number),
                "labels": {"app": app, "pod-template-hash": "5d8f9c7b6d"},
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true,
                    "name": format!("{app}-5d8f9c7b6d"), "uid": uid(service),
                }],
            },
            "spec": {
                "nodeName": node_name(node), "serviceAccountName": app,
                "containers": [{
                    "name": "app", "image": "registry.example/app:1.0",
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}},
                }],
            },
            "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
        })
    }

    fn namespace_of(&self, service: usize) -> String {
        namespace_name(service % self.size.namespaces)
    }

    /// `namespace/name` of a Service.
    pub(super) fn service_key(&self, service: usize) -> String {
        format!("{}/{}", self.namespace_of(service), service_name(service))
    }

    /// Where a Service is reached.
    pub(super) fn service_address(&self, service: usize) -> IpAddr {
        address(SERVICES, service)
    }

    fn put(&self, file: &str, items: Vec<Value>) -> Result<(), Error> {
        self.edit(file, items)?.make()
    }

    fn edit(&self, file: &str, items: Vec<Value>) -> Result<Edit, Error> {
        let path = self.manifests.join(file);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // The provider skips names that start with a dot.
        let prepared = path.with_file_name(format!(".{name}.new"));
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        fs::write(&prepared, list.to_string())
            .map_err(io(format!("write {}", prepared.display())))?;
        Ok(Edit { prepared, path })
    }
}

/// A file that is written and not yet in its place.
pub(super) struct Edit {
    prepared: PathBuf,
    path: PathBuf,
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "edit of {}", self.path.display())
    }
}

impl Edit {
    /// From now on the manifests say so.
    pub(super) fn make(self) -> Result<(), Error> {
        fs::rename(&self.prepared, &self.path).map_err(io(format!("write {}", self.path.display())))
    }
}

pub(super) fn node_name(number: usize) -> String {
    format!("node-{number:04}")
}

pub(super) fn uid(number: usize) -> String {
    format!("00000000-0000-4000-8000-{number:012x}")
}

/// The number in a UID.
pub(super) fn number_of_uid(uid: &str) -> Option<usize> {
    usize::from_str_radix(uid.rsplit('-').next()?, 16).ok()
}

/// The number in the name of a Service or its slice.
pub(super) fn number_of_service(name: &str) -> Option<usize> {
    name.rsplit('-').next()?.parse().ok()
}

fn namespace_name(number: usize) -> String {
    format!("team-{number:03}")
}

fn service_name(number: usize) -> String {
    format!("svc-{number:05}")
}

fn slice_file(service: usize) -> String {
    format!("slices/{}.json", service_name(service))
}

fn pod_file(node: usize) -> String {
    format!("pods/{}.json", node_name(node))
}

fn address(base: [u8; 4], number: usize) -> IpAddr {
    // Fewer than 2^23 of each.
    let offset = u32::try_from(number).unwrap_or(u32::MAX);
    Ipv4Addr::from(u32::from_be_bytes(base).saturating_add(offset)).into()
}

const NODES: [u8; 4] = [172, 16, 0, 1];
const SERVICES: [u8; 4] = [10, 64, 0, 1];
const PODS: [u8; 4] = [10, 128, 0, 1];

/// SplitMix64: the same mesh in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// From 0 up to 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
