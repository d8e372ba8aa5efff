//! `enrolled.json`: what must survive the controller so that a restart changes nothing for anyone.
//!
//! Written whole and replaced by rename; a reader sees the old or the new state.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Phase;

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stored {
    /// Nodes whose proxies took part.
    pub nodes: BTreeSet<String>,
    /// By UID.
    pub pods: BTreeMap<String, StoredPod>,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredPod {
    /// The node it is bound to.
    pub node: String,
    /// Recorded at CNI ADD.
    pub addresses: Vec<IpAddr>,
    /// How far it was.
    pub phase: Phase,
}

/// Why the state cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("enrolment state {path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is damaged.
    #[error(
        "enrolment state {path} cannot be read: {source}; restore it, or remove it to enrol all pods anew"
    )]
    Parse {
        /// File.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// Reads and writes the file, writes only what changed.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    written: Option<Stored>,
}

impl Store {
    /// Opens the state in `dir`, which is made if absent.
    pub fn open(dir: &Path) -> Result<(Self, Stored), StoreError> {
        let path = dir.join("enrolled.json");
        let io = |path: &Path, source| StoreError::Io {
            path: path.to_owned(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
        let stored: Stored = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|source| StoreError::Parse {
                path: path.clone(),
                source,
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Stored::default(),
            Err(e) => return Err(io(&path, e)),
        };
        let written = Some(stored.clone());
        Ok((Self { path, written }, stored))
    }

    /// Writes the state if it differs from what the file holds.
    pub fn write(&mut self, stored: Stored) -> Result<(), StoreError> {
        if self.written.as_ref() == Some(&stored) {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(&stored).map_err(|source| StoreError::Parse {
            path: self.path.clone(),
            source,
        })?;
        replace(&self.path, &text, 0o644).map_err(|source| StoreError::Io {
            path: self.path.clone(),
            source,
        })?;
        self.written = Some(stored);
        Ok(())
    }
}

/// Replaces a file by rename, so that no reader sees half of it.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_data()?;
    std::fs::rename(&temporary, path)
}
