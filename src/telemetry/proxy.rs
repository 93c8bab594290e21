//! The credential proxy's part of the status: its state, its statistics, and the reasons for failures.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The credential proxy of an identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// Where it listens.
    pub address: SocketAddr,
    /// The serial number of the certificate that new connections use; empty if there is none yet.
    pub serial: String,
    /// Why it cannot use the current certificate or kubeconfig; empty if it does.
    #[serde(default)]
    pub reason: String,
    /// Counters since the proxy was started.
    pub statistics: Statistics,
}

/// Why a connection failed. The values are an interface: a metric has them as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureReason {
    /// The local client did not finish its handshake in time.
    LocalHandshakeTimeout,
    /// The local client did not present a certificate.
    LocalCertificateMissing,
    /// The local client's certificate is not the one of this boot.
    LocalCertificateUnknown,
    /// The local client's TLS handshake failed for another reason.
    LocalHandshake,
    /// The peer of the unix socket is another user.
    PeerNotAllowed,
    /// Too many local handshakes were in progress, and this one was the oldest.
    TooManyHandshakes,
    /// There was no valid client certificate.
    NoCertificate,
    /// No API server accepted a connection in time.
    ServerUnreachable,
    /// No API server completed a handshake.
    ServerHandshake,
    /// The key did not sign in time, or not at all.
    KeyUnavailable,
    /// The API server negotiated a different application protocol than before.
    ProtocolChanged,
    /// The process had no file descriptor or memory for another connection.
    AcceptFailed,
    /// An open connection failed.
    Broken,
    /// Nothing was sent or received for the idle timeout.
    IdleTimeout,
    /// The certificate was about to expire, or the drain time was over, with requests outstanding.
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

    /// The value in the status, the log and the metrics.
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

    /// Whether it is logged. Failures of established connections are common and are only counted.
    pub(crate) fn is_logged(self) -> bool {
        !matches!(self, Self::Broken | Self::IdleTimeout)
    }
}

/// The proxy's counters since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statistics {
    /// Open connections by the serial number of their certificate.
    pub open_connections: BTreeMap<String, u64>,
    /// Local connections accepted.
    pub accepted: u64,
    /// Local handshakes completed.
    pub local_handshakes: u64,
    /// How many of them resumed a session.
    pub local_resumptions: u64,
    /// Handshakes with API servers completed.
    pub server_handshakes: u64,
    /// Bytes of plaintext copied to API servers.
    pub bytes_to_server: u64,
    /// Bytes of plaintext copied to local clients.
    pub bytes_to_client: u64,
    /// Failures by [`FailureReason::word`].
    pub failures: BTreeMap<String, u64>,
}
