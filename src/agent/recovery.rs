//! Where an identity stands at a start: from the journal, the pairs on disk and the keys in the backends.

use std::fmt;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use pintle_agent_core::issued::{accept, node_name_of, public_key_of};
use pintle_agent_core::policy::KeyPrefix;
use pintle_agent_core::{Credential, KeyName, Phase, Rejection, State, Template};
use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyImport, PublicKey};
use zeroize::Zeroizing;

use super::connection::{Connections, check_key};
use super::{Agent, Parts, now};
use crate::agent::clock::Clock;
use crate::config::{Config, FILE_BACKEND};
use crate::consumers::kubeconfig;
use crate::keys::{CALL_DEADLINE, Keyring};
use crate::store::journal::JournalError;
use crate::store::{FoundPair, Journal, PairDirectory};
use crate::telemetry::{Event, Telemetry};

/// Why an agent cannot start: only a person can mend it.
#[derive(Debug)]
pub struct StartError {
    /// What is wrong, and where.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
}

impl fmt::Display for StartError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.detail)
    }
}

impl std::error::Error for StartError {}

pub(super) async fn start(parts: Parts) -> Result<Agent, StartError> {
    let Parts { config, keyring, telemetry, commands } = parts;
    let (policy, template) = (config.policy(), config.template());
    let authorities = config.client_ca_file.as_ref().map(read_authorities).transpose()?;
    let journal = Journal::new(config.journal(), template.common_name.clone());
    let pairs = PairDirectory::new(config.cert_dir.clone(), "kubelet-client");
    telemetry.emit(Event::Started {
        identity: template.common_name.clone(),
        version: env!("CARGO_PKG_VERSION"),
        backend: config.backend.clone(),
    });

    let journalled = read_journal(&journal, &config, &telemetry)?;
    if let Err(error) = pairs.prepare() {
        return Err(StartError {
            detail: format!("the directory {} cannot be used: {error}", config.cert_dir.display()),
            hint: "make it a directory that pintle may write to, or name another with --cert-dir".to_owned(),
        });
    }
    let pairs_lock = lock(&config.cert_dir)?;
    let recovery =
        Recovery { config: &config, template: &template, keyring: &keyring, telemetry: &telemetry, pairs: &pairs };
    let mut state = journalled.unwrap_or_default();
    recovery.settle_held(&mut state).await?;
    recovery.settle_keys(&mut state, &policy.key_prefix).await;
    if let Some(reason) = kubeconfig::staleness(&config.kubeconfig, &pairs.current()) {
        telemetry.emit(Event::KubeconfigStale { path: config.kubeconfig.display().to_string(), reason });
    }

    Ok(Agent {
        clock: Clock::new(),
        connections: Connections::default(),
        reporter: super::report::Reporter::default(),
        probe: super::look_around::Probe::default(),
        config,
        policy,
        template,
        authorities,
        journal,
        pairs,
        keyring,
        telemetry,
        commands,
        state,
        _pairs_lock: pairs_lock,
        proxy: None,
    })
}

/// Locks the directory of pairs: agents with state directories of their own would still prune each other's pairs.
fn lock(directory: &Path) -> Result<File, StartError> {
    let failed = |detail: String, hint: &str| StartError { detail, hint: hint.to_owned() };
    let opened = File::open(directory).map_err(|error| {
        failed(format!("the directory {} cannot be read: {error}", directory.display()), "run pintle as its owner")
    })?;
    match opened.try_lock() {
        Ok(()) => Ok(opened),
        Err(TryLockError::WouldBlock) => Err(failed(
            format!("another pintle publishes into {}", directory.display()),
            "give each agent its own --cert-dir",
        )),
        // Some network file systems have no locks; two agents there are not told apart.
        Err(TryLockError::Error(_)) => Ok(opened),
    }
}

