//! Line 6: a real MariaDB's greeting arrives through the mesh within 5 ms of the direct time (median of
//! 50). PostgreSQL and Redis with their own clients work, large results included.

use std::time::Duration;

use warren_tests::lab::{Lab, PodRef};
use warren_tests::load::attempt;
use warren_tests::manifest::{Pod, account, meshed_namespace, namespace, service};
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::servers::{mariadb, postgres, redis};

const CLIENT: PodRef<'_> = ("demo", "client");

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    scenario(Duration::from_secs(120), |s| {
        // Direct first: the same pods, before their namespace opts in.
        let lab = lab_with(s, &namespace("demo", &[]), "mariadb", &mariadb(s), 3306);
        let direct = greeting(&lab);
        lab.apply(&[meshed_namespace("demo")]).expect_ok();
        for pod in [CLIENT, ("demo", "mariadb")] {
            lab.wait_for_mesh(pod, "enrolled");
        }
        let before = tunnelled(&lab, "mariadb");
        let meshed = greeting(&lab);
        assert_eq!(
            tunnelled(&lab, "mariadb") - before,
            50.0,
            "the greetings came through the mesh"
        );
        eprintln!("MariaDB's greeting, median of 50: direct {direct} us, meshed {meshed} us");
        assert!(
            meshed < direct + 5_000,
            "direct {direct} us, meshed {meshed} us"
        );

        let query = [
            "mariadb",
            "-h",
            "mariadb",
            "-u",
            "mesh",
            "--skip-ssl",
            "-N",
            "-B",
            "-e",
        ];
        let sum = lab
            .exec(CLIENT, &[&query[..], &["select 6*7"]].concat())
            .expect_ok();
        assert_eq!(sum.stdout.trim(), "42");
        let large = "select repeat('x', 1000) from mysql.seq_1_to_20000";
        assert_eq!(bytes(&lab, &[&query[..], &[large]].concat()), 20_000 * 1001);
    });
}

#[test]
fn postgresql_and_redis_work_with_large_results() {
    scenario(Duration::from_secs(150), |s| {
        let lab = lab_with(s, &meshed_namespace("demo"), "postgres", &postgres(s), 5432);
        let query = [
            "psql", "-h", "postgres", "-U", "postgres", "-X", "-A", "-t", "-c",
        ];
        let large = "select repeat(md5(i::text), 40) from generate_series(1, 20000) i";
        assert_eq!(
            bytes(&lab, &[&query[..], &[large]].concat()),
            20_000 * (32 * 40 + 1)
        );
        let load = "create table t as select i, md5(i::text) m from generate_series(1, 50000) i; \
                    select count(*), sum(i) from t";
        let done = lab
            .exec(CLIENT, &[&query[..], &[load]].concat())
            .expect_ok();
        assert!(done.stdout.contains("50000|1250025000"), "{done}");
        assert!(
            tunnelled(&lab, "postgres") >= 2.0,
            "{}",
            lab.metrics("node-1").describe("warren_tcp")
        );
        lab.down();

        let lab = lab_with(s, &meshed_namespace("demo"), "redis", &redis(s), 6379);
        let value = "v".repeat(30_000_000);
        let file = s.file("value", &value);
        let set = format!("redis-cli -h redis -x set large < {}", file.display());
        assert_eq!(
            lab.exec(CLIENT, &["sh", "-c", &set])
                .expect_ok()
                .stdout
                .trim(),
            "OK"
        );
        let get = format!(
            "redis-cli -h redis --raw get large | head -c {} | cmp - {}",
            value.len(),
            file.display()
        );
        lab.exec(CLIENT, &["sh", "-c", &get]).expect_ok();
        // Inline commands look like the beginning of a request.
        for (said, answer) in [
            ("PING\r\n", "+PONG"),
            ("SET /path HTTP\r\nGET /path\r\n", "+OK\r\n$4\r\nHTTP"),
            ("GET key\r\n", "$-1"),
        ] {
            let got = attempt(&lab, CLIENT, &["send", "redis:6379", said]);
            assert_eq!(got["answer"].as_str().map(str::trim), Some(answer), "{got}");
        }
        let pipeline = "for i in $(seq 5000); do echo set k$i $i; done | redis-cli -h redis --pipe";
        let done = lab.exec(CLIENT, &["sh", "-c", pipeline]).expect_ok();
        assert!(done.stdout.contains("errors: 0, replies: 5000"), "{done}");
        assert!(
            tunnelled(&lab, "redis") >= 3.0,
            "{}",
            lab.metrics("node-1").describe("warren_tcp")
        );
    });
}

/// A client on node 1 and one server on node 2, ready when it accepts connections.
#[track_caller]
fn lab_with(
    s: &Scenario,
    namespace: &serde_json::Value,
    name: &str,
    command: &[String],
    port: u16,
) -> Lab {
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    s.lab(
        2,
        &[
            namespace.clone(),
            account("demo", "client"),
            account("demo", name),
            Pod::idle("demo", "client", "node-1"),
            Pod::new("demo", name, "node-2")
                .command(&command)
                .ready_tcp(port)
                .build(),
            service("demo", name, &[(port, port)]),
        ],
    )
}

/// Median time in microseconds from `connect` to the server's first bytes.
#[track_caller]
fn greeting(lab: &Lab) -> u64 {
    let answer = attempt(lab, CLIENT, &["greeting", "mariadb:3306", "50"]);
    let first = answer["first"].as_str().unwrap_or_default();
    assert!(first.contains("MariaDB"), "{answer}");
    answer["median_us"]
        .as_u64()
        .expect("a number of microseconds")
}

#[track_caller]
fn bytes(lab: &Lab, command: &[&str]) -> usize {
    lab.exec(CLIENT, command).expect_ok().stdout.len()
}

fn tunnelled(lab: &Lab, server: &str) -> f64 {
    let callee = format!("spiffe://cluster.local/ns/demo/sa/{server}");
    let labels = [
        ("reporter", "source"),
        ("security", "mutual_tls"),
        ("destination_principal", &callee),
    ];
    lab.metrics("node-1")
        .sum("warren_tcp_connections_opened_total", &labels)
}
