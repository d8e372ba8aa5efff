//! Line 2: a capture on the link between nodes holds only TLS 1.3 on 15008; the payload's marker string
//! appears nowhere.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_api::names::{CONTROLLER_PORT, TUNNEL_PORT};
use warren_tests::capture::{Capture, Recording, tls};
use warren_tests::lab::Node;
use warren_tests::load::attempt;
use warren_tests::manifest::{BLAST, CLIENT, ECHO, FAR, near_and_far};
use warren_tests::scenario::scenario;

const MARKER: &str = "warren-payload-marker-7f3a9c";
const ICMPV6: u8 = 58;
const IGMP: u8 = 2;

#[test]
fn only_tls_1_3_on_the_tunnel_port_crosses_the_link() {
    scenario(Duration::from_secs(120), |s| {
        let lab = s.lab(2, &near_and_far());
        let nodes = lab.nodes();
        let captures = nodes
            .iter()
            .map(|node| Capture::start(s, node))
            .collect::<Vec<_>>();

        let far = lab.pod(FAR);
        let mut targets: Vec<IpAddr> = far.ips.clone();
        targets.extend(lab.service_ips(FAR));
        for ip in &targets {
            let answer = attempt(
                &lab,
                CLIENT,
                &["send", &SocketAddr::new(*ip, ECHO).to_string(), MARKER],
            );
            assert_eq!(answer["answer"], MARKER, "{ip}: {answer}");
            let blast = attempt(
                &lab,
                CLIENT,
                &["blast", &SocketAddr::new(*ip, BLAST).to_string(), "1000000"],
            );
            assert_eq!(blast["bytes"], 1_000_000, "{ip}: {blast}");
        }

        for (node, capture) in nodes.iter().zip(captures) {
            let recording = capture.stop();
            assert!(
                !recording.contains(MARKER.as_bytes()),
                "the payload crossed {}'s link in clear",
                node.name
            );
            judge(&recording, node, &nodes);
        }
    });
}

fn judge(recording: &Recording, node: &Node, nodes: &[Node]) {
    assert!(
        recording.packets > 100,
        "{}: only {} packets",
        node.name,
        recording.packets
    );
    let strangers: BTreeSet<_> = recording
        .other_ip
        .iter()
        .filter(|(p, ..)| ![ICMPV6, IGMP].contains(p))
        .collect();
    assert!(
        strangers.is_empty(),
        "{}: packets that are not TCP: {strangers:?}",
        node.name
    );
    assert!(
        recording.other_ethernet.is_empty(),
        "{}: frames {:?}",
        node.name,
        recording.other_ethernet
    );

    let node_addresses: Vec<IpAddr> = nodes.iter().flat_map(|n| n.addresses.clone()).collect();
    let (mut client_hellos, mut server_hellos, mut encrypted) = (0, 0, 0);
    for ((from, to), payload) in &recording.tcp {
        let ports = [from.port(), to.port()];
        if ports.contains(&CONTROLLER_PORT) {
            continue; // TLS as well, but older than the capture
        }
        assert!(
            ports.contains(&TUNNEL_PORT),
            "{}: a flow {from} -> {to}",
            node.name
        );
        for end in [from.ip(), to.ip()] {
            assert!(
                node_addresses.contains(&end),
                "{}: a tunnel from or to {end}, not a node",
                node.name
            );
        }
        if payload.is_empty() {
            continue;
        }
        let seen = tls(payload).unwrap_or_else(|e| panic!("{}: {from} -> {to}: {e}", node.name));
        assert_eq!(
            seen.versions,
            [0x0304],
            "{}: {from} -> {to}: TLS versions",
            node.name
        );
        encrypted += seen.encrypted;
        if seen.server {
            server_hellos += 1;
        } else {
            client_hellos += 1;
            let name = seen.server_name.unwrap_or_default();
            assert!(
                name.ends_with(".id.warren-mesh.io"),
                "{from} -> {to}: server name {name:?}"
            );
        }
    }
    assert!(
        client_hellos > 0 && client_hellos == server_hellos,
        "{client_hellos} and {server_hellos} hellos"
    );
    // 4 MB in each direction at 16 KiB a record at most.
    assert!(encrypted > 250, "only {encrypted} encrypted records");
}
