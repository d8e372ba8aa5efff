//! A proxy that is replaced while requests pass fails none of them, at either node.

use std::time::Duration;

use warren_tests::http::{HTTP, Requests};
use warren_tests::lab::Lab;
use warren_tests::manifest::{Pod, account, meshed_namespace, service};
use warren_tests::scenario::scenario;
use warren_tests::wait::{let_run, wait_for};

const CLIENT: (&str, &str) = ("demo", "client");

#[test]
fn a_replaced_proxy_fails_no_request() {
    scenario(Duration::from_secs(240), |s| {
        let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
        manifests.push(Pod::idle("demo", "client", "node-1"));
        for (name, node) in [("near", "node-1"), ("far", "node-2")] {
            manifests.push(account("demo", name));
            manifests.push(Pod::http("demo", name, node).build());
            manifests.push(service("demo", name, &[(80, HTTP)]));
        }
        let lab = s.lab(2, &manifests);
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

fn replace_proxy(lab: &Lab, node: &str) {
    let before = lab.node(node).supervisor;
    lab.restart(&[&format!("node/{node}"), "--proxy"]);
    wait_for("another proxy", Duration::from_secs(40), || {
        let now = lab.node(node).supervisor;
        now != before && now != 0
    });
}
