//! TLS over a socket, without buffers of its own while nothing is in flight.
//!
//! Uses rustls' unbuffered connections: an idle connection holds little more than its keys, and a busy one borrows
//! the buffers of the thread that it runs on (see [`super::relay`]).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::socket::{Socket, WriteBuffer};

enum Tls {
    Server(Box<UnbufferedServerConnection>),
    Client(Box<UnbufferedClientConnection>),
    /// Plaintext, on a unix socket, whose peer the kernel has authenticated.
    None,
}

#[derive(Debug)]
pub(super) enum HandshakeError {
    /// The socket failed.
    Io(io::Error),
    /// A TLS alert, a certificate error, or a signing error.
    Tls(rustls::Error),
    /// Too many other handshakes wait for the key.
    KeyBusy,
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl std::fmt::Display for HandshakeError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => write!(formatter, "{error}"),
            Self::Tls(error) => write!(formatter, "{error}"),
            Self::KeyBusy => formatter.write_str("the key is busy"),
        }
    }
}

/// One side of a proxied connection.
pub(super) struct Session {
    tls: Tls,
    /// Received bytes that are not a complete record yet.
    pub(super) incoming: Vec<u8>,
    /// Bytes that the socket has not accepted yet.
    pub(super) outgoing: WriteBuffer,
    /// Plaintext received together with the last handshake message.
    pub(super) pending: Vec<u8>,
    /// The peer has sent close_notify (RFC 8446, section 6.1).
    pub(super) peer_closed: bool,
}

impl Session {
    /// A session without TLS. `pending` has already been received.
    pub(super) fn plain(pending: Vec<u8>) -> Self {
        Self { tls: Tls::None, incoming: Vec::new(), outgoing: WriteBuffer::default(), pending, peer_closed: false }
    }

    /// The server side of TLS. `incoming` has already been received.
    pub(super) fn server(config: Arc<ServerConfig>, incoming: Vec<u8>) -> Result<Self, rustls::Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Self { tls: Tls::Server(Box::new(connection)), incoming, ..Self::plain(Vec::new()) })
    }

    /// The client side of TLS.
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, rustls::Error> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Self { tls: Tls::Client(Box::new(connection)), ..Self::plain(Vec::new()) })
    }

    pub(super) fn is_plain(&self) -> bool {
        matches!(self.tls, Tls::None)
    }

    /// The negotiated parameters; `None` without TLS.
    pub(super) fn common(&self) -> Option<&CommonState> {
        let common: &CommonState = match &self.tls {
            Tls::Server(connection) => connection,
            Tls::Client(connection) => connection,
            Tls::None => return None,
        };
        Some(common)
    }

    /// Completes the handshake. Holds a permit of `signing` whenever the key may sign, which blocks the thread, and
    /// waits for the permit at most as long as a signature may take.
    pub(super) async fn handshake(
        &mut self,
        socket: &mut Socket,
        signing: Option<(&Semaphore, Duration)>,
    ) -> Result<(), HandshakeError> {
        loop {
            let result = {
                let _permit = match signing {
                    Some((signing, limit)) => {
                        let permit = tokio::time::timeout(limit, signing.acquire()).await;
                        Some(permit.map_err(|_| HandshakeError::KeyBusy)?)
                    }
                    None => None,
                };
                self.advance()
            };
            // Written even if the handshake has failed: it may contain an alert.
            let done = std::mem::take(&mut self.outgoing);
            let written = socket.write_all(done.unsent()).await;
            result.map_err(HandshakeError::Tls)?;
            written?;
            if self.common().is_none_or(|common| !common.is_handshaking()) {
                if self.incoming.is_empty() {
                    self.incoming = Vec::new();
                }
                return Ok(());
            }
            self.incoming.reserve(4096);
            if socket.read_buf(&mut self.incoming).await? == 0 {
                return Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    fn advance(&mut self) -> Result<(), rustls::Error> {
        let mut received = std::mem::take(&mut self.incoming);
        let mut early = Vec::new();
        let result = self.decode(&mut received, &mut |bytes| {
            early.extend_from_slice(bytes);
            Ok(())
        });
        self.pending.append(&mut early);
        received.drain(..result?);
        self.incoming = received;
        Ok(())
    }

    /// Decrypts `received`, passes each piece of plaintext to `sink`, and returns the number of bytes consumed. Pass
    /// the rest again, followed by the bytes received next.
    pub(super) fn decode(
        &mut self,
        received: &mut [u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), rustls::Error>,
    ) -> Result<usize, rustls::Error> {
        match &mut self.tls {
            Tls::Server(connection) => {
                decode(connection.as_mut(), received, &mut self.outgoing, &mut self.peer_closed, sink)
            }
            Tls::Client(connection) => {
                decode(connection.as_mut(), received, &mut self.outgoing, &mut self.peer_closed, sink)
            }
            Tls::None => sink(received).map(|()| received.len()),
        }
    }

    /// Encrypts plaintext for the peer into `out`.
    pub(super) fn encode(&mut self, plaintext: &[u8], out: &mut WriteBuffer) -> Result<(), rustls::Error> {
        if plaintext.is_empty() {
            return Ok(());
        }
        let (incoming, pending, closed) = (&mut self.incoming, &mut self.pending, &mut self.peer_closed);
        match &mut self.tls {
            Tls::Server(connection) => encode(connection.as_mut(), Some(plaintext), incoming, out, pending, closed),
            Tls::Client(connection) => encode(connection.as_mut(), Some(plaintext), incoming, out, pending, closed),
            Tls::None => {
                out.extend(plaintext);
                Ok(())
            }
        }
    }

    /// Encrypts plaintext and appends it to the outgoing bytes.
    pub(super) fn push(&mut self, plaintext: &[u8]) -> Result<(), rustls::Error> {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        let result = self.encode(plaintext, &mut outgoing);
        self.outgoing = outgoing;
        result
    }

    /// Queues close_notify.
    pub(super) fn close(&mut self) {
        let (incoming, pending, closed) = (&mut self.incoming, &mut self.pending, &mut self.peer_closed);
        // If close_notify cannot be encrypted, the connection is closed without one.
        let _ = match &mut self.tls {
            Tls::Server(connection) => encode(connection.as_mut(), None, incoming, &mut self.outgoing, pending, closed),
            Tls::Client(connection) => encode(connection.as_mut(), None, incoming, &mut self.outgoing, pending, closed),
            Tls::None => Ok(()),
        };
    }
}

/// The common interface of rustls' unbuffered client and server connections.
trait Records {
    type Data;
    fn process<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn has_output(&self) -> bool;
}

impl Records for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn has_output(&self) -> bool {
        self.wants_write()
    }
}

impl Records for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn has_output(&self) -> bool {
        self.wants_write()
    }
}

