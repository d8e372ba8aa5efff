//! `up`: checks everything first, starts the daemon, hands it the manifests, and waits.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::daemon::{Programs, Spec};
use super::manifests::{self, Known};
use super::names::{LABS, LabName, Paths};
use super::plan::SLOTS;
use super::requests::Request;
use super::{client, down, netns, processes};
use crate::args::{ConfigPart, Mode, Up};
use crate::error::{Context, Error, Result};

/// Starts a lab. If its pods do not become ready the lab stays, to be looked at.
pub(crate) fn up(options: &Up) -> Result<()> {
    let name = &options.lab.name;
    let sources = manifests::read(&options.files)?;
    let known = Known {
        nodes: (1..=options.nodes).map(|n| format!("node-{n}")).collect(),
        namespaces: BTreeSet::from(["default".to_owned()]),
    };
    let documents = manifests::parse(&sources, &known)?;
    let overlays = overlays(options)?;
    let programs = if options.no_mesh {
        Programs::default()
    } else {
        programs(options)?
    };
    need_tools()?;

    let lock = lock()?;
    clear_leftovers(name)?;
    let paths = name.paths();
    std::fs::create_dir_all(paths.logs()).context(paths.logs().display())?;
    let spec = Spec {
        slot: free_slot(name),
        nodes: options.nodes,
        zones: options.zones.clone(),
        mesh: !options.no_mesh,
        mode: match options.mode {
            Mode::Permissive => "permissive".into(),
            Mode::Strict => "strict".into(),
        },
        trust_domain: options.trust_domain.clone(),
        workers: options.workers,
        ca: options.ca.as_deref().map(absolute).transpose()?,
        programs,
        overlays,
    };
    let text = serde_json::to_string_pretty(&spec).context("lab.json")?;
    std::fs::write(paths.spec(), text).context(paths.spec().display())?;
    keep_secrets_in_memory(&paths)?;
    let mut daemon = start_daemon(name, &paths)?;
    drop(lock);
    await_socket(name, &paths, &mut daemon)?;
    client::ask(name, &Request::Apply { sources })?;
    client::ask(name, &Request::Wait { seconds: options.timeout }).map_err(|error| {
        Error::new(format!(
            "lab {name}: {error}\nThe lab is left running to be looked at (`warren lab logs --name {name} …`); \
             `warren lab down --name {name}` removes it."
        ))
    })?;
    let kind = if options.no_mesh {
        "un-meshed lab"
    } else {
        "lab"
    };
    let (nodes, objects) = (options.nodes, documents.len());
    super::view::say(format_args!(
        "{kind} {name} is up: {nodes} nodes, {objects} objects, every pod is ready"
    ));
    Ok(())
}

/// Held while state is looked at and made, so that two `up` do not meet.
fn lock() -> Result<Flock<File>> {
    std::fs::create_dir_all(LABS).context(LABS)?;
    let directory = File::open(LABS).context(LABS)?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, e)| Error::new(format!("{LABS}: {e}")))
}

fn clear_leftovers(name: &LabName) -> Result<()> {
    if down::daemon_pid(name).is_some() {
        return Err(Error::new(format!(
            "lab {name} is up already; `warren lab down --name {name}` stops it, or choose another --name"
        )));
    }
    let namespaces = netns::list(&name.netns_prefix());
    if name.paths().dir().exists() || !namespaces.is_empty() {
        let count = namespaces.len();
        eprintln!(
            "lab {name} was not stopped in order; removing what it left ({count} namespaces)"
        );
        down::clean(name)?;
    }
    Ok(())
}

/// The first range of addresses that no other lab uses.
fn free_slot(name: &LabName) -> u8 {
    let used: BTreeSet<u8> = super::list::names()
        .iter()
        .filter(|other| *other != name)
        .filter_map(|other| {
            let text = std::fs::read_to_string(other.paths().spec()).ok()?;
            Some(serde_json::from_str::<Spec>(&text).ok()?.slot)
        })
        .collect();
    (0..SLOTS).find(|slot| !used.contains(slot)).unwrap_or(0)
}

