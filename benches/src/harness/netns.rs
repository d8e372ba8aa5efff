//! Pairs of network namespaces joined by a veth: the topology of the arms without Warren.
//!
//! Names carry the harness's process id, so that a later run can remove what a killed one left.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::Error;
use super::process::{command, succeed};

/// Two namespaces and the link between them.
pub(super) struct Pair {
    pub(super) client: Namespace,
    pub(super) server: Namespace,
}

impl Pair {
    /// The server's address in every pair.
    pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 202, 0, 2);
    const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 202, 0, 1);

    pub(super) fn new(name: &str) -> Result<Self, Error> {
        let pair = Pair {
            client: Namespace::new(&format!("{name}-client"))?,
            server: Namespace::new(&format!("{name}-server"))?,
        };
        let (client, server) = (&pair.client.name, &pair.server.name);
        succeed(&mut command(&format!(
            "ip link add eth0 netns {client} type veth peer name eth0 netns {server}"
        )))?;
        for (namespace, address) in [(client, Self::CLIENT), (server, Self::SERVER)] {
            succeed(&mut command(&format!(
                "ip -n {namespace} address add {address}/24 dev eth0"
            )))?;
            succeed(&mut command(&format!("ip -n {namespace} link set eth0 up")))?;
        }
        Ok(pair)
    }
}

/// A namespace; removed when dropped.
pub(super) struct Namespace {
    name: String,
}

impl Namespace {
    fn new(name: &str) -> Result<Self, Error> {
        let name = format!("{PREFIX}{}-{name}", std::process::id());
        succeed(&mut command(&format!("ip netns add {name}")))?;
        let namespace = Namespace { name };
        succeed(&mut command(&format!(
            "ip -n {} link set lo up",
            namespace.name
        )))?;
        use_reno(&namespace.path())?;
        Ok(namespace)
    }

    pub(super) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = succeed(&mut command(&format!("ip netns delete {}", self.name)));
    }
}

/// Sockets made in the namespace from now on use `reno`.
pub(super) fn use_reno(netns: &Path) -> Result<(), Error> {
    succeed(&mut command(&format!(
        "nsenter --net={} sysctl -q -w net.ipv4.tcp_congestion_control=reno",
        netns.display()
    )))
    .map(drop)
}

/// Removes the namespaces of harnesses that no longer run. Their processes died with them.
pub(super) fn remove_stale() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if let Some(pid) = owner
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = succeed(&mut command(&format!("ip netns delete {name}")));
        }
    }
}

const PREFIX: &str = "warren-bench-";
