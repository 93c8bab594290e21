//! What is promised, and what breaks it.

use std::fmt;

use super::world::World;
use super::*;

/// As many requests are made within an hour at most, whatever fails and whatever is asked for.
const REQUESTS_PER_HOUR: usize = 60;

/// What is promised, by the name under which a mutation of the steps must be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    /// What is published works, as long as there is anything that does.
    CurrentWorks,
    /// Nothing is published that the API server has not accepted, where something good is in use.
    ProvenBeforePublished,
    /// No key that is in use, or may have to be again, is destroyed.
    KeysInUseLive,
    /// No key is destroyed that this installation did not make.
    OnlyOurKeysDie,
    /// At most two keys, beside those that a device does not destroy.
    TwoKeys,
    /// One undecided request.
    OneRequest,
    /// Requests within an hour are bounded.
    RequestRate,
    /// What the operator has decided about lost keys is heeded.
    KeyLossPolicy,
    /// What is asked for, by an operator or by the configuration, is done.
    WishesAreHeard,
    /// Undisturbed, an identity works within a bounded time, or waits for a person and says for what.
    Liveness,
}

/// A broken promise.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(super) promise: Promise,
    pub(super) detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}: {}", self.promise, self.detail)
    }
}

pub(super) fn broken<T>(promise: Promise, detail: impl fmt::Display, state: &State) -> Result<T, Violation> {
    Err(Violation { promise, detail: format!("{detail}: {state:?}") })
}

impl World {
    pub(super) fn check_action(&self, state: &State, action: &Action) -> Result<(), Violation> {
        let asks = matches!(action, Action::Generate { .. } | Action::Submit { .. } | Action::Observe { .. });
        if asks && state.held_key_lost && !self.policy.enrol_after_key_loss {
            return broken(Promise::KeyLossPolicy, "enrols again after a key loss, against the policy", state);
        }
        match action {
            Action::Wait { waiting: Waiting::UntilRotation, .. } => self.check_wishes(state),
            Action::Publish { credential } => self.check_publication(state, credential),
            Action::Retire { keys } => self.check_retirement(state, keys),
            _ => Ok(()),
        }
    }

    fn check_wishes(&self, state: &State) -> Result<(), Violation> {
        let Some(held) = &state.held else { return Ok(()) };
        if self.unwanted.as_ref() == Some(held.fingerprint()) {
            return broken(Promise::WishesAreHeard, "a rotation was asked for and forgotten", state);
        }
        if held.key().backend != self.policy.backend {
            return broken(Promise::WishesAreHeard, "another backend is configured and nothing moves", state);
        }
        if self.template_is_known() && self.template_of(held) != self.template {
            return broken(Promise::WishesAreHeard, "another template is configured and nothing is asked for", state);
        }
        Ok(())
    }

    fn check_publication(&self, state: &State, credential: &Credential) -> Result<(), Violation> {
        let is_restored = state.held.as_ref().is_some_and(|held| held.fingerprint() == credential.fingerprint());
        if is_restored || self.proven.as_ref() == Some(credential.fingerprint()) || !state.held_is_good(self.clock()) {
            return Ok(());
        }
        let Some(held) = &state.held else { return Ok(()) };
        let last_call = Window::of(held).closes.max(held.not_after() - Duration::from_secs(600));
        if self.clock() < last_call {
            return broken(Promise::ProvenBeforePublished, format!("publishes {credential:?} unproven"), state);
        }
        if self.refused_proof.as_ref() == Some(credential.fingerprint()) {
            return broken(Promise::CurrentWorks, format!("publishes {credential:?}, which was refused"), state);
        }
        Ok(())
    }

    fn check_retirement(&self, state: &State, keys: &[KeyName]) -> Result<(), Violation> {
        for key in keys {
            let published = self.published.as_ref().map(|(published, _)| published);
            let expired = published.is_some_and(|leaf| leaf.has_expired(self.now) || leaf.has_expired(self.clock()));
            if state.held.as_ref().is_some_and(|held| held.key() == key) || self.is_published(key) && !expired {
                return broken(Promise::KeysInUseLive, "destroys the key in use", state);
            }
            let current = self.published.as_ref().map(|(published, _)| published.fingerprint());
            if let Some((good, public_key)) = &self.last_proven
                && current != Some(good.fingerprint())
                && good.key() == key
                && self.key(key) == Some(public_key)
                && self.takes(good)
                && !good.has_expired(self.clock())
                && state.held.as_ref().is_some_and(|held| self.clock() < Window::of(held).deadline)
            {
                return broken(Promise::KeysInUseLive, "destroys the only key that is known to work", state);
            }
            if self.foreign.contains(key) || self.keys.iter().any(|known| known.name == *key && !known.ours) {
                return broken(Promise::OnlyOurKeysDie, "destroys somebody else's key", state);
            }
        }
        Ok(())
    }

    /// What holds at all times.
    pub(super) fn check(&mut self, state: &State) -> Result<(), Violation> {
        let counts = |key: &world::Key| key.ours && !self.undeleted.contains(&key.name);
        if self.keys.iter().filter(|key| counts(key)).count() > 2 {
            return broken(Promise::TwoKeys, format!("{} keys", self.keys.len()), state);
        }
        let is_counted = |request: &&world::Request| {
            request.decision.is_none()
                && self.keys.iter().any(|key| key.public_key == request.public_key && counts(key))
        };
        if self.requests.iter().filter(is_counted).count() > 1 {
            return broken(Promise::OneRequest, "more than one undecided request", state);
        }
        while self.submitted.front().is_some_and(|at| self.now.since(*at) > HOUR) {
            self.submitted.pop_front();
        }
        self.most_requests = self.most_requests.max(self.submitted.len());
        if self.submitted.len() > REQUESTS_PER_HOUR {
            return broken(Promise::RequestRate, format!("{} requests within an hour", self.submitted.len()), state);
        }
        self.check_identity(state)
    }

    /// Undisturbed for longer than [`RECOVERY`], the published certificate is one that the API server accepts, and its key
    /// is there. Where the rotation window leaves less than that until it expires, that much is counted from the
    /// window's close instead.
    fn check_identity(&self, state: &State) -> Result<(), Violation> {
        if self.clock_error != 0
            || self.now < self.undisturbed_since
            || self.now.since(self.undisturbed_since) <= RECOVERY
        {
            return Ok(());
        }
        let Some((published, _)) = &self.published else {
            return broken(Promise::Liveness, "no certificate at all", state);
        };
        if self.takes(published) && self.is_published(published.key()) {
            return Ok(());
        }
        if !published.has_expired(self.now) {
            return broken(Promise::CurrentWorks, "what is published does not work", state);
        }
        if self.now.since(Window::of(published).closes) > RECOVERY {
            return broken(Promise::Liveness, "what is published has expired", state);
        }
        Ok(())
    }
}
