//! Line 3 for connections: TLSRoute (by server name) and TCPRoute attached to Services, every row against the running
//! proxy and naming its GEP or field. TLS is the servers' own: who answers is proved by its certificate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use warren_tests::lab::{Lab, PodRef};
use warren_tests::manifest::{Pod, account, meshed_namespace, service_of};
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::servers::nginx_tls;
use warren_tests::wait::wait_until;

const CLIENT: PodRef<'_> = ("demo", "client");
const CONSUMER: PodRef<'_> = ("consumer", "client");
const SERVERS: [(&str, &str); 2] = [("v1", "node-1"), ("v2", "node-2")];
/// Connections of a weighted row: five standard deviations of a share of a quarter are 11 %.
const MANY: usize = 400;
const WITHIN: f64 = 0.11;

#[test]
fn tls_routes_by_server_name() {
    scenario(Duration::from_secs(240), |s| {
        let fronts = [
            "names", "wild", "age", "weights", "broken", "shared", "kinds",
        ];
        let mesh = Mesh::new(s, &fronts);
        let lab = &mesh.lab;
        let tls = |pod, front: &str, name: &str| mesh.tls(pod, front, name);

        // Without a route the front's own pods answer.
        assert_eq!(
            tls(CLIENT, "names", "a.example.com"),
            "v2",
            "GEP-1294: no route, no change"
        );

        let exact = tls_route(
            "demo",
            "names",
            "names",
            &["a.example.com", "b.example.com"],
            &[("v1", 1)],
        );
        mesh.put(
            exact.clone(),
            || tls(CLIENT, "names", "a.example.com"),
            "v1",
        );
        for (name, answer, shows) in [
            ("A.EXAMPLE.COM", "v1", "GEP-2643 hostnames: in any case"),
            ("b.example.com", "v1", "GEP-2643 hostnames: any of several"),
            (
                "c.example.com",
                "refused",
                "GEP-2643 hostnames: none matches",
            ),
            (
                "example.com",
                "refused",
                "GEP-2643 hostnames: an exact name is no suffix",
            ),
            (
                "x.a.example.com",
                "refused",
                "GEP-2643 hostnames: an exact name is no suffix",
            ),
        ] {
            assert_eq!(tls(CLIENT, "names", name), answer, "{shows}: {name}");
        }
        let refused = lab.metrics("node-1");
        let labels = [
            ("reason", "no_route"),
            ("source_workload", "client"),
            ("destination_service", "names.demo"),
        ];
        let counted = refused.sum("warren_tcp_connections_failed_total", &labels);
        assert!(
            counted >= 3.0,
            "{}",
            refused.describe("warren_tcp_connections_failed_total")
        );
        assert_eq!(
            mesh.without_name("names"),
            "refused",
            "GEP-2643: a hello without server name"
        );
        assert_eq!(
            mesh.plain(CLIENT, "names:443"),
            "refused",
            "GEP-2643: what is not TLS"
        );
        assert_eq!(
            mesh.plain(CLIENT, "names"),
            "v2",
            "ParentReference.port: of another port, no change"
        );
        lab.delete(&[exact]).expect_ok();
        mesh.wait(
            || tls(CLIENT, "names", "c.example.com"),
            "v2",
            "the route to be gone",
        );

        // Precedence is by name, whatever the age.
        let wild = [
            aged(
                tls_route("demo", "wild", "wild", &["*.example.com"], &[("v2", 1)]),
                1,
            ),
            aged(
                tls_route(
                    "demo",
                    "wild-deep",
                    "wild",
                    &["*.deep.example.com"],
                    &[("v1", 1)],
                ),
                2,
            ),
            aged(
                tls_route(
                    "demo",
                    "wild-exact",
                    "wild",
                    &["x.deep.example.com"],
                    &[("v2", 1)],
                ),
                3,
            ),
        ];
        lab.apply(&wild).expect_ok();
        mesh.wait(
            || tls(CLIENT, "wild", "y.deep.example.com"),
            "v1",
            "the longer wildcard",
        );
        mesh.wait(
            || tls(CLIENT, "wild", "x.deep.example.com"),
            "v2",
            "the exact name",
        );
        for (name, answer, shows) in [
            ("a.example.com", "v2", "GEP-2643 hostnames: a wildcard"),
            (
                "y.deep.example.com",
                "v1",
                "GEP-2643 precedence: the longer wildcard",
            ),
            (
                "x.deep.example.com",
                "v2",
                "GEP-2643 precedence: the exact name",
            ),
            (
                "example.com",
                "refused",
                "GEP-2643 hostnames: a wildcard stands for at least one label",
            ),
        ] {
            assert_eq!(tls(CLIENT, "wild", name), answer, "{shows}: {name}");
        }
        let ages = [
            aged(
                tls_route("demo", "age-a", "age", &["*.example.com"], &[("v2", 1)]),
                2,
            ),
            aged(
                tls_route("demo", "age-b", "age", &["*.example.com"], &[("v1", 1)]),
                1,
            ),
        ];
        lab.apply(&ages).expect_ok();
        mesh.wait(
            || tls(CLIENT, "age", "a.example.com"),
            "v1",
            "GEP-2643 precedence: the older route",
        );

        // Weights, and shares that cannot be used.
        let weights = tls_route(
            "demo",
            "weights",
            "weights",
            &["*.example.com"],
            &[("v1", 1), ("v2", 3)],
        );
        lab.apply(&[weights]).expect_ok();
        mesh.wait(
            || tls(CLIENT, "weights", "a.example.com"),
            "v1",
            "a weighted route",
        );
        mesh.shares(
            "weights",
            true,
            &[("v1", 0.25), ("v2", 0.75)],
            "BackendRef.weight (GEP-1294)",
        );
        let broken = tls_route(
            "demo",
            "broken",
            "broken",
            &["*.example.com"],
            &[("v1", 1), ("none", 1), ("v2", 0)],
        );
        lab.apply(&[broken]).expect_ok();
        mesh.wait(
            || tls(CLIENT, "broken", "a.example.com"),
            "v1",
            "a route with a backend that is not there",
        );
        mesh.shares(
            "broken",
            true,
            &[("v1", 0.5), ("refused", 0.5)],
            "BackendRef: an invalid one's share is refused",
        );

        // Producer and consumer.
        let producer = tls_route("demo", "shared", "shared", &["*.example.com"], &[("v1", 1)]);
        mesh.put(producer, || tls(CLIENT, "shared", "a.example.com"), "v1");
        mesh.wait(
            || tls(CONSUMER, "shared", "a.example.com"),
            "v1",
            "GEP-1294 producer route, other namespaces",
        );
        let own = tls_route(
            "consumer",
            "own",
            "shared",
            &["a.example.com"],
            &[("v2", 1)],
        );
        mesh.put(own, || tls(CONSUMER, "shared", "a.example.com"), "v2");
        assert_eq!(
            tls(CONSUMER, "shared", "b.example.com"),
            "refused",
            "GEP-1294: it replaces the producer's"
        );
        assert_eq!(
            tls(CLIENT, "shared", "a.example.com"),
            "v1",
            "GEP-1294: for its own namespace only"
        );

        // Of two kinds at a port TLSRoute counts.
        lab.apply(&[tcp_route("demo", "kinds", "kinds", 443, &[("v2", 1)])])
            .expect_ok();
        mesh.put(
            tls_route("demo", "kinds", "kinds", &["a.example.com"], &[("v1", 1)]),
            || tls(CLIENT, "kinds", "a.example.com"),
            "v1",
        );
        assert_eq!(
            tls(CLIENT, "kinds", "b.example.com"),
            "refused",
            "GEP-1294: TLSRoute before TCPRoute"
        );
    });
}

