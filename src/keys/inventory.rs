//! What is in the backends, and what of it this node needs.
//!
//! A device may be shared with other nodes, and with nodes of the same name in other clusters (case C33). What a journal of
//! this state directory lists is in use; what only its id says to be this installation's is an orphan; everything else
//! is unknown, and destroyed only by a person who names it.

use pintle_agent_core::policy::KeyPrefix;
use pintle_agent_core::{KeyName, Phase, State};
use pintle_plugins_api::conformance::THROWAWAY_PREFIX;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId, Resource};
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use super::{CALL_DEADLINE, Keyring};
use crate::config::{Config, Isolation, NodeConfig};

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

/// What a key is to this node, by the journals of its state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyUse {
    /// The key of the certificate in use.
    InUse,
    /// The key of the certificate before, which is kept until the one in use is proven.
    Previous,
    /// The key of the certificate that is being obtained.
    Next,
    /// An old key that is destroyed once its successor is proven.
    Retiring,
    /// Made by this installation, and no journal lists it any more.
    Orphaned,
    /// Left by a conformance check that was interrupted, on this node or on another one that uses the device.
    LeftOver,
    /// No journal lists it, and its id does not say that this installation made it: another node, or a node of the same
    /// name in another cluster, may need it.
    #[serde(alias = "foreign")]
    Unknown,
}

impl KeyUse {
    /// Whether the key is certainly this installation's, and needed by nobody: it is destroyed without being named.
    pub fn is_orphaned(self) -> bool {
        self == Self::Orphaned
    }

    /// Whether the key is destroyed when somebody names it.
    pub fn is_prunable(self) -> bool {
        matches!(self, Self::Orphaned | Self::LeftOver | Self::Unknown)
    }

    /// In one word, as the table has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::InUse => "in-use",
            Self::Previous => "previous",
            Self::Next => "next",
            Self::Retiring => "retiring",
            Self::Orphaned => "orphaned",
            Self::LeftOver => "left-over",
            Self::Unknown => "unknown",
        }
    }
}

/// Which keys are to be destroyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Those that this installation made and nobody needs.
    Orphaned,
    /// Those of these names, `ID` or `BACKEND:ID`, as long as this node does not need them.
    Named(Vec<String>),
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

/// The keys of these names, and why some of the names are of none that may be destroyed: then there are no keys.
/// `no_check` says that no conformance check is under way on this node, whose throwaway keys it would be.
pub fn named(keys: &[KeyEntry], names: &[String], no_check: bool) -> (Vec<KeyEntry>, Vec<Failure>) {
    let (mut selected, mut failed): (Vec<KeyEntry>, Vec<Failure>) = Default::default();
    for name in names {
        let is_named = |key: &&KeyEntry| key.id.to_string() == *name || key.name().to_string() == *name;
        let found: Vec<&KeyEntry> = keys.iter().filter(is_named).collect();
        match select(&found, no_check) {
            Ok(key) if selected.contains(key) => {}
            Ok(key) => selected.push(key.clone()),
            Err(error) => failed.push(Failure { name: name.clone(), error }),
        }
    }
    if !failed.is_empty() {
        selected.clear();
    }
    (selected, failed)
}

/// The one key that a name is of, if it may be destroyed.
fn select<'a>(found: &[&'a KeyEntry], no_check: bool) -> Result<&'a KeyEntry, BackendError> {
    let error = |kind, detail: String, hint: &str| Err(BackendError::new(kind, detail).with_hint(hint));
    match found {
        [] => error(
            BackendErrorKind::NotFound,
            "no backend that answers holds a key of this name".to_owned(),
            "pintle keys list shows the names",
        ),
        [key] if !key.used.is_prunable() => error(
            BackendErrorKind::Unsupported,
            format!("a key that is {} is not destroyed", key.used.word()),
            "to replace the key in use, run pintle rotate: old keys are destroyed once the new certificate is proven",
        ),
        [key] if key.used == KeyUse::LeftOver && !no_check => error(
            BackendErrorKind::Unavailable,
            "a pintle backend check is under way on this node, and the key may be its own".to_owned(),
            "try again when the check is done",
        ),
        [key] => Ok(key),
        several => error(
            BackendErrorKind::Unsupported,
            format!("{} backends hold a key of this name", several.len()),
            "name the backend too: BACKEND:ID",
        ),
    }
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

