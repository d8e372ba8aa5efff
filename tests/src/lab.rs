//! `warren lab` as the tests use it, and the guard that takes a lab down.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::host::{command_line, namespace_inode, pids};
use crate::manifest::documents;
use crate::metrics::Metrics;
use crate::process::{Background, Finished, run, tail};
use crate::scenario::{Scenario, binary};
use crate::wait::wait_until;

/// Namespace and name of a pod.
pub type PodRef<'a> = (&'a str, &'a str);

/// A running mesh. Taken down when dropped, also by a panic; its state is printed then.
#[derive(Debug)]
pub struct Lab {
    name: String,
    manifests: PathBuf,
    down: bool,
}

/// How to bring a lab up.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directory of the user's own root (`root.crt`, `root.key`).
    pub ca: Option<PathBuf>,
    /// Further arguments of `warren lab up`.
    pub args: Vec<String>,
}

/// What belongs to a lab, as far as it was seen while it ran.
#[derive(Clone, Debug)]
pub struct LabFootprint {
    /// Its name, part of every path it makes.
    pub name: String,
    /// Inodes of its network namespaces.
    pub namespaces: BTreeSet<u64>,
}

/// A pod as `get pods -o json` tells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Node.
    pub node: String,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// SPIFFE URI.
    #[serde(default)]
    pub identity: serde_json::Value,
    /// Enrolment: `none`, `joining`, `enrolled`, `leaving` or `hbone`.
    pub mesh: String,
    /// Path or name of the network namespace.
    pub netns: String,
    /// Process of the app.
    #[serde(default)]
    pub pid: Option<u32>,
}

impl Pod {
    /// The IPv4 address.
    #[track_caller]
    pub fn v4(&self) -> IpAddr {
        self.address(IpAddr::is_ipv4)
    }

    /// The IPv6 address.
    #[track_caller]
    pub fn v6(&self) -> IpAddr {
        self.address(IpAddr::is_ipv6)
    }

    #[track_caller]
    fn address(&self, family: fn(&IpAddr) -> bool) -> IpAddr {
        let found = self.ips.iter().copied().find(family);
        found.unwrap_or_else(|| panic!("{} has no such address: {:?}", self.name, self.ips))
    }
}

/// A node as `get nodes -o json` tells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Name.
    pub name: String,
    /// InternalIP.
    pub address: IpAddr,
    /// Path or name of the network namespace.
    pub netns: String,
    /// All InternalIPs.
    pub addresses: Vec<IpAddr>,
    /// The proxy's supervisor; 0 while there is none.
    #[serde(rename = "proxySupervisorPid")]
    pub supervisor: u32,
    /// The agent.
    pub agent_pid: u32,
}

/// A Service as `get services -o json` tells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Cluster IPs.
    #[serde(alias = "clusterIPs", alias = "addresses")]
    pub ips: Vec<IpAddr>,
}

