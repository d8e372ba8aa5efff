//! Makes a used TCP socket unconnected and unbound again.

use std::os::fd::{AsFd, OwnedFd};

use socket2::SockRef;

/// What became of a used socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is as the agent made it.
    Reset,
    /// Both sides have finished; the last acknowledgement is under way.
    Finishing,
    /// Its connection is not over, or the kernel would not.
    Unusable,
}

/// Resets a socket whose connection is over.
///
/// Rules of the kernel this rests on (`tcp_disconnect`, `tcp_set_state` and `__inet_bind` in net/ipv4): a
/// socket that both sides have finished, or that was reset, is in state CLOSE; `connect(AF_UNSPEC)` drops
/// its addresses; the port is let go because it was chosen by the kernel; mark, `IP_TRANSPARENT` and
/// `IP_BIND_ADDRESS_NO_PORT` stay. Sizes of its buffers that were set stay, too, until they are unlocked, which Linux can since
/// 5.15: before, no socket is used again.
pub(super) fn reset(socket: &OwnedFd) -> Outcome {
    match sys::state(socket.as_fd()) {
        Some(TCP_CLOSE) => {}
        Some(TCP_LAST_ACK | TCP_CLOSING) => return Outcome::Finishing,
        _ => return Outcome::Unusable,
    }
    let reference = SockRef::from(socket);
    let reset = sys::disconnect(socket.as_fd())
        // What the last connection died of must not be reported to the next.
        && reference.take_error().is_ok()
        && reference.set_linger(None).is_ok()
        // Ways to the outside are longer than one to an app.
        && sys::unlock_buffers(socket.as_fd());
    if reset {
        Outcome::Reset
    } else {
        Outcome::Unusable
    }
}

// States of the kernel's `tcp_states.h`.
const TCP_CLOSE: u8 = 7;
const TCP_LAST_ACK: u8 = 9;
const TCP_CLOSING: u8 = 11;

#[allow(unsafe_code)]
pub(super) mod sys {
    use std::os::fd::{AsRawFd, BorrowedFd};

    /// State of a TCP socket; `None` for any other descriptor.
    pub(super) fn state(socket: BorrowedFd<'_>) -> Option<u8> {
        let mut state = 0u8;
        let mut length: libc::socklen_t = 1;
        // SAFETY: the kernel writes at most `length` bytes, one, into `state`; the first byte of
        // `struct tcp_info` is the state. Both pointers are valid for the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut state).cast(),
                &raw mut length,
            )
        };
        (result == 0 && length == 1).then_some(state)
    }

    /// Lets the kernel choose the sizes of the buffers again.
    pub(super) fn unlock_buffers(socket: BorrowedFd<'_>) -> bool {
        let none: libc::c_int = 0;
        // SAFETY: the value is valid for the call and of the length that is passed.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_BUF_LOCK,
                (&raw const none).cast(),
                size_of_val(&none) as libc::socklen_t,
            )
        };
        result == 0
    }

    /// Whether sizes of the buffers were set.
    #[cfg(test)]
    pub(in crate::stock) fn are_buffers_locked(socket: BorrowedFd<'_>) -> bool {
        let mut locked: libc::c_int = -1;
        let mut length = size_of_val(&locked) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into `locked`. Both pointers are valid for the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_BUF_LOCK,
                (&raw mut locked).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        locked != 0
    }

    pub(super) fn disconnect(socket: BorrowedFd<'_>) -> bool {
        // AF_UNSPEC is zero, and so may all other bytes be.
        let unspecified = [0u8; size_of::<libc::sockaddr>()];
        // SAFETY: the address is valid for the call and of the length that is passed; only its family is read.
        let result = unsafe {
            libc::connect(
                socket.as_raw_fd(),
                unspecified.as_ptr().cast(),
                unspecified.len() as libc::socklen_t,
            )
        };
        result == 0
    }
}
