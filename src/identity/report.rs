//! What the agent tells of its state: events where something changes, and the status.

use std::collections::BTreeSet;
use std::fmt::Write;

use pintle_agent_core::policy::Window;
use pintle_agent_core::rotation::{Authority, Waiting};
use pintle_agent_core::{Action, Phase, State, UnixTime};
use pintle_plugins_api::PublicKey;

use super::Agent;
use crate::config::IdentityConfig;
use crate::telemetry::{self, Event, IdentityStatus, KeyStatus};

/// What was told last, so that nothing is told twice.
#[derive(Default)]
pub(super) struct Reporter {
    /// What the certificate in use is known to be doing.
    known: Known,
    /// The failure that was told last: how many in a row, and when it is tried again.
    failure: Option<(u32, UnixTime)>,
    /// The backends that are known not to answer.
    down: BTreeSet<String>,
    /// The request that is known to be pending, and whether approved.
    pub(super) pending: Option<(String, bool)>,
    /// Rotations completed by this process.
    pub(super) rotations: u64,
    /// Failures on the way to one.
    errors: u64,
    /// Why the journal could not be saved.
    unsaved: Option<String>,
    /// How often in a row it could not be for this reason.
    unsaved_times: u32,
    /// How far the API server's clock is ahead, seconds.
    pub(super) server_ahead: Option<i64>,
}

/// What the certificate in use is known to be doing.
#[derive(Default, PartialEq, Eq)]
enum Known {
    #[default]
    Nothing,
    /// The one with this fingerprint is held.
    Holding([u8; 32]),
    /// It is being replaced.
    Replacing,
    /// Its key is lost, and nothing is done about it.
    KeyLost,
}

impl Reporter {
    /// Notes why the journal could not be saved, or that it could be. Answers what is to be told of it: it is tried every
    /// few seconds, perhaps for weeks, so the same reason is told the more rarely the longer it goes on.
    fn note_unsaved(&mut self, unsaved: Option<String>) -> Option<String> {
        self.unsaved_times = if unsaved == self.unsaved { self.unsaved_times.saturating_add(1) } else { 1 };
        self.unsaved = unsaved;
        self.unsaved.clone().filter(|_| self.unsaved_times.is_power_of_two())
    }
}

impl Agent {
    /// Takes over the next state, and tells what is new about it.
    pub(super) fn report(&mut self, next: State, action: &Action) {
        self.state = next;
        self.report_failure();
        self.report_backends();
        match action {
            Action::Wait { waiting: Waiting::UntilRotation, .. } => self.report_holding(false),
            Action::Wait { waiting: Waiting::RotationOff, .. } => self.report_holding(true),
            Action::Wait { waiting: Waiting::KeyLost, .. } => {
                if let Some(held) = self.state.held()
                    && self.reporter.known != Known::KeyLost
                {
                    self.reporter.known = Known::KeyLost;
                    self.telemetry.emit(Event::KeyLost { key: held.key().to_string() });
                }
            }
            Action::Generate { .. } if self.reporter.known != Known::Replacing => {
                self.reporter.known = Known::Replacing;
                self.telemetry.emit(Event::RotationStarted { reason: self.reason() });
            }
            _ => {}
        }
        self.telemetry.set_status(self.status(action));
    }

    fn reason(&self) -> String {
        let Some(held) = self.state.held() else {
            return "there is none".to_owned();
        };
        let current = self.now();
        if held.has_expired(current) {
            format!("the one in use expired at {}", held.not_after())
        } else if self.state.held_key_is_lost() {
            "the key in use is lost".to_owned()
        } else if self.state.held_is_refused() {
            "the API server refuses the one in use".to_owned()
        } else if self.state.rotation_is_requested() {
            "an operator asked for it".to_owned()
        } else if held.key().backend != self.policy.backend {
            format!("its key moves from {} to {}", held.key().backend, self.policy.backend)
        } else {
            match self.now() >= Window::of(held).deadline {
                true => format!("the one in use expires at {}", held.not_after()),
                false => "the configuration asks for another".to_owned(),
            }
        }
    }

