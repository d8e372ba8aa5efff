//! Loading of a process's one configuration file, which is the same on every node, with what differs from node to
//! node taken from the environment.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_norway::{Mapping, Value};

/// A configuration type: defaults from `Default`, checked as a whole.
pub trait Config: DeserializeOwned + Default {
    /// Every mistake as `field: what was expected`, not only the first.
    fn mistakes(&self) -> Vec<String>;
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// File name.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not YAML, or a field of the wrong type or with an unknown name.
    #[error("configuration {path}: {field}: {message}")]
    Parse {
        /// File name.
        path: String,
        /// Path of the field.
        field: String,
        /// What was expected.
        message: String,
    },
    /// Values out of range; all of them.
    #[error("configuration {path}: {}", mistakes.join("; "))]
    Invalid {
        /// File name.
        path: String,
        /// One line each.
        mistakes: Vec<String>,
    },
}

/// Reads and checks a YAML file. An empty file means all defaults. `WARREN_NODE` and `WARREN_NODE_ADDRESSES`
/// (comma-separated), where set, are the fields `node` and `nodeAddresses` and win over the file's.
pub fn load<C: Config>(path: &Path) -> Result<C, ConfigError> {
    load_in(path, |variable| std::env::var(variable).ok())
}

fn load_in<C: Config>(
    path: &Path,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<C, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: name.clone(),
        source,
    })?;
    let document = serde_norway::Deserializer::from_str(&text);
    let node = node_fields(environment);
    let config = if node.is_empty() && text.trim().is_empty() {
        Ok(C::default())
    } else if node.is_empty() {
        serde_path_to_error::deserialize(document)
    } else {
        serde_path_to_error::deserialize(document).and_then(|file: Option<Mapping>| {
            let mut fields = file.unwrap_or_default();
            fields.extend(node);
            serde_path_to_error::deserialize(Value::Mapping(fields))
        })
    };
    let config: C = config.map_err(|e| ConfigError::Parse {
        path: name.clone(),
        field: e.path().to_string(),
        message: e.inner().to_string(),
    })?;
    let mistakes = config.mistakes();
    if !mistakes.is_empty() {
        return Err(ConfigError::Invalid {
            path: name,
            mistakes,
        });
    }
    Ok(config)
}

fn node_fields(environment: impl Fn(&str) -> Option<String>) -> Mapping {
    let value = |variable| environment(variable).filter(|value| !value.is_empty());
    let mut fields = Mapping::new();
    if let Some(node) = value("WARREN_NODE") {
        fields.insert("node".into(), node.into());
    }
    if let Some(addresses) = value("WARREN_NODE_ADDRESSES") {
        let addresses: Vec<Value> = addresses.split(',').map(|a| a.trim().into()).collect();
        fields.insert("nodeAddresses".into(), addresses.into());
    }
    fields
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
    struct Sample {
        node: String,
        node_addresses: Vec<std::net::IpAddr>,
        log: String,
    }

    impl Config for Sample {
        fn mistakes(&self) -> Vec<String> {
            match self.node.is_empty() {
                true => vec!["node: the node's name is expected".into()],
                false => Vec::new(),
            }
        }
    }

    fn load_sample(text: &str, variables: &[(&str, &str)]) -> Result<Sample, String> {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("a written file");
        let variable = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(found.1.to_owned())
        };
        load_in(file.path(), variable).map_err(|e| e.to_string())
    }

    #[test]
    fn what_differs_from_node_to_node_comes_from_the_environment() {
        let node = [
            ("WARREN_NODE", "node-7"),
            ("WARREN_NODE_ADDRESSES", "10.0.0.7,fd00::7"),
        ];
        let sample = load_sample("node: other\nlog: debug\n", &node).expect("a configuration");
        assert_eq!(sample.node, "node-7");
        assert_eq!(
            sample.node_addresses,
            ["10.0.0.7", "fd00::7"].map(|a| a.parse::<std::net::IpAddr>().expect("an address"))
        );
        assert_eq!(sample.log, "debug");
        // An empty file, and variables that are set to nothing.
        assert_eq!(load_sample("", &node).map(|s| s.node), Ok("node-7".into()));
        let empty = load_sample("node: of the file", &[("WARREN_NODE", "")]);
        assert_eq!(empty.map(|s| s.node), Ok("of the file".into()));
    }

    #[test]
    fn mistakes_name_their_field_either_way() {
        let address = [("WARREN_NODE", "n"), ("WARREN_NODE_ADDRESSES", "here")];
        let error = load_sample("log: x", &address).expect_err("no address");
        assert!(error.contains("nodeAddresses[0]"), "{error}");
        let error = load_sample("nod: x", &[("WARREN_NODE", "n")]).expect_err("a wrong field");
        assert!(error.contains("unknown field `nod`"), "{error}");
        let error = load_sample("", &[]).expect_err("no node");
        assert!(error.contains("node: the node's name"), "{error}");
    }
}
