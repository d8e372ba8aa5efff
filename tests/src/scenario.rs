//! One test: alone on the machine, bounded in time, leaving nothing behind.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};

use crate::host::{HostState, leftovers};
use crate::lab::{Lab, LabFootprint, Options};

/// What a test's body is given.
#[derive(Debug)]
pub struct Scenario {
    directory: tempfile::TempDir,
    counter: Cell<u32>,
    footprints: RefCell<Vec<LabFootprint>>,
    names: Arc<Mutex<Vec<String>>>,
}

/// Runs `body` while no other scenario runs on this machine. Ends the process if it takes longer than
/// `limit`. Fails if a lab it made left namespaces, processes or files, or changed the host.
#[track_caller]
pub fn scenario(limit: Duration, body: impl FnOnce(&Scenario)) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "the whole-mesh tests need root"
    );
    let _alone = lock();
    let names = Arc::new(Mutex::new(Vec::new()));
    let _watchdog = Watchdog::start(limit, Arc::clone(&names));
    let before = HostState::read();
    let s = Scenario {
        directory: tempfile::Builder::new()
            .prefix("warren-test-")
            .tempdir()
            .expect("a temporary directory can be made"),
        counter: Cell::new(0),
        footprints: RefCell::default(),
        names,
    };
    // Servers that drop their privileges (databases) work in directories below.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(s.directory(), open).expect("the mode of an own directory can be set");
    body(&s);
    let left: Vec<String> = s.footprints.borrow().iter().flat_map(leftovers).collect();
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    let changed = before.difference(&HostState::read());
    assert!(
        changed.is_empty(),
        "the host was changed:\n{}",
        changed.join("\n")
    );
}

impl Scenario {
    /// A directory that is removed at the end.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path that does not exist yet.
    pub fn fresh_path(&self, name: &str) -> PathBuf {
        self.counter.set(self.counter.get() + 1);
        self.directory
            .path()
            .join(format!("{}-{name}", self.counter.get()))
    }

    /// Writes a file.
    pub fn file(&self, name: &str, contents: &str) -> PathBuf {
        let path = self.fresh_path(name);
        std::fs::write(&path, contents).expect("the scenario's directory can be written");
        path
    }

    /// Brings up a mesh of `nodes` nodes and returns when every pod is ready.
    #[track_caller]
    pub fn lab(&self, nodes: u32, manifests: &[serde_json::Value]) -> Lab {
        self.lab_with(nodes, manifests, &Options::default())
    }

    /// [`Scenario::lab`] with options.
    #[track_caller]
    pub fn lab_with(&self, nodes: u32, manifests: &[serde_json::Value], options: &Options) -> Lab {
        static LABS: AtomicU32 = AtomicU32::new(1);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{:x}-{number}", std::process::id());
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(name.clone());
        Lab::up(self, name, nodes, manifests, options)
    }

    /// Remembers what belongs to a lab, to look for it at the end.
    pub(crate) fn watch(&self, footprint: LabFootprint) {
        self.footprints.borrow_mut().push(footprint);
    }
}

/// A program of this workspace: beside the tests' own target directory, or in `WARREN_BIN_DIR`.
pub fn binary(name: &str) -> PathBuf {
    let path = directory().join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo build --release --workspace --bins, or set WARREN_BIN_DIR",
        path.display()
    );
    path
}

/// The directory of the mesh's programs as images have them, which is beside that of the others: for tests that measure.
/// Panics where the proxy's is older than its sources.
pub fn dist() -> PathBuf {
    let path = directory().with_file_name("dist");
    let program = path.join("warren-node-proxy");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node-proxy/src");
    let built = modified(&program);
    assert!(
        built.is_some() && built >= newest(&sources),
        "{} is missing or older than its sources: make dist",
        program.display()
    );
    path
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).ok()?.modified().ok()
}

fn newest(directory: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(directory).ok()?.flatten();
    let of = |entry: fs::DirEntry| match entry.path() {
        path if path.is_dir() => newest(&path),
        path => modified(&path),
    };
    entries.filter_map(of).max()
}

fn directory() -> PathBuf {
    let directory = std::env::var_os("WARREN_BIN_DIR")
        .map(PathBuf::from)
        .or_else(|| {
            // target/release/deps/reach-0123456789abcdef
            let test = std::env::current_exe().ok()?;
            let parent = test.parent()?;
            let deps = parent.file_name().is_some_and(|n| n == "deps");
            Some(if deps { parent.parent()? } else { parent }.to_path_buf())
        });
    directory.expect("a test has a path")
}

fn lock() -> Flock<File> {
    let path = Path::new("/run/lock/warren-tests.lock");
    let file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    match Flock::lock(file, FlockArg::LockExclusive) {
        Ok(lock) => lock,
        Err((_, e)) => panic!("{}: {e}", path.display()),
    }
}

/// Ends the process when a scenario hangs, after taking its labs down.
struct Watchdog {
    _cancel: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn start(limit: Duration, names: Arc<Mutex<Vec<String>>>) -> Self {
        let (cancel, cancelled) = channel();
        std::thread::spawn(move || {
            if cancelled.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("the scenario takes longer than {limit:?}: ending it");
                for name in names.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    crate::lab::report(name);
                    crate::lab::down(name);
                }
                std::process::exit(101);
            }
        });
        Self { _cancel: cancel }
    }
}
