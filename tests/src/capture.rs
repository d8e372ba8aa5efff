//! Records what crosses a node's link and looks into it: which flows there were, and whether a TCP
//! flow is TLS 1.3 and nothing else.
//!
//! Formats: the pcap file format (draft-ietf-opsawg-pcap), RFC 8446 sections 4.1.3, 4.2.1 and 5.1.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::lab::{Node, in_namespace};
use crate::process::{Background, run};
use crate::scenario::Scenario;
use crate::wait::wait_until;

/// A running `tcpdump` on the link between nodes.
#[derive(Debug)]
pub struct Capture {
    process: Background,
    file: PathBuf,
}

impl Capture {
    /// Starts recording on the interface that has the node's address.
    #[track_caller]
    pub fn start(s: &Scenario, node: &Node) -> Self {
        let file = s.fresh_path("link.pcap");
        let interface = link(node);
        let mut command = in_namespace(&node.netns, "tcpdump");
        command
            .args([
                "-i",
                &interface,
                "-B",
                "65536", // KiB; the default loses packets of a burst
                "-U",
                "--immediate-mode",
                "-s",
                "0",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file);
        let process = Background::start(&mut command);
        wait_until("tcpdump to listen", Duration::from_secs(10), || {
            let said = process.stderr();
            if said.contains("listening on") {
                Ok(())
            } else {
                Err(said)
            }
        });
        Self { process, file }
    }

    /// Ends the recording and reads it.
    #[track_caller]
    pub fn stop(self) -> Recording {
        // tcpdump writes what it has on SIGINT.
        self.process.signal(Signal::SIGINT);
        let done = self.process.finish(Duration::from_secs(10));
        assert!(
            done.stderr.contains("0 packets dropped by kernel"),
            "packets were missed: {done}"
        );
        let bytes =
            std::fs::read(&self.file).unwrap_or_else(|e| panic!("{}: {e}", self.file.display()));
        Recording::read(bytes).unwrap_or_else(|e| panic!("{}: {e}", self.file.display()))
    }
}

#[track_caller]
fn link(node: &Node) -> String {
    let mut command = in_namespace(&node.netns, "ip");
    let done = run(
        command.args(["-o", "addr", "show"]),
        Duration::from_secs(10),
    )
    .expect_ok();
    let wanted = format!(" {}/", node.address);
    let line = done.stdout.lines().find(|l| l.contains(&wanted));
    let line = line.unwrap_or_else(|| {
        panic!(
            "{} has no interface with {}: {done}",
            node.name, node.address
        )
    });
    // 2: eth0    inet 10.201.0.11/24 ...
    line.split_whitespace()
        .nth(1)
        .expect("ip -o names the interface")
        .to_owned()
}

/// A direction of a TCP connection.
pub type Direction = (SocketAddr, SocketAddr);

/// What was recorded.
#[derive(Debug, Default)]
pub struct Recording {
    bytes: Vec<u8>,
    /// Payload of each direction, in order of its sequence numbers.
    pub tcp: BTreeMap<Direction, Vec<u8>>,
    /// Other packets between IP addresses: protocol number, source, destination.
    pub other_ip: Vec<(u8, IpAddr, IpAddr)>,
    /// Ethernet types other than IPv4, IPv6 and ARP.
    pub other_ethernet: Vec<u16>,
    /// How many packets there were.
    pub packets: usize,
}

impl Recording {
    /// Whether a byte string appears anywhere, also split over packets of a TCP flow.
    pub fn contains(&self, marker: &[u8]) -> bool {
        let within = |hay: &[u8]| hay.windows(marker.len()).any(|w| w == marker);
        within(&self.bytes) || self.tcp.values().any(|payload| within(payload))
    }

    fn read(bytes: Vec<u8>) -> Result<Self, String> {
        let header: [u8; 24] = take(&bytes, 0, 24)
            .and_then(|b| b.try_into().ok())
            .ok_or("no pcap header")?;
        if header[..4] != 0xa1b2_c3d4_u32.to_ne_bytes() || header[20] != 1 {
            return Err("not a pcap file of an Ethernet link".into());
        }
        let mut recording = Self::default();
        let mut segments = BTreeMap::new();
        let mut at = 24;
        while at < bytes.len() {
            let length = take(&bytes, at + 8, 4)
                .and_then(|b| b.try_into().ok())
                .map(u32::from_ne_bytes);
            let length = length.ok_or("a truncated record")? as usize;
            let frame = take(&bytes, at + 16, length).ok_or("a truncated packet")?;
            recording.packets += 1;
            recording.frame(frame, &mut segments);
            at += 16 + length;
        }
        for (direction, segments) in segments {
            recording.tcp.insert(direction, reassemble(segments));
        }
        recording.bytes = bytes;
        Ok(recording)
    }