fn overlays(options: &Up) -> Result<Vec<(ConfigPart, serde_json::Value)>> {
    let read = |overlay: &crate::args::Overlay| {
        let file = overlay.file.display();
        let text = std::fs::read_to_string(&overlay.file).context(format!("--config {file}"))?;
        let value: serde_json::Value =
            serde_norway::from_str(&text).context(format!("--config {file}"))?;
        match value {
            serde_json::Value::Object(_) => Ok((overlay.part, value)),
            _ => Err(Error::new(format!("--config {file}: expected a YAML map"))),
        }
    };
    options.config.iter().map(read).collect()
}

/// Beside this program, else in the PATH.
fn programs(options: &Up) -> Result<Programs> {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let mut places: Vec<PathBuf> = match &options.bin_dir {
        Some(dir) => vec![absolute(dir)?],
        None => beside.into_iter().collect(),
    };
    if options.bin_dir.is_none() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        places.extend(std::env::split_paths(&path));
    }
    let mut missing = Vec::new();
    let mut find = |name: &str| {
        let found = places
            .iter()
            .map(|place| place.join(name))
            .find(|p| p.is_file());
        found.unwrap_or_else(|| {
            missing.push(name.to_owned());
            PathBuf::new()
        })
    };
    let programs = Programs {
        controller: find("warren-controller"),
        agent: find("warren-cni"),
        proxy: find("warren-node-proxy"),
    };
    if missing.is_empty() {
        return Ok(programs);
    }
    Err(Error::new(format!(
        "{} not found beside this program nor in the PATH; `make build` builds them, --bin-dir says where \
         they are",
        missing.join(", ")
    )))
}

/// What the lab runs and does not bring along.
fn need_tools() -> Result<()> {
    let path = std::ffi::OsString::from(super::DEFAULT_PATH);
    let in_path = |tool: &str| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file());
    let mut missing: Vec<&str> = Vec::new();
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables")] {
        if !in_path(tool) {
            missing.push(package);
        }
    }
    if !Path::new("/usr/lib/cni/bridge").is_file() {
        missing.push("containernetworking-plugins");
    }
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    Err(Error::new(format!(
        "the lab needs {packages}; apt-get install {packages}"
    )))
}

/// `/run` is a tmpfs on most machines; where it is not, the keys get one.
fn keep_secrets_in_memory(paths: &Paths) -> Result<()> {
    let secrets = paths.secrets();
    std::fs::create_dir_all(&secrets).context(secrets.display())?;
    let on = statfs(&secrets).context(secrets.display())?;
    if on.filesystem_type() == TMPFS_MAGIC {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        &secrets,
        Some("tmpfs"),
        flags,
        Some("size=64m,mode=0755"),
    )
    .context(secrets.display())
}

fn start_daemon(name: &LabName, paths: &Paths) -> Result<Child> {
    let log = processes::append_to(&paths.daemon_log())?;
    let errors = log.try_clone().context("log")?;
    let program = std::env::current_exe().context("this program's path")?;
    let child = Command::new(program)
        .arg0("warren")
        .args(["lab", "daemon", "--name", name.as_str()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .context("the lab's daemon")?;
    std::fs::write(paths.daemon_pid(), child.id().to_string())
        .context(paths.daemon_pid().display())?;
    Ok(child)
}

/// The daemon listens once the network is there; its socket's file is there a moment before.
fn await_socket(name: &LabName, paths: &Paths, daemon: &mut Child) -> Result<()> {
    while UnixStream::connect(paths.socket()).is_err() {
        if let Ok(Some(status)) = daemon.try_wait() {
            let log = std::fs::read_to_string(paths.daemon_log()).unwrap_or_default();
            let end: Vec<&str> = log.lines().rev().take(5).collect();
            let end: Vec<&str> = end.into_iter().rev().collect();
            let how = processes::describe(status);
            down::clean(name)?;
            return Err(Error::new(format!(
                "lab {name} did not start ({how}):\n{}",
                end.join("\n")
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(path.display())
}
