use std::io;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::kill;
use nix::unistd::{Pid, chroot};
use socket2::{Domain, Socket, Type};

use super::*;
use crate::slices;

/// Runs `with` on a thread of its own under the filter, which no other thread gets.
fn under<T: Send>(profile: Profile, with: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            apply(profile).unwrap();
            with()
        });
        thread.join().unwrap()
    })
}

fn is_denied<T>(result: io::Result<T>) -> bool {
    matches!(result.map(drop), Err(error) if error.raw_os_error() == Some(libc::EPERM))
}

#[test]
fn the_worker_may_not_gain_or_start_anything() {
    under(Profile::Worker, || {
        assert!(is_denied(Command::new("/bin/true").spawn()), "execve");
        // Root may do all of these, but for the filter.
        assert!(
            is_denied(unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)),
            "unshare"
        );
        let mounted = mount(
            Some("none"),
            "/mnt",
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        );
        assert!(is_denied(mounted.map_err(io::Error::from)), "mount");
        assert!(is_denied(chroot("/").map_err(io::Error::from)), "chroot");
        assert!(
            is_denied(kill(Pid::this(), None).map_err(io::Error::from)),
            "kill"
        );
        for family in [
            libc::AF_NETLINK,
            libc::AF_PACKET,
            libc::AF_VSOCK,
            libc::AF_ALG,
        ] {
            assert!(
                is_denied(Socket::new(Domain::from(family), Type::RAW, None)),
                "family {family}"
            );
        }
        assert!(is_denied(process::raise_nothing()), "prlimit64");
        let other = slices::tests::read(std::process::id());
        assert!(is_denied(other), "sched_getattr of another thread");
        assert!(
            is_denied(std::os::unix::fs::symlink("a", "/tmp/b")),
            "symlink"
        );
    });
}

#[test]
fn the_worker_may_do_its_work() {
    under(Profile::Worker, || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(
            status.contains("Seccomp:\t2\n") && status.contains("NoNewPrivs:\t1\n"),
            "{status}"
        );
        slices::tests::ask().expect("its own slices of the processor");
        // Threads, which inherit the filter, runtimes, timers, sockets, files.
        let denied = std::thread::spawn(|| is_denied(Command::new("/bin/true").spawn()))
            .join()
            .unwrap();
        assert!(denied);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
            let client = tokio::net::TcpStream::connect(listener.local_addr().unwrap());
            let (client, server) = tokio::join!(client, listener.accept());
            client.unwrap().try_write(b"x").unwrap();
            server.unwrap().0.readable().await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            let directory = tempfile::tempdir().unwrap();
            let file = directory.path().join("file");
            tokio::fs::write(&file, "x").await.unwrap();
            tokio::fs::rename(&file, directory.path().join("other"))
                .await
                .unwrap();
            tokio::net::UnixListener::bind(directory.path().join("socket")).unwrap();
        });
        assert!(crate::process::open_descriptors() > 3);
    });
}

#[test]
fn the_supervisor_may_start_processes_and_no_more() {
    under(Profile::Supervisor, || {
        assert!(Command::new("/bin/true").status().unwrap().success());
        assert!(
            is_denied(unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)),
            "unshare"
        );
        let mounted = mount(
            Some("none"),
            "/mnt",
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        );
        assert!(is_denied(mounted.map_err(io::Error::from)), "mount");
        // What it starts is under the same filter.
        let status = Command::new("/bin/chown")
            .args(["1", "/nonexistent"])
            .status()
            .unwrap();
        assert!(!status.success());
        let output = Command::new("/bin/cat")
            .arg("/proc/self/status")
            .output()
            .unwrap();
        assert!(
            String::from_utf8(output.stdout)
                .unwrap()
                .contains("Seccomp:\t2\n")
        );
    });
}

/// Both filters, one after the other, as in a worker.
#[test]
fn filters_stack() {
    under(Profile::Supervisor, || {
        apply(Profile::Worker).unwrap();
        assert!(is_denied(Command::new("/bin/true").spawn()));
        assert!(
            apply(Profile::Worker).is_err(),
            "seccomp itself is denied now"
        );
    });
}

mod process {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    pub(super) fn raise_nothing() -> std::io::Result<()> {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?)
    }
}
