//! Child processes with a time bound.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// What a finished process left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` when it was ended by a signal.
    pub code: Option<i32>,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
    command: String,
}

impl Finished {
    /// Whether the exit code was 0.
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }

    /// Panics unless the exit code was 0.
    #[track_caller]
    pub fn expect_ok(self) -> Self {
        assert!(self.ok(), "{self}");
        self
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ended with {:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.command,
            self.code,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

/// Runs a command to its end; panics if it takes longer than `limit` (its process group is killed).
#[track_caller]
pub fn run(command: &mut Command, limit: Duration) -> Finished {
    Background::start(command).finish(limit)
}

/// A process that runs beside the test. Its process group is killed when this drops.
#[derive(Debug)]
pub struct Background {
    child: Child,
    command: String,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Background {
    /// Starts the command in a process group of its own, with standard input closed.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let text = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{text}: {e}"));
        let stdout = Arc::default();
        let stderr = Arc::default();
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, Arc::clone(&stdout)));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, Arc::clone(&stderr)));
        }
        Self {
            child,
            command: text,
            stdout,
            stderr,
            readers,
        }
    }

    /// Standard output so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// Standard error so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until a line of standard output satisfies `wanted` and returns it.
    #[track_caller]
    pub fn wait_for_line(&mut self, limit: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + limit;
        loop {
            // Asked first: what it wrote before it ended is then read below.
            let running = self.running();
            if let Some(line) = self.stdout().lines().find(|l| wanted(l)) {
                return line.to_owned();
            }
            assert!(
                running && Instant::now() < deadline,
                "{}: the awaited line did not come (running: {running})\n--- stdout\n{}\n--- stderr\n{}",
                self.command,
                tail(&self.stdout()),
                tail(&self.stderr())
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for its end; panics after `limit`.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Finished {
        let deadline = Instant::now() + limit;
        let code = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.code(),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) => panic!(
                    "{} still runs after {limit:?}\n--- stdout\n{}\n--- stderr\n{}",
                    self.command,
                    tail(&self.stdout()),
                    tail(&self.stderr())
                ),
                Err(e) => panic!("{}: {e}", self.command),
            }
        };
        // A daemon it left behind may hold the pipes open: what came until then is what there is.
        let patience = Instant::now() + Duration::from_secs(2);
        while self.readers.iter().any(|r| !r.is_finished()) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
        }
        Finished {
            code,
            stdout: self.stdout(),
            stderr: self.stderr(),
            command: self.command.clone(),
        }
    }

    /// Sends a signal to the process group.
    pub fn signal(&self, signal: Signal) {
        // Fails only when the group has ended already.
        let _ = killpg(Pid::from_raw(self.child.id() as i32), signal);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.running() {
            self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn collect(
    pipe: impl Read + Send + 'static,
    into: Arc<Mutex<String>>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            into.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    })
}

fn text(of: &Mutex<String>) -> String {
    of.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The last part of a long text.
pub fn tail(text: &str) -> &str {
    const KEEP: usize = 6000;
    let mut start = text.len().saturating_sub(KEEP);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
