//! The wall clock and timers.

use std::io;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use pintle_agent_core::UnixTime;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

/// Interval at which a wait compares its target with the wall clock. Timers run on monotonic time, which stops while
/// the machine sleeps and does not follow changes of the wall clock.
const HOP: Duration = Duration::from_secs(5);
/// A difference between wall and monotonic clock that counts as a step and ends a wait early.
const STEP: Duration = Duration::from_secs(1);
/// The end of the year 9999, in seconds since 1970: later than any clock shows, even one past 2038.
const NEVER: i64 = 253_402_300_799;

/// The current time on this machine's wall clock.
pub fn now() -> UnixTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixTime::from_milliseconds(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// The time since the first call in this process. Never decreases.
pub fn monotonic() -> Duration {
    static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
    STARTED.elapsed()
}

/// A wall clock, a monotonic clock, and timers on them.
pub trait Clock: Send + Sync {
    /// The wall clock, which may be wrong and may be set.
    fn now(&self) -> UnixTime;

    /// The time since a fixed moment. Never decreases, but may stop while the machine sleeps.
    fn monotonic(&self) -> Duration;

    /// Waits until the wall clock shows this time. Returns early if the clock was set or the machine resumed, and
    /// always after [`LONGEST_WAIT`], so callers check their condition again.
    fn sleep_until(&self, until: Option<UnixTime>) -> BoxFuture<'_, ()>;
}

/// Limit on every wait. Local changes without a notification are noticed after at most this long.
pub const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// This machine's clocks.
pub struct SystemClock {
    /// Readable once the clock has been set or the machine has resumed; `None` if the kernel does not support it.
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
    /// Must be called within a tokio runtime.
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
            // Reading clears the event. It fails with ECANCELED, which is the event.
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

/// Whether the wall clock, which showed `before`, was set or the machine slept, while the monotonic clock advanced by
/// `elapsed`.
pub(crate) fn has_stepped(elapsed: Duration, before: UnixTime, current: UnixTime) -> bool {
    let expected = before + elapsed;
    current.since(expected) > STEP || expected.since(current) > STEP
}

/// [`has_stepped`], measured from when both clocks were read.
fn stepped(started: Instant, wall: UnixTime, current: UnixTime) -> bool {
    has_stepped(started.elapsed(), wall, current)
}

/// A timer that never expires, but is cancelled when the wall clock is set (timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET).
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

    /// Simulates a clock that is past the time for which the timer was armed.
    #[tokio::test]
    async fn an_expired_timer_does_not_end_a_wait() {
        let clock = SystemClock::new();
        arm(clock.set.as_ref().expect("Linux has such a timer").get_ref(), 1).expect("armed");
        let until = now() + Duration::from_millis(300);
        clock.sleep_until(Some(until)).await;
        assert!(now() >= until);
    }
}
