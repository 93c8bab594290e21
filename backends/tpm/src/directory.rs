//! The files of the keys: `<key id>.tss2.pem` in one directory.
//!
//! The private half in such a file is encrypted by the TPM. Mode 0600 all the same: whoever could read it could use
//! the key on this node, as long as the TPM answers him.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId};
use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, RenameFlags, flock, openat, renameat_with, unlinkat};
use rustix::io::Errno;

const SUFFIX: &str = ".tss2.pem";

/// The longest name of a file on Linux, in bytes (NAME_MAX).
const LONGEST_NAME: usize = 255;

/// A file that was not finished. No key is so named: a key id as text never begins with a dot.
const UNFINISHED: &str = ".unfinished";

/// Far more than a key file has (RSA 4096: 3 KiB).
const LONGEST_FILE: u64 = 64 * 1024;

/// Group and others, all rights.
const OTHERS: u32 = 0o077;

#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Opens the directory. One that is missing is made, with mode 0700, only if `make` says so: a directory that is
    /// not mounted yet is not one without keys.
    pub(crate) fn open(path: &Path, make: bool) -> Result<Self, BackendError> {
        if make {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(|error| unavailable("make", path, &error))?;
        }
        let directory = Self { path: path.to_owned() };
        directory.descriptor()?;
        Ok(directory)
    }

    /// Where the file of this key is, or would be.
    pub(crate) fn path(&self, id: &KeyId) -> Result<PathBuf, BackendError> {
        Ok(self.path.join(file_name(id)?))
    }

    /// The text of the key's file.
    pub(crate) fn read(&self, id: &KeyId) -> Result<String, BackendError> {
        let (name, directory) = (file_name(id)?, self.descriptor()?);
        let path = self.path.join(&name);
        // Neither another user's file by a link, nor a wait for a FIFO.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&directory, &name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => {
                return Err(BackendError::new(BackendErrorKind::NotFound, format!("there is no key {id}")));
            }
            Err(errno) => return Err(unavailable("read", &path, &errno.into())),
        };
        check(&path, &file, "0600")?;
        let mut text = Vec::new();
        file.take(LONGEST_FILE).read_to_end(&mut text).map_err(|error| unavailable("read", &path, &error))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Writes the key's file, unless there is one already. When this returns the file is on the disk, whole.
    pub(crate) fn create(&self, id: &KeyId, text: &str) -> Result<(), BackendError> {
        let name = file_name(id)?;
        let directory = self.locked()?;
        let write = || {
            // What a crash left, or somebody put there: nobody writes it now, under the lock.
            absent_is_fine(unlinkat(&directory, UNFINISHED, AtFlags::empty()))?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = File::from(openat(&directory, UNFINISHED, flags, Mode::RUSR | Mode::WUSR)?);
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            match renameat_with(&directory, UNFINISHED, &directory, &name, RenameFlags::NOREPLACE) {
                Ok(()) => directory.sync_all(),
                // Another process was faster, and its key is the key of this id.
                Err(Errno::EXIST) => Ok(unlinkat(&directory, UNFINISHED, AtFlags::empty())?),
                Err(errno) => Err(errno.into()),
            }
        };
        write().map_err(|error| unavailable("write", &self.path.join(&name), &error))
    }

    /// Removes the key's file. That there is none is a success too.
    pub(crate) fn remove(&self, id: &KeyId) -> Result<(), BackendError> {
        let Ok(name) = file_name(id) else { return Ok(()) };
        let directory = self.locked()?;
        absent_is_fine(unlinkat(&directory, &name, AtFlags::empty()))
            .and_then(|()| directory.sync_all())
            .map_err(|error| unavailable("remove", &self.path.join(&name), &error))
    }

    /// The keys that have a file.
    pub(crate) fn list(&self) -> Result<Vec<KeyId>, BackendError> {
        let unreadable = |errno: Errno| unavailable("read", &self.path, &errno.into());
        let mut ids = Vec::new();
        for entry in Dir::read_from(self.descriptor()?).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            ids.extend(id_of(entry.file_name().to_bytes()));
        }
        Ok(ids)
    }

    /// The directory, checked. It is opened anew each time: it may have been replaced or mounted over meanwhile.
    fn descriptor(&self) -> Result<File, BackendError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(&self.path, flags, Mode::empty()) {
            Ok(directory) => File::from(directory),
            // Not seeing the directory says nothing about the keys in it.
            Err(Errno::NOENT) => {
                let detail = format!("the key directory {} is missing", self.path.display());
                return Err(BackendError::new(BackendErrorKind::Unavailable, detail).with_hint(
                    "mount or restore it, or make it (mode 0700) if it never held a key or they are gone for good",
                ));
            }
            Err(errno) => return Err(unavailable("open", &self.path, &errno.into())),
        };
        check(&self.path, &directory, "0700")?;
        Ok(directory)
    }

    /// The directory, locked against other processes that change it until the descriptor is dropped.
    fn locked(&self) -> Result<File, BackendError> {
        let directory = self.descriptor()?;
        flock(&directory, FlockOperation::LockExclusive)
            .map_err(|errno| unavailable("lock", &self.path, &errno.into()))?;
        Ok(directory)
    }
}

fn file_name(id: &KeyId) -> Result<String, BackendError> {
    let name = format!("{id}{SUFFIX}");
    if name.len() > LONGEST_NAME {
        let detail = format!("the key id {id} is too long for the name of a file");
        return Err(BackendError::new(BackendErrorKind::Unsupported, detail).with_hint("choose a shorter one"));
    }
    Ok(name)
}

