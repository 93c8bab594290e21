//! The state of a rotation, which is also its journal.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::phase::{BackOff, Candidate, Phase, Previous, Rejections};
use super::{Authority, FoundPair};
use crate::text::printable;
use crate::{Credential, KeyName, Policy, Template, UnixTime};

/// Everything that a rotation knows. It is saved before each action; there is no second progress record.
///
/// Only [`step`](super::step) and [`State::recovered`] change one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Tells this installation's keys from those of any other agent that shares a device.
    pub(super) installation: String,
    /// The credential in use: published, and installed.
    pub(super) held: Option<Credential>,
    /// What `held` was requested with.
    pub(super) held_template: Option<Template>,
    /// `held` was published although the API server had not accepted it yet.
    pub(super) held_unproven: bool,
    /// The API server refused `held` although it has not expired.
    pub(super) held_refused: bool,
    /// The key of `held` is gone from its backend.
    pub(super) held_key_lost: bool,
    /// The credential in use before `held`, kept until `held` is proven.
    pub(super) previous: Option<Previous>,
    /// What is going on.
    pub(super) phase: Phase,
    /// The number in the id of the key chosen last; the next one is higher.
    pub(super) last_slot: u64,
    /// What failed, and until when nothing is tried.
    pub(super) back_off: Option<BackOff>,
    /// An operator asked for a rotation.
    pub(super) rotation_requested: bool,
    /// Keys made and lost or let go since the last certificate that was proven: each makes the waits after a failure
    /// longer.
    pub(super) discarded: u32,
    /// Why what was issued could not be used, as often as the same happened in a row.
    pub(super) rejections: Option<Rejections>,
    /// Keys of our own to be destroyed.
    pub(super) retiring: Vec<KeyName>,
    /// Keys in use that something else made: they are never destroyed.
    pub(super) foreign: Vec<KeyName>,
}

impl State {
    /// The state of an installation that has done nothing yet.
    pub fn new(installation: String) -> Self {
        Self { installation, ..Self::default() }
    }

    /// Whether an agent that starts again from the earlier state `saved` gets to this one by itself, because only what can
    /// be repeated has happened since: the key of the id that was chosen was made, and its certificate requested, issued
    /// or proven. Generating a key again, or creating a request again, finds the one that is there.
    pub fn follows_from(&self, saved: &Self) -> bool {
        let is_repeatable = match &self.phase {
            Phase::Requesting { next } | Phase::Awaiting { next, .. } => next.attempt == saved.phase.attempt(),
            Phase::Proving { next, refusals: 0, unanswered: false, .. } => next.attempt == saved.phase.attempt(),
            _ => false,
        };
        is_repeatable
            && self.phase.next_key() == saved.phase.next_key()
            && Self { phase: saved.phase.clone(), ..self.clone() } == *saved
    }

    /// What tells this installation's keys from those of any other agent that shares a device.
    pub fn installation(&self) -> &str {
        &self.installation
    }

    /// The credential in use: published, and installed.
    pub fn held(&self) -> Option<&Credential> {
        self.held.as_ref()
    }

    /// What is going on.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// What failed, and until when nothing is tried.
    pub fn back_off(&self) -> Option<&BackOff> {
        self.back_off.as_ref()
    }

    /// Whether the held credential was published before the API server had accepted it, and has not been accepted since.
    pub fn held_is_unproven(&self) -> bool {
        self.held_unproven
    }

    /// Whether the API server refused the held credential although it has not expired.
    pub fn held_is_refused(&self) -> bool {
        self.held_refused
    }

    /// Whether the held credential's key is gone from its backend.
    pub fn held_key_is_lost(&self) -> bool {
        self.held_key_lost
    }

    /// Whether an operator asked for a rotation that has not ended yet.
    pub fn rotation_is_requested(&self) -> bool {
        self.rotation_requested
    }

    /// Keys of this installation's own that are to be destroyed.
    pub fn retiring(&self) -> &[KeyName] {
        &self.retiring
    }

    /// Keys in use that something else made: they are never destroyed.
    pub fn foreign(&self) -> &[KeyName] {
        &self.foreign
    }

    /// The number in the id of the key chosen last.
    pub fn last_slot(&self) -> u64 {
        self.last_slot
    }

    /// The keys that this state knows: those in use, the next one, and those to be destroyed.
    pub fn keys(&self) -> Vec<&KeyName> {
        self.keys_in_use().chain(&self.retiring).collect()
    }

    /// The keys that must not be destroyed: the held credential's, the previous one's, and the next one.
    pub(super) fn keys_in_use(&self) -> impl Iterator<Item = &KeyName> {
        let previous = self.previous.as_ref().map(|previous| previous.credential.key());
        self.held.iter().map(Credential::key).chain(previous).chain(self.phase.next_key())
    }

    /// The credential to go on speaking as while the held one, published unproven, may still be refused: the one before.
    pub fn trusted(&self) -> Option<&Credential> {
        self.previous.as_ref().map(|previous| &previous.credential).or(self.held.as_ref())
    }

