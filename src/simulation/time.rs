//! Virtual time, and the executor that drives the nodes by it: when nothing is ready, time jumps to the next timer.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// Monotonic time in milliseconds since the simulation began.
pub(super) type Instant = u64;

/// The timers of everything that sleeps.
#[derive(Default)]
pub(super) struct Timers {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    now: Instant,
    order: u64,
    waiting: BinaryHeap<Reverse<Timer>>,
}

struct Timer {
    at: Instant,
    order: u64,
    waker: Waker,
    /// Gone once nobody waits for it any more.
    sleeper: Weak<()>,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl Timers {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A simulated crash unwinds through whoever holds this.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Instant {
        self.inner().now
    }

    /// Waits until this instant.
    pub(super) fn sleep_until(self: &Arc<Self>, at: Instant) -> Sleep {
        Sleep { timers: Arc::clone(self), at, registered: None }
    }

    /// Waits this long.
    pub(super) fn sleep(self: &Arc<Self>, duration: Duration) -> Sleep {
        let milliseconds = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.sleep_until(self.now().saturating_add(milliseconds))
    }

    /// Wakes everything that sleeps, so that it looks at the world again.
    pub(super) fn wake_all(&self) {
        let wakers: Vec<Waker> = self.inner().waiting.iter().map(|Reverse(timer)| timer.waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Jumps to the next timer and wakes its sleeper; false if nobody sleeps.
    fn advance(&self) -> bool {
        let next = {
            let mut inner = self.inner();
            loop {
                match inner.waiting.pop() {
                    Some(Reverse(timer)) if timer.sleeper.strong_count() == 0 => {}
                    Some(Reverse(timer)) => {
                        inner.now = inner.now.max(timer.at);
                        break Some(timer);
                    }
                    None => break None,
                }
            }
        };
        next.map(|timer| timer.waker.wake()).is_some()
    }
}

/// A wait for an instant.
pub(super) struct Sleep {
    timers: Arc<Timers>,
    at: Instant,
    registered: Option<Arc<()>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let timers = Arc::clone(&self.timers);
        let mut inner = timers.inner();
        if inner.now >= self.at {
            return Poll::Ready(());
        }
        if self.registered.is_none() {
            let sleeper = Arc::new(());
            let waiting = Arc::downgrade(&sleeper);
            self.registered = Some(sleeper);
            inner.order += 1;
            let timer = Timer { at: self.at, order: inner.order, waker: context.waker().clone(), sleeper: waiting };
            inner.waiting.push(Reverse(timer));
        }
        Poll::Pending
    }
}

/// The power of a node went, or its process was killed: unwinds from whichever call it happened in to the executor.
struct Crash;

/// Ends the task that is being polled, at once and without anything being cleaned up by it.
pub(super) fn crash() -> ! {
    resume_unwind(Box::new(Crash))
}

/// How a task ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Returned,
    Crashed,
}

/// A task and whether it has something to do.
pub(super) struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    ready: Arc<Ready>,
}

struct Ready(AtomicBool);

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Task {
    pub(super) fn new(future: impl Future<Output = ()> + 'static) -> Self {
        Self { future: Box::pin(future), ready: Arc::new(Ready(AtomicBool::new(true))) }
    }
}

/// The tasks of a simulation, by a number that the caller gives them.
pub(super) struct Executor {
    timers: Arc<Timers>,
    tasks: Vec<(usize, Task)>,
}

impl Executor {
    pub(super) fn new(timers: Arc<Timers>) -> Self {
        Self { timers, tasks: Vec::new() }
    }

    pub(super) fn start(&mut self, number: usize, task: Task) {
        self.tasks.push((number, task));
    }

    /// Drops these tasks as a crash does: none of their code runs any more but that of their destructors.
    pub(super) fn stop(&mut self, is_of: impl Fn(usize) -> bool) {
        self.tasks.retain(|(number, _)| !is_of(*number));
    }

    /// Runs until a task ends, and says which and how; `None` if all wait for what never comes. Calls `check` after each
    /// poll.
    ///
    /// # Panics
    /// If a task does, other than by [`crash`].
    pub(super) fn run(&mut self, mut check: impl FnMut(usize)) -> Option<(usize, Ended)> {
        loop {
            let mut progressed = false;
            for index in 0..self.tasks.len() {
                let (number, task) = &mut self.tasks[index];
                if !task.ready.0.swap(false, Ordering::Relaxed) {
                    continue;
                }
                progressed = true;
                let waker = Waker::from(Arc::clone(&task.ready));
                let polled =
                    catch_unwind(AssertUnwindSafe(|| task.future.as_mut().poll(&mut Context::from_waker(&waker))));
                let number = *number;
                check(number);
                let ended = match polled {
                    Ok(Poll::Pending) => continue,
                    Ok(Poll::Ready(())) => Ended::Returned,
                    Err(panic) if panic.is::<Crash>() => Ended::Crashed,
                    Err(panic) => resume_unwind(panic),
                };
                self.tasks.remove(index);
                return Some((number, ended));
            }
            if !progressed && !self.timers.advance() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_jumps_to_whoever_sleeps_shortest() {
        let timers = Arc::new(Timers::default());
        let mut executor = Executor::new(Arc::clone(&timers));
        for (number, seconds) in [(1, 50), (2, 20), (3, 86_400)] {
            let timers = Arc::clone(&timers);
            executor.start(
                number,
                Task::new(async move {
                    timers.sleep(Duration::from_secs(seconds)).await;
                    if number == 1 {
                        crash();
                    }
                }),
            );
        }
        assert_eq!(executor.run(|_| ()), Some((2, Ended::Returned)));
        assert_eq!((executor.run(|_| ()), timers.now()), (Some((1, Ended::Crashed)), 50_000));
        executor.stop(|number| number == 3);
        assert_eq!(executor.run(|_| ()), None);
    }
}