#[test]
fn tcp_routes() {
    scenario(Duration::from_secs(240), |s| {
        let fronts = [
            "all", "age", "weights", "broken", "hollow", "shared", "section",
        ];
        let mesh = Mesh::new(s, &fronts);
        let lab = &mesh.lab;
        let plain = |pod, authority: &str| mesh.plain(pod, authority);
        let tcp =
            |name: &str, backends: &[(&str, u32)]| tcp_route("demo", name, name, 80, backends);

        assert_eq!(plain(CLIENT, "all"), "v2", "GEP-1294: no route, no change");
        let all = tcp("all", &[("v1", 1)]);
        mesh.put(all.clone(), || plain(CLIENT, "all"), "v1");
        assert_eq!(
            mesh.tls(CLIENT, "all", "a.example.com"),
            "v2",
            "ParentReference.port: of another port, no change"
        );
        lab.delete(&[all]).expect_ok();
        mesh.wait(|| plain(CLIENT, "all"), "v2", "the route to be gone");

        let ages = [
            aged(named(tcp("age", &[("v2", 1)]), "age-a"), 2),
            aged(named(tcp("age", &[("v1", 1)]), "age-b"), 1),
        ];
        lab.apply(&ages).expect_ok();
        mesh.wait(
            || plain(CLIENT, "age"),
            "v1",
            "GEP-1294 TCPRoute: the oldest counts",
        );
        assert_eq!(
            plain(CLIENT, "age"),
            "v1",
            "GEP-1294 TCPRoute: the oldest counts"
        );

        lab.apply(&[tcp("weights", &[("v1", 1), ("v2", 3)])])
            .expect_ok();
        mesh.wait(|| plain(CLIENT, "weights"), "v1", "a weighted route");
        mesh.shares(
            "weights",
            false,
            &[("v1", 0.25), ("v2", 0.75)],
            "BackendRef.weight (GEP-1294)",
        );
        lab.apply(&[tcp("broken", &[("v1", 1), ("none", 1), ("v2", 0)])])
            .expect_ok();
        mesh.wait(
            || plain(CLIENT, "broken"),
            "v1",
            "a route with a backend that is not there",
        );
        mesh.shares(
            "broken",
            false,
            &[("v1", 0.5), ("refused", 0.5)],
            "BackendRef: an invalid one's share is refused",
        );
        lab.apply(&[tcp("hollow", &[("none", 1)])]).expect_ok();
        mesh.wait(
            || plain(CLIENT, "hollow"),
            "refused",
            "BackendRef: the only one cannot be used",
        );

        mesh.put(
            tcp("shared", &[("v1", 1)]),
            || plain(CLIENT, "shared"),
            "v1",
        );
        mesh.wait(
            || plain(CONSUMER, "shared.demo"),
            "v1",
            "GEP-1294 producer route, other namespaces",
        );
        let own = tcp_route("consumer", "own", "shared", 80, &[("v2", 1)]);
        mesh.put(own, || plain(CONSUMER, "shared.demo"), "v2");
        assert_eq!(
            plain(CLIENT, "shared"),
            "v1",
            "GEP-1294: for its own namespace only"
        );

        let mut section = tcp("section", &[("v1", 1)]);
        section["spec"]["parentRefs"][0] =
            json!({"group": "", "kind": "Service", "name": "section", "sectionName": "p80"});
        mesh.put(section, || plain(CLIENT, "section"), "v1");
        assert_eq!(
            mesh.tls(CLIENT, "section", "a.example.com"),
            "v2",
            "ParentReference.sectionName"
        );
    });
}

