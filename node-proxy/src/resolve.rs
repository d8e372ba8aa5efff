//! From the address a pod wanted to reach to how its proxy gets there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_api::errors::ProxyError;
use mesh_api::names::{INBOUND_PORT, OUTBOUND_PORT, TUNNEL_PORT};
use mesh_api::proto::mesh::{EnrolmentState, TunnelKind};

use crate::pods::{Pod, Pods};
use crate::table::{ServicePort, Table, Workload};

/// What the original destination stands for.
#[derive(Debug)]
pub enum Destination {
    /// A declared port of a Service.
    Service(Arc<ServicePort>),
    /// Anything else: an address to reach as it is.
    Address,
}

/// How to reach one address.
#[derive(Debug)]
pub enum Path {
    /// A pod of this node: no tunnel, the same checks.
    Local(Arc<Workload>, Arc<Pod>),
    /// Through a tunnel to a Warren node at this address.
    Tunnel(Arc<Workload>, SocketAddr),
    /// Over HBONE to the pod's own address.
    Hbone(Arc<Workload>, SocketAddr),
    /// Outside the mesh, as the pod would have connected itself.
    Direct,
}

/// Whether an original destination is the proxy's own listener: somebody connected to the capture port
/// itself, which is not a destination.
pub fn is_own_listener(destination: SocketAddr, listener: SocketAddr) -> bool {
    destination == listener || matches!(destination.port(), OUTBOUND_PORT | INBOUND_PORT)
}

/// The path to `to`, seen from node `node`.
pub fn path(table: &Table, pods: &Pods, node: &str, to: SocketAddr) -> Result<Path, ProxyError> {
    let Some(workload) = table.workload(to.ip()) else {
        return Ok(Path::Direct);
    };
    if workload.exclude_inbound_ports.contains(&to.port()) {
        return Ok(Path::Direct);
    }
    match (workload.state, workload.tunnel) {
        (EnrolmentState::Leaving | EnrolmentState::Unspecified, _) => Ok(Path::Direct),
        (_, TunnelKind::Hbone) => {
            let address = SocketAddr::new(to.ip(), TUNNEL_PORT);
            Ok(Path::Hbone(workload, address))
        }
        (_, TunnelKind::Warren | TunnelKind::Unspecified) if *workload.node == *node => {
            // In the table but not on this node any more, or not yet: never plaintext.
            let pod = pods.by_address(to.ip()).ok_or(ProxyError::NotLocal)?;
            Ok(Path::Local(workload, pod))
        }
        (_, TunnelKind::Warren | TunnelKind::Unspecified) => {
            let address =
                node_address(&workload.node_addresses, to.ip()).ok_or(ProxyError::TunnelConnect)?;
            Ok(Path::Tunnel(
                workload,
                SocketAddr::new(address, TUNNEL_PORT),
            ))
        }
    }
}

/// A node's address of the family of the traffic, or its only one.
fn node_address(addresses: &[IpAddr], to: IpAddr) -> Option<IpAddr> {
    addresses
        .iter()
        .find(|a| a.is_ipv4() == to.is_ipv4())
        .or(addresses.first())
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capture_ports_are_no_destinations() {
        let listener = "10.0.0.1:15001".parse().unwrap();
        assert!(is_own_listener(listener, listener));
        assert!(is_own_listener("10.9.9.9:15006".parse().unwrap(), listener));
        assert!(!is_own_listener("10.9.9.9:80".parse().unwrap(), listener));
    }

    #[test]
    fn tunnels_go_over_the_traffics_own_family_if_the_node_has_it() {
        let v4: IpAddr = "192.168.0.2".parse().unwrap();
        let v6: IpAddr = "fd00::2".parse().unwrap();
        assert_eq!(
            node_address(&[v4, v6], "fd01::1".parse().unwrap()),
            Some(v6)
        );
        assert_eq!(
            node_address(&[v4, v6], "10.0.0.1".parse().unwrap()),
            Some(v4)
        );
        assert_eq!(node_address(&[v4], "fd01::1".parse().unwrap()), Some(v4));
        assert_eq!(node_address(&[], v4), None);
    }
}
