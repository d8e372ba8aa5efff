//! From what the daemon holds to what readers of the status file are told.

use super::cluster::{Cluster, Key, PodRecord};
use super::component::Component;
use super::daemon::Lab;
use super::mesh::Node;
use super::names::netns_path;
use super::status::{
    ControllerStatus, DeploymentStatus, NodeStatus, PodStatus, PortStatus, ServiceStatus, Status,
};
use super::{container, deployments, services};

impl Lab {
    /// What readers of the status file are told.
    pub(crate) fn status(&self) -> Status {
        let cluster = self.cluster.borrow();
        let controller = self.controller.borrow();
        Status {
            nodes: self
                .nodes
                .iter()
                .map(|node| node_status(&cluster, node))
                .collect(),
            pods: cluster
                .pods
                .iter()
                .map(|(key, pod)| self.pod_status(&cluster, key, pod))
                .collect(),
            services: service_status(&cluster),
            deployments: deployment_status(&cluster),
            controller: ControllerStatus {
                pid: controller.as_ref().and_then(Component::pid).unwrap_or(0),
                netns: netns_path(&self.name.netns("controller")),
                address: self.spec.mesh.then(|| self.plan.controller().v4.into()),
            },
        }
    }

    fn pod_status(&self, cluster: &Cluster, key: &Key, pod: &PodRecord) -> PodStatus {
        let (namespace, name) = key;
        let annotations = pod.manifest.metadata.annotations.as_ref();
        let tunnel = annotations.and_then(|a| a.get(mesh_api::names::TUNNEL_ANNOTATION));
        let node_ip = self.node(pod.node()).map(|n| n.addresses.v4.to_string());
        let place = container::Place {
            ips: pod.life.ips.clone(),
            host_ip: node_ip.unwrap_or_default(),
        };
        let launch = container::launch(&pod.manifest, &place);
        let container = pod.spec().and_then(|s| s.containers.first());
        PodStatus {
            name: name.clone(),
            namespace: namespace.clone(),
            node: pod.node().into(),
            ips: pod.life.ips.clone(),
            identity: format!(
                "spiffe://{}/ns/{namespace}/sa/{}",
                self.spec.trust_domain,
                pod.account()
            ),
            mesh: "none".into(),
            netns: netns_path(&self.name.pod_netns(namespace, name)),
            pid: pod.life.pid.unwrap_or(0),
            ready: pod.is_ready(),
            restarts: pod.life.restarts,
            phase: pod.life.phase.name().into(),
            message: pod.life.step.clone(),
            terminating: pod.life.terminating,
            uid: pod.uid().into(),
            owner: pod.owner.as_ref().map(|(deployment, _)| deployment.clone()),
            run_as: launch.user,
            env: launch.env,
            container: container.map(|c| c.name.clone()).unwrap_or_default(),
            hbone: tunnel.is_some_and(|t| t == "hbone"),
            opted_in: cluster.opted_in(key, pod),
        }
    }
}

fn node_status(cluster: &Cluster, node: &Node) -> NodeStatus {
    let proxies = node.proxies.borrow();
    let proxy = proxies.first();
    let address = proxy.and_then(|p| p.address());
    let pid = |c: &Component| c.pid().unwrap_or(0);
    NodeStatus {
        name: node.name.clone(),
        zone: cluster.zones.get(&node.name).cloned().unwrap_or_default(),
        address: Some(node.addresses.v4.into()),
        addresses: node.addresses.both().into(),
        netns: node.netns.clone(),
        // Looked up by the reader.
        proxy_pid: 0,
        proxy_supervisor_pid: proxy.map_or(0, |p| pid(&p.component)),
        agent_pid: node.agent.borrow().as_ref().map_or(0, pid),
        metrics_url: address.map_or(String::new(), |ip| {
            format!("http://{ip}:{}/metrics", mesh_api::names::METRICS_PORT)
        }),
        proxy_netns: proxy.map(|p| p.sandbox.netns.clone()).unwrap_or_default(),
        proxy_address: address,
        admin_socket: proxy.map(|p| p.admin_socket.clone()).unwrap_or_default(),
        draining_pids: proxies
            .iter()
            .skip(1)
            .filter_map(|p| p.component.pid())
            .collect(),
    }
}

fn service_status(cluster: &Cluster) -> Vec<ServiceStatus> {
    let slices = services::all_slices(cluster);
    let endpoints = |key: &Key| {
        let own = slices
            .iter()
            .filter(|slice| services::belongs_to(slice, key));
        let endpoints = own.flat_map(|s| s.endpoints.iter().flatten());
        endpoints
            .filter(|e| services::takes_traffic(e))
            .filter_map(|e| e.addresses.first().cloned())
            .collect::<Vec<String>>()
    };
    let status = cluster.services.iter().map(|(key, service)| ServiceStatus {
        name: key.1.clone(),
        namespace: key.0.clone(),
        cluster_ips: services::addresses(service)
            .iter()
            .map(ToString::to_string)
            .collect(),
        ports: services::ports(service)
            .map(|port| PortStatus {
                name: port.name.clone().unwrap_or_default(),
                port: port.port,
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                node_port: port.node_port,
            })
            .collect(),
        endpoints: endpoints(key),
    });
    status.collect()
}

fn deployment_status(cluster: &Cluster) -> Vec<DeploymentStatus> {
    let status = cluster.deployments.iter().map(|(key, record)| {
        let template = deployments::template(&record.manifest, record.restarted.as_deref());
        let hash = deployments::template_hash(&template);
        let owned = cluster.owned(key);
        DeploymentStatus {
            name: key.1.clone(),
            namespace: key.0.clone(),
            replicas: deployments::replicas(&record.manifest),
            ready: owned.iter().filter(|p| p.ready).count(),
            updated: owned
                .iter()
                .filter(|p| p.hash == hash && !p.terminating)
                .count(),
        }
    });
    status.collect()
}
