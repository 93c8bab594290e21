//! The world around the agent: keys, disk, API server, signer, and clocks.

use std::collections::VecDeque;
use std::fmt;
use std::sync::LazyLock;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId, PublicKey};

use super::*;
use crate::Rejection;

/// Signers set notBefore this far into the past.
const BACKDATED: Duration = Duration::from_secs(300);

/// So often is it asked whether the API server still accepts the certificate in use.
const PROBE_INTERVAL: Duration = Duration::from_secs(600);

/// Where keys can be made.
pub(super) const BACKENDS: [&str; 2] = ["simulated", "other"];

/// What the agent acts on, and what is watched for broken promises.
pub(super) struct World {
    pub(super) random: Random,
    /// What is configured now.
    pub(super) policy: Policy,
    /// The number of the template that is configured, also while it is not known.
    pub(super) template: u64,
    /// The true time, which API server and signer have.
    pub(super) now: UnixTime,
    /// How many milliseconds this machine's clock is ahead of the truth; negative if it is behind.
    pub(super) clock_error: i64,
    /// How long certificates live.
    pub(super) life: Duration,
    pub(super) keys: Vec<Key>,
    keys_made: usize,
    /// Keys of somebody else under ids that would have been ours.
    pub(super) foreign: Vec<KeyName>,
    foreign_ids: u64,
    /// The requests for the keys that exist.
    pub(super) requests: Vec<Request>,
    /// When requests were made, within the last hour.
    pub(super) submitted: VecDeque<UnixTime>,
    pub(super) most_requests: usize,
    /// What was issued, by serial number less one.
    issued: Vec<Issued>,
    /// The leaf that is published, and the key that it was issued for.
    pub(super) published: Option<(Credential, PublicKey)>,
    /// The fingerprint of the leaf that was proven last.
    pub(super) proven: Option<[u8; 32]>,
    /// The fingerprint of the leaf that was refused last as it was to be proven.
    pub(super) refused_proof: Option<[u8; 32]>,
    /// What was published and proven last.
    pub(super) last_proven: Option<(Credential, PublicKey)>,
    /// The certificate that was in use when a rotation was asked for last.
    pub(super) unwanted: Option<[u8; 32]>,
    /// How many authorities there have been.
    pub(super) authorities: u64,
    pub(super) signer_authority: u64,
    /// The authorities that the API server knows.
    pub(super) trusted: Vec<u64>,
    pub(super) signer_mended_at: Option<UnixTime>,
    pub(super) issues_expired_until: UnixTime,
    pub(super) addresses_back_at: Option<UnixTime>,
    pub(super) down_until: UnixTime,
    next_probe: UnixTime,
    /// What each backend answers instead of working, and until when.
    pub(super) broken: [Option<(BackendErrorKind, UnixTime)>; 2],
    /// A key that is gone is back at this time, together with its device; that is for the lives that wait for it.
    pub(super) away: Option<(Key, UnixTime)>,
    /// Whether the bootstrap credential goes once the node has joined, as tokens do, and is there again only for a node
    /// that has lost its identity.
    bootstrap_expires: bool,
    /// Whether the device sometimes refuses to destroy keys, for hours.
    pub(super) refuses_to_destroy: bool,
    /// It does until then.
    pub(super) undeletable_until: UnixTime,
    /// What was to be destroyed, and was not.
    pub(super) undeleted: Vec<KeyName>,
    pub(super) next_disturbance: UnixTime,
    /// When the last disturbance ended, or will end: outage over, clock right, key lost, authority replaced.
    pub(super) undisturbed_since: UnixTime,
    pub(super) rotations: u64,
}

impl fmt::Debug for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (true_time, clock, down, keys) = (self.now, self.clock(), self.now < self.down_until, self.keys.len());
        write!(
            formatter,
            "{true_time} (clock {clock}, down {down}, keys {keys}, broken {:?}, signer {} of {:?}, disturbed {}):",
            self.broken, self.signer_authority, self.trusted, self.undisturbed_since
        )
    }
}

/// A key in a backend.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) name: KeyName,
    pub(super) public_key: PublicKey,
    /// Whether the agent made it.
    pub(super) ours: bool,
}

/// A CertificateSigningRequest at the API server.
pub(super) struct Request {
    pub(super) public_key: PublicKey,
    attempt: u32,
    template: u64,
    pub(super) decision: Option<Decision>,
}

/// What an approver, a signer or a cleaner has done; it stays so.
pub(super) enum Decision {
    Issued(Credential),
    Spoilt(Rejection),
    Denied,
    Failed,
    Deleted,
}

