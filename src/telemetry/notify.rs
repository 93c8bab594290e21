//! The service manager: sd_notify(3).

use std::sync::Mutex;
use std::time::{Duration, Instant};

use pintle_agent_core::text::printable;
use sd_notify::NotifyState;

use super::{IdentityStatus, State};

/// Tells systemd READY, STATUS and WATCHDOG; nobody where there is no systemd.
pub struct Notifier {
    progress: Mutex<Progress>,
    /// How often the watchdog must hear from us, a third of what would make it act.
    watchdog: Option<Duration>,
}

#[derive(Default)]
struct Progress {
    ready: bool,
    status: String,
    last_alive: Option<Instant>,
    /// Since when an approver or a signer has been waited for.
    waiting_since: Option<Instant>,
}

/// An approver or a signer that has not acted by then is a person, or is not there.
const PATIENCE: Duration = Duration::from_secs(30);

impl Notifier {
    /// As the environment (NOTIFY_SOCKET, WATCHDOG_USEC) says.
    pub fn from_environment() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        Self { progress: Mutex::default(), watchdog }
    }

    /// Ready once the credential is good; or once it is plain that it will take longer, since a boot must not hang for
    /// it.
    pub fn status(&self, identity: &IdentityStatus) {
        let mut progress = self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let text = status_line(identity);
        if progress.status != text {
            let _ = sd_notify::notify(&[NotifyState::Status(&text)]);
            progress.status = text;
        }
        progress.waiting_since = match identity.state {
            State::WaitingForApproval | State::WaitingForSigner => {
                progress.waiting_since.or_else(|| Some(Instant::now()))
            }
            _ => None,
        };
        let waited = progress.waiting_since.is_some_and(|since| since.elapsed() >= PATIENCE);
        if !progress.ready && is_ready(identity, waited) {
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            progress.ready = true;
        }
    }

    /// The agent is alive.
    pub fn alive(&self) {
        let Some(interval) = self.watchdog else {
            return;
        };
        let mut progress = self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if progress.last_alive.is_none_or(|last| last.elapsed() >= interval) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            progress.last_alive = Some(Instant::now());
        }
    }
}

/// One line, whatever is in it: the next one would be an assignment of its own, such as WATCHDOG=trigger.
fn status_line(identity: &IdentityStatus) -> String {
    printable(&identity.line())
}

fn is_ready(identity: &IdentityStatus, waited: bool) -> bool {
    identity.state == State::Ready || identity.drains() || !identity.reason.is_empty() || waited
}

#[cfg(test)]
mod tests {
    use super::super::{ProxyStatus, Statistics};
    use super::*;

    #[test]
    fn a_status_is_one_line() {
        let reason = "not today\nWATCHDOG=trigger\nMAINPID=1".to_owned();
        let line = status_line(&IdentityStatus { reason, ..IdentityStatus::default() });
        assert!(line.contains("today\\nWATCHDOG") && !line.contains('\n'), "{line}");
    }

    #[test]
    fn c13_a_boot_waits_for_an_approval_but_not_for_ever() {
        let of = |state, reason: &str| IdentityStatus { state, reason: reason.to_owned(), ..IdentityStatus::default() };
        assert!(is_ready(&of(State::Ready, ""), false));
        assert!(is_ready(&of(State::Failing, "the API server cannot be reached"), false));
        assert!(!is_ready(&of(State::WaitingForApproval, ""), false));
        assert!(is_ready(&of(State::WaitingForApproval, ""), true));
    }

    /// A start that rotates, while a kubelet that was connected before comes back at once.
    #[test]
    fn c18_a_start_does_not_wait_for_connections_that_may_take_a_quarter_of_an_hour_to_end() {
        let open = |serial: &str| IdentityStatus {
            state: State::Rotating,
            phase: "retiring".to_owned(),
            serial: "2".to_owned(),
            proxy: Some(ProxyStatus {
                statistics: Statistics { open_connections: [(serial.to_owned(), 1)].into(), ..Statistics::default() },
                ..ProxyStatus::default()
            }),
            ..IdentityStatus::default()
        };
        assert!(is_ready(&open("1"), false));
        assert!(!is_ready(&open("2"), false), "it is a moment until the old key is destroyed");
    }
}
