//! Lives of an identity in a simulated world: seeded, with failing actions, crashes between acting and journalling, an
//! API server that is sometimes down, and a clock that is sometimes wrong. Nothing here sleeps.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, PublicKey};

use super::*;
use crate::policy::KeyPrefix;

const DAY: Duration = Duration::from_secs(86_400);
/// With the control plane answering for this long, no wait after a failure can still be in the way.
const RECOVERY: Duration = Duration::from_secs(4 * 3600);

pub(crate) fn policy() -> Policy {
    Policy {
        identity: "system:node:worker-1".to_owned(),
        key_prefix: KeyPrefix::new("worker-1", "client"),
        backend: "simulated".to_owned(),
        algorithm: KeyAlgorithm::EcdsaP256,
        rotate: true,
        enrol_after_key_loss: true,
        back_off_base: Policy::BACK_OFF_BASE,
        back_off_cap: Policy::BACK_OFF_CAP,
    }
}

/// The steps under test, or a mutation of them.
type Step = fn(State, Event, UnixTime, &Policy) -> (State, Action);

/// SplitMix64: the whole of the world's randomness comes from the seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn one_in(&mut self, number: u64) -> bool {
        self.next().is_multiple_of(number)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

struct World {
    random: Random,
    now: UnixTime,
    policy: Policy,
    /// What is on disk; the running agent's own state is gone in a crash.
    journal: State,
    keys: BTreeMap<Vec<u8>, PublicKey>,
    /// Undecided requests, by name.
    requests: BTreeMap<String, u64>,
    submitted: BTreeSet<String>,
    serial: u64,
    /// The leaf that is published, and until when it is good.
    published: Option<Credential>,
    down_until: UnixTime,
    rotations: u64,
}

type Violation = String;

/// Lives through `rotations` rotations, or says what went wrong.
fn live(seed: u64, rotations: u64, step: Step) -> Result<(), Violation> {
    let start = UnixTime::from_seconds(1_700_000_000);
    let mut world = World {
        random: Random(seed),
        now: start,
        policy: policy(),
        journal: State::default(),
        keys: BTreeMap::new(),
        requests: BTreeMap::new(),
        submitted: BTreeSet::new(),
        serial: 0,
        published: None,
        down_until: start,
        rotations: 0,
    };
    let mut event = Event::Woke;
    let mut state = State::default();
    for _ in 0..rotations * 4000 {
        let (next, action) = step(state, event, world.now, &world.policy);
        if world.random.one_in(50) {
            // A crash before the journal is written: what was decided is forgotten.
            state = world.journal.clone();
            event = Event::Woke;
            continue;
        }
        world.journal = next.clone();
        state = next;
        world.check_action(&state, &action)?;
        event = world.perform(&state, action);
        world.check(&state)?;
        if world.random.one_in(30) {
            // A crash after acting and before the next journal: what happened is forgotten.
            state = world.journal.clone();
            event = Event::Woke;
        }
        if world.rotations > rotations {
            return Ok(());
        }
    }
    Err(format!("no {rotations} rotations within {} steps: {state:?}", rotations * 4000))
}

impl World {
    fn check_action(&self, state: &State, action: &Action) -> Result<(), Violation> {
        if let (Action::Retire { keys }, Some(held)) = (action, &state.held)
            && keys.contains(held.key())
        {
            return Err(format!("destroys the key in use: {state:?}"));
        }
        Ok(())
    }

    fn check(&self, state: &State) -> Result<(), Violation> {
        if self.keys.len() > 2 {
            return Err(format!("{} keys: {state:?}", self.keys.len()));
        }
        if self.requests.len() > 1 {
            return Err(format!("{} undecided requests: {state:?}", self.requests.len()));
        }
        if let Some(published) = &self.published {
            if !self.keys.contains_key(published.key().id.as_bytes()) {
                return Err(format!("the key of the published certificate is gone: {state:?}"));
            }
            if published.has_ended(self.now) && self.now.since(self.down_until) > RECOVERY {
                return Err(format!("without a valid certificate while the control plane answers: {state:?}"));
            }
        }
        Ok(())
    }

