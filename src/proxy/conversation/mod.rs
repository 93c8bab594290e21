//! What client and server say to each other, followed just closely enough to know a moment at which nobody loses
//! anything when the connection ends, and to tell the client beforehand.
//!
//! # Why
//! A connection speaks as the certificate of its handshake for as long as it lives, so at a rotation every connection
//! has to be replaced. Closing one at a moment that merely looks quiet loses the request that is just on its way: a
//! client may repeat it only if it is idempotent (RFC 9110, section 9.2.2). So the client is told first, in the words
//! of its protocol, and closes by itself:
//!
//! * HTTP/2: a GOAWAY that refuses no stream. Requests that are under way end where they are, watches included; new
//!   ones go to a new connection. Go's and hyper's clients close the connection after its last stream.
//! * HTTP/1.1: `Connection: close` in the next answer. While none is due, nothing can be said, and the connection is left
//!   to the client for longer than Go's keep one that they do not use.
//! * After an upgrade (exec, attach, port-forward) there are no words for it, and the connection is left to its end.
//!
//! An API server accepts the old certificate until its notAfter, so there is time for all of this.

mod http1;
mod http2;

use http1::Http1;
use http2::Http2;

/// A connection's conversation.
pub(super) enum Conversation {
    /// ALPN `h2`, or the prior knowledge of a client on a unix socket.
    Http2(Box<Http2>),
    /// Everything else, until it turns out not to be HTTP.
    Http1(Box<Http1>),
}

impl Conversation {
    /// The conversation in this application protocol (RFC 7301).
    pub(super) fn new(protocol: Option<&[u8]>) -> Self {
        match protocol {
            Some(b"h2") => Self::Http2(Box::default()),
            _ => Self::Http1(Box::default()),
        }
    }

    /// Follows what the client says.
    pub(super) fn client_said(&mut self, bytes: &[u8]) {
        match self {
            Self::Http2(http2) => http2.client_said(bytes),
            Self::Http1(http1) => http1.client_said(bytes),
        }
    }

    /// Follows what the server says. With `announce`, where in it [`announcement`](Self::announcement) is to be inserted,
    /// if that is possible.
    pub(super) fn server_said(&mut self, bytes: &[u8], announce: bool) -> Option<usize> {
        match self {
            Self::Http2(http2) => http2.server_said(bytes, announce),
            Self::Http1(http1) => http1.server_said(bytes, announce),
        }
    }

    /// Whether [`announcement`](Self::announcement) is to be sent at once, between what the server says.
    pub(super) fn announce(&mut self) -> bool {
        match self {
            Self::Http2(http2) => http2.announce(),
            Self::Http1(_) => false,
        }
    }

    /// What tells the client to use another connection.
    pub(super) fn announcement(&self) -> &'static [u8] {
        match self {
            Self::Http2(_) => Http2::announcement(),
            Self::Http1(_) => Http1::announcement(),
        }
    }

    /// Whether [`announcement`](Self::announcement) has been sent, or the server has said the same by itself.
    pub(super) fn is_announced(&self) -> bool {
        match self {
            Self::Http2(http2) => http2.is_announced(),
            Self::Http1(http1) => http1.is_announced(),
        }
    }

    /// Whether no request is under way.
    pub(super) fn is_idle(&self) -> bool {
        match self {
            Self::Http2(http2) => http2.is_idle(),
            Self::Http1(http1) => http1.is_idle(),
        }
    }
}
