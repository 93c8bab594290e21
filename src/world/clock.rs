//! The wall clock, and waiting by it.

use std::io;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use pintle_agent_core::UnixTime;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

/// The wall clock is looked at again at least this often, whatever is waited for: a timer counts monotonic time, which
/// stands still while a machine sleeps and does not follow a clock that is set.
const HOP: Duration = Duration::from_secs(5);
/// A step of the wall clock against the monotonic one that is worth waking for.
const STEP: Duration = Duration::from_secs(1);
/// The end of the year 9999, in seconds since 1970. A clock that is past 2038, rightly or not, must not reach it.
const NEVER: i64 = 253_402_300_799;

/// What time it is on this machine.
pub fn now() -> UnixTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixTime::from_milliseconds(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// The time since this process first asked, which only grows.
pub fn monotonic() -> Duration {
    static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
    STARTED.elapsed()
}

/// The wall clock, a monotonic one, and waiting by them.
pub trait Clock: Send + Sync {
    /// What time it is on the wall clock, which can be wrong and can be set.
    fn now(&self) -> UnixTime;

    /// The time since some fixed moment, which only grows, and may stand still while the machine sleeps.
    fn monotonic(&self) -> Duration;

    /// Waits until the wall clock shows this time. Returns early when the clock was set or the machine resumed, and in
    /// any case after [`LONGEST_WAIT`]: whatever waits looks at the world again then.
    fn sleep_until(&self, until: Option<UnixTime>) -> BoxFuture<'_, ()>;
}

/// No wait is longer: what changes on this machine without telling anybody is looked at this often.
pub const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The clocks of this machine.
pub struct SystemClock {
    /// Readable when the clock was set or the machine resumed; `None` where the kernel has no such timer.
    set: Option<AsyncFd<std::os::fd::OwnedFd>>,
}

impl Clock for SystemClock {
    fn now(&self) -> UnixTime {
        now()
    }

    fn monotonic(&self) -> Duration {
        monotonic()
    }

    fn sleep_until(&self, until: Option<UnixTime>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let (started, wall) = (Instant::now(), now());
            let until = until.map_or(wall + LONGEST_WAIT, |until| until.min(wall + LONGEST_WAIT));
            loop {
                let current = now();
                if current >= until || stepped(started, wall, current) {
                    return;
                }
                let hop = HOP.min(until.since(current)).max(Duration::from_millis(1));
                tokio::select! {
                    biased;
                    () = self.was_set() => return,
                    () = tokio::time::sleep(hop) => {}
                }
            }
        })
    }
}

impl SystemClock {
    /// A clock; must be called within a tokio runtime.
    pub fn new() -> Self {
        Self { set: notice_setting().ok() }
    }

    async fn was_set(&self) {
        let Some(timer) = &self.set else {
            return std::future::pending().await;
        };
        loop {
            let Ok(mut ready) = timer.readable().await else {
                return std::future::pending().await;
            };
            // The read clears the event; that it fails with ECANCELED is the event.
            let read = rustix::io::read(timer.get_ref(), &mut [0u8; 8]);
            let _ = arm(timer.get_ref(), NEVER);
            ready.clear_ready();
            if read == Err(rustix::io::Errno::CANCELED) {
                return;
            }
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether the wall clock, which showed `before`, was set, or the machine slept, while the monotonic one went on by
/// `elapsed`.
pub(crate) fn has_stepped(elapsed: Duration, before: UnixTime, current: UnixTime) -> bool {
    let expected = before + elapsed;
    current.since(expected) > STEP || expected.since(current) > STEP
}

/// As [`has_stepped`], since both clocks were read.
fn stepped(started: Instant, wall: UnixTime, current: UnixTime) -> bool {
    has_stepped(started.elapsed(), wall, current)
}

/// A timer that never fires and is cancelled when the wall clock jumps (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET).
fn notice_setting() -> io::Result<AsyncFd<std::os::fd::OwnedFd>> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Realtime, flags)?;
    arm(&timer, NEVER)?;
    #[allow(deprecated, reason = "the successor is unsafe; the descriptor is owned here for as long as it is watched")]
    AsyncFd::with_interest(timer, tokio::io::Interest::READABLE)
}

fn arm(timer: &std::os::fd::OwnedFd, seconds: i64) -> io::Result<()> {
    let it_value = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let setting = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &setting)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As one is for a clock that has passed the time for which it was armed.
    #[tokio::test]
    async fn a_timer_that_has_expired_ends_no_wait() {
        let clock = SystemClock::new();
        arm(clock.set.as_ref().expect("Linux has such a timer").get_ref(), 1).expect("armed");
        let until = now() + Duration::from_millis(300);
        clock.sleep_until(Some(until)).await;
        assert!(now() >= until);
    }
}
