//! What a key is to this node, by the journals of its state directory.

use pintle_agent_core::policy::KeyPrefix;
use pintle_agent_core::{KeyName, Phase, State};
use pintle_plugins_api::KeyId;
use pintle_plugins_api::conformance::THROWAWAY_PREFIX;
use serde::{Deserialize, Serialize};

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

/// What a key is, by these journals. `made_here` tells whether an id is one that the installation of a journal chooses.
pub(super) fn use_of(key: &KeyName, states: &[&State], made_here: impl Fn(&State, &KeyId) -> bool) -> KeyUse {
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
pub(super) fn made_here(state: &State, id: &KeyId) -> bool {
    !state.installation().is_empty() && KeyPrefix::installation_of(id) == Some(state.installation())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> KeyName {
        KeyName { backend: "token".to_owned(), id: KeyId::new(id.as_bytes()).expect("an id") }
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
}
