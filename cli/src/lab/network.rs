//! The machine room: a namespace for the fabric, one for each node and one for the controller, and the routes
//! between them. No end of any link is ever in the host's own namespace.
//!
//! ```text
//!   node-1 ──eth0╲                      ╱eth0── controller
//!                 fabric: bridge br0 ──
//!   node-2 ──eth0╱
//!   (in each node: bridge cni0, on which the stock CNI plugin puts the pods)
//! ```

use std::io;
use std::path::Path;

use super::daemon::Lab;
use super::mesh::Node;
use super::netns;
use super::publish::apply_rules;
use super::translation;
use crate::error::{Context, Result};

/// Makes all of it.
pub(crate) async fn build(lab: &Lab) -> Result<()> {
    let fabric = lab.name.netns("fabric");
    let netns = netns::create(&fabric).await?;
    forward(&netns)?;
    let mut lines = vec![
        // No learning delay, and neighbour discovery must not depend on snooping.
        "link add br0 type bridge forward_delay 0 mcast_snooping 0".to_owned(),
        "link set br0 up".into(),
    ];
    let (gateway, controller) = (lab.plan.fabric(), lab.plan.controller());
    lines.push(format!("addr add {}/24 dev br0", gateway.v4));
    lines.push(format!("addr add {}/64 dev br0 nodad", gateway.v6));
    lines.extend(routes(lab, None));
    batch(&fabric, &lines).await?;

    plug_in(lab, &fabric, "controller", controller.v4, controller.v6).await?;
    batch(&lab.name.netns("controller"), &routes(lab, None)).await?;
    for node in &lab.nodes {
        plug_in(
            lab,
            &fabric,
            &node.name,
            node.addresses.v4,
            node.addresses.v6,
        )
        .await?;
        node_network(lab, node).await?;
    }
    Ok(())
}

/// Makes a namespace with a link to the fabric's bridge.
async fn plug_in(
    lab: &Lab,
    fabric: &str,
    name: &str,
    v4: std::net::Ipv4Addr,
    v6: std::net::Ipv6Addr,
) -> Result<()> {
    let there = lab.name.netns(name);
    netns::create(&there).await?;
    // Both ends are made where they belong.
    let link = format!("link add {name} type veth peer name eth0 netns {there}");
    batch(
        fabric,
        &[
            link,
            format!("link set {name} master br0"),
            format!("link set {name} up"),
        ],
    )
    .await?;
    let gateway = lab.plan.fabric();
    batch(
        &there,
        &[
            "link set eth0 up".into(),
            format!("addr add {v4}/24 dev eth0"),
            format!("addr add {v6}/64 dev eth0 nodad"),
            // Nothing is out there; but without a route a Service's address could not be connected to.
            format!("route add default via {}", gateway.v4),
            format!("-6 route add default via {}", gateway.v6),
        ],
    )
    .await
}

async fn node_network(lab: &Lab, node: &Node) -> Result<()> {
    let bridge_address = format!("0e:57:00:00:00:{:02x}", node.number);
    let gateway = lab.plan.gateway(node.number);
    let mut lines = vec![
        // The bridge plugin would make it; made here, it has a known address from the start.
        format!(
            "link add cni0 address {bridge_address} type bridge forward_delay 0 mcast_snooping 0"
        ),
        "link set cni0 up".into(),
        format!("addr add {}/24 dev cni0", gateway.v4),
        format!("addr add {}/64 dev cni0 nodad", gateway.v6),
    ];
    lines.extend(routes(lab, Some(node)));
    batch(&node.netns_name, &lines).await?;
    forward(&node.netns)?;
    apply_rules(&node.netns, &translation::base(&bridge_address)).await
}

/// Routes to the pods of all nodes, but for those of the node itself.
fn routes(lab: &Lab, own: Option<&Node>) -> Vec<String> {
    let others = lab
        .nodes
        .iter()
        .filter(|n| own.is_none_or(|own| own.number != n.number));
    others
        .flat_map(|node| {
            let [v4, v6] = lab.plan.pod_subnets(node.number);
            let via = node.addresses;
            [
                format!("route add {v4} via {}", via.v4),
                format!("-6 route add {v6} via {}", via.v6),
            ]
        })
        .collect()
}

async fn batch(netns: &str, lines: &[String]) -> Result<()> {
    // `-n` cannot be combined with `-batch` lines of their own family option, so each line says its family.
    let (v6, v4): (Vec<&String>, Vec<&String>) = lines.iter().partition(|l| l.starts_with("-6 "));
    for (family, lines) in [(None, v4), (Some("-6"), v6)] {
        if lines.is_empty() {
            continue;
        }
        let text: Vec<String> = lines
            .iter()
            .map(|l| l.strip_prefix("-6 ").unwrap_or(l).to_owned())
            .collect();
        let mut arguments = vec!["-n", netns];
        arguments.extend(family);
        netns::ip_batch(&arguments, &text).await?;
    }
    Ok(())
}

/// Lets a namespace route, and route back out of the interface a packet came in by without telling the sender.
fn forward(netns: &Path) -> Result<()> {
    let set = || -> io::Result<()> {
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            std::fs::write(format!("/proc/sys/net/{key}"), value)?;
        }
        // Of interfaces that exist already; the larger of `all` and their own counts.
        for entry in std::fs::read_dir("/proc/sys/net/ipv4/conf")?.flatten() {
            for key in ["send_redirects", "rp_filter"] {
                std::fs::write(entry.path().join(key), "0")?;
            }
        }
        Ok(())
    };
    netns::within(netns, set)
        .and_then(|done| done)
        .context(format!("sysctls of {}", netns.display()))
}
