//! The previous result: read for its addresses, passed on byte for byte.
//!
//! Only when a runtime hands over a result of another version than the configuration's is it
//! rewritten, and then only in what differs: `ips[].version` exists before 1.0.0 and not since.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{CniError, Code};

/// The addresses of the pod's own interfaces.
pub(super) fn addresses(previous: &RawValue) -> Result<Vec<IpAddr>, CniError> {
    #[derive(Deserialize)]
    struct PreviousResult {
        #[serde(default)]
        ips: Vec<Ip>,
        #[serde(default)]
        interfaces: Vec<Interface>,
    }
    #[derive(Deserialize)]
    struct Ip {
        address: String,
        interface: Option<usize>,
    }
    #[derive(Deserialize)]
    struct Interface {
        #[serde(default)]
        sandbox: String,
    }
    let result: PreviousResult = serde_json::from_str(previous.get()).map_err(malformed)?;
    let in_pod = |ip: &&Ip| {
        let interface = ip.interface.and_then(|index| result.interfaces.get(index));
        interface.is_none_or(|interface| !interface.sandbox.is_empty())
    };
    (result.ips.iter().filter(in_pod))
        .map(|ip| {
            let address = ip.address.split('/').next().unwrap_or_default();
            address
                .parse()
                .map_err(|_| malformed(format!("{:?} is no address", ip.address)))
        })
        .collect()
}

/// The result in the version that the configuration asks for.
pub(super) fn in_version(previous: &RawValue, version: &str) -> Result<String, CniError> {
    let mut result: Map<String, Value> = serde_json::from_str(previous.get()).map_err(malformed)?;
    if result.get("cniVersion").and_then(Value::as_str) == Some(version) {
        return Ok(previous.get().to_owned());
    }
    result.insert("cniVersion".into(), version.into());
    let ips = result.get_mut("ips").and_then(Value::as_array_mut);
    for ip in ips.into_iter().flatten() {
        let Some(ip) = ip.as_object_mut() else {
            continue;
        };
        if version.starts_with("0.") {
            let six = (ip.get("address").and_then(Value::as_str)).is_some_and(|a| a.contains(':'));
            ip.insert("version".into(), if six { "6" } else { "4" }.into());
        } else {
            ip.shift_remove("version");
        }
    }
    Ok(Value::Object(result).to_string())
}

fn malformed(why: impl std::fmt::Display) -> CniError {
    CniError::new(Code::Decode, "prevResult cannot be read", why)
}