/// A client in each of two namespaces on node 1; servers on both nodes; fronts of `v2`'s pods.
struct Mesh {
    lab: Lab,
    /// Of the servers, in the order of [`SERVERS`].
    certificates: Vec<PathBuf>,
}

impl Mesh {
    fn new(s: &Scenario, fronts: &[&str]) -> Self {
        let mut manifests = Vec::new();
        for namespace in ["demo", "consumer"] {
            manifests.extend([meshed_namespace(namespace), account(namespace, "client")]);
            manifests.push(Pod::idle(namespace, "client", "node-1"));
        }
        // Port 80 carries HTTP here, and is declared not to: a connection is a connection.
        let ports = [(80, 80, Some("tcp")), (443, 443, None)];
        let mut certificates = Vec::new();
        for (name, node) in SERVERS {
            let (command, certificate) = nginx_tls(s, name);
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            manifests.push(account("demo", name));
            manifests.push(
                Pod::new("demo", name, node)
                    .command(&command)
                    .ready_tcp(443)
                    .build(),
            );
            manifests.push(service_of("demo", name, &ports));
            certificates.push(certificate);
        }
        for front in fronts {
            let mut front = service_of("demo", front, &ports);
            front["spec"]["selector"] = json!({"app": "v2"});
            manifests.push(front);
        }
        Self {
            lab: s.lab(2, &manifests),
            certificates,
        }
    }

    /// Who answers a TLS connection to a front for that server name, by the certificate: a server's name, or `refused`.
    fn tls(&self, pod: PodRef<'_>, front: &str, name: &str) -> String {
        let to = format!("::{front}.demo:443");
        let url = format!("https://{name}/");
        let mut said = Vec::new();
        for ((server, _), certificate) in SERVERS.iter().zip(&self.certificates) {
            let answer = self.curl(
                pod,
                &["--cacert", &path(certificate), "--connect-to", &to, &url],
            );
            match answer {
                Ok(text) => {
                    let name = name.to_ascii_lowercase();
                    assert_eq!(
                        text,
                        format!("{server} to {name}"),
                        "{front}: another name arrived"
                    );
                    return (*server).to_owned();
                }
                Err(code) => said.push(code),
            }
        }
        match said[..] {
            // A TLS connection that ends or is reset before its server says anything.
            [35, 35] => "refused".into(),
            // One server's certificate is not good for the other's root, and by weight either answers.
            [35 | 60, 35 | 60] => "now this, now that".into(),
            _ => panic!("{front}, {name}: curl failed with {said:?}"),
        }
    }

