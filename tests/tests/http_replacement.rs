//! A proxy that is replaced while requests pass fails none of them, at either node; nor does a pod that leaves the mesh,
//! and it does not wait for clients that keep their connections. One that comes back at once keeps them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use warren_tests::http::{HTTP, Requests};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, namespace, service};
use warren_tests::python::interpreter;
use warren_tests::scenario::scenario;
use warren_tests::wait::{let_run, wait_for, wait_until};

/// How long a connection that is idle outlives its pod's time in the mesh.
const QUIET: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(10);
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

#[test]
fn a_pod_that_comes_back_at_once_keeps_its_connections() {
    scenario(Duration::from_secs(180), |s| {
        let lab = s.lab(2, &manifests());
        let far = SocketAddr::new(lab.pod(FAR).v4(), HTTP).to_string();
        for _ in 0..10 {
            for pod in [CLIENT, FAR] {
                lab.wait_for_mesh(pod, "enrolled");
            }
            // Asks twice on one connection: at once, and when the file is there.
            let ask = s.fresh_path("ask");
            let script = "import http.client, os, sys, time\n\
                far = http.client.HTTPConnection(sys.argv[1])\n\
                def ask():\n  far.request('GET', '/')\n  print(len(far.getresponse().read()) > 0, flush=True)\n\
                ask()\n\
                far.auto_open = 0\n\
                while not os.path.exists(sys.argv[2]): time.sleep(0.05)\n\
                ask()\n";
            let python = interpreter().display().to_string();
            let file = ask.display().to_string();
            let mut kept = lab.exec_background(CLIENT, &[&python, "-c", script, &far, &file]);
            kept.wait_for_line(PATIENCE, |line| line == "True");

            let left = Instant::now();
            lab.apply(&[namespace("demo", &[])]).expect_ok();
            wait_until("the proxy to be told", PATIENCE, || {
                let pods = lab.metrics("node-1").sum("warren_pods", &[]);
                (pods == 0.).then_some(()).ok_or(pods)
            });
            lab.apply(&[meshed_namespace("demo")]).expect_ok();
            for pod in [CLIENT, FAR] {
                lab.wait_for_mesh(pod, "enrolled");
            }
            let away = left.elapsed();
            // Longer than what is waited for the last request of a pod that stays away.
            let_run(QUIET + Duration::from_secs(1));
            std::fs::write(&ask, "").expect("the scenario's directory can be written");
            let ended = kept.finish(PATIENCE);
            println!("away for {away:?}");
            if away < QUIET {
                ended.expect_ok();
                return;
            }
        }
        panic!("a pod was never back within {QUIET:?}");
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
