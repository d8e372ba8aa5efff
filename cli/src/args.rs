//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::lab::names::LabName;

/// A service mesh for Kubernetes without sidecars.
#[derive(Debug, Parser)]
#[command(name = "warren", version, propagate_version = true)]
pub(crate) struct Warren {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole mesh on this machine, without Kubernetes (needs root)
    Lab {
        #[command(subcommand)]
        command: Lab,
    },
    /// Print the objects of a mesh, for `kubectl apply -f -`; the Helm chart has more options
    #[command(visible_alias = "upgrade")]
    Install(Install),
    /// Whether the mesh can work, or works, in a cluster. Exit code 1: something is wrong; 2: it cannot be asked
    Check(Check),
    /// Success rate, requests a second and latencies of each Service, from the node proxies
    Stat(Stat),
    /// Take every pod of a cluster out of the mesh and remove Warren from it
    Uninstall(Uninstall),
}

/// Which cluster is meant.
#[derive(Debug, Args)]
pub(crate) struct Cluster {
    /// Kubeconfig file (default: $KUBECONFIG, ~/.kube/config, or the service account of the pod this runs in)
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long)]
    pub(crate) context: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Whose paths and needs apply
    #[arg(long, default_value = "kind")]
    pub(crate) platform: Platform,
    /// Three controllers on different nodes
    #[arg(long)]
    pub(crate) ha: bool,
    /// Registry and path of the images, which are named `controller`, `cni` and `node-proxy` there
    #[arg(long, default_value = "warren")]
    pub(crate) registry: String,
    /// Tag of the images
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    pub(crate) tag: String,
    /// Whether plaintext from un-meshed callers is accepted where a namespace does not say
    #[arg(long, default_value = "permissive")]
    pub(crate) mode: Mode,
    /// Trust domain of the identities
    #[arg(long, default_value = mesh_api::names::DEFAULT_TRUST_DOMAIN)]
    pub(crate) trust_domain: String,
    /// What all parts log: a level, or a filter
    #[arg(long, default_value = "info")]
    pub(crate) log: String,
    /// Without the CRD of TrafficPolicy
    #[arg(long)]
    pub(crate) no_crds: bool,
    /// Without the Grafana dashboards
    #[arg(long)]
    pub(crate) no_dashboards: bool,
}

