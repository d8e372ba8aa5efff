//! Line 1: from a client pod on node 1, `curl http://web/` reaches a web pod on node 2, whose log shows
//! the client pod's address. Cross-node, same-node, pod address, Service address, IPv4 and IPv6.

use std::net::IpAddr;
use std::time::Duration;

use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, service};
use warren_tests::scenario::scenario;
use warren_tests::servers::nginx;
use warren_tests::wait::wait_until;

const CLIENT: PodRef<'_> = ("demo", "client");
const CLIENT_ID: &str = "spiffe://cluster.local/ns/demo/sa/client";

#[test]
fn curl_reaches_web_pods_by_every_name_and_address() {
    scenario(Duration::from_secs(120), |s| {
        let mut manifests = vec![
            meshed_namespace("demo"),
            Pod::idle("demo", "client", "node-1"),
        ];
        for (name, node) in [("web", "node-2"), ("local", "node-1")] {
            let command = nginx(s, name);
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            manifests.push(account("demo", name));
            manifests.push(
                Pod::new("demo", name, node)
                    .command(&command)
                    .ready_tcp(80)
                    .build(),
            );
            manifests.push(service("demo", name, &[(80, 80)]));
        }
        manifests.push(account("demo", "client"));
        let lab = s.lab(2, &manifests);

        for (name, callee_node) in [("web", "node-2"), ("local", "node-1")] {
            let before = counted(&lab, name, callee_node);
            let mut requests = 0;
            for url in [
                name.to_owned(),
                format!("{name}.demo"),
                format!("{name}.demo.svc.cluster.local"),
            ] {
                requests += 1;
                curl(&lab, &url, name, None);
            }
            let pod = lab.pod(("demo", name));
            for address in pod
                .ips
                .iter()
                .copied()
                .chain(lab.service_ips(("demo", name)))
            {
                requests += 1;
                let url = if address.is_ipv6() {
                    format!("[{address}]")
                } else {
                    address.to_string()
                };
                curl(&lab, &url, name, Some(address));
            }
            assert!(
                pod.ips.iter().any(IpAddr::is_ipv6),
                "pods are dual-stack: {:?}",
                pod.ips
            );
            let log = lab.logs(&["-n", "demo", name]);
            for address in lab.pod(CLIENT).ips {
                assert!(
                    log.contains(&format!("{address} - -")),
                    "{name}'s log has no {address}:\n{log}"
                );
            }
            // Each request went through the mesh, and both nodes say so.
            wait_until(
                "both sides to count the connections",
                Duration::from_secs(10),
                || {
                    let after = counted(&lab, name, callee_node);
                    let grown = (after.0 - before.0, after.1 - before.1);
                    if grown == (f64::from(requests), f64::from(requests)) {
                        Ok(())
                    } else {
                        Err(format!("{grown:?} of {requests}"))
                    }
                },
            );
        }
    });
}

/// One request; the answer must come from `web` and name the client's address of the right family.
#[track_caller]
fn curl(lab: &Lab, host: &str, web: &str, address: Option<IpAddr>) {
    let url = format!("http://{host}/");
    let done = lab
        .exec(CLIENT, &["curl", "-sS", "--max-time", "10", &url])
        .expect_ok();
    let client = lab.pod(CLIENT);
    let callers: Vec<IpAddr> = match address {
        Some(address) if address.is_ipv4() => vec![client.v4()],
        Some(_) => vec![client.v6()],
        None => client.ips,
    };
    let expected: Vec<String> = callers.iter().map(|ip| format!("{web} for {ip}")).collect();
    assert!(
        expected.iter().any(|e| done.stdout.trim() == e),
        "{url}: {:?}, not one of {expected:?}",
        done.stdout
    );
}

/// Requests from the client to `web` that its own node and the callee's node have counted.
fn counted(lab: &Lab, web: &str, callee_node: &str) -> (f64, f64) {
    let callee = format!("spiffe://cluster.local/ns/demo/sa/{web}");
    let at = |node: &str, reporter: &str| {
        lab.metrics(node).sum(
            "warren_http_requests_total",
            &[
                ("reporter", reporter),
                ("source_principal", CLIENT_ID),
                ("destination_principal", &callee),
                ("security", "mutual_tls"),
            ],
        )
    };
    (at("node-1", "source"), at(callee_node, "destination"))
}