    fn perform(&mut self, state: &State, action: Action) -> Event {
        if let Action::Wait { until, .. } = action {
            let until = until.unwrap_or(self.now + DAY).max(self.now + Duration::from_millis(1));
            // Woken early, or at the time.
            let early = if self.random.one_in(4) { self.random.below(1 + until.since(self.now).as_secs()) } else { 0 };
            self.now = (until - Duration::from_secs(early)).max(self.now + Duration::from_millis(1));
            if self.random.one_in(40) {
                self.down_until = self.now + Duration::from_secs(self.random.below(DAY.as_secs()));
            }
            return match self.random.below(60) {
                0 => Event::RotationRequested,
                1 => Event::LocalChange,
                2 => Event::HeldRefused { key_lost: false },
                // An event that belongs to no phase in which it can come.
                3 => Event::Proven,
                _ => Event::Woke,
            };
        }
        self.now = self.now + Duration::from_millis(self.random.below(3000));
        match action {
            Action::Wait { .. } => Event::Woke,
            Action::Generate { key, .. } => {
                if self.random.one_in(6) {
                    return Event::GenerateFailed(unavailable());
                }
                let number = self.keys.len() as u64 ^ self.random.next();
                Event::Generated(
                    self.keys.entry(key.id.as_bytes().to_vec()).or_insert_with(|| public_key(number)).clone(),
                )
            }
            Action::Submit { next, authority } => {
                if self.random.one_in(12) {
                    return Event::SigningFailed(unavailable());
                }
                if let Some(failure) = self.api_failure() {
                    return Event::ApiFailed { authority, failure };
                }
                let name = format!("{}-{}", next.public_key.fingerprint(), next.attempt);
                if self.submitted.insert(name.clone()) {
                    self.requests.insert(name.clone(), 0);
                }
                // The answer may be lost, and the request stands all the same.
                if self.random.one_in(12) {
                    return Event::ApiFailed { authority, failure: ApiFailure::Unreachable("reset".to_owned()) };
                }
                Event::Submitted(SubmittedRequest { uid: name.clone(), name })
            }
            Action::Observe { next, request, authority } => match self.api_failure() {
                Some(failure) => Event::ApiFailed { authority, failure },
                None => Event::Observed(self.observe(&next, &request)),
            },
            Action::Publish { issued } => {
                if self.random.one_in(6) {
                    return Event::PublishFailed { detail: "no space left on device".to_owned(), key_lost: false };
                }
                if self.published.as_ref().map(Credential::serial) != Some(issued.serial()) {
                    self.rotations += 1;
                }
                self.published = Some(issued);
                Event::Published
            }
            Action::Prove => match self.api_failure() {
                Some(failure) => Event::ApiFailed { authority: state.authority(self.now), failure },
                None => Event::Proven,
            },
            Action::Retire { keys } => {
                for key in keys {
                    if self.random.one_in(6) {
                        return Event::RetireFailed(unavailable());
                    }
                    self.keys.remove(key.id.as_bytes());
                }
                Event::Retired
            }
        }
    }

    fn api_failure(&mut self) -> Option<ApiFailure> {
        if self.now < self.down_until {
            return Some(ApiFailure::Unreachable("down".to_owned()));
        }
        match self.random.below(40) {
            0 => Some(ApiFailure::Unreachable("timeout".to_owned())),
            1 => Some(ApiFailure::Throttled { detail: "busy".to_owned(), retry_after: Some(Duration::from_secs(30)) }),
            2 => Some(ApiFailure::Server("500".to_owned())),
            3 => Some(ApiFailure::Unauthorized("401".to_owned())),
            4 => Some(ApiFailure::Forbidden("403".to_owned())),
            5 => Some(ApiFailure::NoCredential("no bootstrap kubeconfig".to_owned())),
            _ => None,
        }
    }

    fn observe(&mut self, next: &Candidate, request: &SubmittedRequest) -> Observation {
        let kind = self.random.below(30);
        if kind < 8 {
            return Observation::Pending;
        }
        // From here on somebody has decided.
        self.requests.remove(&request.name);
        match kind {
            8 => Observation::Denied("not today".to_owned()),
            9 => Observation::Failed("signer error".to_owned()),
            10 => Observation::Gone,
            11 => Observation::Issued(Err(Rejection::OtherKey)),
            12 => Observation::Issued(Err(Rejection::Missing("a name".to_owned()))),
            13 => {
                // The same certificate is looked at again later, so the request is as good as undecided.
                Observation::Issued(Err(Rejection::NotYetValid(self.now + Duration::from_secs(600))))
            }
            _ => {
                self.serial += 1;
                let begin = self.now - Duration::from_secs(300);
                let issued = Credential::simulated(self.serial, begin, self.now + DAY * 30).with_key(next.key.clone());
                Observation::Issued(Ok(issued.installed(self.now)))
            }
        }
    }
}

