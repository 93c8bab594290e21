//! Which keys are to be destroyed, and which may be.

use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::{Failure, KeyEntry, KeyUse};

/// Which keys are to be destroyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Those that this installation made and nobody needs.
    Orphaned,
    /// Those of these names, `ID` or `BACKEND:ID`, as long as this node does not need them.
    Named(Vec<String>),
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

#[cfg(test)]
mod tests {
    use pintle_agent_core::KeyName;
    use pintle_plugins_api::KeyId;

    use super::*;

    fn key(id: &str) -> KeyName {
        KeyName { backend: "token".to_owned(), id: KeyId::new(id.as_bytes()).expect("an id") }
    }

    fn entry(id: &str, used: KeyUse) -> KeyEntry {
        let KeyName { backend, id } = key(id);
        KeyEntry { backend, id, algorithm: String::new(), used }
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
