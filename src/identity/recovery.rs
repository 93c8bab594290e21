//! Where an identity stands at a start: from the journal, the pairs on disk and the keys in the backends.

use pintle_agent_core::issued::{accept, node_name_of};
use pintle_agent_core::policy::KeyPrefix;
use pintle_agent_core::{Credential, KeyName, Phase, Rejection, State, Template, UnixTime};
use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyImport, PublicKey};

use super::connection::check_key;
use super::now;
use super::pair::{leaf_key_of, private_key_of, write_pair};
use super::start::{StartError, renamed};
use crate::config::{Config, FILE_BACKEND};
use crate::keys::{CALL_DEADLINE, Keyring};
use crate::store::pair::UnreadablePair;
use crate::store::{FoundPair, PairDirectory};
use crate::telemetry::{Event, Telemetry};

/// What is needed to find out where an identity stands.
pub(super) struct Recovery<'a> {
    pub(super) config: &'a Config,
    pub(super) template: &'a Template,
    pub(super) keyring: &'a Keyring,
    pub(super) telemetry: &'a Telemetry,
    pub(super) pairs: &'a PairDirectory,
}

impl Recovery<'_> {
    /// Settles which credential is held. The current pair on disk is what everybody else uses, so it wins over the
    /// journal: a kubelet may have rotated by itself since.
    pub(super) async fn settle_held(&self, state: &mut State) -> Result<(), StartError> {
        let journalled = state.held.clone();
        // In the middle of publishing, the pair on disk may be the old one or the new one; the journal knows both, and
        // publishing is repeated.
        let publishing = match &state.phase {
            Phase::Publishing { issued, .. } => Some(issued.serial().to_owned()),
            _ => None,
        };
        let current = std::fs::canonicalize(self.pairs.current()).ok();
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
            if current.as_ref() != Some(&pair.path) && self.publish_journalled(state).await {
                return Ok(());
            }
            let public_key = match leaf_key_of(&pair.content) {
                Ok(public_key) => public_key,
                Err(reason) => {
                    self.unusable(&path, &reason);
                    continue;
                }
            };
            if let Some(other) = node_name_of(&pair.content).filter(|name| *name != self.config.node_name) {
                if index == 0 {
                    return Err(renamed(&format!("system:node:{other}"), &self.template.common_name, self.config));
                }
                continue;
            }
            let known = journalled.as_ref().filter(|held| held.public_key() == public_key.as_der());
            if let Some(held) = known
                && self.confirm(state, held, pair).await
            {
                if index > 0 {
                    let _ = self.pairs.make_current(&pair.path);
                }
                return Ok(());
            }
            match self.adopt(pair, &public_key, state).await {
                Ok(credential) if Some(credential.serial()) == publishing.as_deref() => return Ok(()),
                Ok(credential) => {
                    if index > 0 {
                        let _ = self.pairs.make_current(&pair.path);
                    }
                    self.telemetry.emit(Event::CredentialAdopted {
                        path,
                        serial: credential.serial().to_owned(),
                        not_after: credential.not_after().to_string(),
                    });
                    self.replace_held(state, credential);
                    return Ok(());
                }
                Err(reason) => self.unusable(&path, &reason),
            }
        }
        self.restore_from_journal(state).await;
        Ok(())
    }

    /// Whether the journal's credential is the one in this pair and its key is where it should be. A key that its
    /// backend cannot show right now is believed to be there.
    async fn confirm(&self, state: &mut State, held: &Credential, pair: &FoundPair) -> bool {
        match check_key(self.keyring, held.key(), held.public_key()).await {
            Ok(true) => true,
            Ok(false) => false,
            Err(error) => match error.kind {
                BackendErrorKind::NotFound | BackendErrorKind::KeyLost
                    if held.key().backend == FILE_BACKEND && private_key_of(&pair.content).is_some() =>
                {
                    // The pair holds the key as well: it goes back to where it belongs.
                    self.import(&pair.content, held.key()).is_ok()
                }
                BackendErrorKind::NotFound | BackendErrorKind::KeyLost => {
                    state.held_key_lost = true;
                    true
                }
                _ => true,
            },
        }
    }

    /// Takes over a pair that the journal does not know: a kubelet's, or an earlier one of our own.
    async fn adopt(&self, pair: &FoundPair, public_key: &PublicKey, state: &State) -> Result<Credential, String> {
        let key = match self.find_key(public_key).await {
            Some(key) => key,
            None => {
                let slot = state.last_slot + 1;
                let id = self.config.policy().key_prefix.key_id(slot);
                let key = KeyName { backend: FILE_BACKEND.to_owned(), id };
                self.import(&pair.content, &key).map_err(|error| error.to_string())?;
                key
            }
        };
        let current = now();
        let accepted = accept(&pair.content, self.template, key.clone(), public_key, None, current);
        let credential = match accepted {
            // What has ended, or has not begun by a clock that may be wrong, still says who this node is (case C06).
            Err(Rejection::Ended(at) | Rejection::NotYetValid(at)) => {
                let at = if at <= current { at - std::time::Duration::from_secs(1) } else { at };
                accept(&pair.content, self.template, key, public_key, None, at)
            }
            accepted => accepted,
        };
        credential
            .map(|credential| credential.clone().installed(installed_at(pair, &credential)))
            .map_err(|rejection| rejection.to_string())
    }

    /// The key of this public half, if a backend has it under one of this identity's names.
    async fn find_key(&self, public_key: &PublicKey) -> Option<KeyName> {
        let prefix = self.config.policy().key_prefix;
        for backend in self.keyring.names().map(str::to_owned).collect::<Vec<_>>() {
            let listed = match self.list(&backend).await {
                Ok(listed) => listed,
                Err(_) => continue,
            };
            for key in listed.into_iter().filter(|key| prefix.slot_of(&key.id).is_some()) {
                if check_key(self.keyring, &key, public_key.as_der()).await.unwrap_or(false) {
                    return Some(key);
                }
            }
        }
        None
    }

    async fn list(&self, backend: &str) -> Result<Vec<KeyName>, BackendError> {
        let ids = self.keyring.backend(backend)?.call(CALL_DEADLINE, |backend| backend.list()).await?;
        Ok(ids.into_iter().map(|id| KeyName { backend: backend.to_owned(), id }).collect())
    }

    fn import(&self, pair: &str, key: &KeyName) -> Result<(), BackendError> {
        let private_key = private_key_of(pair)
            .ok_or_else(|| BackendError::new(BackendErrorKind::NotFound, "the pair holds no private key"))?;
        // The files are the truth, so a second view of the directory beside the backend's own is as good.
        FileBackend::open(&self.config.file_keys())?.import(&key.id, &private_key).map(|_| ())
    }

    fn replace_held(&self, state: &mut State, credential: Credential) {
        let prefix = self.config.policy().key_prefix;
        if let Some(slot) = prefix.slot_of(&credential.key().id) {
            state.last_slot = state.last_slot.max(slot);
        }
        let old = state.held.replace(credential).map(|old| old.key().clone());
        (state.held_refused, state.held_key_lost) = (false, false);
        if let Some(old) = old.filter(|old| state.held.as_ref().is_some_and(|held| held.key() != old)) {
            state.retiring.push(old);
        }
    }

    /// Publishes the journal's credential again, where it has not ended and its key is there; whether that was so.
    async fn publish_journalled(&self, state: &State) -> bool {
        let Some(held) = state.held.as_ref().filter(|held| !held.has_ended(now())) else {
            return false;
        };
        let has_key = matches!(check_key(self.keyring, held.key(), held.public_key()).await, Ok(true));
        if has_key {
            self.publish(held).await;
        }
        has_key
    }

    /// No pair can be used. Where the journal's credential still has its key, it is published again; else it is gone.
    async fn restore_from_journal(&self, state: &mut State) {
        let Some(held) = state.held.clone() else {
            return;
        };
        match check_key(self.keyring, held.key(), held.public_key()).await {
            Ok(true) => self.publish(&held).await,
            Ok(false) => state.held = None,
            Err(error) if matches!(error.kind, BackendErrorKind::NotFound | BackendErrorKind::KeyLost) => {
                if held.key().backend == FILE_BACKEND { state.held = None } else { state.held_key_lost = true }
            }
            Err(_) => {}
        }
    }

    async fn publish(&self, held: &Credential) {
        // What cannot be written now is written when the agent looks around.
        let _ = write_pair(self.keyring, self.pairs, self.telemetry, held).await;
    }

    /// Finds what this identity has in its backends: no number is used twice, and what nobody needs is destroyed.
    pub(super) async fn settle_keys(&self, state: &mut State, prefix: &KeyPrefix) {
        let mut orphans = Vec::new();
        for backend in self.keyring.names().map(str::to_owned).collect::<Vec<_>>() {
            let Ok(listed) = self.list(&backend).await else {
                continue;
            };
            let own = listed.into_iter().filter_map(|key| Some((prefix.slot_of(&key.id)?, key)));
            let mut unneeded: Vec<_> = own.filter(|(_, key)| !state.keys().contains(&key)).collect();
            unneeded.sort();
            // With nothing else left of this identity, the key last made is the one that a request may stand for (C10).
            let lost_all = state.held.is_none() && state.phase == Phase::Holding && backend == self.config.backend;
            if lost_all && let Some((slot, _)) = unneeded.pop() {
                state.last_slot = state.last_slot.max(slot.saturating_sub(1));
            } else if let Some((slot, _)) = unneeded.last() {
                state.last_slot = state.last_slot.max(*slot);
            }
            orphans.extend(unneeded.into_iter().map(|(_, key)| key));
        }
        let mut destroyed = Vec::new();
        for key in orphans {
            if self.keyring.delete(&key).await.is_ok() {
                destroyed.push(key.to_string());
            }
        }
        if !destroyed.is_empty() {
            self.telemetry.emit(Event::OrphansDestroyed { keys: destroyed });
        }
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
