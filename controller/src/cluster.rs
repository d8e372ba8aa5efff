//! What is written to a Kubernetes API server, beside what the authority keeps there.
//!
//! Every replica records the enrolment of the pods whose agents it serves ([`record`]), says how far the
//! nodes it serves are ([`replicas`]), and takes taints from nodes whose agents report to it ([`taint`]). What
//! one replica is enough for is done by the leader ([`lease`]): [`status`], [`events`], XMesh ([`mesh`]).

pub mod events;
pub mod lease;
pub mod mesh;
pub mod record;
pub mod replicas;
pub mod status;
pub mod taint;

use kube::api::PatchParams;

/// Who writes, in `metadata.managedFields`, Events, and the status of routes.
pub const CONTROLLER: &str = "warren-mesh.io/controller";

/// The name of this replica: that of its pod.
pub fn replica_name(configured: Option<&str>) -> String {
    let environment = || {
        std::env::var("POD_NAME")
            .ok()
            .filter(|name| !name.is_empty())
    };
    let host = || {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        name.map(|name| name.trim().to_lowercase())
    };
    let name = configured
        .map(str::to_owned)
        .or_else(environment)
        .or_else(host);
    name.unwrap_or_else(|| "warren-controller".into())
}

fn as_us() -> PatchParams {
    PatchParams {
        field_manager: Some("warren-controller".into()),
        ..PatchParams::default()
    }
}
