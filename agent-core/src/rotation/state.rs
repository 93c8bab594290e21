//! The state of a rotation, which is also its journal.

use std::time::Duration;

use pintle_plugins_api::{BackendError, PublicKey};
use serde::{Deserialize, Serialize};

use super::{ApiFailure, Authority};
use crate::text::printable;
use crate::{Credential, KeyName, Policy, UnixTime};

/// Everything that a rotation knows. It is saved before each action; there is no second progress record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The credential in use: published, and installed.
    pub held: Option<Credential>,
    /// What is going on.
    pub phase: Phase,
    /// The number in the id of the key chosen last; the next one is higher.
    pub last_slot: u64,
    /// What failed, and until when nothing is tried.
    pub back_off: Option<BackOff>,
    /// The API server refused the held credential although it has not ended.
    pub held_refused: bool,
    /// The held credential's key is gone from its backend.
    pub held_key_lost: bool,
    /// An operator asked for a rotation.
    pub rotation_requested: bool,
    /// Keys made and lost or thrown away since the last certificate that was proven: each makes the waits after a failure
    /// longer.
    pub discarded: u32,
    /// How often the API server has refused the held credential while it was to be proven.
    #[serde(default)]
    pub proof_refusals: u32,
    /// Keys to be destroyed once the held credential is proven.
    pub retiring: Vec<KeyName>,
}

/// What is going on, in the order of a rotation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The credential in use is good; or there is none, and getting one begins.
    #[default]
    Holding,
    /// A key of this name is chosen, and perhaps made.
    Generating {
        /// The name of the key.
        key: KeyName,
    },
    /// The key exists, and a certificate for it is perhaps requested.
    Requesting {
        /// The key, and which request for it this is.
        next: Candidate,
    },
    /// The request stands at the API server.
    Awaiting {
        /// The key, and which request for it this is.
        next: Candidate,
        /// The request as the API server knows it.
        request: SubmittedRequest,
    },
    /// The certificate has come and is good, and is perhaps written.
    Publishing {
        /// The key, and which request for it this was.
        next: Candidate,
        /// What was issued.
        issued: Credential,
    },
    /// The certificate is written and is now the held one; whether the API server takes it is not known yet.
    Proving,
    /// The API server takes it; the keys on [`State::retiring`] are perhaps destroyed.
    Retiring,
}

impl Phase {
    /// One word, as status and logs have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Holding => "holding",
            Self::Generating { .. } => "generating",
            Self::Requesting { .. } => "requesting",
            Self::Awaiting { .. } => "awaiting",
            Self::Publishing { .. } => "publishing",
            Self::Proving => "proving",
            Self::Retiring => "retiring",
        }
    }
}

/// The next key of an identity, and how often a certificate for it has been requested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Where the key is.
    pub key: KeyName,
    /// Its public half.
    pub public_key: PublicKey,
    /// 1 for the first request; one more for each that was refused.
    pub attempt: u32,
}

/// A CertificateSigningRequest as the API server knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmittedRequest {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`: another object of the same name is another request.
    pub uid: String,
}

/// What failed, and until when nothing is tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackOff {
    /// Failures in a row within the phase; no fewer than refusals of this candidate and discarded keys.
    pub failures: u32,
    /// When it is tried again.
    pub until: UnixTime,
    /// What failed, for a person.
    pub reason: String,
    /// What a person can do about it; empty where there is nothing to say.
    pub hint: String,
    /// Whether only something on this machine can mend it (a file to appear, room on the disk): then it is tried again
    /// as soon as something here changes.
    pub local: bool,
    /// Whether another bootstrap credential may mend it: then it is tried again as soon as there is one.
    #[serde(default)]
    pub bootstrap: bool,
}

impl State {
    /// The state of an identity whose credential was found on disk rather than in a journal.
    pub fn adopting(held: Credential) -> Self {
        Self { held: Some(held), ..Self::default() }
    }

    /// The keys that this identity needs: whatever else it finds under its prefix is an orphan.
    pub fn keys(&self) -> Vec<&KeyName> {
        let next = match &self.phase {
            Phase::Generating { key } => Some(key),
            Phase::Requesting { next } | Phase::Awaiting { next, .. } | Phase::Publishing { next, .. } => {
                Some(&next.key)
            }
            Phase::Holding | Phase::Proving | Phase::Retiring => None,
        };
        self.held.iter().map(Credential::key).chain(next).chain(&self.retiring).collect()
    }

    /// The credential with which the API server is asked now.
    pub fn authority(&self, now: UnixTime) -> Authority {
        match &self.held {
            Some(held) if !held.has_ended(now) && !self.held_refused && !self.held_key_lost => Authority::Held,
            _ => Authority::Bootstrap,
        }
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

    /// Until when nothing is tried, if that is later than `now`. A clock that was set back must not stretch a wait, so
    /// none is believed that is longer than any could be.
    pub(super) fn back_off_until(&self, now: UnixTime, policy: &Policy) -> Option<UnixTime> {
        let until = self.back_off.as_ref()?.until;
        (until > now && until.since(now) <= policy.longest_back_off()).then_some(until)
    }
}

/// What failed, and what a person can do about it.
pub(super) struct Failure {
    reason: String,
    hint: String,
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self { reason, hint: String::new() }
    }
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Self { reason: error.to_string(), hint: error.hint.unwrap_or_default() }
    }
}

impl From<ApiFailure> for Failure {
    fn from(failure: ApiFailure) -> Self {
        Self { reason: failure.to_string(), hint: failure.hint().to_owned() }
    }
}
