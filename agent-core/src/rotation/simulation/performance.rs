//! What comes of each action in the simulated world.

use pintle_plugins_api::BackendErrorKind;

use super::world::{BACKDATED, Decision, Issued, Key, PROBE_INTERVAL, Request, World, failure, number_of};
use super::*;
use crate::Rejection;

impl World {
    /// Performs the action, or says which promise it breaks.
    pub(super) fn perform(&mut self, state: &State, action: Action) -> Result<Event, Violation> {
        if let Action::Wait { until, .. } = action {
            return Ok(self.wait(state, until));
        }
        let decided = self.clock();
        self.now = self.now + Duration::from_millis(self.random.below(3000));
        if self.now >= self.next_disturbance
            && let Some(event) = self.disturb(state)
        {
            return Ok(event);
        }
        if let Some(event) = self.mend() {
            return Ok(event);
        }
        Ok(match action {
            Action::Wait { .. } => Event::Woke,
            Action::Generate { key, .. } => self.generate(key),
            Action::Submit { next, authority } => self.submit(state, next, authority),
            Action::Observe { next, authority, .. } => match self.api_failure(state, authority) {
                Some(failure) => failure,
                None => Event::Observed(self.observe(&next)),
            },
            Action::Prove { credential } => self.prove(state, &credential),
            Action::Publish { credential } => self.publish(state, credential, decided)?,
            Action::Retire { keys } => self.retire(keys),
        })
    }

    fn retire(&mut self, keys: Vec<KeyName>) -> Event {
        let (mut destroyed, mut failed) = (Vec::new(), Vec::new());
        for key in keys {
            let refused = self.now < self.undeletable_until || self.key(&key).is_some() && self.random.one_in(6);
            match self.fault(&key) {
                None if !refused => {
                    self.remove_key(&key);
                    self.away.take_if(|(away, _)| away.name == key);
                    destroyed.push(key);
                }
                fault => {
                    failed.push(failure(fault.unwrap_or(BackendErrorKind::Unavailable)));
                    self.undeleted.push(key);
                }
            }
        }
        Event::Retired { destroyed, failed }
    }

    fn wait(&mut self, state: &State, until: Option<UnixTime>) -> Event {
        // Woken early, or at the time.
        let longest = until.map_or(DAY, |until| until.since(self.clock()));
        let early = if self.random.one_in(4) { self.random.within(longest) } else { Duration::ZERO };
        let wake = self.now + (longest - early).max(Duration::from_millis(1));
        let wake = self.next_mending().map_or(wake, |mending| wake.min(mending.max(self.now)));
        let wake = if state.held_key_lost && !self.policy.enrol_after_key_loss && self.away.is_none() {
            wake.min(self.now + Duration::from_secs(10))
        } else {
            wake
        };
        if wake >= self.next_disturbance {
            self.now = self.now.max(self.next_disturbance);
            if let Some(event) = self.disturb(state) {
                return event;
            }
        }
        // While it holds a credential, the agent asks now and then whether the API server still accepts it.
        let probe = self.next_probe.max(self.down_until);
        if wake >= probe {
            if matches!(state.phase, Phase::Holding | Phase::Retiring { .. })
                && state.authority(self.clock()) == Authority::Held
                && state.held.as_ref().is_some_and(|held| !self.takes(held))
            {
                self.now = self.now.max(probe);
                self.next_probe = self.now + PROBE_INTERVAL;
                return Event::HeldRefused { key_lost: false };
            }
            self.next_probe = wake + PROBE_INTERVAL;
        }
        self.now = self.now.max(wake);
        if let Some(event) = self.mend() {
            return event;
        }
        // A lost key is looked for every ten seconds.
        if state.held_key_lost && state.held.as_ref().is_some_and(|held| self.has_key_of(held)) {
            return Event::HeldKeyFound;
        }
        match self.random.below(60) {
            0 => Event::RotationRequested,
            1 => Event::LocalChange,
            2 => Event::HeldRefused { key_lost: false },
            // An event that does not belong to the phase.
            3 if !matches!(state.phase, Phase::Publishing { .. } | Phase::Restoring { .. }) => Event::Published,
            4 => Event::BackendFound,
            _ => Event::Woke,
        }
    }

    fn has_key_of(&self, credential: &Credential) -> bool {
        self.fault(credential.key()).is_none() && self.key(credential.key()).is_some()
    }

