//! Copies what two sessions say to each other, both ways, until both have ended.
//!
//! The buffers belong to the threads of the runtime, not to the connections: an idle connection holds none, and one whose
//! reader is slow holds at most one reading's worth for it, and is not read further.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::conversation::Conversation;
use super::session::Session;
use super::socket::{Outbox, Socket};

/// What is read at once from a connection that has something to say now and then.
const SMALLEST_READ: usize = 16 << 10;
/// What is read at once from one that has much to say, and whose reader keeps up.
const LARGEST_READ: usize = 128 << 10;
/// The longest record on the wire (RFC 5246, section 6.2.3; RFC 8446 has shorter ones).
const LARGEST_RECORD: usize = 18_437 + 64;

struct Scratch {
    received: Vec<u8>,
    out: Outbox,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        RefCell::new(Scratch { received: vec![0; LARGEST_READ + LARGEST_RECORD], out: Outbox::default() });
}

/// A session and its socket.
pub(super) struct Endpoint {
    pub(super) socket: Socket,
    pub(super) session: Session,
}

impl Endpoint {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.session.outgoing.is_empty() {
            ready!(self.session.outgoing.poll_write_to(&mut self.socket, cx))?;
            self.session.outgoing = Outbox::default();
        }
        Poll::Ready(Ok(()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Open,
    /// All is read; the other side is told once it has all.
    Ending,
    Ended,
}

struct Direction {
    progress: Progress,
    read_size: usize,
}

impl Direction {
    fn new() -> Self {
        Self { progress: Progress::Open, read_size: SMALLEST_READ }
    }
}

/// Octets of plaintext copied, shared by all connections.
#[derive(Debug, Default)]
pub(super) struct Volume {
    pub(super) to_server: AtomicU64,
    pub(super) to_client: AtomicU64,
}

/// Two sessions that talk to each other.
pub(super) struct Relay {
    client: Endpoint,
    server: Endpoint,
    to_server: Direction,
    to_client: Direction,
    conversation: Conversation,
    draining: bool,
    /// Grows whenever something is copied.
    pub(super) activity: u64,
}

impl Relay {
    pub(super) fn new(client: Endpoint, server: Endpoint, conversation: Conversation) -> Self {
        let (to_server, to_client) = (Direction::new(), Direction::new());
        Self { client, server, to_server, to_client, conversation, draining: false, activity: 0 }
    }

    /// From now on, the client is told to use another connection as soon as there is a place for it.
    pub(super) fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether no request is under way, so that closing the connection loses nothing but what the client is about to send.
    pub(super) fn is_idle(&self) -> bool {
        self.conversation.is_idle()
    }

    /// Whether the client knows that it is to use another connection.
    pub(super) fn is_told(&self) -> bool {
        self.conversation.is_announced()
    }

    /// Whether the client has said that it sends no more.
    pub(super) fn client_has_closed(&self) -> bool {
        self.client.session.peer_closed
    }

    /// Whether one side has ended, and the other goes on.
    pub(super) fn is_half_closed(&self) -> bool {
        (self.to_server.progress == Progress::Ended) != (self.to_client.progress == Progress::Ended)
    }

    /// Ends both directions, as far as that can be said at once.
    pub(super) fn close(&mut self, cx: &mut Context<'_>) {
        for endpoint in [&mut self.client, &mut self.server] {
            endpoint.session.close();
            let _ = endpoint.poll_flush(cx);
            let _ = Pin::new(&mut endpoint.socket).poll_shutdown(cx);
        }
    }

    /// Copies until there is nothing to copy; ready when both directions have ended.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, volume: &Volume) -> Poll<io::Result<()>> {
        if self.draining && self.to_client.progress == Progress::Open && self.conversation.announce() {
            self.client.session.push(self.conversation.announcement()).map_err(io::Error::other)?;
        }
        let conversation = &mut self.conversation;
        let mut copied = 0;
        let to_server =
            poll_direction(cx, &mut self.client, &mut self.server, &mut self.to_server, &mut |bytes, server, out| {
                conversation.client_said(bytes);
                copied += bytes.len() as u64;
                server.encode(bytes, out)
            });
        count(&volume.to_server, copied);
        self.activity += copied;
        copied = 0;
        let draining = self.draining;
        let to_client =
            poll_direction(cx, &mut self.server, &mut self.client, &mut self.to_client, &mut |bytes, client, out| {
                copied += bytes.len() as u64;
                match conversation.server_said(bytes, draining) {
                    None => client.encode(bytes, out),
                    Some(place) => {
                        client.encode(&bytes[..place], out)?;
                        client.encode(conversation.announcement(), out)?;
                        client.encode(&bytes[place..], out)
                    }
                }
            });
        count(&volume.to_client, copied);
        self.activity += copied;
        // What TLS itself has to say to the client's side (a key update) came up after its turn.
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

type Forward<'a> = dyn FnMut(&[u8], &mut Session, &mut Outbox) -> Result<(), rustls::Error> + 'a;

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
            Progress::Ending => {
                if Pin::new(&mut to.socket).poll_shutdown(cx)?.is_pending() {
                    return Ok(Poll::Pending);
                }
                direction.progress = Progress::Ended;
                return Ok(Poll::Ready(()));
            }
            Progress::Ended => return Ok(Poll::Ready(())),
        }
        let step = SCRATCH.with_borrow_mut(|scratch| step(cx, from, to, direction, forward, scratch))?;
        if step.is_pending() {
            return Ok(Poll::Pending);
        }
    }
}

/// Reads once, and writes what that gives.
fn step(
    cx: &mut Context<'_>,
    from: &mut Endpoint,
    to: &mut Endpoint,
    direction: &mut Direction,
    forward: &mut Forward<'_>,
    scratch: &mut Scratch,
) -> io::Result<Poll<()>> {
    let Scratch { received, out } = scratch;
    // A connection that failed in the middle leaves something behind.
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
            // An end without close_notify may be a cut, and must not look like an end to the other side
            // (RFC 8446, section 6.1).
            if session.is_plain() {
                to.session.close();
            }
            direction.progress = Progress::Ending;
            return Ok(Poll::Ready(()));
        }
        if count == direction.read_size {
            direction.read_size = (direction.read_size * 2).min(LARGEST_READ);
        }
        received[..kept].copy_from_slice(&session.incoming);
        session.incoming.clear();
        let received = &mut received[..kept + count];
        let consumed =
            session.decode(received, &mut |bytes| forward(bytes, &mut to.session, out)).map_err(io::Error::other)?;
        let rest = &received[consumed..];
        if rest.len() > LARGEST_RECORD {
            return Err(io::Error::other("a TLS record that is too long"));
        }
        if rest.is_empty() {
            session.incoming = Vec::new();
        } else {
            session.incoming.extend_from_slice(rest);
        }
    }
    if out.poll_write_to(&mut to.socket, cx)?.is_pending() {
        // The reader does not keep up: what waits for it is kept small.
        out.spill(&mut to.session.outgoing);
        direction.read_size = SMALLEST_READ;
    }
    if from.session.peer_closed && from.session.pending.is_empty() {
        to.session.close();
        direction.progress = Progress::Ending;
    }
    Ok(Poll::Ready(()))
}
