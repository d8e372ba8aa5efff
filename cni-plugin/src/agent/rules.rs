//! The capture rules of one pod's network namespace: an nftables table, and a routing rule with its
//! table for the replies of delivered connections.
//!
//! The table is replaced as a whole in one transaction, so that there is no moment without rules and
//! none with half of them. What the kernel lists after that is kept in the pod's record: as long as it
//! lists the same, applying again does nothing.
//!
//! - Only the first packet of a new connection is translated. Without the match on SYN the next packet
//!   of a connection that was open before would be translated, and the connection reset.
//! - Inbound is what is addressed to the pod itself. What it forwards (containers inside the pod) is not, and
//!   a neighbour's packet for a foreign address must not become a connection of the proxy.
//! - A connection to a port that nobody listens on is refused, as without a mesh: the listener it would be redirected to
//!   accepts before anyone can ask the app, and a TCP probe of a dead app would pass. Refused, and not let
//!   through: the app may begin to listen just then.
//! - Deleting the last translating rule of a namespace takes connection tracking away from it and cuts
//!   the connections that are being redirected. On un-enrolment the rules are first swapped for ones
//!   that match nothing ([`Ruleset::released`]) and removed when the last of them has ended.
//! - A delivered connection has the caller's address as its source, and perhaps the port of a
//!   connection of that caller which is being captured: it is tracked in a zone of its own, for its
//!   original direction only, because the app's replies carry nothing to choose a zone by.
//! - No sysctl is needed. A delivered packet never leaves the host's own routing: it is looked up once,
//!   on output, so reverse-path filters do not see it (tried with `rp_filter` 0, 1 and 2).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_api::names::{DELIVERED_MARK, INBOUND_PORT, OUTBOUND_PORT, ROUTE_TABLE, TUNNEL_PORT};
use mesh_api::proto::mesh::NodePod;
use serde::{Deserialize, Serialize};

use super::netns::Netns;

#[cfg(test)]
mod tests;

/// A mark that tells the mesh's own packets from the pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshMark(pub u32);

/// What the namespace is to contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    text: String,
    captures: bool,
}

/// What was put in force, to see later whether it still is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Applied {
    captures: bool,
    wanted: String,
    listed: String,
}

impl Ruleset {
    /// Captures the pod's TCP connections, but for its exclusions.
    pub fn capturing(mark: MeshMark, pod: &NodePod) -> Result<Self, InvalidExclusion> {
        let exclusions = Exclusions::of(pod)?;
        Ok(Self::with_translation(mark, Some(&exclusions)))
    }

    /// Captures nothing new and keeps what was captured before alive.
    pub fn released(mark: MeshMark) -> Self {
        Self::with_translation(mark, None)
    }

    /// `exclusions`: `None` for rules that never match.
    fn with_translation(mark: MeshMark, exclusions: Option<&Exclusions>) -> Self {
        let mark = format!("{:#010x}", mark.0);
        let first = "tcp flags & (syn | ack | rst | fin) == syn";
        let (outbound, inbound, closed) = match exclusions {
            Some(exclusions) => {
                let to_the_pod = format!(
                    "iifname \"lo\" return\n\
                     meta mark {mark} return\n\
                     fib daddr type != local return\n\
                     {}",
                    ports(&exclusions.inbound),
                );
                (
                    format!(
                        "meta mark {mark} return\n\
                         oifname \"lo\" return\n\
                         fib daddr type local return\n\
                         {}{}{first} redirect to :{OUTBOUND_PORT}\n",
                        exclusions.destinations(),
                        ports(&exclusions.outbound),
                    ),
                    format!("{to_the_pod}{first} redirect to :{INBOUND_PORT}\n"),
                    // `transparent` is 0 or 1 where a socket is found, also one in TIME_WAIT, which takes a SYN; `wildcard`
                    // and `mark` match none of those.
                    format!(
                        "{to_the_pod}{first} socket transparent <= 1 return\n\
                         {first} reject with tcp reset\n"
                    ),
                )
            }
            None => {
                // A mark is never two values at once.
                let never = "meta mark 0x00000001 meta mark 0x00000002 tcp dport 1";
                (
                    format!("{never} redirect to :{OUTBOUND_PORT}\n"),
                    format!("{never} redirect to :{INBOUND_PORT}\n"),
                    String::new(),
                )
            }
        };
        // Priorities are numbers: nftables 1.0.6 does not take `dstnat` in an output hook.
        let text = format!(
            "table {TABLE}\n\
             delete table {TABLE}\n\
             table {TABLE} {{\n\
             chain outbound {{\ntype nat hook output priority -100; policy accept;\n{outbound}}}\n\
             chain inbound {{\ntype nat hook prerouting priority -100; policy accept;\n{inbound}}}\n\
             chain closed {{\ntype filter hook prerouting priority -110; policy accept;\n{closed}}}\n\
             chain zone {{\ntype filter hook output priority -300; policy accept;\n\
             meta mark {mark} tcp sport != {{ {OUTBOUND_PORT}, {INBOUND_PORT}, {TUNNEL_PORT} }} \
             fib daddr type local ct original zone set {ZONE}\n}}\n\
             chain delivered {{\ntype filter hook output priority -150; policy accept;\n\
             meta mark {mark} meta l4proto tcp ct state new fib daddr type local \
             ct mark set {DELIVERED_MARK:#x}\n}}\n\
             chain replies {{\ntype route hook output priority -150; policy accept;\n\
             ct direction reply ct mark {DELIVERED_MARK:#x} meta mark set {DELIVERED_MARK:#x}\n}}\n\
             }}\n"
        );
        Self {
            text,
            captures: exclusions.is_some(),
        }
    }

