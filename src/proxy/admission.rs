//! Limits the local handshakes in progress. At the limit, a new connection evicts the oldest one.
//!
//! An honest client completes its handshake in milliseconds. A client that opens connections and sends nothing (a
//! slow loris, possibly another user of the machine) therefore evicts its own older connections rather than the
//! kubelet's. The limit must stay below the limit on all connections: otherwise the listener would stop accepting
//! before anything is evicted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

#[derive(Default)]
struct Waiting {
    next: u64,
    evictions: BTreeMap<u64, oneshot::Sender<()>>,
}

/// All handshakes in progress.
pub(super) struct Admission {
    limit: usize,
    waiting: Mutex<Waiting>,
}

/// Counts a handshake as in progress until dropped.
pub(super) struct HandshakePermit {
    admission: Arc<Admission>,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl Admission {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), waiting: Mutex::default() }
    }

    /// Counts a new handshake, as the youngest. Call this in accept order: the connections' tasks may start in any
    /// order.
    pub(super) fn admit(self: &Arc<Self>) -> HandshakePermit {
        let (evict, evicted) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.evictions.len() >= self.limit {
            // Dropping the sender notifies the evicted handshake.
            waiting.evictions.pop_first();
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.evictions.insert(number, evict);
        HandshakePermit { admission: Arc::clone(self), number, evicted }
    }
}

impl HandshakePermit {
    /// Returns when this handshake has been evicted to make room for a newer one.
    pub(super) async fn evicted(&mut self) {
        let _ = (&mut self.evicted).await;
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        let mut waiting = self.admission.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.evictions.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_is_evicted_first() {
        let admission = Arc::new(Admission::new(2));
        let mut first = admission.admit();
        let second = admission.admit();
        drop(second);
        let mut third = admission.admit();
        let _fourth = admission.admit();
        first.evicted().await;
        drop(first);
        let waits = tokio::time::timeout(std::time::Duration::from_millis(10), third.evicted()).await;
        assert!(waits.is_err());
    }
}
