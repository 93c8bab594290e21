//! The credential proxy in the status: how it stands, what it has done, and why connections failed.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The credential proxy of an identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// Where it listens.
    pub address: SocketAddr,
    /// The serial number of the certificate that new connections speak as; empty while there is none.
    pub serial: String,
    /// Why it cannot follow the certificate or the kubeconfig; empty if it does.
    #[serde(default)]
    pub reason: String,
    /// What it has done since it was started.
    pub statistics: Statistics,
}

/// Why a connection failed. The words are an interface: metrics have them as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureReason {
    /// The local client did not finish its handshake in time.
    LocalHandshakeTimeout,
    /// The local client did not present a certificate.
    LocalCertificateMissing,
    /// The local client's certificate is not the one of this boot.
    LocalCertificateUnknown,
    /// The local client does not speak TLS as it should.
    LocalHandshake,
    /// The peer of the unix socket is another user.
    PeerNotAllowed,
    /// More local clients began a handshake than are allowed at once; the oldest had to go.
    TooManyHandshakes,
    /// There was no certificate to speak with.
    NoCertificate,
    /// No API server accepted a connection in time.
    ServerUnreachable,
    /// No API server came through a handshake.
    ServerHandshake,
    /// The key did not sign, or not in time.
    KeyUnavailable,
    /// The API server settled on another application protocol than before.
    ProtocolChanged,
    /// The system had no descriptor, or no memory, for another connection.
    AcceptFailed,
    /// An open connection broke.
    Broken,
    /// Nothing came for the idle timeout.
    IdleTimeout,
    /// The certificate, or the time to drain, ended with requests under way.
    CutAtEnd,
}

impl FailureReason {
    pub(crate) const ALL: [Self; 15] = [
        Self::LocalHandshakeTimeout,
        Self::LocalCertificateMissing,
        Self::LocalCertificateUnknown,
        Self::LocalHandshake,
        Self::PeerNotAllowed,
        Self::TooManyHandshakes,
        Self::NoCertificate,
        Self::ServerUnreachable,
        Self::ServerHandshake,
        Self::KeyUnavailable,
        Self::ProtocolChanged,
        Self::AcceptFailed,
        Self::Broken,
        Self::IdleTimeout,
        Self::CutAtEnd,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::LocalHandshakeTimeout => "local-handshake-timeout",
            Self::LocalCertificateMissing => "local-certificate-missing",
            Self::LocalCertificateUnknown => "local-certificate-unknown",
            Self::LocalHandshake => "local-handshake",
            Self::PeerNotAllowed => "peer-not-allowed",
            Self::TooManyHandshakes => "too-many-handshakes",
            Self::NoCertificate => "no-certificate",
            Self::ServerUnreachable => "server-unreachable",
            Self::ServerHandshake => "server-handshake",
            Self::KeyUnavailable => "key-unavailable",
            Self::ProtocolChanged => "protocol-changed",
            Self::AcceptFailed => "accept-failed",
            Self::Broken => "broken",
            Self::IdleTimeout => "idle-timeout",
            Self::CutAtEnd => "cut-at-end",
        }
    }

    /// Whether it is worth a line in the log: connections that end by themselves are not.
    pub(crate) fn is_logged(self) -> bool {
        !matches!(self, Self::Broken | Self::IdleTimeout)
    }
}

/// What the proxy has done since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statistics {
    /// Open connections by the serial number of the certificate that each speaks as.
    pub open_connections: BTreeMap<String, u64>,
    /// Local connections accepted.
    pub accepted: u64,
    /// Local handshakes completed.
    pub local_handshakes: u64,
    /// Those of them that resumed a session.
    pub local_resumptions: u64,
    /// Handshakes with API servers completed.
    pub server_handshakes: u64,
    /// Bytes of plaintext copied to API servers.
    pub bytes_to_server: u64,
    /// Bytes of plaintext copied to local clients.
    pub bytes_to_client: u64,
    /// Failures by reason.
    pub failures: BTreeMap<String, u64>,
}