    /// What `nft -f` is given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Puts the rules in force, unless they are. `before` is what the last call returned.
    pub async fn apply(self, netns: &Netns, before: Option<Applied>) -> io::Result<Applied> {
        netns
            .run(move || {
                if let Some(before) = before
                    && before.wanted == self.text
                    && list()?.as_deref() == Some(&before.listed)
                {
                    add_routing()?;
                    return Ok(before);
                }
                // Routing first: a connection that is delivered needs it at once.
                add_routing()?;
                run("nft", &["-f", "-"], &self.text)?;
                let listed = list()?.ok_or_else(|| io::Error::other("the rules vanished"))?;
                Ok(Applied {
                    captures: self.captures,
                    wanted: self.text,
                    listed,
                })
            })
            .await
    }
}

impl Applied {
    /// Whether these rules capture: false after [`Ruleset::released`].
    pub fn captures(&self) -> bool {
        self.captures
    }

    /// What is missing or different, for a person. `None`: nothing is.
    pub async fn missing(self, netns: &Netns) -> io::Result<Option<String>> {
        netns
            .run(move || {
                let listed = list()?;
                if listed.is_none() {
                    return Ok(Some(format!("table `{TABLE}` is missing")));
                }
                if listed.as_deref() != Some(&self.listed) {
                    return Ok(Some(format!("table `{TABLE}` was changed")));
                }
                for family in families() {
                    if !has_routing_rule(family)? {
                        return Ok(Some(format!(
                            "`ip {family} rule fwmark {DELIVERED_MARK:#x} lookup {ROUTE_TABLE}` is missing"
                        )));
                    }
                }
                Ok(None)
            })
            .await
    }
}

/// Removes every trace. Nothing to remove is no error.
pub async fn remove(netns: &Netns) -> io::Result<()> {
    netns
        .run(|| {
            if list()?.is_some() {
                run("nft", &["-f", "-"], &format!("delete table {TABLE}\n"))?;
            }
            for family in families() {
                while has_routing_rule(family)? {
                    run("ip", &[&[family, "rule", "del"][..], &RULE].concat(), "")?;
                }
                // Flushing a table that does not exist is an error to some versions of ip.
                let _ = run("ip", &[family, "route", "flush", "table", TABLE_NUMBER], "");
            }
            Ok(())
        })
        .await
}

/// Whether there are rules.
pub async fn present(netns: &Netns) -> io::Result<bool> {
    netns.run(|| Ok(list()?.is_some())).await
}

/// An annotation that the controller should have refused.
#[derive(Debug, thiserror::Error)]
#[error("exclusion {0:?} is not a CIDR or port")]
pub struct InvalidExclusion(String);

