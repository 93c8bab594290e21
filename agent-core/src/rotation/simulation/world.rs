//! The world around the agent: keys, disk, API server, signer, and clocks.

use std::fmt;
use std::sync::LazyLock;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId, PublicKey};

use super::*;
use crate::KeyName;

/// Signers set notBefore this far into the past.
const BACKDATED: Duration = Duration::from_secs(300);

/// So often is it asked whether the API server still takes the certificate in use.
const PROBE_INTERVAL: Duration = Duration::from_secs(600);

/// What the agent acts on, and what is watched for broken promises.
pub(super) struct World {
    pub(super) random: Random,
    /// The true time, which API server and signer have.
    now: UnixTime,
    /// How many milliseconds this machine's clock is ahead of the truth; negative if it is behind.
    clock_error: i64,
    /// How long certificates live.
    life: Duration,
    keys: Vec<(KeyId, PublicKey)>,
    keys_made: usize,
    /// Ids that keys of somebody else have.
    foreign: Vec<KeyId>,
    /// The requests for the keys that exist.
    requests: Vec<Request>,
    serial: u64,
    /// The leaf that is published, and the key that it was issued for.
    published: Option<(Credential, PublicKey)>,
    /// The serial number of the leaf that was proven last.
    proven: Option<String>,
    /// The API server refuses whatever was issued before: that is when its authority was last replaced.
    authority_since: UnixTime,
    down_until: UnixTime,
    next_probe: UnixTime,
    /// A key that is gone is back at this time, together with its device; that is for the lives that wait for it.
    away: Option<(KeyId, PublicKey, UnixTime)>,
    /// Whether a lost key means to enrol again.
    pub(super) enrols_after_key_loss: bool,
    /// Whether the bootstrap credential goes once the node has joined, as tokens do, and is there again only for a node
    /// that has lost its identity.
    bootstrap_ends: bool,
    /// Whether the device sometimes refuses to destroy keys, for hours.
    refuses_to_destroy: bool,
    /// It does until then.
    undeletable_until: UnixTime,
    /// What it has refused to destroy.
    undeleted: Vec<KeyId>,
    next_disturbance: UnixTime,
    /// When the last disturbance ended: outage over, clock right, key lost, authority replaced.
    undisturbed_since: UnixTime,
    pub(super) rotations: u64,
}

impl fmt::Debug for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (true_time, clock, down, keys) = (self.now, self.clock(), self.now < self.down_until, self.keys.len());
        write!(
            formatter,
            "{true_time} (clock {clock}, down {down}, keys {keys}, disturbed {}):",
            self.undisturbed_since
        )
    }
}

/// A CertificateSigningRequest at the API server.
struct Request {
    public_key: PublicKey,
    attempt: u32,
    decision: Option<Decision>,
}

