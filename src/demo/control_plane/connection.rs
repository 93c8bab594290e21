//! Per-connection state.

use std::sync::atomic::{AtomicBool, Ordering};

use rustls::pki_types::CertificateDer;

/// The state of a connection that its requests share.
pub(super) struct Connection {
    /// The client's certificates, leaf first. The handshake has proved possession of the leaf's key and nothing else.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// Set by the first authenticated request.
    pub(super) authenticated: AtomicBool,
}

impl Connection {
    /// Returns true the first time only.
    pub(super) fn first_authentication(&self) -> bool {
        !self.authenticated.swap(true, Ordering::Relaxed)
    }
}