fn read_authorities(path: &PathBuf) -> Result<Vec<Vec<u8>>, StartError> {
    let failed = |detail: String| StartError {
        detail: format!("the authority's certificates in {} cannot be used: {detail}", path.display()),
        hint: "name a PEM file of certificates with --client-ca-file, or leave it out".to_owned(),
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let blocks = pem::parse_many(text).map_err(|error| failed(error.to_string()))?;
    let certificates: Vec<_> =
        blocks.into_iter().filter(|block| block.tag() == "CERTIFICATE").map(pem::Pem::into_contents).collect();
    if certificates.is_empty() { Err(failed("there is none".to_owned())) } else { Ok(certificates) }
}

fn read_journal(journal: &Journal, config: &Config, telemetry: &Telemetry) -> Result<Option<State>, StartError> {
    let path = journal.path().display();
    match journal.load() {
        Ok(state) => Ok(state),
        Err(JournalError::Unreadable(reason)) => {
            // The pair and the keys still tell most of it.
            let instead = match journal.set_aside() {
                Ok(aside) => format!("it is kept as {}, and the state is taken from the pair on disk", aside.display()),
                Err(error) => format!("it cannot be moved aside either: {error}"),
            };
            telemetry.emit(Event::DiskUnusable { path: path.to_string(), reason, instead });
            Ok(None)
        }
        Err(JournalError::OtherIdentity { found, wanted }) => Err(renamed(&found, &wanted, config)),
        Err(error @ JournalError::Version(_)) => Err(StartError {
            detail: format!("the journal {path} cannot be used: {error}"),
            hint: "run the pintle that wrote it, or move it aside: the state is then taken from the pair on disk"
                .to_owned(),
        }),
        Err(error @ JournalError::Unreachable(_)) => Err(StartError {
            detail: format!("the journal {path} cannot be used: {error}"),
            hint: "run pintle as the owner of its state directory".to_owned(),
        }),
    }
}

/// The node's name is not the one in the credential (case C12).
fn renamed(found: &str, wanted: &str, config: &Config) -> StartError {
    let name = found.strip_prefix("system:node:").unwrap_or(found);
    StartError {
        detail: format!("the credential on this machine is of {found}, and this node is now {wanted}"),
        hint: format!(
            "to keep the old name: --node-name {name}; to enrol as the new one: mv {pki} {pki}.old && mv {state} \
             {state}.old, and start with --bootstrap-kubeconfig",
            pki = config.cert_dir.display(),
            state = config.state_dir.display()
        ),
    }
}

struct Recovery<'a> {
    config: &'a Config,
    template: &'a Template,
    keyring: &'a Keyring,
    telemetry: &'a Telemetry,
    pairs: &'a PairDirectory,
}

impl Recovery<'_> {
    /// Settles which credential is held. The current pair on disk is what everybody else uses, so it wins over the
    /// journal: a kubelet may have rotated by itself since.
    async fn settle_held(&self, state: &mut State) -> Result<(), StartError> {
        let journalled = state.held.clone();
        // In the middle of publishing, the pair on disk may be the old one or the new one; the journal knows both, and
        // publishing is repeated.
        let publishing = match &state.phase {
            Phase::Publishing { issued, .. } => Some(issued.serial().to_owned()),
            _ => None,
        };
        let current = std::fs::canonicalize(self.pairs.current()).ok();
        for (index, pair) in self.pairs.pairs().iter().enumerate() {
            let path = pair.path.display().to_string();
            // The current pair is unreadable or gone. What the journal holds is newer than any other pair, and its key is
            // not only in the pair (case C02).
            if current.as_ref() != Some(&pair.path) && self.publish_journalled(state).await {
                return Ok(());
            }
            let public_key = match public_key_of(&pair.content) {
                Ok(public_key) => public_key,
                Err(rejection) => {
                    self.unusable(&path, &rejection.to_string());
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
                    if held.key().backend == FILE_BACKEND && has_private_key(&pair.content) =>
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

    /// Publishes the journal's credential again, where it has not ended and its key is there; whether that was so. What
    /// cannot be written now, on a full disk for instance, is written when the agent looks around.
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
        let Ok(content) = super::perform::pair_content(self.keyring, held).await else {
            return;
        };
        if let Ok(path) = self.pairs.publish(&content) {
            let (path, serial) = (path.display().to_string(), held.serial().to_owned());
            self.telemetry.emit(Event::PairPublished { path, serial });
        }
    }

    /// Finds what this identity has in its backends: no number is used twice, and what nobody needs is destroyed.
    async fn settle_keys(&self, state: &mut State, prefix: &KeyPrefix) {
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
                state.last_slot = state.last_slot.max(slot - 1);
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
fn installed_at(pair: &FoundPair, credential: &Credential) -> pintle_agent_core::UnixTime {
    let modified = std::fs::metadata(&pair.path).and_then(|metadata| metadata.modified()).ok();
    let since = modified.and_then(|modified| modified.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    let modified = pintle_agent_core::UnixTime::from_milliseconds(i64::try_from(since.as_millis()).unwrap_or(0));
    modified.clamp(credential.not_before(), credential.not_after())
}

fn has_private_key(pair: &str) -> bool {
    private_key_of(pair).is_some()
}

/// The DER of the first private key in a pair.
fn private_key_of(pair: &str) -> Option<Zeroizing<Vec<u8>>> {
    pem::parse_many(pair).ok()?.into_iter().find_map(|block| {
        matches!(block.tag(), "PRIVATE KEY" | "EC PRIVATE KEY" | "RSA PRIVATE KEY")
            .then(|| Zeroizing::new(block.into_contents()))
    })
}
