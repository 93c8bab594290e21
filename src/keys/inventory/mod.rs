//! What is in the backends, and what of it this node needs.
//!
//! A device may be shared with other nodes, and with nodes of the same name in other clusters (case C33). What a journal of
//! this state directory lists is in use; what only its id says to be this installation's is an orphan; everything else
//! is unknown, and destroyed only by a person who names it.

mod key_use;
mod selection;

pub use key_use::KeyUse;
pub use selection::{Selection, named};

use pintle_agent_core::{KeyName, State};
use pintle_plugins_api::{BackendError, KeyId, Resource};
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use super::{CALL_DEADLINE, Keyring};
use crate::config::{Config, Isolation, NodeConfig};
use key_use::{made_here, use_of};

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
    /// What it is to this node.
    #[serde(rename = "use", alias = "standing")]
    pub used: KeyUse,
}

impl KeyEntry {
    /// Its name, `BACKEND:ID`.
    pub fn name(&self) -> KeyName {
        KeyName { backend: self.backend.clone(), id: self.id.clone() }
    }
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

/// The keys in all backends. `states` answers what the journals of this node's identities say; it is asked after the
/// backends, so that a key that was made by then, and is needed, stands in a journal.
///
/// # Errors
/// Those of `states`.
pub async fn keys<E>(
    node: &NodeConfig,
    keyring: &Keyring,
    states: impl FnOnce() -> Result<Vec<State>, E>,
) -> Result<Inventory, E> {
    let mut inventory = Inventory::default();
    for name in node.backends.keys() {
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
            let used = KeyUse::Unknown;
            inventory.keys.push(KeyEntry { backend: key.backend, id: key.id, algorithm, used });
        }
        // The keys are what was asked for; why there is no more to tell, `backends` says.
        match usage(keyring, name).await {
            Ok(resources) if !resources.is_empty() => inventory.usage.push(Usage { backend: name.clone(), resources }),
            _ => {}
        }
    }
    let states = states()?;
    let states: Vec<_> = states.iter().collect();
    for key in &mut inventory.keys {
        key.used = use_of(&key.name(), &states, made_here);
    }
    inventory.keys.sort_by(|one, other| (&one.backend, &one.id).cmp(&(&other.backend, &other.id)));
    Ok(inventory)
}

/// Destroys the selected keys, unless it is only to be shown. Answers what was, or would be, destroyed. If one of the
/// names is not that of a key that may be destroyed, nothing is.
///
/// # Assumptions
/// The agent itself calls this, or the lock on its state directory is held. A key that no journal lists by now will not be
/// needed later: a key is journalled before it is made.
///
/// # Errors
/// Those of `states`, as in [`keys`]: nothing is destroyed then.
pub async fn prune<E>(
    node: &NodeConfig,
    keyring: &Keyring,
    states: impl FnOnce() -> Result<Vec<State>, E>,
    selection: &Selection,
    dry_run: bool,
) -> Result<Inventory, E> {
    let mut inventory = keys(node, keyring, states).await?;
    // No check begins while its keys are looked for.
    let no_check = Checks::hold_off(&node.state_dir);
    match selection {
        Selection::Orphaned => inventory.keys.retain(|key| key.used.is_orphaned()),
        Selection::Named(names) => {
            (inventory.keys, inventory.failed) = named(&inventory.keys, names, no_check.is_some());
        }
    }
    let before = std::mem::take(&mut inventory.usage);
    if !dry_run && inventory.failed.is_empty() {
        let mut destroyed = Vec::new();
        for entry in inventory.keys {
            let key = entry.name();
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
    Ok(inventory)
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