    fn generate(&mut self, key: KeyName) -> Event {
        if let Some(fault) = self.fault(&key) {
            return Event::GenerateFailed(failure(fault));
        }
        if self.foreign.contains(&key) {
            return Event::GenerateFailed(failure(BackendErrorKind::Conflict));
        }
        match self.random.below(60) {
            0..9 => return Event::GenerateFailed(failure(BackendErrorKind::Unavailable)),
            9 => return Event::GenerateFailed(failure(BackendErrorKind::Locked)),
            // Made and lost again.
            10 => {
                self.remove_key(&key);
                return Event::GenerateFailed(failure(BackendErrorKind::KeyLost));
            }
            11 => return Event::GenerateFailed(failure(BackendErrorKind::Corrupt)),
            _ => {}
        }
        if self.key(&key).is_none() && self.random.one_in(30) {
            self.foreign.push(key);
            return Event::GenerateFailed(failure(BackendErrorKind::Conflict));
        }
        if let Some(public_key) = self.key(&key) {
            return Event::Generated(public_key.clone());
        }
        let public_key = self.new_public_key();
        self.keys.push(Key { name: key, public_key: public_key.clone(), ours: true });
        Event::Generated(public_key)
    }

    fn submit(&mut self, state: &State, next: Candidate, authority: Authority) -> Event {
        if let Some(fault) = self.fault(&next.key) {
            return Event::SigningFailed(failure(fault));
        }
        match self.random.below(40) {
            0..3 => return Event::SigningFailed(failure(BackendErrorKind::Unavailable)),
            3 => {
                self.remove_key(&next.key);
                return Event::SigningFailed(failure(BackendErrorKind::KeyLost));
            }
            _ if self.key(&next.key).is_none() => return Event::SigningFailed(failure(BackendErrorKind::NotFound)),
            _ => {}
        }
        if let Some(failure) = self.api_failure(state, authority) {
            return failure;
        }
        if self.request(&next).is_none() {
            let template = number_of(&next.template);
            let Candidate { public_key, attempt, .. } = next;
            self.requests.push(Request { public_key, attempt, template, decision: None });
            self.submitted.push_back(self.now);
        }
        // The answer may be lost, and the request stands all the same.
        if self.random.one_in(12) {
            return Event::ApiFailed { authority, failure: ApiFailure::Unreachable("reset".to_owned()) };
        }
        Event::Submitted(SubmittedRequest { uid: String::new(), name: String::new() })
    }

    /// The request for this key and attempt; nobody else's has its name.
    fn request(&mut self, next: &Candidate) -> Option<&mut Request> {
        self.requests
            .iter_mut()
            .find(|request| request.attempt == next.attempt && request.public_key == next.public_key)
    }

    fn prove(&mut self, state: &State, credential: &Credential) -> Event {
        let key = credential.key();
        if self.random.one_in(60) && !self.is_published(key) {
            self.remove_key(key);
        }
        if let Some(fault) = self.fault(key) {
            return Event::ProofKeyFailed(failure(fault));
        }
        if self.key(key).is_none() {
            return Event::ProofKeyFailed(failure(BackendErrorKind::NotFound));
        }
        if let Some(failure) = self.api_failure(state, Authority::Issued) {
            return failure;
        }
        if !self.takes(credential) {
            let failure = ApiFailure::Unauthorized("401".to_owned());
            return Event::ApiFailed { authority: Authority::Issued, failure };
        }
        Event::Proven
    }

    fn publish(&mut self, state: &State, credential: Credential, decided: UnixTime) -> Result<Event, Violation> {
        let key = credential.key().clone();
        if self.random.one_in(40) && !self.is_published(&key) && matches!(state.phase, Phase::Publishing { .. }) {
            self.remove_key(&key);
        }
        if let Some(fault) = self.fault(&key) {
            return Ok(Event::PublishFailed(PublishError::Backend(failure(fault))));
        }
        let Some(public_key) = self.key(&key).cloned() else {
            return Ok(Event::PublishFailed(PublishError::Backend(failure(BackendErrorKind::KeyLost))));
        };
        if self.random.one_in(6) {
            let detail = "no space left on device".to_owned();
            return Ok(Event::PublishFailed(PublishError::Disk { detail, hint: String::new() }));
        }
        // It may expire while it is being published.
        if credential.has_expired(decided) {
            return broken(Promise::CurrentWorks, format!("publishes what has expired: {credential:?}"), state);
        }
        if self.published.as_ref().map(|(published, _)| published.fingerprint()) != Some(credential.fingerprint()) {
            self.rotations += 1;
        }
        if self.proven.as_ref() == Some(credential.fingerprint()) {
            self.last_proven = Some((credential.clone(), public_key.clone()));
        }
        self.published = Some((credential, public_key));
        Ok(Event::Published)
    }

