//! Waiting for the lab to be as it is wanted, and saying what stands in the way.

use std::path::Path;
use std::time::Duration;

use super::cluster::{Key, Phase};
use super::daemon::Lab;
use super::deployments::replicas;
use crate::error::{Error, Result};

/// Waits until every node and pod is ready.
pub(crate) async fn all_ready(lab: &Lab, limit: Duration) -> Result<()> {
    until(lab, limit, |lab| obstacles(lab, None)).await
}

/// Waits until a Deployment has only new and ready pods.
pub(crate) async fn rolled_out(lab: &Lab, key: &Key, limit: Duration) -> Result<()> {
    until(lab, limit, |lab| obstacles(lab, Some(key))).await
}

/// Waits until pods are gone.
pub(crate) async fn gone(lab: &Lab, pods: &[Key]) {
    let mut changes = lab.changes.subscribe();
    loop {
        changes.borrow_and_update();
        // Judged by UID would be more exact; a name is only taken again by those who delete and apply at once.
        if !pods
            .iter()
            .any(|key| lab.cluster.borrow().pods.contains_key(key))
        {
            return;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn until(
    lab: &Lab,
    limit: Duration,
    obstacles: impl Fn(&Lab) -> Vec<Obstacle>,
) -> Result<()> {
    let mut changes = lab.changes.subscribe();
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        changes.borrow_and_update();
        let found = obstacles(lab);
        if found.is_empty() {
            return Ok(());
        }
        let hopeless = found.iter().any(|o| o.hopeless);
        let late = tokio::time::timeout_at(deadline, changes.changed())
            .await
            .is_err();
        if hopeless || late {
            let found = if late { obstacles(lab) } else { found };
            if found.is_empty() {
                return Ok(());
            }
            let texts: Vec<String> = found.iter().map(|o| o.text.clone()).collect();
            let after = if late {
                format!(" after {limit:?}")
            } else {
                String::new()
            };
            return Err(Error::new(format!(
                "not ready{after}:\n{}",
                texts.join("\n")
            )));
        }
    }
}

/// Something that is not as it should be.
struct Obstacle {
    text: String,
    /// Waiting will not help.
    hopeless: bool,
}

/// With a Deployment: only what concerns that.
fn obstacles(lab: &Lab, only: Option<&Key>) -> Vec<Obstacle> {
    if let Some(trouble) = &*lab.trouble.borrow() {
        return vec![Obstacle {
            text: format!("  the mesh: {trouble}"),
            hopeless: true,
        }];
    }
    let mut found = Vec::new();
    if only.is_none() {
        found.extend(mesh_obstacles(lab));
    }
    let cluster = lab.cluster.borrow();
    for (key, record) in &cluster.deployments {
        if only.is_some_and(|only| only != key) {
            continue;
        }
        let owned = cluster.owned(key);
        let wanted = replicas(&record.manifest);
        let template = super::deployments::template(&record.manifest, record.restarted.as_deref());
        let hash = super::deployments::template_hash(&template);
        let new = owned.iter().filter(|p| p.hash == hash && p.ready).count();
        if new != wanted || owned.len() != wanted {
            let (namespace, name) = key;
            found.push(Obstacle {
                text: format!("  Deployment {namespace}/{name}: {new} of {wanted} pods are up to date and ready"),
                hopeless: false,
            });
        }
    }
    for (key, pod) in &cluster.pods {
        let owner = pod
            .owner
            .as_ref()
            .map(|(owner, _)| (key.0.clone(), owner.clone()));
        let concerned = only.is_none_or(|only| owner.as_ref() == Some(only));
        if !concerned || pod.is_settled() {
            continue;
        }
        let (namespace, name) = key;
        let log = lab.paths.pod_log(namespace, name);
        let restarts = match pod.life.restarts {
            0 => String::new(),
            n => format!(", restarted {n} times"),
        };
        found.push(Obstacle {
            text: format!(
                "  pod {namespace}/{name} on {}: {}{restarts}: {}{}",
                pod.node(),
                pod.life.phase.name(),
                pod.life.step,
                last_lines(&log)
            ),
            hopeless: pod.life.phase == Phase::Failed,
        });
    }
    found
}

fn mesh_obstacles(lab: &Lab) -> Vec<Obstacle> {
    let not_ready = lab.nodes.iter().filter(|node| !node.is_ready());
    let nodes: Vec<&str> = not_ready.map(|n| n.name.as_str()).collect();
    let Some(first) = nodes.first() else {
        return Vec::new();
    };
    let mut text = format!("  {} not ready", nodes.join(", "));
    let parts = [
        (None, "controller"),
        (Some(*first), "agent"),
        (Some(*first), "proxy"),
    ];
    for (node, part) in parts {
        let log = lab.paths.component_log(node, part);
        let of = node.map_or(part.to_owned(), |n| format!("{n} {part}"));
        text += &format!("\n    {of}:{}", last_lines(&log));
    }
    vec![Obstacle {
        text,
        hopeless: false,
    }]
}

/// The end of a log, indented, on lines of its own.
fn last_lines(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    if last.is_empty() {
        return " (no log)".into();
    }
    last.iter()
        .map(|line| format!("\n      | {line}"))
        .collect()
}

const LINES: usize = 5;
