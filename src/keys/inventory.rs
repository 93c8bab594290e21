//! What is in the backends, and what of it this identity needs.

use pintle_agent_core::{KeyName, Phase, State};
use pintle_plugins_api::conformance::THROWAWAY_PREFIX;
use pintle_plugins_api::{BackendError, KeyId, Resource};
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use super::{CALL_DEADLINE, Keyring};
use crate::config::{Config, IdentityConfig, Isolation};

/// A configured backend, as it answers now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendEntry {
    /// Its name in the configuration.
    pub name: String,
    /// Its type: `file`, `pkcs11`, `tpm` or `plugin`.
    pub kind: String,
    /// Where its module runs: `process` or `none`; empty for the file backend, which has none.
    pub isolation: String,
    /// Whether new keys are made in it.
    pub new_keys: bool,
    /// How many keys of pintle's it holds, if it answers.
    pub keys: Option<usize>,
    /// What is taken of the room in its device, as far as it tells.
    #[serde(default)]
    pub usage: Vec<Resource>,
    /// Why it does not answer.
    pub error: Option<BackendError>,
}

/// What a key is to this identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// The key of the certificate in use.
    InUse,
    /// The key of the certificate that is being got.
    Next,
    /// An old key that is destroyed once its successor is proven.
    Retiring,
    /// This identity's, and nobody needs it.
    Orphaned,
    /// This identity's, and nothing says whether it is needed: there is no journal, or no certificate in it.
    Unknown,
    /// Left over by a conformance check that was interrupted.
    LeftOver,
    /// Another node's, or another identity's.
    Foreign,
}

impl Standing {
    /// Whether nobody misses the key.
    pub fn is_prunable(self) -> bool {
        matches!(self, Self::Orphaned | Self::LeftOver)
    }

    /// In words, as the table has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::InUse => "in use",
            Self::Next => "next",
            Self::Retiring => "retiring",
            Self::Orphaned => "orphaned",
            Self::Unknown => "unknown",
            Self::LeftOver => "left over",
            Self::Foreign => "foreign",
        }
    }
}

/// A key in a backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyEntry {
    /// The backend.
    pub backend: String,
    /// The key's id there.
    pub id: KeyId,
    /// Its algorithm; empty if its public half cannot be had.
    pub algorithm: String,
    /// What it is to this identity.
    pub standing: Standing,
}

/// What is in all backends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// The keys, by backend and id.
    pub keys: Vec<KeyEntry>,
    /// What is taken of the room in each device, as far as its backend tells; after a pruning, what that made free.
    #[serde(default)]
    pub usage: Vec<Usage>,
    /// The backends that do not answer: what is in them is not known.
    pub unreachable: Vec<Failure>,
    /// What was to be destroyed and is still there.
    pub failed: Vec<Failure>,
}

/// What is taken of the room in a backend's device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// The backend.
    pub backend: String,
    /// What it tells of.
    pub resources: Vec<Resource>,
}

/// What failed, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// A backend, or a key.
    pub name: String,
    /// Why.
    pub error: BackendError,
}

/// The configured backends, each asked for its keys.
pub async fn backends(config: &Config, keyring: &Keyring) -> Vec<BackendEntry> {
    let mut entries = Vec::new();
    for (name, backend) in &config.node.backends {
        let listed = list(keyring, name).await;
        let usage = if listed.is_ok() { usage(keyring, name).await } else { Ok(Vec::new()) };
        let isolation = match backend.isolation() {
            Some(Isolation::Process(_)) => "process",
            Some(Isolation::None) => "none",
            None => "",
        };
        entries.push(BackendEntry {
            name: name.clone(),
            kind: backend.kind().to_owned(),
            isolation: isolation.to_owned(),
            new_keys: config.identities.iter().any(|identity| identity.backend == *name),
            keys: listed.as_ref().ok().map(Vec::len),
            error: listed.err().or(usage.as_ref().err().cloned()),
            usage: usage.unwrap_or_default(),
        });
    }
    entries
}

/// The keys in all backends. `state` is that of this node's identity, if it is known.
pub async fn keys(config: &IdentityConfig, keyring: &Keyring, state: Option<&State>) -> Inventory {
    let mut inventory = Inventory::default();
    for name in config.node.backends.keys() {
        let ids = match list(keyring, name).await {
            Ok(ids) => ids,
            Err(error) => {
                inventory.unreachable.push(Failure { name: name.clone(), error });
                continue;
            }
        };
        for id in ids {
            let key = KeyName { backend: name.clone(), id };
            let algorithm = keyring.public_key(&key).await.map(|key| key.algorithm().to_string()).unwrap_or_default();
            let standing = standing(config, state, &key);
            inventory.keys.push(KeyEntry { backend: key.backend, id: key.id, algorithm, standing });
        }
        // The keys are what was asked for; why there is no more to tell, `backends` says.
        match usage(keyring, name).await {
            Ok(resources) if !resources.is_empty() => inventory.usage.push(Usage { backend: name.clone(), resources }),
            _ => {}
        }
    }
    inventory.keys.sort_by(|one, other| (&one.backend, &one.id).cmp(&(&other.backend, &other.id)));
    inventory
}

