//! A proxy that is replaced while requests pass fails none of them, at either node; nor does a pod that leaves the mesh,
//! and it does not wait for clients that keep their connections.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use warren_tests::http::{HTTP, Requests};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, namespace, service};
use warren_tests::scenario::scenario;
use warren_tests::wait::{let_run, wait_for};

const CLIENT: PodRef<'_> = ("demo", "client");
const FAR: PodRef<'_> = ("demo", "far");

#[test]
fn a_replaced_proxy_fails_no_request() {
    scenario(Duration::from_secs(240), |s| {
        let lab = s.lab(2, &manifests());
        for (node, server) in [("node-1", "far"), ("node-2", "far"), ("node-1", "near")] {
            for (what, more) in [
                ("a connection each", &["--no-keep-alive"][..]),
                ("kept connections", &[]),
                ("HTTP/2", &["--h2", "--connections", "4"]),
            ] {
                let url = format!("http://{server}/");
                let args = [&[url.as_str(), "--rate", "200"], more].concat();
                let load = Requests::start(s, &lab, CLIENT, &args);
                let_run(Duration::from_secs(1));
                replace_proxy(&lab, node);
                let_run(Duration::from_secs(1));
                let report = load.stop();
                println!("{node} replaced, {what} to {server}: {} ok", report.ok);
                report.expect_no_failure(&format!("{node} replaced, {what} to {server}"));
            }
        }
    });
}

#[test]
fn a_pod_that_leaves_fails_no_request_and_waits_for_no_kept_connection() {
    scenario(Duration::from_secs(120), |s| {
        let lab = s.lab(2, &manifests());
        for (what, more) in [
            ("kept connections", &["--connections", "4"][..]),
            ("HTTP/2", &["--h2", "--connections", "4"]),
        ] {
            lab.apply(&[meshed_namespace("demo")]).expect_ok();
            for pod in [CLIENT, FAR] {
                lab.wait_for_mesh(pod, "enrolled");
            }
            let args = [&["http://far/", "--rate", "200"], more].concat();
            let load = Requests::start(s, &lab, CLIENT, &args);
            // Bash, since it neither closes a connection after its answer nor asks again.
            let far = SocketAddr::new(lab.pod(FAR).v4(), HTTP);
            let script = format!(
                "exec 3<>/dev/tcp/{}/{}; printf 'GET / HTTP/1.1\\r\\nhost: far\\r\\n\\r\\n' >&3; cat <&3",
                far.ip(),
                far.port()
            );
            let mut idle = lab.exec_background(CLIENT, &["bash", "-c", &script]);
            idle.wait_for_line(Duration::from_secs(10), |line| {
                line.starts_with("HTTP/1.1 200")
            });
            let_run(Duration::from_secs(1));

            // Kept connections are in use, and one idles for as long as nobody closes it.
            lab.apply(&[namespace("demo", &[])]).expect_ok();
            for pod in [CLIENT, FAR] {
                lab.wait_for_mesh(pod, "none");
            }
            idle.finish(Duration::from_secs(10)).expect_ok();
            let report = load.stop();
            println!("pods left, {what}: {} ok", report.ok);
            report.expect_no_failure(&format!("pods left, {what}"));
        }
    });
}

/// A client, and a server on each node.
fn manifests() -> Vec<Value> {
    let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
    manifests.push(Pod::idle("demo", "client", "node-1"));
    for (name, node) in [("near", "node-1"), ("far", "node-2")] {
        manifests.push(account("demo", name));
        manifests.push(Pod::http("demo", name, node).build());
        manifests.push(service("demo", name, &[(80, HTTP)]));
    }
    manifests
}

fn replace_proxy(lab: &Lab, node: &str) {
    let before = lab.node(node).supervisor;
    lab.restart(&[&format!("node/{node}"), "--proxy"]);
    wait_for("another proxy", Duration::from_secs(40), || {
        let now = lab.node(node).supervisor;
        now != before && now != 0
    });
}
