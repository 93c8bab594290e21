//! Polls for a condition instead of sleeping for a fixed time.

use std::time::{Duration, Instant};

/// Polling interval.
const INTERVAL: Duration = Duration::from_millis(50);

/// Waits for `condition` to return `Some`; `None` if the deadline passes first.
pub fn holds_within<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Waits for `condition` to return `Some`; panics with `what` if the deadline passes first.
#[track_caller]
pub fn eventually<T>(what: &str, deadline: Duration, condition: impl FnMut() -> Option<T>) -> T {
    match holds_within(deadline, condition) {
        Some(value) => value,
        None => panic!("not within {deadline:?}: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_polled_until_it_holds() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            (looks == 3).then_some(looks)
        };
        assert_eq!(holds_within(Duration::from_secs(10), third), Some(3));
        assert_eq!(holds_within(Duration::ZERO, || None::<()>), None);
    }
}