/// What an approver, a signer or a cleaner has done; it stays so.
enum Decision {
    Issued(Credential),
    Spoilt(Rejection),
    Denied,
    Failed,
    Deleted,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let start = UnixTime::from_seconds(1_700_000_000);
        let mut random = Random(seed);
        let life = [HOUR, 8 * HOUR, DAY, 30 * DAY, 365 * DAY][random.below(5) as usize];
        let mut world = Self {
            random,
            now: start,
            clock_error: 0,
            life,
            keys: Vec::new(),
            keys_made: 0,
            foreign: Vec::new(),
            requests: Vec::new(),
            serial: 0,
            published: None,
            proven: None,
            authority_since: start - BACKDATED,
            down_until: start,
            next_probe: start,
            away: None,
            enrols_after_key_loss: !seed.is_multiple_of(2),
            bootstrap_ends: seed % 4 < 2,
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

    /// Disturbances are far enough apart that what was promised between them can be seen.
    fn quiet(&mut self) -> Duration {
        let life = self.life;
        RECOVERY * 3 / 2 + self.random.within(life * 2)
    }

    /// The device that was away is back, if it is time.
    fn bring_back(&mut self) {
        if let Some((id, public_key, _)) = self.away.take_if(|(_, _, until)| *until <= self.now) {
            self.keys.push((id, public_key));
        }
    }

    /// The agent starts again, and finds out whether it has the key that it needs.
    pub(super) fn restart(&self, state: &State) -> Event {
        if self.held_key_is_lost(state) { Event::HeldRefused { key_lost: true } } else { Event::Woke }
    }

    fn held_key_is_lost(&self, state: &State) -> bool {
        state.held.as_ref().is_some_and(|held| self.key(&held.key().id).is_none())
    }

    fn key(&self, id: &KeyId) -> Option<&PublicKey> {
        self.keys.iter().find_map(|(key, public_key)| (key == id).then_some(public_key))
    }

    fn remove_key(&mut self, id: &KeyId) {
        self.keys.retain(|(key, _)| key != id);
        // A node cannot delete its requests; those for keys that are gone are left to the cleaner.
        self.requests.retain(|request| self.keys.iter().any(|(_, key)| *key == request.public_key));
    }

    /// A key is gone without the agent's doing.
    fn lose_key(&mut self, id: &KeyId) {
        if self.is_published(id) {
            self.undisturbed_since = self.undisturbed_since.max(self.now);
        }
        self.remove_key(id);
    }

    /// Whether this is the key of the published leaf, and not another one that has its id now.
    fn is_published(&self, id: &KeyId) -> bool {
        self.published
            .as_ref()
            .is_some_and(|(published, public_key)| published.key().id == *id && self.key(id) == Some(public_key))
    }

    pub(super) fn check_action(&self, state: &State, action: &Action) -> Result<(), Violation> {
        let asks = matches!(action, Action::Generate { .. } | Action::Submit { .. } | Action::Observe { .. });
        if asks && state.held_key_lost && !self.enrols_after_key_loss {
            return Err(format!("enrols again after a key loss, against the policy: {state:?}"));
        }
        let Action::Retire { keys } = action else {
            return Ok(());
        };
        if let Some((published, _)) = &self.published
            && self.proven.as_deref() != Some(published.serial())
            && self.takes(published)
            && self.is_published(&published.key().id)
            && self.clock() < Window::of(published).closes
        {
            return Err(format!("destroys keys before the new one is proven: {state:?}"));
        }
        for key in keys {
            if state.held.as_ref().is_some_and(|held| held.key() == key) || self.is_published(&key.id) {
                return Err(format!("destroys the key in use: {state:?}"));
            }
            if self.foreign.contains(&key.id) {
                return Err(format!("destroys somebody else's key: {state:?}"));
            }
            let public_key = self.key(&key.id);
            if self.requests.iter().any(|request| request.decision.is_none() && Some(&request.public_key) == public_key)
            {
                return Err(format!("destroys a key for which a request stands: {state:?}"));
            }
        }
        Ok(())
    }

    /// The promises.
    pub(super) fn check(&self, state: &State) -> Result<(), Violation> {
        if self.keys.iter().filter(|(key, _)| !self.undeleted.contains(key)).count() > 2 {
            return Err(format!("{} keys: {state:?}", self.keys.len()));
        }
        let undecided = self.requests.iter().filter(|request| request.decision.is_none()).count();
        if undecided > 1 {
            return Err(format!("{undecided} undecided requests: {state:?}"));
        }
        self.check_identity(state)
    }

    /// Except while the control plane is down or this machine's clock is wrong, and until [`RECOVERY`] after that, after
    /// the key in use was lost and after the authority was replaced, the published certificate is one that the API
    /// server takes, and its key is there. Where the rotation window leaves less than [`RECOVERY`] to the end, that much
    /// is counted from the window's close instead.
    fn check_identity(&self, state: &State) -> Result<(), Violation> {
        if self.clock_error != 0 || self.now.since(self.undisturbed_since) <= RECOVERY {
            return Ok(());
        }
        let Some((published, _)) = &self.published else {
            return Err(format!("no certificate at all: {state:?}"));
        };
        if !self.takes(published) || !self.is_published(&published.key().id) {
            let closed = Window::of(published).closes;
            if !published.has_ended(self.now) || self.now.since(closed) > RECOVERY {
                return Err(format!("without a certificate that works: {state:?}"));
            }
        }
        Ok(())
    }

    /// Whether the API server takes this certificate.
    fn takes(&self, credential: &Credential) -> bool {
        !credential.has_ended(self.now) && credential.not_before() >= self.authority_since
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
        Ok(match action {
            Action::Wait { .. } => Event::Woke,
            Action::Generate { key, .. } => self.generate(key),
            Action::Submit { next, authority } => self.submit(state, next, authority),
            Action::Observe { next, authority, .. } => match self.api_failure(state, authority) {
                Some(failure) => failure,
                None => Event::Observed(self.observe(&next)),
            },
            Action::Publish { issued } => self.publish(issued, decided)?,
            Action::Prove => match self.api_failure(state, Authority::Held) {
                Some(failure) => failure,
                None => self.prove(state),
            },
            Action::Retire { keys } => {
                if self.now < self.undeletable_until {
                    self.undeleted.extend(keys.into_iter().map(|key| key.id));
                    return Ok(Event::RetireFailed(failure(BackendErrorKind::Unavailable)));
                }
                for key in keys {
                    if self.key(&key.id).is_some() && self.random.one_in(6) {
                        return Ok(Event::RetireFailed(failure(BackendErrorKind::Unavailable)));
                    }
                    self.remove_key(&key.id);
                }
                Event::Retired
            }
        })
    }

    fn wait(&mut self, state: &State, until: Option<UnixTime>) -> Event {
        // Woken early, or at the time.
        let longest = until.map_or(DAY, |until| until.since(self.clock()));
        let early = if self.random.one_in(4) { self.random.within(longest) } else { Duration::ZERO };
        let wake = self.now + (longest - early).max(Duration::from_millis(1));
        let wake = match &self.away {
            Some((_, _, until)) => wake.min(*until),
            None if state.held_key_lost && !self.enrols_after_key_loss => wake.min(self.now + Duration::from_secs(10)),
            None => wake,
        };
        if wake >= self.next_disturbance {
            self.now = self.now.max(self.next_disturbance);
            if let Some(event) = self.disturb(state) {
                return event;
            }
        }
        // While it holds a credential, the agent asks now and then whether the API server still takes it.
        let probe = self.next_probe.max(self.down_until);
        if wake >= probe {
            if matches!(state.phase, Phase::Holding | Phase::Retiring)
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
        self.bring_back();
        // A lost key is looked for every ten seconds.
        if state.held_key_lost && state.held.is_some() && !self.held_key_is_lost(state) {
            return Event::HeldKeyFound;
        }
        match self.random.below(60) {
            0 => Event::RotationRequested,
            1 => Event::LocalChange,
            2 => Event::HeldRefused { key_lost: false },
            // An event that belongs to no phase in which it can come.
            3 => self.prove(state),
            4 => Event::BackendFound,
            _ => Event::Woke,
        }
    }

    /// Something happens that nobody promised against, and what the agent notices of it at once.
    fn disturb(&mut self, state: &State) -> Option<Event> {
        self.undisturbed_since = self.now;
        let mut event = None;
        let kind = if self.clock_error == 0 { self.random.below(10) } else { 10 };
        match kind {
            // The key in use is lost: for good, or until the device is back.
            0 => {
                if let Some(held) = &state.held {
                    let id = held.key().id.clone();
                    if !self.enrols_after_key_loss
                        && let Some(public_key) = self.key(&id).cloned()
                    {
                        self.undisturbed_since = self.now + self.random.within(DAY);
                        self.away = Some((id.clone(), public_key, self.undisturbed_since));
                    }
                    self.lose_key(&id);
                }
                event = Some(self.restart(state));
            }
            // The authority is replaced: whatever was issued is worth nothing.
            1 => {
                self.authority_since = self.now - BACKDATED;
                event = Some(Event::HeldRefused { key_lost: false });
            }
            // The clock is set wrong by hours, for hours.
            2 | 3 => {
                let error = i64::try_from(self.random.within(HOUR * 12).as_millis()).unwrap_or_default();
                self.clock_error = if kind == 2 { error + 1 } else { -error - 1 };
                self.next_disturbance = self.now + self.random.within(HOUR * 6);
                return Some(Event::Woke);
            }
            // The device destroys nothing, perhaps until the next certificate has ended too.
            4 if self.refuses_to_destroy => {
                self.undeletable_until = self.now + self.random.within((self.life * 3).min(DAY * 2))
            }
            // The clock is set right.
            10 => {
                self.clock_error = 0;
                event = Some(Event::Woke);
            }
            // The control plane is down: for seconds as often as for a day.
            _ => {
                let order = self.random.below(17);
                self.down_until = self.now + Duration::from_secs(1 << order) + self.random.within(DAY / 24);
                self.undisturbed_since = self.down_until;
            }
        }
        self.next_disturbance = self.undisturbed_since + self.quiet();
        event
    }

    fn generate(&mut self, key: KeyName) -> Event {
        if self.random.one_in(6) {
            return Event::GenerateFailed(failure(BackendErrorKind::Unavailable));
        }
        if self.key(&key.id).is_none() && (self.foreign.contains(&key.id) || self.random.one_in(30)) {
            self.foreign.push(key.id);
            return Event::GenerateFailed(failure(BackendErrorKind::Conflict));
        }
        if let Some(public_key) = self.key(&key.id) {
            return Event::Generated(public_key.clone());
        }
        let public_key = PUBLIC_KEYS[self.keys_made % PUBLIC_KEYS.len()].clone();
        self.keys_made += 1;
        self.keys.push((key.id, public_key.clone()));
        Event::Generated(public_key)
    }

    fn submit(&mut self, state: &State, next: Candidate, authority: Authority) -> Event {
        match self.random.below(40) {
            0..3 => return Event::SigningFailed(failure(BackendErrorKind::Unavailable)),
            3 => {
                self.lose_key(&next.key.id);
                return Event::SigningFailed(failure(BackendErrorKind::KeyLost));
            }
            _ if self.key(&next.key.id).is_none() => return Event::SigningFailed(failure(BackendErrorKind::NotFound)),
            _ => {}
        }
        if let Some(failure) = self.api_failure(state, authority) {
            return failure;
        }
        if self.request(&next).is_none() {
            let Candidate { public_key, attempt, .. } = next;
            self.requests.push(Request { public_key, attempt, decision: None });
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

    fn prove(&mut self, state: &State) -> Event {
        self.proven = state.held.as_ref().map(|held| held.serial().to_owned());
        Event::Proven
    }

    fn publish(&mut self, issued: Credential, decided: UnixTime) -> Result<Event, Violation> {
        if self.random.one_in(40) {
            self.lose_key(&issued.key().id);
        }
        let Some(public_key) = self.key(&issued.key().id).cloned() else {
            return Ok(Event::PublishFailed { detail: "key lost".to_owned(), key_lost: true });
        };
        if self.random.one_in(6) {
            return Ok(Event::PublishFailed { detail: "no space left on device".to_owned(), key_lost: false });
        }
        // It may end while it is being published.
        if issued.has_ended(decided) {
            return Err(format!("publishes what has ended: {issued:?}"));
        }
        if self.published.as_ref().map(|(published, _)| published.serial()) != Some(issued.serial()) {
            self.rotations += 1;
        }
        self.published = Some((issued, public_key));
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
            if state.held.as_ref().is_some_and(|held| !self.takes(held)) {
                return failed(ApiFailure::Unauthorized("401".to_owned()));
            }
        }
        let is_known = |world: &Self| {
            world.published.as_ref().is_some_and(|(held, _)| world.takes(held) && world.is_published(&held.key().id))
        };
        if authority == Authority::Bootstrap && self.bootstrap_ends && is_known(self) {
            return failed(ApiFailure::NoCredential("the token has ended".to_owned()));
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
            let decision = self.decide(next, kind);
            if let Some(request) = self.request(next) {
                request.decision = Some(decision);
            }
        }
        match self.request(next).map(|request| &request.decision) {
            Some(None) => Observation::Pending,
            Some(Some(Decision::Issued(issued))) => Observation::Issued(if clock >= issued.not_after() {
                Err(Rejection::Ended(issued.not_after()))
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

    fn decide(&mut self, next: &Candidate, kind: u64) -> Decision {
        match kind {
            8 => Decision::Denied,
            9 => Decision::Failed,
            10 => Decision::Deleted,
            11 => Decision::Spoilt(Rejection::OtherKey),
            12 => Decision::Spoilt(Rejection::Missing("a name".to_owned())),
            _ => {
                self.serial += 1;
                // Kind 13: the signer's clock is ahead.
                let begin = if kind == 13 { self.now + BACKDATED } else { self.now - BACKDATED };
                let issued = Credential::simulated(self.serial, begin, begin + BACKDATED + self.life);
                Decision::Issued(issued.with_key(next.key.clone()))
            }
        }
    }
}

fn failure(kind: BackendErrorKind) -> BackendError {
    BackendError::new(kind, "device")
}

/// More keys than a world has at a time.
static PUBLIC_KEYS: LazyLock<Vec<PublicKey>> = LazyLock::new(|| (0..64).map(public_key).collect());

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
