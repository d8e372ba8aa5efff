//! What the daemon is asked, one JSON object a line, and its answers: any number of notes, then one end.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use warren_controller::providers::directory::ObjectKey;

use super::cluster::{Cluster, Key, Life, PodRecord};
use super::component::Component;
use super::daemon::{Lab, random_hex};
use super::manifests::Source;
use super::{apply, mesh, wait};
use crate::error::{Context, Error, Result};

/// A question.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "verb")]
pub(crate) enum Request {
    Apply {
        sources: Vec<Source>,
    },
    /// Returns when all pods are ready, or says why not after that many seconds.
    Wait {
        seconds: u64,
    },
    Delete {
        objects: Vec<Named>,
    },
    RolloutRestart {
        of: Named,
    },
    RolloutStatus {
        of: Named,
        seconds: u64,
    },
    Restart {
        part: Part,
        kill: bool,
    },
    Stop {
        part: Part,
        kill: bool,
    },
    Start {
        part: Part,
    },
}

/// An object; without a namespace the one of that name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Named {
    pub(crate) kind: String,
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
    /// Whether it is no error if it does not exist.
    pub(crate) optional: bool,
}

impl From<ObjectKey> for Named {
    fn from(key: ObjectKey) -> Self {
        let namespace = (!key.namespace.is_empty()).then_some(key.namespace);
        Self {
            kind: key.kind,
            namespace,
            name: key.name,
            optional: true,
        }
    }
}

/// A part of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Part {
    Controller,
    Agent(String),
    Proxy(String),
    Node(String),
}

/// A line of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Answer {
    /// For the person, on the way.
    Note(String),
    Done,
    Failed(String),
}

/// Serves connections for ever.
pub(crate) async fn listen(lab: Rc<Lab>, listener: UnixListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn_local(serve(Rc::clone(&lab), stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(lab: Rc<Lab>, stream: UnixStream) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(MAX_REQUEST)).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let request = match serde_json::from_str::<Request>(&line) {
            Ok(request) => request,
            Err(error) => {
                let _ = send(&mut write, &Answer::Failed(format!("request: {error}"))).await;
                return;
            }
        };
        let (notes, mut noted) = tokio::sync::mpsc::channel(64);
        let handle = async {
            let done = handle(&lab, request, notes).await;
            // So that `get` sees what was done.
            lab.published().await;
            done
        };
        tokio::pin!(handle);
        let done = loop {
            tokio::select! {
                biased;
                Some(note) = noted.recv() => {
                    if send(&mut write, &Answer::Note(note)).await.is_err() {
                        return;
                    }
                }
                done = &mut handle => break done,
            }
        };
        while let Ok(note) = noted.try_recv() {
            let _ = send(&mut write, &Answer::Note(note)).await;
        }
        let answer = match done {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Failed(error.to_string()),
        };
        if send(&mut write, &answer).await.is_err() {
            return;
        }
    }
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), answer: &Answer) -> Result<()> {
    let line = serde_json::to_string(answer).context("answer")? + "\n";
    write.write_all(line.as_bytes()).await.context("answer")
}

/// Where notes for the person go.
pub(crate) type Notes = tokio::sync::mpsc::Sender<String>;

async fn handle(lab: &Rc<Lab>, request: Request, notes: Notes) -> Result<()> {
    match request {
        Request::Apply { sources } => apply::apply(lab, &sources, &notes).await,
        Request::Wait { seconds } => wait::all_ready(lab, Duration::from_secs(seconds)).await,
        Request::Delete { objects } => apply::delete(lab, objects, &notes).await,
        Request::RolloutRestart { of } => {
            let key = deployment(lab, &of)?;
            let mut cluster = lab.cluster.borrow_mut();
            if let Some(record) = cluster.deployments.get_mut(&key) {
                record.restarted = Some(random_hex(6));
            }
            drop(cluster);
            lab.changed();
            lab.reconcile();
            Ok(())
        }
        Request::RolloutStatus { of, seconds } => {
            let key = deployment(lab, &of)?;
            wait::rolled_out(lab, &key, Duration::from_secs(seconds)).await
        }
        Request::Restart { part, kill } => restart(lab, &part, kill).await,
        Request::Stop { part, kill } => stop(lab, &part, kill).await,
        Request::Start { part } => start(lab, &part).await,
    }
}

fn deployment(lab: &Lab, of: &Named) -> Result<Key> {
    let cluster = lab.cluster.borrow();
    let namespace = of.namespace.as_deref();
    Cluster::find(&cluster.deployments, "Deployment", namespace, &of.name).map_err(Error::new)
}

fn node<'l>(lab: &'l Lab, name: &str) -> Result<&'l mesh::Node> {
    lab.node(name).ok_or_else(|| {
        let last = lab.nodes.len();
        Error::new(format!(
            "there is no node {name}; the lab has node-1 to node-{last}"
        ))
    })
}

async fn restart(lab: &Rc<Lab>, part: &Part, kill: bool) -> Result<()> {
    let signal = if kill {
        Signal::SIGKILL
    } else {
        Signal::SIGTERM
    };
    match part {
        Part::Controller => {
            let starts = with_controller(lab, |c| {
                c.signal(signal);
                c.starts()
            })?;
            await_controller(lab, starts).await
        }
        Part::Agent(name) => mesh::restart_agent(lab, node(lab, name)?, signal, BACK_LIMIT).await,
        Part::Proxy(name) if kill => mesh::kill_worker(node(lab, name)?, BACK_LIMIT).await,
        Part::Proxy(name) => {
            if !lab.spec.mesh {
                return Err(mesh::no_mesh(name));
            }
            mesh::replace_proxy(lab, node(lab, name)?, BACK_LIMIT).await
        }
        Part::Node(name) => {
            Box::pin(restart(lab, &Part::Agent(name.clone()), kill)).await?;
            Box::pin(restart(lab, &Part::Proxy(name.clone()), kill)).await
        }
    }
}

