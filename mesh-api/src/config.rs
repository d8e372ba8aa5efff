//! Loading of a process's one configuration file.

use std::path::Path;

use serde::de::DeserializeOwned;

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

/// Reads and checks a YAML file. An empty file means all defaults.
pub fn load<C: Config>(path: &Path) -> Result<C, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: name.clone(),
        source,
    })?;
    let config: C = if text.trim().is_empty() {
        C::default()
    } else {
        let document = serde_norway::Deserializer::from_str(&text);
        serde_path_to_error::deserialize(document).map_err(|e| ConfigError::Parse {
            path: name.clone(),
            field: e.path().to_string(),
            message: e.inner().to_string(),
        })?
    };
    let mistakes = config.mistakes();
    if !mistakes.is_empty() {
        return Err(ConfigError::Invalid {
            path: name,
            mistakes,
        });
    }
    Ok(config)
}
