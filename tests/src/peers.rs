//! Servers that no one here wrote, all of them in one pod on each node, each on a port that says what it
//! carries (`appProtocol`) and on one that does not.

use std::time::Duration;

use crate::http::{ADMIN, HTTP, RAW};
use crate::lab::Lab;
use crate::manifest::{FAR, NEAR, Pod, account, meshed_namespace, service_of};
use crate::python::{interpreter, python};
use crate::scenario::{Scenario, binary};
use crate::servers::{nginx_files, together};
use crate::wait::wait_until;

/// A client on node 1 and all servers in one pod on each node, when all of them listen.
#[track_caller]
pub fn peers(s: &Scenario) -> Lab {
    let mut manifests = vec![meshed_namespace("demo"), account("demo", "client")];
    manifests.push(Pod::idle("demo", "client", "node-1"));
    let python3 = interpreter().display().to_string();
    let files = s.fresh_path("files");
    std::fs::create_dir(&files).expect("the scenario's directory can be written");
    std::fs::write(files.join("small"), "small\n")
        .expect("the scenario's directory can be written");
    let files = files.display().to_string();
    for ((_, name), node) in [(NEAR, "node-1"), (FAR, "node-2")] {
        let simple = |port: u16, version: &str| -> Vec<String> {
            let port = port.to_string();
            let words = [
                &python3,
                "-m",
                "http.server",
                &port,
                "--bind",
                "::",
                "--directory",
                &files,
                "--protocol",
                version,
            ];
            words.map(str::to_owned).to_vec()
        };
        let command = together(&[
            nginx_files(s),
            simple(PYTHON_11, "HTTP/1.1"),
            simple(PYTHON_10, "HTTP/1.0"),
            vec![
                binary("mesh-http").display().to_string(),
                "--name".into(),
                name.into(),
            ],
            python(
                "grpc_server.py",
                &["--name", name, "--port", &GRPC.to_string()],
            ),
            python("websocket_server.py", &["--port", &WEBSOCKET.to_string()]),
        ]);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        manifests.push(account("demo", name));
        let pod = Pod::new("demo", name, node).command(&command);
        manifests.push(pod.ready_http(ADMIN, "/count").build());
        let mut ports = vec![
            (HTTP_H2C, HTTP, Some("kubernetes.io/h2c")),
            (GRPC_H2C, GRPC, Some("kubernetes.io/h2c")),
        ];
        for (port, protocol) in PORTS {
            ports.extend([(port, port, None), (port + DECLARED, port, Some(protocol))]);
        }
        manifests.push(service_of("demo", name, &ports));
    }
    let lab = s.lab(2, &manifests);
    for server in [NEAR, FAR] {
        for (port, _) in PORTS {
            wait_until(
                &format!("port {port} of {server:?}"),
                Duration::from_secs(20),
                || {
                    let connect = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
                    let done = lab.exec(server, &["bash", "-c", &connect]);
                    if done.ok() { Ok(()) } else { Err(done) }
                },
            );
        }
    }
    lab
}

/// nginx: HTTP/1.
pub const NGINX: u16 = 80;
/// nginx: HTTP/2 with prior knowledge.
pub const NGINX_H2: u16 = 81;
/// Python's `http.server` as HTTP/1.1.
pub const PYTHON_11: u16 = 8000;
/// Python's `http.server` as HTTP/1.0.
pub const PYTHON_10: u16 = 8001;
/// gRPC in Python.
pub const GRPC: u16 = 50051;
/// WebSocket in Python.
pub const WEBSOCKET: u16 = 8765;
/// A Service's port with `appProtocol` is that much above the one without.
pub const DECLARED: u16 = 1000;
const PORTS: [(u16, &str); 8] = [
    (NGINX, "http"),
    (NGINX_H2, "kubernetes.io/h2c"),
    (PYTHON_11, "http"),
    (PYTHON_10, "http"),
    (HTTP, "http"),
    (RAW, "http"),
    (GRPC, "grpc"),
    (WEBSOCKET, "kubernetes.io/ws"),
];
/// [`HTTP`] once more, declared as HTTP/2.
pub const HTTP_H2C: u16 = 9180;
/// [`GRPC`] once more, declared as HTTP/2.
pub const GRPC_H2C: u16 = 51052;
