//! When to rotate, and when to try again.

use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use pintle_plugins_api::{KeyAlgorithm, KeyId};

use crate::{Credential, Template, UnixTime};

/// What the operator decided. A step with another policy than the last one is told of it by
/// [`Event::PolicyChanged`](crate::Event::PolicyChanged).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whose identity it is, such as `system:node:worker-1`. It spreads the retries of a fleet.
    pub identity: String,
    /// What the ids of this identity's keys begin with.
    pub key_prefix: KeyPrefix,
    /// The name of the backend in which new keys are made. A credential whose key is elsewhere is rotated at once:
    /// that is what a migration is.
    pub backend: String,
    /// The algorithm of new keys.
    pub algorithm: KeyAlgorithm,
    /// What certificate is wanted. `None` where it is not known yet, as of a node without addresses: then nothing new is
    /// asked for.
    pub template: Option<Template>,
    /// Whether a certificate is rotated before it expires. If not, it is held until it expires.
    pub rotate: bool,
    /// Whether to enrol again with the bootstrap credential when the backend has lost the key in use. If not, the agent
    /// waits for a person.
    pub enrol_after_key_loss: bool,
    /// The upper bound of the first wait after a failure; it doubles with each further one.
    pub back_off_base: Duration,
    /// The upper bound of every wait after a failure.
    pub back_off_cap: Duration,
}

impl Policy {
    /// The first wait after a failure is below two seconds.
    pub const BACK_OFF_BASE: Duration = Duration::from_secs(2);
    /// No wait is longer than ten minutes.
    pub const BACK_OFF_CAP: Duration = Duration::from_secs(600);
    /// A server that asks for more than an hour of silence gets an hour.
    pub const RETRY_AFTER_CAP: Duration = Duration::from_secs(3600);
    /// How often a thing that only this machine can mend (a bootstrap kubeconfig, room on the disk) is looked at again.
    pub const LOCAL_RETRY: Duration = Duration::from_secs(10);
    /// A client that reads the pair from its file may speak as the old certificate for this long after a rotation:
    /// client-go looks at its files every five minutes (`transport.CertCallbackRefreshDuration`).
    pub const FILE_CONSUMER_DELAY: Duration = Duration::from_secs(300);

    /// How long to wait after the given number of failures in a row: full jitter, doubling from
    /// [`back_off_base`](Self::back_off_base) to [`back_off_cap`](Self::back_off_cap), on top of what the server asked
    /// for with Retry-After.
    ///
    /// The jitter is a hash of the identity, of `what` failed and of the count: no two nodes share it, and a restart
    /// does not redraw it.
    pub fn back_off(&self, what: &str, failures: u32, retry_after: Option<Duration>) -> Duration {
        let bound = self.back_off_base.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(self.back_off_cap);
        let fraction = fraction_of(&[self.identity.as_bytes(), what.as_bytes(), &failures.to_be_bytes()]);
        bound.mul_f64(fraction) + retry_after.unwrap_or_default().min(Self::RETRY_AFTER_CAP)
    }

    /// How long to wait before trying again what will fail in the same way, as far as anybody can tell: half to all of
    /// [`back_off_cap`](Self::back_off_cap), with the same jitter.
    pub fn long_back_off(&self, what: &str, failures: u32) -> Duration {
        let fraction = fraction_of(&[self.identity.as_bytes(), what.as_bytes(), &failures.to_be_bytes()]);
        self.back_off_cap / 2 + (self.back_off_cap / 2).mul_f64(fraction)
    }

    /// No wait after a failure is longer than this.
    pub fn longest_back_off(&self) -> Duration {
        self.back_off_cap + Self::RETRY_AFTER_CAP
    }
}

/// What the ids of an identity's keys begin with: the node, the identity within it, and the installation, such as
/// `worker-1_client_5e1f09ac`.
///
/// Several nodes may share a token, nodes of different clusters may have equal names, and a node may be installed anew:
/// an installation chooses its part at random, once, and keeps it in its journal. No node's name has an underscore
/// (RFC 1123). The ids of versions before 0.2 have no part for the installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPrefix {
    identity: String,
    installation: String,
}

