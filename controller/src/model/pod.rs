//! One pod: whether the mesh may have to do with it, and what its manifest says about that.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_api::identity::Identity;
use mesh_api::names::{MESH_LABEL, SYSTEM_NAMESPACE};
use mesh_api::proto::mesh::{Mode, Probe, probe};

use super::annotations::recorded;
use super::{Exclusions, NamespaceDefaults, Settings, Warning, mesh_label, tunnel_annotation};
use crate::enrolment::Recorded;

/// A pod that is bound to a node and may be meshed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// `metadata.uid`
    pub uid: Arc<str>,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Who it is.
    pub identity: Identity,
    /// The node it is bound to.
    pub node: String,
    /// `status.podIPs`
    pub addresses: Vec<IpAddr>,
    /// Its label, or its namespace's, says enabled.
    pub opted_in: bool,
    /// Its namespace's label says enabled, whatever its own says.
    pub namespace_opted_in: bool,
    /// It terminates HBONE itself and is not captured.
    pub hbone: bool,
    /// Whether plaintext from un-meshed callers is accepted.
    pub mode: Mode,
    /// What it keeps out of the mesh.
    pub exclusions: Exclusions,
    /// What the kubelet sends it.
    pub probes: Vec<Probe>,
    /// The controller that owns it, else its own name.
    pub owner: String,
    /// What its annotation says of its enrolment; only a cluster's counts.
    pub recorded: Recorded,
}

impl Pod {
    /// Whether its connections are to be captured.
    pub fn to_be_captured(&self) -> bool {
        self.opted_in && !self.hbone
    }
}

/// Reads a manifest. `None`: the mesh has nothing to do with the pod (yet).
pub(super) fn build(
    manifest: &k8s::Pod,
    defaults: NamespaceDefaults,
    settings: &Settings,
    warnings: &mut Vec<Warning>,
) -> Option<Pod> {
    let (metadata, spec) = (&manifest.metadata, manifest.spec.as_ref()?);
    let namespace = metadata.namespace.clone()?;
    let name = metadata.name.clone()?;
    let uid: Arc<str> = metadata.uid.as_deref()?.into();
    let node = spec.node_name.clone().filter(|n| !n.is_empty())?;
    let finished = matches!(phase(manifest), Some("Succeeded" | "Failed"));
    if spec.host_network == Some(true) || namespace == SYSTEM_NAMESPACE || finished {
        return None;
    }
    let mut warn = |text: String| warnings.push(Warning::new("Pod", &namespace, &name, text));

    let account = spec
        .service_account_name
        .as_deref()
        .filter(|a| !a.is_empty());
    let identity = Identity::new(
        &settings.trust_domain,
        &namespace,
        account.unwrap_or("default"),
    )
    .map_err(|e| warn(format!("is left out of the mesh: {e}")))
    .ok()?;
    let none = BTreeMap::new();
    let annotations = metadata.annotations.as_ref().unwrap_or(&none);
    let label = metadata.labels.as_ref().and_then(|l| l.get(MESH_LABEL));
    let label = label.filter(|_| !defaults.off);
    let opted_in = match label.map(|value| mesh_label(value)) {
        None => defaults.opted_in,
        Some(Ok(own)) => own,
        Some(Err(mistake)) => {
            warn(format!("{mistake}; its namespace's label counts"));
            defaults.opted_in
        }
    };
    let (exclusions, mistakes) = Exclusions::read(annotations);
    for mistake in mistakes {
        warn(format!("{mistake}; this entry is ignored"));
    }
    let hbone = tunnel_annotation(annotations)
        .map_err(|mistake| warn(format!("{mistake}; the annotation is ignored")))
        .unwrap_or(false);
    let (probes, mistakes) = probes(spec);
    for mistake in mistakes {
        warn(format!("{mistake}; this probe is ignored"));
    }
    let recorded = recorded(annotations)
        .map_err(|mistake| warn(format!("{mistake}; it is enrolled anew")))
        .unwrap_or_default();
    let addresses = status_addresses(manifest);
    Some(Pod {
        recorded,
        owner: owner(manifest).unwrap_or_else(|| name.clone()),
        mode: defaults.mode,
        uid,
        namespace,
        name,
        identity,
        node,
        addresses,
        opted_in,
        namespace_opted_in: defaults.opted_in,
        hbone,
        exclusions,
        probes,
    })
}

fn phase(manifest: &k8s::Pod) -> Option<&str> {
    manifest.status.as_ref()?.phase.as_deref()
}

fn status_addresses(manifest: &k8s::Pod) -> Vec<IpAddr> {
    let status = manifest.status.as_ref();
    let many = status
        .and_then(|s| s.pod_ips.as_deref())
        .unwrap_or_default();
    let one = status.and_then(|s| s.pod_ip.as_deref());
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in many.iter().map(|ip| ip.ip.as_str()).chain(one) {
        if let Ok(address) = text.parse::<IpAddr>()
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    }
    addresses
}

/// The Deployment behind a ReplicaSet, or whatever controller owns the pod.
fn owner(manifest: &k8s::Pod) -> Option<String> {
    let owners = manifest.metadata.owner_references.as_deref()?;
    let owner = owners.iter().find(|o| o.controller == Some(true))?;
    if owner.kind != "ReplicaSet" {
        return Some(owner.name.clone());
    }
    // A Deployment names its ReplicaSets `<deployment>-<pod-template-hash>`; one without the label was
    // made by a person.
    let labels = manifest.metadata.labels.as_ref();
    let deployment = labels
        .and_then(|l| l.get("pod-template-hash"))
        .and_then(|hash| owner.name.strip_suffix(hash.as_str()))
        .and_then(|rest| rest.strip_suffix('-'));
    Some(deployment.unwrap_or(&owner.name).to_owned())
}

