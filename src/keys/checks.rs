//! Which conformance checks are under way on this node: their throwaway keys are not what an interrupted one has left.

use std::path::Path;

use crate::world::LockFile;

/// The file in the state directory that each check has locked, shared with the others.
const FILE: &str = "check.lock";

/// For as long as it lives, a check is under way, or none is and none begins.
pub struct Checks {
    _lock: Option<LockFile>,
}

impl Checks {
    /// A check begins. Where the state directory cannot be used there is nothing to be kept from either.
    pub fn begin(state_directory: &Path) -> Self {
        let lock = open(state_directory);
        Self { _lock: lock.filter(|lock| lock.lock_shared().is_ok()) }
    }

    /// Keeps checks from beginning; `None` if one is under way.
    pub fn hold_off(state_directory: &Path) -> Option<Self> {
        let lock = open(state_directory);
        match lock.as_ref().map(LockFile::try_lock) {
            Some(Ok(false)) => None,
            _ => Some(Self { _lock: lock }),
        }
    }
}

fn open(state_directory: &Path) -> Option<LockFile> {
    LockFile::open(&state_directory.join(FILE)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_share_and_others_wait_until_there_is_none() {
        let directory = tempfile::tempdir().expect("a directory");
        let (one, two) = (Checks::begin(directory.path()), Checks::begin(directory.path()));
        assert!(Checks::hold_off(directory.path()).is_none());
        drop(one);
        assert!(Checks::hold_off(directory.path()).is_none());
        drop(two);
        assert!(Checks::hold_off(directory.path()).is_some());
        assert!(Checks::hold_off(&directory.path().join("missing")).is_some());
    }
}
