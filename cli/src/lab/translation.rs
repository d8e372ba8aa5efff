//! Services for un-meshed pods: what kube-proxy does, as one nftables table in each node's namespace.
//!
//! The base chains are made once; an update flushes and refills only the regular chains below, in one
//! transaction, so that connection tracking stays in force throughout.
//!
//! Frames between pods of one bridge would pass no IP hook, and the replies of a translated connection would
//! not be translated back. kube-proxy asks for br_netfilter there, which is the whole machine's. Here a
//! rule of the bridge family hands such frames to the node's own stack, which routes them.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::cluster::Cluster;
use super::services::{addresses, all_slices, belongs_to, ports, takes_traffic};

/// Made once in each node's namespace. `bridge_address` is the MAC of the pods' bridge.
pub(crate) fn base(bridge_address: &str) -> String {
    format!(
        "table inet warren_lab {{
	chain services {{
	}}
	chain node_ports {{
	}}
	chain masquerades {{
	}}
	chain rejects {{
	}}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		jump services
		jump node_ports
	}}
	chain output {{
		type nat hook output priority -100; policy accept;
		jump services
		jump node_ports
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & {NODE_PORT_MARK} == {NODE_PORT_MARK} masquerade
		jump masquerades
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		jump rejects
	}}
	chain local {{
		type filter hook output priority filter; policy accept;
		jump rejects
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		jump rejects
	}}
}}
table bridge warren_lab {{
	chain prerouting {{
		type filter hook prerouting priority dstnat; policy accept;
		meta protocol ip6 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert }} return
		meta protocol {{ ip, ip6 }} ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 ether daddr != {bridge_address} meta pkttype set host ether daddr set {bridge_address}
	}}
}}
"
    )
}

/// The content of the regular chains.
pub(crate) fn rules(cluster: &Cluster) -> String {
    let slices = all_slices(cluster);
    let mut chains = Chains::default();
    for (key, service) in &cluster.services {
        let own: Vec<&EndpointSlice> = slices.iter().filter(|s| belongs_to(s, key)).collect();
        for port in ports(service) {
            let port_name = port.name.as_deref().unwrap_or_default();
            let protocol = match port.protocol.as_deref() {
                None | Some("TCP") => "tcp",
                Some("UDP") => "udp",
                Some(_) => continue,
            };
            for family in [Family::V4, Family::V6] {
                let targets = targets(&own, family, port_name);
                for address in addresses(service) {
                    if address.is_ipv4() == (family == Family::V4) {
                        let to = format!(
                            "{} daddr {address} {protocol} dport {}",
                            family.ip(),
                            port.port
                        );
                        chains.service(family, &to, protocol, &targets);
                    }
                }
                if let Some(node_port) = port.node_port {
                    chains.node_port(family, protocol, node_port, &targets);
                }
            }
        }
    }
    chains.text()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn ip(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    fn slices(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// Ready endpoints of one port.
fn targets(slices: &[&EndpointSlice], family: Family, port_name: &str) -> Vec<(String, i32)> {
    let mut targets = Vec::new();
    for slice in slices.iter().filter(|s| s.address_type == family.slices()) {
        let mut ports = slice.ports.iter().flatten();
        let port = ports.find(|p| p.name.as_deref().unwrap_or_default() == port_name);
        let Some(port) = port.and_then(|p| p.port) else {
            continue;
        };
        for endpoint in slice.endpoints.iter().flatten() {
            if let (true, Some(address)) = (takes_traffic(endpoint), endpoint.addresses.first()) {
                targets.push((address.clone(), port));
            }
        }
    }
    targets
}

#[derive(Default)]
struct Chains {
    services: String,
    node_ports: String,
    rejects: String,
    hairpins: BTreeSet<(bool, String)>,
}

impl Chains {
    fn service(&mut self, family: Family, to: &str, protocol: &str, targets: &[(String, i32)]) {
        if targets.is_empty() {
            let with = if protocol == "tcp" {
                " with tcp reset"
            } else {
                ""
            };
            let _ = writeln!(
                self.rejects,
                "add rule inet warren_lab rejects {to} reject{with}"
            );
            return;
        }
        self.remember_hairpins(family, targets);
        let dnat = dnat(family, targets);
        let _ = writeln!(
            self.services,
            "add rule inet warren_lab services {to} {dnat}"
        );
    }

    fn node_port(&mut self, family: Family, protocol: &str, port: i32, targets: &[(String, i32)]) {
        let nfproto = match family {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        };
        let to = format!("meta nfproto {nfproto} fib daddr type local {protocol} dport {port}");
        if targets.is_empty() {
            let with = if protocol == "tcp" {
                " with tcp reset"
            } else {
                ""
            };
            let _ = writeln!(
                self.rejects,
                "add rule inet warren_lab rejects {to} reject{with}"
            );
            return;
        }
        self.remember_hairpins(family, targets);
        // Masqueraded: the endpoint may be on another node, whose replies must come back through here.
        let mark = format!("meta mark set meta mark | {NODE_PORT_MARK}");
        let dnat = dnat(family, targets);
        let _ = writeln!(
            self.node_ports,
            "add rule inet warren_lab node_ports {to} {mark} {dnat}"
        );
    }

    fn remember_hairpins(&mut self, family: Family, targets: &[(String, i32)]) {
        let addresses = targets
            .iter()
            .map(|(a, _)| (family == Family::V6, a.clone()));
        self.hairpins.extend(addresses);
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for chain in ["services", "node_ports", "masquerades", "rejects"] {
            let _ = writeln!(text, "flush chain inet warren_lab {chain}");
        }
        text += &self.services;
        text += &self.node_ports;
        text += &self.rejects;
        for (v6, ip) in [(false, "ip"), (true, "ip6")] {
            let pairs: Vec<String> = self
                .hairpins
                .iter()
                .filter(|(of, _)| *of == v6)
                .map(|(_, address)| format!("{address} . {address}"))
                .collect();
            if !pairs.is_empty() {
                let pairs = pairs.join(", ");
                let _ = writeln!(
                    text,
                    "add rule inet warren_lab masquerades {ip} saddr . {ip} daddr {{ {pairs} }} ct status dnat masquerade"
                );
            }
        }
        text
    }
}

fn dnat(family: Family, targets: &[(String, i32)]) -> String {
    let ip = family.ip();
    let map: Vec<String> = targets
        .iter()
        .enumerate()
        .map(|(i, (a, p))| format!("{i} : {a} . {p}"))
        .collect();
    format!(
        "dnat {ip} to numgen random mod {} map {{ {} }}",
        targets.len(),
        map.join(", ")
    )
}

/// Packet mark of connections to node ports; the same bit as kube-proxy's.
const NODE_PORT_MARK: &str = "0x4000";
