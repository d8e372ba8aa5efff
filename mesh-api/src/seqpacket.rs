//! `SOCK_SEQPACKET` unix sockets that carry one protobuf message and up to 253 descriptors a packet.
//! Truncation is an error; received descriptors are close-on-exec and owned from the first moment.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, getsockopt, listen, sendmsg, socket, sockopt,
};
use prost::Message;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Largest number of descriptors the kernel passes in one message (SCM_MAX_FD).
pub const MAX_FDS: usize = 253;
/// Largest message.
pub const MAX_BYTES: usize = 64 * 1024;

/// A connected socket. Any number of tasks may send; packets do not interleave.
#[derive(Debug)]
pub struct Connection {
    fd: AsyncFd<OwnedFd>,
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
}

/// Who is on the other end, as the kernel says (SO_PEERCRED).
#[derive(Clone, Copy, Debug)]
pub struct PeerCredentials {
    /// Process.
    pub pid: i32,
    /// Effective user at connect time.
    pub uid: u32,
}

impl Listener {
    /// Binds, replacing a socket file that a dead process left.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let fd = seqpacket_socket()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(64)?)?;
        Ok(Self {
            fd: sys::register(fd, Interest::READABLE)?,
        })
    }

    /// Waits for the next peer.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let mut ready = self.fd.readable().await?;
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match ready.try_io(|fd| Ok(accept4(fd.as_raw_fd(), flags)?)) {
                Ok(accepted) => return Connection::new(sys::own(accepted?)),
                Err(_would_block) => {}
            }
        }
    }
}

impl Connection {
    /// Connects to a listener.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = seqpacket_socket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::new(fd)
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            fd: sys::register(fd, Interest::READABLE | Interest::WRITABLE)?,
        })
    }

    /// Credentials of the peer.
    pub fn peer(&self) -> io::Result<PeerCredentials> {
        let credentials = getsockopt(&self.fd, sockopt::PeerCredentials)?;
        Ok(PeerCredentials {
            pid: credentials.pid(),
            uid: credentials.uid(),
        })
    }

    /// Sends one message, waiting while the peer's buffer is full.
    pub async fn send(&self, message: &impl Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&message.encode_to_vec(), fds).await
    }

    pub(crate) async fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "packet of {} bytes and {} descriptors is over the limit",
                    bytes.len(),
                    fds.len()
                ),
            ));
        }
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        loop {
            let mut ready = self.fd.writable().await?;
            let sent = ready.try_io(|fd| {
                let rights = [ControlMessage::ScmRights(&raw)];
                let control = if raw.is_empty() { &[][..] } else { &rights[..] };
                let payload = [IoSlice::new(bytes)];
                Ok(sendmsg::<()>(
                    fd.as_raw_fd(),
                    &payload,
                    control,
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )?)
            });
            match sent {
                Ok(result) => return result.map(|_| ()),
                Err(_would_block) => {}
            }
        }
    }

    /// Receives the next message; `None` when the peer has closed.
    pub async fn receive<M: Message + Default>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let mut buffer = vec![0u8; MAX_BYTES];
        loop {
            let mut ready = self.fd.readable().await?;
            match ready.try_io(|fd| receive_packet(fd.as_fd(), &mut buffer)) {
                Err(_would_block) => {}
                Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(Err(e)) => return Err(e),
                Ok(Ok((0, _))) => return Ok(None),
                Ok(Ok((length, fds))) => {
                    let message = M::decode(&buffer[..length])
                        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                    return Ok(Some((message, fds)));
                }
            }
        }
    }
}

fn receive_packet(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    receive_into(fd, buffer, &mut space)
}

/// `space`: room for descriptors. Those that came are owned, and closed with the error, also when others
/// did not fit or this process is out of descriptors.
fn receive_into(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
    space: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let (length, flags, fds) = sys::receive(fd, buffer, space)?;
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "truncated packet",
        ));
    }
    Ok((length, fds))
}

fn seqpacket_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}

#[allow(unsafe_code)]
mod sys {
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

