//! A long-running process of the mesh itself (controller, agent, proxy), started again whenever it ends, as a
//! kubelet would but without the wait at first.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::launch::Launch;
use super::processes;

/// Handle of a component. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Component {
    wanted: watch::Sender<Wanted>,
    process: watch::Receiver<Process>,
    task: JoinHandle<()>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Process {
    pid: Option<u32>,
    starts: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Running,
    Stopped,
}

impl Component {
    /// Starts it. `changed` is called whenever its process id changes.
    pub(crate) fn start(
        name: String,
        launch: Launch,
        log: PathBuf,
        grace: Duration,
        changed: impl Fn() + 'static,
    ) -> Self {
        let (wanted, watched) = watch::channel(Wanted::Running);
        let (state, process) = watch::channel(Process::default());
        let keeper = Keeper {
            name,
            launch,
            log,
            grace,
            state,
            changed: Box::new(changed),
        };
        let task = tokio::task::spawn_local(keeper.run(watched));
        Self {
            wanted,
            process,
            task,
        }
    }

    /// Its process, while there is one.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.borrow().pid
    }

    /// How often it was started.
    pub(crate) fn starts(&self) -> u32 {
        self.process.borrow().starts
    }

    /// Sends a signal to its process.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            processes::signal(pid, signal);
        }
    }

    /// Waits until it has been started more often than `starts` and runs.
    pub(crate) async fn started_after(&self, starts: u32) {
        let mut process = self.process.clone();
        // Fails only when the component is being dropped.
        let _ = process
            .wait_for(|p| p.starts > starts && p.pid.is_some())
            .await;
    }

    /// Waits until there is no process.
    pub(crate) async fn ended(&self) {
        let mut process = self.process.clone();
        let _ = process.wait_for(|p| p.pid.is_none()).await;
    }

    /// Ends it and keeps it away until [`Component::resume`].
    pub(crate) fn stop(&self) {
        self.wanted.send_replace(Wanted::Stopped);
    }

    /// Starts it again after [`Component::stop`].
    pub(crate) fn resume(&self) {
        self.wanted.send_replace(Wanted::Running);
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        self.task.abort();
        self.signal(Signal::SIGKILL);
    }
}

struct Keeper {
    name: String,
    launch: Launch,
    log: PathBuf,
    grace: Duration,
    state: watch::Sender<Process>,
    changed: Box<dyn Fn()>,
}

impl Keeper {
    async fn run(self, mut wanted: watch::Receiver<Wanted>) {
        let mut pause = Duration::ZERO;
        loop {
            if wanted.wait_for(|w| *w == Wanted::Running).await.is_err() {
                return;
            }
            let started = Instant::now();
            match processes::start(&self.launch, &self.log) {
                Ok(mut child) => {
                    self.set_pid(child.id());
                    tracing::info!(component = self.name, pid = child.id(), "started");
                    let ended = tokio::select! {
                        status = child.wait() => status.ok(),
                        _ = wanted.wait_for(|w| *w == Wanted::Stopped) => {
                            processes::end(&mut child, self.grace).await;
                            None
                        }
                    };
                    self.set_pid(None);
                    let how = ended.map_or("stopped".into(), processes::describe);
                    tracing::info!(component = self.name, how, "ended");
                }
                Err(error) => tracing::error!(component = self.name, %error, "cannot be started"),
            }
            pause = next_pause(pause, started.elapsed());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = wanted.wait_for(|w| *w == Wanted::Stopped) => pause = Duration::ZERO,
            }
        }
    }

    fn set_pid(&self, pid: Option<u32>) {
        self.state.send_modify(|process| {
            process.pid = pid;
            process.starts += u32::from(pid.is_some());
        });
        (self.changed)();
    }
}

/// At once after a long life; then longer and longer while it dies young.
fn next_pause(last: Duration, lived: Duration) -> Duration {
    if lived >= LONG_LIFE {
        Duration::ZERO
    } else if last.is_zero() {
        FIRST_PAUSE
    } else {
        (last * 2).min(MAX_PAUSE)
    }
}

const LONG_LIFE: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_it_dies_young() {
        let mut pause = Duration::ZERO;
        let pauses: Vec<u128> = (0..8)
            .map(|_| {
                pause = next_pause(pause, Duration::ZERO);
                pause.as_millis()
            })
            .collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(next_pause(MAX_PAUSE, LONG_LIFE), Duration::ZERO);
    }
}
