//! The conversation with the agent: one packet there, one back, within a bound.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use mesh_api::names::address_to_bytes;
use mesh_api::proto::cni::{Add, Check, Del, Gc, Request, Response, request::Body};
use mesh_api::seqpacket::Connection;

use super::config::{Attachment, NetworkConfig, PodArgs};
use super::{CniError, Code};

pub(super) fn add(
    config: &NetworkConfig,
    attachment: &Attachment,
    pod: &PodArgs,
    addresses: Vec<IpAddr>,
) -> Result<(), CniError> {
    let netns = open_netns(attachment)?;
    let request = Add {
        container_id: attachment.container_id.clone(),
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        netns: attachment.netns.display().to_string(),
        ifname: attachment.ifname.clone(),
        addresses: addresses
            .into_iter()
            .map(|a| address_to_bytes(a).to_vec())
            .collect(),
    };
    let answer = exchange(config, Body::Add(request), Some(&netns)).map_err(|error| {
        CniError::new(
            Code::TryAgain,
            format!(
                "Warren's agent did not answer for pod {}/{}",
                pod.namespace, pod.name
            ),
            format!(
                "{}: {error}; is it running on this node?",
                config.socket.display()
            ),
        )
    })?;
    into_result(answer)
}

pub(super) fn del(config: &NetworkConfig, container: &str, uid: String) -> Result<(), CniError> {
    let request = Del {
        container_id: container.to_owned(),
        uid,
    };
    exchange(config, Body::Del(request), None)
        .map_err(|error| absent(config, error))
        .and_then(into_result)
}

/// Succeeds while the agent is away: nothing is known to be wrong.
pub(super) fn check(
    config: &NetworkConfig,
    attachment: &Attachment,
    pod: &PodArgs,
) -> Result<(), CniError> {
    let netns = open_netns(attachment)?;
    let request = Check {
        container_id: attachment.container_id.clone(),
        uid: pod.uid.clone(),
    };
    match exchange(config, Body::Check(request), Some(&netns)) {
        Ok(answer) => into_result(answer),
        Err(error) => {
            eprintln!("warren-cni: CHECK: {}", absent(config, error));
            Ok(())
        }
    }
}

pub(super) fn gc(config: &NetworkConfig) -> Result<(), CniError> {
    let request = Gc {
        valid_container_ids: config.valid_containers.clone(),
    };
    exchange(config, Body::Gc(request), None)
        .map_err(|error| absent(config, error))
        .and_then(into_result)
}

fn open_netns(attachment: &Attachment) -> Result<File, CniError> {
    File::open(&attachment.netns).map_err(|e| {
        CniError::new(
            Code::Io,
            format!(
                "network namespace {} cannot be opened",
                attachment.netns.display()
            ),
            e,
        )
    })
}

fn absent(config: &NetworkConfig, error: std::io::Error) -> CniError {
    CniError::new(
        Code::TryAgain,
        "Warren's agent did not answer",
        format!("{}: {error}", config.socket.display()),
    )
}

fn into_result(answer: Response) -> Result<(), CniError> {
    match answer.code {
        0 => Ok(()),
        code => Err(CniError::from_agent(code, answer.message, answer.details)),
    }
}

fn exchange(config: &NetworkConfig, body: Body, netns: Option<&File>) -> std::io::Result<Response> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let conversation = async {
        let connection = Connection::connect(&config.socket)?;
        let descriptors: Vec<_> = netns.iter().map(|file| file.as_fd()).collect();
        let request = Request { body: Some(body) };
        connection.send(&request, &descriptors).await?;
        match connection.receive::<Response>().await? {
            Some((response, _)) => Ok(response),
            None => Err(std::io::Error::other(
                "it closed the connection without an answer",
            )),
        }
    };
    runtime.block_on(async {
        tokio::time::timeout(ANSWER_TIMEOUT, conversation)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    })
}

/// The agent bounds its own work to less; this is for an agent that hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
