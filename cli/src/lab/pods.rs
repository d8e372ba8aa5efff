//! The life of a pod: a namespace, CNI ADD, the container and its probes, and the orderly end.
//!
//! Order is what it is about: the controller knows the pod before CNI ADD (its agent asks for it); ADD is
//! done before the app starts (so no un-meshed byte leaves); on deletion its endpoints are taken out before
//! the app hears of it.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{LifecycleHandler, PodSpec};
use nix::sys::signal::Signal;
use tokio::process::Child;
use tokio::sync::watch;

use super::cluster::{Key, Life, Phase};
use super::cni::{Attached, Sandbox};
use super::container::{self, Place};
use super::daemon::{Lab, random_hex};
use super::launch::Launch;
use super::mesh::Node;
use super::names::netns_path;
use super::probes::Target;
use super::{hosts, netns, processes};
use crate::error::{Context, Result};

/// Runs a pod from its creation to its removal.
pub(crate) async fn run(
    lab: Rc<Lab>,
    key: Key,
    uid: String,
    mut stop: watch::Receiver<Option<Duration>>,
) {
    let pod = Runner { lab, key, uid };
    if let Some((sandbox, attached)) = pod.attach_with_retries(&mut stop).await {
        match pod.make_etc() {
            Ok(()) => pod.containers(&sandbox, stop.clone()).await,
            Err(error) => pod.step(error.to_string()),
        }
        // Nothing left to run; a finished pod stays until it is deleted.
        let _ = stop.wait_for(Option::is_some).await;
        pod.node().chain.delete(&sandbox, &attached).await;
    }
    pod.remove().await;
}

struct Runner {
    lab: Rc<Lab>,
    key: Key,
    uid: String,
}

/// How a container ended.
enum End {
    /// By itself, or by its liveness probe.
    Exited {
        success: bool,
        how: String,
    },
    Stopped,
}

impl Runner {
    fn life(&self, change: impl FnOnce(&mut Life)) {
        if let Some(pod) = self.lab.cluster.borrow_mut().pod_mut(&self.key, &self.uid) {
            change(&mut pod.life);
        }
        self.lab.changed();
    }

    fn step(&self, step: String) {
        self.life(|life| life.step = step);
    }

    fn node(&self) -> &Node {
        let cluster = self.lab.cluster.borrow();
        let name = cluster.pods.get(&self.key).map_or("", |pod| pod.node());
        // Pods are bound to nodes that exist.
        self.lab.node(name).unwrap_or(&self.lab.nodes[0])
    }

    fn netns_name(&self) -> String {
        self.lab.name.pod_netns(&self.key.0, &self.key.1)
    }

    fn spec(&self) -> PodSpec {
        let cluster = self.lab.cluster.borrow();
        cluster
            .pods
            .get(&self.key)
            .and_then(|p| p.spec().cloned())
            .unwrap_or_default()
    }

