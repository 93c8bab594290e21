//! Where an identity stands at a start: from the journal, the pairs on disk and the keys in the backends.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use pintle_agent_core::issued::{Leaf, accept, node_name_of};
use pintle_agent_core::rotation::{Found, FoundPair as AdoptedPair};
use pintle_agent_core::{Credential, KeyName, Policy, Rejection, State, Template, UnixTime};
use pintle_plugins_api::{BackendError, BackendErrorKind, PublicKey};

use super::pair::{check_or_restore_key, is_lost, leaf_key_of, private_key_of, read_hint, write_pair};
use super::ports::Ports;
use super::start_error::{StartError, renamed};
use crate::config::{FILE_BACKEND, IdentityConfig};
use crate::keys::CALL_DEADLINE;
use crate::store::pair::UnreadablePair;
use crate::store::{FoundPair, PairDirectory};
use crate::telemetry::{Event, Telemetry};

/// What is needed to find out where an identity stands.
pub(super) struct Recovery<'a> {
    pub(super) policy: &'a Policy,
    pub(super) config: &'a IdentityConfig,
    pub(super) template: &'a Template,
    pub(super) ports: &'a Ports,
    pub(super) telemetry: &'a Telemetry,
    pub(super) pairs: &'a PairDirectory,
}

/// Where an identity stands, as far as that can be said yet.
pub(super) enum Standing {
    /// This was found.
    Found(Found),
    /// The current pair is good, and only a device that does not answer could say whether its key is there.
    Unknown(MissingBackend),
}

/// A backend that does not answer, and may hold the key of the current pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MissingBackend {
    /// What is the matter, for a person.
    pub(super) reason: String,
    /// What a person can do about it.
    pub(super) hint: String,
}

/// Why a pair is not taken over.
pub(super) enum NotAdopted {
    /// It cannot be used, for this reason.
    Unusable(String),
    /// Its key may be in this backend, which does not answer.
    BackendMissing(KeyNotSeen),
}

/// The first backend that could not say whether it has a key, and why.
pub(super) struct KeyNotSeen {
    backend: String,
    error: BackendError,
}

