//! The directory as a provider: what is in force, through all mistakes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{
    Document, Mistake, Object, ObjectKey, Parsed, drop_duplicates, manifest_files, parse_file,
};
use crate::providers::Objects;
use crate::watch::Changes;

/// Reads a directory again and again, and keeps the last good version of documents that are mistaken now.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    files: HashMap<PathBuf, (Stamp, Parsed)>,
    in_force: BTreeMap<ObjectKey, Document>,
    mistakes: Vec<Mistake>,
}

/// What tells that a file is another than before: modification time, size, inode.
type Stamp = (i64, i64, u64, u64);

impl Reader {
    /// Nothing is read yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            files: HashMap::new(),
            in_force: BTreeMap::new(),
            mistakes: Vec::new(),
        }
    }

    /// Everything that is wrong now.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.mistakes
    }

    /// Reads what changed and returns everything that is in force. Fails, and changes nothing, if the
    /// directory cannot be listed.
    pub fn read(&mut self, changes: &Changes) -> std::io::Result<Objects> {
        let paths = manifest_files(&self.dir)?;
        let mut all = Parsed::default();
        let mut files = HashMap::new();
        for path in paths {
            let stamp = stamp(&path);
            let touched = match changes {
                Changes::Paths(touched) => touched.contains(&path),
                Changes::Unknown => false,
            };
            let parsed = match self.files.remove(&path) {
                Some((known, parsed)) if Some(known) == stamp && !touched => parsed,
                _ => parse_file(&path),
            };
            all.documents.extend(parsed.documents.iter().cloned());
            all.mistakes.extend(parsed.mistakes.iter().cloned());
            if let Some(stamp) = stamp {
                files.insert(path, (stamp, parsed));
            }
        }
        self.files = files;
        drop_duplicates(&mut all);
        self.tell(&all.mistakes);
        self.in_force = self.judge(all.documents, &all.mistakes);
        self.mistakes = all.mistakes;
        Ok(objects(self.in_force.values().map(|d| &d.object)))
    }

    /// The good documents, and the last good version of those that cannot be used.
    fn judge(&self, good: Vec<Document>, mistakes: &[Mistake]) -> BTreeMap<ObjectKey, Document> {
        let named: HashSet<&ObjectKey> =
            mistakes.iter().filter_map(|m| m.object.as_ref()).collect();
        // A document that does not even tell what it describes may be any of its file.
        let unnamed: HashSet<&Path> = mistakes
            .iter()
            .filter(|m| m.object.as_ref().is_none_or(|o| o.name.is_empty()))
            .map(|m| m.file.as_path())
            .collect();
        let kept = self
            .in_force
            .iter()
            .filter(|(key, document)| named.contains(key) || unnamed.contains(&*document.file));
        let mut in_force: BTreeMap<ObjectKey, Document> = kept
            .map(|(key, document)| (key.clone(), document.clone()))
            .collect();
        in_force.extend(good.into_iter().map(|d| (d.object.key(), d)));
        in_force
    }

    fn tell(&self, mistakes: &[Mistake]) {
        for mistake in mistakes.iter().filter(|m| !self.mistakes.contains(m)) {
            tracing::warn!("{mistake}");
        }
        if mistakes.is_empty() && !self.mistakes.is_empty() {
            tracing::info!("all mistakes in {} are repaired", self.dir.display());
        }
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.mtime(), meta.mtime_nsec(), meta.size(), meta.ino()))
}

fn objects<'a>(all: impl Iterator<Item = &'a Object>) -> Objects {
    let mut objects = Objects::default();
    for object in all {
        let mut object = object.clone();
        if let Object::Pod(pod) = &mut object
            && pod.metadata.uid.as_deref().unwrap_or_default().is_empty()
        {
            let metadata = &mut Arc::make_mut(pod).metadata;
            let text = |name: &Option<String>| name.clone().unwrap_or_default();
            metadata.uid = Some(uid(&text(&metadata.namespace), &text(&metadata.name)));
        }
        objects.insert(object);
    }
    objects
}

/// The UID of a pod whose manifest, unlike every pod in Kubernetes, has none.
fn uid(namespace: &str, name: &str) -> String {
    let digest = Sha256::digest(format!("{namespace}/{name}"));
    let hex: String = digest[..16].iter().map(|b| format!("{b:02x}")).collect();
    let (a, b, c, d, e) = (
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    );
    format!("{a}-{b}-{c}-{d}-{e}")
}