fn decode<R: Records>(
    records: &mut R,
    received: &mut [u8],
    outgoing: &mut WriteBuffer,
    peer_closed: &mut bool,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), rustls::Error>,
) -> Result<usize, rustls::Error> {
    let mut consumed = 0;
    loop {
        let UnbufferedStatus { discard, state } = records.process(&mut received[consumed..]);
        let mut done = discard;
        let state = match state {
            Ok(state) => state,
            Err(error) => {
                // The error's alert, if the peer can be sent one. Nothing else is encoded: the connection has failed.
                let rest = &mut received[consumed + discard..];
                if records.has_output()
                    && let Ok(ConnectionState::EncodeTlsData(mut alert)) = records.process(rest).state
                {
                    put(outgoing, |room| alert.encode(room))?;
                }
                return Err(error);
            }
        };
        let more = match state {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    sink(record.payload)?;
                    done += record.discard;
                }
                true
            }
            ConnectionState::EncodeTlsData(mut data) => {
                put(outgoing, |room| data.encode(room))?;
                true
            }
            ConnectionState::TransmitTlsData(data) => {
                data.done();
                true
            }
            ConnectionState::PeerClosed => {
                *peer_closed = true;
                true
            }
            // Nothing more can be decoded until more bytes arrive.
            _ => false,
        };
        consumed += done;
        if !more {
            return Ok(consumed);
        }
    }
}

/// Encrypts `plaintext`, or a close_notify if there is none.
fn encode<R: Records>(
    records: &mut R,
    plaintext: Option<&[u8]>,
    incoming: &mut Vec<u8>,
    out: &mut WriteBuffer,
    pending: &mut Vec<u8>,
    peer_closed: &mut bool,
) -> Result<(), rustls::Error> {
    loop {
        // rustls refers to a partial handshake message by its offset in `incoming`, so it must be passed again.
        let UnbufferedStatus { discard, state } = records.process(incoming);
        let mut done = discard;
        let finished = match state? {
            ConnectionState::WriteTraffic(mut traffic) => {
                match plaintext {
                    Some(plaintext) => put(out, |room| traffic.encrypt(plaintext, room))?,
                    None => put(out, |room| traffic.queue_close_notify(room))?,
                }
                true
            }
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    pending.extend_from_slice(record.payload);
                    done += record.discard;
                }
                false
            }
            ConnectionState::EncodeTlsData(mut data) => {
                put(out, |room| data.encode(room))?;
                false
            }
            ConnectionState::TransmitTlsData(data) => {
                data.done();
                false
            }
            ConnectionState::PeerClosed => {
                *peer_closed = true;
                false
            }
            _ => return Err(rustls::Error::General("the TLS connection takes no more data".to_owned())),
        };
        incoming.drain(..done);
        if finished {
            return Ok(());
        }
    }
}

/// Lets rustls write to a buffer, and grows it as required.
fn put<E: Into<Refused>>(
    out: &mut WriteBuffer,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
) -> Result<(), rustls::Error> {
    let mut room = out.spare();
    loop {
        match write(out.room(room)).map_err(Into::into) {
            Ok(written) => {
                out.fill(written);
                return Ok(());
            }
            Err(Refused::TooSmall(InsufficientSizeError { required_size })) if required_size > room => {
                room = required_size;
            }
            Err(_) => return Err(rustls::Error::EncryptError),
        }
    }
}

enum Refused {
    TooSmall(InsufficientSizeError),
    Exhausted,
}

impl From<EncodeError> for Refused {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::InsufficientSize(size) => Self::TooSmall(size),
            EncodeError::AlreadyEncoded => Self::Exhausted,
        }
    }
}

impl From<EncryptError> for Refused {
    fn from(error: EncryptError) -> Self {
        match error {
            EncryptError::InsufficientSize(size) => Self::TooSmall(size),
            EncryptError::EncryptExhausted => Self::Exhausted,
        }
    }
}