impl KeyPrefix {
    /// A longer name of node and identity would leave no room for the rest in a [`KeyId`].
    const MAXIMUM_LENGTH: usize = 91;

    /// The prefix for this identity of this node, as this installation (eight hexadecimal digits) has it. A node name too
    /// long for it is replaced by its hash.
    pub fn new(node_name: &str, identity: &str, installation: &str) -> Self {
        let mut prefix = format!("{node_name}_{identity}");
        if prefix.len() > Self::MAXIMUM_LENGTH {
            let hash = digest(&SHA256, prefix.as_bytes());
            prefix = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        }
        Self { identity: prefix, installation: installation.chars().take(8).collect() }
    }

    /// The id of the key with this number.
    pub fn key_id(&self, slot: u64) -> KeyId {
        KeyId::new(format!("{}_{}_{slot}", self.identity, self.installation))
            .expect("at most 91 bytes, 8 characters, two underscores and at most 20 digits")
    }

    /// The number of the key with this id, if the id has this prefix: then this installation has made it.
    pub fn slot_of(&self, id: &KeyId) -> Option<u64> {
        let (installation, slot) = self.rest_of(id)?.split_once('_')?;
        if installation == self.installation { slot.parse().ok() } else { None }
    }

    /// The installation that made the key of this id, if the id is one of an identity's.
    pub fn installation_of(id: &KeyId) -> Option<&str> {
        let mut parts = std::str::from_utf8(id.as_bytes()).ok()?.rsplit('_');
        parts.next()?.parse::<u64>().ok()?;
        let installation = parts.next()?;
        let is_one = installation.len() == 8 && installation.bytes().all(|byte| byte.is_ascii_hexdigit());
        parts.next().filter(|_| is_one).map(|_| installation)
    }

    /// Whether the id is of an identity of the same name, of whichever installation or version.
    pub fn is_of_same_identity(&self, id: &KeyId) -> bool {
        let slot = self.rest_of(id).map(|rest| rest.rsplit_once('_').map_or(rest, |(_, slot)| slot));
        slot.is_some_and(|slot| slot.parse::<u64>().is_ok())
    }

    fn rest_of<'a>(&self, id: &'a KeyId) -> Option<&'a str> {
        std::str::from_utf8(id.as_bytes()).ok()?.strip_prefix(&self.identity)?.strip_prefix('_')
    }
}

/// The part of a credential's life in which it is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// When the usable life began: the later of notBefore and the moment the certificate was installed. Signers set
    /// notBefore some minutes into the past; counting from it would rotate short-lived certificates in a hot loop.
    pub begin: UnixTime,
    /// 70 % of the usable life.
    pub opens: UnixTime,
    /// When this certificate is rotated: a point between `opens` and `closes` that its own hash determines.
    pub deadline: UnixTime,
    /// 90 % of the usable life, or earlier, so that who still speaks as the old certificate can go on for
    /// [`Policy::FILE_CONSUMER_DELAY`] where the life is long enough for that.
    pub closes: UnixTime,
    /// notAfter.
    pub end: UnixTime,
}

impl Window {
    /// The window of this credential.
    pub fn of(credential: &Credential) -> Self {
        let (not_before, not_after) = (credential.not_before(), credential.not_after());
        Self::new(not_before, not_after, credential.installed_at(), credential.fingerprint())
    }

    /// The window of a leaf with this validity and fingerprint that was installed at this time.
    pub fn new(not_before: UnixTime, not_after: UnixTime, installed_at: UnixTime, fingerprint: &[u8; 32]) -> Self {
        let end = not_after;
        let begin = not_before.max(installed_at).min(end);
        let life = end.since(begin);
        let opens = begin + life * 7 / 10;
        let closes = begin + life * 9 / 10;
        let unhurried = end - Policy::FILE_CONSUMER_DELAY;
        let closes = if unhurried > opens { closes.min(unhurried) } else { closes };
        let deadline = opens + closes.since(opens).mul_f64(fraction_of_hash(fingerprint));
        Self { begin, opens, deadline, closes, end }
    }
}

