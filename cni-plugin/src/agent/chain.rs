//! The plugin's place in the runtime's chain: the binary, and an entry in the network configuration that
//! the runtime uses, the first one by name.
//!
//! Other programs own those files and rewrite them when they like; inotify tells, and a look every
//! 10 seconds catches what it misses. Files are replaced by rename and keep mode and owner. Nobody
//! else's entry, field or order is changed. A symbolic link is followed. A single plugin's `.conf` becomes a `.conflist`; the
//! original is kept beside it and put back on removal.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use super::config::AgentConfig;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

type Stamp = (u64, u64, i64, i64);

/// Where the plugin is installed, and how its entry reads.
#[derive(Clone, Debug)]
pub struct Chain {
    conf_dir: PathBuf,
    bin_dir: PathBuf,
    entry: Value,
    /// The installed binary that was compared last, and found right: device, inode, change time.
    verified: Arc<Mutex<Option<Stamp>>>,
}

/// What [`Chain::ensure`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ensured {
    /// The entry is in this file.
    In(PathBuf),
    /// No program has written a network configuration yet.
    NoNetwork,
}

impl Chain {
    /// As the agent's configuration says.
    pub fn new(config: &AgentConfig) -> Self {
        Self {
            conf_dir: config.cni.conf_dir.clone(),
            bin_dir: config.cni.bin_dir.clone(),
            verified: Arc::default(),
            entry: json!({
                "type": PLUGIN,
                "socket": config.cni_socket,
                "logLevel": "info",
                "excludeNamespaces": config.exclude_namespaces,
            }),
        }
    }

    /// Puts binary and entry in place and keeps them there. Never ends. `problem`: told why they are not there.
    pub async fn keep(self, problem: watch::Sender<Option<String>>) {
        let changed = Arc::new(Notify::new());
        let notify = Arc::clone(&changed);
        // Reading a file is an event, too: acting on it would go round for ever.
        let changes = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                notify.notify_one();
            }
        };
        let mut watcher = notify::recommended_watcher(changes)
            .inspect_err(|error| {
                tracing::warn!(%error, "CNI: directories cannot be watched; looking every {INTERVAL:?}");
            })
            .ok();
        let mut last = None;
        loop {
            if let Some(watcher) = &mut watcher {
                // Before the look, so that no change falls between the two; and again each time: a
                // directory may have been replaced. What fails is said by the look.
                for directory in [&self.conf_dir, &self.bin_dir] {
                    let _ = fs::create_dir_all(directory);
                    let _ = watcher.watch(directory, RecursiveMode::NonRecursive);
                }
            }
            let chain = self.clone();
            let result = tokio::task::spawn_blocking(move || chain.ensure()).await;
            let in_place = match result {
                Ok(Ok(Ensured::In(file))) => Ok(format!("the plugin is in {}", file.display())),
                Ok(Ok(Ensured::NoNetwork)) => Err(format!(
                    "no network configuration in {} yet",
                    self.conf_dir.display()
                )),
                Ok(Err(error)) => Err(format!("the plugin cannot be installed: {error}")),
                Err(error) => Err(format!("the plugin cannot be installed: {error}")),
            };
            if last.as_ref() != Some(&in_place) {
                match &in_place {
                    Ok(text) => tracing::info!("CNI: {text}"),
                    Err(text) => tracing::warn!("CNI: {text}"),
                }
                problem.send_replace(in_place.clone().err());
                last = Some(in_place);
            }
            // Elapsed: look anyway.
            let _ = tokio::time::timeout(INTERVAL, changed.notified()).await;
        }
    }

    /// Puts binary and entry in place. Changes nothing that is right.
    pub fn ensure(&self) -> io::Result<Ensured> {
        for directory in [&self.bin_dir, &self.conf_dir] {
            fs::create_dir_all(directory).map_err(|e| at(directory, e))?;
        }
        // The binary first: the runtime must never be led to a plugin that is not there.
        self.install_binary()?;
        let Some((file, config)) = self.active()? else {
            return Ok(Ensured::NoNetwork);
        };
        if is_list(&file) {
            let mut list = config;
            if self.insert(&mut list) {
                replace(&file, &list, &file)?;
            }
            return Ok(Ensured::In(file));
        }
        let list_file = file.with_extension("conflist");
        let mut list = as_list(config);
        self.insert(&mut list);
        replace(&list_file, &list, &file)?;
        // It sorts before the list, so the runtime would go on using it.
        fs::rename(&file, saved(&file)).map_err(|e| at(&file, e))?;
        Ok(Ensured::In(list_file))
    }

    /// Removes entry and binary, and puts back what was converted.
    pub fn remove(&self) -> io::Result<()> {
        let files = config_files(&self.conf_dir)?;
        for file in files.into_iter().filter(|file| is_list(file)) {
            let Some(mut list) = read(&file) else {
                continue;
            };
            if !remove_entries(&mut list) {
                continue;
            }
            let original = CONVERTED.map(|extension| saved(&file.with_extension(extension)));
            match original.iter().find(|original| original.exists()) {
                Some(original) => {
                    let unchanged = read(original).map(as_list).as_ref() == Some(&list);
                    // Without the suffix: its name again.
                    let name = original.with_extension("");
                    if unchanged {
                        fs::rename(original, &name).map_err(|e| at(&name, e))?;
                        fs::remove_file(&file).map_err(|e| at(&file, e))?;
                    } else {
                        replace(&file, &list, &file)?;
                        fs::remove_file(original).map_err(|e| at(original, e))?;
                    }
                }
                None => replace(&file, &list, &file)?,
            }
        }
        // The entry is gone: nothing leads the runtime to the binary any more.
        let binary = self.bin_dir.join(PLUGIN);
        match fs::remove_file(&binary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(&binary, e)),
            _ => Ok(()),
        }
    }

    /// The configuration the runtime uses: the first by name that is one.
    fn active(&self) -> io::Result<Option<(PathBuf, Value)>> {
        let files = config_files(&self.conf_dir)?;
        Ok(files.into_iter().find_map(|file| {
            let config = read(&file)?;
            let usable = match is_list(&file) {
                true => config["plugins"]
                    .as_array()
                    .is_some_and(|list| !list.is_empty()),
                false => config["type"].is_string(),
            };
            if !usable {
                tracing::warn!(file = %file.display(), "CNI: skipped, not a network configuration");
            }
            usable.then_some((file, config))
        }))
    }

    /// True: the list was changed.
    fn insert(&self, list: &mut Value) -> bool {
        let Some(plugins) = list["plugins"].as_array_mut() else {
            return false;
        };
        let ours: Vec<usize> = (0..plugins.len())
            .filter(|i| is_ours(&plugins[*i]))
            .collect();
        match ours[..] {
            [place] if place > 0 && plugins[place] == self.entry => false,
            // Not first: something must have made the interface.
            [place] if place > 0 => {
                plugins[place] = self.entry.clone();
                true
            }
            _ => {
                plugins.retain(|plugin| !is_ours(plugin));
                plugins.push(self.entry.clone());
                true
            }
        }
    }

    fn install_binary(&self) -> io::Result<()> {
        let path = self.bin_dir.join(PLUGIN);
        let stamp = |file: &fs::Metadata| (file.dev(), file.ino(), file.ctime(), file.ctime_nsec());
        let found = fs::metadata(&path).ok().map(|file| stamp(&file));
        let mut verified = self.verified.lock();
        if found.is_some() && *verified == found {
            return Ok(());
        }
        let wanted = fs::read("/proc/self/exe")?;
        let executable = |file: &fs::Metadata| file.mode() & 0o777 == 0o755;
        if fs::metadata(&path)
            .is_ok_and(|file| executable(&file) && file.len() == wanted.len() as u64)
            && fs::read(&path)? == wanted
        {
            *verified = found;
            return Ok(());
        }
        write_beside(&path, &wanted, 0o755, None)?;
        *verified = Some(stamp(&fs::metadata(&path)?));
        Ok(())
    }
}

