//! The real binary: supervisor and worker, as a user without privileges. Needs root to become that user.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const USER: u32 = 65532;
const PATIENCE: Duration = Duration::from_secs(20);

/// A directory the proxy may write to, with its configuration.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests start the proxy as another user: run them as root"
        );
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
        chown(home.path(), Some(USER), Some(USER)).unwrap();
        let home = Self(home);
        home.configure("");
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes the configuration; nothing it names needs to exist.
    fn configure(&self, more: &str) {
        let path = self.0.path().display();
        let text = format!(
            "node: node-1\ncontroller: {{address: '127.0.0.1:1', trustBundle: {path}/bundle.pem, tokenFile: {path}/token}}\n\
             brokerSocket: {path}/broker.sock\nadminSocket: {path}/admin.sock\nstateDir: {path}/state\n\
             secretsDir: {path}/secrets\nmetricsListen: '127.0.0.1:0'\nhealthListen: '127.0.0.1:0'\n{more}"
        );
        std::fs::write(self.path("proxy.yaml"), text).unwrap();
    }
}

/// A running proxy; killed when dropped.
struct Proxy {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The worker dies with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    fn start(home: &Home) -> Self {
        Self::start_as(home, USER, &[])
    }

    fn start_as(home: &Home, user: u32, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_warren-node-proxy"))
            .arg("--config")
            .arg(home.path("proxy.yaml"))
            .args(arguments)
            .uid(user)
            .gid(user)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        // Ends with the last process that holds the pipe.
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            seen: vec![],
        }
    }

    /// Waits for a line of standard error.
    fn line(&mut self, part: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            match self
                .lines
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(line) if line.contains(part) => return line,
                Ok(line) => self.seen.push(line),
                Err(error) => panic!(
                    "no line with {part:?} ({error}); there were: {:#?}",
                    self.seen
                ),
            }
        }
    }

    /// Waits until the worker has installed its handlers and serves.
    fn up(&mut self) {
        self.line(" worker: uid=");
        self.line("name=\"health\"");
    }

    /// Waits until no process holds standard error.
    fn all_gone(&self) {
        let until = Instant::now() + PATIENCE;
        while self
            .lines
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        assert!(Instant::now() < until, "a process is left");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn worker(&self) -> Pid {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = std::fs::read_to_string(path).unwrap();
        Pid::from_raw(
            children
                .trim()
                .parse()
                .unwrap_or_else(|_| panic!("one worker, not {children:?}")),
        )
    }

    fn exit(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        self.all_gone();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            std::thread::yield_now();
        }
    }
}

fn status(pid: Pid) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
}

