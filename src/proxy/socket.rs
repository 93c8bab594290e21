//! Client and server sockets, and their write buffer.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A stream socket of either family.
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Bytes that the socket has not accepted yet.
#[derive(Default)]
pub(super) struct WriteBuffer {
    buffer: Vec<u8>,
    sent: usize,
    filled: usize,
}

impl WriteBuffer {
    pub(super) fn is_empty(&self) -> bool {
        self.sent == self.filled
    }

    pub(super) fn unsent(&self) -> &[u8] {
        &self.buffer[self.sent..self.filled]
    }

    /// The number of bytes that fit without allocating.
    pub(super) fn spare(&self) -> usize {
        self.buffer.len() - self.filled
    }

    /// A buffer of `count` bytes to write to; [`fill`](Self::fill) then says how many were written.
    pub(super) fn room(&mut self, count: usize) -> &mut [u8] {
        let end = self.filled + count;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.filled..end]
    }

    pub(super) fn fill(&mut self, count: usize) {
        self.filled += count;
    }

    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.fill(bytes.len());
    }

    /// Writes until the buffer is empty or the socket would block.
    pub(super) fn poll_write_to(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            match ready!(Pin::new(&mut *socket).poll_write(cx, self.unsent()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.sent += written,
            }
        }
        self.clear();
        Poll::Ready(Ok(()))
    }

    pub(super) fn clear(&mut self) {
        (self.sent, self.filled) = (0, 0);
    }

    /// Moves the unsent bytes to `other`, and keeps the allocation.
    pub(super) fn move_unsent_to(&mut self, other: &mut Self) {
        other.extend(self.unsent());
        self.clear();
    }
}
