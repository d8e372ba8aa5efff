//! Who may come in plaintext: modes, declared probes, exclusions by annotation.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use warren_tests::http::ADMIN;
use warren_tests::lab::{Lab, Options, PodRef, in_namespace};
use warren_tests::load::{HoldReport, Running, attempt};
use warren_tests::manifest::{
    CLOSED, ECHO, Pod, WHO, account, echo_service, meshed_namespace, namespace,
};
use warren_tests::metrics::Metrics;
use warren_tests::process::run;
use warren_tests::scenario::{binary, scenario};
use warren_tests::servers::nginx;
use warren_tests::wait::wait_until;

const MESHED: PodRef<'_> = ("demo", "client");
const OTHER: PodRef<'_> = ("demo", "other");
const UNMESHED: PodRef<'_> = ("outside", "client");
const OPENED: &str = "warren_tcp_connections_opened_total";
const FAILED: &str = "warren_tcp_connections_failed_total";

#[test]
fn modes_decide_on_callers_outside_the_mesh() {
    scenario(Duration::from_secs(120), |s| {
        let web = nginx(s, "web");
        let web: Vec<&str> = web.iter().map(String::as_str).collect();
        let strict = [
            ("warren-mesh.io/mesh", "enabled"),
            ("warren-mesh.io/mode", "strict"),
        ];
        let mut manifests = vec![
            meshed_namespace("demo"),
            namespace("outside", &[]),
            namespace("vault", &strict),
            account("demo", "client"),
            Pod::idle("demo", "client", "node-1"),
            Pod::idle("outside", "client", "node-1"),
            // Ready only if its declared probe passes in strict mode, too.
            account("vault", "web"),
            Pod::new("vault", "web", "node-2")
                .command(&web)
                .ready_http(80, "/healthz")
                .build(),
        ];
        for namespace in ["demo", "vault"] {
            manifests.extend([
                account(namespace, "server"),
                echo_service(namespace, "server"),
            ]);
            manifests.push(Pod::echo(namespace, "server", "node-2").build());
        }
        let lab = s.lab(2, &manifests);
        for pod in [
            MESHED,
            ("demo", "server"),
            ("vault", "server"),
            ("vault", "web"),
        ] {
            lab.wait_for_mesh(pod, "enrolled");
        }

        // Permissive: both are served, and the labels say who was what.
        expect_served(&lab, MESHED, "server.demo");
        expect_served(&lab, UNMESHED, "server.demo");
        let metrics = lab.metrics("node-2");
        let callee = (
            "destination_principal",
            "spiffe://cluster.local/ns/demo/sa/server",
        );
        for labels in [
            [("security", "plaintext"), ("source_principal", "unknown")],
            [
                ("security", "mutual_tls"),
                (
                    "source_principal",
                    "spiffe://cluster.local/ns/demo/sa/client",
                ),
            ],
        ] {
            let labels = [("reporter", "destination"), callee, labels[0], labels[1]];
            assert!(
                metrics.sum(OPENED, &labels) >= 1.0,
                "{labels:?}\n{}",
                metrics.describe(OPENED)
            );
        }

        // Strict: only callers with an identity.
        expect_served(&lab, MESHED, "server.vault");
        let refused = |m: &Metrics| {
            m.sum(
                FAILED,
                &[("reporter", "destination"), ("reason", "plaintext_refused")],
            )
        };
        let before = refused(&lab.metrics("node-2"));
        for target in [
            format!("server.vault:{WHO}"),
            SocketAddr::new(lab.pod(("vault", "server")).v6(), WHO).to_string(),
        ] {
            let answer = attempt(&lab, UNMESHED, &["who", &target]);
            assert!(
                !answer["error"].is_null(),
                "an un-meshed caller was served in strict mode: {answer}"
            );
        }
        assert!(
            refused(&lab.metrics("node-2")) >= before + 2.0,
            "the metric of refusals"
        );
        lab.wait_for_log(&["node/node-2"], "plaintext_refused");

        // The node's own addresses: what the pod declares and no more.
        let node = lab.node("node-2").netns;
        let pod = lab.pod(("vault", "web"));
        for ip in &pod.ips {
            let at = if ip.is_ipv6() {
                format!("[{ip}]")
            } else {
                ip.to_string()
            };
            let status = |path: &str| {
                let mut curl = in_namespace(&node, "curl");
                curl.args([
                    "-s",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "--max-time",
                    "5",
                ]);
                run(
                    curl.arg(format!("http://{at}{path}")),
                    Duration::from_secs(10),
                )
                .stdout
            };
            assert_eq!(status("/healthz"), "200", "the declared probe of {ip}");
            assert_ne!(status("/secret"), "200", "an undeclared path of {ip}");
        }
        let target = format!("{}:{WHO}", lab.pod(("vault", "server")).v4());
        let who = from_node(&node, &["who", &target]);
        assert!(
            !who["error"].is_null(),
            "an undeclared port answered the node: {who}"
        );
        let target = format!("{}:{ECHO}", lab.pod(("vault", "server")).v4());
        let sent = from_node(&node, &["send", &target, "more than a probe"]);
        assert_ne!(
            sent["answer"], "more than a probe",
            "a TCP probe's port carried bytes: {sent}"
        );

        // Permissive from now on, without a restart.
        lab.apply(&[meshed_namespace("vault")]).expect_ok();
        wait_until("permissive mode", Duration::from_secs(10), || {
            let answer = attempt(&lab, UNMESHED, &["who", &format!("server.vault:{WHO}")]);
            if answer["error"].is_null() {
                Ok(())
            } else {
                Err(answer)
            }
        });
    });
}

