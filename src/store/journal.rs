//! The journal of an identity: its state, saved before each action.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use pintle_agent_core::State;
use serde::{Deserialize, Serialize};

use super::durable;
use crate::parse_error;
use crate::world::files::LONGEST_FILE;
use crate::world::{Files, SystemFiles};

/// The journal of one identity, a JSON file in the state directory.
pub struct Journal {
    files: Arc<dyn Files>,
    path: PathBuf,
    identity: String,
    saved: Option<Vec<u8>>,
}

/// What stands in the file.
#[derive(Serialize, Deserialize)]
struct Entry {
    version: u32,
    identity: String,
    state: State,
}

/// The only version so far. A later pintle that changes the meaning of a field raises it.
const VERSION: u32 = 1;

impl Journal {
    /// The journal of `identity` (its subject's common name) at this path, which need not exist.
    pub fn new(path: PathBuf, identity: String) -> Self {
        Self::on(Arc::new(SystemFiles), path, identity)
    }

    /// As [`new`](Self::new), on this file system.
    pub fn on(files: Arc<dyn Files>, path: PathBuf, identity: String) -> Self {
        Self { files, path, identity, saved: None }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what was saved last; `None` if nothing was.
    ///
    /// # Errors
    /// If it cannot be read, makes no sense, or is of another identity.
    pub fn load(&self) -> Result<Option<State>, JournalError> {
        let content = match self.files.read(&self.path, LONGEST_FILE) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(JournalError::Unreachable(error)),
        };
        let entry: Entry =
            serde_json::from_slice(&content).map_err(|error| JournalError::Unreadable(parse_error::json(&error)))?;
        if entry.version != VERSION {
            return Err(JournalError::Version(entry.version));
        }
        if entry.identity != self.identity {
            return Err(JournalError::OtherIdentity { found: entry.identity, wanted: self.identity.clone() });
        }
        Ok(Some(entry.state))
    }

    /// Saves the state, unless it is what was saved last.
    ///
    /// # Errors
    /// Whatever the file system says; the journal then is as it was.
    pub fn save(&mut self, state: &State) -> io::Result<()> {
        let entry = Entry { version: VERSION, identity: self.identity.clone(), state: state.clone() };
        let content = serde_json::to_vec_pretty(&entry).map_err(io::Error::other)?;
        if self.saved.as_ref() != Some(&content) {
            durable::replace(self.files.as_ref(), &self.path, &content, 0o600)?;
            self.saved = Some(content);
        }
        Ok(())
    }

    /// Moves an unreadable journal aside, where a person can look at it; only the newest such one is kept.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn set_aside(&self) -> io::Result<PathBuf> {
        let aside = self.path.with_extension("unreadable");
        self.files.rename(&self.path, &aside)?;
        Ok(aside)
    }
}

/// Why there is no state in a journal that exists.
#[derive(Debug)]
pub enum JournalError {
    /// The file cannot be opened or read.
    Unreachable(io::Error),
    /// The content makes no sense, as after a power cut on a file system that tears files.
    Unreadable(String),
    /// It was written by a later pintle.
    Version(u32),
    /// It is of another node, or another identity.
    OtherIdentity {
        /// The identity in the journal.
        found: String,
        /// The identity that is configured.
        wanted: String,
    },
}

impl JournalError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unreachable(error) if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => {
                "too many files are open: raise the limit (ulimit -n)"
            }
            Self::Unreachable(_) => "run pintle as the owner of its state directory",
            Self::Unreadable(_) => "start pintle run: it keeps the journal aside and goes by the pair on disk",
            Self::Version(_) => {
                "run the pintle that wrote it, or move it aside: the state is then taken from the pair on disk"
            }
            Self::OtherIdentity { .. } => "give the --node-name that it is of, or another --state-dir",
        }
    }
}

impl fmt::Display for JournalError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(error) => write!(formatter, "it cannot be read: {error}"),
            Self::Unreadable(detail) => write!(formatter, "its content cannot be used: {detail}"),
            Self::Version(version) => write!(formatter, "a later pintle wrote it (version {version})"),
            Self::OtherIdentity { found, wanted } => write!(formatter, "it is of {found}, and this is {wanted}"),
        }
    }
}

impl std::error::Error for JournalError {}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_what_is_torn_is_said_to_be() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("client.json");
        let mut journal = Journal::new(path.clone(), "system:node:a".to_owned());
        assert!(matches!(journal.load(), Ok(None)));
        let state = State { last_slot: 7, ..State::default() };
        journal.save(&state).expect("saved");
        assert_eq!(journal.load().expect("loaded"), Some(state));
        let other = Journal::new(path.clone(), "system:node:b".to_owned());
        assert!(other.load().is_err_and(|error| error.hint().contains("--node-name")));
        assert!(JournalError::Version(9).hint().contains("the pintle that wrote it"));
        fs::write(&path, [0; 100]).expect("torn");
        assert!(matches!(journal.load(), Err(JournalError::Unreadable(_))));
        journal.set_aside().expect("moved");
        assert!(matches!(journal.load(), Ok(None)));
    }
}
