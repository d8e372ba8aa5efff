//! What is kept of the objects that every API server has: what the model reads, and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::providers::{Object, is_agent};

pub(super) fn namespace(object: k8s::Namespace) -> Object {
    Object::Namespace(Arc::new(k8s::Namespace {
        metadata: metadata(object.metadata, is_ours),
        ..Default::default()
    }))
}

pub(super) fn node(object: k8s::Node) -> Object {
    let (addresses, conditions) =
        (object.status).map_or((None, None), |s| (s.addresses, s.conditions));
    let conditions = conditions.map(|all| {
        // When it was last said is not used, and wakes nobody.
        let ready = all.into_iter().find(|c| c.type_ == "Ready");
        let ready = ready.map(|c| k8s::NodeCondition {
            status: c.status,
            type_: c.type_,
            ..Default::default()
        });
        ready.into_iter().collect()
    });
    let taints = object.spec.and_then(|s| s.taints);
    Object::Node(Arc::new(k8s::Node {
        metadata: metadata(object.metadata, |key| {
            key == "topology.kubernetes.io/zone" || is_ours(key)
        }),
        spec: Some(k8s::NodeSpec {
            taints: taints.map(|t| t.into_iter().filter(|t| is_ours(&t.key)).collect()),
            ..Default::default()
        }),
        status: Some(k8s::NodeStatus {
            addresses,
            conditions,
            ..Default::default()
        }),
    }))
}

pub(super) fn pod(object: k8s::Pod) -> Object {
    // The taint of the node depends on whether it is ready.
    let is_agent = is_agent(&object);
    let spec = object.spec.map(|spec| k8s::PodSpec {
        node_name: spec.node_name,
        host_network: spec.host_network,
        service_account_name: spec.service_account_name,
        containers: spec.containers.into_iter().map(container).collect(),
        init_containers: spec
            .init_containers
            .map(|all| all.into_iter().map(container).collect()),
        ..Default::default()
    });
    let status = object.status.map(|status| k8s::PodStatus {
        conditions: status.conditions.filter(|_| is_agent).map(|mut all| {
            all.retain(|condition| condition.type_ == "Ready");
            all
        }),
        phase: status.phase.filter(|p| p == "Succeeded" || p == "Failed"),
        pod_ip: status.pod_ip,
        pod_ips: status.pod_ips,
        ..Default::default()
    });
    let owners = object.metadata.owner_references.clone();
    let owners = owners.map(|all| {
        let mut controller = all;
        controller.retain(|o| o.controller == Some(true));
        controller
    });
    // NetworkPolicies select by any label.
    let labels = object.metadata.labels.clone();
    Object::Pod(Arc::new(k8s::Pod {
        metadata: ObjectMeta {
            owner_references: owners,
            labels,
            ..metadata(object.metadata, is_ours)
        },
        spec,
        status,
    }))
}

fn container(container: k8s::Container) -> k8s::Container {
    k8s::Container {
        name: container.name,
        ports: container.ports,
        liveness_probe: container.liveness_probe,
        readiness_probe: container.readiness_probe,
        startup_probe: container.startup_probe,
        lifecycle: container.lifecycle,
        restart_policy: container.restart_policy,
        ..Default::default()
    }
}

pub(super) fn service(object: k8s::Service) -> Object {
    let spec = object.spec.map(|spec| k8s::ServiceSpec {
        type_: spec.type_,
        cluster_ip: spec.cluster_ip,
        cluster_ips: spec.cluster_ips,
        external_ips: spec.external_ips,
        ports: spec.ports,
        internal_traffic_policy: spec.internal_traffic_policy,
        traffic_distribution: spec.traffic_distribution,
        ..Default::default()
    });
    let status = object.status.map(|status| k8s::ServiceStatus {
        load_balancer: status.load_balancer,
        ..Default::default()
    });
    Object::Service(Arc::new(k8s::Service {
        metadata: metadata(object.metadata, is_ours),
        spec,
        status,
    }))
}

pub(super) fn slice(object: EndpointSlice) -> Object {
    let EndpointSlice {
        metadata: all,
        address_type,
        endpoints,
        ports,
    } = object;
    let endpoints = endpoints.map(|all| {
        let trimmed = all.into_iter().map(|mut endpoint| {
            endpoint.target_ref = None;
            endpoint.hostname = None;
            endpoint.deprecated_topology = None;
            endpoint
        });
        trimmed.collect()
    });
    Object::EndpointSlice(Arc::new(EndpointSlice {
        metadata: metadata(all, |key| key == "kubernetes.io/service-name"),
        address_type,
        endpoints,
        ports,
    }))
}

fn metadata(all: ObjectMeta, kept: impl Fn(&str) -> bool) -> ObjectMeta {
    let trim = |map: Option<BTreeMap<String, String>>| {
        let map = map.map(|map| {
            let kept = map.into_iter().filter(|(key, _)| kept(key));
            kept.collect::<BTreeMap<_, _>>()
        });
        map.filter(|map| !map.is_empty())
    };
    ObjectMeta {
        name: all.name,
        namespace: all.namespace,
        uid: all.uid,
        labels: trim(all.labels),
        annotations: trim(all.annotations),
        ..ObjectMeta::default()
    }
}

fn is_ours(key: &str) -> bool {
    key.starts_with("warren-mesh.io/")
}
