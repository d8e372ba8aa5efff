//! `get`, `logs` and `metrics`: looking at a lab.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_api::names::{CONTROLLER_METRICS_PORT, METRICS_PORT};
use serde::Serialize;

use super::names::LabName;
use super::status::{self, Status};
use super::{netns, routes};
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
    let part = match kind {
        GetKind::Routes => Some("routes"),
        GetKind::Policies => Some("policies"),
        _ => None,
    };
    if let Some(part) = part {
        let objects = routes::judged(&status, part, namespace)?;
        if output == Output::Json {
            return json(&objects);
        }
        let (head, rows) = routes::table(&objects);
        print(head, &rows);
        return Ok(());
    }
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
            GetKind::Routes | GetKind::Policies => Ok(()),
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
                "ZONE",
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
                        or_dash(node.zone.clone()),
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
        // Printed by themselves.
        GetKind::Routes | GetKind::Policies => (&[], Vec::new()),
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
        say(cells.join("  ").trim_end());
    }
}

/// Prints a line.
pub(crate) fn say(line: impl std::fmt::Display) {
    // Whoever closed their end does not want to know; the work goes on.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints what was asked for. A reader that closed its end has seen enough.
fn write_out(bytes: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(bytes) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        done => done.context("output"),
    }
}

/// Which logs are to be printed, and how.
#[derive(Debug)]
pub(crate) struct Logs {
    /// POD, deploy/NAME, node/NODE, controller or daemon.
    pub(crate) of: String,
    pub(crate) namespace: Option<String>,
    pub(crate) proxy: bool,
    pub(crate) agent: bool,
    pub(crate) tail: Option<usize>,
    pub(crate) follow: bool,
}

impl Logs {
    /// Prints them.
    pub(crate) fn print(&self, lab: &LabName) -> Result<()> {
        let files = self.files(lab)?;
        let mut ends = Vec::new();
        for (part, file) in &files {
            let bytes = read_from(file, 0)?;
            if files.len() > 1 {
                write_out(format!("==> {part} <==\n").as_bytes())?;
            }
            write_out(last_lines(&bytes, self.tail))?;
            ends.push(bytes.len() as u64);
        }
        if !self.follow {
            return Ok(());
        }
        loop {
            std::thread::sleep(FOLLOW_PERIOD);
            for ((_, file), end) in files.iter().zip(&mut ends) {
                let bytes = read_from(file, *end)?;
                write_out(&bytes)?;
                *end += bytes.len() as u64;
            }
        }
    }

    fn files(&self, lab: &LabName) -> Result<Vec<(&'static str, PathBuf)>> {
        let paths = lab.paths();
        let of = self.of.as_str();
        match of {
            "controller" => return Ok(vec![("controller", paths.component_log(None, of))]),
            "daemon" => return Ok(vec![("daemon", paths.daemon_log())]),
            _ => {}
        }
        let status = status::read(lab)?;
        let namespace = self.namespace.as_deref();
        if of.starts_with("node/") || (namespace.is_none() && status.node(of).is_ok()) {
            let node = &status.node(of)?.name;
            let both = self.proxy == self.agent;
            let parts = [("agent", both || self.agent), ("proxy", both || self.proxy)];
            let wanted = parts.into_iter().filter(|(_, wanted)| *wanted);
            return Ok(wanted
                .map(|(p, _)| (p, paths.component_log(Some(node), p)))
                .collect());
        }
        let (namespace, pod) = match status.pod(namespace, of) {
            Ok(pod) => (pod.namespace.clone(), pod.name.clone()),
            // The log of a pod outlives it.
            Err(error) => gone_pod(&paths.logs().join("pods"), namespace, of).ok_or(error)?,
        };
        Ok(vec![("pod", paths.pod_log(&namespace, &pod))])
    }
}

/// A log from an offset on; empty while there is none.
fn read_from(file: &Path, offset: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = || {
        let mut opened = File::open(file)?;
        opened.seek(SeekFrom::Start(offset))?;
        opened.read_to_end(&mut bytes)
    };
    match { read }() {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(file.display()),
        _ => Ok(bytes),
    }
}

const FOLLOW_PERIOD: Duration = Duration::from_millis(200);

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
    let body = fetch(&netns, netns::socket_address(address, port), "/metrics", of)?;
    write_out(body.as_bytes())
}

/// The metrics of every node that has a proxy, by the node's name.
pub(crate) async fn proxy_metrics(lab: &LabName) -> Result<Vec<(String, String)>> {
    let mut metrics = Vec::new();
    for node in status::read(lab)?.nodes {
        let Some(address) = node.proxy_address else {
            continue;
        };
        let to = netns::socket_address(address, METRICS_PORT);
        let limit = Duration::from_secs(10);
        let answer = netns::http_get(&node.netns, to, "/metrics", "", limit).await?;
        metrics.push((node.name, answer.body));
    }
    Ok(metrics)
}

/// The body that a part of the mesh answers a GET with, from inside a namespace.
pub(super) fn fetch(netns: &Path, to: SocketAddr, path: &str, of: &str) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let limit = Duration::from_secs(10);
    let answer = runtime
        .context("runtime")?
        .block_on(netns::http_get(netns, to, path, "", limit))?;
    if answer.status != 200 {
        return Err(Error::new(format!(
            "{of}: status {}: {}",
            answer.status,
            answer.body.trim()
        )));
    }
    Ok(answer.body)
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
