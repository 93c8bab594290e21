//! The files of the keys: `<key id>.tss2.pem` in one directory.
//!
//! The private half in such a file is encrypted by the TPM. Mode 0600 all the same: whoever could read it could use
//! the key on this node, as long as the TPM answers him.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

const SUFFIX: &str = ".tss2.pem";

/// The longest name of a file on Linux, in octets (NAME_MAX).
const LONGEST_NAME: usize = 255;

/// A file that was not finished. No key is so named: a key id as text never begins with a dot.
const UNFINISHED: &str = ".unfinished";

/// Far more than a key file has (RSA 4096: 3 KiB).
const LONGEST_FILE: u64 = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Opens the directory, or makes it with mode 0700.
    pub(crate) fn open(path: &Path) -> Result<Self, BackendError> {
        let opened = DirBuilder::new().recursive(true).mode(0o700).create(path).and_then(|()| File::open(path));
        opened.map_err(|error| unavailable("open", path, &error))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where the file of this key is, or would be.
    pub(crate) fn path(&self, id: &KeyId) -> Result<PathBuf, BackendError> {
        let name = format!("{id}{SUFFIX}");
        if name.len() > LONGEST_NAME {
            let detail = format!("the key id {id} is too long for the name of a file");
            return Err(BackendError::new(BackendErrorKind::Unsupported, detail).with_hint("choose a shorter one"));
        }
        Ok(self.path.join(name))
    }

    /// The text of the key's file.
    pub(crate) fn read(&self, id: &KeyId) -> Result<String, BackendError> {
        let path = self.path(id)?;
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(LONGEST_FILE).read_to_end(&mut text)) {
            Ok(_) => Ok(String::from_utf8_lossy(&text).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(BackendError::new(BackendErrorKind::NotFound, format!("there is no key {id}")))
            }
            Err(error) => Err(unavailable("read", &path, &error)),
        }
    }

    /// Writes the key's file, unless there is one already. When this returns the file is on the disk, whole.
    pub(crate) fn create(&self, id: &KeyId, text: &str) -> Result<(), BackendError> {
        let path = self.path(id)?;
        let written = self.locked(|directory| {
            let unfinished = self.path.join(UNFINISHED);
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            match renameat_with(CWD, &unfinished, CWD, &path, RenameFlags::NOREPLACE) {
                Ok(()) => directory.sync_all(),
                // Another process was faster, and its key is the key of this id.
                Err(rustix::io::Errno::EXIST) => std::fs::remove_file(&unfinished),
                Err(errno) => Err(errno.into()),
            }
        });
        written.map_err(|error| unavailable("write", &path, &error))
    }

    /// Removes the key's file. That there is none is a success too.
    pub(crate) fn remove(&self, id: &KeyId) -> Result<(), BackendError> {
        let Ok(path) = self.path(id) else { return Ok(()) };
        let removed = self.locked(|directory| match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => directory.sync_all(),
        });
        removed.map_err(|error| unavailable("remove", &path, &error))
    }

    /// The keys that have a file.
    pub(crate) fn list(&self) -> Result<Vec<KeyId>, BackendError> {
        let names = std::fs::read_dir(&self.path)
            .and_then(|entries| {
                entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()
            })
            .map_err(|error| unavailable("read", &self.path, &error))?;
        let ids = names.iter().filter_map(|name| {
            let text = name.to_str()?.strip_suffix(SUFFIX)?;
            let id: KeyId = text.parse().ok()?;
            // Only the name that the id is written with: another spelling is not our file.
            (id.to_string() == text).then_some(id)
        });
        Ok(ids.collect())
    }

    /// Runs `change` while no other process changes the directory.
    fn locked(&self, change: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let directory = File::open(&self.path)?;
        flock(&directory, FlockOperation::LockExclusive)?;
        change(&directory)
    }
}

fn unavailable(what: &str, path: &Path, error: &io::Error) -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, format!("cannot {what} {}: {error}", path.display()))
        .with_hint("make room, or see to the owner and mode of the directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_appear_whole_private_and_once() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = Directory::open(&scratch.path().join("keys")).expect("it is made");
        let id = KeyId::new(*b"node/\xff.1").expect("a key id");
        assert_eq!(directory.read(&id).map_err(|error| error.kind), Err(BackendErrorKind::NotFound));

        directory.create(&id, "first").expect("it is written");
        directory.create(&id, "second").expect("a repeat changes nothing");
        assert_eq!(directory.read(&id).as_deref(), Ok("first"));
        let path = directory.path(&id).expect("a short name");
        let mode = std::fs::metadata(path).expect("it exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // What a crash leaves, and what is not ours.
        for name in [UNFINISHED, "a%2fb.tss2.pem", "note.txt", ".tss2.pem"] {
            std::fs::write(directory.path.join(name), "").expect("a stray file");
        }
        assert_eq!(directory.list(), Ok(vec![id.clone()]));
        directory.remove(&id).expect("it is removed");
        directory.remove(&id).expect("a repeat succeeds");
        assert_eq!(directory.list(), Ok(vec![]));
    }

    #[test]
    fn an_id_too_long_for_a_file_is_refused() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = Directory::open(scratch.path()).expect("it exists");
        let id = KeyId::new([0; 128]).expect("a key id");
        assert_eq!(directory.create(&id, "").map_err(|error| error.kind), Err(BackendErrorKind::Unsupported));
        assert_eq!(directory.remove(&id), Ok(()));
    }
}
