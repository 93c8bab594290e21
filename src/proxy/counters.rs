//! The proxy's counters, and its failure log, which is limited to one line per reason and minute.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::relay::BytesCopied;
use crate::telemetry::{Event, FailureReason, Statistics, Telemetry};

/// Minimum interval between two log lines of one reason. The next line counts the failures in between.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Reason {
    count: u64,
    logged: Option<(Instant, u64)>,
}

pub(super) struct Counters {
    pub(super) accepted: AtomicU64,
    pub(super) local_handshakes: AtomicU64,
    pub(super) local_resumptions: AtomicU64,
    pub(super) server_handshakes: AtomicU64,
    pub(super) copied: BytesCopied,
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
            copied: BytesCopied::default(),
            failures: std::array::from_fn(|_| Mutex::default()),
            telemetry,
        }
    }

    /// Counts a failure. Logs it unless a failure of the same reason was logged within [`LOG_INTERVAL`].
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
            bytes_to_server: read(&self.copied.to_server),
            bytes_to_client: read(&self.copied.to_client),
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
        for (position, reason) in FailureReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, position);
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
