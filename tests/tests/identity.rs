//! Line 7: a peer with a certificate of another CA, of the wrong identity, or expired is refused on both
//! sides, with a reason in log and metric; a tunnel stream to a pod that is not local, or with a source
//! address that is not the caller's, is refused. And what two nodes speak is what both know.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_api::identity::Identity;
use serde_json::Value;
use warren_tests::http::HTTP;
use warren_tests::lab::{Lab, Options, PodRef};
use warren_tests::load::attempt;
use warren_tests::manifest::{
    CLIENT, ECHO, FAR, NEAR, Pod, account, meshed_namespace, namespace, near_and_far,
};
use warren_tests::pki::{Authority, Leaf};
use warren_tests::python::{interpreter, peer};
use warren_tests::scenario::scenario;
use warren_tests::wait::wait_until;

const ATTACKER: PodRef<'_> = ("outside", "attacker");
const CLIENT_ID: &str = "spiffe://cluster.local/ns/demo/sa/client";
const FAR_ID: &str = "spiffe://cluster.local/ns/demo/sa/far";
const FAILED: &str = "warren_tcp_connections_failed_total";
const HANDSHAKES: &str = "warren_tunnel_handshakes_total";

#[test]
fn the_callees_node_refuses_bad_certificates_and_bad_streams() {
    scenario(Duration::from_secs(120), |s| {
        let root = Authority::new("the mesh's root");
        let ca = s.fresh_path("ca");
        root.write(&ca);
        let mut manifests = near_and_far();
        manifests.push(namespace("outside", &[]));
        manifests.push(Pod::idle(ATTACKER.0, ATTACKER.1, "node-1"));
        // A second identity on the callee's node.
        manifests.push(account("demo", "other"));
        manifests.push(Pod::echo("demo", "other", "node-2").build());
        let lab = s.lab_with(
            2,
            &manifests,
            &Options {
                ca: Some(ca.clone()),
                args: vec![],
            },
        );
        let tunnel = Tunnel {
            lab: &lab,
            roots: ca.join("root.crt"),
            python: interpreter(),
        };
        let (client, far, near, other) = (
            lab.pod(CLIENT),
            lab.pod(FAR),
            lab.pod(NEAR),
            lab.pod(("demo", "other")),
        );
        let at = |ip| SocketAddr::new(ip, ECHO).to_string();
        let from_client = format!("for={}", client.v4());
        let good = root.workload(&s.fresh_path("good"), CLIENT_ID);

        // The peer of the tests is a peer as any other: what is refused below is for the stated reason.
        let answer = tunnel.open(Some(&good), &at(far.v4()), Some(&from_client), &[]);
        assert_eq!(
            (&answer["status"], &answer["answer"]),
            (&200.into(), &"hello".into()),
            "{answer}"
        );
        assert_eq!(answer["peer"], FAR_ID);

        let stranger = Authority::new("another root");
        for (what, leaf, results) in [
            (
                "another CA",
                Some(stranger.workload(&s.fresh_path("ca2"), CLIENT_ID)),
                &["peer_unknown_ca"][..],
            ),
            (
                "expired",
                Some(root.expired(&s.fresh_path("old"), CLIENT_ID)),
                &["peer_expired"],
            ),
            (
                "another trust domain",
                Some(root.workload(&s.fresh_path("td"), "spiffe://elsewhere/ns/demo/sa/client")),
                &["peer_wrong_identity"],
            ),
            (
                "a node's certificate",
                Some(root.workload(
                    &s.fresh_path("node"),
                    "spiffe://cluster.local/warren/node/node-1/proxy",
                )),
                &["peer_wrong_identity", "peer_bad_certificate"],
            ),
            ("no certificate", None, &["peer_no_certificate"]),
        ] {
            let before = handshakes(&lab, "node-2", "server", results);
            let answer = tunnel.open(leaf.as_ref(), &at(far.v4()), Some(&from_client), &[]);
            assert_ne!(answer["tls"], "ok", "{what}: {answer}");
            assert!(answer["status"].is_null(), "{what}: {answer}");
            wait_for_one(&lab, "node-2", "server", results, before, what);
            let log = lab.logs(&["node/node-2"]);
            assert!(
                results.iter().any(|r| log.contains(r)),
                "{what}: no reason in the log:\n{log}"
            );
        }
        let answer = tunnel.open(Some(&good), &at(far.v4()), Some(&from_client), &["--tls12"]);
        assert_ne!(answer["tls"], "ok", "TLS 1.2: {answer}");
        let unknown = Identity::new("cluster.local", "demo", "nobody").expect("a valid identity");
        let answer = tunnel.open_as(
            &unknown,
            Some(&good),
            &at(far.v4()),
            Some(&from_client),
            &[],
        );
        assert_ne!(
            answer["tls"], "ok",
            "a server name of no pod here: {answer}"
        );

        // The handshake is good, the stream is not.
        let from_near = format!("for={}", near.v4());
        for (what, authority, forwarded, reason) in [
            (
                "a pod of another node",
                at(near.v4()),
                Some(&from_client),
                "not_local",
            ),
            (
                "a pod of another identity",
                at(other.v4()),
                Some(&from_client),
                "not_local",
            ),
            (
                "no pod at all",
                "192.0.2.1:80".into(),
                Some(&from_client),
                "not_local",
            ),
            (
                "the address of another identity",
                at(far.v4()),
                Some(&from_near),
                "source_mismatch",
            ),
            (
                "an address of no pod",
                at(far.v4()),
                Some(&"for=192.0.2.1".into()),
                "unknown_source",
            ),
            ("no source", at(far.v4()), None, "bad_request"),
            (
                "the capture port",
                format!("{}:15001", far.v4()),
                Some(&from_client),
                "forbidden_target",
            ),
            (
                "loopback",
                "127.0.0.1:7000".into(),
                Some(&from_client),
                "not_local",
            ),
        ] {
            let failed = || {
                lab.metrics("node-2")
                    .sum(FAILED, &[("reporter", "destination"), ("reason", reason)])
            };
            let before = failed();
            let answer = tunnel.open(Some(&good), &authority, forwarded.map(String::as_str), &[]);
            assert_eq!(
                answer["headers"]["warren-proxy-error"], reason,
                "{what}: {answer}"
            );
            assert!(
                answer["status"]
                    .as_u64()
                    .is_some_and(|status| status >= 400),
                "{what}: {answer}"
            );
            assert_eq!(failed() - before, 1.0, "{what}: the metric of {reason}");
            lab.wait_for_log(&["node/node-2"], reason);
        }
    });
}

