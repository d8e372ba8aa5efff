//! A node in a network namespace, pods in others, and the parts around the agent that the tests play:
//! container runtime, controller and node proxy.
//!
//! Each test runs in a process of its own inside the node's namespace, started by [`on_a_node`], which
//! also removes every namespace afterwards, however the test ended.

#![allow(missing_docs, unreachable_pub)]

pub mod apps;
pub mod controller;
pub mod proxy;
pub mod runtime;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::proto::mesh::NodePod;
use warren_cni::agent::config::AgentConfig;
use warren_cni::agent::node::Node;
use warren_cni::agent::record::Phase;
use warren_cni::agent::{Agent, Error};

use controller::FakeController;

/// Runs `body` in a process inside a fresh node namespace. `test` is the test's own name.
pub fn on_a_node(test: &str, body: impl FnOnce(World)) {
    if let Some(directory) = std::env::var_os("WARREN_TEST_NODE") {
        let prefix = std::env::var("WARREN_TEST_PREFIX").unwrap();
        tracing_subscriber::fmt()
            .with_env_filter("warren_cni=debug")
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
        body(World {
            directory: directory.into(),
            prefix,
        });
        return;
    }
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces: run them as root"
    );
    let hash = test
        .bytes()
        .fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let prefix = format!("wct{}-{:04x}-", std::process::id(), hash & 0xffff);
    let directory = tempfile::tempdir().unwrap();
    let cleanup = Cleanup(prefix.clone());
    let node = format!("{prefix}node");
    must("ip", &["netns", "add", &node]);
    must("ip", &["-n", &node, "link", "set", "lo", "up"]);
    for address in ["192.0.2.11/32", "2001:db8:11::11/128"] {
        must("ip", &["-n", &node, "addr", "add", address, "dev", "lo"]);
    }
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{node}"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("WARREN_TEST_NODE", directory.path())
        .env("WARREN_TEST_PREFIX", &prefix)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + TEST_BOUND;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    drop(cleanup);
    assert!(status.is_some(), "{test} took longer than {TEST_BOUND:?}");
    assert!(status.unwrap().success(), "{test} failed on its node");
}

struct Cleanup(String);

impl Drop for Cleanup {
    fn drop(&mut self) {
        for entry in std::fs::read_dir("/run/netns")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().into_string().unwrap_or_default();
            if name.starts_with(&self.0) {
                let _ = Command::new("ip").args(["netns", "del", &name]).status();
            }
        }
    }
}

/// The node the test runs on.
pub struct World {
    pub directory: PathBuf,
    prefix: String,
}

impl World {
    pub fn config(&self) -> AgentConfig {
        let mut config = AgentConfig {
            node: "node-1".into(),
            node_addresses: vec![
                "192.0.2.11".parse().unwrap(),
                "2001:db8:11::11".parse().unwrap(),
            ],
            broker_socket: self.directory.join("broker.sock"),
            cni_socket: self.directory.join("cni.sock"),
            state_dir: self.directory.join("state"),
            proxy_uid: 0,
            log: "debug".into(),
            ..AgentConfig::default()
        };
        config.cni.conf_dir = self.directory.join("net.d");
        config.cni.bin_dir = self.directory.join("bin");
        // The test binary is not the plugin.
        config.cni.install = false;
        config.cni.proc_dir = self.directory.join("proc");
        config
    }

    /// As if this process of the pod ran in its sandbox: the tests make no cgroups.
    pub fn process(&self, pid: u32, uid: &str, pod: &Sandbox) {
        let directory = self.directory.join(format!("proc/{pid}"));
        std::fs::create_dir_all(directory.join("ns")).unwrap();
        let stat = format!("{pid} (pause) S {}77 0", "0 ".repeat(18));
        std::fs::write(directory.join("stat"), stat).unwrap();
        std::os::unix::fs::symlink(&pod.path, directory.join("ns/net")).unwrap();
        let cgroup = format!("0::/kubepods/pod{uid}/sandbox\n");
        std::fs::write(directory.join("cgroup"), cgroup).unwrap();
    }

    /// A pod's network namespace, empty.
    pub fn sandbox(&self, name: &str) -> Sandbox {
        let name = format!("{}{name}", self.prefix);
        must("ip", &["netns", "add", &name]);
        must("ip", &["-n", &name, "link", "set", "lo", "up"]);
        let path = Path::new("/run/netns").join(&name);
        Sandbox { name, path }
    }
}

pub struct Sandbox {
    pub name: String,
    pub path: PathBuf,
}

impl Sandbox {
    /// Output of a command inside.
    pub fn exec(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.path.display()))
            .arg(program)
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?} in {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything the agent might have left.
    pub fn traces(&self) -> String {
        let mut text = self.exec("nft", &["list", "ruleset"]);
        for family in ["-4", "-6"] {
            text += &self.exec("ip", &[family, "rule", "show"]);
            text += &self.exec("ip", &[family, "route", "show", "table", "all"]);
        }
        text += &self.exec("ss", &["-Hltn"]);
        text
    }
}

/// An agent that dies like a process when dropped.
pub struct RunningAgent {
    pub node: Arc<Node>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl RunningAgent {
    pub fn start(config: &AgentConfig, controller: &Arc<FakeController>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let config = config.clone();
        let control = Arc::clone(controller);
        let node = runtime.block_on(async move {
            let agent = Agent::start(&config, control).unwrap();
            let node = Arc::clone(&agent.node);
            tokio::spawn(async move {
                let ended: Result<(), Error> = agent.run().await;
                panic!("the agent ended: {ended:?}");
            });
            node
        });
        let agent = Self {
            node,
            runtime: Some(runtime),
        };
        controller.attach(&agent.node);
        agent
    }

    /// As SIGKILL.
    pub fn kill(self) {
        drop(self);
    }

    /// The controller says what the pod is to be.
    pub fn says(&self, pod: NodePod) {
        let runtime = self.runtime.as_ref().unwrap();
        let _guard = runtime.enter();
        self.node.pod_changed(pod);
    }

    pub fn leave_all(&self, deadline: Duration) -> bool {
        let runtime = self.runtime.as_ref().unwrap();
        let deadline = tokio::time::Instant::now() + deadline;
        runtime.block_on(self.node.leave(deadline))
    }
}

impl Drop for RunningAgent {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// The pod's phase as the agent keeps it on disk.
pub fn phase(config: &AgentConfig, uid: &str) -> Option<Phase> {
    let path = config.state_dir.join(format!("pods/{uid}.json"));
    let text = std::fs::read(path).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
    serde_json::from_value(record["phase"].clone()).ok()
}

/// Waits for something that must come, and says what did not.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !holds() {
        assert!(Instant::now() < deadline, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn must(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

const TEST_BOUND: Duration = Duration::from_secs(90);
