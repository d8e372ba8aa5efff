//! Control groups that bound the processor time of load generators and servers, so that a test measures the
//! proxy and not who gets the processor.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::host::family;
use crate::wait::wait_until;

/// Short, so that who has used up its share waits little for the next one.
const PERIOD_US: u64 = 10_000;

/// A group with a bound. Removed when dropped; what is still in it goes to the group above.
#[derive(Debug)]
pub struct CpuGroup {
    path: PathBuf,
}

impl CpuGroup {
    /// A group that gets at most so many percent of one processor. Panics where groups cannot be made.
    #[track_caller]
    pub fn new(name: &str, percent: u64) -> Self {
        let Hierarchy { directory, unified } = Hierarchy::find();
        let path = directory.join(format!("warren-test-{}-{name}", std::process::id()));
        if unified {
            // The controller must be on for the groups below.
            write(&directory.join("cgroup.subtree_control"), "+cpu");
        }
        fs::create_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let group = Self { path };
        let quota = PERIOD_US * percent / 100;
        if unified {
            group.set("cpu.max", &format!("{quota} {PERIOD_US}"));
        } else {
            group.set("cpu.cfs_period_us", &PERIOD_US.to_string());
            group.set("cpu.cfs_quota_us", &quota.to_string());
        }
        group
    }

    /// Lets everybody else go first: who waits for a processor then waits for none of these.
    #[track_caller]
    #[must_use]
    pub fn idle(self) -> Self {
        self.set("cpu.idle", "1");
        self
    }

    /// Takes a process and its descendants in.
    #[track_caller]
    pub fn add(&self, pid: u32) {
        for pid in family(pid) {
            self.set("cgroup.procs", &pid.to_string());
        }
    }

    /// For how many periods the group had used up its share. Panics if that is not said.
    #[track_caller]
    pub fn throttled(&self) -> u64 {
        let stat = read(&self.path.join("cpu.stat").display().to_string());
        let of = |line: &str| line.strip_prefix("nr_throttled ")?.parse().ok();
        let count = stat.lines().find_map(of);
        count.unwrap_or_else(|| panic!("{}: {stat}", self.path.display()))
    }

    /// The command line that runs `command` inside.
    pub fn around(&self, command: &[&str]) -> Vec<String> {
        let enter = format!(
            "echo $$ > {}/cgroup.procs && exec \"$@\"",
            self.path.display()
        );
        let mut all = vec!["sh".to_owned(), "-c".into(), enter, "sh".into()];
        all.extend(command.iter().map(|&word| word.to_owned()));
        all
    }

    #[track_caller]
    fn set(&self, file: &str, value: &str) {
        write(&self.path.join(file), value);
    }

    fn remove(&self) -> std::io::Result<()> {
        let above = self.path.parent().unwrap_or(&self.path);
        for pid in fs::read_to_string(self.path.join("cgroup.procs"))?.lines() {
            // It may end meanwhile.
            let _ = fs::write(above.join("cgroup.procs"), pid);
        }
        fs::remove_dir(&self.path)
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Best effort: the panic is the report.
            let _ = self.remove();
            return;
        }
        wait_until(
            &format!("{} to be removed", self.path.display()),
            Duration::from_secs(10),
            || self.remove(),
        );
    }
}

/// Where this process may make groups with the `cpu` controller.
struct Hierarchy {
    directory: PathBuf,
    /// Version 2.
    unified: bool,
}

impl Hierarchy {
    #[track_caller]
    fn find() -> Self {
        let mounts = read("/proc/self/mountinfo");
        let own = read("/proc/self/cgroup");
        // "9:cpu,cpuacct:/path", in version 2 "0::/path".
        let below = |wanted: &dyn Fn(&str) -> bool| {
            own.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                let controllers = fields.next()?;
                let path = fields.next()?.trim_start_matches('/').to_owned();
                wanted(controllers).then_some(path)
            })
        };
        let mount = |kind: &str, option: &str| {
            mounts.lines().find_map(|line| {
                let (mount, filesystem) = line.split_once(" - ")?;
                let point = mount.split(' ').nth(4)?;
                let mut fields = filesystem.split(' ');
                let right = fields.next()? == kind;
                let options = fields.nth(1).unwrap_or_default();
                let has = option.is_empty() || options.split(',').any(|o| o == option);
                (right && has).then(|| PathBuf::from(point))
            })
        };
        if let (Some(mount), Some(path)) = (
            mount("cgroup", "cpu"),
            below(&|controllers| controllers.split(',').any(|c| c == "cpu")),
        ) {
            return Self {
                directory: mount.join(path),
                unified: false,
            };
        }
        let unified = mount("cgroup2", "").zip(below(&str::is_empty));
        let (mount, path) = unified.unwrap_or_else(|| {
            panic!("no control groups with the cpu controller, of version 1 or 2:\n{mounts}")
        });
        // Groups with processes of their own cannot have bounded groups below: the root may.
        let directory = if path.is_empty() {
            mount
        } else {
            mount.join(path).parent().map_or(mount, Path::to_path_buf)
        };
        Self {
            directory,
            unified: true,
        }
    }
}

#[track_caller]
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[track_caller]
fn write(path: &Path, value: &str) {
    fs::write(path, value).unwrap_or_else(|e| panic!("{} = {value}: {e}", path.display()));
}
