//! Changes below a directory: inotify, gathered until they pause, and a look from time to time all the same,
//! as events can be lost and some file systems send none.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Watches one directory with everything below it.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    watcher: Option<RecommendedWatcher>,
    dir: PathBuf,
}

#[derive(Debug, Default)]
struct Shared {
    wake: Notify,
    /// What changed since it was last taken; `None`: not known.
    paths: Mutex<Option<HashSet<PathBuf>>>,
}

/// What changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Changes {
    /// These files or directories, at least.
    Paths(HashSet<PathBuf>),
    /// Not known: look at everything.
    Unknown,
}

impl Watch {
    /// Starts to watch. A directory that cannot be watched is looked at more often instead.
    pub fn new(dir: &Path) -> Self {
        let shared = Arc::new(Shared::default());
        *shared.paths.lock() = Some(HashSet::new());
        let mut watch = Self {
            shared,
            watcher: None,
            dir: dir.to_owned(),
        };
        watch.connect();
        watch
    }

    /// Waits for the next changes. Cancel safe: what was noticed is noticed again by the next call.
    pub async fn changed(&mut self) -> Changes {
        let interval = match self.watcher {
            Some(_) => RESCAN,
            None => RESCAN_UNWATCHED,
        };
        while !self.shared.is_pending() {
            let woken = tokio::time::timeout(interval, self.shared.wake.notified()).await;
            if woken.is_err() {
                if self.watcher.is_none() {
                    self.connect();
                }
                return Changes::Unknown;
            }
        }
        // An editor or `rename` makes several events of one edit.
        let gathered = async {
            while tokio::time::timeout(PAUSE, self.shared.wake.notified())
                .await
                .is_ok()
            {}
        };
        // A directory that never rests must not keep its changes from us.
        let _ = tokio::time::timeout(LONGEST_GATHERING, gathered).await;
        match self.shared.paths.lock().replace(HashSet::new()) {
            Some(paths) => Changes::Paths(paths),
            None => Changes::Unknown,
        }
    }

    fn connect(&mut self) {
        let shared = self.shared.clone();
        let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            shared.take(event);
        })
        .and_then(|mut watcher| {
            watcher.watch(&self.dir, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        match made {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => tracing::warn!(
                "{} cannot be watched and is read every {} s instead: {error}",
                self.dir.display(),
                RESCAN_UNWATCHED.as_secs()
            ),
        }
    }
}

impl Shared {
    fn is_pending(&self) -> bool {
        self.paths
            .lock()
            .as_ref()
            .is_none_or(|paths| !paths.is_empty())
    }

    fn take(&self, event: notify::Result<notify::Event>) {
        let mut paths = self.paths.lock();
        match event {
            Ok(event) if event.kind.is_access() => return,
            Ok(event) if !event.need_rescan() => {
                if let Some(known) = &mut *paths {
                    known.extend(event.paths);
                    if known.len() > MAX_PATHS {
                        *paths = None;
                    }
                }
            }
            Ok(_) | Err(_) => *paths = None,
        }
        drop(paths);
        self.wake.notify_one();
    }
}

const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_GATHERING: Duration = Duration::from_millis(300);
const RESCAN: Duration = Duration::from_secs(30);
const RESCAN_UNWATCHED: Duration = Duration::from_secs(2);
const MAX_PATHS: usize = 10_000;
