//! Network namespaces: making them, doing something inside one, and HTTP from there.
//!
//! A socket belongs to the namespace it was made in, for good. So the daemon's only thread enters a
//! namespace just long enough to make a socket, never across an `.await`.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;

use super::names::{NETNS, netns_path};
use crate::error::{Context, Error, Result};

/// Does something synchronous inside a network namespace.
pub(crate) fn within<T>(netns: &Path, act: impl FnOnce() -> T) -> io::Result<T> {
    let home = File::open("/proc/thread-self/ns/net")?;
    let there = File::open(netns)?;
    setns(&there, CloneFlags::CLONE_NEWNET)?;
    let done = act();
    if let Err(e) = setns(&home, CloneFlags::CLONE_NEWNET) {
        // Going on would do to one namespace what is meant for another.
        eprintln!("warren lab: cannot return from {}: {e}", netns.display());
        std::process::abort();
    }
    Ok(done)
}

/// Makes a named namespace with its loopback up. One of that name that exists is an error.
///
/// Interfaces that come do not look for others with their IPv6 addresses: there are none, and until they had
/// looked, a second or two, the first connection would wait.
pub(crate) async fn create(name: &str) -> Result<PathBuf> {
    ip(&["netns", "add", name]).await?;
    let path = netns_path(name);
    let quiet = || {
        std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?;
        std::fs::write("/proc/sys/net/ipv6/conf/all/accept_dad", "0")
    };
    within(&path, quiet)
        .and_then(|done| done)
        .context(format!("sysctls of {name}"))?;
    ip(&["-n", name, "link", "set", "lo", "up"]).await?;
    let netns = netns_path(name);
    // A host that prefers BBR hands it down, and BBR paces flows over veth to a fraction of what they do.
    within(&netns, || {
        std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno")
    })
    .and_then(|done| done)
    .context(format!("congestion control of {name}"))?;
    Ok(netns)
}

/// Removes a named namespace; what is in it must have ended. One that is gone is no error.
pub(crate) async fn delete(name: &str) -> Result<()> {
    if !netns_path(name).exists() {
        return Ok(());
    }
    ip(&["netns", "del", name]).await
}

/// Named namespaces that start so.
pub(crate) fn list(prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(NETNS).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

/// Runs `ip`.
pub(crate) async fn ip(arguments: &[&str]) -> Result<()> {
    run_with_input("ip", arguments, "").await
}

/// Runs many `ip` commands in one process, with the same options for all.
pub(crate) async fn ip_batch(options: &[&str], lines: &[String]) -> Result<()> {
    let arguments: Vec<&str> = options.iter().copied().chain(["-batch", "-"]).collect();
    run_with_input("ip", &arguments, &lines.join("\n")).await
}

async fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let what = || format!("{program} {}", arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context(what())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.context(what())?;
    }
    let output = child.wait_with_output().await.context(what())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("{}: {}", what(), said.trim())))
}

/// Connects from inside a namespace.
pub(crate) async fn connect(netns: &Path, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = within(netns, || match to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    })??;
    socket.connect(to).await
}

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// `GET` from inside a namespace. `headers` are whole lines with their line ends.
pub(crate) async fn http_get(
    netns: &Path,
    to: SocketAddr,
    path: &str,
    headers: &str,
    limit: Duration,
) -> Result<Answer> {
    let get = async {
        let mut stream = connect(netns, to).await?;
        // 1.0, so that the body ends with the connection and is in one piece.
        let request = format!("GET {path} HTTP/1.0\r\n{headers}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let what = || format!("GET http://{to}{path}");
    let answer = match tokio::time::timeout(limit, get).await {
        Ok(answer) => answer.context(what())?,
        Err(_) => return Err(Error::new(format!("{}: no answer in {limit:?}", what()))),
    };
    parse_answer(&answer).ok_or_else(|| Error::new(format!("{}: not an HTTP answer", what())))
}

fn parse_answer(bytes: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.strip_prefix("HTTP/")?.split(' ').nth(1)?;
    Some(Answer {
        status: status.get(..3)?.parse().ok()?,
        body: body.to_owned(),
    })
}

/// `address:port` with brackets where they belong.
pub(crate) fn socket_address(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// More than any metrics page of a mesh that a lab can hold.
const MAX_ANSWER: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let answer = parse_answer(b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\nx\r\n\r\ny").unwrap();
        assert_eq!((answer.status, &*answer.body), (204, "x\r\n\r\ny"));
        assert_eq!(parse_answer(b"HTTP/1.0 200\r\n\r\n").unwrap().status, 200);
        assert!(parse_answer(b"SSH-2.0-x\r\n").is_none());
        assert!(parse_answer(b"HTTP/1.1 2\r\n\r\n").is_none());
    }
}