#[test]
fn annotations_exclude_ports_and_destinations() {
    scenario(Duration::from_secs(90), |s| {
        let echo = |name: &str| Pod::echo("demo", name, "node-2");
        let mut manifests = vec![
            meshed_namespace("demo"),
            account("demo", "client"),
            Pod::idle("demo", "client", "node-1"),
        ];
        for name in ["server", "open", "port", "cidr"] {
            manifests.push(account("demo", name));
        }
        manifests.push(echo("server").build());
        manifests.push(
            echo("open")
                .annotation("warren-mesh.io/exclude-inbound-ports", &WHO.to_string())
                .build(),
        );
        let idle = |name: &str| Pod::new("demo", name, "node-1");
        manifests.push(
            idle("port")
                .annotation("warren-mesh.io/exclude-outbound-ports", &WHO.to_string())
                .build(),
        );
        // Every pod of the lab, IPv4: the annotation is read at enrolment, before addresses are known.
        manifests.push(
            idle("cidr")
                .annotation("warren-mesh.io/exclude-outbound-cidrs", "0.0.0.0/0")
                .build(),
        );
        let lab = s.lab(2, &manifests);

        let (server, open) = (lab.pod(("demo", "server")), lab.pod(("demo", "open")));
        let tunnelled = |caller: &str| {
            let labels = [
                ("reporter", "source"),
                ("security", "mutual_tls"),
                ("source_workload", caller),
            ];
            lab.metrics("node-1").sum(OPENED, &labels)
        };
        // caller, address, port, through the mesh?
        for (caller, ip, port, meshed) in [
            ("client", server.v4(), WHO, true),
            ("client", open.v4(), WHO, false),
            ("client", open.v6(), WHO, false),
            ("client", open.v4(), WHO + 1, true),
            ("port", server.v4(), WHO, false),
            ("port", server.v6(), WHO, false),
            ("port", server.v4(), WHO + 1, true),
            ("cidr", server.v4(), WHO, false),
            ("cidr", server.v6(), WHO, true),
        ] {
            let what = format!("{caller} to {ip} port {port}");
            let before = tunnelled(caller);
            let target = SocketAddr::new(ip, port).to_string();
            let caller_pod = ("demo", caller);
            let answer = if port == WHO {
                attempt(&lab, caller_pod, &["who", &target])
            } else {
                attempt(&lab, caller_pod, &["half-close", &target, "10"])
            };
            assert!(answer["error"].is_null(), "{what}: {answer}");
            if port == WHO {
                let caller_ips: Vec<String> = lab
                    .pod(caller_pod)
                    .ips
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                assert!(
                    caller_ips.iter().any(|c| answer["ip"] == **c),
                    "{what}: {answer}"
                );
            }
            let grown = tunnelled(caller) - before;
            assert_eq!(
                grown,
                if meshed { 1.0 } else { 0.0 },
                "{what}: connections in the mesh"
            );
        }
        // The one port is excluded, not the pod.
        let answer = attempt(
            &lab,
            ("demo", "port"),
            &["who", &SocketAddr::new(server.v4(), CLOSED).to_string()],
        );
        assert!(!answer["error"].is_null());
    });
}

