//! The journal of an identity: its state, saved before each action.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use pintle_agent_core::rotation::v1::StateV1;
use pintle_agent_core::{State, Template};
use serde::{Deserialize, Serialize};

use super::durable;
use crate::parse_error;
use crate::world::files::LONGEST_FILE;
use crate::world::{Files, SystemFiles};

/// The journal of one identity, a JSON file in the state directory.
pub struct Journal {
    files: Arc<dyn Files>,
    path: PathBuf,
    template: Template,
    saved: Option<State>,
}

/// What every version writes.
#[derive(Deserialize)]
struct Header {
    version: u32,
    identity: String,
}

/// What stands in the file.
#[derive(Serialize, Deserialize)]
struct Entry {
    version: u32,
    identity: String,
    /// A state of version 1 that says nothing: without it, version 1 would not get as far as the version, and take the
    /// journal for a torn one.
    #[serde(default = "nothing", rename = "state")]
    nothing_for_version_1: serde_json::Value,
    rotation: State,
}

/// What version 1 wrote.
#[derive(Deserialize)]
struct EntryV1 {
    state: StateV1,
}

/// A pintle that changes the meaning of a field raises it, and reads what earlier ones wrote.
const VERSION: u32 = 2;

fn nothing() -> serde_json::Value {
    serde_json::json!({
        "held": null, "phase": "holding", "last_slot": 0, "back_off": null, "held_refused": false,
        "held_key_lost": false, "rotation_requested": false, "discarded": 0, "retiring": []
    })
}

impl Journal {
    /// The journal at this path, which need not exist, of the identity that is asked for so: its common name is the
    /// identity's.
    pub fn new(path: PathBuf, template: Template) -> Self {
        Self::on(Arc::new(SystemFiles), path, template)
    }

    /// As [`new`](Self::new), on this file system.
    pub fn on(files: Arc<dyn Files>, path: PathBuf, template: Template) -> Self {
        Self { files, path, template, saved: None }
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
        let unreadable = |error: serde_json::Error| JournalError::Unreadable(parse_error::json(&error));
        let header: Header = serde_json::from_slice(&content).map_err(unreadable)?;
        if header.version > VERSION {
            return Err(JournalError::Version(header.version));
        }
        if header.identity != self.template.common_name {
            let wanted = self.template.common_name.clone();
            return Err(JournalError::OtherIdentity { found: header.identity, wanted });
        }
        let state = match header.version {
            0 | 1 => serde_json::from_slice::<EntryV1>(&content).map_err(unreadable)?.state.upgraded(&self.template),
            _ => serde_json::from_slice::<Entry>(&content).map_err(unreadable)?.rotation,
        };
        Ok(Some(state))
    }

    /// Whether what was saved last is enough to get to this state again after a crash.
    pub fn covers(&self, state: &State) -> bool {
        self.saved.as_ref().is_some_and(|saved| state.follows_from(saved))
    }

    /// Saves the state, unless it is what was saved last.
    ///
    /// # Errors
    /// Whatever the file system says; the journal then is as it was.
    pub fn save(&mut self, state: &State) -> io::Result<()> {
        if self.saved.as_ref() == Some(state) {
            return Ok(());
        }
        let entry = Entry {
            version: VERSION,
            identity: self.template.common_name.clone(),
            nothing_for_version_1: nothing(),
            rotation: state.clone(),
        };
        let content = serde_json::to_vec_pretty(&entry).map_err(io::Error::other)?;
        durable::replace(self.files.as_ref(), &self.path, &content, 0o600)?;
        self.saved = Some(entry.rotation);
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
            Self::Unreadable(_) => {
                "start pintle run: it keeps the journal under another name and recovers the state from the pair on disk"
            }
            Self::Version(_) => {
                "run the pintle that wrote it, or move it aside: the state is then taken from the pair on disk"
            }
            Self::OtherIdentity { .. } => "use the --node-name that it was written for, or another --state-dir",
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
        let mut journal = Journal::new(path.clone(), Template::kubelet_client("a"));
        assert!(matches!(journal.load(), Ok(None)));
        let state = State::new("5e1f09ac".to_owned());
        journal.save(&state).expect("saved");
        assert_eq!(journal.load().expect("loaded"), Some(state));
        let other = Journal::new(path.clone(), Template::kubelet_client("b"));
        assert!(other.load().is_err_and(|error| error.hint().contains("--node-name")));
        assert!(JournalError::Version(9).hint().contains("the pintle that wrote it"));
        fs::write(&path, [0; 100]).expect("torn");
        assert!(matches!(journal.load(), Err(JournalError::Unreadable(_))));
        journal.set_aside().expect("moved");
        assert!(matches!(journal.load(), Ok(None)));
    }

    /// What version 1 wrote is read, and what this one writes is refused by version 1 for its version.
    #[test]
    fn journals_of_other_versions_are_read_or_refused_with_a_reason() {
        /// As version 1 declared it.
        #[derive(Deserialize)]
        struct Refusing {
            version: u32,
            #[serde(rename = "state")]
            _state: StateV1,
        }
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("client.json");
        let v1 = r#"{"version": 1, "identity": "system:node:a", "state": {"held": null,
            "phase": {"generating": {"key": {"backend": "token", "id": "a_client_7"}}}, "last_slot": 7, "back_off": null,
            "held_refused": false, "held_key_lost": false, "rotation_requested": false, "discarded": 0, "retiring": []}}"#;
        fs::write(&path, v1).expect("written");
        let mut journal = Journal::new(path.clone(), Template::kubelet_client("a"));
        let state = journal.load().expect("loaded").expect("a state");
        assert_eq!((state.last_slot(), state.phase().name()), (7, "generating"));
        journal.save(&state).expect("saved");
        assert_eq!(journal.load().expect("loaded"), Some(state));
        let as_v1: Refusing =
            serde_json::from_slice(&fs::read(&path).expect("read")).expect("version 1 reads it so far");
        assert_eq!(as_v1.version, 2);
        fs::write(&path, r#"{"version": 3, "identity": "system:node:a", "other": {}}"#).expect("written");
        assert!(matches!(journal.load(), Err(JournalError::Version(3))));
    }
}