    /// A hello without server name: to an address.
    fn without_name(&self, front: &str) -> String {
        let v4 = self
            .lab
            .service_ips(("demo", front))
            .into_iter()
            .find(|ip| ip.is_ipv4());
        let url = format!("https://{}/", v4.expect("a dual-stack Service"));
        who(self.curl(CLIENT, &["-k", &url]))
    }

    fn plain(&self, pod: PodRef<'_>, authority: &str) -> String {
        who(self.curl(pod, &[&format!("http://{authority}/")]))
    }

    /// What is answered, or curl's exit code.
    fn curl(&self, pod: PodRef<'_>, args: &[&str]) -> Result<String, i32> {
        // Of one family: curl would try the other where the first is refused.
        let fixed = ["curl", "-q", "-4", "-sS", "--max-time", "5"];
        let done = self
            .lab
            .exec_within(pod, &[&fixed[..], args].concat(), Duration::from_secs(10));
        match done.code {
            Some(0) => Ok(done.stdout.trim().to_owned()),
            Some(code) => Err(code),
            None => panic!("{done}"),
        }
    }

    /// Applies a route and waits until it is in force.
    #[track_caller]
    fn put(&self, route: Value, now: impl Fn() -> String, wanted: &str) {
        self.lab.apply(std::slice::from_ref(&route)).expect_ok();
        self.wait(now, wanted, &route["metadata"]["name"].to_string());
    }

    #[track_caller]
    fn wait(&self, now: impl Fn() -> String, wanted: &str, what: &str) {
        wait_until(what, Duration::from_secs(15), || {
            let now = now();
            if now == wanted {
                Ok(())
            } else {
                Err(format!("{now}, not {wanted}"))
            }
        });
    }

    /// Makes many connections to a front and compares who answered with the shares.
    #[track_caller]
    fn shares(&self, front: &str, tls: bool, wanted: &[(&str, f64)], shows: &str) {
        let url = if tls {
            "-k --connect-to ::$0:443 https://a.example.com/"
        } else {
            "http://$0/"
        };
        let script = format!(
            "for i in $(seq {MANY}); do curl -q -4 -s --max-time 5 {url} || {{ code=$?; case $code in 7|35|52|56) echo refused;; *) echo failed $code;; esac; }}; done"
        );
        let done = self.lab.exec_within(
            CLIENT,
            &["sh", "-c", &script, front],
            Duration::from_secs(120),
        );
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for line in done.stdout.lines() {
            *seen
                .entry(line.split(' ').next().unwrap_or_default())
                .or_default() += 1;
        }
        println!("{front}: {seen:?}");
        for (who, share) in wanted {
            let got = seen.remove(who).unwrap_or_default() as f64 / MANY as f64;
            assert!(
                (got - share).abs() < WITHIN,
                "{shows}: {who} got {got}, not {share}"
            );
        }
        assert!(seen.is_empty(), "{shows}: {seen:?}, {done}");
    }
}

/// The server of an answer. Refused: the connection ended, in whatever way, before a byte was answered.
fn who(answer: Result<String, i32>) -> String {
    match answer {
        Ok(text) => text.split(' ').next().unwrap_or_default().to_owned(),
        Err(7 | 35 | 52 | 56) => "refused".into(),
        Err(code) => panic!("curl failed with {code}"),
    }
}

fn tls_route(
    namespace: &str,
    name: &str,
    front: &str,
    hostnames: &[&str],
    backends: &[(&str, u32)],
) -> Value {
    let mut route = route("TLSRoute", (namespace, name), (front, 443), backends);
    route["spec"]["hostnames"] = json!(hostnames);
    route
}

fn tcp_route(
    namespace: &str,
    name: &str,
    front: &str,
    port: u16,
    backends: &[(&str, u32)],
) -> Value {
    route("TCPRoute", (namespace, name), (front, port), backends)
}

fn route(
    kind: &str,
    (namespace, name): (&str, &str),
    (front, port): (&str, u16),
    backends: &[(&str, u32)],
) -> Value {
    let backends: Vec<Value> = backends
        .iter()
        .map(|(name, weight)| json!({"name": name, "namespace": "demo", "port": port, "weight": weight}))
        .collect();
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": front, "namespace": "demo", "port": port}],
            "rules": [{"backendRefs": backends}],
        },
    })
}

fn named(mut route: Value, name: &str) -> Value {
    route["metadata"]["name"] = json!(name);
    route
}

/// With a day of creation.
fn aged(mut route: Value, day: u32) -> Value {
    route["metadata"]["creationTimestamp"] = json!(format!("2026-01-{day:02}T00:00:00Z"));
    route
}

fn path(path: &Path) -> String {
    path.display().to_string()
}
