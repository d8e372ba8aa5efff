//! The process itself: configuration, ports, signals.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use crate::common::DEMO;

fn controller(config: &std::path::Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warren-controller"));
    command.arg("--config").arg(config).stderr(Stdio::piped());
    command
}

fn get(address: &str, path: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    write!(
        socket,
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn every_mistake_in_the_configuration_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("controller.yaml");
    for (text, expected) in [
        (
            "trustDomain: Cluster\nca: {directory: ca, leafLifetimeSeconds: 1}\nlog: '!='\n",
            vec![
                "provider: expected one of directory and kubernetes",
                "ca.directory: expected",
                "tokens: expected",
                "stateDir: expected",
                "trustDomain: expected",
                "ca.leafLifetimeSeconds: expected 60 to",
                "log: ",
            ],
        ),
        (
            "provider: {directory: here}\nca: {secret: x}\n",
            vec![
                "provider.directory: expected an absolute path",
                "ca.directory: expected an absolute path",
                "tokens: expected an absolute path",
                "stateDir: expected an absolute path",
                "ca.secret: not used with provider.directory",
            ],
        ),
        (
            "provider: {directory: /x, kubernetes: {}}\n",
            vec!["provider: expected one of directory and kubernetes, found both"],
        ),
        (
            "provider: {kubernetes: {kubeconfig: here, meshName: A}}\ntokens: /t\nstateDir: /s\n\
             ca: {directory: /c, secret: b_}\n",
            vec![
                "ca.directory: not used with provider.kubernetes",
                "tokens: not used with provider.kubernetes",
                "stateDir: not used with provider.kubernetes",
                "provider.kubernetes.kubeconfig: expected an absolute path",
                "provider.kubernetes.meshName: expected a name",
                "ca.secret: expected a name",
            ],
        ),
        ("ca: {dir: /x}\n", vec!["unknown field `dir`"]),
        ("listen: here\n", vec!["listen: invalid socket address"]),
    ] {
        std::fs::write(&config, text).unwrap();
        let output = controller(&config).output().unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8(output.stderr).unwrap();
        for part in expected {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
    }
}

#[test]
fn it_serves_health_and_metrics_and_stops_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().display();
    std::fs::create_dir(dir.path().join("manifests")).unwrap();
    std::fs::write(dir.path().join("manifests/demo.yaml"), DEMO).unwrap();
    std::fs::write(dir.path().join("tokens"), "").unwrap();
    let config = dir.path().join("controller.yaml");
    std::fs::write(
        &config,
        format!(
            "listen: 127.0.0.1:0\nmetricsListen: 127.0.0.1:0\nhealthListen: 127.0.0.1:0\nlogFormat: json\n\
             provider: {{directory: {root}/manifests}}\nca: {{directory: {root}/ca}}\n\
             tokens: {root}/tokens\nstateDir: {root}/state\n"
        ),
    )
    .unwrap();
    let mut child = controller(&config).spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let ready = log
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap())
        .find(|line| line["fields"]["message"] == "controller ready")
        .unwrap();
    let address = |name: &str| ready["fields"][name].as_str().unwrap().to_owned();
    assert!(get(&address("health"), "/healthz/live").starts_with("HTTP/1.1 200"));
    assert!(get(&address("health"), "/healthz/ready").starts_with("HTTP/1.1 200"));
    assert!(get(&address("health"), "/else").starts_with("HTTP/1.1 404"));
    let metrics = get(&address("metrics"), "/metrics");
    assert!(
        metrics.contains("warren_controller_pods{phase=\"wanted\"} 2"),
        "{metrics}"
    );
    let status = get(&address("metrics"), "/status");
    assert!(
        status.contains("spiffe://cluster.local/ns/demo/sa/web"),
        "{status}"
    );

    let pid = child.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    assert!(child.wait().unwrap().success());
}
