//! `get`, `logs` and `metrics`: looking at a lab.

use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_api::names::{CONTROLLER_METRICS_PORT, METRICS_PORT};
use serde::Serialize;

use super::names::LabName;
use super::netns;
use super::status::{self, Status};
use crate::args::{GetKind, Output};
use crate::error::{Context, Error, Result};

/// Prints objects.
pub(crate) fn get(
    lab: &LabName,
    kind: GetKind,
    namespace: Option<&str>,
    output: Output,
) -> Result<()> {
    let mut status = status::read(lab)?;
    let here = |ns: &str| namespace.is_none_or(|n| n == ns);
    status.pods.retain(|p| here(&p.namespace));
    status.services.retain(|s| here(&s.namespace));
    status.deployments.retain(|d| here(&d.namespace));
    if output == Output::Json {
        return match kind {
            GetKind::Pods => json(&status.pods),
            GetKind::Nodes => json(&status.nodes),
            GetKind::Services => json(&status.services),
            GetKind::Deployments => json(&status.deployments),
        };
    }
    let (head, rows) = table(&status, kind);
    print(head, &rows);
    Ok(())
}

fn json<T: Serialize>(objects: &[T]) -> Result<()> {
    let text = serde_json::to_string_pretty(objects).context("output")?;
    write_out(text.as_bytes())?;
    write_out(b"\n")
}

fn table(status: &Status, kind: GetKind) -> (&'static [&'static str], Vec<Vec<String>>) {
    match kind {
        GetKind::Pods => (
            &[
                "NAMESPACE",
                "NAME",
                "READY",
                "STATUS",
                "RESTARTS",
                "MESH",
                "NODE",
                "IPS",
                "PID",
            ],
            status.pods.iter().map(pod_row).collect(),
        ),
        GetKind::Nodes => (
            &[
                "NAME",
                "ADDRESSES",
                "AGENT PID",
                "PROXY PID",
                "PROXY ADDRESS",
                "NETNS",
            ],
            status
                .nodes
                .iter()
                .map(|node| {
                    vec![
                        node.name.clone(),
                        join(&node.addresses),
                        process(node.agent_pid),
                        process(node.proxy_pid),
                        node.proxy_address.map_or("-".into(), |ip| ip.to_string()),
                        node.netns.display().to_string(),
                    ]
                })
                .collect(),
        ),
        GetKind::Services => (
            &[
                "NAMESPACE",
                "NAME",
                "CLUSTER-IPS",
                "PORTS",
                "READY ENDPOINTS",
            ],
            status
                .services
                .iter()
                .map(|service| {
                    let ports: Vec<String> = service.ports.iter().map(port).collect();
                    vec![
                        service.namespace.clone(),
                        service.name.clone(),
                        or_dash(service.cluster_ips.join(",")),
                        or_dash(ports.join(",")),
                        or_dash(service.endpoints.join(",")),
                    ]
                })
                .collect(),
        ),
        GetKind::Deployments => (
            &["NAMESPACE", "NAME", "READY", "UP-TO-DATE"],
            status
                .deployments
                .iter()
                .map(|d| {
                    vec![
                        d.namespace.clone(),
                        d.name.clone(),
                        format!("{}/{}", d.ready, d.replicas),
                        d.updated.to_string(),
                    ]
                })
                .collect(),
        ),
    }
}

fn pod_row(pod: &status::PodStatus) -> Vec<String> {
    let state = if pod.terminating {
        "Terminating".to_owned()
    } else if pod.ready || pod.message.is_empty() {
        pod.phase.clone()
    } else {
        let message = pod.message.lines().next().unwrap_or_default();
        let short: String = message.chars().take(60).collect();
        format!("{}: {short}", pod.phase)
    };
    vec![
        pod.namespace.clone(),
        pod.name.clone(),
        if pod.ready { "yes".into() } else { "no".into() },
        state,
        pod.restarts.to_string(),
        pod.mesh.clone(),
        pod.node.clone(),
        or_dash(join(&pod.ips)),
        process(pod.pid),
    ]
}

fn port(port: &status::PortStatus) -> String {
    let node_port = port.node_port.map_or(String::new(), |p| format!(":{p}"));
    format!("{}{node_port}/{}", port.port, port.protocol)
}

