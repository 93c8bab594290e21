//! Service manager notifications (sd_notify(3)).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pintle_agent_core::text::printable;
use sd_notify::NotifyState;

use super::{IdentityStatus, State, Status};
use crate::world::clock::monotonic;

/// Sends READY, STATUS and WATCHDOG to systemd for the node. Does nothing without systemd.
pub struct Notifier {
    progress: Mutex<Progress>,
    /// Interval of watchdog notifications: a third of the watchdog's timeout.
    watchdog: Option<Duration>,
}

#[derive(Default)]
struct Progress {
    ready: bool,
    status: String,
    identities: BTreeMap<Arc<str>, Identity>,
    /// When the last watchdog notification was sent, on the monotonic clock.
    last_notified: Option<Duration>,
}

#[derive(Default)]
struct Identity {
    /// Whether its loop has reported since the last watchdog notification.
    alive: bool,
    /// Whether its own status has been published. Before that, its state is unknown.
    published: bool,
    /// Since when it has been waiting for approval or for the signer, on the monotonic clock.
    waiting_since: Option<Duration>,
}

/// How long a start waits for an approver or a signer. After that it is probably a person, or missing.
const MAXIMUM_APPROVAL_WAIT: Duration = Duration::from_secs(30);

impl Notifier {
    /// Reads NOTIFY_SOCKET and WATCHDOG_USEC from the environment.
    pub fn from_environment() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        Self { progress: Mutex::default(), watchdog }
    }

    /// Registers an identity. The node is ready once all registered identities are, and alive while all of them are.
    pub fn expect(&self, identity: &Arc<str>) {
        self.progress().identities.entry(Arc::clone(identity)).or_default();
    }

    /// Publishes the node's status. The node is ready once each identity's credential is valid, or it is clear that
    /// getting one will take longer: a boot must not hang for that.
    pub fn status(&self, status: &Status) {
        let mut progress = self.progress();
        let text = status_line(status);
        if progress.status != text {
            let _ = sd_notify::notify(&[NotifyState::Status(&text)]);
            progress.status = text;
        }
        if progress.are_ready(status) && !progress.ready {
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            progress.ready = true;
        }
    }

    /// From now on, this identity's status is its own and not a placeholder.
    pub fn mark_published(&self, identity: &str) {
        if let Some(known) = self.progress().identities.get_mut(identity) {
            known.published = true;
        }
    }

    /// Reports that this identity's loop is running.
    pub fn alive(&self, identity: &str) {
        let Some(interval) = self.watchdog else {
            return;
        };
        let mut progress = self.progress();
        if progress.record_alive(identity) && progress.last_notified.is_none_or(|last| monotonic() - last >= interval) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            progress.start_interval();
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Records since when each identity has been waiting. Returns whether all are ready.
    fn are_ready(&mut self, status: &Status) -> bool {
        let mut ready = true;
        for (name, known) in &mut self.identities {
            let Some(identity) = status.identity(name).filter(|_| known.published) else {
                ready = false;
                continue;
            };
            known.waiting_since = match identity.state {
                State::WaitingForApproval | State::WaitingForSigner => {
                    known.waiting_since.or_else(|| Some(monotonic()))
                }
                _ => None,
            };
            let waited = known.waiting_since.is_some_and(|since| monotonic() - since >= MAXIMUM_APPROVAL_WAIT);
            ready &= is_ready(identity, waited);
        }
        ready
    }

    /// Records that this identity's loop is running. Returns whether all have reported since the last watchdog
    /// notification.
    fn record_alive(&mut self, identity: &str) -> bool {
        if let Some(known) = self.identities.get_mut(identity) {
            known.alive = true;
        }
        self.identities.values().all(|identity| identity.alive)
    }

    /// Starts a new watchdog interval, in which each identity must report again.
    fn start_interval(&mut self) {
        self.last_notified = Some(monotonic());
        self.identities.values_mut().for_each(|identity| identity.alive = false);
    }
}

/// Always a single line: systemd would parse a second one as another assignment, such as WATCHDOG=trigger.
fn status_line(status: &Status) -> String {
    printable(&status.line())
}

fn is_ready(identity: &IdentityStatus, waited: bool) -> bool {
    identity.state == State::Ready || identity.drains() || !identity.reason.is_empty() || waited
}

#[cfg(test)]
mod tests {
    use super::super::{Phase, ProxyStatus, Statistics};
    use super::*;

    #[test]
    fn a_status_is_one_line() {
        let reason = "not today\nWATCHDOG=trigger\nMAINPID=1".to_owned();
        let identity = IdentityStatus { reason, ..IdentityStatus::default() };
        let line = status_line(&Status { identities: vec![identity], backends: Vec::new() });
        assert!(line.contains("today\\nWATCHDOG") && !line.contains('\n'), "{line}");
    }

    #[test]
    fn c13_a_boot_does_not_wait_indefinitely_for_approval() {
        let of = |state, reason: &str| IdentityStatus { state, reason: reason.to_owned(), ..IdentityStatus::default() };
        assert!(is_ready(&of(State::Ready, ""), false));
        assert!(is_ready(&of(State::Failing, "the API server cannot be reached"), false));
        assert!(!is_ready(&of(State::WaitingForApproval, ""), false));
        assert!(is_ready(&of(State::WaitingForApproval, ""), true));
    }

    /// An agent that rotates at its start, while a kubelet that was connected before reconnects.
    #[test]
    fn c18_a_start_does_not_wait_for_old_connections_to_drain() {
        let open = |serial: &str| IdentityStatus {
            state: State::Rotating,
            phase: Phase::Retiring,
            serial: "2".to_owned(),
            proxy: Some(ProxyStatus {
                address: ([127, 0, 0, 1], 6444).into(),
                serial: "2".to_owned(),
                reason: String::new(),
                statistics: Statistics { open_connections: [(serial.to_owned(), 1)].into(), ..Statistics::default() },
            }),
            ..IdentityStatus::default()
        };
        assert!(is_ready(&open("1"), false));
        assert!(!is_ready(&open("2"), false), "the old key is about to be deleted");
    }

    fn two() -> (Notifier, Progress) {
        let notifier = Notifier { progress: Mutex::default(), watchdog: None };
        notifier.expect(&"one".into());
        notifier.expect(&"two".into());
        let progress = std::mem::take(&mut *notifier.progress());
        (notifier, progress)
    }

    #[test]
    fn the_watchdog_is_notified_only_if_every_identity_reports() {
        let (_, mut progress) = two();
        assert!(!progress.record_alive("one") && !progress.record_alive("one"), "the other has not reported");
        assert!(progress.record_alive("two"));
        progress.start_interval();
        assert!(!progress.record_alive("two"), "the first has not reported since");
        assert!(progress.record_alive("one"));
    }

    #[test]
    fn a_node_is_ready_when_all_its_identities_are() {
        let (notifier, progress) = two();
        *notifier.progress() = progress;
        let of = |identity: &str, state| IdentityStatus {
            identity: identity.to_owned(),
            state,
            ..IdentityStatus::default()
        };
        let status =
            |other| Status { identities: vec![of("one", State::Ready), of("two", other)], backends: Vec::new() };
        notifier.mark_published("one");
        assert!(!notifier.progress().are_ready(&status(State::Ready)), "the other's status is only a placeholder");
        notifier.mark_published("two");
        assert!(!notifier.progress().are_ready(&status(State::Enrolling)));
        assert!(notifier.progress().are_ready(&status(State::Ready)));
    }
}
