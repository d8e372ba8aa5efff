//! Stub until the real one lands.
#![allow(missing_docs)]
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use ipnet::IpNet;
use mesh_api::identity::Identity;
use mesh_api::proto::mesh::{EnrolmentState, TunnelKind};
use tokio::sync::watch;
use crate::balance;

#[derive(Clone, Debug)]
pub struct Workload { pub uid: Arc<str>, pub identity: Identity, pub name: Arc<str>, pub owner: Arc<str>, pub addresses: Vec<IpAddr>, pub node: Arc<str>, pub node_addresses: Vec<IpAddr>,
   pub state: EnrolmentState, pub tunnel: TunnelKind, pub exclude_inbound_ports: Vec<u16>, pub exclude_outbound_ports: Vec<u16>, pub exclude_outbound_cidrs: Vec<IpNet> }
#[derive(Debug)]
pub struct Service { pub namespace: Arc<str>, pub name: Arc<str>, pub addresses: Vec<IpAddr>, pub ports: Vec<Arc<ServicePort>> }
#[derive(Debug)]
pub struct ServicePort { pub service: (Arc<str>, Arc<str>), pub port: u16, pub name: Arc<str>, pub node_port: Option<u16>, pub app_protocol: Arc<str>, pub endpoints: Arc<balance::EndpointSet> }
#[derive(Debug)]
pub enum ServiceLookup { Port(Arc<ServicePort>), NoSuchPort(Arc<Service>), NotAService, Unknown }
#[derive(Debug, Default)]
pub struct Mesh { pub trust_domain: Arc<str>, pub node_addresses: Vec<IpAddr> }
#[derive(Debug)]
pub struct Table { loaded: watch::Sender<bool> }
impl Table {
    pub fn new() -> Arc<Self> { Arc::new(Self { loaded: watch::Sender::new(true) }) }
    pub fn loaded(&self) -> watch::Receiver<bool> { self.loaded.subscribe() }
    pub fn workload(&self, _: IpAddr) -> Option<Arc<Workload>> { None }
    pub async fn wait_for_workload(&self, _: IpAddr, _: Duration) -> Option<Arc<Workload>> { None }
    pub fn service(&self, _: SocketAddr) -> ServiceLookup { ServiceLookup::Unknown }
    pub async fn find_service(&self, _: SocketAddr, _: Duration) -> ServiceLookup { ServiceLookup::Unknown }
    pub fn mesh(&self) -> Arc<Mesh> { Arc::new(Mesh { trust_domain: "cluster.local".into(), node_addresses: vec![] }) }
    pub fn dump(&self) -> serde_json::Value { serde_json::Value::Null }
}
