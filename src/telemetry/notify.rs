//! The service manager: sd_notify(3).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pintle_agent_core::text::printable;
use sd_notify::NotifyState;

use super::{IdentityStatus, State, Status};
use crate::world::clock::monotonic;

/// Tells systemd READY, STATUS and WATCHDOG for the node; does nothing where there is no systemd.
pub struct Notifier {
    progress: Mutex<Progress>,
    /// How often the watchdog is fed at most: a third of what would make it act.
    watchdog: Option<Duration>,
}

#[derive(Default)]
struct Progress {
    ready: bool,
    status: String,
    identities: BTreeMap<Arc<str>, Identity>,
    /// When the watchdog was fed last, on the monotonic clock.
    last_fed: Option<Duration>,
}

#[derive(Default)]
struct Identity {
    /// Whether its loop has been heard from since the watchdog was fed last.
    alive: bool,
    /// Whether its status has been told: before that nothing is known of it.
    told: bool,
    /// Since when it has been waiting for an approver or a signer, on the monotonic clock.
    waiting_since: Option<Duration>,
}

/// An approver or a signer that has not acted by then is a person, or does not exist.
const PATIENCE: Duration = Duration::from_secs(30);

impl Notifier {
    /// As the environment (NOTIFY_SOCKET, WATCHDOG_USEC) says.
    pub fn from_environment() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        Self { progress: Mutex::default(), watchdog }
    }

    /// Counts on this identity: without it, the node is neither ready nor alive.
    pub fn expect(&self, identity: &Arc<str>) {
        self.progress().identities.entry(Arc::clone(identity)).or_default();
    }

    /// Tells the status of the node. It is ready once the credential of each identity is good; or once it is plain that it
    /// will take longer, since a boot must not hang for it.
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

    /// The status of this identity is its own from now on, and no longer what it was announced with.
    pub fn told(&self, identity: &str) {
        if let Some(known) = self.progress().identities.get_mut(identity) {
            known.told = true;
        }
    }

    /// The loop of this identity is alive.
    pub fn alive(&self, identity: &str) {
        let Some(interval) = self.watchdog else {
            return;
        };
        let mut progress = self.progress();
        if progress.hear_from(identity) && progress.last_fed.is_none_or(|last| monotonic() - last >= interval) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            progress.feed();
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Notes since when each identity waits, and answers whether all are ready.
    fn are_ready(&mut self, status: &Status) -> bool {
        let mut ready = true;
        for (name, known) in &mut self.identities {
            let Some(identity) = status.identity(name).filter(|_| known.told) else {
                ready = false;
                continue;
            };
            known.waiting_since = match identity.state {
                State::WaitingForApproval | State::WaitingForSigner => {
                    known.waiting_since.or_else(|| Some(monotonic()))
                }
                _ => None,
            };
            let waited = known.waiting_since.is_some_and(|since| monotonic() - since >= PATIENCE);
            ready &= is_ready(identity, waited);
        }
        ready
    }

    /// Notes that the loop of this identity is alive; answers whether all of them have been since the last feeding.
    fn hear_from(&mut self, identity: &str) -> bool {
        if let Some(known) = self.identities.get_mut(identity) {
            known.alive = true;
        }
        self.identities.values().all(|identity| identity.alive)
    }

    /// The watchdog has been fed: each identity must be heard from again.
    fn feed(&mut self) {
        self.last_fed = Some(monotonic());
        self.identities.values_mut().for_each(|identity| identity.alive = false);
    }
}

/// One line, whatever is in it: the next one would be an assignment of its own, such as WATCHDOG=trigger.
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
        assert!(!is_ready(&open("2"), false), "it is a moment until the old key is destroyed");
    }

    fn two() -> (Notifier, Progress) {
        let notifier = Notifier { progress: Mutex::default(), watchdog: None };
        notifier.expect(&"one".into());
        notifier.expect(&"two".into());
        let progress = std::mem::take(&mut *notifier.progress());
        (notifier, progress)
    }

    #[test]
    fn the_watchdog_hears_of_every_identity_or_is_not_fed() {
        let (_, mut progress) = two();
        assert!(!progress.hear_from("one") && !progress.hear_from("one"), "nothing of the other");
        assert!(progress.hear_from("two"));
        progress.feed();
        assert!(!progress.hear_from("two"), "the first hangs since");
        assert!(progress.hear_from("one"));
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
        notifier.told("one");
        assert!(!notifier.progress().are_ready(&status(State::Ready)), "the other has only been announced");
        notifier.told("two");
        assert!(!notifier.progress().are_ready(&status(State::Enrolling)));
        assert!(notifier.progress().are_ready(&status(State::Ready)));
    }
}