async fn stop(lab: &Lab, part: &Part, kill: bool) -> Result<()> {
    let end = |component: &Component| {
        component.stop();
        if kill {
            component.signal(Signal::SIGKILL);
        }
    };
    match part {
        Part::Controller => {
            with_controller(lab, end)?;
            poll(|| Ok(with_controller(lab, Component::pid)?.is_none())).await
        }
        Part::Agent(name) => {
            let node = node(lab, name)?;
            let with = |act: &dyn Fn(&Component)| {
                let agent = node.agent.borrow();
                agent.as_ref().map(act).ok_or_else(|| mesh::no_mesh(name))
            };
            with(&end)?;
            poll(|| {
                Ok(node
                    .agent
                    .borrow()
                    .as_ref()
                    .and_then(Component::pid)
                    .is_none())
            })
            .await
        }
        Part::Proxy(name) => {
            let proxy = node(lab, name)?
                .proxy()
                .ok_or_else(|| mesh::no_mesh(name))?;
            end(&proxy.component);
            proxy.component.ended().await;
            Ok(())
        }
        Part::Node(_) => Err(Error::new("say which part of the node: --agent or --proxy")),
    }
}

async fn start(lab: &Lab, part: &Part) -> Result<()> {
    match part {
        Part::Controller => {
            let starts = with_controller(lab, |c| {
                c.resume();
                // One that never stopped is there already.
                c.starts() - u32::from(c.pid().is_some())
            })?;
            await_controller(lab, starts).await
        }
        Part::Agent(name) => {
            let node = node(lab, name)?;
            let starts = {
                let agent = node.agent.borrow();
                let agent = agent.as_ref().ok_or_else(|| mesh::no_mesh(name))?;
                agent.resume();
                agent.starts() - u32::from(agent.pid().is_some())
            };
            mesh::await_agent(lab, node, starts, BACK_LIMIT).await
        }
        Part::Proxy(name) => {
            let proxy = node(lab, name)?
                .proxy()
                .ok_or_else(|| mesh::no_mesh(name))?;
            let starts = proxy.component.starts() - u32::from(proxy.component.pid().is_some());
            proxy.component.resume();
            proxy.component.started_after(starts).await;
            Ok(())
        }
        Part::Node(_) => Err(Error::new("say which part of the node: --agent or --proxy")),
    }
}

fn with_controller<T>(lab: &Lab, act: impl FnOnce(&Component) -> T) -> Result<T> {
    let controller = lab.controller.borrow();
    controller
        .as_ref()
        .map(act)
        .ok_or_else(|| mesh::no_mesh("controller"))
}

/// Waits until the controller has been started more often than `starts` and is ready.
async fn await_controller(lab: &Lab, starts: u32) -> Result<()> {
    let netns = super::names::netns_path(&lab.name.netns("controller"));
    let health = super::netns::socket_address(
        lab.plan.controller().v4.into(),
        mesh_api::names::HEALTH_PORT,
    );
    let ready = async {
        loop {
            let up = with_controller(lab, |c| c.starts() > starts && c.pid().is_some());
            let limit = Duration::from_secs(1);
            if up? {
                let answer =
                    super::netns::http_get(&netns, health, "/healthz/ready", "", limit).await;
                if answer.is_ok_and(|a| a.status == 200) {
                    return Ok(());
                }
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(BACK_LIMIT, ready).await.unwrap_or_else(|_| {
        Err(Error::new(format!(
            "the controller was not ready within {BACK_LIMIT:?}; see `warren lab logs controller`"
        )))
    })
}

async fn poll(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    while !done()? {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// A new pod of a Deployment, owned as the ReplicaSet controller would have it.
pub(crate) fn pod_of(
    (namespace, deployment): &Key,
    owner: &(String, String),
    template: &PodTemplateSpec,
) -> PodRecord {
    let hash = &owner.1;
    let mut pod = Pod {
        metadata: template.metadata.clone().unwrap_or_default(),
        spec: template.spec.clone(),
        ..Pod::default()
    };
    let metadata = &mut pod.metadata;
    metadata.name = Some(format!("{deployment}-{hash}-{}", random_name()));
    metadata.namespace = Some(namespace.clone());
    metadata
        .labels
        .get_or_insert_default()
        .insert("pod-template-hash".into(), hash.clone());
    metadata.owner_references = Some(vec![OwnerReference {
        api_version: "apps/v1".into(),
        kind: "ReplicaSet".into(),
        name: format!("{deployment}-{hash}"),
        uid: format!("{deployment}-{hash}"),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    PodRecord {
        manifest: pod,
        written: None,
        owner: Some(owner.clone()),
        life: Life::default(),
        stop: watch::Sender::new(None),
    }
}

/// Five characters, of those that Kubernetes uses: none that make words or look alike.
fn random_name() -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5)
        .map(|_| char::from(LETTERS[rand::random_range(0..LETTERS.len())]))
        .collect()
}

/// The names of all nodes.
pub(crate) fn node_names(lab: &Lab) -> BTreeSet<String> {
    lab.nodes.iter().map(|n| n.name.clone()).collect()
}

/// Manifests of thousands of pods fit.
const MAX_REQUEST: u64 = 64 << 20;
/// How long a restarted part may take to be back.
const BACK_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