    fn frame(&mut self, frame: &[u8], segments: &mut BTreeMap<Direction, Vec<Segment>>) {
        let Some(kind) = be16(frame, 12) else { return };
        let packet = &frame[14..];
        let parsed = match kind {
            0x0800 => ipv4(packet),
            0x86dd => ipv6(packet),
            0x0806 => return,
            other => return self.other_ethernet.push(other),
        };
        let Some((protocol, source, destination, payload)) = parsed else {
            return self.other_ethernet.push(kind);
        };
        if protocol != 6 {
            return self.other_ip.push((protocol, source, destination));
        }
        let Some(segment) = tcp(payload) else {
            return self.other_ip.push((6, source, destination));
        };
        let (from, to, segment) = segment;
        let direction = (
            SocketAddr::new(source, from),
            SocketAddr::new(destination, to),
        );
        segments.entry(direction).or_default().push(segment);
    }
}

struct Segment {
    sequence: u32,
    syn: bool,
    payload: Vec<u8>,
}

fn ipv4(packet: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let total = usize::from(be16(packet, 2)?);
    let address = |at| {
        Some(IpAddr::from(Ipv4Addr::from(
            <[u8; 4]>::try_from(take(packet, at, 4)?).ok()?,
        )))
    };
    Some((
        *packet.get(9)?,
        address(12)?,
        address(16)?,
        packet.get(header..total.min(packet.len()))?,
    ))
}

fn ipv6(packet: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    let length = usize::from(be16(packet, 4)?);
    let address = |at| {
        Some(IpAddr::from(Ipv6Addr::from(
            <[u8; 16]>::try_from(take(packet, at, 16)?).ok()?,
        )))
    };
    let end = (40 + length).min(packet.len());
    let (mut next, mut start) = (*packet.get(6)?, 40);
    // Hop-by-hop options, as multicast listener reports have them.
    if next == 0 {
        next = *packet.get(start)?;
        start += 8 + usize::from(*packet.get(start + 1)?) * 8;
    }
    Some((next, address(8)?, address(24)?, packet.get(start..end)?))
}

fn tcp(packet: &[u8]) -> Option<(u16, u16, Segment)> {
    let header = usize::from(packet.get(12)? >> 4) * 4;
    let sequence = u32::from_be_bytes(take(packet, 4, 4)?.try_into().ok()?);
    let syn = packet.get(13)? & 2 != 0;
    let payload = packet.get(header..)?.to_vec();
    Some((
        be16(packet, 0)?,
        be16(packet, 2)?,
        Segment {
            sequence,
            syn,
            payload,
        },
    ))
}

/// Orders segments and drops what was sent twice. A port that was used again begins anew at its SYN.
fn reassemble(segments: Vec<Segment>) -> Vec<u8> {
    let mut flows: Vec<Vec<Segment>> = Vec::new();
    for segment in segments {
        let again = segment.syn
            && flows
                .last()
                .is_some_and(|f| f.iter().all(|s| s.sequence != segment.sequence));
        if flows.is_empty() || again {
            flows.push(Vec::new());
        }
        if let Some(flow) = flows.last_mut() {
            flow.push(segment);
        }
    }
    let mut stream = Vec::new();
    for flow in flows {
        let Some(first) = flow.first().map(|s| s.sequence.wrapping_add(s.syn.into())) else {
            continue;
        };
        let mut parts: Vec<(u32, &[u8])> = flow
            .iter()
            .map(|s| {
                (
                    s.sequence.wrapping_add(s.syn.into()).wrapping_sub(first),
                    &s.payload[..],
                )
            })
            .collect();
        parts.sort_by_key(|(offset, _)| *offset);
        let mut at = 0;
        for (offset, payload) in parts {
            let known = at as usize - (offset as usize).min(at as usize);
            if let Some(new) = payload.get(known..) {
                stream.extend_from_slice(new);
                at = at.max(offset.saturating_add(payload.len() as u32));
            }
        }
    }
    stream
}

/// What a direction of a TLS connection shows in clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Versions of `supported_versions`: all the client offers, or the one the server chose.
    pub versions: Vec<u16>,
    /// The hello was the server's.
    pub server: bool,
    /// Server name in a client's hello.
    pub server_name: Option<String>,
    /// Records of application data (everything after the hellos, encrypted).
    pub encrypted: usize,
}