    /// Tells which backends do not answer, and which do again.
    pub(super) fn report_backends(&mut self) {
        for (name, error) in self.ports.keyring.health() {
            let down = self.reporter.down.contains(name);
            match error {
                Some(error) if !down => {
                    self.reporter.down.insert(name.to_owned());
                    self.telemetry.emit(Event::BackendDown {
                        backend: name.to_owned(),
                        reason: error.to_string(),
                        hint: error.hint.unwrap_or_default(),
                    });
                }
                None if down => {
                    self.reporter.down.remove(name);
                    self.telemetry.emit(Event::BackendUp { backend: name.to_owned() });
                }
                _ => {}
            }
        }
    }

    /// Tells of a failure, once for each time that it happens; what only something on this machine can mend is tried
    /// every few seconds, perhaps for weeks, and told of the more rarely the longer it goes on.
    fn report_failure(&mut self) {
        let failure = self.state.back_off().map(|back_off| (back_off.failures, back_off.until));
        if failure.is_some() && self.reporter.failure != failure {
            self.reporter.errors += 1;
        }
        if let Some(back_off) = self.state.back_off()
            && self.reporter.failure != failure
            && (!back_off.local || back_off.failures.is_power_of_two())
        {
            self.telemetry.emit(Event::Failed {
                phase: self.state.phase().name(),
                reason: back_off.reason.clone(),
                hint: back_off.hint.clone(),
                failures: back_off.failures,
                retry_at: back_off.until.to_string(),
            });
        }
        self.reporter.failure = failure;
    }

    fn report_holding(&mut self, rotation_off: bool) {
        // It is not yet what others read.
        let Some(held) = self.state.held().filter(|_| self.probe.trouble().is_none()) else {
            return;
        };
        let known = Known::Holding(*held.fingerprint());
        if self.reporter.known == known {
            return;
        }
        self.reporter.known = known;
        let window = Window::of(held);
        self.telemetry.emit(if rotation_off {
            Event::RotationOff { not_after: window.end.to_string() }
        } else {
            Event::Holding {
                serial: held.serial().to_owned(),
                opens: window.opens,
                rotates_at: window.deadline,
                not_after: window.end,
            }
        });
    }

    fn status(&self, action: &Action) -> IdentityStatus {
        let mut status = status_of(&self.state, &self.config);
        let good = self.state.held().is_some_and(|held| !held.has_expired(self.now()));
        let back_off = self.state.back_off();
        status.state = match (self.state.phase(), action) {
            (_, Action::Wait { waiting: Waiting::KeyLost, .. }) => telemetry::State::KeyLost,
            (_, Action::Wait { waiting: Waiting::RotationOff, .. }) => telemetry::State::RotationOff,
            (_, Action::Wait { waiting: Waiting::UntilRotation, .. }) => telemetry::State::Ready,
            (Phase::Requesting { .. } | Phase::Awaiting { .. }, _)
                if back_off.is_some_and(|back_off| back_off.local) =>
            {
                telemetry::State::NoCredential
            }
            _ if back_off.is_some() => telemetry::State::Failing,
            (Phase::Awaiting { request, .. }, _) => match &self.reporter.pending {
                Some((name, true)) if *name == request.name => telemetry::State::WaitingForSigner,
                _ => telemetry::State::WaitingForApproval,
            },
            _ if good => telemetry::State::Rotating,
            _ => telemetry::State::Enrolling,
        };
        if status.state == telemetry::State::WaitingForApproval {
            status.hint = format!("kubectl certificate approve {}", status.request);
        }
        if status.state == telemetry::State::KeyLost {
            "the backend no longer has the key in use".clone_into(&mut status.reason);
            "restore the device, or set on-key-loss = \"enrol\" and restart pintle".clone_into(&mut status.hint);
        }
        if matches!(action, Action::Wait { waiting: Waiting::AddressesMissing, .. }) {
            status.state = telemetry::State::Failing;
            "the node has no addresses, so it is not known what certificate to ask for".clone_into(&mut status.reason);
            "give the Node object its addresses (kubelet and cloud controller do), or set ip-addresses"
                .clone_into(&mut status.hint);
        }
        if status.state == telemetry::State::RotationOff {
            "rotation is off: the certificate is not renewed before it expires".clone_into(&mut status.reason);
            "run with --rotate-certificates=true".clone_into(&mut status.hint);
        }
        // What others read is in trouble also while an approver or the signer is waited for, perhaps for days.
        if let Some(trouble) = self.probe.trouble()
            && matches!(
                status.state,
                telemetry::State::Ready
                    | telemetry::State::RotationOff
                    | telemetry::State::WaitingForApproval
                    | telemetry::State::WaitingForSigner
            )
        {
            status.state = telemetry::State::Failing;
            status.reason = format!("{} cannot be used: {}", trouble.path, trouble.reason);
            status.hint.clone_from(&trouble.hint);
        }
        if let Some(reason) = &self.reporter.unsaved {
            status.state = telemetry::State::Failing;
            status.reason = format!("the journal cannot be saved, so rotation is paused: {reason}");
            status.hint = format!("make room in {}, or make it writable", self.config.node.state_dir.display());
        }
        status.rotations = self.reporter.rotations;
        status.errors = self.reporter.errors;
        status.server_ahead_seconds = self.reporter.server_ahead;
        status
    }