impl Lab {
    /// Brings a lab up.
    #[track_caller]
    pub(crate) fn up(
        s: &Scenario,
        name: String,
        nodes: u32,
        manifests: &[serde_json::Value],
        options: &Options,
    ) -> Self {
        let directory = s.fresh_path("manifests");
        std::fs::create_dir(&directory).expect("the scenario's directory can be written");
        let file = directory.join("mesh.yaml");
        std::fs::write(&file, documents(manifests))
            .expect("the scenario's directory can be written");
        // From here on the guard cleans up, also when `up` fails half-way.
        let lab = Self {
            name,
            manifests: directory,
            down: false,
        };
        let mut command = lab.command("up");
        command.args(["--nodes", &nodes.to_string()]);
        if let Some(ca) = &options.ca {
            command.arg("--ca").arg(ca);
        }
        command.args(&options.args).arg("-f").arg(&file);
        run(&mut command, Duration::from_secs(90)).expect_ok();
        s.watch(lab.footprint());
        lab
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `warren lab <verb> --name <this lab>`.
    pub fn command(&self, verb: &str) -> Command {
        lab_command(&self.name, verb)
    }

    /// Runs a command in a pod's network namespace.
    #[track_caller]
    pub fn exec(&self, pod: PodRef<'_>, command: &[&str]) -> Finished {
        self.exec_within(pod, command, Duration::from_secs(30))
    }

    /// [`Lab::exec`] with its own time bound.
    #[track_caller]
    pub fn exec_within(&self, pod: PodRef<'_>, command: &[&str], limit: Duration) -> Finished {
        run(&mut self.exec_command(pod, command), limit)
    }

    /// [`Lab::exec`], beside the test.
    #[track_caller]
    pub fn exec_background(&self, pod: PodRef<'_>, command: &[&str]) -> Background {
        Background::start(&mut self.exec_command(pod, command))
    }

    fn exec_command(&self, (namespace, pod): PodRef<'_>, command: &[&str]) -> Command {
        let mut exec = self.command("exec");
        exec.args(["-n", namespace, pod, "--"]).args(command);
        exec
    }

    /// Applies manifests.
    #[track_caller]
    pub fn apply(&self, manifests: &[serde_json::Value]) -> Finished {
        self.apply_text(&documents(manifests))
    }

    /// Applies a text that may be no good.
    #[track_caller]
    pub fn apply_text(&self, text: &str) -> Finished {
        let file = self.manifests.join("apply.yaml");
        std::fs::write(&file, text).expect("the scenario's directory can be written");
        run(
            self.command("apply").arg("-f").arg(&file),
            Duration::from_secs(60),
        )
    }

    /// Deletes what the manifests name.
    #[track_caller]
    pub fn delete(&self, manifests: &[serde_json::Value]) -> Finished {
        let file = self.manifests.join("delete.yaml");
        std::fs::write(&file, documents(manifests))
            .expect("the scenario's directory can be written");
        run(
            self.command("delete").arg("-f").arg(&file),
            Duration::from_secs(60),
        )
    }

    /// All pods.
    #[track_caller]
    pub fn pods(&self) -> Vec<Pod> {
        self.get("pods")
    }

    /// One pod.
    #[track_caller]
    pub fn pod(&self, (namespace, name): PodRef<'_>) -> Pod {
        let found = self
            .pods()
            .into_iter()
            .find(|p| p.name == name && p.namespace == namespace);
        found.unwrap_or_else(|| panic!("no pod {namespace}/{name}"))
    }

    /// Whether a pod is in the mesh: enrolled, and every node knows.
    #[track_caller]
    pub fn is_enrolled(&self, pod: PodRef<'_>) -> bool {
        self.pod(pod).mesh == "enrolled"
    }

    /// Waits until a pod's enrolment is in that state.
    #[track_caller]
    pub fn wait_for_mesh(&self, pod: PodRef<'_>, state: &str) {
        wait_until(
            &format!("{pod:?} to be {state}"),
            Duration::from_secs(20),
            || {
                let mesh = self.pod(pod).mesh;
                if mesh == state { Ok(()) } else { Err(mesh) }
            },
        );
    }

    /// All nodes.
    #[track_caller]
    pub fn nodes(&self) -> Vec<Node> {
        self.get("nodes")
    }

    /// One node.
    #[track_caller]
    pub fn node(&self, name: &str) -> Node {
        let found = self.nodes().into_iter().find(|n| n.name == name);
        found.unwrap_or_else(|| panic!("no node {name}"))
    }

    /// One Service's cluster IPs.
    #[track_caller]
    pub fn service_ips(&self, (namespace, name): PodRef<'_>) -> Vec<IpAddr> {
        let all: Vec<Service> = self.get("services");
        let found = all
            .into_iter()
            .find(|s| s.name == name && s.namespace == namespace);
        found
            .unwrap_or_else(|| panic!("no Service {namespace}/{name}"))
            .ips
    }

    /// `get KIND -o json`.
    #[track_caller]
    pub fn get<T: for<'a> Deserialize<'a>>(&self, kind: &str) -> T {
        let done = run(
            self.command("get").args([kind, "-o", "json"]),
            Duration::from_secs(20),
        )
        .expect_ok();
        serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done}"))
    }

    /// A node's metrics (`node-1`).
    #[track_caller]
    pub fn metrics(&self, node: &str) -> Metrics {
        let done = run(self.command("metrics").arg(node), Duration::from_secs(20)).expect_ok();
        Metrics::parse(&done.stdout).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Logs of a pod (with `-n`) or of `node/<name>`.
    #[track_caller]
    pub fn logs(&self, of: &[&str]) -> String {
        let done = run(self.command("logs").args(of), Duration::from_secs(20)).expect_ok();
        done.stdout + &done.stderr
    }

    /// Waits until a node's logs hold a text.
    #[track_caller]
    pub fn wait_for_log(&self, of: &[&str], text: &str) {
        wait_until(
            &format!("{text:?} in the log of {of:?}"),
            Duration::from_secs(10),
            || {
                let log = self.logs(of);
                if log.contains(text) {
                    Ok(())
                } else {
                    Err(tail(&log).to_owned())
                }
            },
        );
    }

    /// `warren lab restart` with those arguments, such as `node/node-1 --proxy --kill`.
    #[track_caller]
    pub fn restart(&self, args: &[&str]) {
        run(self.command("restart").args(args), Duration::from_secs(90)).expect_ok();
    }

    /// The worker of a node's proxy, below its supervisor.
    #[track_caller]
    pub fn worker(&self, node: &str) -> u32 {
        let supervisor = self.node(node).supervisor;
        wait_until(
            "a worker of the proxy",
            Duration::from_secs(10),
            || match crate::host::children(supervisor)[..] {
                [worker] => Ok(worker),
                ref other => Err(format!("{other:?}")),
            },
        )
    }

    /// The lab's own daemon, which restarts what ends.
    #[track_caller]
    pub fn daemon(&self) -> u32 {
        let found = pids().into_iter().find(|pid| {
            let line = command_line(*pid);
            let program = line.split(' ').next().unwrap_or_default();
            program.ends_with("warren") && line.contains(&self.name) && line.contains("daemon")
        });
        found.unwrap_or_else(|| panic!("lab {} has no daemon", self.name))
    }

    /// The controller.
    #[track_caller]
    pub fn controller(&self) -> u32 {
        let found = pids().into_iter().find(|pid| {
            let line = command_line(*pid);
            let program = line.split(' ').next().unwrap_or_default();
            program.ends_with("warren-controller") && line.contains(&self.name)
        });
        found.unwrap_or_else(|| panic!("lab {} has no controller", self.name))
    }

    /// Keeps a part of the mesh away (`controller`, or `node/<name> --agent`) until the result drops.
    #[track_caller]
    pub fn keep_away(&self, part: &[&str], kill: bool) -> Away<'_> {
        let mut stop = self.command("stop");
        stop.args(part).args(kill.then_some("--kill"));
        run(&mut stop, Duration::from_secs(40)).expect_ok();
        Away {
            lab: self,
            part: part.iter().map(|&word| word.to_owned()).collect(),
        }
    }

