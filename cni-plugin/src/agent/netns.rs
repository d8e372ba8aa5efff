//! Handles on network namespaces, and work done inside them.
//!
//! A thread that has entered a namespace never goes back: it ends, or enters the next one. So no
//! failure can leave one of the runtime's threads in a pod.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::sys;

/// An open network namespace. Keeps it alive.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    id: NetnsId,
}

/// What tells namespaces of one boot apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl Netns {
    /// Takes a descriptor that names a namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let status = fstat(&fd)?;
        let id = NetnsId {
            device: status.st_dev,
            inode: status.st_ino,
        };
        Ok(Self {
            fd: Arc::new(fd),
            id,
        })
    }

    /// Opens a path such as `/run/netns/x` or `/proc/1/ns/net`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// The namespace of this process, the node's own.
    pub fn host() -> io::Result<Self> {
        Self::open(Path::new("/proc/self/ns/net"))
    }

    /// The namespace a socket was made in.
    pub fn of_socket(socket: BorrowedFd<'_>) -> io::Result<Self> {
        Self::from_fd(sys::namespace_of(socket)?)
    }

    /// Its identity.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Moves the calling thread into the namespace, for good.
    pub(super) fn enter(&self) -> io::Result<()> {
        setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| {
            io::Error::other(format!(
                "the pod's network namespace cannot be entered: {e}"
            ))
        })
    }

    /// Runs blocking work inside the namespace, on a thread that ends with it. Processes that it
    /// starts are inside too.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (sender, receiver) = oneshot::channel();
        let netns = self.clone();
        std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                // The caller may have given up; the work is done all the same.
                let _ = sender.send(netns.enter().and_then(|()| work()));
            })?;
        receiver
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace died")))
    }
}

/// How a namespace is found again after a restart of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetnsRecord {
    /// As the runtime named it.
    pub path: PathBuf,
    /// What the path led to.
    pub id: NetnsId,
}

impl NetnsRecord {
    /// Whether the namespace is no longer there. That it cannot be opened for another reason says nothing.
    pub fn is_gone(&self) -> bool {
        (self.open()).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Opens it, unless the path is gone or leads elsewhere by now.
    pub fn open(&self) -> io::Result<Netns> {
        let netns = Netns::open(&self.path)?;
        if netns.id() != self.id {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} is another namespace by now", self.path.display()),
            ));
        }
        Ok(netns)
    }
}