/// What is wrong with a probe, and where below `spec` it is: `<list>[<index>].<field>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeMistake {
    /// `containers` or `initContainers`
    pub list: &'static str,
    /// Which of them.
    pub index: usize,
    /// Such as `livenessProbe`.
    pub field: &'static str,
    /// What was expected.
    pub message: String,
}

impl fmt::Display for ProbeMistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            list,
            index,
            field,
            message,
        } = self;
        write!(f, "spec.{list}[{index}].{field}: {message}")
    }
}

/// What is wrong with the probes of a pod.
pub fn probe_mistakes(spec: &k8s::PodSpec) -> Vec<ProbeMistake> {
    probes(spec).1
}

/// Everything the kubelet sends to a pod: the probes and network hooks of all containers that run beside the
/// app, restartable init containers included.
fn probes(spec: &k8s::PodSpec) -> (Vec<Probe>, Vec<ProbeMistake>) {
    let (mut found, mut mistakes) = (Vec::new(), Vec::new());
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let all = [
        ("containers", spec.containers.as_slice()),
        ("initContainers", init),
    ];
    for (list, containers) in all {
        for (index, container) in containers.iter().enumerate() {
            for (field, handler) in handlers(container) {
                match handler.read(container) {
                    Ok(Some(probe)) if !found.contains(&probe) => match found.len() {
                        MAX_PROBES => mistakes.push(ProbeMistake {
                            list,
                            index,
                            field,
                            message: format!("expected at most {MAX_PROBES} different probes"),
                        }),
                        _ => found.push(probe),
                    },
                    Ok(_) => {}
                    Err(message) => mistakes.push(ProbeMistake {
                        list,
                        index,
                        field,
                        message,
                    }),
                }
            }
        }
    }
    found.sort_by_key(|p| (p.port, format!("{:?}", p.handler)));
    (found, mistakes)
}

/// What one probe or hook does, as far as it uses the network.
struct Handler<'a> {
    http: Option<&'a k8s::HTTPGetAction>,
    tcp: Option<&'a k8s::TCPSocketAction>,
    grpc: Option<&'a k8s::GRPCAction>,
}

fn handlers(container: &k8s::Container) -> Vec<(&'static str, Handler<'_>)> {
    let mut found = Vec::new();
    for (field, p) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        if let Some(p) = p {
            found.push((
                field,
                Handler {
                    http: p.http_get.as_ref(),
                    tcp: p.tcp_socket.as_ref(),
                    grpc: p.grpc.as_ref(),
                },
            ));
        }
    }
    let lifecycle = container.lifecycle.as_ref();
    let hooks = [
        lifecycle.and_then(|l| l.post_start.as_ref()),
        lifecycle.and_then(|l| l.pre_stop.as_ref()),
    ];
    for hook in hooks.into_iter().flatten() {
        found.push((
            "lifecycle",
            Handler {
                http: hook.http_get.as_ref(),
                tcp: hook.tcp_socket.as_ref(),
                grpc: None,
            },
        ));
    }
    found
}

impl Handler<'_> {
    /// `None`: it does not go to the pod over the network.
    fn read(&self, container: &k8s::Container) -> Result<Option<Probe>, String> {
        let elsewhere = |host: &Option<String>| host.as_deref().is_some_and(|h| !h.is_empty());
        let (port, handler) = if let Some(http) = self.http {
            if elsewhere(&http.host) {
                return Ok(None);
            }
            let path = match http.path.as_deref().unwrap_or_default() {
                "" => "/".to_owned(),
                path if path.starts_with('/') => path.to_owned(),
                path => format!("/{path}"),
            };
            short("path", &path)?;
            let get = probe::HttpGet { path };
            (
                port_of(&http.port, container)?,
                probe::Handler::HttpGet(get),
            )
        } else if let Some(tcp) = self.tcp {
            if elsewhere(&tcp.host) {
                return Ok(None);
            }
            let handler = probe::Handler::TcpSocket(probe::TcpSocket {});
            (port_of(&tcp.port, container)?, handler)
        } else if let Some(grpc) = self.grpc {
            let service = grpc.service.clone().unwrap_or_default();
            short("service", &service)?;
            let port = port_of(&IntOrString::Int(grpc.port), container)?;
            (port, probe::Handler::Grpc(probe::Grpc { service }))
        } else {
            return Ok(None);
        };
        Ok(Some(Probe {
            port: port.into(),
            handler: Some(handler),
        }))
    }
}

fn short(field: &str, text: &str) -> Result<(), String> {
    match text.len() {
        0..=MAX_PROBE_TEXT => Ok(()),
        length => Err(format!(
            "{field}: expected at most {MAX_PROBE_TEXT} bytes, found {length}"
        )),
    }
}

/// A port by number, or by the name of one of the container's ports.
fn port_of(port: &IntOrString, container: &k8s::Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|p| p.name.as_deref() == Some(name))
            .map(|p| p.container_port)
            .ok_or_else(|| format!("the container has no port named {name:?}"))?,
    };
    u16::try_from(number)
        .ok()
        .filter(|p| *p > 0)
        .ok_or_else(|| format!("expected a port from 1 to 65535, found {number}"))
}

/// Probes that count, and what each may say: a pod's record must fit the packets of its node.
const MAX_PROBES: usize = 64;
const MAX_PROBE_TEXT: usize = 512;
