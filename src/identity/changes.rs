//! Files of others that may be replaced while the agent runs: the bootstrap kubeconfig and its token, and the authority.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pintle_agent_core::Event;
use pintle_agent_core::rotation::Authority;

use super::Agent;
use super::start::read_authorities;
use crate::store::FileStamp;
use crate::world::SystemFiles;

/// Files as they were when they were last read.
#[derive(Default)]
pub(super) struct SeenFiles(Vec<(PathBuf, Option<FileStamp>)>);

impl SeenFiles {
    /// Notes a file as it is before it is read.
    pub(super) fn note(&mut self, path: &Path) {
        self.0.push((path.to_owned(), FileStamp::of(&SystemFiles, path)));
    }

    /// Whether one of them is another now, or is there, or is gone.
    pub(super) fn changed(&self) -> bool {
        self.0.iter().any(|(path, stamp)| FileStamp::of(&SystemFiles, path) != *stamp)
    }
}

/// Whether a file was put where it is, or changed, after this time, as a file system counts it: in steps of some
/// milliseconds.
fn changed_since(path: &Path, time: SystemTime) -> bool {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let since = (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), i64::from(since.subsec_nanos()));
    FileStamp::of(&SystemFiles, path).is_some_and(|stamp| stamp.changed() >= since)
}

impl Agent {
    /// The first event: what was written while no agent ran is not to wait for a back-off that began before.
    pub(super) fn first_event(&mut self) -> Event {
        if let Some(path) = &self.config.bootstrap_kubeconfig {
            self.connections.note_bootstrap(path);
        }
        let saved = std::fs::metadata(self.journal.path()).and_then(|metadata| metadata.modified());
        match (&self.config.bootstrap_kubeconfig, saved) {
            (Some(path), Ok(saved)) if changed_since(path, saved) => Event::LocalChange,
            _ => Event::Woke,
        }
    }

    /// Whether the bootstrap credential is another than the one that failed; told once for each change.
    pub(super) fn bootstrap_changed(&mut self) -> bool {
        let changed = self.state.back_off().is_some() && self.connections.bootstrap_changed();
        if changed {
            self.connections.forget(&self.config, Authority::Bootstrap);
        }
        changed
    }

    /// Reads the authority of issued certificates anew. While its file is away or torn, the last one stays in force.
    pub(super) fn reread_authorities(&mut self) {
        if let Some(Ok(authorities)) = self.config.client_ca_file.as_ref().map(read_authorities) {
            self.authorities = Some(authorities);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_moved_or_removed_has_changed() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, other) = (directory.path().join("kubeconfig"), directory.path().join("other"));
        let noted = || {
            let mut seen = SeenFiles::default();
            seen.note(&path);
            seen
        };
        let missing = noted();
        std::fs::write(&other, "a").expect("written");
        let saved = SystemTime::now();
        assert!(!missing.changed());
        // Longer than the kernel's clock for files needs to go on.
        std::thread::sleep(Duration::from_millis(50));
        std::fs::rename(&other, &path).expect("moved");
        assert!(missing.changed() && changed_since(&path, saved) && !changed_since(&path, SystemTime::now()));
        let there = noted();
        assert!(!there.changed());
        std::thread::sleep(Duration::from_millis(50));
        std::fs::write(&path, "b").expect("written");
        assert!(there.changed());
        let there = noted();
        std::fs::remove_file(&path).expect("removed");
        assert!(there.changed());
    }
}
