//! `restart`, `stop` and `start` of the mesh's own processes.

use std::rc::Rc;
use std::time::Duration;

use mesh_api::names::HEALTH_PORT;
use nix::sys::signal::Signal;

use super::component::Component;
use super::daemon::Lab;
use super::names::netns_path;
use super::requests::Part;
use super::{mesh, netns};
use crate::error::{Error, Result};

fn node<'l>(lab: &'l Lab, name: &str) -> Result<&'l mesh::Node> {
    lab.node(name).ok_or_else(|| {
        let last = lab.nodes.len();
        Error::new(format!(
            "there is no node {name}; the lab has node-1 to node-{last}"
        ))
    })
}

/// Restarts a part; returns when it is back.
pub(crate) async fn restart(lab: &Rc<Lab>, part: &Part, kill: bool) -> Result<()> {
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

/// Keeps a part away; returns when it has ended.
pub(crate) async fn stop(lab: &Lab, part: &Part, kill: bool) -> Result<()> {
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

/// Brings back what was kept away; returns when it is ready.
pub(crate) async fn start(lab: &Lab, part: &Part) -> Result<()> {
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
    let netns = netns_path(&lab.name.netns("controller"));
    let health = netns::socket_address(lab.plan.controller().v4.into(), HEALTH_PORT);
    let ready = async {
        loop {
            let up = with_controller(lab, |c| c.starts() > starts && c.pid().is_some());
            let limit = Duration::from_secs(1);
            if up? {
                let answer = netns::http_get(&netns, health, "/healthz/ready", "", limit).await;
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

/// How long a restarted part may take to be back.
const BACK_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