#[track_caller]
fn expect_served(lab: &Lab, caller: PodRef<'_>, server: &str) {
    let answer = attempt(lab, caller, &["who", &format!("{server}:{WHO}")]);
    let ips: Vec<String> = lab
        .pod(caller)
        .ips
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        ips.iter().any(|ip| answer["ip"] == **ip),
        "{caller:?} to {server}: {answer}"
    );
}

/// The same experiment from the node's own namespace.
#[track_caller]
fn from_node(netns: &str, args: &[&str]) -> Value {
    let program = binary("mesh-try").display().to_string();
    let mut command: Command = in_namespace(netns, &program);
    let done = run(command.args(args), Duration::from_secs(30)).expect_ok();
    serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
}

/// A pod whose callers use up its budget is not unhealthy: a restart would make room for the same callers.
#[test]
fn a_pod_at_its_limits_is_still_probed() {
    scenario(Duration::from_secs(90), |s| {
        let strict = [
            ("warren-mesh.io/mesh", "enabled"),
            ("warren-mesh.io/mode", "strict"),
        ];
        let mut manifests = vec![meshed_namespace("demo"), namespace("vault", &strict)];
        for client in ["client", "other"] {
            manifests.extend([account("demo", client), Pod::idle("demo", client, "node-1")]);
        }
        let [echo, http] =
            ["mesh-echo", "mesh-http"].map(|name| binary(name).display().to_string());
        let both = format!("{echo} & exec {http} --name server");
        for namespace in ["demo", "vault"] {
            manifests.extend([
                account(namespace, "server"),
                echo_service(namespace, "server"),
                Pod::new(namespace, "server", "node-2")
                    .command(&["sh", "-c", &both])
                    .ready_http(ADMIN, "/count")
                    .build(),
            ]);
        }
        let limits = "limits: {connections: 8, streams: 8, sockets: 8, requests: 8}\n";
        let limits = s.file("proxy.yaml", limits);
        let options = Options {
            ca: None,
            args: vec!["--config".into(), format!("proxy={}", limits.display())],
        };
        let lab = s.lab_with(2, &manifests, &options);
        let node = lab.node("node-2").netns;
        for namespace in ["demo", "vault"] {
            let pod = (namespace, "server");
            lab.wait_for_mesh(pod, "enrolled");
            let target = format!("server.{namespace}:{ECHO}");
            let tick = Some(Duration::from_millis(100));
            let hold = |client, count| Running::hold(s, &lab, client, &target, (count, 1), tick);
            // More than there is room for, and again, since a probe may have had a place for a moment.
            let held = hold(MESHED, 12);
            let _rest = hold(OTHER, 2);
            let target = format!("server.{namespace}:{WHO}");
            let more = attempt(&lab, OTHER, &["who", &target]);
            assert!(!more["error"].is_null(), "{pod:?} has room for {more}");
            let mut curl = in_namespace(&node, "curl");
            curl.args(["-sSf", "--max-time", "5"]);
            let url = format!("http://{}/count", SocketAddr::new(lab.pod(pod).v4(), ADMIN));
            run(curl.arg(url), Duration::from_secs(10)).expect_ok();
            let report: HoldReport = held.stop();
            assert!(report.failed > 0 && report.broken == 0, "{report:#?}");
        }
    });
}