/// Reads a direction as TLS records. Fails on anything that is not TLS, is not encrypted and should be,
/// or does not begin with a hello.
pub fn tls(stream: &[u8]) -> Result<Tls, String> {
    let mut found: Option<Tls> = None;
    let mut at = 0;
    while at < stream.len() {
        let (Some(kind), Some(version), Some(length)) =
            (stream.get(at), be16(stream, at + 1), be16(stream, at + 3))
        else {
            break; // the recording ended inside a record
        };
        if !(0x0301..=0x0303).contains(&version) || length > 16640 {
            return Err(format!(
                "byte {at} does not begin a TLS record: {:02x?}",
                &stream[at..stream.len().min(at + 8)]
            ));
        }
        let body = stream.get(at + 5..at + 5 + usize::from(length));
        match (kind, &mut found) {
            (22, None) => found = Some(hello(body.ok_or("a truncated hello")?)?),
            (22, Some(_)) => {
                return Err(format!(
                    "a handshake record in clear at byte {at}: not TLS 1.3"
                ));
            }
            // change_cipher_spec: a leftover of middlebox compatibility.
            (20, Some(_)) => {}
            (23, Some(tls)) => tls.encrypted += 1,
            (21, _) => {}
            (kind, _) => return Err(format!("a record of type {kind} at byte {at}")),
        }
        at += 5 + usize::from(length);
    }
    found.ok_or_else(|| "no hello".into())
}

fn hello(body: &[u8]) -> Result<Tls, String> {
    let malformed = || "a malformed hello".to_owned();
    let server = match body.first() {
        Some(1) => false,
        Some(2) => true,
        other => return Err(format!("a handshake that begins with message {other:?}")),
    };
    // message header 4, legacy_version 2, random 32, session id
    let session = usize::from(*body.get(38).ok_or_else(malformed)?);
    let mut at = 39 + session;
    if server {
        at += 3; // cipher suite, compression
    } else {
        at += 2 + usize::from(be16(body, at).ok_or_else(malformed)?);
        at += 1 + usize::from(*body.get(at).ok_or_else(malformed)?);
    }
    at += 2; // length of the extensions
    let mut tls = Tls {
        versions: Vec::new(),
        server,
        server_name: None,
        encrypted: 0,
    };
    while let (Some(kind), Some(length)) = (be16(body, at), be16(body, at + 2)) {
        let data = take(body, at + 4, length.into()).ok_or_else(malformed)?;
        match kind {
            43 => {
                let list = if server {
                    data
                } else {
                    data.get(1..).ok_or_else(malformed)?
                };
                tls.versions = list
                    .chunks_exact(2)
                    .map(|v| u16::from_be_bytes([v[0], v[1]]))
                    .collect();
            }
            0 => {
                tls.server_name = data
                    .get(5..)
                    .map(|n| String::from_utf8_lossy(n).into_owned())
            }
            _ => {}
        }
        at += 4 + usize::from(length);
    }
    Ok(tls)
}

fn take(bytes: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    bytes.get(at..at.checked_add(length)?)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(take(bytes, at, 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(sequence: u32, syn: bool, payload: &[u8]) -> Segment {
        Segment {
            sequence,
            syn,
            payload: payload.to_vec(),
        }
    }

    #[test]
    fn segments_out_of_order_and_twice() {
        let flow = vec![
            segment(9, true, b""),
            segment(13, false, b"def"),
            segment(10, false, b"abc"),
            segment(10, false, b"abcd"),
            segment(16, false, b"g"),
        ];
        assert_eq!(reassemble(flow), b"abcdefg");
    }

    #[test]
    fn plaintext_is_not_tls() {
        assert!(tls(b"GET / HTTP/1.1\r\n\r\n").is_err());
        assert!(tls(b"").is_err());
        // Two handshake records in clear: TLS 1.2, or a hello retry, which tunnels never need.
        let mut hello = vec![22, 3, 3, 0, 46, 2, 0, 0, 42, 3, 3];
        hello.extend([0; 32]);
        hello.extend([0, 0x13, 0x02, 0, 0, 0, 0, 0]);
        assert!(tls(&hello).is_ok());
        let twice = [hello.clone(), hello].concat();
        assert!(tls(&twice).is_err());
    }
}
