//! What the proxy counts, and what it says about failures: each reason at most once a minute.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::relay::Volume;
use crate::telemetry::{Event, Telemetry};

/// A reason is logged at most this often; what came in between is counted in the next line.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

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
    const ALL: [Self; 15] = [
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
    fn is_logged(self) -> bool {
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
    /// Octets of plaintext copied to API servers.
    pub bytes_to_server: u64,
    /// Octets of plaintext copied to local clients.
    pub bytes_to_client: u64,
    /// Failures by reason.
    pub failures: BTreeMap<String, u64>,
}

#[derive(Default)]
struct Reason {
    count: u64,
    logged: Option<(Instant, u64)>,
}

/// Counts.
pub(super) struct Counters {
    pub(super) accepted: AtomicU64,
    pub(super) local_handshakes: AtomicU64,
    pub(super) local_resumptions: AtomicU64,
    pub(super) server_handshakes: AtomicU64,
    pub(super) volume: Volume,
    failures: [Mutex<Reason>; FailureReason::ALL.len()],
    telemetry: Arc<Telemetry>,
}

impl Counters {
    pub(super) fn new(telemetry: Arc<Telemetry>) -> Self {
        Self {
            accepted: AtomicU64::default(),
            local_handshakes: AtomicU64::default(),
            local_resumptions: AtomicU64::default(),
            server_handshakes: AtomicU64::default(),
            volume: Volume::default(),
            failures: std::array::from_fn(|_| Mutex::default()),
            telemetry,
        }
    }

    /// Counts a failure, and logs it unless the same reason was logged a short while ago.
    pub(super) fn failed(&self, reason: FailureReason, detail: &str) {
        let line = {
            let mut known = self.failures[reason as usize].lock().unwrap_or_else(PoisonError::into_inner);
            known.count += 1;
            let since = match known.logged {
                Some((at, _)) if at.elapsed() < LOG_INTERVAL => None,
                Some((_, count)) => Some(count),
                None => Some(0),
            };
            since.filter(|_| reason.is_logged()).map(|before| {
                known.logged = Some((Instant::now(), known.count));
                known.count - before
            })
        };
        if let Some(count) = line {
            self.telemetry.emit(Event::ProxyFailed { reason: reason.word(), detail: detail.to_owned(), count });
        }
    }

    pub(super) fn snapshot(&self, open_connections: BTreeMap<String, u64>) -> Statistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let failures = FailureReason::ALL.iter().filter_map(|reason| {
            let count = self.failures[*reason as usize].lock().unwrap_or_else(PoisonError::into_inner).count;
            (count > 0).then(|| (reason.word().to_owned(), count))
        });
        Statistics {
            open_connections,
            accepted: read(&self.accepted),
            local_handshakes: read(&self.local_handshakes),
            local_resumptions: read(&self.local_resumptions),
            server_handshakes: read(&self.server_handshakes),
            bytes_to_server: read(&self.volume.to_server),
            bytes_to_client: read(&self.volume.to_client),
            failures: failures.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Log;

    #[test]
    fn each_reason_is_counted_and_logged_once_a_minute() {
        let telemetry = Arc::new(Telemetry::new(Log::silent()));
        let mut events = telemetry.events();
        let counters = Counters::new(telemetry);
        for (place, reason) in FailureReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
            counters.failed(reason, "once");
            counters.failed(reason, "twice");
            assert_eq!(counters.snapshot(BTreeMap::new()).failures[reason.word()], 2);
        }
        let mut logged = 0;
        while events.try_recv().is_ok() {
            logged += 1;
        }
        assert_eq!(logged, FailureReason::ALL.iter().filter(|reason| reason.is_logged()).count());
    }
}