/// `warren/2` is `warren/1` and large heads before the body. Here a node answers one that knows it and one that does not; that
/// both ends of a tunnel go by the same is in `tunnel::tls`.
#[test]
fn an_older_node_gets_large_heads_where_it_looks_for_them() {
    scenario(Duration::from_secs(120), |s| {
        let root = Authority::new("the mesh's root");
        let ca = s.fresh_path("ca");
        root.write(&ca);
        let manifests = [
            meshed_namespace("demo"),
            namespace("outside", &[]),
            account("demo", "client"),
            account("demo", "web"),
            Pod::idle("demo", "client", "node-1"),
            Pod::idle(ATTACKER.0, ATTACKER.1, "node-1"),
            Pod::http("demo", "web", "node-2").build(),
        ];
        let options = Options {
            ca: Some(ca.clone()),
            args: vec![],
        };
        let lab = s.lab_with(2, &manifests, &options);
        let tunnel = Tunnel {
            lab: &lab,
            roots: ca.join("root.crt"),
            python: interpreter(),
        };
        let web = Identity::new("cluster.local", "demo", "web").expect("a valid identity");
        let leaf = root.workload(&s.fresh_path("client"), CLIENT_ID);
        let target = format!("warren-target={}:{HTTP}", lab.pod(("demo", "web")).v4());
        let source = format!("warren-source={}", lab.pod(CLIENT).v4());
        let own = format!("x-own={}", "o".repeat(20_000));
        let mut request = vec!["--method", "GET"];
        for header in [&target, &source, &own] {
            request.extend(["--header", header]);
        }
        request.extend(["--header", "warren-version=1.1"]);
        request.extend(["--header", "x-control=header=20000"]);
        for (alpn, packs) in [("warren/1", false), ("warren/2", true)] {
            let asked = [&request[..], &["--alpn", alpn]].concat();
            let answer = tunnel.open_as(&web, Some(&leaf), "web", None, &asked);
            assert_eq!(
                (&answer["alpn"], &answer["status"]),
                (&alpn.into(), &200.into()),
                "{answer}"
            );
            let headers = &answer["headers"];
            assert_eq!(headers["x-large"].is_string(), !packs, "{alpn}: {headers}");
            assert_eq!(
                headers["warren-head"].is_string(),
                packs,
                "{alpn}: {headers}"
            );
            let body = answer["answer"].as_str().unwrap_or_default();
            assert_eq!(body.starts_with('{'), !packs, "{alpn}: {body}");
            assert!(
                body.contains(&"o".repeat(20_000)),
                "{alpn}: what the app saw: {body}"
            );
        }
    });
}

