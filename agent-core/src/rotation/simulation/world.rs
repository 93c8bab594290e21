//! The world around the agent: keys, disk, API server, signer, and clocks.

use std::collections::VecDeque;
use std::fmt;
use std::sync::LazyLock;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId, PublicKey};

use super::*;
use crate::Rejection;

/// Signers set notBefore this far into the past.
pub(super) const BACKDATED: Duration = Duration::from_secs(300);

/// How often the API server is asked whether it still accepts the certificate in use.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_secs(600);

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
    pub(super) keys_made: usize,
    /// Keys of somebody else under ids that would have been ours.
    pub(super) foreign: Vec<KeyName>,
    pub(super) foreign_ids: u64,
    /// The requests for the keys that exist.
    pub(super) requests: Vec<Request>,
    /// When requests were made, within the last hour.
    pub(super) submitted: VecDeque<UnixTime>,
    pub(super) most_requests: usize,
    /// What was issued, by serial number less one.
    pub(super) issued: Vec<Issued>,
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
    pub(super) next_probe: UnixTime,
    /// What each backend answers instead of working, and until when.
    pub(super) broken: [Option<(BackendErrorKind, UnixTime)>; 2],
    /// A key that is gone is back at this time, together with its device; that is for the lives that wait for it.
    pub(super) away: Option<(Key, UnixTime)>,
    /// Whether the bootstrap credential goes once the node has joined, as tokens do, and is there again only for a node
    /// that has lost its identity.
    pub(super) bootstrap_expires: bool,
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
    pub(super) attempt: u32,
    pub(super) template: u64,
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
pub(super) struct Issued {
    pub(super) authority: u64,
    pub(super) template: u64,
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

    pub(super) fn key_is_ours(&self, name: &KeyName) -> bool {
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

    pub(super) fn made_from(&self, credential: &Credential) -> Option<&Issued> {
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
    pub(super) fn fault(&self, key: &KeyName) -> Option<BackendErrorKind> {
        let device = usize::from(key.backend != BACKENDS[0]);
        self.broken[device].map(|(kind, _)| kind)
    }
}

pub(super) fn number_of(template: &Template) -> u64 {
    template.dns_names.first().and_then(|name| name.strip_prefix("name-")?.parse().ok()).unwrap_or(0)
}

pub(super) fn failure(kind: BackendErrorKind) -> BackendError {
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