/// Where Kubernetes runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Platform {
    Kind,
    K3s,
    Gke,
    Eks,
    Aks,
    Openshift,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) cluster: Cluster,
    /// Before Warren is installed: only what it needs
    #[arg(long)]
    pub(crate) pre: bool,
    #[arg(short = 'o', long, default_value = "table")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Stat {
    #[command(flatten)]
    pub(crate) cluster: Cluster,
    /// Of a lab on this machine (root) instead of a cluster
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kubeconfig", "context"])]
    pub(crate) lab: Option<LabName>,
    /// Only Services of this namespace
    #[arg(short = 'n', long)]
    pub(crate) namespace: Option<String>,
    /// Seconds to look at
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) window: u64,
    #[arg(short = 'o', long, default_value = "table")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    pub(crate) cluster: Cluster,
    /// Seconds that captured connections get to end; what is left then is cut
    #[arg(long, default_value_t = 60)]
    pub(crate) deadline: u64,
    /// Only this step; a release of Helm runs both as hooks around its own removal
    #[arg(long)]
    pub(crate) step: Option<UninstallStep>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum UninstallStep {
    /// Every pod out of the mesh, and the plugin out of every node's CNI chain
    Nodes,
    /// What the controller made: trust bundle, Lease, taints
    Leftovers,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Lab {
    /// Start a lab; returns when every pod is ready
    Up(Up),
    /// Stop a lab and remove every trace of it
    Down {
        #[command(flatten)]
        lab: Which,
        /// All labs of this machine
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// The labs of this machine
    List,
    /// Run a command as if in a pod; its exit code is this command's
    Exec(Exec),
    /// Create or change what the manifests describe
    Apply {
        #[command(flatten)]
        lab: Which,
        #[command(flatten)]
        files: Files,
        /// Return only when all pods are ready
        #[arg(long)]
        wait: bool,
        /// Seconds to wait with --wait
        #[arg(long, default_value_t = 75)]
        timeout: u64,
    },
    /// Delete what the manifests name, or one object (`pod NAME`, `deploy/NAME`); returns when it is gone
    Delete {
        #[command(flatten)]
        lab: Which,
        #[arg(short = 'n', long)]
        namespace: Option<String>,
        #[arg(short = 'f', value_name = "FILE|DIR")]
        files: Vec<PathBuf>,
        /// KIND NAME, or KIND/NAME
        object: Vec<String>,
    },
    /// Replace the pods of a Deployment one by one
    Rollout {
        #[command(subcommand)]
        command: Rollout,
    },
    /// Print pods, nodes, services, deployments, routes or policies
    Get {
        #[command(flatten)]
        lab: Which,
        kind: GetKind,
        /// Only this namespace
        #[arg(short = 'n', long)]
        namespace: Option<String>,
        #[arg(short = 'o', long, default_value = "table")]
        output: Output,
    },
    /// Print the log of POD, deploy/NAME, node/NODE, controller or daemon
    Logs {
        #[command(flatten)]
        lab: Which,
        #[arg(short = 'n', long)]
        namespace: Option<String>,
        of: String,
        /// Only the proxy of the node
        #[arg(long, conflicts_with = "agent")]
        proxy: bool,
        /// Only the agent of the node
        #[arg(long)]
        agent: bool,
        /// Only the last lines
        #[arg(long)]
        tail: Option<usize>,
        /// Go on printing what is added, until interrupted
        #[arg(short = 'f', long)]
        follow: bool,
    },
    /// Print the metrics of a node's proxy, or of the controller
    Metrics {
        #[command(flatten)]
        lab: Which,
        /// NODE, node/NODE or controller
        of: String,
    },
    /// Restart node/NODE (proxy and agent, or one of them) or the controller
    Restart {
        #[command(flatten)]
        lab: Which,
        #[command(flatten)]
        part: Part,
        /// SIGKILL (of the proxy: its worker) instead of a graceful replacement
        #[arg(long)]
        kill: bool,
    },
    /// Keep a part away until `start`: controller, or node/NODE --agent|--proxy
    Stop {
        #[command(flatten)]
        lab: Which,
        #[command(flatten)]
        part: Part,
        /// SIGKILL instead of SIGTERM
        #[arg(long)]
        kill: bool,
    },
    /// Start again what `stop` stopped
    Start {
        #[command(flatten)]
        lab: Which,
        #[command(flatten)]
        part: Part,
    },
    /// The process behind a lab
    #[command(hide = true)]
    Daemon {
        #[command(flatten)]
        lab: Which,
    },
    /// Becomes a process of a lab
    #[command(hide = true)]
    Launch { spec: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Replace all pods of deploy/NAME, one by one; returns when it began
    Restart(RolloutOf),
    /// Wait until deploy/NAME has only new and ready pods
    Status(RolloutOf),
}

#[derive(Debug, Args)]
pub(crate) struct RolloutOf {
    #[command(flatten)]
    pub(crate) lab: Which,
    #[arg(short = 'n', long)]
    pub(crate) namespace: Option<String>,
    /// deploy/NAME
    pub(crate) deployment: String,
    /// Seconds to wait (status)
    #[arg(long, default_value_t = 75)]
    pub(crate) timeout: u64,
}

/// Which lab is meant.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Name of the lab
    #[arg(long, default_value = "warren")]
    pub(crate) name: LabName,
}

#[derive(Debug, Args)]
pub(crate) struct Files {
    /// Manifests: a file, a directory (recursively) or - for standard input; repeatable
    #[arg(short = 'f', value_name = "FILE|DIR", required = true)]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) lab: Which,
    /// How many nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=200))]
    pub(crate) nodes: u8,
    /// Zones that the nodes are in by turns (label topology.kubernetes.io/zone)
    #[arg(long, value_name = "ZONE,...", value_delimiter = ',')]
    pub(crate) zones: Vec<String>,
    /// Manifests: a file, a directory (recursively) or - for standard input; repeatable
    #[arg(short = 'f', value_name = "FILE|DIR")]
    pub(crate) files: Vec<PathBuf>,
    /// Directory with your own root.crt and root.key; made there if absent
    #[arg(long, value_name = "DIR")]
    pub(crate) ca: Option<PathBuf>,
    /// Whether plaintext from un-meshed callers is accepted
    #[arg(long, default_value = "permissive")]
    pub(crate) mode: Mode,
    /// Trust domain of the identities
    #[arg(long, default_value = mesh_api::names::DEFAULT_TRUST_DOMAIN)]
    pub(crate) trust_domain: String,
    /// Data-plane threads of each proxy
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) workers: u16,
    /// Where warren-controller, warren-cni and warren-node-proxy are (default: beside this program, then PATH)
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Neither controller nor agents nor proxies: the same pods without the mesh, to compare with
    #[arg(long)]
    pub(crate) no_mesh: bool,
    /// YAML laid over the configuration of the controller, the agents or the proxies; repeatable
    #[arg(long, value_name = "controller|agent|proxy=FILE", value_parser = parse_overlay)]
    pub(crate) config: Vec<Overlay>,
    /// Seconds until a pod that is not ready is a failure
    #[arg(long, default_value_t = 75)]
    pub(crate) timeout: u64,
}

/// `--config PART=FILE`
#[derive(Debug, Clone)]
pub(crate) struct Overlay {
    pub(crate) part: ConfigPart,
    pub(crate) file: PathBuf,
}

/// Whose configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum ConfigPart {
    Controller,
    Agent,
    Proxy,
}

