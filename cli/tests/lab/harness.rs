//! A lab of this test's own, taken down when it drops, and its commands with a time bound.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

/// A lab without a mesh. The machine has few cores: one test at a time, however many labs that has.
pub(crate) struct Lab {
    name: String,
    _turn: Option<MutexGuard<'static, ()>>,
}

/// A pod as `get pods -o json` prints it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) ips: Vec<String>,
    pub(crate) identity: String,
    pub(crate) netns: String,
    pub(crate) pid: u32,
    pub(crate) ready: bool,
    pub(crate) restarts: u32,
    pub(crate) phase: String,
}

#[derive(Deserialize)]
struct Service {
    name: String,
    endpoints: Vec<String>,
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Standard output of a command that must succeed.
    #[track_caller]
    pub(crate) fn good(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }
}

impl Lab {
    /// Brings a lab up; it must become ready.
    #[track_caller]
    pub(crate) fn up(name: &str, options: &[&str]) -> Self {
        let (lab, done) = Self::start(name, options);
        done.good();
        lab
    }

    /// The same with a manifest as text.
    #[track_caller]
    pub(crate) fn up_with(name: &str, manifest: &str, options: &[&str]) -> Self {
        let (lab, done) = Self::try_up(name, manifest, options);
        done.good();
        lab
    }

    /// The same, whatever comes of it.
    pub(crate) fn try_up(name: &str, manifest: &str, options: &[&str]) -> (Self, Finished) {
        let file = Manifest::new(manifest);
        let mut all = vec!["-f", file.path()];
        all.extend(options);
        Self::start(name, &all)
    }

    fn start(name: &str, options: &[&str]) -> (Self, Finished) {
        static TURN: Mutex<()> = Mutex::new(());
        // Taken already by this test when it has a lab: two at once are for tests of just that.
        let turn = match TURN.try_lock() {
            Ok(turn) => Some(turn),
            Err(_) if HAS_LAB.get() => None,
            Err(_) => Some(TURN.lock().unwrap_or_else(PoisonError::into_inner)),
        };
        HAS_LAB.set(true);
        let name = format!("cli{}-{name}", std::process::id());
        let lab = Self { name, _turn: turn };
        let mut all = vec!["up", "--no-mesh"];
        all.extend(options);
        let done = lab.run(&all);
        (lab, done)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `warren lab VERB --name THIS ...`
    pub(crate) fn run(&self, words: &[&str]) -> Finished {
        let (verb, rest) = words.split_first().expect("a verb");
        // `rollout` has a verb of its own.
        let (second, rest) = match (*verb, rest.split_first()) {
            ("rollout", Some((second, rest))) => (Some(*second), rest),
            _ => (None, rest),
        };
        let mut command = Command::new("timeout");
        command.args([
            "--kill-after=5",
            "100",
            env!("CARGO_BIN_EXE_warren"),
            "lab",
            verb,
        ]);
        command.args(second);
        if *verb != "list" {
            command.args(["--name", &self.name]);
        }
        let output = command
            .args(rest)
            .stdin(Stdio::null())
            .output()
            .expect("timeout(1) runs");
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub(crate) fn exec(&self, pod: &str, command: &[&str]) -> Finished {
        let mut words = vec!["exec", pod, "--"];
        words.extend(command);
        self.run(&words)
    }

    pub(crate) fn apply(&self, manifest: &str) -> Finished {
        let file = Manifest::new(manifest);
        self.run(&["apply", "-f", file.path()])
    }

    #[track_caller]
    pub(crate) fn pods(&self) -> Vec<Pod> {
        let text = self.run(&["get", "pods", "-o", "json"]).good();
        serde_json::from_str(&text).expect("pods")
    }

    #[track_caller]
    pub(crate) fn pod(&self, name: &str) -> Pod {
        let found = self.pods().into_iter().find(|p| p.name == name);
        found.unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// Ready endpoints of a Service.
    #[track_caller]
    pub(crate) fn endpoints(&self, name: &str) -> Vec<String> {
        let text = self.run(&["get", "services", "-o", "json"]).good();
        let services: Vec<Service> = serde_json::from_str(&text).expect("services");
        let found = services.into_iter().find(|s| s.name == name);
        found
            .unwrap_or_else(|| panic!("no Service {name}"))
            .endpoints
    }
}

thread_local! {
    static HAS_LAB: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for words in [&["get", "pods"][..], &["logs", "daemon", "--tail", "20"]] {
                let Finished { stdout, stderr, .. } = self.run(words);
                eprintln!("---- {words:?}\n{stdout}{stderr}");
            }
        }
        let done = self.run(&["down"]);
        if !std::thread::panicking() {
            done.good();
        }
        if self._turn.is_some() {
            HAS_LAB.set(false);
        }
    }
}

/// A manifest in a file of its own.
struct Manifest(PathBuf);

impl Manifest {
    fn new(text: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("warren-cli-{}-{number}.yaml", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut file = std::fs::File::create(&path).expect("a temporary file");
        file.write_all(text.as_bytes()).expect("a temporary file");
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("its name is text")
    }
}

impl Drop for Manifest {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Network namespaces of a lab.
pub(crate) fn namespaces_of(lab: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    names
        .filter(|n| n.starts_with(&format!("warren-{lab}.")))
        .collect()
}

/// SIGKILL.
pub(crate) fn kill(pid: &str) {
    let done = Command::new("kill").args(["-KILL", pid.trim()]).status();
    assert!(done.is_ok_and(|s| s.success()), "kill {pid}");
}

/// Asks again and again until it is so; panics after a while.
#[track_caller]
pub(crate) fn eventually(what: &str, mut look: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match look() {
            Ok(()) => return,
            Err(last) => assert!(Instant::now() < deadline, "waiting for {what}: {last}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