/// Files that runtimes take for network configurations, in their order.
fn config_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(files),
        Err(e) => return Err(at(directory, e)),
    };
    for entry in entries {
        let path = entry.map_err(|e| at(directory, e))?.path();
        let extension = path.extension().and_then(OsStr::to_str);
        if matches!(extension, Some("conf" | "conflist" | "json")) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> Option<Value> {
    let parsed = fs::read(file)
        .and_then(|text| serde_json::from_slice::<Value>(&text).map_err(io::Error::from));
    match parsed {
        Ok(config) if config.is_object() => Some(config),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "CNI: skipped, it cannot be read");
            None
        }
    }
}

fn is_list(file: &Path) -> bool {
    file.extension() == Some(OsStr::new("conflist"))
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn remove_entries(list: &mut Value) -> bool {
    let Some(plugins) = list["plugins"].as_array_mut() else {
        return false;
    };
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.len() != before
}

/// A list of one plugin, as runtimes make it themselves of a `.conf`.
fn as_list(config: Value) -> Value {
    let mut list = json!({});
    for field in ["cniVersion", "name"] {
        if let Some(value) = config.get(field) {
            list[field] = value.clone();
        }
    }
    list["plugins"] = json!([config]);
    list
}

fn saved(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(SAVED);
    name.into()
}

/// Writes `file` with the mode and owner of `model`. A link stays one: what it leads to is replaced.
fn replace(file: &Path, config: &Value, model: &Path) -> io::Result<()> {
    let model = fs::metadata(model).map_err(|e| at(model, e))?;
    let target = fs::canonicalize(file).unwrap_or_else(|_missing| file.to_owned());
    let file = target.as_path();
    let mut text = serde_json::to_vec_pretty(config)?;
    text.push(b'\n');
    let owner = (model.uid(), model.gid());
    write_beside(file, &text, model.mode() & 0o7777, Some(owner))
}

/// Writes a new file beside the old one and renames it over it.
fn write_beside(
    path: &Path,
    content: &[u8],
    mode: u32,
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or(PLUGIN);
    // No extension that a runtime would read.
    let temporary = path.with_file_name(format!(".{name}.{}.warren-tmp", std::process::id()));
    let write = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        at(path, error)
    })
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The plugin's type, and the name of its binary.
const PLUGIN: &str = "warren-cni";
/// Appended to the name of a `.conf` that became a `.conflist`.
const SAVED: &str = ".warren-saved";
/// What is converted.
const CONVERTED: [&str; 2] = ["conf", "json"];
const INTERVAL: Duration = Duration::from_secs(10);