/// What a key is, by these journals. `made_here` tells whether an id is one that the installation of a journal chooses.
fn use_of(key: &KeyName, states: &[&State], made_here: impl Fn(&State, &KeyId) -> bool) -> KeyUse {
    let by_journal = states.iter().find_map(|state| {
        if state.held().is_some_and(|held| held.key() == key) {
            Some(KeyUse::InUse)
        } else if state.retiring().contains(key) {
            Some(KeyUse::Retiring)
        } else if state.keys().contains(&key) {
            Some(KeyUse::Next)
        } else {
            None
        }
    });
    if let Some(used) = by_journal {
        return used;
    }
    if key.id.as_bytes().starts_with(THROWAWAY_PREFIX) {
        return KeyUse::LeftOver;
    }
    // A journal without a certificate may have lost it with its directory: the next start looks for the key (case C10).
    let is_orphan =
        |state: &&&State| made_here(state, &key.id) && !(state.held().is_none() && *state.phase() == Phase::Holding);
    if states.iter().find(is_orphan).is_some() { KeyUse::Orphaned } else { KeyUse::Unknown }
}

/// Whether the installation whose journal this is made the key of this id. Node and identity alone prove nothing: another
/// cluster, or an earlier installation, may have them in common with this one.
fn made_here(state: &State, id: &KeyId) -> bool {
    !state.installation().is_empty() && KeyPrefix::installation_of(id) == Some(state.installation())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> KeyName {
        KeyName { backend: "token".to_owned(), id: KeyId::new(id.as_bytes()).expect("an id") }
    }

    fn entry(id: &str, used: KeyUse) -> KeyEntry {
        let KeyName { backend, id } = key(id);
        KeyEntry { backend, id, algorithm: String::new(), used }
    }

    #[test]
    fn c33_ours_is_what_a_journal_lists_or_what_this_installation_made() {
        let next = key("worker-1_client_5e1f09ac_7");
        let state = |text: serde_json::Value| serde_json::from_value::<State>(text).expect("a state");
        let generating = state(serde_json::json!({"installation": "5e1f09ac", "phase": {"generating": {"key": next}}}));
        let retiring = state(serde_json::json!({"retiring": [key("worker-1_client_3")]}));
        let both = [&generating, &retiring];
        let nothing = State::default();
        for (states, id, expected) in [
            (&both[..], "worker-1_client_5e1f09ac_7", KeyUse::Next),
            (&both, "worker-1_client_3", KeyUse::Retiring),
            (&both, "worker-1_client_5e1f09ac_6", KeyUse::Orphaned),
            // Another installation's: of the same name in another cluster, or this node's before it was installed anew.
            (&both, "worker-1_client_77777777_6", KeyUse::Unknown),
            (&both, "worker-1_client_6", KeyUse::Unknown),
            (&both, "worker-10_client_6", KeyUse::Unknown),
            (&both, "conformance/x/y", KeyUse::LeftOver),
            (&[&nothing], "worker-1_client_5e1f09ac_7", KeyUse::Unknown),
            (&[], "worker-1_client_5e1f09ac_7", KeyUse::Unknown),
        ] {
            assert_eq!(use_of(&key(id), states, made_here), expected, "{id}");
        }
    }

    #[test]
    fn c33_only_a_name_destroys_what_is_unknown_and_no_name_what_is_needed() {
        let mut other = entry("twice", KeyUse::Unknown);
        other.backend = "other".to_owned();
        let keys = [
            entry("held", KeyUse::InUse),
            entry("next", KeyUse::Next),
            entry("unknown", KeyUse::Unknown),
            entry("conformance/x", KeyUse::LeftOver),
            entry("twice", KeyUse::Unknown),
            other,
        ];
        let select = |names: &[&str], no_check| {
            named(&keys, &names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), no_check)
        };
        let (selected, failed) = select(&["unknown", "token:unknown", "conformance%2Fx", "other:twice"], true);
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(
            selected.iter().map(|key| key.name().to_string()).collect::<Vec<_>>(),
            ["token:unknown", "token:conformance%2Fx", "other:twice"]
        );
        for name in ["held", "token:next", "absent", "twice", "file:unknown"] {
            let (selected, failed) = select(&["unknown", name], true);
            assert!(selected.is_empty() && failed.len() == 1 && failed[0].name == name, "{name}: {failed:?}");
            assert!(failed[0].error.hint.is_some());
        }
        let (_, failed) = select(&["conformance%2Fx"], false);
        assert_eq!(failed[0].error.kind, BackendErrorKind::Unavailable);
    }
}