#[derive(Default)]
struct Exclusions {
    inbound: BTreeSet<u16>,
    outbound: BTreeSet<u16>,
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

impl Exclusions {
    fn of(pod: &NodePod) -> Result<Self, InvalidExclusion> {
        let port =
            |port: &u32| u16::try_from(*port).map_err(|_| InvalidExclusion(port.to_string()));
        let mut exclusions = Self {
            inbound: (pod.exclude_inbound_ports.iter().map(port)).collect::<Result<_, _>>()?,
            outbound: (pod.exclude_outbound_ports.iter().map(port)).collect::<Result<_, _>>()?,
            ..Self::default()
        };
        // HBONE is a tunnel already.
        exclusions.inbound.insert(TUNNEL_PORT);
        for cidr in &pod.exclude_outbound_cidrs {
            let net = cidr
                .parse()
                .or_else(|_| cidr.parse::<IpAddr>().map(IpNet::from));
            match net.map_err(|_| InvalidExclusion(cidr.clone()))?.trunc() {
                IpNet::V4(net) => exclusions.v4.push(net),
                IpNet::V6(net) => exclusions.v6.push(net),
            }
        }
        // Sets of nftables take no overlapping intervals.
        exclusions.v4 = Ipv4Net::aggregate(&exclusions.v4);
        exclusions.v6 = Ipv6Net::aggregate(&exclusions.v6);
        Ok(exclusions)
    }

    fn destinations(&self) -> String {
        let mut text = String::new();
        for (family, nets) in [("ip", joined(&self.v4)), ("ip6", joined(&self.v6))] {
            if !nets.is_empty() {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{family} daddr {{ {nets} }} return");
            }
        }
        text
    }
}

fn ports(ports: &BTreeSet<u16>) -> String {
    if ports.is_empty() {
        return String::new();
    }
    let ports: Vec<u16> = ports.iter().copied().collect();
    format!("tcp dport {{ {} }} return\n", joined(&ports))
}

fn joined<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    items.join(", ")
}

/// `None`: there is no such table.
fn list() -> io::Result<Option<String>> {
    let tables = run("nft", &["list", "tables"], "")?;
    if !tables
        .lines()
        .any(|line| line.trim() == format!("table {TABLE}"))
    {
        return Ok(None);
    }
    run("nft", &["-s", "-n", "list", "table", "inet", "warren"], "").map(Some)
}

fn add_routing() -> io::Result<()> {
    for family in families() {
        if !has_routing_rule(family)? {
            run("ip", &[&[family, "rule", "add"][..], &RULE].concat(), "")?;
        }
        let route = ["route", "replace", "local", "default", "dev", "lo", "table"];
        run(
            "ip",
            &[&[family][..], &route[..], &[TABLE_NUMBER]].concat(),
            "",
        )?;
    }
    Ok(())
}

fn has_routing_rule(family: &str) -> io::Result<bool> {
    // Numbers: /etc/iproute2/rt_tables may have a name for the table.
    let rules = run("ip", &["-N", family, "rule", "show"], "")?;
    let ours = format!("fwmark {DELIVERED_MARK:#x} lookup {ROUTE_TABLE}");
    Ok(rules.lines().any(|line| line.trim_end().ends_with(&ours)))
}

/// The address families that the calling thread's namespace speaks.
fn families() -> Vec<&'static str> {
    // /proc/sys/net shows the namespace of whoever reads it.
    let disabled = Path::new("/proc/sys/net/ipv6/conf/lo/disable_ipv6");
    match std::fs::read_to_string(disabled) {
        Ok(value) if value.trim() == "0" => vec!["-4", "-6"],
        _ => vec!["-4"],
    }
}

fn run(program: &str, arguments: &[&str], input: &str) -> io::Result<String> {
    let failed = |why: &dyn std::fmt::Display| {
        io::Error::other(format!("`{program} {}`: {why}", arguments.join(" ")))
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(&e))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why in its own words.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| failed(&e))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(&why));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

const TABLE: &str = "inet warren";
/// [`ROUTE_TABLE`], as text.
const TABLE_NUMBER: &str = "100";
const RULE: [&str; 4] = ["fwmark", "0x111", "lookup", TABLE_NUMBER];
/// Connection-tracking zone of the original direction of delivered connections.
const ZONE: u16 = 15008;