impl Recovery<'_> {
    /// Finds which credential is held. The current pair on disk is what everybody else uses, so it wins over the journal:
    /// a kubelet may have rotated by itself since. What is told is noted in `told`, and not told again.
    ///
    /// # Errors
    /// A pair that this process may not read, and a node that was renamed: what to do about these, a person decides.
    pub(super) async fn find_held(
        &self,
        journalled: &State,
        told: &mut BTreeSet<(PathBuf, String)>,
    ) -> Result<Standing, StartError> {
        let (mut forbidden, mut is_newest) = (None, true);
        for pair in &self.pairs.pairs() {
            let pair = match pair {
                Ok(pair) => pair,
                Err(unreadable) => {
                    if unreadable.error.kind() == io::ErrorKind::PermissionDenied {
                        // Unreadable is not absent (case C38): others may well be using it.
                        if self.pairs.is_current(&unreadable.path) {
                            return Err(self.forbidden(unreadable));
                        }
                        forbidden.get_or_insert_with(|| self.forbidden(unreadable));
                    }
                    self.unusable(&unreadable.path, &unreadable.error.to_string(), told);
                    continue;
                }
            };
            let is_current = self.pairs.is_current(&pair.path);
            // The current pair is unreadable or gone. What the journal holds is newer than any other pair, and its key is
            // not only in the pair (case C02).
            if !is_current && self.publish_journalled(journalled).await {
                return Ok(Standing::Found(Found::AsJournalled));
            }
            let public_key = match leaf_key_of(&pair.content) {
                Ok(public_key) => public_key,
                Err(reason) => {
                    self.unusable(&pair.path, &reason, told);
                    continue;
                }
            };
            if let Some(other) = node_name_of(&pair.content).filter(|name| *name != self.config.node.name) {
                if is_newest {
                    return Err(renamed(&format!("system:node:{other}"), &self.template.common_name, self.config));
                }
                continue;
            }
            is_newest = false;
            let found = match self.recognise(pair, journalled).await {
                Some(found) => found,
                None => match self.adopt(pair, &public_key, journalled).await {
                    Ok(adopted) => {
                        self.adopted(pair, &adopted);
                        Found::Pair(adopted)
                    }
                    Err(NotAdopted::BackendMissing(missing)) if !journalled.held_is_good(self.ports.clock.now()) => {
                        return Ok(Standing::Unknown(missing.keeps(&pair.path)));
                    }
                    Err(NotAdopted::BackendMissing(missing)) => {
                        self.unusable(&pair.path, &missing.keeps(&pair.path).reason, told);
                        continue;
                    }
                    Err(NotAdopted::Unusable(reason)) => {
                        self.unusable(&pair.path, &reason, told);
                        continue;
                    }
                },
            };
            if !is_current {
                // What is in the way is told, with what to do about it, when the agent next looks at the current pair.
                let _ = self.pairs.make_current(&pair.path);
            }
            return Ok(Standing::Found(found));
        }
        let found = self.restore_from_journal(journalled).await;
        match forbidden {
            Some(error) if journalled.held().is_none() || found == Found::Nothing => Err(error),
            _ => Ok(Standing::Found(found)),
        }
    }

    fn forbidden(&self, UnreadablePair { path, error }: &UnreadablePair) -> StartError {
        StartError {
            detail: format!("the pair {} cannot be read: {error}", path.display()),
            hint: read_hint(self.pairs, path, error),
        }
    }

    /// What a pair is that the journal knows; `None` if it does not know this one, or its key is another's now.
    async fn recognise(&self, pair: &FoundPair, journalled: &State) -> Option<Found> {
        let leaf = Leaf::of(&pair.content).ok()?;
        let published = journalled.perhaps_published();
        let known = published.into_iter().find(|known| *known.fingerprint() == leaf.fingerprint)?;
        if journalled.held().is_none_or(|held| held.fingerprint() != known.fingerprint()) {
            // In the middle of publishing: that is repeated, and finds out about the key.
            return Some(Found::AsJournalled);
        }
        match self.check_or_restore_key(known).await {
            Ok(true) => Some(Found::AsJournalled),
            Ok(false) => None,
            Err(error) if is_lost(&error) => Some(Found::KeyLost),
            // A key that its backend cannot show right now is believed to be there.
            Err(_) => Some(Found::AsJournalled),
        }
    }

    /// Takes over a pair that the journal does not know: a kubelet's, or an earlier one of our own.
    pub(super) async fn adopt(
        &self,
        pair: &FoundPair,
        public_key: &PublicKey,
        journalled: &State,
    ) -> Result<AdoptedPair, NotAdopted> {
        let imported =
            KeyName { backend: FILE_BACKEND.to_owned(), id: self.policy.key_prefix.key_id(journalled.last_slot() + 1) };
        // Before anything is done for a pair that nobody can use, or waits for its key.
        let acceptable = self.accept(pair, public_key, imported.clone());
        let acceptable = acceptable.map_err(|rejection| NotAdopted::Unusable(rejection.to_string()))?;
        let (key, key_is_ours) = match (self.find_key(public_key, journalled).await, private_key_of(&pair.content)) {
            (Ok(Some(found)), _) => found,
            (_, Some(private_key)) => {
                if let Err(error) = self.ports.keyring.import(&imported, private_key).await {
                    return Err(match error.kind {
                        BackendErrorKind::Unavailable => {
                            NotAdopted::BackendMissing(KeyNotSeen { backend: imported.backend, error })
                        }
                        _ => NotAdopted::Unusable(error.to_string()),
                    });
                }
                (imported, true)
            }
            (Err(missing), None) if !acceptable.has_expired(self.ports.clock.now()) => {
                return Err(NotAdopted::BackendMissing(missing));
            }
            (_, None) => {
                let reason = "it holds no private key, and no backend that answers has its key";
                return Err(NotAdopted::Unusable(reason.to_owned()));
            }
        };
        let credential = self.accept(pair, public_key, key);
        let credential = credential.map_err(|rejection| NotAdopted::Unusable(rejection.to_string()))?;
        let installed = self.installed_at(pair, &credential);
        Ok(AdoptedPair { credential: credential.installed(installed), key_is_ours })
    }

    /// The credential in a pair. What has expired, or is not valid yet by a clock that may be wrong, still says who this
    /// node is (case C06).
    fn accept(&self, pair: &FoundPair, public_key: &PublicKey, key: KeyName) -> Result<Credential, Rejection> {
        let accept = |key, at| accept(&pair.content, self.template, key, public_key, None, at);
        let current = self.ports.clock.now();
        match accept(key.clone(), current) {
            Err(Rejection::Expired(at) | Rejection::NotYetValid(at)) => {
                accept(key, if at <= current { at - std::time::Duration::from_secs(1) } else { at })
            }
            accepted => accepted,
        }
    }

    /// Tells that a pair was taken over.
    pub(super) fn adopted(&self, pair: &FoundPair, adopted: &AdoptedPair) {
        self.telemetry.emit(Event::CredentialAdopted {
            path: pair.path.display().to_string(),
            serial: adopted.credential.serial().to_owned(),
            not_after: adopted.credential.not_after().to_string(),
        });
    }

    /// The key of this public half, if a backend has it under a name of this identity; and whether it is this
    /// installation's own. A key in a device that an earlier installation made, or another cluster's agent, is used for
    /// the pair that names it, and never destroyed (case C33).
    ///
    /// # Errors
    /// If none has it, and one of them cannot say: not seen is not absent.
    async fn find_key(
        &self,
        public_key: &PublicKey,
        journalled: &State,
    ) -> Result<Option<(KeyName, bool)>, KeyNotSeen> {
        let prefix = &self.policy.key_prefix;
        let mut not_seen = None;
        for backend in self.ports.keyring.names().map(str::to_owned).collect::<Vec<_>>() {
            let listed = match self.list(&backend).await {
                Ok(listed) => listed,
                Err(error) => {
                    if !is_lost(&error) {
                        not_seen.get_or_insert(KeyNotSeen { backend, error });
                    }
                    continue;
                }
            };
            for key in listed {
                let is_known = journalled.keys().contains(&&key) && !journalled.foreign().contains(&key);
                if !is_known && !prefix.is_of_same_identity(&key.id) {
                    continue;
                }
                match self.ports.keyring.has(&key, public_key.as_der()).await {
                    Ok(true) => {
                        let is_ours = is_known || key.backend == FILE_BACKEND || prefix.slot_of(&key.id).is_some();
                        return Ok(Some((key, is_ours)));
                    }
                    Ok(false) => {}
                    // It says something of one key only: another that cannot be read is not waited for.
                    Err(BackendError { kind: BackendErrorKind::Corrupt | BackendErrorKind::Unsupported, .. }) => {}
                    Err(error) if is_lost(&error) => {}
                    Err(error) => {
                        not_seen.get_or_insert(KeyNotSeen { backend: backend.clone(), error });
                    }
                }
            }
        }
        not_seen.map_or(Ok(None), Err)
    }

    async fn list(&self, backend: &str) -> Result<Vec<KeyName>, BackendError> {
        let ids = self.ports.keyring.backend(backend)?.call(CALL_DEADLINE, |backend| backend.list()).await?;
        Ok(ids.into_iter().map(|id| KeyName { backend: backend.to_owned(), id }).collect())
    }

    async fn check_or_restore_key(&self, credential: &Credential) -> Result<bool, BackendError> {
        check_or_restore_key(&self.ports.keyring, self.pairs, self.telemetry, credential).await
    }

    /// Publishes the journal's credential again, where it has not expired and its key is there; whether that was so.
    async fn publish_journalled(&self, state: &State) -> bool {
        let Some(held) = state.held().filter(|held| !held.has_expired(self.ports.clock.now())) else {
            return false;
        };
        let has_key = matches!(self.check_or_restore_key(held).await, Ok(true));
        if has_key {
            self.publish(held).await;
        }
        has_key
    }

    /// No pair can be used. Where the journal's credential still has its key, it is published again; else it is gone.
    async fn restore_from_journal(&self, journalled: &State) -> Found {
        let Some(held) = journalled.held() else {
            return Found::AsJournalled;
        };
        match self.check_or_restore_key(held).await {
            Ok(true) => {
                self.publish(held).await;
                Found::AsJournalled
            }
            Ok(false) => Found::Nothing,
            Err(error) if is_lost(&error) => {
                if held.key().backend == FILE_BACKEND {
                    Found::Nothing
                } else {
                    Found::KeyLost
                }
            }
            Err(_) => Found::AsJournalled,
        }
    }

    async fn publish(&self, held: &Credential) {
        // What cannot be written now is written when the agent next observes its environment.
        let _ = write_pair(self.ports, self.pairs, self.telemetry, held).await;
    }

    /// Tells that something on disk is passed over.
    fn unusable(&self, path: &Path, reason: &str, told: &mut BTreeSet<(PathBuf, String)>) {
        if told.insert((path.to_owned(), reason.to_owned())) {
            self.telemetry.emit(Event::DiskUnusable {
                path: path.display().to_string(),
                reason: reason.to_owned(),
                instead: "the next older pair is tried, then the bootstrap credential".to_owned(),
            });
        }
    }

    /// When a pair was installed: what its file says, within the certificate's validity.
    fn installed_at(&self, pair: &FoundPair, credential: &Credential) -> UnixTime {
        let installed = self.pairs.installed_at(&pair.path).unwrap_or(credential.not_before());
        installed.clamp(credential.not_before(), credential.not_after())
    }
}

impl KeyNotSeen {
    /// What is said of a pair that is kept for as long as this backend does not answer.
    pub(super) fn keeps(&self, pair: &Path) -> MissingBackend {
        let Self { backend, error } = self;
        let pair = pair.display();
        let hint = error.hint.as_ref().map_or_else(String::new, |hint| format!("{hint}; "));
        MissingBackend {
            reason: format!("{pair} waits for backend {backend}, which may have its key: {error}"),
            hint: format!("{hint}to get a certificate for a new key instead, move {pair} away"),
        }
    }
}