/// The id whose file has this name; only the name that the id is written with: another spelling is not our file.
fn id_of(name: &[u8]) -> Option<KeyId> {
    let text = std::str::from_utf8(name).ok()?.strip_suffix(SUFFIX)?;
    let id: KeyId = text.parse().ok()?;
    (id.to_string() == text).then_some(id)
}

/// That a directory or file is this user's and nobody else gets to it: he could put his own key there, or use ours.
fn check(path: &Path, file: &File, mode: &str) -> Result<(), BackendError> {
    let metadata = file.metadata().map_err(|error| unavailable("examine", path, &error))?;
    let (shown, user) = (path.display(), rustix::process::geteuid().as_raw());
    let refused =
        |detail: String, hint: String| Err(BackendError::new(BackendErrorKind::Unavailable, detail).with_hint(hint));
    if metadata.uid() != user {
        return refused(
            format!("{shown} belongs to user {}, and this process runs as user {user}", metadata.uid()),
            format!("see who put it there; if it is yours: chown {user} {shown}"),
        );
    }
    if metadata.mode() & OTHERS != 0 {
        return refused(
            format!("{shown} is accessible to other users (mode {:04o})", metadata.mode() & 0o7777),
            format!("chmod {mode} {shown}"),
        );
    }
    Ok(())
}

fn absent_is_fine(removed: rustix::io::Result<()>) -> io::Result<()> {
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn unavailable(what: &str, path: &Path, error: &io::Error) -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, format!("cannot {what} {}: {error}", path.display()))
        .with_hint("make room, or see to the owner and mode of the directory")
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("its mode");
    }

    #[test]
    fn files_appear_whole_private_and_once() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = Directory::open(&scratch.path().join("keys"), true).expect("it is made");
        let id = KeyId::new(*b"node/\xff.1").expect("a key id");
        assert_eq!(directory.read(&id).map_err(|error| error.kind), Err(BackendErrorKind::NotFound));

        directory.create(&id, "first").expect("it is written");
        directory.create(&id, "second").expect("a repeat changes nothing");
        assert_eq!(directory.read(&id).as_deref(), Ok("first"));
        let path = directory.path(&id).expect("a short name");
        let mode = fs::metadata(path).expect("it exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // What a crash leaves, and what is not ours.
        for name in [UNFINISHED, "a%2fb.tss2.pem", "note.txt", ".tss2.pem"] {
            fs::write(directory.path.join(name), "").expect("a stray file");
        }
        assert_eq!(directory.list(), Ok(vec![id.clone()]));
        directory.remove(&id).expect("it is removed");
        directory.remove(&id).expect("a repeat succeeds");
        assert_eq!(directory.list(), Ok(vec![]));
    }

    #[test]
    fn an_id_too_long_for_a_file_is_refused() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = Directory::open(&scratch.path().join("keys"), true).expect("it is made");
        let id = KeyId::new([0; 128]).expect("a key id");
        assert_eq!(directory.create(&id, "").map_err(|error| error.kind), Err(BackendErrorKind::Unsupported));
        assert_eq!(directory.remove(&id), Ok(()));
    }

    #[test]
    fn a_link_in_the_place_of_a_file_is_not_followed() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let victim = scratch.path().join("victim");
        fs::write(&victim, "root's").expect("written");
        let directory = Directory::open(&scratch.path().join("keys"), true).expect("it is made");
        let id = KeyId::new(*b"key").expect("a key id");
        symlink(&victim, directory.path.join(UNFINISHED)).expect("linked");
        directory.create(&id, "ours").expect("it is written");
        assert_eq!(fs::read_to_string(&victim).expect("it is there"), "root's");
        assert_eq!(directory.read(&id).as_deref(), Ok("ours"));

        let planted = KeyId::new(*b"planted").expect("a key id");
        symlink(&victim, directory.path(&planted).expect("a path")).expect("linked");
        assert_eq!(directory.read(&planted).map_err(|error| error.kind), Err(BackendErrorKind::Unavailable));
    }

    #[test]
    fn what_others_can_get_to_is_refused() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let directory = Directory::open(&scratch.path().join("keys"), true).expect("it is made");
        let id = KeyId::new(*b"key").expect("a key id");
        directory.create(&id, "ours").expect("it is written");
        let file = directory.path(&id).expect("a path");
        for (path, right, wrong) in [(&file, 0o600, 0o644), (&directory.path, 0o700, 0o770)] {
            set_mode(path, wrong);
            let error = directory.read(&id).expect_err("refused");
            assert_eq!(error.kind, BackendErrorKind::Unavailable);
            assert_eq!(error.hint, Some(format!("chmod {right:04o} {}", path.display())));
            set_mode(path, right);
        }
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&directory.path, Some(65534), None).expect("its owner");
            let error = Directory::open(&directory.path, true).expect_err("refused");
            assert!(error.detail.contains("belongs to user 65534"), "{error}");
        }
    }

    #[test]
    fn a_directory_that_is_missing_is_not_one_without_keys() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let path = scratch.path().join("not-mounted");
        let error = Directory::open(&path, false).expect_err("missing");
        assert!(error.kind == BackendErrorKind::Unavailable && error.hint.is_some(), "{error}");
        assert!(!path.exists());
        let directory = Directory::open(&path, true).expect("it is made");
        fs::remove_dir(&path).expect("removed");
        let id = KeyId::new(*b"key").expect("a key id");
        assert_eq!(directory.read(&id).map_err(|error| error.kind), Err(BackendErrorKind::Unavailable));
        assert_eq!(directory.list().map_err(|error| error.kind), Err(BackendErrorKind::Unavailable));
        assert_eq!(directory.create(&id, "").map_err(|error| error.kind), Err(BackendErrorKind::Unavailable));
        assert_eq!(directory.remove(&id).map_err(|error| error.kind), Err(BackendErrorKind::Unavailable));
    }
}