fn unavailable() -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, "device busy")
}

/// A SubjectPublicKeyInfo of the right shape; nobody here computes with it.
fn public_key(number: u64) -> PublicKey {
    const PREFIX: [u8; 27] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
        0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
    ];
    let mut der = PREFIX.to_vec();
    der.extend(number.to_be_bytes().iter().cycle().take(64));
    PublicKey::from_der(der).expect("the shape of a P-256 key")
}

/// Runs this many lives on all cores; the seed of the first that goes wrong, and how.
fn lives(number: u64, rotations: u64, step: Step) -> Result<(), (u64, Violation)> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let failures: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    (worker..number)
                        .step_by(threads as usize)
                        .find_map(|seed| live(seed, rotations, step).err().map(|violation| (seed, violation)))
                })
            })
            .collect();
        workers.into_iter().filter_map(|worker| worker.join().expect("a life does not panic")).collect()
    });
    failures.into_iter().min().map_or(Ok(()), Err)
}

#[test]
fn a_hundred_thousand_lives_of_twenty_rotations_keep_the_promises() {
    let number = std::env::var("PINTLE_SIMULATED_LIVES").ok().and_then(|number| number.parse().ok()).unwrap_or(100_000);
    if let Err((seed, violation)) = lives(number, 20, step) {
        panic!("seed {seed}: {violation}");
    }
}

/// Each is `step` with one thing wrong; the simulation must notice all of them.
#[test]
fn every_mutation_of_step_is_caught() {
    let mutations: [(&str, Step); 6] = [
        ("retires the key in use", |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match action {
                Action::Retire { .. } => {
                    state.retiring = state.held.iter().map(|held| held.key().clone()).collect();
                    (state.clone(), Action::Retire { keys: state.retiring })
                }
                action => (state, action),
            }
        }),
        ("makes a new key for every attempt", |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match (&state.phase, action) {
                (Phase::Requesting { next }, Action::Wait { .. }) if next.attempt > 1 => {
                    let key = state.choose_key(policy);
                    state.phase = Phase::Generating { key: key.clone() };
                    (state, Action::Generate { key, algorithm: policy.algorithm })
                }
                (_, action) => (state, action),
            }
        }),
        ("never retires", |mut state, event, now, policy| {
            state.retiring.clear();
            step(state, event, now, policy)
        }),
        ("rotates too late", |state, event, now, policy| {
            let late = Policy { rotate: false, ..policy.clone() };
            let end = state.held.as_ref().map(Credential::not_after);
            let policy = if end.is_some_and(|end| now < end + RECOVERY) { &late } else { policy };
            let (state, action) = step(state, event, now, policy);
            match action {
                Action::Wait { until: Some(until), waiting: Waiting::RotationOff } => {
                    (state, Action::Wait { until: Some(until + RECOVERY * 2), waiting: Waiting::RotationOff })
                }
                action => (state, action),
            }
        }),
        ("requests again while a request stands", |mut state, event, now, policy| {
            if let (Event::ApiFailed { .. }, Phase::Awaiting { next, .. }) = (&event, &state.phase) {
                let next = Candidate { attempt: next.attempt + 1, ..next.clone() };
                state.phase = Phase::Requesting { next };
            }
            step(state, event, now, policy)
        }),
        ("gives up after a refusal", |state, event, now, policy| {
            let refused = matches!(event, Event::Observed(Observation::Denied(_)));
            let (state, action) = step(state, event, now, policy);
            if refused {
                (state, Action::Wait { until: Some(now + DAY * 365), waiting: Waiting::BackOff })
            } else {
                (state, action)
            }
        }),
    ];
    for (name, mutation) in mutations {
        assert!(lives(200, 20, mutation).is_err(), "nobody notices a step that {name}");
    }
}
