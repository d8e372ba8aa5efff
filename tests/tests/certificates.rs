//! Certificates are renewed and roots replaced under load: no connection fails, and the new ones are in
//! use afterwards.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use mesh_api::identity::Identity;
use mesh_api::names::TUNNEL_PORT;
use warren_tests::lab::{Lab, Options, in_namespace};
use warren_tests::load::{HoldReport, LoadReport, Running};
use warren_tests::manifest::{CLIENT, ECHO, near_and_far};
use warren_tests::pki::Authority;
use warren_tests::process::run;
use warren_tests::scenario::scenario;
use warren_tests::wait::{let_run, wait_until};

const HANDSHAKES: &str = "warren_tunnel_handshakes_total";
const TICK: Option<Duration> = Some(Duration::from_millis(50));

#[test]
fn renewed_leaves_and_new_roots_cut_nothing() {
    scenario(Duration::from_secs(150), |s| {
        let ca = s.fresh_path("ca");
        Authority::new("the first root").write(&ca);
        // The shortest that is allowed: renewed after half a minute or so.
        let short = s.file("controller.yaml", "ca:\n  leafLifetimeSeconds: 60\n");
        let overlay = format!("controller={}", short.display());
        let options = Options {
            ca: Some(ca.clone()),
            args: vec!["--config".into(), overlay],
        };
        let lab = s.lab_with(2, &near_and_far(), &options);
        let target = format!("far:{ECHO}");
        let held = Running::hold(s, &lab, CLIENT, &target, (5, 1), TICK);
        let load = Running::load(s, &lab, CLIENT, &target, 50);
        let handshakes = |result| {
            lab.metrics("node-1")
                .sum(HANDSHAKES, &[("side", "client"), ("result", result)])
        };
        let good = || handshakes("ok") + handshakes("resumed");

        let expiry = || {
            let labels = [("identity", "spiffe://cluster.local/ns/demo/sa/far")];
            lab.metrics("node-2")
                .sum("warren_certificate_expiry_timestamp_seconds", &labels)
        };
        let (first, before) = (expiry(), good());
        wait_until("a renewed certificate", Duration::from_secs(50), || {
            let now = expiry();
            if now > first + 15.0 {
                Ok(())
            } else {
                Err(format!("expires at {now}, at first {first}"))
            }
        });
        // A renewal ends the tunnel for new streams, so another handshake follows.
        wait_until(
            "a tunnel with renewed certificates",
            Duration::from_secs(10),
            || {
                let now = good();
                if now > before {
                    Ok(())
                } else {
                    Err(format!("{now} handshakes, {before} before"))
                }
            },
        );

        Authority::new("the second root").write(&ca);
        let far = Identity::new("cluster.local", "demo", "far").expect("a valid identity");
        wait_until("a leaf of the new root", Duration::from_secs(60), || {
            let verified = verify(&lab, &far, &ca.join("root.crt"));
            if verified.contains("Verification: OK") {
                Ok(())
            } else {
                Err(verified)
            }
        });
        let_run(Duration::from_secs(2));
        held.stop::<HoldReport>()
            .expect_unbroken("held through renewals and a new root");
        load.stop::<LoadReport>()
            .expect_no_failure("new connections through renewals and a new root");
        for node in ["node-1", "node-2"] {
            let failed = lab
                .metrics(node)
                .describe("warren_tcp_connections_failed_total");
            assert!(!failed.contains("tunnel_handshake"), "{node}: {failed}");
        }
    });
}

/// What `openssl` says of the certificate that node 2 shows for `callee`, judged by one root.
fn verify(lab: &Lab, callee: &Identity, root: &Path) -> String {
    let mut command = in_namespace(&lab.node("node-1").netns, "openssl");
    let address = SocketAddr::new(lab.node("node-2").address, TUNNEL_PORT).to_string();
    command.args([
        "s_client", "-brief", "-tls1_3", "-alpn", "warren/1", "-connect", &address,
    ]);
    command
        .args(["-servername", &callee.server_name(), "-CAfile"])
        .arg(root);
    let done = run(&mut command, Duration::from_secs(10));
    done.stdout + &done.stderr
}
