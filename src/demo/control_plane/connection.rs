//! A client's connection.

use std::sync::atomic::{AtomicBool, Ordering};

use rustls::pki_types::CertificateDer;

/// What a request can know about the connection that it came by.
pub(super) struct Connection {
    /// The client's certificates, leaf first; the handshake proved possession of the leaf's key, no more.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// Set by the first request that was authenticated.
    pub(super) introduced: AtomicBool,
}

impl Connection {
    /// True once.
    pub(super) fn introduce(&self) -> bool {
        !self.introduced.swap(true, Ordering::Relaxed)
    }
}
