//! Connections that have not shown who they are: only so many, and when there are more, the oldest has to go.
//!
//! A client that means well is through its handshake in milliseconds. One that opens connections and says nothing (a
//! slow loris, or any other user of the machine) crowds out its own older ones, not the kubelet. It must not have all the
//! connections that there may be, either: nobody would be accepted then for whom an older one could go.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

#[derive(Default)]
struct Waiting {
    next: u64,
    evictions: BTreeMap<u64, oneshot::Sender<()>>,
}

/// The connections within their handshake.
pub(super) struct Admission {
    limit: usize,
    waiting: Mutex<Waiting>,
}

/// A place among them.
pub(super) struct Place {
    admission: Arc<Admission>,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl Admission {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), waiting: Mutex::default() }
    }

    /// Takes a place, the youngest. To be called where connections are accepted, one after the other: the tasks that live
    /// their lives may begin in any order.
    pub(super) fn enter(self: &Arc<Self>) -> Place {
        let (evict, evicted) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.evictions.len() >= self.limit {
            // Dropping the sender is the word.
            waiting.evictions.pop_first();
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.evictions.insert(number, evict);
        Place { admission: Arc::clone(self), number, evicted }
    }
}

impl Place {
    /// Returns when this place is needed for somebody else.
    pub(super) async fn evicted(&mut self) {
        let _ = (&mut self.evicted).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.admission.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.evictions.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_goes_first() {
        let admission = Arc::new(Admission::new(2));
        let mut first = admission.enter();
        let second = admission.enter();
        drop(second);
        let mut third = admission.enter();
        let _fourth = admission.enter();
        first.evicted().await;
        drop(first);
        let waits = tokio::time::timeout(std::time::Duration::from_millis(10), third.evicted()).await;
        assert!(waits.is_err());
    }
}
