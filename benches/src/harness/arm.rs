//! One way between the client and the server.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::envoy::{self, Envoys};
use super::netns::Pair;
use super::process::{Process, in_namespace};
use super::warren::{Lab, Side};
use super::{Error, Options, io};
use crate::load::{Case, Plan};

/// Which way.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum ArmName {
    /// No proxy; two namespaces and a veth.
    Direct,
    /// A pair of Envoys, one in each namespace: TCP proxies with mutual TLS per connection.
    Envoy,
    /// No proxy; un-meshed pods on two nodes of the lab, by Service address.
    DirectLab,
    /// Meshed pods on two nodes of the lab, by Service address.
    Warren,
    /// Meshed pods on one node of the lab, by Service address.
    WarrenSameNode,
}

impl fmt::Display for ArmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Envoy => "envoy",
            Self::DirectLab => "direct-lab",
            Self::Warren => "warren",
            Self::WarrenSameNode => "warren-same-node",
        })
    }
}

/// A running arm.
pub(super) struct Arm {
    pub(super) name: ArmName,
    /// Namespace the client runs in.
    pub(super) client: PathBuf,
    /// Process ids of each proxy with all its children: the caller's, the callee's.
    pub(super) proxies: Vec<Vec<u32>>,
    keeper: Keeper,
}

/// What must live as long as the arm. Fields drop in order: processes before namespaces.
enum Keeper {
    Direct {
        _server: Process,
        _pair: Pair,
    },
    Envoy {
        envoys: Envoys,
        _server: Process,
        _pair: Pair,
    },
    Lab(std::rc::Rc<Lab>),
}

impl Arm {
    /// What the client dials.
    pub(super) fn target(&self, plan: &Plan) -> SocketAddr {
        match self.name {
            ArmName::Direct => TARGET,
            ArmName::Envoy if plan.case.is_http() => {
                let port = envoy::http_port(plan.case != Case::Http1, plan.routes);
                SocketAddr::new(TARGET.ip(), port)
            }
            ArmName::Envoy => TARGET,
            ArmName::DirectLab => Lab::target(Side::Plain, plan),
            ArmName::Warren => Lab::target(Side::Meshed, plan),
            ArmName::WarrenSameNode => Lab::target(Side::SameNode, plan),
        }
    }

    /// Whether the plan says anything about this arm.
    pub(super) fn takes(&self, plan: &Plan) -> bool {
        match self.name {
            ArmName::Envoy | ArmName::Warren => true,
            ArmName::Direct | ArmName::DirectLab => plan.routes == 0,
            ArmName::WarrenSameNode => plan.case.is_http() && plan.routes == 0,
        }
    }

    /// What the report should say about it, read after the runs: versions, the negotiated cipher.
    pub(super) fn facts(&self) -> Vec<(String, String)> {
        match &self.keeper {
            Keeper::Direct { .. } => Vec::new(),
            Keeper::Envoy { envoys, .. } => envoys.facts(),
            Keeper::Lab(lab) if self.name == ArmName::Warren => lab.facts(),
            Keeper::Lab(_) => Vec::new(),
        }
    }
}

/// Starts the arms asked for.
pub(super) fn start(options: &Options) -> Result<Vec<Arm>, Error> {
    let mut lab: Option<std::rc::Rc<Lab>> = None;
    let mut arms = Vec::new();
    for &name in &options.arms {
        eprintln!("starting: {name}");
        arms.push(match name {
            ArmName::Direct => direct(options)?,
            ArmName::Envoy => envoy(options)?,
            ArmName::DirectLab | ArmName::Warren | ArmName::WarrenSameNode => {
                let lab = match &lab {
                    Some(lab) => lab.clone(),
                    None => lab.insert(std::rc::Rc::new(Lab::up(options)?)).clone(),
                };
                let way = lab.way(match name {
                    ArmName::Warren => Side::Meshed,
                    ArmName::WarrenSameNode => Side::SameNode,
                    _ => Side::Plain,
                })?;
                Arm {
                    name,
                    client: way.client,
                    proxies: way.proxies,
                    keeper: Keeper::Lab(lab),
                }
            }
        });
    }
    Ok(arms)
}

fn direct(options: &Options) -> Result<Arm, Error> {
    let pair = Pair::new("direct")?;
    let server = server(&pair.server.path(), &options.work.join("direct-server.log"))?;
    Ok(Arm {
        name: ArmName::Direct,
        client: pair.client.path(),
        proxies: Vec::new(),
        keeper: Keeper::Direct {
            _server: server,
            _pair: pair,
        },
    })
}

fn envoy(options: &Options) -> Result<Arm, Error> {
    let pair = Pair::new("envoy")?;
    let server = server(&pair.server.path(), &options.work.join("envoy-server.log"))?;
    let envoys = Envoys::start(&pair, TARGET, options)?;
    Ok(Arm {
        name: ArmName::Envoy,
        client: pair.client.path(),
        proxies: envoys.pids().map(|pid| vec![pid]).to_vec(),
        keeper: Keeper::Envoy {
            envoys,
            _server: server,
            _pair: pair,
        },
    })
}

fn server(netns: &Path, log: &Path) -> Result<Process, Error> {
    let this = std::env::current_exe().map_err(io("find this program"))?;
    let mut command = in_namespace(netns, SECOND_CORE, &this);
    Process::spawn(
        command
            .args(["serve", "--listen"])
            .arg(format!("0.0.0.0:{PORT}")),
        log,
    )
}

/// The client's and the first proxy's.
pub(super) const FIRST_CORE: u32 = 0;
/// The second proxy's and the server's.
pub(super) const SECOND_CORE: u32 = 1;
/// The server's, in every arm.
pub(super) const PORT: u16 = 8080;
/// How many routes HTTP is measured with.
pub(super) const ROUTES: [usize; 3] = [0, 1, 100];
const TARGET: SocketAddr = SocketAddr::new(IpAddr::V4(Pair::SERVER), PORT);