    /// Tells that the journal could not be saved, or that it can be again.
    pub(super) fn note_journal(&mut self, unsaved: Option<String>, action: &Action) {
        let is_change = unsaved != self.reporter.unsaved;
        if let Some(reason) = self.reporter.note_unsaved(unsaved) {
            self.telemetry.emit(Event::JournalNotSaved { reason });
        }
        if is_change {
            self.telemetry.set_status(self.status(action));
        }
    }

    /// Tells when the API server's clock differs from this machine's by more than a minute, once until it changes.
    pub(super) fn note_clock(&mut self, ahead: Option<i64>) {
        let off = |seconds: Option<i64>| seconds.is_some_and(|seconds| seconds.abs() > 60);
        if let Some(seconds) = ahead.filter(|_| off(ahead) && !off(self.reporter.server_ahead)) {
            self.telemetry.emit(Event::ClockOff { server_ahead_seconds: seconds });
        }
        if ahead.is_some() {
            self.reporter.server_ahead = ahead;
        }
    }

    /// The word for an authority in events.
    pub(super) fn authority_word(authority: Authority) -> &'static str {
        match authority {
            Authority::Held => "held",
            Authority::Bootstrap => "bootstrap",
            Authority::Issued => "issued",
        }
    }
}

/// What a state alone says, as `pintle status` also reads it from the journal of an agent that does not run.
pub(crate) fn status_of(state: &State, config: &IdentityConfig) -> IdentityStatus {
    let template = config.template();
    let mut status = IdentityStatus {
        identity: config.name.clone(),
        subject: template.common_name,
        signer_name: template.signer_name,
        phase: state.phase().into(),
        state: telemetry::State::NotRunning,
        pair: config.pairs().current().display().to_string(),
        ..IdentityStatus::default()
    };
    if let Some(held) = state.held() {
        let window = Window::of(held);
        status.serial = held.serial().to_owned();
        status.fingerprint = held.fingerprint().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        status.not_before = Some(held.not_before());
        status.not_after = Some(held.not_after());
        status.installed_at = Some(held.installed_at());
        status.window_opens = Some(window.opens);
        status.rotates_at = Some(window.deadline);
        status.window_closes = Some(window.closes);
        let algorithm = PublicKey::from_der(held.public_key()).map(|key| key.algorithm().to_string());
        status.key = Some(KeyStatus {
            backend: held.key().backend.clone(),
            id: held.key().id.to_string(),
            algorithm: algorithm.unwrap_or_default(),
        });
    }
    if let Phase::Awaiting { request, .. } = state.phase() {
        status.request.clone_from(&request.name);
    }
    if let Some(back_off) = state.back_off() {
        status.reason.clone_from(&back_off.reason);
        status.hint.clone_from(&back_off.hint);
        status.failures = back_off.failures;
        status.retry_at = Some(back_off.until);
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c29_a_journal_that_cannot_be_saved_is_told_of_on_change_and_then_ever_more_rarely() {
        let mut reporter = Reporter::default();
        let mut told = |reason: Option<&str>, times: u32| {
            (0..times).filter(|_| reporter.note_unsaved(reason.map(str::to_owned)).is_some()).count()
        };
        assert_eq!(told(None, 5), 0);
        // At 1, 2, 4, ... 512.
        assert_eq!(told(Some("the disk is full"), 1000), 10);
        assert_eq!(told(Some("the file system is read-only"), 1), 1, "another reason");
        assert_eq!(told(None, 3), 0);
        assert_eq!(told(Some("the file system is read-only"), 1), 1, "it was saved meanwhile");
    }
}
