//! The memory of refused PINs, which outlives the process that held the module.
//!
//! A module remembers in its own process which PIN was refused. When this process is a child that has ended since, the
//! next one would try the same PIN again, and lock the token (case C27). So the agent remembers it too: as long as the
//! PIN's file is the same, the module is not opened anew.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};

use pintle_plugins_api::BackendError;

use super::module::{ModuleConfiguration, PinOrigin};

/// What a file is at one moment. Whoever writes another PIN changes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// The state of a module's PIN before a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PinState(PinOrigin, Option<Fingerprint>);

impl PinState {
    /// As it is now. It is taken before the call: a file that is replaced meanwhile then counts as another one.
    pub(super) fn now(origin: &PinOrigin) -> Self {
        let fingerprint = match origin {
            PinOrigin::File(path) => Fingerprint::of(path),
            PinOrigin::None | PinOrigin::Unknown => None,
        };
        Self(origin.clone(), fingerprint)
    }
}

/// What was refused to this process, by module. Two backends may be one token.
static REFUSED: LazyLock<Mutex<HashMap<String, (PinState, BackendError)>>> = LazyLock::new(Mutex::default);

/// Remembers that `module` was `Locked` with the PIN in this state.
pub(super) fn remember(module: &ModuleConfiguration, state: PinState, error: &BackendError) {
    if state.0 != PinOrigin::None {
        REFUSED.lock().unwrap_or_else(PoisonError::into_inner).insert(key(module), (state, error.clone()));
    }
}

/// Forgets it: the module let somebody in.
pub(super) fn forget(module: &ModuleConfiguration) {
    REFUSED.lock().unwrap_or_else(PoisonError::into_inner).remove(&key(module));
}

/// Whether opening `module` anew would show the same PIN a second time; then the error of the first time.
pub(super) fn still_refused(module: &ModuleConfiguration) -> Option<BackendError> {
    let refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
    let (state, error) = refused.get(&key(module))?;
    if PinState::now(&state.0) != *state {
        return None;
    }
    let hint = match &state.0 {
        PinOrigin::File(path) => format!(
            "put the right PIN into {path}; if the token was changed instead, touch {path}",
            path = path.display()
        ),
        PinOrigin::None | PinOrigin::Unknown => "give the module the right PIN, then restart pintle".to_owned(),
    };
    Some(error.clone().with_hint(hint))
}

fn key(module: &ModuleConfiguration) -> String {
    serde_json::to_string(module).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use pintle_plugins_api::BackendErrorKind;

    use super::*;

    #[test]
    fn c27_a_refusal_stands_until_the_pins_file_changes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        std::fs::write(&path, "0000").expect("written");
        let module = ModuleConfiguration::Pkcs11 {
            uri: "pkcs11:token=refused".to_owned(),
            module: Some("/module.so".into()),
            pin_file: Some(path.clone()),
        };
        assert!(still_refused(&module).is_none());
        let error = BackendError::new(BackendErrorKind::Locked, "refused the PIN");
        remember(&module, PinState::now(&module.pin()), &error);
        assert_eq!(still_refused(&module).expect("refused").detail, error.detail);
        std::fs::write(&path, "12345").expect("written");
        assert!(still_refused(&module).is_none());
    }

    #[test]
    fn c27_a_plugin_that_was_refused_is_not_asked_again_and_a_tpm_is() {
        let plugin =
            |pin| ModuleConfiguration::Plugin { library: "refused".to_owned(), configuration: "{}".to_owned(), pin };
        let error = BackendError::new(BackendErrorKind::Locked, "locked out");
        for pin in [true, false] {
            remember(&plugin(pin), PinState::now(&plugin(pin).pin()), &error);
            assert_eq!(still_refused(&plugin(pin)).is_some(), pin);
        }
    }
}
