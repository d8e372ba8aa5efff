//! Processes of the run: started in a namespace on a core, ended with the harness, and read from
//! `/proc`.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{Error, io};

/// A command from one line. Arguments here never hold spaces.
pub(crate) fn command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).stdin(Stdio::null());
    command
}

/// Runs a command to its end; its standard output.
pub(crate) fn succeed(command: &mut Command) -> Result<String, Error> {
    let failed = |command: &Command, detail: String| Error::Command {
        command: format!("{command:?}").replace('"', ""),
        detail,
    };
    let output = match command.output() {
        Ok(output) => output,
        Err(e) => return Err(failed(command, e.to_string())),
    };
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(failed(
            command,
            format!("{}: {}", output.status, text.trim()),
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program in a namespace, on one core, that dies with the harness.
pub(super) fn in_namespace(netns: &Path, core: u32, program: &Path) -> Command {
    let mut command = command(&format!(
        "nsenter --net={} setpriv --pdeathsig KILL taskset -c {core}",
        netns.display()
    ));
    command.arg(program);
    command
}

/// A child that is killed when dropped. Each wrapper of [`in_namespace`] replaces itself, so its pid
/// is the program's.
pub(crate) struct Process(Child);

impl Process {
    /// Output goes to the log file.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Result<Self, Error> {
        let file = fs::File::create(log).map_err(io(format!("make {}", log.display())))?;
        let errors = file
            .try_clone()
            .map_err(io("duplicate a log's descriptor"))?;
        let child = command
            .stdout(file)
            .stderr(errors)
            .spawn()
            .map_err(io(format!("start {command:?}")))?;
        Ok(Process(child))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process and all below it.
pub(super) fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        for task in tasks(pid) {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{task}/children"));
            found.extend(
                children
                    .unwrap_or_default()
                    .split_whitespace()
                    .filter_map(|p| p.parse::<u32>().ok()),
            );
        }
    }
    found
}

/// CPU time of all threads of the processes, in nanoseconds: user and system, softirqs that ran on
/// their back included.
pub(super) fn cpu_nanos(pids: &[u32]) -> u64 {
    pids.iter()
        .flat_map(|&pid| tasks(pid).into_iter().map(move |task| (pid, task)))
        .filter_map(|(pid, task)| {
            fs::read_to_string(format!("/proc/{pid}/task/{task}/schedstat")).ok()
        })
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

/// Resident memory of the processes in KiB. Pages they share count once for each.
pub(super) fn rss_kib(pids: &[u32]) -> u64 {
    kib(pids, "status", "VmRSS:")
}

/// The same, but a page that several processes have mapped counts in parts.
pub(super) fn pss_kib(pids: &[u32]) -> u64 {
    kib(pids, "smaps_rollup", "Pss:")
}

fn kib(pids: &[u32], file: &str, name: &str) -> u64 {
    pids.iter()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/{file}")).ok())
        .filter_map(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        })
        .sum()
}

/// Binds all threads of the process and of those below it to one core.
pub(super) fn pin(root: u32, core: u32) -> Result<(), Error> {
    for pid in tree(root) {
        succeed(&mut command(&format!("taskset -a -p -c {core} {pid}")))?;
    }
    Ok(())
}

/// The machine's CPU time so far, in ticks.
#[derive(Clone, Copy)]
pub(super) struct MachineTime {
    total: u64,
    steal: u64,
}

impl MachineTime {
    pub(super) fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        // cpu user nice system idle iowait irq softirq steal guest guest_nice; guest is within user.
        let ticks: Vec<u64> = stat
            .lines()
            .next()
            .map(|line| {
                line.split_whitespace()
                    .skip(1)
                    .take(8)
                    .filter_map(|t| t.parse().ok())
                    .collect()
            })
            .unwrap_or_default();
        MachineTime {
            total: ticks.iter().sum(),
            steal: ticks.get(7).copied().unwrap_or(0),
        }
    }

    /// Share of the time since `earlier` that the host gave to others, in percent.
    pub(super) fn steal_percent_since(self, earlier: Self) -> f64 {
        let total = self.total.saturating_sub(earlier.total).max(1);
        100.0 * self.steal.saturating_sub(earlier.steal) as f64 / total as f64
    }
}

fn tasks(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_process() {
        let me = std::process::id();
        assert_eq!(tree(me).first(), Some(&me));
        assert!(cpu_nanos(&[me]) > 0);
        assert!(rss_kib(&[me]) > 100);
        assert!(pss_kib(&[me]) > 0);
    }

    #[test]
    fn a_failing_command_says_what_it_printed() {
        let error =
            succeed(&mut command("ls /nonexistent-directory")).expect_err("no such directory");
        assert!(error.to_string().contains("No such file"), "{error}");
    }
}
