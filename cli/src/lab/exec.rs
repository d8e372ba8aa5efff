//! `exec`: a command in a pod. This process becomes the command, so its exit code, signals and terminal are
//! the command's.

use super::hosts;
use super::launch::Launch;
use super::status;
use crate::args::Exec;
use crate::error::{Error, Result};

/// Becomes the command; returns only when that fails.
pub(crate) fn exec(options: &Exec) -> Result<Error> {
    let name = &options.lab.name;
    let status = status::read(name)?;
    let pod = status.pod(options.namespace.as_deref(), &options.pod)?;
    if let Some(container) = options.container.as_deref().filter(|c| *c != pod.container) {
        return Err(Error::new(format!(
            "pod {} has no running container {container}; the lab runs the first one, {}",
            pod.name, pod.container
        )));
    }
    if pod.ips.is_empty() || !pod.netns.exists() {
        return Err(Error::new(format!(
            "pod {} has no network yet: {}",
            pod.name, pod.message
        )));
    }
    let mut env = pod.env.clone();
    if let Ok(term) = std::env::var("TERM") {
        env.entry("TERM".into()).or_insert(term);
    }
    let launch = Launch {
        argv: options.command.clone(),
        env,
        netns: Some(pod.netns.clone()),
        files: hosts::mounts(&name.paths().pod(&pod.namespace, &pod.name)),
        hostname: Some(pod.name.clone()),
        user: pod.run_as,
        ..Launch::default()
    };
    Ok(launch.become_it())
}