fn parse_overlay(text: &str) -> Result<Overlay, String> {
    let expected = "expected controller=FILE, agent=FILE or proxy=FILE";
    let (part, file) = text.split_once('=').ok_or(expected)?;
    let part = match part {
        "controller" => ConfigPart::Controller,
        "agent" => ConfigPart::Agent,
        "proxy" => ConfigPart::Proxy,
        _ => return Err(expected.into()),
    };
    Ok(Overlay {
        part,
        file: file.into(),
    })
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) lab: Which,
    /// Namespace of the pod; not needed where the name is unique
    #[arg(short = 'n', long)]
    pub(crate) namespace: Option<String>,
    /// Container; only the first one of a pod runs
    #[arg(short = 'c', long)]
    pub(crate) container: Option<String>,
    /// POD, or deploy/NAME for any ready pod of a Deployment
    pub(crate) pod: String,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

/// A part of the mesh.
#[derive(Debug, Args)]
pub(crate) struct Part {
    /// node/NODE or controller
    pub(crate) of: String,
    /// The node's proxy
    #[arg(long, conflicts_with = "agent")]
    pub(crate) proxy: bool,
    /// The node's agent
    #[arg(long)]
    pub(crate) agent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    Permissive,
    Strict,
}

impl Mode {
    /// As configurations spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Permissive => "permissive",
            Mode::Strict => "strict",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GetKind {
    #[value(alias = "pod", alias = "po")]
    Pods,
    #[value(alias = "node", alias = "no")]
    Nodes,
    #[value(alias = "service", alias = "svc")]
    Services,
    #[value(alias = "deployment", alias = "deploy")]
    Deployments,
    /// HTTPRoutes, GRPCRoutes, TLSRoutes and TCPRoutes, and what the controller says of them
    #[value(alias = "route")]
    Routes,
    /// TrafficPolicies and XBackendTrafficPolicies, and what the controller says of them
    #[value(alias = "policy")]
    Policies,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Warren::command().debug_assert();
    }

    #[test]
    fn what_follows_the_dashes_is_the_commands_own() {
        let line = "warren lab exec --name x -n demo client -- curl -s --name y http://web/";
        let parsed = Warren::try_parse_from(line.split(' ')).unwrap();
        let Command::Lab {
            command: Lab::Exec(exec),
        } = parsed.command
        else {
            panic!("{parsed:?}");
        };
        assert_eq!(exec.lab.name.as_str(), "x");
        assert_eq!(exec.command, ["curl", "-s", "--name", "y", "http://web/"]);
    }
}
