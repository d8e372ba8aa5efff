//! The mesh's own processes: the controller, and an agent and a proxy on each node.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use mesh_api::names::{
    CONTROLLER_METRICS_PORT, CONTROLLER_PORT, HEALTH_PORT, METRICS_PORT, PROXY_UID,
    SYSTEM_NAMESPACE,
};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::sync::watch;

use super::cni::{Attached, Chain, Sandbox};
use super::component::Component;
use super::daemon::{Lab, random_hex};
use super::launch::Launch;
use super::mesh_files::{
    ca_dir, controller_access, copy_bundle, make_dir, prepare_node, write_config,
};
use super::names::{LabName, netns_path};
use super::plan::{Pair, Plan};
use super::{DEFAULT_PATH, netns, processes};
use crate::args::ConfigPart;
use crate::error::{Context, Error, Result};

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    /// From 1.
    pub(crate) number: u8,
    pub(crate) addresses: Pair,
    pub(crate) netns: PathBuf,
    pub(crate) netns_name: String,
    pub(crate) chain: Chain,
    pub(crate) agent: RefCell<Option<Component>>,
    /// The newest first. The others are draining.
    pub(crate) proxies: RefCell<Vec<Rc<Proxy>>>,
    generation: Cell<u32>,
    ready: watch::Sender<bool>,
}

/// A proxy in its own pod.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) sandbox: Sandbox,
    netns_name: String,
    attached: Attached,
    pub(crate) admin_socket: PathBuf,
    pub(crate) component: Component,
}

impl Proxy {
    /// The address of its own pod.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.attached.addresses().first().copied()
    }
}

impl Node {
    /// The `number`-th node of a lab. Nothing is made yet.
    pub(crate) fn new(lab: &LabName, plan: Plan, number: u8) -> Self {
        let name = format!("node-{number}");
        let netns_name = lab.netns(&name);
        let netns = netns_path(&netns_name);
        let dir = lab.paths().node(&name);
        let chain = Chain {
            netns: netns.clone(),
            conf_dir: dir.join("cni/net.d"),
            bin_dirs: vec![dir.join("cni/bin"), PathBuf::from(STOCK_PLUGINS)],
        };
        Self {
            addresses: plan.node(number),
            name,
            number,
            netns,
            netns_name,
            chain,
            agent: RefCell::default(),
            proxies: RefCell::default(),
            generation: Cell::new(0),
            ready: watch::Sender::new(false),
        }
    }

    /// Waits until pods may be put on it.
    pub(crate) async fn ready(&self) {
        let mut ready = self.ready.subscribe();
        // Fails only when the lab ends.
        let _ = ready.wait_for(|r| *r).await;
    }

    pub(crate) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// The proxy that serves.
    pub(crate) fn proxy(&self) -> Option<Rc<Proxy>> {
        self.proxies.borrow().first().cloned()
    }
}

/// Starts the mesh and keeps its trust bundle up to date; without a mesh nodes are ready at once.
pub(crate) async fn run(lab: Rc<Lab>) {
    if let Err(error) = begin(&lab).await {
        tracing::error!(%error, "the mesh cannot be started");
        *lab.trouble.borrow_mut() = Some(error.to_string());
        lab.changed();
        return;
    }
    loop {
        tokio::time::sleep(BUNDLE_PERIOD).await;
        if lab.spec.mesh
            && let Err(error) = copy_bundle(&lab)
        {
            tracing::warn!(%error, "trust bundle");
        }
    }
}

async fn begin(lab: &Rc<Lab>) -> Result<()> {
    for node in &lab.nodes {
        prepare_node(lab, node)?;
        if !lab.spec.mesh {
            node.ready.send_replace(true);
        }
    }
    if !lab.spec.mesh {
        return Ok(());
    }
    start_controller(lab)?;
    // As a kubelet, which mounts the ConfigMap before it starts what needs it.
    while copy_bundle(lab).is_err() {
        tokio::time::sleep(POLL).await;
    }
    for node in &lab.nodes {
        start_agent(lab, node)?;
    }
    for node in 0..lab.nodes.len() {
        let lab = Rc::clone(lab);
        let task = tokio::task::spawn_local(async move { start_node(&lab, node).await });
        // A node that does not come up must not keep the others from it; `up` tells which one it was.
        drop(task);
    }
    Ok(())
}

