//! The calls that wait for a backend's thread: bounded, each with the time after which nobody waits for its answer.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// How many signatures for TLS handshakes may wait. A device that signs slower than they come is asked for no more: the
/// handshakes fail at once, instead of after their deadline.
pub(super) const SIGNING_QUEUE: usize = 64;
/// How many other calls may wait. Each has a task of the agent, or a command, behind it.
const CALL_QUEUE: usize = 64;

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A signature that a TLS handshake blocks on.
    Handshake,
    /// Anything else.
    Call,
}

impl Purpose {
    fn limit(self) -> usize {
        match self {
            Self::Handshake => SIGNING_QUEUE,
            Self::Call => CALL_QUEUE,
        }
    }
}

/// A call that waits.
pub(super) struct Job<T> {
    /// When whoever asked for it stops waiting.
    pub(super) expires: Instant,
    /// What it is for.
    pub(super) purpose: Purpose,
    /// The call itself.
    pub(super) work: T,
}

impl<T> Job<T> {
    fn is_live(&self, now: Instant) -> bool {
        now < self.expires
    }
}

/// That as many calls wait as may.
pub(super) struct Full;

struct State<T> {
    jobs: VecDeque<Job<T>>,
    closed: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where calls are put. Dropping it ends the other end's loop once the calls that wait are done.
pub(super) struct Sender<T>(Arc<Shared<T>>);

/// Where the thread takes them from.
pub(super) struct Receiver<T>(Arc<Shared<T>>);

/// An empty queue.
pub(super) fn queue<T>() -> (Sender<T>, Receiver<T>) {
    let state = Mutex::new(State { jobs: VecDeque::new(), closed: false });
    let shared = Arc::new(Shared { state, changed: Condvar::new() });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    /// Puts a call at the end. What has expired takes no room.
    ///
    /// # Errors
    /// If as many calls for the same purpose wait as may.
    pub(super) fn send(&self, job: Job<T>) -> Result<(), Full> {
        let mut state = self.0.lock();
        if state.waiting(job.purpose) >= job.purpose.limit() {
            let now = Instant::now();
            state.jobs.retain(|waiting| waiting.is_live(now));
            if state.waiting(job.purpose) >= job.purpose.limit() {
                return Err(Full);
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }

    /// How many calls for this purpose wait, those that have expired included.
    #[cfg(test)]
    pub(super) fn waiting(&self, purpose: Purpose) -> usize {
        self.0.lock().waiting(purpose)
    }
}

impl<T> State<T> {
    fn waiting(&self, purpose: Purpose) -> usize {
        self.jobs.iter().filter(|job| job.purpose == purpose).count()
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_one();
    }
}

impl<T> Receiver<T> {
    /// The next call that somebody still waits for; blocks until there is one. `None` once there will be none.
    pub(super) fn next(&self) -> Option<T> {
        let mut state = self.0.lock();
        loop {
            while let Some(job) = state.jobs.pop_front() {
                if job.is_live(Instant::now()) {
                    return Some(job.work);
                }
            }
            if state.closed {
                return None;
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
