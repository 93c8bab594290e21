//! Tasks, threads and time limits of this machine.

use std::future::Future;
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};

/// Has a task run beside the others.
pub fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(future)
}

/// Has a task run beside the others, and the set wait for it; it is aborted when the set is dropped.
pub fn spawn_in<T: Send + 'static>(set: &mut JoinSet<T>, future: impl Future<Output = T> + Send + 'static) {
    set.spawn(future);
}

/// Has a thread of its own do what may block for as long as it likes; within this runtime.
pub fn spawn_thread(work: impl FnOnce() + Send + 'static) {
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || {
        let _entered = runtime.enter();
        work();
    });
}

/// Waits this long.
pub async fn sleep(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// What comes of this within the limit.
///
/// # Errors
/// If nothing does; the future is then dropped.
pub async fn timeout<T>(limit: Duration, future: impl Future<Output = T>) -> Result<T, TimedOut> {
    tokio::time::timeout(limit, future).await.map_err(|_| TimedOut)
}

/// That nothing came within a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedOut;