/// Destroys what nobody misses, unless it is only to be shown. Answers what was, or would be, destroyed. While a check is
/// under way on this node, throwaway keys are left alone.
///
/// # Assumptions
/// `state` does not change meanwhile: the agent itself calls this, or the lock on its state directory is held.
pub async fn prune(config: &IdentityConfig, keyring: &Keyring, state: Option<&State>, dry_run: bool) -> Inventory {
    let mut inventory = keys(config, keyring, state).await;
    let no_check = Checks::hold_off(&config.node.state_dir);
    inventory.keys.retain(|key| match key.standing {
        Standing::LeftOver => no_check.is_some(),
        standing => standing.is_prunable(),
    });
    let before = std::mem::take(&mut inventory.usage);
    if !dry_run {
        let mut destroyed = Vec::new();
        for entry in inventory.keys {
            let key = KeyName { backend: entry.backend.clone(), id: entry.id.clone() };
            match keyring.delete(&key).await {
                Ok(()) => destroyed.push(entry),
                Err(error) => inventory.failed.push(Failure { name: key.to_string(), error }),
            }
        }
        inventory.keys = destroyed;
        for Usage { backend, resources } in before {
            if inventory.keys.iter().any(|key| key.backend == backend) {
                let resources = freed(&resources, &usage(keyring, &backend).await.unwrap_or_default());
                inventory.usage.push(Usage { backend, resources });
            }
        }
    }
    inventory
}

/// What is in all backends, from what each identity of a node sees in them: a key that is one identity's is foreign to the
/// others.
pub fn merged(views: Vec<Inventory>) -> Inventory {
    let mut merged = Inventory::default();
    for view in views {
        for key in view.keys {
            let same = |known: &&mut KeyEntry| (&known.backend, &known.id) == (&key.backend, &key.id);
            match merged.keys.iter_mut().find(same) {
                Some(known) if known.standing == Standing::Foreign => *known = key,
                Some(_) => {}
                None => merged.keys.push(key),
            }
        }
        let new = |list: &[Failure], failure: &Failure| !list.iter().any(|known| known.name == failure.name);
        let unreachable = view.unreachable.into_iter().filter(|failure| new(&merged.unreachable, failure));
        merged.unreachable.extend(unreachable.collect::<Vec<_>>());
        let failed = view.failed.into_iter().filter(|failure| new(&merged.failed, failure));
        merged.failed.extend(failed.collect::<Vec<_>>());
        for usage in view.usage {
            if !merged.usage.iter().any(|known| known.backend == usage.backend) {
                merged.usage.push(usage);
            }
        }
    }
    merged.keys.sort_by(|one, other| (&one.backend, &one.id).cmp(&(&other.backend, &other.id)));
    merged
}

/// What is taken no more.
fn freed(before: &[Resource], after: &[Resource]) -> Vec<Resource> {
    let freed = before.iter().filter_map(|before| {
        let after = after.iter().find(|after| after.name == before.name)?;
        Some(Resource::new(&before.name, before.used.checked_sub(after.used)?, None))
    });
    freed.filter(|resource| resource.used > 0).collect()
}

async fn list(keyring: &Keyring, name: &str) -> Result<Vec<KeyId>, BackendError> {
    keyring.backend(name)?.call(CALL_DEADLINE, |backend| backend.list()).await
}

async fn usage(keyring: &Keyring, name: &str) -> Result<Vec<Resource>, BackendError> {
    keyring.backend(name)?.call(CALL_DEADLINE, |backend| backend.usage()).await
}

fn standing(config: &IdentityConfig, state: Option<&State>, key: &KeyName) -> Standing {
    if key.id.as_bytes().starts_with(THROWAWAY_PREFIX) {
        return Standing::LeftOver;
    }
    if config.policy().key_prefix.slot_of(&key.id).is_none() {
        return Standing::Foreign;
    }
    let Some(state) = state else {
        return Standing::Unknown;
    };
    if state.held.as_ref().is_some_and(|held| held.key() == key) {
        Standing::InUse
    } else if state.retiring.contains(key) {
        Standing::Retiring
    } else if state.keys().contains(&key) {
        Standing::Next
    } else if state.held.is_none() && state.phase == Phase::Holding {
        // The next start takes the newest of them up again (case C10).
        Standing::Unknown
    } else {
        Standing::Orphaned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Flags;

    #[test]
    fn only_what_is_known_to_be_needed_by_nobody_is_prunable() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("config.toml");
        std::fs::write(&file, "").expect("written");
        let flags = Flags { config: Some(file), node_name: Some("worker-1".to_owned()), ..Flags::default() };
        let config = Config::load(&flags).expect("valid").identities.remove(0);
        let key = |id: &str| KeyName { backend: "file".to_owned(), id: KeyId::new(id.as_bytes()).expect("an id") };
        let generating = State { phase: Phase::Generating { key: key("worker-1_client_7") }, ..State::default() };
        let retiring = State { retiring: vec![key("worker-1_client_7")], ..State::default() };
        for (state, id, expected) in [
            (Some(&generating), "worker-1_client_7", Standing::Next),
            (Some(&generating), "worker-1_client_6", Standing::Orphaned),
            (Some(&generating), "worker-10_client_6", Standing::Foreign),
            (Some(&generating), "worker-1_serving_6", Standing::Foreign),
            (Some(&generating), "conformance/x/y", Standing::LeftOver),
            (Some(&retiring), "worker-1_client_7", Standing::Retiring),
            (Some(&State::default()), "worker-1_client_7", Standing::Unknown),
            (None, "worker-1_client_7", Standing::Unknown),
        ] {
            assert_eq!(standing(&config, state, &key(id)), expected, "{id}");
        }
        assert!(!Standing::Unknown.is_prunable() && !Standing::Foreign.is_prunable());
    }
}