/// A number in [0, 1) that the bytes determine.
fn fraction_of(parts: &[&[u8]]) -> f64 {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    fraction_of_hash(digest(&SHA256, &bytes).as_ref())
}

/// A number in [0, 1) that a hash determines.
fn fraction_of_hash(hash: &[u8]) -> f64 {
    let mut first = [0; 4];
    first.copy_from_slice(&hash[..4]);
    f64::from(u32::from_be_bytes(first)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::simulation::policy;

    #[test]
    fn back_off_doubles_to_its_cap_and_adds_retry_after() {
        let policy = policy();
        let longest =
            |failures: u32| (0..500).map(|n| policy.back_off(&n.to_string(), failures, None)).max().unwrap_or_default();
        assert!(longest(1) < Duration::from_secs(2) && longest(1) > Duration::from_millis(1900));
        assert!(longest(4) < Duration::from_secs(16) && longest(4) > Duration::from_secs(15));
        assert!(longest(40) < Duration::from_secs(600) && longest(40) > Duration::from_secs(580));
        assert!(policy.back_off("x", 1, Some(Duration::from_secs(30))) >= Duration::from_secs(30));
        assert_eq!(policy.back_off("x", 3, None), policy.back_off("x", 3, None));
        for failures in 1..100 {
            let long = policy.long_back_off("x", failures);
            assert!((Duration::from_secs(300)..=Duration::from_secs(600)).contains(&long), "{long:?}");
        }
    }

    /// Case C33.
    #[test]
    fn key_ids_tell_installations_apart() {
        let (one, other) = (KeyPrefix::new("a", "client", "0123abcd"), KeyPrefix::new("a", "client", "89ef4567"));
        let id = |text: &str| KeyId::new(text.as_bytes()).expect("an id");
        assert_eq!(one.key_id(7), id("a_client_0123abcd_7"));
        assert_eq!((one.slot_of(&one.key_id(7)), other.slot_of(&one.key_id(7))), (Some(7), None));
        assert_eq!(one.slot_of(&id("a_client_7")), None);
        assert_eq!(KeyPrefix::installation_of(&one.key_id(7)), Some("0123abcd"));
        for none in ["a_client_7", "0123abcd_7", "a_client_0123abcd_x", "a_client_0123abxx_7"] {
            assert_eq!(KeyPrefix::installation_of(&id(none)), None, "{none}");
        }
        for (text, same) in [
            ("a_client_7", true),
            ("a_client_89ef4567_7", true),
            ("a_client_x", false),
            ("b_client_7", false),
            ("a_client2_7", false),
        ] {
            assert_eq!(one.is_of_same_identity(&id(text)), same, "{text}");
        }
        let long = KeyPrefix::new(&"n".repeat(253), "client", "0123abcd");
        assert_eq!(long.slot_of(&long.key_id(u64::MAX)), Some(u64::MAX));
    }

    #[test]
    fn window_counts_from_installation_and_leaves_file_consumers_their_time() {
        let at = UnixTime::from_seconds;
        for number in 0..200 {
            // Backdated by five minutes, as kube-controller-manager does, and thirty seconds to live.
            let short = Credential::simulated(number, at(700), at(1030)).installed(at(1000));
            let window = Window::of(&short);
            assert_eq!((window.opens, window.closes), (at(1021), at(1027)));
            assert!(window.opens <= window.deadline && window.deadline < window.closes);

            let hour = Credential::simulated(number, at(1000), at(4600)).installed(at(1000));
            assert_eq!(Window::of(&hour).closes, at(1000 + 3240));
            let twenty_minutes = Credential::simulated(number, at(1000), at(2200)).installed(at(1000));
            assert_eq!(Window::of(&twenty_minutes).closes, at(1900));
        }
    }
}
