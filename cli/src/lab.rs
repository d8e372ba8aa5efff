//! `warren lab`: a whole mesh on one Linux machine, without Kubernetes.
//!
//! ```text
//! warren lab up ──starts──► warren lab daemon  (one a lab; owns every process and namespace of it)
//! apply, delete, restart … ──lab.sock──►  requests ─► cluster (what an API server would hold)
//!                                              │ pods        a task a pod: namespace, CNI ADD, app, probes, end
//!                                              │ mesh        controller, agents, proxies
//!                                              └ publish ──► manifests of the controller, hosts files,
//!                                                            nftables of the nodes, status.json
//! get, exec, logs, metrics ──read──► status.json             (they work without the daemon)
//! down ──► finds namespaces, processes and mounts itself     (so does it)
//! ```

mod apply;
mod client;
mod cluster;
mod cni;
mod component;
mod container;
mod daemon;
mod deployments;
mod down;
mod exec;
mod grpc_health;
mod hosts;
mod launch;
mod list;
mod manifests;
mod mesh;
mod mesh_files;
pub(crate) mod names;
mod netns;
mod network;
mod parts;
mod plan;
mod pods;
mod probes;
mod processes;
mod publish;
mod requests;
mod routes;
mod services;
mod snapshot;
mod status;
#[allow(unsafe_code)]
mod sys;
mod translation;
mod up;
mod view;
mod wait;

use std::process::ExitCode;

pub(crate) use self::view::proxy_metrics;

use self::requests::{Named, Part, Request};
use self::status::deployment_name;
use crate::args::{self, Lab, Rollout};
use crate::error::{Error, Result};

/// Where programs of this machine are looked for.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Does what a `warren lab` command says.
pub(crate) fn run(command: Lab) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() && !matches!(command, Lab::Launch { .. }) {
        return Err(Error::new(
            "the lab needs root, because it makes network namespaces and runs processes in them; use sudo",
        ));
    }
    match command {
        Lab::Up(options) => up::up(&options)?,
        Lab::Down { all: true, .. } => {
            for name in list::names() {
                down::down(&name)?;
            }
        }
        Lab::Down { lab, .. } => down::down(&lab.name)?,
        Lab::List => list::list(),
        Lab::Exec(options) => return Err(exec::exec(&options)?),
        Lab::Apply {
            lab,
            files,
            wait,
            timeout,
        } => {
            let sources = manifests::read(&files.files)?;
            client::ask(&lab.name, &Request::Apply { sources })?;
            if wait {
                client::ask(&lab.name, &Request::Wait { seconds: timeout })?;
            }
        }
        Lab::Delete {
            lab,
            namespace,
            files,
            object,
        } => {
            let objects = to_delete(namespace, &files, &object)?;
            client::ask(&lab.name, &Request::Delete { objects })?;
        }
        Lab::Rollout { command } => rollout(command)?,
        Lab::Get {
            lab,
            kind,
            namespace,
            output,
        } => {
            view::get(&lab.name, kind, namespace.as_deref(), output)?;
        }
        Lab::Logs {
            lab,
            namespace,
            of,
            proxy,
            agent,
            tail,
            follow,
        } => {
            let wanted = view::Logs {
                of,
                namespace,
                proxy,
                agent,
                tail,
                follow,
            };
            wanted.print(&lab.name)?;
        }
        Lab::Metrics { lab, of } => view::metrics(&lab.name, &of)?,
        Lab::Restart { lab, part, kill } => {
            let request = Request::Restart {
                part: part_of(&part)?,
                kill,
            };
            client::ask(&lab.name, &request)?;
        }
        Lab::Stop { lab, part, kill } => {
            client::ask(
                &lab.name,
                &Request::Stop {
                    part: part_of(&part)?,
                    kill,
                },
            )?;
        }
        Lab::Start { lab, part } => {
            client::ask(
                &lab.name,
                &Request::Start {
                    part: part_of(&part)?,
                },
            )?;
        }
        Lab::Daemon { lab } => daemon::main(&lab.name)?,
        Lab::Launch { spec } => return Err(launch::from_argument(&spec)),
    }
    Ok(ExitCode::SUCCESS)
}

fn rollout(command: Rollout) -> Result<()> {
    let (Rollout::Restart(of) | Rollout::Status(of)) = &command;
    let text = of.deployment.as_str();
    let name = deployment_name(text)
        .ok_or_else(|| Error::new(format!("expected deploy/NAME, found {text}")))?;
    let named = Named {
        kind: "Deployment".into(),
        namespace: of.namespace.clone(),
        name: name.into(),
        optional: false,
    };
    let request = match &command {
        Rollout::Restart(_) => Request::RolloutRestart { of: named },
        Rollout::Status(of) => Request::RolloutStatus {
            of: named,
            seconds: of.timeout,
        },
    };
    client::ask(&of.lab.name, &request)
}

fn part_of(part: &args::Part) -> Result<Part> {
    if part.of == "controller" {
        return Ok(Part::Controller);
    }
    let node = part.of.strip_prefix("node/").unwrap_or(&part.of).to_owned();
    if !node.starts_with("node-") {
        let of = &part.of;
        return Err(Error::new(format!(
            "expected controller or node/NODE, found {of}"
        )));
    }
    Ok(match (part.proxy, part.agent) {
        (true, _) => Part::Proxy(node),
        (_, true) => Part::Agent(node),
        _ => Part::Node(node),
    })
}

fn to_delete(
    namespace: Option<String>,
    files: &[std::path::PathBuf],
    object: &[String],
) -> Result<Vec<Named>> {
    let usage = "expected -f FILE, KIND NAME or KIND/NAME";
    let (kind, name) = match object {
        [] if !files.is_empty() => {
            let sources = manifests::read(files)?;
            // Against the order of creation: pods before their namespace.
            let names = manifests::parse_names(&sources)?.into_iter().rev();
            return Ok(names.map(Named::from).collect());
        }
        [kind, name] if files.is_empty() => (kind.as_str(), name.as_str()),
        [both] if files.is_empty() => both
            .split_once('/')
            .ok_or_else(|| Error::new(format!("{usage}, found {both}")))?,
        _ => return Err(Error::new(usage)),
    };
    let kind = match kind {
        "pod" | "pods" | "po" => "Pod",
        "deploy" | "deployment" | "deployments" => "Deployment",
        "svc" | "service" | "services" => "Service",
        "ns" | "namespace" | "namespaces" => "Namespace",
        "sa" | "serviceaccount" | "serviceaccounts" => "ServiceAccount",
        "endpointslice" | "endpointslices" => "EndpointSlice",
        "httproute" | "httproutes" => "HTTPRoute",
        "grpcroute" | "grpcroutes" => "GRPCRoute",
        "tlsroute" | "tlsroutes" => "TLSRoute",
        "tcproute" | "tcproutes" => "TCPRoute",
        "trafficpolicy" | "trafficpolicies" => "TrafficPolicy",
        "xbackendtrafficpolicy" | "xbackendtrafficpolicies" | "xbtrafficpolicy" => {
            "XBackendTrafficPolicy"
        }
        other => return Err(Error::new(format!("the lab has no {other} to delete"))),
    };
    Ok(vec![Named {
        kind: kind.into(),
        namespace,
        name: name.into(),
        optional: false,
    }])
}
