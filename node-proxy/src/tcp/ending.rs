//! How a connection ends when what holds it is dropped.

use std::ops::{Deref, DerefMut};

use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// Part of a connection, and what is to be done to the connection if that is dropped before it is [`Self::finished`]: a
/// writer in the middle of a message makes the end a reset, so that the receiver does not take what it got for the
/// whole, and what it does not read is not kept for it.
#[derive(Debug)]
pub struct Ending<T: AsRef<TcpStream>> {
    part: Option<T>,
    unfinished: fn(&TcpStream),
}

impl<T: AsRef<TcpStream>> Ending<T> {
    /// From now on.
    pub fn new(part: T, unfinished: fn(&TcpStream)) -> Self {
        Self {
            part: Some(part),
            unfinished,
        }
    }

    /// All was done that had to be.
    pub fn finished(mut self) -> T {
        self.part.take().expect(TAKEN)
    }
}

const TAKEN: &str = "taken only by what consumes the value";

impl<T: AsRef<TcpStream>> Deref for Ending<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.part.as_ref().expect(TAKEN)
    }
}

impl<T: AsRef<TcpStream>> DerefMut for Ending<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.part.as_mut().expect(TAKEN)
    }
}

impl<T: AsRef<TcpStream>> Drop for Ending<T> {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            (self.unfinished)(part.as_ref());
        }
    }
}

/// The writing half of a connection. Dropping it sends nothing, where the library's sends a FIN, before a reset too: the
/// connection ends with its reader.
#[derive(Debug)]
pub struct QuietHalf(Option<OwnedWriteHalf>);

impl QuietHalf {
    /// Of `half`.
    pub fn new(half: OwnedWriteHalf) -> Self {
        Self(Some(half))
    }

    /// The socket with the half that reads. None if they are not of one.
    pub fn reunite(mut self, read: OwnedReadHalf) -> Option<TcpStream> {
        read.reunite(self.0.take()?).ok()
    }
}

impl AsRef<TcpStream> for QuietHalf {
    fn as_ref(&self) -> &TcpStream {
        self.0.as_ref().expect(TAKEN).as_ref()
    }
}

impl Drop for QuietHalf {
    fn drop(&mut self) {
        if let Some(half) = self.0.take() {
            half.forget();
        }
    }
}
