//! The credential proxy's end towards its client: where it is, and what the client needs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The credential proxy, as its client sees it.
#[derive(Clone, Copy, Debug)]
pub struct LocalServer<'a> {
    /// Where it listens.
    pub address: SocketAddr,
    /// What the client needs.
    pub files: &'a ClientFiles,
}

/// What the credential proxy's client authenticates with, and what it verifies the listener by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// The authority's certificate, PEM.
    pub certificate_authority: PathBuf,
    /// The client's certificate, PEM, mode 0600.
    pub certificate: PathBuf,
    /// The client's private key, PKCS#8 PEM, mode 0600.
    pub key: PathBuf,
}

impl ClientFiles {
    /// The files of the proxy with this runtime directory.
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            certificate_authority: directory.join("ca.crt"),
            certificate: directory.join("client.crt"),
            key: directory.join("client.key"),
        }
    }
}