    /// What is in the way of asking the API server as this authority, if anything is.
    fn api_failure(&mut self, state: &State, authority: Authority) -> Option<Event> {
        let failed = |failure| Some(Event::ApiFailed { authority, failure });
        if self.now < self.down_until {
            return failed(ApiFailure::Unreachable("down".to_owned()));
        }
        if authority == Authority::Held {
            if self.held_key_is_lost(state) {
                return Some(Event::HeldRefused { key_lost: true });
            }
            if state.held.as_ref().is_some_and(|held| self.fault(held.key()).is_some()) {
                return failed(ApiFailure::Unreachable("the key did not sign".to_owned()));
            }
            if state.held.as_ref().is_some_and(|held| !self.takes(held)) {
                return failed(ApiFailure::Unauthorized("401".to_owned()));
            }
        }
        let is_known = |world: &Self| {
            world.published.as_ref().is_some_and(|(held, _)| world.takes(held) && world.is_published(held.key()))
        };
        if authority == Authority::Bootstrap && self.bootstrap_expires && is_known(self) {
            return failed(ApiFailure::NoCredential("the token has expired".to_owned()));
        }
        match self.random.below(40) {
            0 => failed(ApiFailure::Unreachable("timeout".to_owned())),
            1 => {
                failed(ApiFailure::Throttled { detail: "busy".to_owned(), retry_after: Some(Duration::from_secs(30)) })
            }
            2 => failed(ApiFailure::Server("500".to_owned())),
            3 => failed(ApiFailure::Unauthorized("401".to_owned())),
            4 => failed(ApiFailure::Forbidden("403".to_owned())),
            5 => failed(ApiFailure::NoCredential("no bootstrap kubeconfig".to_owned())),
            _ => None,
        }
    }

    fn observe(&mut self, next: &Candidate) -> Observation {
        let (clock, kind) = (self.clock(), self.random.below(30));
        if self.request(next).is_some_and(|request| request.decision.is_none()) && kind >= 8 {
            let template = self.request(next).map_or(0, |request| request.template);
            let decision = self.decide(next, template, kind);
            if let Some(request) = self.request(next) {
                request.decision = Some(decision);
            }
        }
        match self.request(next).map(|request| &request.decision) {
            Some(None) => Observation::Pending,
            Some(Some(Decision::Issued(issued))) => Observation::Issued(if clock >= issued.not_after() {
                Err(Rejection::Expired(issued.not_after()))
            } else if clock < issued.not_before() {
                Err(Rejection::NotYetValid(issued.not_before()))
            } else {
                Ok(issued.clone().installed(clock))
            }),
            Some(Some(Decision::Spoilt(rejection))) => Observation::Issued(Err(rejection.clone())),
            Some(Some(Decision::Denied)) => Observation::Denied("not today".to_owned()),
            Some(Some(Decision::Failed)) => Observation::Failed("signer error".to_owned()),
            Some(Some(Decision::Deleted)) | None => Observation::Gone,
        }
    }

    fn decide(&mut self, next: &Candidate, template: u64, kind: u64) -> Decision {
        match kind {
            8 => Decision::Denied,
            9 => Decision::Failed,
            10 => Decision::Deleted,
            11 => Decision::Spoilt(Rejection::OtherKey),
            12 => Decision::Spoilt(Rejection::Missing("a name".to_owned())),
            // Kind 13: the signer's clock is ahead.
            _ => Decision::Issued(self.issue(next.key.clone(), template, kind == 13)),
        }
    }

    /// Issues a certificate, as the signer does now.
    pub(super) fn issue(&mut self, key: KeyName, template: u64, ahead: bool) -> Credential {
        self.issued.push(Issued { authority: self.signer_authority, template });
        let begin = if ahead { self.now + BACKDATED } else { self.now - BACKDATED };
        // One that counts a short life from a notBefore in the past.
        let life = if self.now < self.issues_expired_until { Duration::from_secs(240) } else { BACKDATED + self.life };
        Credential::simulated(self.issued.len() as u64, begin, begin + life).with_key(key)
    }
}