fn join(ips: &[IpAddr]) -> String {
    ips.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

fn process(pid: u32) -> String {
    if pid == 0 {
        "-".into()
    } else {
        pid.to_string()
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// Prints a table with aligned columns.
pub(crate) fn print(head: &[&str], rows: &[Vec<String>]) {
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|i| {
            all.iter()
                .map(|row| row[i].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    for row in all {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        // A reader that closed its end has seen enough.
        let _ = writeln!(std::io::stdout(), "{}", cells.join("  ").trim_end());
    }
}

fn write_out(bytes: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(bytes) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("output"),
        _ => Ok(()),
    }
}

/// What of a node is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeParts {
    pub(crate) proxy: bool,
    pub(crate) agent: bool,
}

/// Prints logs.
pub(crate) fn logs(
    lab: &LabName,
    namespace: Option<&str>,
    of: &str,
    parts: NodeParts,
    tail: Option<usize>,
) -> Result<()> {
    let paths = lab.paths();
    let status = status::read(lab)?;
    let files: Vec<(&str, PathBuf)> = if of == "controller" {
        vec![("controller", paths.component_log(None, "controller"))]
    } else if of == "daemon" {
        vec![("daemon", paths.daemon_log())]
    } else if of.starts_with("node/") || (namespace.is_none() && status.node(of).is_ok()) {
        let node = status.node(of)?.name.clone();
        let both = parts.proxy == parts.agent;
        let wanted = [
            ("agent", both || parts.agent),
            ("proxy", both || parts.proxy),
        ];
        let wanted = wanted.into_iter().filter(|(_, wanted)| *wanted);
        wanted
            .map(|(part, _)| (part, paths.component_log(Some(&node), part)))
            .collect()
    } else {
        let pod = match status.pod(namespace, of) {
            Ok(pod) => (pod.namespace.clone(), pod.name.clone()),
            // The log of a pod outlives it.
            Err(error) => gone_pod(&paths.logs().join("pods"), namespace, of).ok_or(error)?,
        };
        vec![("pod", paths.pod_log(&pod.0, &pod.1))]
    };
    let head = files.len() > 1;
    for (part, file) in files {
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e).context(file.display()),
        };
        if head {
            write_out(format!("==> {part} <==\n").as_bytes())?;
        }
        write_out(last_lines(&bytes, tail))?;
    }
    Ok(())
}

fn gone_pod(logs: &Path, namespace: Option<&str>, pod: &str) -> Option<(String, String)> {
    let entries = std::fs::read_dir(logs).ok()?.flatten();
    let namespaces = entries.filter_map(|e| e.file_name().into_string().ok());
    let mut found = namespaces
        .filter(|ns| namespace.is_none_or(|n| n == ns))
        .filter(|ns| logs.join(ns).join(format!("{pod}.log")).is_file());
    let first = found.next()?;
    found.next().is_none().then(|| (first, pod.to_owned()))
}

fn last_lines(bytes: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else { return bytes };
    let ends = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let mut starts = ends
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, b)| **b == b'\n')
        .map(|(i, _)| i + 1);
    match count.checked_sub(1) {
        None => &[],
        Some(n) => &bytes[starts.nth(n).unwrap_or(0)..],
    }
}

/// Prints metrics, fetched from inside the node's namespace.
pub(crate) fn metrics(lab: &LabName, of: &str) -> Result<()> {
    let status = status::read(lab)?;
    let (netns, address, port) = if of == "controller" {
        let controller = &status.controller;
        let address = controller.address.ok_or_else(|| super::mesh::no_mesh(of))?;
        (controller.netns.clone(), address, CONTROLLER_METRICS_PORT)
    } else {
        let node = status.node(of)?;
        let address = node
            .proxy_address
            .ok_or_else(|| Error::new(format!("{} has no proxy (yet)", node.name)))?;
        (node.netns.clone(), address, METRICS_PORT)
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let answer = runtime.context("runtime")?.block_on(netns::http_get(
        &netns,
        netns::socket_address(address, port),
        "/metrics",
        "",
        Duration::from_secs(10),
    ))?;
    if answer.status != 200 {
        return Err(Error::new(format!(
            "{of}: status {}: {}",
            answer.status,
            answer.body.trim()
        )));
    }
    write_out(answer.body.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        for (text, count, last) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 1, "c"),
            ("a\nb\n", 9, "a\nb\n"),
            ("a\n", 0, ""),
            ("", 3, ""),
        ] {
            assert_eq!(
                last_lines(text.as_bytes(), Some(count)),
                last.as_bytes(),
                "{text:?}"
            );
        }
    }
}