    /// A failure is tried again with a new sandbox, as a kubelet does. `None`: the pod was deleted meanwhile;
    /// an ADD that is under way is never cut off, because only its result tells what there is to undo.
    async fn attach_with_retries(
        &self,
        stop: &mut watch::Receiver<Option<Duration>>,
    ) -> Option<(Sandbox, Attached)> {
        self.step("waits for its node to be ready".into());
        tokio::select! {
            () = self.node().ready() => {}
            _ = stop.wait_for(Option::is_some) => return None,
        }
        let mut pause = Duration::from_millis(250);
        loop {
            self.step("CNI ADD".into());
            match self.attach().await {
                Ok(done) => return Some(done),
                Err(error) => {
                    tracing::warn!(pod = %self, %error, "sandbox");
                    self.step(error.to_string());
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
                _ = stop.wait_for(Option::is_some) => return None,
            }
        }
    }

    async fn attach(&self) -> Result<(Sandbox, Attached)> {
        // The controller must know the pod when the node's agent asks about it.
        self.lab.published().await;
        let _slot = self
            .lab
            .attach_slots
            .acquire()
            .await
            .context("shutting down")?;
        let name = self.netns_name();
        netns::delete(&name).await?;
        let sandbox = Sandbox {
            container_id: random_hex(32),
            netns: netns::create(&name).await?,
            namespace: self.key.0.clone(),
            pod: self.key.1.clone(),
            uid: self.uid.clone(),
        };
        let attached = match self.node().chain.add(&sandbox).await {
            Ok(attached) => attached,
            Err(error) => {
                netns::delete(&name).await?;
                return Err(error);
            }
        };
        let ips = attached.addresses();
        let etc = self.lab.paths.pod(&self.key.0, &self.key.1);
        std::fs::create_dir_all(&etc).context(etc.display())?;
        self.life(|life| life.ips = ips);
        Ok((sandbox, attached))
    }

    /// Its `/etc` files, before its process starts; `publish` keeps the hosts file up to date from then on.
    fn make_etc(&self) -> Result<()> {
        let directory = self.lab.paths.pod(&self.key.0, &self.key.1);
        let write = |name: &str, text: &str| {
            let file = directory.join(name);
            hosts::rewrite(&file, text).context(file.display())
        };
        let cluster = self.lab.cluster.borrow();
        let names = hosts::names(&cluster);
        if let Some(pod) = cluster.pods.get(&self.key) {
            write("hosts", &hosts::hosts(&names, &self.key, pod))?;
        }
        write("resolv.conf", &hosts::resolv_conf(&self.key.0))?;
        write("gai.conf", hosts::GAI_CONF)
    }

    /// Runs the container, again and again if its policy says so.
    async fn containers(&self, sandbox: &Sandbox, mut stop: watch::Receiver<Option<Duration>>) {
        let spec = self.spec();
        let launch = self.launch(sandbox);
        let log = self.lab.paths.pod_log(&self.key.0, &self.key.1);
        let policy = spec.restart_policy.as_deref().unwrap_or("Always");
        let mut pause = Duration::ZERO;
        loop {
            let started = Instant::now();
            let end = match processes::start(&launch, &log) {
                Ok(child) => self.container(child, &launch, &spec, &mut stop).await,
                Err(error) => End::Exited {
                    success: false,
                    how: error.to_string(),
                },
            };
            self.kill_rest(sandbox).await;
            let (success, how) = match end {
                End::Exited { success, how } => (success, how),
                End::Stopped => return,
            };
            tracing::info!(pod = %self, how, "container ended");
            let again = policy == "Always" || (policy == "OnFailure" && !success);
            self.life(|life| {
                life.pid = None;
                life.ready = false;
                life.step = how;
                if !again {
                    life.phase = if success {
                        Phase::Succeeded
                    } else {
                        Phase::Failed
                    };
                }
            });
            if !again {
                return;
            }
            let lived = started.elapsed();
            pause = match pause {
                _ if lived > Duration::from_secs(30) => Duration::ZERO,
                Duration::ZERO => Duration::from_millis(500),
                pause => (pause * 2).min(Duration::from_secs(10)),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => self.life(|life| life.restarts += 1),
                _ = stop.wait_for(Option::is_some) => return self.terminating().await,
            }
        }
    }

    /// Attends one container until it has ended.
    async fn container(
        &self,
        mut child: Child,
        launch: &Launch,
        spec: &PodSpec,
        stop: &mut watch::Receiver<Option<Duration>>,
    ) -> End {
        let pid = child.id();
        self.life(|life| {
            life.pid = pid;
            life.phase = Phase::Running;
            life.step = "container started".into();
        });
        let probes = self.probes(launch, spec);
        let ready = |ready: bool, why: String| {
            self.life(|life| {
                life.ready = ready;
                life.step = why;
            });
        };
        let end = tokio::select! {
            status = child.wait() => match status {
                Ok(status) => {
                    End::Exited { success: status.success(), how: processes::describe(status) }
                }
                Err(error) => End::Exited { success: false, how: error.to_string() },
            },
            reason = probes.watch(ready) => {
                self.life(|life| life.ready = false);
                processes::end(&mut child, grace(spec, None)).await;
                End::Exited { success: false, how: format!("killed: {reason}") }
            }
            _ = stop.wait_for(Option::is_some) => End::Stopped,
        };
        if matches!(end, End::Stopped) {
            self.terminating().await;
            let grace = grace(spec, *stop.borrow());
            let begun = Instant::now();
            let hook = self.before_stop(launch, spec);
            let _ = tokio::time::timeout(grace, hook).await;
            processes::end(&mut child, grace.saturating_sub(begun.elapsed())).await;
        }
        end
    }

    /// Takes the pod out of its Services, and returns when the nodes and the controller have been told.
    async fn terminating(&self) {
        self.life(|life| {
            life.terminating = true;
            life.step = "terminating".into();
        });
        self.lab.published().await;
    }

    async fn before_stop(&self, launch: &Launch, spec: &PodSpec) {
        let lifecycle = spec.containers.first().and_then(|c| c.lifecycle.as_ref());
        let Some(LifecycleHandler { exec, sleep, .. }) =
            lifecycle.and_then(|l| l.pre_stop.as_ref())
        else {
            return;
        };
        if let Some(sleep) = sleep {
            let seconds = u64::try_from(sleep.seconds).unwrap_or(0);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
        if let Some(argv) = exec.as_ref().and_then(|e| e.command.clone()) {
            let launch = Launch {
                argv,
                ..launch.clone()
            };
            if let Err(error) = processes::run(&launch, "", grace(spec, None)).await {
                tracing::warn!(pod = %self, %error, "preStop");
            }
        }
    }

    fn launch(&self, sandbox: &Sandbox) -> Launch {
        let place = Place {
            ips: self.ips(),
            host_ip: self.node().addresses.v4.to_string(),
        };
        let cluster = self.lab.cluster.borrow();
        let process = match cluster.pods.get(&self.key) {
            Some(pod) => container::launch(&pod.manifest, &place),
            None => Launch::default(),
        };
        Launch {
            netns: Some(sandbox.netns.clone()),
            files: hosts::mounts(&self.lab.paths.pod(&self.key.0, &self.key.1)),
            ..process
        }
    }

    fn ips(&self) -> Vec<std::net::IpAddr> {
        let cluster = self.lab.cluster.borrow();
        cluster
            .pods
            .get(&self.key)
            .map(|p| p.life.ips.clone())
            .unwrap_or_default()
    }

    fn probes(&self, launch: &Launch, spec: &PodSpec) -> Target {
        let ips = self.ips();
        Target {
            container: spec.containers.first().cloned().unwrap_or_default(),
            // A pod that was attached has an address.
            address: ips
                .first()
                .copied()
                .unwrap_or(std::net::Ipv4Addr::LOCALHOST.into()),
            node_netns: self.node().netns.clone(),
            exec: launch.clone(),
        }
    }

    /// Ends what a container leaves behind, as the end of its PID namespace would.
    async fn kill_rest(&self, sandbox: &Sandbox) {
        let namespace: BTreeSet<_> = processes::netns_id(&sandbox.netns).into_iter().collect();
        let own = self.lab.component_pids();
        loop {
            let mut rest = processes::in_namespaces(&namespace);
            rest.retain(|pid| !own.contains(pid));
            if rest.is_empty() {
                return;
            }
            for pid in rest {
                processes::signal(pid, Signal::SIGKILL);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn remove(&self) {
        let name = self.netns_name();
        if let Err(error) = netns::delete(&name).await {
            tracing::warn!(pod = %self, %error, netns = %netns_path(&name).display(), "namespace");
        }
        self.lab
            .cluster
            .borrow_mut()
            .remove_pod(&self.key, &self.uid);
        let etc = self.lab.paths.pod(&self.key.0, &self.key.1);
        // Made late; absent when the pod never got that far.
        let _ = std::fs::remove_dir_all(etc);
        self.lab.changed();
    }
}

impl std::fmt::Display for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.key.0, self.key.1)
    }
}

/// What was asked for, else what the pod says, else Kubernetes' 30 s.
fn grace(spec: &PodSpec, asked: Option<Duration>) -> Duration {
    let own = spec
        .termination_grace_period_seconds
        .and_then(|s| u64::try_from(s).ok());
    asked.unwrap_or(Duration::from_secs(own.unwrap_or(30)))
}