/// One request over the admin socket; the whole answer.
fn admin(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(
        stream,
        "{request} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn both_processes_have_no_privileges_and_say_so() {
    let home = Home::new();
    let mut proxy = Proxy::start(&home);
    let line = proxy.line(" supervisor: uid=");
    assert!(
        line.contains("uid=65532 capabilities=0x0 permitted=0x0 no_new_privs=1 seccomp=2"),
        "{line}"
    );
    proxy.up();
    for pid in [proxy.pid(), proxy.worker()] {
        let status = status(pid);
        for row in [
            "Uid:\t65532\t65532\t65532\t65532",
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapInh:\t0000000000000000",
            "CapAmb:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
        ] {
            assert!(status.contains(row), "{row} in {status}");
        }
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", proxy.worker())).unwrap();
    let files: Vec<&str> = limits
        .lines()
        .find(|l| l.starts_with("Max open files"))
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(
        files[3], files[4],
        "the descriptor limit is raised to the hard limit"
    );
}

#[test]
fn a_killed_worker_is_back_at_once_and_a_dying_one_is_given_longer_pauses() {
    let home = Home::new();
    let mut proxy = Proxy::start(&home);
    proxy.up();
    for (death, pause) in ["0 ms", "100 ms", "200 ms"].into_iter().enumerate() {
        let before = proxy.worker();
        let killed = Instant::now();
        kill(before, Signal::SIGKILL).unwrap();
        let line = proxy.line("supervisor: worker");
        assert!(
            line.contains("SIGKILL") && line.ends_with(&format!("next one in {pause}")),
            "{line}"
        );
        proxy.up();
        assert_ne!(proxy.worker(), before);
        let bound = Duration::from_millis(1000 + 100 * death as u64);
        assert!(
            killed.elapsed() < bound,
            "back after {:?}",
            killed.elapsed()
        );
    }
}

#[test]
fn sigterm_is_passed_on_and_both_end_with_the_workers_code() {
    let home = Home::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut proxy = Proxy::start(&home);
        proxy.up();
        kill(proxy.pid(), signal).unwrap();
        assert_eq!(proxy.exit().code(), Some(0));
        assert!(!home.path("admin.sock").exists());
    }
}

#[test]
fn sigterm_before_the_worker_is_up_is_not_lost() {
    let home = Home::new();
    let mut proxy = Proxy::start(&home);
    proxy.line(" supervisor: uid=");
    kill(proxy.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(proxy.exit().code(), Some(0));
}

#[test]
fn the_worker_dies_with_its_supervisor() {
    let home = Home::new();
    let mut proxy = Proxy::start(&home);
    proxy.up();
    kill(proxy.pid(), Signal::SIGKILL).unwrap();
    proxy.all_gone();
}

#[test]
fn a_faulty_configuration_ends_the_process_with_every_fault() {
    let home = Home::new();
    home.configure("workers: 0\nterminationGraceSeconds: 1\n");
    let mut proxy = Proxy::start(&home);
    let line = proxy.line("configuration");
    assert!(
        line.contains("workers:") && line.contains("terminationGraceSeconds:"),
        "{line}"
    );
    assert_eq!(proxy.exit().code(), Some(78));
    home.configure("worker: 2\n");
    let mut proxy = Proxy::start(&home);
    let line = proxy.line("configuration");
    assert!(line.contains("unknown field `worker`"), "{line}");
}

#[test]
fn root_is_refused_unless_allowed() {
    let home = Home::new();
    let mut proxy = Proxy::start_as(&home, 0, &[]);
    let line = proxy.line("uid 0");
    assert!(line.contains("--allow-privileged"), "{line}");
    assert_eq!(proxy.exit().code(), Some(78));

    let mut proxy = Proxy::start_as(&home, 0, &["--allow-privileged"]);
    proxy.up();
    kill(proxy.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(proxy.exit().code(), Some(0));
}

#[test]
fn the_admin_socket_shows_the_process_and_changes_what_may_change() {
    let home = Home::new();
    let mut proxy = Proxy::start(&home);
    proxy.up();
    let socket = home.path("admin.sock");
    assert_eq!(
        std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let expect = |request: &str, parts: &[&str]| {
        let answer = admin(&socket, request);
        for part in parts {
            assert!(
                answer.contains(part),
                "{part:?} in the answer to {request}: {answer}"
            );
        }
    };
    expect("GET /", &["200 OK", "PUT  /logging?level="]);
    expect(
        "GET /config_dump",
        &[
            "200 OK",
            "\"node\": \"node-1\"",
            "\"loaded\": false",
            "\"phase\": \"serving\"",
        ],
    );
    expect("GET /pods", &["200 OK", "[]"]);
    expect("GET /connections", &["200 OK", "[]"]);
    expect("GET /certificates", &["200 OK"]);
    expect(
        "GET /metrics",
        &[
            "200 OK",
            "warren_broker_connected 0",
            "process_open_fds ",
            "warren_pods 0",
        ],
    );
    expect(
        "GET /ready",
        &[
            "503",
            "no table",
            "no trust bundle",
            "agent has not been reached",
        ],
    );
    expect("GET /logging", &["200 OK", "info"]);
    expect("PUT /logging?level=a%3Db%3Dc", &["400"]);
    expect(
        "PUT /logging",
        &["400", "expected PUT /logging?level=LEVEL"],
    );
    expect("PUT /logging?level=debug", &["200 OK", "debug"]);
    proxy.line("DEBUG");
    expect("POST /drain", &["200 OK", "drained"]);
    expect("POST /drain", &["409"]);
    expect("GET /ready", &["503", "drained"]);
    expect("POST /resume", &["200 OK", "serving"]);
    expect("GET /drain", &["405"]);
    expect("POST /pods", &["405"]);
    expect("GET /other", &["404", "GET  /pods"]);
}

#[test]
fn a_newer_process_takes_the_admin_socket_over_and_keeps_it() {
    let home = Home::new();
    let mut older = Proxy::start(&home);
    older.up();
    let mut newer = Proxy::start(&home);
    newer.up();
    kill(older.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(older.exit().code(), Some(0));
    assert!(admin(&home.path("admin.sock"), "GET /").contains("200 OK"));
}