/// What a certificate was made from.
struct Issued {
    authority: u64,
    template: u64,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let start = UnixTime::from_seconds(1_700_000_000);
        let mut random = Random(seed);
        let life = [HOUR, 8 * HOUR, DAY, 30 * DAY, 365 * DAY][random.below(5) as usize];
        let mut world = Self {
            random,
            policy: Policy { enrol_after_key_loss: !seed.is_multiple_of(2), ..policy() },
            template: 0,
            now: start,
            clock_error: 0,
            life,
            keys: Vec::new(),
            keys_made: 0,
            foreign: Vec::new(),
            foreign_ids: 0,
            requests: Vec::new(),
            submitted: VecDeque::new(),
            most_requests: 0,
            issued: Vec::new(),
            published: None,
            proven: None,
            refused_proof: None,
            last_proven: None,
            unwanted: None,
            authorities: 0,
            signer_authority: 0,
            trusted: vec![0],
            signer_mended_at: None,
            issues_expired_until: start,
            addresses_back_at: None,
            down_until: start,
            next_probe: start,
            broken: [None, None],
            away: None,
            bootstrap_expires: seed % 4 < 2,
            refuses_to_destroy: seed % 8 > 5,
            undeletable_until: start,
            undeleted: Vec::new(),
            next_disturbance: start,
            undisturbed_since: start,
            rotations: 0,
        };
        world.next_disturbance = start + world.quiet();
        world
    }

    /// What this machine's clock shows.
    pub(super) fn clock(&self) -> UnixTime {
        UnixTime::from_milliseconds(self.now.as_milliseconds() + self.clock_error)
    }

    /// Remembers what the agent was asked for and told.
    pub(super) fn note_event(&mut self, event: &Event, state: &State) {
        if *event == Event::RotationRequested {
            self.unwanted = state.held.as_ref().map(|held| *held.fingerprint());
        }
        // An answer that a crash has lost is not known.
        if *event == Event::Proven
            && let Phase::Proving { issued: proven, .. } = &state.phase
        {
            self.proven = Some(*proven.fingerprint());
        }
        if let (Event::Proven, Phase::Retiring { .. }, Some((published, public_key))) =
            (event, &state.phase, &self.published)
            && state.held.as_ref().is_some_and(|held| held.fingerprint() == published.fingerprint())
        {
            self.proven = Some(*published.fingerprint());
            self.last_proven = Some((published.clone(), public_key.clone()));
        }
        if let Event::ApiFailed { authority: Authority::Issued, failure: ApiFailure::Unauthorized(_) } = event
            && let Phase::Proving { issued, .. } = &state.phase
        {
            self.refused_proof = Some(*issued.fingerprint());
        }
    }

    /// The agent starts again, and finds out whether it has the key that it needs.
    pub(super) fn restart(&mut self, state: State) -> (State, Event) {
        let found = if self.held_key_is_lost(&state) { Found::KeyLost } else { Found::AsJournalled };
        // Another pair may have been made the current one while no agent ran.
        let found = match (&self.published, &state.held, &state.phase) {
            (Some((published, _)), Some(held), Phase::Holding)
                if published.fingerprint() != held.fingerprint() && !self.key_is_ours(published.key()) =>
            {
                Found::Pair(FoundPair { credential: published.clone(), key_is_ours: false })
            }
            _ => found,
        };
        (State::recovered(Some(state), String::new(), found, self.clock(), &self.policy), Event::Woke)
    }

    fn key_is_ours(&self, name: &KeyName) -> bool {
        self.keys.iter().all(|key| key.name != *name || key.ours)
    }

    pub(super) fn held_key_is_lost(&self, state: &State) -> bool {
        state.held.as_ref().is_some_and(|held| self.fault(held.key()).is_none() && self.key(held.key()).is_none())
    }

    pub(super) fn key(&self, name: &KeyName) -> Option<&PublicKey> {
        self.keys.iter().find_map(|key| (key.name == *name).then_some(&key.public_key))
    }

    pub(super) fn remove_key(&mut self, name: &KeyName) {
        if self.is_published(name) {
            self.undisturbed_since = self.undisturbed_since.max(self.now);
        }
        self.keys.retain(|key| key.name != *name);
        self.undeleted.retain(|undeleted| undeleted != name);
        // A node cannot delete its requests; those for keys that are gone are left to the cleaner.
        self.requests.retain(|request| self.keys.iter().any(|key| key.public_key == request.public_key));
    }

    /// Whether this is the key of the published leaf, and not another one that has its id now.
    pub(super) fn is_published(&self, key: &KeyName) -> bool {
        self.published
            .as_ref()
            .is_some_and(|(published, public_key)| published.key() == key && self.key(key) == Some(public_key))
    }

    fn made_from(&self, credential: &Credential) -> Option<&Issued> {
        let serial = usize::from_str_radix(credential.serial(), 16).ok()?;
        self.issued.get(serial.checked_sub(1)?)
    }

    /// Whether the API server accepts this certificate.
    pub(super) fn takes(&self, credential: &Credential) -> bool {
        let trusted = self.made_from(credential).is_some_and(|issued| self.trusted.contains(&issued.authority));
        !credential.has_expired(self.now) && trusted
    }

    pub(super) fn template_of(&self, credential: &Credential) -> u64 {
        self.made_from(credential).map_or(0, |issued| issued.template)
    }

    pub(super) fn template_is_known(&self) -> bool {
        self.policy.template.is_some()
    }

    pub(super) fn new_public_key(&mut self) -> PublicKey {
        self.keys_made += 1;
        PUBLIC_KEYS[self.keys_made % PUBLIC_KEYS.len()].clone()
    }

    pub(super) fn foreign_id(&mut self) -> KeyId {
        self.foreign_ids += 1;
        KeyId::new(format!("kubelet_{}", self.foreign_ids)).expect("a short id")
    }

    /// What the key's backend answers instead of working.
    fn fault(&self, key: &KeyName) -> Option<BackendErrorKind> {
        let device = usize::from(key.backend != BACKENDS[0]);
        self.broken[device].map(|(kind, _)| kind)
    }

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

fn number_of(template: &Template) -> u64 {
    template.dns_names.first().and_then(|name| name.strip_prefix("name-")?.parse().ok()).unwrap_or(0)
}

fn failure(kind: BackendErrorKind) -> BackendError {
    BackendError::new(kind, "device")
}

/// More keys than a world has at a time.
static PUBLIC_KEYS: LazyLock<Vec<PublicKey>> = LazyLock::new(|| (0..1024).map(public_key).collect());

/// A SubjectPublicKeyInfo of the right shape; nobody here computes with it.
pub(crate) fn public_key(number: u64) -> PublicKey {
    const PREFIX: [u8; 27] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
        0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
    ];
    let mut der = PREFIX.to_vec();
    der.extend(number.to_be_bytes().iter().cycle().take(64));
    PublicKey::from_der(der).expect("the shape of a P-256 key")
}