    /// The credentials whose pair may be the current one: publishing is perhaps done, and is repeated.
    pub fn perhaps_published(&self) -> Vec<&Credential> {
        let other = match &self.phase {
            Phase::Publishing { issued, .. } => Some(issued),
            Phase::Restoring { dropped, .. } => Some(dropped),
            _ => None,
        };
        self.held.iter().chain(other).collect()
    }

    /// Whether the held credential can be used as far as anybody knows.
    pub fn held_is_good(&self, now: UnixTime) -> bool {
        let unexpired = self.held.as_ref().is_some_and(|held| !held.has_expired(now));
        unexpired && !self.held_refused && !self.held_key_lost
    }

    /// The credential with which the API server is asked now.
    pub fn authority(&self, now: UnixTime) -> Authority {
        if self.held_is_good(now) { Authority::Held } else { Authority::Bootstrap }
    }

    /// Failures in a row within the phase.
    pub fn failures(&self) -> u32 {
        self.back_off.as_ref().map_or(0, |back_off| back_off.failures)
    }

    /// Goes on to a phase, with all that failed behind it.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.back_off = None;
    }

    /// Chooses the name of the next key.
    pub(super) fn choose_key(&mut self, policy: &Policy) -> KeyName {
        self.last_slot = self.last_slot.saturating_add(1);
        KeyName { backend: policy.backend.clone(), id: policy.key_prefix.key_id(self.last_slot) }
    }

    /// Puts a key that is no longer in use on the list of those to be destroyed, unless it is not ours to destroy.
    pub(super) fn retire_key(&mut self, key: KeyName) {
        if self.keys_in_use().any(|used| *used == key) {
            return;
        }
        let is_foreign = self.foreign.contains(&key);
        self.foreign.retain(|foreign| *foreign != key);
        if !is_foreign && !self.retiring.contains(&key) {
            self.retiring.push(key);
        }
    }

    /// Notes that something else's key has this name: it is never destroyed.
    pub(super) fn disown(&mut self, key: KeyName) {
        if !self.foreign.contains(&key) {
            self.foreign.push(key);
        }
    }

    /// Whether the held credential can be published again.
    pub(super) fn held_can_be_restored(&self, now: UnixTime) -> bool {
        self.held.as_ref().is_some_and(|held| !held.has_expired(now)) && !self.held_key_lost
    }

    /// Gives up the candidate's key, which is destroyed before another one is made. Where its pair is perhaps published,
    /// the held one is published again first.
    pub(super) fn let_candidate_go(&mut self, reason: &str, key_lost: bool, now: UnixTime) {
        self.discarded = self.discarded.saturating_add(1);
        if let Phase::Publishing { issued, .. } = &self.phase
            && self.held_can_be_restored(now)
        {
            let (dropped, reason) = (issued.clone(), printable(reason));
            return self.enter(Phase::Restoring { dropped, reason, key_lost });
        }
        let key = self.phase.next_key().cloned();
        self.enter(Phase::RETIRING);
        if let Some(key) = key {
            self.retire_key(key);
        }
    }

    /// Holds `issued`, which is published now. Where it is not proven, what was in use before is kept.
    pub(super) fn install(&mut self, next: &Candidate, issued: Credential, proven: bool, now: UnixTime) {
        self.drop_previous();
        // Also with a key that is lost: the device may be restored before the new certificate is proven.
        let unexpired = self.held.as_ref().is_some_and(|held| !held.has_expired(now));
        let (template, refused) = (self.held_template.take(), self.held_refused);
        let rotation_requested = self.rotation_requested;
        let old = self.held.replace(issued.installed(now));
        self.held_template = Some(next.template.clone());
        (self.held_refused, self.held_key_lost, self.rotation_requested) = (false, false, false);
        self.held_unproven = !proven;
        self.enter(Phase::RETIRING);
        let key = next.key.clone();
        self.retiring.retain(|retiring| *retiring != key);
        match old {
            // A certificate that was published and adopted from disk before the journal knew of it has the same key.
            Some(old) if *old.key() == key => {}
            Some(credential) if !proven && unexpired => {
                self.previous = Some(Previous { credential, template, refused, rotation_requested });
            }
            Some(old) => self.retire_key(old.key().clone()),
            None => {}
        }
        if proven {
            self.held_is_proven();
        }
    }

    /// The API server accepts the held credential: nothing from before it is needed any more.
    pub(super) fn held_is_proven(&mut self) {
        self.held_unproven = false;
        self.discarded = 0;
        self.rejections = None;
        self.drop_previous();
    }

    pub(super) fn drop_previous(&mut self) {
        if let Some(previous) = self.previous.take() {
            self.retire_key(previous.credential.key().clone());
        }
    }

    /// Holds what was in use before again; whether there was anything of use.
    pub(super) fn restore_previous(&mut self, reason: &str, key_lost: bool, now: UnixTime) -> bool {
        let Some(previous) = self.previous.take_if(|previous| !previous.credential.has_expired(now)) else {
            return false;
        };
        let dropped = self.held.replace(previous.credential);
        self.held_template = previous.template;
        self.rotation_requested |= previous.rotation_requested;
        (self.held_refused, self.held_key_lost, self.held_unproven) = (previous.refused, false, false);
        self.discarded = self.discarded.saturating_add(1);
        self.enter(match dropped {
            Some(dropped) => Phase::Restoring { dropped, reason: printable(reason), key_lost },
            None => Phase::RETIRING,
        });
        true
    }

    /// Holds what something else made the current pair. What was in use before goes once that is proven.
    pub(super) fn replace_pair(&mut self, found: FoundPair, now: UnixTime, policy: &Policy) {
        let FoundPair { credential, key_is_ours } = found;
        if let Some(held) = &mut self.held
            && held.fingerprint() == credential.fingerprint()
        {
            if held.key() != credential.key() {
                // The name that was known is another key's now, which is not ours to destroy.
                *held = credential;
                (self.held_refused, self.held_key_lost) = (false, false);
            }
            return;
        }
        let key = credential.key().clone();
        if key_is_ours {
            let slot = policy.key_prefix.slot_of(&key.id).unwrap_or_default();
            self.last_slot = self.last_slot.max(slot);
        } else if !self.keys().contains(&&key) {
            self.foreign.push(key.clone());
        }
        self.retiring.retain(|retiring| *retiring != key);
        let candidate = self.phase.next_key().cloned();
        let earlier = self.previous.take();
        let unexpired = self.held.as_ref().is_some_and(|held| !held.has_expired(now));
        let refused = self.held_refused;
        let old = self.held.replace(credential);
        let template = std::mem::replace(&mut self.held_template, policy.template.clone());
        (self.held_refused, self.held_key_lost) = (false, false);
        self.enter(Phase::RETIRING);
        let old_key = old.as_ref().map(|old| old.key().clone());
        if unexpired
            && let Some(credential) = old
            && *credential.key() != key
        {
            self.previous = Some(Previous { credential, template, refused, rotation_requested: false });
        }
        let earlier = earlier.map(|earlier| earlier.credential.key().clone());
        for key in old_key.into_iter().chain(earlier).chain(candidate) {
            self.retire_key(key);
        }
        self.held_unproven = self.previous.is_some() || !self.retiring.is_empty();
    }

    /// Counts what was wrong with an issued certificate; how often in a row that has been the same.
    pub(super) fn count_rejection(&mut self, kind: &str) -> u32 {
        match &mut self.rejections {
            Some(rejections) if rejections.kind == kind => {
                rejections.in_a_row = rejections.in_a_row.saturating_add(1);
                rejections.in_a_row
            }
            rejections => {
                *rejections = Some(Rejections { kind: kind.to_owned(), in_a_row: 1 });
                1
            }
        }
    }

    /// Notes a failure and when to try again.
    pub(super) fn fail(
        &mut self,
        now: UnixTime,
        policy: &Policy,
        failure: impl Into<Failure>,
        retry_after: Option<Duration>,
    ) {
        let Failure { reason, hint } = failure.into();
        // The API server, an approver, a signer or a backend may have said it; from here it goes everywhere.
        let (reason, hint) = (printable(&reason), printable(&hint));
        // A request that the API server accepts ends a row of failures, but not a row of refusals (case C28).
        let refusals = match &self.phase {
            Phase::Requesting { next } | Phase::Awaiting { next, .. } => next.attempt.saturating_sub(1),
            _ => 0,
        };
        let failures = self.failures().max(self.discarded).max(refusals).saturating_add(1);
        let until = now + policy.back_off(self.phase.name(), failures, retry_after);
        self.back_off = Some(BackOff { failures, until, reason, hint, local: false, bootstrap: false });
    }

    /// Notes a failure that only something on this machine can mend; that is cheap to look at, so it is looked at often.
    pub(super) fn fail_locally(&mut self, now: UnixTime, policy: &Policy, failure: impl Into<Failure>) {
        self.fail(now, policy, failure, None);
        if let Some(back_off) = &mut self.back_off {
            back_off.until = back_off.until.min(now + Policy::LOCAL_RETRY);
            back_off.local = true;
        }
    }

    /// Notes a failure that will be the same the next time, as far as anybody can tell (case C50).
    pub(super) fn fail_hard(&mut self, now: UnixTime, policy: &Policy, failure: impl Into<Failure>) {
        self.fail(now, policy, failure, None);
        let wait = policy.long_back_off(self.phase.name(), self.failures());
        if let Some(back_off) = &mut self.back_off {
            back_off.until = now + wait;
        }
    }

    /// Until when nothing is tried, if that is later than `now`. A clock that was set back must not stretch a wait, so
    /// none is believed that is longer than any could be.
    pub(super) fn back_off_until(&self, now: UnixTime, policy: &Policy) -> Option<UnixTime> {
        let until = self.back_off.as_ref()?.until;
        (until > now && until.since(now) <= policy.longest_back_off()).then_some(until)
    }
}
