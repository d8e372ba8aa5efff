//! The controller, played behind the agent's seam.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use futures::future::BoxFuture;
use mesh_api::names::address_from_bytes;
use mesh_api::proto::control::{NodeReport, PodState, RegisterPodRequest};
use mesh_api::proto::mesh::NodePod;
use tokio::sync::watch;
use warren_cni::agent::control::{Control, RegisterError};
use warren_cni::agent::node::Node;

pub struct FakeController {
    state: Mutex<State>,
    connected: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    /// By UID: what pods are to be.
    pods: HashMap<String, NodePod>,
    registered: HashMap<String, Vec<std::net::IpAddr>>,
    report: Option<NodeReport>,
    node: Weak<Node>,
}

impl FakeController {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            connected: watch::Sender::new(true),
        })
    }

    pub fn attach(&self, node: &Arc<Node>) {
        self.state.lock().unwrap().node = Arc::downgrade(node);
    }

    /// A pod of the mesh, or not, in the namespace `demo`.
    pub fn pod(&self, uid: &str, enrolled: bool) -> NodePod {
        let pod = NodePod {
            uid: uid.into(),
            namespace: "demo".into(),
            name: uid.into(),
            service_account: "default".into(),
            enrolled,
            namespace_opted_in: true,
            ..NodePod::default()
        };
        self.set(pod.clone());
        pod
    }

    pub fn set(&self, pod: NodePod) {
        self.state.lock().unwrap().pods.insert(pod.uid.clone(), pod);
    }

    pub fn go_away(&self, away: bool) {
        self.connected.send_replace(!away);
    }

    pub fn registered(&self, uid: &str) -> Option<Vec<std::net::IpAddr>> {
        self.state.lock().unwrap().registered.get(uid).cloned()
    }

    pub fn report(&self) -> Option<NodeReport> {
        self.state.lock().unwrap().report.clone()
    }

    pub fn forget_report(&self) {
        self.state.lock().unwrap().report = None;
    }

    /// What the last report says of the pod.
    pub fn state_of(&self, uid: &str) -> Option<PodState> {
        let report = self.report()?;
        let pod = report.pods.iter().find(|pod| pod.uid == uid)?;
        Some(pod.state())
    }
}

impl Control for FakeController {
    fn register(
        &self,
        request: RegisterPodRequest,
    ) -> BoxFuture<'_, Result<NodePod, RegisterError>> {
        Box::pin(async move {
            if !*self.connected.borrow() {
                return Err(RegisterError::Away("as told".into()));
            }
            let mut state = self.state.lock().unwrap();
            let addresses = request
                .addresses
                .iter()
                .map(|a| address_from_bytes(a).unwrap());
            let addresses: Vec<_> = addresses.collect();
            let mut pod = match state.pods.get(&request.uid) {
                Some(pod) => pod.clone(),
                None => return Err(RegisterError::NotFound(request.uid)),
            };
            pod.addresses = request.addresses.iter().map(|a| a.clone().into()).collect();
            state.registered.insert(request.uid, addresses);
            Ok(pod)
        })
    }

    fn report(&self, report: NodeReport) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            if !*self.connected.borrow() {
                return Err("as told".into());
            }
            self.state.lock().unwrap().report = Some(report);
            Ok(())
        })
    }

    fn connected(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }
}
