//! What the daemon is asked, one JSON object a line, and its answers: any number of notes, then one end.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use warren_controller::providers::directory::ObjectKey;

use super::cluster::{Cluster, Key};
use super::daemon::{Lab, random_hex};
use super::manifests::Source;
use super::{apply, parts, wait};
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
        Request::Restart { part, kill } => parts::restart(lab, &part, kill).await,
        Request::Stop { part, kill } => parts::stop(lab, &part, kill).await,
        Request::Start { part } => parts::start(lab, &part).await,
    }
}

fn deployment(lab: &Lab, of: &Named) -> Result<Key> {
    let cluster = lab.cluster.borrow();
    let namespace = of.namespace.as_deref();
    Cluster::find(&cluster.deployments, "Deployment", namespace, &of.name).map_err(Error::new)
}

/// The names of all nodes.
pub(crate) fn node_names(lab: &Lab) -> BTreeSet<String> {
    lab.nodes.iter().map(|n| n.name.clone()).collect()
}

/// Manifests of thousands of pods fit.
const MAX_REQUEST: u64 = 64 << 20;
