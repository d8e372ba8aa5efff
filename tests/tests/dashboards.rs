//! Every query of every panel of the Grafana dashboards returns data from a real Prometheus that scrapes a mesh under load.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use warren_tests::lab::{Lab, Node, in_namespace};
use warren_tests::load::Running;
use warren_tests::manifest::{CLIENT, CLOSED, ECHO, Pod, account, near_and_far, service};
use warren_tests::process::{Background, run};
use warren_tests::scenario::{Scenario, scenario};
use warren_tests::servers::nginx;
use warren_tests::wait::wait_until;

#[test]
fn every_panel_shows_data_of_a_mesh_under_load() {
    scenario(Duration::from_secs(180), |s| {
        let web = nginx(s, "web");
        let web: Vec<&str> = web.iter().map(String::as_str).collect();
        let mut manifests = near_and_far();
        manifests.push(account("demo", "web"));
        let pod = Pod::new("demo", "web", "node-2").command(&web);
        manifests.push(pod.ready_tcp(80).build());
        manifests.push(service("demo", "web", &[(80, 80)]));
        let lab = s.lab(2, &manifests);
        let node = lab.node("node-1");
        let prometheus = Prometheus::start(s, &lab, node);

        let _connections = Running::load(s, &lab, CLIENT, &format!("far:{ECHO}"), 20);
        // Both methods, so that requests have bodies; and connections that are refused.
        let requests = format!(
            "while :; do curl -s http://web/ >/dev/null; curl -s -d x=y http://web/ >/dev/null; \
             curl -s --max-time 1 http://far:{CLOSED}/ >/dev/null; done"
        );
        let _requests = lab.exec_background(CLIENT, &["sh", "-c", &requests]);

        let queries = queries();
        assert!(queries.len() > 60, "{} queries", queries.len());
        wait_until(
            "every query to return data",
            Duration::from_secs(60),
            || {
                let empty: Vec<&(String, String)> = (queries.iter())
                    .filter(|(_, query)| !prometheus.has_data(query))
                    .collect();
                match empty.is_empty() {
                    true => Ok(()),
                    false => Err(format!("{empty:#?}")),
                }
            },
        );
        // A misspelt name would pass above where a query falls back to zero.
        let documented = documented();
        let unknown: Vec<String> = (queries.iter())
            .flat_map(|(panel, query)| names(query).map(move |name| (panel, name)))
            .filter(|(_, name)| !documented.contains(&format!("`{name}`")))
            .map(|(panel, name)| format!("{panel}: {name}"))
            .collect();
        assert!(unknown.is_empty(), "no such metrics: {unknown:#?}");
    });
}

/// Panel and query, with Grafana's variables filled in as "all".
fn queries() -> Vec<(String, String)> {
    let directory =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/warren/dashboards");
    let mut queries = Vec::new();
    for file in std::fs::read_dir(directory).expect("the chart has dashboards") {
        let text = std::fs::read(file.expect("an entry").path()).expect("a dashboard");
        let dashboard: Value = serde_json::from_slice(&text).expect("a dashboard is JSON");
        for panel in dashboard["panels"].as_array().expect("panels") {
            for target in panel["targets"].as_array().expect("queries") {
                let query = target["expr"].as_str().expect("a query");
                let query = query
                    .replace("$__rate_interval", "10s")
                    .replace("$instance", ".*")
                    .replace("$service", ".*");
                assert!(
                    !query.contains('$'),
                    "{query}: a variable this test does not know"
                );
                queries.push((format!("{}: {}", dashboard["title"], panel["title"]), query));
            }
        }
    }
    queries
}

/// The pages that name every metric. Those of what has never happened are not on `/metrics`.
fn documented() -> String {
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference");
    (["metrics.md", "controller.md"].iter())
        .map(|page| std::fs::read_to_string(pages.join(page)).expect("a page"))
        .collect()
}

/// Names of metrics in a query, as the pages have them.
fn names(query: &str) -> impl Iterator<Item = &str> {
    (query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter(|word| word.starts_with("warren_") || word.starts_with("process_"))
        .map(|name| {
            ["_bucket", "_sum"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .unwrap_or(name)
        })
}

/// On a node, as it would be in a cluster.
struct Prometheus {
    node: Node,
    _process: Background,
}

impl Prometheus {
    #[track_caller]
    fn start(s: &Scenario, lab: &Lab, node: Node) -> Self {
        let nodes: Vec<Value> = lab.get("nodes");
        let mut targets: Vec<String> = (nodes.iter())
            .map(|node| node["metricsUrl"].as_str().expect("a URL"))
            .map(|url| url.replace("http://", "").replace("/metrics", ""))
            .collect();
        targets.push(format!("{}:15014", controller_address(lab)));
        let config = serde_json::json!({
            "global": {"scrape_interval": "1s"},
            // As the chart's PodMonitor: `namespace` and `pod` are the metric's own.
            "scrape_configs": [{"job_name": "warren", "honor_labels": true, "static_configs": [{"targets": targets}]}],
        });
        let config = s.file("prometheus.yaml", &config.to_string());
        let mut command = in_namespace(&node.netns, "prometheus");
        command.args(["--web.listen-address=127.0.0.1:9090", "--log.level=warn"]);
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!(
            "--storage.tsdb.path={}",
            s.fresh_path("tsdb").display()
        ));
        let prometheus = Self {
            _process: Background::start(&mut command),
            node,
        };
        wait_until("all targets to be scraped", Duration::from_secs(30), || {
            let up = prometheus.result("sum(up)");
            match up.first().map(|sample| sample["value"][1].clone()) {
                Some(Value::String(count)) if count == targets.len().to_string() => Ok(()),
                other => Err(format!("{other:?} of {targets:?}")),
            }
        });
        prometheus
    }

    /// Whether some series has a finite value now.
    fn has_data(&self, query: &str) -> bool {
        (self.result(query).iter())
            .filter_map(|sample| sample["value"][1].as_str()?.parse::<f64>().ok())
            .any(f64::is_finite)
    }

    fn result(&self, query: &str) -> Vec<Value> {
        let answer = self.get(&["query", "-G", "--data-urlencode", &format!("query={query}")]);
        assert_ne!(answer["status"], "error", "{query}: {answer}");
        answer["data"]["result"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }

    fn get(&self, request: &[&str]) -> Value {
        let mut curl = in_namespace(&self.node.netns, "curl");
        curl.args(["-s", "--max-time", "5"]);
        curl.arg(format!("http://127.0.0.1:9090/api/v1/{}", request[0]));
        curl.args(&request[1..]);
        let done = run(&mut curl, Duration::from_secs(10));
        // Nothing while it starts.
        serde_json::from_str(&done.stdout).unwrap_or(Value::Null)
    }
}

#[track_caller]
fn controller_address(lab: &Lab) -> String {
    let netns = format!("/proc/{}/ns/net", lab.controller());
    let mut ip = in_namespace(&netns, "ip");
    ip.args(["-j", "-4", "addr", "show", "scope", "global"]);
    let shown = run(&mut ip, Duration::from_secs(5)).expect_ok().stdout;
    let interfaces: Value = serde_json::from_str(&shown).expect("`ip -j` prints JSON");
    let address = interfaces[0]["addr_info"][0]["local"].as_str();
    address.expect("the controller has an address").to_owned()
}