/// Starts a node's first proxy, and says when pods may come: what the taint `warren-mesh.io/not-ready` does.
async fn start_node(lab: &Rc<Lab>, index: usize) {
    let node = &lab.nodes[index];
    while !node.chain.has(PLUGIN) {
        tokio::time::sleep(POLL).await;
    }
    let mut pause = POLL;
    let proxy = loop {
        match start_proxy(lab, node).await {
            Ok(proxy) => break proxy,
            Err(error) => tracing::warn!(node = node.name, %error, "proxy"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    };
    await_proxy(node, &proxy).await;
    node.ready.send_replace(true);
    lab.changed();
}

/// Waits until a proxy says that it can carry traffic.
async fn await_proxy(node: &Node, proxy: &Proxy) {
    while !is_proxy_ready(node, proxy).await {
        tokio::time::sleep(POLL).await;
    }
}

async fn is_proxy_ready(node: &Node, proxy: &Proxy) -> bool {
    let Some(address) = proxy.address() else {
        return false;
    };
    let to = netns::socket_address(address, HEALTH_PORT);
    let answer = netns::http_get(&node.netns, to, "/healthz/ready", "", PROBE_LIMIT).await;
    answer.is_ok_and(|answer| answer.status == 200)
}

/// Puts a second proxy beside the first; once it carries traffic the older one is told to go. Returns then;
/// the older drains until its connections have ended or its grace period is over.
pub(crate) async fn replace_proxy(lab: &Rc<Lab>, node: &Node, limit: Duration) -> Result<()> {
    let older: Vec<Rc<Proxy>> = node.proxies.borrow().clone();
    let newer = start_proxy(lab, node).await?;
    let ready = tokio::time::timeout(limit, await_proxy(node, &newer)).await;
    if ready.is_err() {
        retire(lab, &node.name, &newer);
        return Err(Error::new(format!(
            "{}: the new proxy was not ready within {limit:?} and was stopped; the old one serves on. \
             See `warren lab logs {} --proxy`",
            node.name, node.name
        )));
    }
    for proxy in older {
        retire(lab, &node.name, &proxy);
    }
    Ok(())
}

/// Ends a proxy in the background and then removes its pod.
fn retire(lab: &Rc<Lab>, node: &str, proxy: &Rc<Proxy>) {
    proxy.component.stop();
    let (lab, node, proxy) = (Rc::clone(lab), node.to_owned(), Rc::clone(proxy));
    // Ends with the proxy, at the latest after its grace period.
    drop(tokio::task::spawn_local(async move {
        proxy.component.ended().await;
        let Some(node) = lab.node(&node) else { return };
        node.chain.delete(&proxy.sandbox, &proxy.attached).await;
        if let Err(error) = netns::delete(&proxy.netns_name).await {
            tracing::warn!(%error, "a proxy's namespace");
        }
        node.proxies.borrow_mut().retain(|p| !Rc::ptr_eq(p, &proxy));
        lab.changed();
    }));
}

/// Kills the proxy's worker and waits until its supervisor has another one that is ready.
pub(crate) async fn kill_worker(node: &Node, limit: Duration) -> Result<()> {
    let proxy = node
        .proxy()
        .ok_or_else(|| Error::new(format!("{} has no proxy", node.name)))?;
    let workers = processes::children(proxy.component.pid().unwrap_or(0));
    for worker in &workers {
        processes::signal(*worker, Signal::SIGKILL);
    }
    // Until then the one that is killed could still answer.
    while workers.iter().any(|worker| processes::is_running(*worker)) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::timeout(limit, await_proxy(node, &proxy)).await.map_err(|_| {
        let name = &node.name;
        Error::new(format!(
            "{name}: the proxy was not ready again within {limit:?}; see `warren lab logs {name} --proxy`"
        ))
    })
}

/// Restarts an agent and waits until it answers again.
pub(crate) async fn restart_agent(
    lab: &Lab,
    node: &Node,
    signal: Signal,
    limit: Duration,
) -> Result<()> {
    let starts = {
        let agent = node.agent.borrow();
        let agent = agent.as_ref().ok_or_else(|| no_mesh(&node.name))?;
        agent.signal(signal);
        agent.starts()
    };
    await_agent(lab, node, starts, limit).await
}

/// Waits until the agent has been started more often than `starts` and its socket answers.
pub(crate) async fn await_agent(
    lab: &Lab,
    node: &Node,
    starts: u32,
    limit: Duration,
) -> Result<()> {
    let socket = lab.paths.node(&node.name).join("run/cni.sock");
    let answering = async {
        loop {
            let up = {
                let agent = node.agent.borrow();
                agent
                    .as_ref()
                    .is_some_and(|a| a.starts() > starts && a.pid().is_some())
            };
            if up && answers(&socket) {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(limit, answering).await.map_err(|_| {
        let name = &node.name;
        Error::new(format!(
            "{name}: the agent did not answer within {limit:?}; see `warren lab logs {name} --agent`"
        ))
    })
}

/// Whether something listens on a SOCK_SEQPACKET unix socket.
fn answers(path: &Path) -> bool {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let Ok(address) = UnixAddr::new(path) else {
        return false;
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let Ok(fd) = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None) else {
        return false;
    };
    connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).is_ok()
}

/// An error for what needs a mesh.
pub(crate) fn no_mesh(what: &str) -> Error {
    Error::new(format!(
        "{what}: the lab has no mesh (it was started with --no-mesh)"
    ))
}

fn start_controller(lab: &Rc<Lab>) -> Result<()> {
    let dir = lab.paths.controller();
    let address = lab.plan.controller().v4;
    let ca = ca_dir(lab);
    for made in [
        lab.paths.controller_state(),
        lab.paths.manifests(),
        ca.clone(),
    ] {
        make_dir(&made, 0o755)?;
    }
    let config = json!({
        "listen": format!("{address}:{CONTROLLER_PORT}"),
        "metricsListen": format!("{address}:{CONTROLLER_METRICS_PORT}"),
        "healthListen": format!("{address}:{HEALTH_PORT}"),
        "trustDomain": lab.spec.trust_domain,
        "mode": lab.spec.mode,
        "provider": {"directory": lab.paths.manifests()},
        "ca": {"directory": ca},
        "tokens": lab.paths.tokens(),
        "stateDir": lab.paths.controller_state(),
        "log": "info",
    });
    let file = dir.join("controller.yaml");
    write_config(lab, ConfigPart::Controller, config, &file)?;
    let launch = Launch {
        argv: argv(&lab.programs.controller, &["--config"], &file),
        env: environment(),
        netns: Some(netns_path(&lab.name.netns("controller"))),
        ..Launch::default()
    };
    let component = component(lab, None, "controller", launch, Duration::from_secs(5));
    *lab.controller.borrow_mut() = Some(component);
    Ok(())
}

fn start_agent(lab: &Rc<Lab>, node: &Node) -> Result<()> {
    let dir = lab.paths.node(&node.name);
    let config = json!({
        "node": node.name,
        "nodeAddresses": node.addresses.both(),
        "controller": controller_access(lab, &dir.join("agent/token")),
        "brokerSocket": dir.join("run/broker.sock"),
        "cniSocket": dir.join("run/cni.sock"),
        "stateDir": dir.join("agent/state"),
        "cni": {"confDir": node.chain.conf_dir, "binDir": dir.join("cni/bin"), "install": true},
        "proxyUid": PROXY_UID,
        "excludeNamespaces": [SYSTEM_NAMESPACE, "kube-system"],
    });
    let file = dir.join("agent/agent.yaml");
    write_config(lab, ConfigPart::Agent, config, &file)?;
    let launch = Launch {
        argv: argv(&lab.programs.agent, &["agent", "--config"], &file),
        env: environment(),
        netns: Some(node.netns.clone()),
        ..Launch::default()
    };
    let component = component(
        lab,
        Some(&node.name),
        "agent",
        launch,
        Duration::from_secs(5),
    );
    *node.agent.borrow_mut() = Some(component);
    Ok(())
}

/// Starts a proxy in a pod of its own; it becomes the node's first.
async fn start_proxy(lab: &Rc<Lab>, node: &Node) -> Result<Rc<Proxy>> {
    node.generation.set(node.generation.get() + 1);
    let generation = node.generation.get();
    let pod = format!("warren-node-proxy-{}-{generation}", node.name);
    let netns_name = lab.name.pod_netns(SYSTEM_NAMESPACE, &pod);
    let sandbox = Sandbox {
        container_id: random_hex(32),
        netns: netns::create(&netns_name).await?,
        namespace: SYSTEM_NAMESPACE.into(),
        pod,
        uid: lab.new_uid(),
    };
    let attached = match node.chain.add(&sandbox).await {
        Ok(attached) => attached,
        Err(error) => {
            netns::delete(&netns_name).await?;
            return Err(error);
        }
    };
    let dir = lab.paths.node(&node.name);
    let admin_socket = dir.join(format!("proxy/run/admin-{generation}.sock"));
    let config = json!({
        "node": node.name,
        "controller": controller_access(lab, &dir.join("proxy/token")),
        "brokerSocket": dir.join("run/broker.sock"),
        "stateDir": dir.join("proxy/state"),
        "secretsDir": lab.paths.secrets().join(&node.name),
        "adminSocket": admin_socket,
        "metricsListen": format!("[::]:{METRICS_PORT}"),
        "healthListen": format!("[::]:{HEALTH_PORT}"),
        "workers": lab.spec.workers,
        "terminationGraceSeconds": PROXY_GRACE.as_secs(),
        "accessLog": "text",
    });
    let file = dir.join(format!("proxy/node-proxy-{generation}.yaml"));
    write_config(lab, ConfigPart::Proxy, config, &file)?;
    let launch = Launch {
        argv: argv(&lab.programs.proxy, &["--config"], &file),
        env: environment(),
        netns: Some(sandbox.netns.clone()),
        user: Some((PROXY_UID, PROXY_UID)),
        unprivileged: true,
        open_first: true,
        ..Launch::default()
    };
    let component = component(lab, Some(&node.name), "proxy", launch, PROXY_GRACE);
    let link = dir.join("proxy/admin.sock");
    let _ = std::fs::remove_file(&link);
    symlink(&admin_socket, &link).context(link.display())?;
    let proxy = Rc::new(Proxy {
        sandbox,
        netns_name,
        attached,
        admin_socket,
        component,
    });
    node.proxies.borrow_mut().insert(0, Rc::clone(&proxy));
    lab.changed();
    Ok(proxy)
}

fn component(
    lab: &Rc<Lab>,
    node: Option<&str>,
    part: &str,
    launch: Launch,
    grace: Duration,
) -> Component {
    let log = lab.paths.component_log(node, part);
    let name = node.map_or(part.to_owned(), |node| format!("{node}/{part}"));
    let changed = Rc::downgrade(lab);
    Component::start(name, launch, log, grace, move || {
        if let Some(lab) = changed.upgrade() {
            lab.changed();
        }
    })
}

fn argv(program: &Path, words: &[&str], config: &Path) -> Vec<String> {
    let words = words.iter().map(|w| (*w).to_owned());
    let mut argv = vec![program.display().to_string()];
    argv.extend(words);
    argv.push(config.display().to_string());
    argv
}

fn environment() -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([("PATH".to_owned(), DEFAULT_PATH.to_owned())]);
    if let Ok(backtrace) = std::env::var("RUST_BACKTRACE") {
        env.insert("RUST_BACKTRACE".into(), backtrace);
    }
    env
}

/// Name of Warren's plugin in the chain.
const PLUGIN: &str = "warren-cni";
/// Where Debian's containernetworking-plugins is.
const STOCK_PLUGINS: &str = "/usr/lib/cni";
/// Kubernetes' default grace period.
const PROXY_GRACE: Duration = Duration::from_secs(30);
const PROBE_LIMIT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(50);
const BUNDLE_PERIOD: Duration = Duration::from_secs(1);
