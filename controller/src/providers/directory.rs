//! A directory of ordinary Kubernetes manifests, YAML or JSON.
//!
//! What: reads every `*.yaml`, `*.yml` and `*.json` below a directory into typed objects. The kinds Warren
//! uses are `Namespace`, `ServiceAccount`, `Node`, `Pod`, `Service` (v1), `Deployment` (apps/v1),
//! `EndpointSlice` (discovery.k8s.io/v1), the routes and `XBackendTrafficPolicy` of the Gateway API, and
//! Warren's own `TrafficPolicy`; `List` is unpacked; other kinds are skipped.
//!
//! Invariants: a mistake costs its own document and nothing else, and all mistakes of all documents are
//! reported at once, each with file, line, object and field. Files are read in the order of their
//! paths; the first of two documents that describe the same object wins and the other is a mistake.

mod locate;
mod parse;
mod reader;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use parse::parse_text;
pub use reader::Reader;

pub use super::object::{Object, ObjectKey};

/// One manifest of a file, read and checked.
#[derive(Clone, Debug)]
pub struct Document {
    /// The typed object, as written; only a missing namespace of a namespaced kind became `default`.
    pub object: Object,
    /// The file it is in.
    pub file: Arc<Path>,
    /// The line it starts at, from 1.
    pub line: usize,
}

/// What is wrong with a document, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 when the whole file is meant.
    pub line: usize,
    /// The object, as far as the document names one.
    pub object: Option<ObjectKey>,
    /// Path of the field, such as `spec.ports[0].port`; empty for the whole document.
    pub field: String,
    /// What was expected.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// What came of reading files.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// The good documents, in the order of files and lines.
    pub documents: Vec<Document>,
    /// Everything that is wrong with the others.
    pub mistakes: Vec<Mistake>,
}

/// Reads all documents of one file. A file that cannot be read is a mistake of line 0.
pub fn parse_file(path: &Path) -> Parsed {
    match std::fs::read_to_string(path) {
        Ok(text) => parse_text(path, &text),
        Err(error) => Parsed {
            documents: Vec::new(),
            mistakes: vec![Mistake {
                file: path.to_owned(),
                line: 0,
                object: None,
                field: String::new(),
                message: format!("cannot be read: {error}"),
            }],
        },
    }
}

/// Reads all manifests below a directory. Fails only if the directory itself cannot be listed.
pub fn load_dir(dir: &Path) -> std::io::Result<Parsed> {
    let mut all = Parsed::default();
    for file in manifest_files(dir)? {
        let parsed = parse_file(&file);
        all.documents.extend(parsed.documents);
        all.mistakes.extend(parsed.mistakes);
    }
    drop_duplicates(&mut all);
    Ok(all)
}

/// The manifests below `dir` in the order of their paths. Names that start with a dot are skipped:
/// editors and atomic replacements put unfinished files there.
pub fn manifest_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut pending = vec![(dir.to_owned(), 0)];
    while let Some((dir, depth)) = pending.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            // Removed between listing and reading: its files are gone too.
            Err(e) if depth > 0 && e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for entry in entries {
            let path = entry?.path();
            let hidden = path
                .file_name()
                .is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
            if hidden {
                continue;
            }
            // Follows links: mounted ConfigMaps are made of them. The depth bounds loops.
            match std::fs::metadata(&path) {
                Ok(meta) if meta.is_dir() && depth < MAX_DEPTH => pending.push((path, depth + 1)),
                Ok(meta) if meta.is_file() && is_manifest(&path) => files.push(path),
                Ok(_) => {}
                // A dangling link or a file removed meanwhile is no manifest.
                Err(_) => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Removes all but the first document of each object and reports the others.
fn drop_duplicates(parsed: &mut Parsed) {
    let mut first: HashMap<ObjectKey, (Arc<Path>, usize)> = HashMap::new();
    let mistakes = &mut parsed.mistakes;
    parsed.documents.retain(|document| {
        let key = document.object.key();
        match first.get(&key) {
            None => {
                first.insert(key, (document.file.clone(), document.line));
                true
            }
            Some((file, line)) => {
                mistakes.push(Mistake {
                    file: document.file.to_path_buf(),
                    line: document.line,
                    message: format!(
                        "is already described at {}:{line}, which stays in force; remove one of them",
                        file.display()
                    ),
                    object: Some(key),
                    field: String::new(),
                });
                false
            }
        }
    });
    mistakes.sort();
}

fn is_manifest(path: &Path) -> bool {
    path.extension()
        .and_then(|e| e.to_str())
        .is_some_and(|e| ["yaml", "yml", "json"].contains(&e))
}

/// How deep directories are followed.
const MAX_DEPTH: usize = 16;

#[cfg(test)]
mod tests;