    /// Takes it down; panics if that fails.
    #[track_caller]
    pub fn down(mut self) {
        self.down = true;
        run(&mut self.command("down"), Duration::from_secs(60)).expect_ok();
    }

    /// What belongs to it now.
    #[track_caller]
    pub fn footprint(&self) -> LabFootprint {
        let mut namespaces = BTreeSet::new();
        for netns in self
            .pods()
            .iter()
            .map(|p| &p.netns)
            .chain(self.nodes().iter().map(|n| &n.netns))
        {
            namespaces.extend(namespace_inode(&netns_path(netns)));
        }
        LabFootprint {
            name: self.name.clone(),
            namespaces,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            report(&self.name);
        }
        if !self.down {
            down(&self.name);
        }
    }
}

/// A part of the mesh that is being kept away.
#[derive(Debug)]
pub struct Away<'a> {
    lab: &'a Lab,
    part: Vec<String>,
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return; // The lab goes down anyway.
        }
        run(
            self.lab.command("start").args(&self.part),
            Duration::from_secs(60),
        )
        .expect_ok();
    }
}

/// Sends a signal; panics if there is no such process.
#[track_caller]
pub fn signal(pid: u32, signal: Signal) {
    if let Err(e) = kill(Pid::from_raw(pid as i32), signal)
        && !std::thread::panicking()
    {
        panic!("{signal} to {pid} ({}): {e}", command_line(pid));
    }
}

/// The file of a network namespace that the lab names by path or by name.
pub fn netns_path(netns: &str) -> PathBuf {
    if netns.starts_with('/') {
        netns.into()
    } else {
        Path::new("/run/netns").join(netns)
    }
}

/// A command inside a network namespace (a node's, for example).
pub fn in_namespace(netns: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns_path(netns).display()))
        .arg("--")
        .arg(program);
    command
}

fn lab_command(name: &str, verb: &str) -> Command {
    let mut command = Command::new(binary("warren"));
    command.args(["lab", verb, "--name", name]);
    command
}

/// Takes a lab down without asking whether that worked: the leftovers are looked for later.
pub(crate) fn down(name: &str) {
    let mut child = match own_group(&mut lab_command(name, "down")).spawn() {
        Ok(child) => child,
        Err(e) => return eprintln!("lab {name} down: {e}"),
    };
    for _ in 0..600 {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(100)),
            Ok(Some(status)) if status.success() => return,
            other => return eprintln!("lab {name} down: {other:?}"),
        }
    }
    eprintln!("lab {name} down: takes too long");
    let _ = child.kill();
    let _ = child.wait();
}

/// Keeps what is known of a lab that failed a test in `target/warren-tests/<lab>/`, and prints the last
/// lines. Never panics.
pub(crate) fn report(name: &str) {
    let directory = crate::python::workspace()
        .join("target/warren-tests")
        .join(name);
    let kept = std::fs::create_dir_all(&directory);
    eprintln!(
        "==== state of lab {name}, all of it in {}: {kept:?}",
        directory.display()
    );
    for query in [
        &["get", "pods"][..],
        &["get", "nodes"],
        &["logs", "daemon"],
        &["logs", "controller"],
        &["logs", "node/node-1"],
        &["logs", "node/node-2"],
        &["metrics", "node-1"],
        &["metrics", "node-2"],
    ] {
        let mut command = lab_command(name, query[0]);
        command.args(&query[1..]);
        match command.output() {
            Ok(output) => {
                let text = [output.stdout, output.stderr].concat();
                let file = directory.join(query.join("-").replace('/', "-"));
                // Only a help: what is printed below must do.
                let _ = std::fs::write(file, &text);
                if query[0] != "metrics" {
                    eprintln!("---- {query:?}\n{}", tail(&String::from_utf8_lossy(&text)));
                }
            }
            Err(e) => eprintln!("---- {query:?}: {e}"),
        }
    }
}

fn own_group(command: &mut Command) -> &mut Command {
    std::os::unix::process::CommandExt::process_group(command, 0).stdin(std::process::Stdio::null())
}
