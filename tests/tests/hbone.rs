//! Line 11: a client and a server written from the wire format in Python exchange bytes with a meshed
//! pod in both directions, under a shared root.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use warren_tests::http::{Answer, HTTP};
use warren_tests::lab::{Lab, Options, PodRef};
use warren_tests::load::{attempt, attempt_until};
use warren_tests::manifest::{
    CLIENT, ECHO, FAR, NEAR, Pod, WHO, account, near_and_far, service_of,
};
use warren_tests::pki::{Authority, Leaf};
use warren_tests::python::{interpreter, peer};
use warren_tests::scenario::scenario;

const PEER: PodRef<'_> = ("demo", "peer");
const PEER_ID: &str = "spiffe://cluster.local/ns/demo/sa/peer";
const CLIENT_ID: &str = "spiffe://cluster.local/ns/demo/sa/client";

#[test]
fn hbone_peers_in_python_talk_with_meshed_pods_both_ways() {
    scenario(Duration::from_secs(180), |s| {
        let root = Authority::new("a shared root");
        let ca = s.fresh_path("ca");
        root.write(&ca);
        let leaf = root.workload(&s.fresh_path("peer"), PEER_ID);
        let peer_files = Files {
            python: interpreter().display().to_string(),
            roots: ca.join("root.crt").display().to_string(),
            leaf,
        };
        let mut manifests = near_and_far();
        manifests.extend([account("demo", "peer"), account("demo", "web")]);
        for name in ["declared", "undeclared"] {
            let pod = Pod::http("demo", name, "node-1").account("web");
            manifests.push(pod.label("app", name).build());
        }
        let declared = service_of("demo", "declared", &[(80, HTTP, Some("http"))]);
        manifests.push(declared);
        let mut server = peer_files.command("hbone_server.py");
        let faults = ["--lose", "7778=1", "--lose", "7779=2", "--mute", "7780"];
        server.extend(faults.map(str::to_owned));
        let server: Vec<&str> = server.iter().map(String::as_str).collect();
        let pod = Pod::new("demo", "peer", "node-2").command(&server);
        manifests.push(pod.annotation("warren-mesh.io/tunnel", "hbone").build());
        let lab = s.lab_with(
            2,
            &manifests,
            &Options {
                ca: Some(ca),
                args: vec![],
            },
        );
        let peer_pod = lab.pod(PEER);

        // A meshed client calls the Python server.
        for ip in &peer_pod.ips {
            let target = SocketAddr::new(*ip, 7777).to_string();
            attempt_until(
                &lab,
                CLIENT,
                &["send", &target, "hello over hbone"],
                "an answer in upper case",
                |a| a["answer"] == "HELLO OVER HBONE",
            );
        }
        // A tunnel that ends before it answered is asked for once more, at the same address, and not a third time.
        let lost_once = SocketAddr::new(peer_pod.v4(), 7778).to_string();
        let answer = attempt(&lab, CLIENT, &["send", &lost_once, "asked again"]);
        assert_eq!(answer["answer"], "ASKED AGAIN", "{answer}");
        let lost_twice = SocketAddr::new(peer_pod.v4(), 7779).to_string();
        let answer = attempt(&lab, CLIENT, &["send", &lost_twice, "never"]);
        assert_ne!(answer["answer"], "NEVER", "{answer}");
        // A peer that falls silent is not asked again: its tunnel's ping is not answered, and the connection ends.
        let silent = SocketAddr::new(peer_pod.v4(), 7780);
        connect_until_given_up(&lab, &peer_files.python, silent);
        let events: Vec<Value> = lab
            .logs(&["-n", "demo", "peer"])
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .collect();
        let of = |kind: &str| {
            events
                .iter()
                .filter(|e| e["event"] == kind)
                .collect::<Vec<_>>()
        };
        for handshake in of("handshake") {
            assert_eq!(handshake["identity"], CLIENT_ID, "{handshake}");
            assert_eq!(
                (&handshake["alpn"], &handshake["sni"]),
                (&"h2".into(), &Value::Null),
                "{handshake}"
            );
        }
        assert!(!of("handshake").is_empty(), "{events:?}");
        for ip in &peer_pod.ips {
            let authority = SocketAddr::new(*ip, 7777).to_string();
            let stream = of("stream")
                .into_iter()
                .find(|e| e["headers"][":authority"] == *authority);
            let headers = &stream.unwrap_or_else(|| panic!("no stream to {authority}: {events:?}"))
                ["headers"];
            assert_eq!(headers[":method"], "CONNECT", "{headers}");
            assert!(
                headers[":path"].is_null() && headers[":protocol"].is_null(),
                "{headers}"
            );
        }

        for (to, times) in [(lost_once, 2), (lost_twice, 2), (silent.to_string(), 1)] {
            let asked = of("stream")
                .into_iter()
                .filter(|e| e["headers"][":authority"] == *to);
            assert_eq!(asked.count(), times, "streams to {to}: {events:?}");
        }

        // The Python client calls meshed servers, at their own addresses.
        for server in [FAR, NEAR] {
            let pod = lab.pod(server);
            for ip in &pod.ips {
                let uri = format!("spiffe://cluster.local/ns/demo/sa/{}", server.1);
                let echo = SocketAddr::new(*ip, ECHO).to_string();
                let answer = call(&lab, &peer_files, *ip, &echo, "bytes from python");
                assert_eq!(
                    (&answer["tls"], &answer["alpn"]),
                    (&"ok".into(), &"h2".into()),
                    "{answer}"
                );
                assert_eq!(
                    (&answer["status"], &answer["peer"]),
                    (&200.into(), &uri.into()),
                    "{answer}"
                );
                assert_eq!(answer["answer"], "bytes from python", "{answer}");
                // The app sees who called.
                let who = call(
                    &lab,
                    &peer_files,
                    *ip,
                    &SocketAddr::new(*ip, WHO).to_string(),
                    "bytes from python",
                );
                let said = who["answer"].as_str().unwrap_or_default();
                let caller = peer_pod.ips.iter().find(|p| p.is_ipv4() == ip.is_ipv4());
                let caller = caller
                    .expect("the peer has addresses of both families")
                    .to_string();
                assert!(
                    said.starts_with("peer ") && said.contains(&caller),
                    "{who}, not from {caller}"
                );
            }
            // Another pod's address is no target here.
            let other = SocketAddr::new(lab.pod(CLIENT).v4(), ECHO).to_string();
            let answer = call(&lab, &peer_files, pod.v4(), &other, "bytes from python");
            assert_eq!(
                answer["headers"]["warren-proxy-error"], "not_local",
                "{answer}"
            );
        }

        // What it says in HTTP is looked into: the app is told who calls, and not by the caller.
        for name in ["declared", "undeclared"] {
            let ip = lab.pod(("demo", name)).v4();
            let to = SocketAddr::new(ip, HTTP).to_string();
            let say = |first: &str| {
                let forged = "spiffe://cluster.local/ns/prod/sa/admin";
                let request = format!("{first}\r\nHost: web\r\nWarren-Client-Id: {forged}\r\n\r\n");
                let answer = call(&lab, &peer_files, ip, &to, &request);
                assert_eq!(answer["status"], 200, "{answer}");
                Answer::parse(answer["answer"].as_str().unwrap_or_default())
            };
            let answer = say("GET /hbone HTTP/1.1");
            assert_eq!(answer.status(), 200, "{name}: {answer:?}");
            let told = answer.seen_header("warren-client-id");
            assert_eq!(told.as_deref(), Some(PEER_ID), "{name}: {answer:?}");
            let mut refused = vec!["GET  /hbone HTTP/1.1", "GET /hbone http/1.1"];
            if name == "declared" {
                refused.push("\u{1}GET /hbone HTTP/1.1");
            }
            for first in refused {
                let answer = say(first);
                assert!((400..506).contains(&answer.status()), "{first}: {answer:?}");
                let cause = answer.field("warren-proxy-error");
                assert!(cause.is_some(), "{name}, {first}: the app's {answer:?}");
            }
            let labels = [
                ("reporter", "destination"),
                ("source_workload", "peer"),
                ("destination_workload", name),
                ("security", "mutual_tls"),
                ("status", "200"),
            ];
            let metrics = lab.metrics("node-1");
            assert_eq!(
                metrics.sum("warren_http_requests_total", &labels),
                1.0,
                "{}",
                metrics.describe("warren_http_requests_total")
            );
        }
    });
}

