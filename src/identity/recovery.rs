//! Where an identity stands at a start: from the journal, the pairs on disk and the keys in the backends.

use pintle_agent_core::issued::{Leaf, accept, node_name_of};
use pintle_agent_core::rotation::{Found, FoundPair as AdoptedPair};
use pintle_agent_core::{Credential, KeyName, Policy, Rejection, State, Template, UnixTime};
use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyImport, PublicKey};

use super::pair::{leaf_key_of, private_key_of, write_pair};
use super::ports::Ports;
use super::start::{StartError, renamed};
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

impl Recovery<'_> {
    /// Finds which credential is held. The current pair on disk is what everybody else uses, so it wins over the journal:
    /// a kubelet may have rotated by itself since.
    pub(super) async fn find_held(&self, journalled: &State) -> Result<Found, StartError> {
        let current = self.pairs.current_file();
        for (index, pair) in self.pairs.pairs().iter().enumerate() {
            let pair = match pair {
                Ok(pair) => pair,
                Err(UnreadablePair { path, error }) => {
                    self.unusable(&path.display().to_string(), &error.to_string());
                    continue;
                }
            };
            let path = pair.path.display().to_string();
            // The current pair is unreadable or gone. What the journal holds is newer than any other pair, and its key is
            // not only in the pair (case C02).
            if current.as_ref() != Some(&pair.path) && self.publish_journalled(journalled).await {
                return Ok(Found::AsJournalled);
            }
            let public_key = match leaf_key_of(&pair.content) {
                Ok(public_key) => public_key,
                Err(reason) => {
                    self.unusable(&path, &reason);
                    continue;
                }
            };
            if let Some(other) = node_name_of(&pair.content).filter(|name| *name != self.config.node.name) {
                if index == 0 {
                    return Err(renamed(&format!("system:node:{other}"), &self.template.common_name, self.config));
                }
                continue;
            }
            match self.recognise(pair, journalled).await {
                Some(found) => {
                    if index > 0 {
                        let _ = self.pairs.make_current(&pair.path);
                    }
                    return Ok(found);
                }
                None => match self.adopt(pair, &public_key, journalled).await {
                    Ok(adopted) => {
                        if index > 0 {
                            let _ = self.pairs.make_current(&pair.path);
                        }
                        self.adopted(pair, &adopted);
                        return Ok(Found::Pair(adopted));
                    }
                    Err(reason) => self.unusable(&path, &reason),
                },
            }
        }
        Ok(self.restore_from_journal(journalled).await)
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
        match self.ports.keyring.has(known.key(), known.public_key()).await {
            Ok(true) => Some(Found::AsJournalled),
            Ok(false) => None,
            Err(error) => match error.kind {
                BackendErrorKind::NotFound | BackendErrorKind::KeyLost
                    if known.key().backend == FILE_BACKEND && private_key_of(&pair.content).is_some() =>
                {
                    // The pair holds the key as well: it goes back to where it belongs.
                    self.import(&pair.content, known.key()).is_ok().then_some(Found::AsJournalled)
                }
                BackendErrorKind::NotFound | BackendErrorKind::KeyLost => Some(Found::KeyLost),
                // A key that its backend cannot show right now is believed to be there.
                _ => Some(Found::AsJournalled),
            },
        }
    }

    /// Takes over a pair that the journal does not know: a kubelet's, or an earlier one of our own.
    pub(super) async fn adopt(
        &self,
        pair: &FoundPair,
        public_key: &PublicKey,
        journalled: &State,
    ) -> Result<AdoptedPair, String> {
        let (key, key_is_ours) = match self.find_key(public_key, journalled).await {
            Some(found) => found,
            None => {
                let id = self.policy.key_prefix.key_id(journalled.last_slot() + 1);
                let key = KeyName { backend: FILE_BACKEND.to_owned(), id };
                self.import(&pair.content, &key).map_err(|error| error.to_string())?;
                (key, true)
            }
        };
        let current = self.ports.clock.now();
        let accepted = accept(&pair.content, self.template, key.clone(), public_key, None, current);
        let credential = match accepted {
            // What has expired, or is not valid yet by a clock that may be wrong, still says who this node is (case C06).
            Err(Rejection::Expired(at) | Rejection::NotYetValid(at)) => {
                let at = if at <= current { at - std::time::Duration::from_secs(1) } else { at };
                accept(&pair.content, self.template, key, public_key, None, at)
            }
            accepted => accepted,
        };
        let credential = credential.map_err(|rejection| rejection.to_string())?;
        let installed = installed_at(pair, &credential);
        Ok(AdoptedPair { credential: credential.installed(installed), key_is_ours })
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
    async fn find_key(&self, public_key: &PublicKey, journalled: &State) -> Option<(KeyName, bool)> {
        let prefix = &self.policy.key_prefix;
        for backend in self.ports.keyring.names().map(str::to_owned).collect::<Vec<_>>() {
            let Ok(listed) = self.list(&backend).await else { continue };
            for key in listed {
                let is_known = journalled.keys().contains(&&key) && !journalled.foreign().contains(&key);
                if !is_known && !prefix.is_of_same_identity(&key.id) {
                    continue;
                }
                if self.ports.keyring.has(&key, public_key.as_der()).await.unwrap_or(false) {
                    let is_ours = is_known || key.backend == FILE_BACKEND || prefix.slot_of(&key.id).is_some();
                    return Some((key, is_ours));
                }
            }
        }
        None
    }

    async fn list(&self, backend: &str) -> Result<Vec<KeyName>, BackendError> {
        let ids = self.ports.keyring.backend(backend)?.call(CALL_DEADLINE, |backend| backend.list()).await?;
        Ok(ids.into_iter().map(|id| KeyName { backend: backend.to_owned(), id }).collect())
    }

    fn import(&self, pair: &str, key: &KeyName) -> Result<(), BackendError> {
        let private_key = private_key_of(pair)
            .ok_or_else(|| BackendError::new(BackendErrorKind::NotFound, "the pair holds no private key"))?;
        // The files are the truth, so a second view of the directory beside the backend's own is as good.
        FileBackend::open(&self.config.node.file_keys())?.import(&key.id, &private_key).map(|_| ())
    }

    /// Publishes the journal's credential again, where it has not expired and its key is there; whether that was so.
    async fn publish_journalled(&self, state: &State) -> bool {
        let Some(held) = state.held().filter(|held| !held.has_expired(self.ports.clock.now())) else {
            return false;
        };
        let has_key = matches!(self.ports.keyring.has(held.key(), held.public_key()).await, Ok(true));
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
        match self.ports.keyring.has(held.key(), held.public_key()).await {
            Ok(true) => {
                self.publish(held).await;
                Found::AsJournalled
            }
            Ok(false) => Found::Nothing,
            Err(error) if matches!(error.kind, BackendErrorKind::NotFound | BackendErrorKind::KeyLost) => {
                if held.key().backend == FILE_BACKEND { Found::Nothing } else { Found::KeyLost }
            }
            Err(_) => Found::AsJournalled,
        }
    }

    async fn publish(&self, held: &Credential) {
        // What cannot be written now is written when the agent next observes its environment.
        let _ = write_pair(self.ports, self.pairs, self.telemetry, held).await;
    }

    fn unusable(&self, path: &str, reason: &str) {
        self.telemetry.emit(Event::DiskUnusable {
            path: path.to_owned(),
            reason: reason.to_owned(),
            instead: "the next older pair is tried, then the bootstrap credential".to_owned(),
        });
    }
}

/// When a pair was installed: what its file says, within the certificate's validity.
fn installed_at(pair: &FoundPair, credential: &Credential) -> UnixTime {
    let installed = crate::store::pair::installed_at(&pair.path).unwrap_or(credential.not_before());
    installed.clamp(credential.not_before(), credential.not_after())
}
