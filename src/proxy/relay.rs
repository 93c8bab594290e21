//! Copies bytes between two sessions in both directions until both have closed.
//!
//! The buffers belong to the runtime's threads, not to the connections. An idle connection holds none. A connection
//! whose reader is slow holds at most one read's worth of bytes, and reads no more until they are written.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::request_tracker::RequestTracker;
use super::session::Session;
use super::socket::{Socket, WriteBuffer};

/// Read size of a connection with little traffic, in bytes.
const MINIMUM_READ: usize = 16 << 10;
/// Read size of a connection with much traffic whose reader keeps up, in bytes.
const MAXIMUM_READ: usize = 128 << 10;
/// The longest TLS record, in bytes (RFC 5246, section 6.2.3; records of RFC 8446 are shorter).
const MAXIMUM_RECORD: usize = 18_437 + 64;

struct Scratch {
    received: Vec<u8>,
    out: WriteBuffer,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        RefCell::new(Scratch { received: vec![0; MAXIMUM_READ + MAXIMUM_RECORD], out: WriteBuffer::default() });
}

pub(super) struct Endpoint {
    pub(super) socket: Socket,
    pub(super) session: Session,
}

impl Endpoint {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.session.outgoing.is_empty() {
            ready!(self.session.outgoing.poll_write_to(&mut self.socket, cx))?;
            self.session.outgoing = WriteBuffer::default();
        }
        Poll::Ready(Ok(()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Open,
    /// Everything has been read; the other side is closed once it has received it all.
    Closing,
    Closed,
}

struct Direction {
    progress: Progress,
    read_size: usize,
}

impl Direction {
    fn new() -> Self {
        Self { progress: Progress::Open, read_size: MINIMUM_READ }
    }
}

/// Bytes of plaintext copied, summed over all connections.
#[derive(Debug, Default)]
pub(super) struct BytesCopied {
    pub(super) to_server: AtomicU64,
    pub(super) to_client: AtomicU64,
}

/// A pair of sessions that are copied to each other.
pub(super) struct Relay {
    client: Endpoint,
    server: Endpoint,
    to_server: Direction,
    to_client: Direction,
    request_tracker: RequestTracker,
    draining: bool,
    /// Increases whenever bytes are copied.
    pub(super) activity: u64,
}

impl Relay {
    pub(super) fn new(client: Endpoint, server: Endpoint, request_tracker: RequestTracker) -> Self {
        let (to_server, to_client) = (Direction::new(), Direction::new());
        Self { client, server, to_server, to_client, request_tracker, draining: false, activity: 0 }
    }

    /// From now on, tells the client to use another connection at the next opportunity.
    pub(super) fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether no request is outstanding. Closing an idle connection can lose only a request that is still on its
    /// way.
    pub(super) fn is_idle(&self) -> bool {
        self.request_tracker.is_idle()
    }

    /// Whether the client has been told to use another connection.
    pub(super) fn is_announced(&self) -> bool {
        self.request_tracker.is_announced()
    }

    pub(super) fn client_has_closed(&self) -> bool {
        self.client.session.peer_closed
    }

    /// Whether exactly one direction has closed.
    pub(super) fn is_half_closed(&self) -> bool {
        (self.to_server.progress == Progress::Closed) != (self.to_client.progress == Progress::Closed)
    }

    /// Closes both directions without waiting: writes what the sockets accept now.
    pub(super) fn close(&mut self, cx: &mut Context<'_>) {
        for endpoint in [&mut self.client, &mut self.server] {
            endpoint.session.close();
            let _ = endpoint.poll_flush(cx);
            let _ = Pin::new(&mut endpoint.socket).poll_shutdown(cx);
        }
    }

    /// Copies until both sockets would block; ready when both directions have closed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, total: &BytesCopied) -> Poll<io::Result<()>> {
        if self.draining && self.to_client.progress == Progress::Open && self.request_tracker.announce() {
            self.client.session.push(self.request_tracker.announcement()).map_err(io::Error::other)?;
        }
        let request_tracker = &mut self.request_tracker;
        let mut copied = 0;
        let to_server =
            poll_direction(cx, &mut self.client, &mut self.server, &mut self.to_server, &mut |bytes, server, out| {
                request_tracker.observe_client(bytes);
                copied += bytes.len() as u64;
                server.encode(bytes, out)
            });
        count(&total.to_server, copied);
        self.activity += copied;
        copied = 0;
        let draining = self.draining;
        let to_client =
            poll_direction(cx, &mut self.server, &mut self.client, &mut self.to_client, &mut |bytes, client, out| {
                copied += bytes.len() as u64;
                match request_tracker.observe_server(bytes, draining) {
                    None => client.encode(bytes, out),
                    Some(place) => {
                        client.encode(&bytes[..place], out)?;
                        client.encode(request_tracker.announcement(), out)?;
                        client.encode(&bytes[place..], out)
                    }
                }
            });
        count(&total.to_client, copied);
        self.activity += copied;
        // TLS may have queued messages of its own (a key update) for the server while the other direction was copied.
        let _ = self.server.poll_flush(cx)?;
        match (to_server?, to_client?) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    }
}

fn count(total: &AtomicU64, copied: u64) {
    if copied > 0 {
        total.fetch_add(copied, Ordering::Relaxed);
    }
}

type Forward<'a> = dyn FnMut(&[u8], &mut Session, &mut WriteBuffer) -> Result<(), rustls::Error> + 'a;

fn poll_direction(
    cx: &mut Context<'_>,
    from: &mut Endpoint,
    to: &mut Endpoint,
    direction: &mut Direction,
    forward: &mut Forward<'_>,
) -> io::Result<Poll<()>> {
    loop {
        if to.poll_flush(cx)?.is_pending() {
            return Ok(Poll::Pending);
        }
        match direction.progress {
            Progress::Open => {}
            Progress::Closing => {
                if Pin::new(&mut to.socket).poll_shutdown(cx)?.is_pending() {
                    return Ok(Poll::Pending);
                }
                direction.progress = Progress::Closed;
                return Ok(Poll::Ready(()));
            }
            Progress::Closed => return Ok(Poll::Ready(())),
        }
        let step = SCRATCH.with_borrow_mut(|scratch| step(cx, from, to, direction, forward, scratch))?;
        if step.is_pending() {
            return Ok(Poll::Pending);
        }
    }
}

/// Reads once and writes the result.
fn step(
    cx: &mut Context<'_>,
    from: &mut Endpoint,
    to: &mut Endpoint,
    direction: &mut Direction,
    forward: &mut Forward<'_>,
    scratch: &mut Scratch,
) -> io::Result<Poll<()>> {
    let Scratch { received, out } = scratch;
    // A connection that failed earlier may have left bytes in this shared buffer.
    out.clear();
    let Endpoint { session, socket } = from;
    if !session.pending.is_empty() {
        let pending = std::mem::take(&mut session.pending);
        forward(&pending, &mut to.session, out).map_err(io::Error::other)?;
    } else if !session.peer_closed {
        let kept = session.incoming.len();
        let mut buffer = ReadBuf::new(&mut received[kept..kept + direction.read_size]);
        if Pin::new(socket).poll_read(cx, &mut buffer)?.is_pending() {
            return Ok(Poll::Pending);
        }
        let count = buffer.filled().len();
        if count == 0 {
            // EOF without close_notify may be a truncation, so no close_notify is sent to the other side (RFC 8446,
            // section 6.1).
            if session.is_plain() {
                to.session.close();
            }
            direction.progress = Progress::Closing;
            return Ok(Poll::Ready(()));
        }
        if count == direction.read_size {
            direction.read_size = (direction.read_size * 2).min(MAXIMUM_READ);
        }
        received[..kept].copy_from_slice(&session.incoming);
        session.incoming.clear();
        let received = &mut received[..kept + count];
        let consumed =
            session.decode(received, &mut |bytes| forward(bytes, &mut to.session, out)).map_err(io::Error::other)?;
        let rest = &received[consumed..];
        if rest.len() > MAXIMUM_RECORD {
            return Err(io::Error::other("a TLS record is too long"));
        }
        if rest.is_empty() {
            session.incoming = Vec::new();
        } else {
            session.incoming.extend_from_slice(rest);
        }
    }
    if out.poll_write_to(&mut to.socket, cx)?.is_pending() {
        // The reader is slow: keep the bytes that wait for it few.
        out.move_unsent_to(&mut to.session.outgoing);
        direction.read_size = MINIMUM_READ;
    }
    if from.session.peer_closed && from.session.pending.is_empty() {
        to.session.close();
        direction.progress = Progress::Closing;
    }
    Ok(Poll::Ready(()))
}
