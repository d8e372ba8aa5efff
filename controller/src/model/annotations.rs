//! Warren's labels and annotations, read and judged.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;
use mesh_api::names::{
    ENROLLED_ANNOTATION, EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_CIDRS, EXCLUDE_OUTBOUND_PORTS,
    MESH_LABEL, MODE_LABEL, TUNNEL_ANNOTATION,
};
use mesh_api::proto::mesh::Mode;

use crate::enrolment::Recorded;

/// A label or annotation with a value that means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldMistake {
    /// Its key.
    pub key: &'static str,
    /// What was expected, and what is there.
    pub message: String,
}

impl fmt::Display for FieldMistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// Reads the value of the label `warren-mesh.io/mesh`.
pub fn mesh_label(value: &str) -> Result<bool, FieldMistake> {
    match value {
        "enabled" => Ok(true),
        "disabled" => Ok(false),
        other => Err(FieldMistake {
            key: MESH_LABEL,
            message: format!("expected enabled or disabled, found {other:?}"),
        }),
    }
}

/// Reads the value of the label `warren-mesh.io/mode`.
pub fn mode_label(value: &str) -> Result<Mode, FieldMistake> {
    match value {
        "permissive" => Ok(Mode::Permissive),
        "strict" => Ok(Mode::Strict),
        other => Err(FieldMistake {
            key: MODE_LABEL,
            message: format!("expected permissive or strict, found {other:?}"),
        }),
    }
}

/// Reads the annotation `warren-mesh.io/tunnel`: whether the pod terminates HBONE itself.
pub fn tunnel_annotation(annotations: &BTreeMap<String, String>) -> Result<bool, FieldMistake> {
    match annotations.get(TUNNEL_ANNOTATION).map(String::as_str) {
        None => Ok(false),
        Some("hbone") => Ok(true),
        Some(other) => Err(FieldMistake {
            key: TUNNEL_ANNOTATION,
            message: format!("expected hbone, found {other:?}"),
        }),
    }
}

/// Reads the annotation `warren-mesh.io/enrolled`, which the controller writes. A pod without has nothing
/// recorded.
pub(super) fn recorded(annotations: &BTreeMap<String, String>) -> Result<Recorded, FieldMistake> {
    let Some(text) = annotations.get(ENROLLED_ANNOTATION) else {
        return Ok(Recorded::default());
    };
    serde_json::from_str(text).map_err(|error| FieldMistake {
        key: ENROLLED_ANNOTATION,
        message: format!("expected what the controller writes: {error}"),
    })
}

/// What a pod keeps out of the mesh. Sorted, without repetitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Ports of the pod that callers reach in plaintext.
    pub inbound_ports: Vec<u16>,
    /// Destination ports it reaches in plaintext.
    pub outbound_ports: Vec<u16>,
    /// Destinations it reaches in plaintext.
    pub outbound_cidrs: Vec<IpNet>,
}

impl Exclusions {
    /// Reads a pod's annotations. A bad entry is reported and left out, the others count.
    pub fn read(annotations: &BTreeMap<String, String>) -> (Self, Vec<FieldMistake>) {
        let mut mistakes = Vec::new();
        let exclusions = Self {
            inbound_ports: list(annotations, EXCLUDE_INBOUND_PORTS, port, &mut mistakes),
            outbound_ports: list(annotations, EXCLUDE_OUTBOUND_PORTS, port, &mut mistakes),
            outbound_cidrs: list(annotations, EXCLUDE_OUTBOUND_CIDRS, cidr, &mut mistakes),
        };
        (exclusions, mistakes)
    }
}

fn list<T: Ord>(
    annotations: &BTreeMap<String, String>,
    key: &'static str,
    read: impl Fn(&str) -> Result<T, String>,
    mistakes: &mut Vec<FieldMistake>,
) -> Vec<T> {
    let text = annotations.get(key).map_or("", String::as_str).trim();
    if text.is_empty() {
        return Vec::new();
    }
    let mut values = Vec::new();
    for entry in text.split(',').map(str::trim) {
        match read(entry) {
            Ok(value) => values.push(value),
            Err(message) => mistakes.push(FieldMistake { key, message }),
        }
    }
    values.sort();
    values.dedup();
    if values.len() > MAX_ENTRIES {
        let found = values.len();
        mistakes.push(FieldMistake {
            key,
            message: format!("expected at most {MAX_ENTRIES} entries, found {found}"),
        });
        values.truncate(MAX_ENTRIES);
    }
    values
}

fn port(entry: &str) -> Result<u16, String> {
    entry
        .parse()
        .ok()
        .filter(|p| *p > 0)
        .ok_or_else(|| format!("expected ports from 1 to 65535, comma-separated; found {entry:?}"))
}

fn cidr(entry: &str) -> Result<IpNet, String> {
    let net = entry.parse::<IpNet>().ok();
    net.or_else(|| entry.parse::<std::net::IpAddr>().ok().map(IpNet::from))
        .map(|net| net.trunc())
        .ok_or_else(|| {
            format!("expected networks such as 10.0.0.0/8, comma-separated; found {entry:?}")
        })
}

/// Entries of one annotation that count. What a pod says must fit the packets of its node, with room: a pod
/// whose record does not would be no one's to serve.
const MAX_ENTRIES: usize = 128;
