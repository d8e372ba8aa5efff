//! Peers in another language: Python with `grpcio`, `h2` and `websockets`, in a virtual environment under
//! the target directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::run;

/// The interpreter, with what the peers need. Makes the environment if it is missing.
#[track_caller]
pub fn interpreter() -> PathBuf {
    let venv = workspace().join("target/venv");
    let python = venv.join("bin/python");
    if !python.exists() {
        run(
            Command::new("python3").args(["-m", "venv"]).arg(&venv),
            Duration::from_secs(120),
        )
        .expect_ok();
    }
    let complete = run(
        Command::new(&python).args(["-c", "import grpc, h2, websockets"]),
        Duration::from_secs(20),
    )
    .ok();
    if !complete {
        let mut pip = Command::new(&python);
        pip.args([
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "grpcio",
            "h2",
            "websockets",
        ]);
        run(&mut pip, Duration::from_secs(180)).expect_ok();
    }
    python
}

/// The command of a program of `tests/peers`.
#[track_caller]
pub fn python(name: &str, args: &[&str]) -> Vec<String> {
    let mut command = vec![
        interpreter().display().to_string(),
        peer(name).display().to_string(),
    ];
    command.extend(args.iter().map(|&arg| arg.to_owned()));
    command
}

/// A program of `tests/peers`.
pub fn peer(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("peers")
        .join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// The workspace's root.
pub(crate) fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}