    use nix::sys::socket::MsgFlags;
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    /// Registers a descriptor with the runtime's poller.
    pub(super) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: an OwnedFd stays open, and the same descriptor, until the AsyncFd drops it.
        unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
    }

    /// recvmsg(2). All descriptors that came are owned by the result. Not nix's: it does not give out those of
    /// a truncated message, which would stay open for ever.
    #[allow(clippy::unnecessary_cast)] // The sizes are of other types with other C libraries.
    pub(super) fn receive(
        fd: BorrowedFd<'_>,
        buffer: &mut [u8],
        space: &mut [u8],
    ) -> io::Result<(usize, MsgFlags, Vec<OwnedFd>)> {
        let mut payload = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: all zero is a valid msghdr, one that names nothing.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut payload;
        header.msg_iovlen = 1;
        header.msg_control = space.as_mut_ptr().cast();
        header.msg_controllen = space.len() as _;
        // SAFETY: `header` names `payload` and `space`, which are borrowed mutably through the call, with
        // their sizes; the descriptor is borrowed open.
        let length =
            unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        let length = usize::try_from(length).map_err(|_negative| io::Error::last_os_error())?;
        let mut fds = Vec::new();
        // SAFETY: the kernel has set `msg_controllen` to what it wrote to `space`, and the macros stay inside;
        // `cmsg_len` of SCM_RIGHTS covers whole descriptors, which need not be aligned. Each has just been made for
        // this process and is owned by nobody else.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(&raw const header);
            while let Some(message) = control.as_ref() {
                if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                    let data = libc::CMSG_DATA(control).cast::<RawFd>();
                    let bytes = message.cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                    fds.extend(
                        (0..bytes / size_of::<RawFd>())
                            .map(|at| own(data.add(at).read_unaligned())),
                    );
                }
                control = libc::CMSG_NXTHDR(&raw const header, control);
            }
        }
        Ok((length, MsgFlags::from_bits_retain(header.msg_flags), fds))
    }

    /// Takes ownership of a descriptor the kernel has just given to this process.
    pub(super) fn own(fd: RawFd) -> OwnedFd {
        // SAFETY: the callers pass descriptors straight from accept4 and SCM_RIGHTS, which nobody else owns.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::broker::{Ack, ToProxy, to_proxy::Body};

    #[tokio::test]
    async fn a_message_and_its_descriptors_arrive_together() {
        let dir = std::env::temp_dir().join(format!("warren-seqpacket-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        let listener = Listener::bind(&path).unwrap();
        let client = Connection::connect(&path).unwrap();
        let server = listener.accept().await.unwrap();
        assert_eq!(server.peer().unwrap().pid, std::process::id() as i32);

        let file = std::fs::File::open("/dev/null").unwrap();
        let sent = ToProxy {
            id: 7,
            body: Some(Body::Ack(Ack {
                of: 3,
                error: "no".into(),
            })),
        };
        let fds: Vec<_> = (0..MAX_FDS).map(|_| file.as_fd()).collect();
        client.send(&sent, &fds).await.unwrap();
        let (received, fds) = server.receive::<ToProxy>().await.unwrap().unwrap();
        assert_eq!((received, fds.len()), (sent.clone(), MAX_FDS));

        let too_many: Vec<_> = (0..=MAX_FDS).map(|_| file.as_fd()).collect();
        assert!(client.send(&sent, &too_many).await.is_err());
        drop(client);
        assert!(server.receive::<ToProxy>().await.unwrap().is_none());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn descriptors_of_a_truncated_packet_are_closed() {
        let dir = std::env::temp_dir().join(format!("warren-truncated-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        let listener = Listener::bind(&path).unwrap();
        let client = Connection::connect(&path).unwrap();
        let server = listener.accept().await.unwrap();
        // What a pipe's reader sees tells whether a copy of the writing end is open anywhere.
        let (reader, writer) = io::pipe().unwrap();
        let sent = ToProxy { id: 1, body: None };
        let writers = [writer.as_fd(), writer.as_fd(), writer.as_fd()];
        client.send(&sent, &writers).await.unwrap();
        drop(writer);

        let mut buffer = [0; 64];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let error = receive_into(server.fd.get_ref().as_fd(), &mut buffer, &mut space).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        nix::fcntl::fcntl(
            &reader,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .unwrap();
        // End of file: EAGAIN would mean that a descriptor was left open.
        assert_eq!(nix::unistd::read(&reader, &mut [0; 1]), Ok(0));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