struct Files {
    python: String,
    roots: String,
    leaf: Leaf,
}

impl Files {
    fn command(&self, program: &str) -> Vec<String> {
        vec![
            self.python.clone(),
            peer(program).display().to_string(),
            "--cert".into(),
            self.leaf.certificate.display().to_string(),
            "--key".into(),
            self.leaf.key.display().to_string(),
            "--ca".into(),
            self.roots.clone(),
        ]
    }
}

/// Connects from the client, again and again, until a connection ends since the tunnel's ping is not answered. Each is
/// given up before the proxy's own time for it is over.
#[track_caller]
fn connect_until_given_up(lab: &Lab, python: &str, to: SocketAddr) {
    let script = "import socket, sys\n\
        peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n\
        peer.settimeout(7)\n\
        peer.sendall(b'is anybody there?')\n\
        try: print(peer.recv(1))\n\
        except OSError as error: print(type(error).__name__)\n";
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    for _ in 0..6 {
        let ended = lab.exec(CLIENT, &[python, "-c", script, &ip, &port]);
        match ended.expect_ok().stdout.trim() {
            "TimeoutError" => {}
            "ConnectionResetError" | "b''" => return,
            other => panic!("{to}: {other}"),
        }
    }
    panic!("the tunnel to {to} was not given up");
}

/// One CONNECT over HBONE from the Python pod to a pod's own port 15008.
#[track_caller]
fn call(lab: &Lab, files: &Files, ip: std::net::IpAddr, authority: &str, send: &str) -> Value {
    let mut command = files.command("hbone_client.py");
    for (flag, value) in [
        ("--connect", ip.to_string()),
        ("--authority", authority.into()),
        ("--send", send.into()),
    ] {
        command.extend([flag.to_owned(), value]);
    }
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let done = lab.exec(PEER, &command).expect_ok();
    serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
}
