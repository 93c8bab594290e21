//! Follows the requests on a connection closely enough to know when it can be closed without losing one, and to tell
//! the client to open a new connection.
//!
//! # Why
//! A connection stays authenticated by the certificate of its handshake, so a rotation has to replace every
//! connection. Closing one that merely looks idle loses a request in flight: a client may retry it only if it is
//! idempotent (RFC 9110, section 9.2.2). So the proxy announces the change in the application protocol, and the
//! client closes the connection itself:
//!
//! * HTTP/2: a GOAWAY that refuses no stream. Open streams, watches included, run to completion; new requests go to a
//!   new connection. Go's and hyper's clients close the connection after its last stream.
//! * HTTP/1.1: `Connection: close` in the next response. An idle connection has no response to carry it, and is kept
//!   open for longer than Go keeps an idle connection.
//! * After an upgrade (exec, attach, port-forward) no announcement is possible, and the connection stays open until
//!   either side closes it.
//!
//! An API server accepts the old certificate until its notAfter, so there is time for all of this.

mod http1;
mod http2;

use http1::Http1;
use http2::Http2;

pub(super) enum RequestTracker {
    /// ALPN `h2`, or HTTP/2 with prior knowledge on a unix socket.
    Http2(Box<Http2>),
    /// Everything else. Turns opaque if it is not HTTP.
    Http1(Box<Http1>),
}

impl RequestTracker {
    /// A tracker for this application protocol (RFC 7301).
    pub(super) fn new(protocol: Option<&[u8]>) -> Self {
        match protocol {
            Some(b"h2") => Self::Http2(Box::default()),
            _ => Self::Http1(Box::default()),
        }
    }

    /// Observes bytes from the client.
    pub(super) fn observe_client(&mut self, bytes: &[u8]) {
        match self {
            Self::Http2(http2) => http2.observe_client(bytes),
            Self::Http1(http1) => http1.observe_client(bytes),
        }
    }

    /// Observes bytes from the server. If `announce` is set and possible, returns where in them to insert
    /// [`announcement`](Self::announcement).
    pub(super) fn observe_server(&mut self, bytes: &[u8], announce: bool) -> Option<usize> {
        match self {
            Self::Http2(http2) => http2.observe_server(bytes, announce),
            Self::Http1(http1) => http1.observe_server(bytes, announce),
        }
    }

    /// Whether to send [`announcement`](Self::announcement) now, between two messages of the server.
    pub(super) fn announce(&mut self) -> bool {
        match self {
            Self::Http2(http2) => http2.announce(),
            Self::Http1(_) => false,
        }
    }

    /// The bytes that tell the client to use another connection.
    pub(super) fn announcement(&self) -> &'static [u8] {
        match self {
            Self::Http2(_) => Http2::announcement(),
            Self::Http1(_) => Http1::announcement(),
        }
    }

    /// Whether [`announcement`](Self::announcement) has been sent, or the server has sent its own.
    pub(super) fn is_announced(&self) -> bool {
        match self {
            Self::Http2(http2) => http2.is_announced(),
            Self::Http1(http1) => http1.is_announced(),
        }
    }

    /// Whether no request is outstanding.
    pub(super) fn is_idle(&self) -> bool {
        match self {
            Self::Http2(http2) => http2.is_idle(),
            Self::Http1(http1) => http1.is_idle(),
        }
    }
}