#[test]
fn the_callers_node_refuses_bad_certificates() {
    scenario(Duration::from_secs(120), |s| {
        let root = Authority::new("the mesh's root");
        let ca = s.fresh_path("ca");
        root.write(&ca);
        let stranger = Authority::new("another root");
        let uri = |name: &str| format!("spiffe://cluster.local/ns/demo/sa/{name}");
        let python = interpreter().display().to_string();
        let roots = ca.join("root.crt").display().to_string();
        // Servers that end tunnels themselves, so that the caller's node meets their certificates.
        let peers = [
            (
                "good",
                root.workload(&s.fresh_path("good"), &uri("good")),
                "",
            ),
            (
                "foreign",
                stranger.workload(&s.fresh_path("foreign"), &uri("foreign")),
                "peer_unknown_ca",
            ),
            (
                "old",
                root.expired(&s.fresh_path("old"), &uri("old")),
                "peer_expired",
            ),
            (
                "impostor",
                root.workload(&s.fresh_path("impostor"), &uri("good")),
                "peer_wrong_identity",
            ),
        ];
        let mut manifests = vec![
            meshed_namespace("demo"),
            account("demo", "client"),
            Pod::idle("demo", "client", "node-1"),
        ];
        for (name, leaf, _) in &peers {
            let server = peer("hbone_server.py").display().to_string();
            let (cert, key) = (
                leaf.certificate.display().to_string(),
                leaf.key.display().to_string(),
            );
            let command = [
                &python, &server, "--cert", &cert, "--key", &key, "--ca", &roots,
            ];
            manifests.push(account("demo", name));
            let pod = Pod::new("demo", name, "node-2").command(&command);
            manifests.push(pod.annotation("warren-mesh.io/tunnel", "hbone").build());
        }
        let lab = s.lab_with(
            2,
            &manifests,
            &Options {
                ca: Some(ca),
                args: vec![],
            },
        );

        for (name, _, result) in &peers {
            let target = SocketAddr::new(lab.pod(("demo", name)).v4(), ECHO).to_string();
            let send = || attempt(&lab, CLIENT, &["send", &target, "hello"]);
            if result.is_empty() {
                wait_until("the good peer to answer", Duration::from_secs(10), || {
                    let answer = send();
                    if answer["answer"] == "HELLO" {
                        Ok(())
                    } else {
                        Err(answer)
                    }
                });
                continue;
            }
            let before = handshakes(&lab, "node-1", "client", &[result]);
            let reason = match *result {
                "peer_expired" => "certificate_expired",
                "peer_wrong_identity" => "tunnel_identity",
                _ => "tunnel_handshake",
            };
            let answer = send();
            assert_ne!(answer["answer"], "HELLO", "{name}: {answer}");
            wait_for_one(&lab, "node-1", "client", &[result], before, name);
            let labels = [
                ("reporter", "source"),
                ("source_principal", CLIENT_ID),
                ("reason", reason),
            ];
            let failed = lab.metrics("node-1").sum(FAILED, &labels);
            assert!(failed >= 1.0, "{name}: no failure of reason {reason}");
            lab.wait_for_log(&["node/node-1"], reason);
        }
    });
}

/// How the tests open tunnels to node 2.
struct Tunnel<'a> {
    lab: &'a Lab,
    roots: PathBuf,
    python: PathBuf,
}

impl Tunnel<'_> {
    #[track_caller]
    fn open(
        &self,
        leaf: Option<&Leaf>,
        authority: &str,
        forwarded: Option<&str>,
        more: &[&str],
    ) -> Value {
        let far = Identity::new("cluster.local", "demo", "far").expect("a valid identity");
        self.open_as(&far, leaf, authority, forwarded, more)
    }

    #[track_caller]
    fn open_as(
        &self,
        callee: &Identity,
        leaf: Option<&Leaf>,
        authority: &str,
        forwarded: Option<&str>,
        more: &[&str],
    ) -> Value {
        let text = |path: &Path| path.display().to_string();
        let node = self.lab.node("node-2").address.to_string();
        let mut words = vec![text(&self.python), text(&peer("hbone_client.py"))];
        for (flag, value) in [
            ("--connect", node),
            ("--ca", text(&self.roots)),
            ("--alpn", "warren/1".into()),
            ("--sni", callee.server_name()),
            ("--authority", authority.to_owned()),
            ("--send", "hello".into()),
        ] {
            words.extend([flag.to_owned(), value]);
        }
        if let Some(leaf) = leaf {
            words.extend([
                "--cert".into(),
                text(&leaf.certificate),
                "--key".into(),
                text(&leaf.key),
            ]);
        }
        if let Some(forwarded) = forwarded {
            words.extend(["--forwarded".into(), forwarded.into()]);
        }
        words.extend(more.iter().map(|&w| w.to_owned()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let done = self.lab.exec(ATTACKER, &words).expect_ok();
        serde_json::from_str(done.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {done}"))
    }
}

fn handshakes(lab: &Lab, node: &str, side: &str, results: &[&str]) -> f64 {
    let metrics = lab.metrics(node);
    results
        .iter()
        .map(|result| metrics.sum(HANDSHAKES, &[("side", side), ("result", result)]))
        .sum()
}

#[track_caller]
fn wait_for_one(lab: &Lab, node: &str, side: &str, results: &[&str], before: f64, what: &str) {
    wait_until(
        &format!("{what}: {HANDSHAKES} of {results:?}"),
        Duration::from_secs(10),
        || {
            if handshakes(lab, node, side, results) > before {
                Ok(())
            } else {
                Err(lab.metrics(node).describe(HANDSHAKES))
            }
        },
    );
}
