//! The previous result: read for its addresses, passed on byte for byte.
//!
//! Only when a runtime hands over a result of another version than the configuration's is it
//! rewritten, and then only in what differs: `ips[].version` exists before 1.0.0 and not since.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

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
    #[derive(Deserialize)]
    struct OnlyVersion {
        #[serde(rename = "cniVersion", default)]
        version: String,
    }
    let has: OnlyVersion = serde_json::from_str(previous.get()).map_err(malformed)?;
    if has.version == version {
        return Ok(previous.get().to_owned());
    }
    let mut result: Value = serde_json::from_str(previous.get()).map_err(malformed)?;
    result["cniVersion"] = version.into();
    for ip in result["ips"].as_array_mut().into_iter().flatten() {
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
    Ok(result.to_string())
}

fn malformed(why: impl std::fmt::Display) -> CniError {
    CniError::new(Code::Decode, "prevResult cannot be read", why)
}
