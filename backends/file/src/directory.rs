//! The directory of key files: every system call of the backend, each with its checks of owner and mode.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};
use zeroize::Zeroizing;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId};

use crate::pem;

/// What ends the name of a key file.
const SUFFIX: &str = ".pem";
/// A key file before it is one. There is one at a time, under the lock; no key id has a text with a leading dot.
const TEMPORARY: &str = ".new";
/// NAME_MAX of Linux, in bytes.
const LONGEST_NAME: usize = 255;
/// A key file is never larger, in bytes: RSA 4096 takes 3,300.
const LARGEST_FILE: u64 = 16 * 1024;
/// Group and others, all rights.
const OTHERS: u32 = 0o077;

/// The state of a key file: while it is the same, so is the content.
#[derive(PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    owner: u32,
    mode: u32,
    size: i64,
    modified: (i64, i64),
    /// Changes with every write, chmod and chown, and cannot be set by anybody.
    changed: (i64, i64),
}

pub(crate) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Self, BackendError> {
        let path = std::path::absolute(path).map_err(|error| {
            BackendError::new(BackendErrorKind::Unavailable, format!("the path {}: {error}", path.display()))
        })?;
        make(&path)?;
        let this = Self { path };
        let descriptor = this.lock()?;
        this.sweep(&descriptor)?;
        Ok(this)
    }

    /// The file of this key, whether it exists or not.
    pub(crate) fn path(&self, id: &KeyId) -> PathBuf {
        self.path.join(file_name(id))
    }

    /// Refuses an id whose file name would be too long.
    pub(crate) fn check_name(&self, id: &KeyId) -> Result<(), BackendError> {
        let name = file_name(id);
        if name.len() <= LONGEST_NAME {
            return Ok(());
        }
        Err(BackendError::new(
            BackendErrorKind::Unsupported,
            format!("the key id {id} makes a file name of {} bytes; {LONGEST_NAME} are the limit", name.len()),
        )
        .with_hint("use a shorter id, or one of ASCII letters, digits, '-', '_' and '.'"))
    }

    /// The state of the key's file; `None` if there is none or it cannot be told.
    pub(crate) fn stamp(&self, id: &KeyId) -> Option<Stamp> {
        rustix::fs::lstat(self.path(id)).ok().map(|stat| stamp(&stat))
    }

    /// The content of the key's file, and the state that the file was in.
    pub(crate) fn read(&self, id: &KeyId) -> Result<(Zeroizing<Vec<u8>>, Stamp), BackendError> {
        let path = self.path(id);
        let directory = self.descriptor()?;
        let not_found =
            || BackendError::new(BackendErrorKind::NotFound, format!("there is no file {}", path.display()));
        if self.check_name(id).is_err() {
            return Err(not_found());
        }
        // A FIFO in the key's place must not block.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&directory, file_name(id), flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Err(not_found()),
            Err(errno) => return Err(failed("open", &path, errno)),
        };
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed("read", &path, errno))?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(BackendError::new(
                BackendErrorKind::Corrupt,
                format!("{} is not a regular file", path.display()),
            ));
        }
        check_owner(&path, &stat, "0600")?;
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if size > LARGEST_FILE {
            return Err(BackendError::new(
                BackendErrorKind::Corrupt,
                format!("{} has {size} bytes, too many for a key", path.display()),
            ));
        }
        // Of its full size from the start: a buffer that grows leaves its content behind.
        let mut content = Zeroizing::new(vec![0; size as usize]);
        let length = read_full(&file, &mut content).map_err(|errno| failed("read", &path, errno))?;
        content.truncate(length);
        Ok((content, stamp(&stat)))
    }

    /// Writes a key file, whole and durable, unless there is one already.
    pub(crate) fn create(&self, id: &KeyId, content: &[u8]) -> Result<(), BackendError> {
        self.check_name(id)?;
        let path = self.path(id);
        let directory = self.lock()?;
        match rustix::fs::statat(&directory, file_name(id), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => return self.synchronize(),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("look for", &path, errno)),
        }
        self.sweep(&directory)?;
        let write = || {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&directory, TEMPORARY, flags, Mode::RUSR | Mode::WUSR)?;
            write_full(&file, content)?;
            rustix::fs::fsync(&file)?;
            rustix::fs::renameat(&directory, TEMPORARY, &directory, file_name(id))
        };
        write().map_err(|errno| {
            // The error that counts is the first one; whatever stays is swept next time.
            let _ = rustix::fs::unlinkat(&directory, TEMPORARY, AtFlags::empty());
            failed("write", &path, errno)
        })?;
        rustix::fs::fsync(&directory).map_err(|errno| failed("write", &self.path, errno))
    }

    /// Removes the key's file, durably. There may be none.
    pub(crate) fn remove(&self, id: &KeyId) -> Result<(), BackendError> {
        let directory = self.lock()?;
        if self.check_name(id).is_err() {
            return Ok(());
        }
        match rustix::fs::unlinkat(&directory, file_name(id), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("remove", &self.path(id), errno)),
        }
        rustix::fs::fsync(&directory).map_err(|errno| failed("write", &self.path, errno))
    }

    /// Waits until the entries of the directory are on the disk.
    pub(crate) fn synchronize(&self) -> Result<(), BackendError> {
        let directory = self.descriptor()?;
        rustix::fs::fsync(&directory).map_err(|errno| failed("write", &self.path, errno))
    }

    /// The ids of all files that hold, or did hold before they were torn, a key of ours.
    pub(crate) fn list(&self) -> Result<Vec<KeyId>, BackendError> {
        let descriptor = self.descriptor()?;
        let entries = Dir::read_from(&descriptor).map_err(|errno| failed("read", &self.path, errno))?;
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|errno| failed("read", &self.path, errno))?;
            if let Some(id) = id_of(entry.file_name().to_bytes())
                && self.is_key(&descriptor, &id)?
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Whether the file is a regular one of this user that begins as a PKCS#8 PEM file does, or is empty or all zeros,
    /// as a torn one may be (C02). A certificate or anybody else's key is not ours to list.
    fn is_key(&self, directory: &OwnedFd, id: &KeyId) -> Result<bool, BackendError> {
        let name = file_name(id);
        match rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode).is_file() && stat.st_uid == user() => {}
            Ok(_) | Err(Errno::NOENT) => return Ok(false),
            Err(errno) => return Err(failed("look at", &self.path(id), errno)),
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(directory, &name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::LOOP) => return Ok(false),
            Err(errno) => return Err(failed("open", &self.path(id), errno)),
        };
        let mut beginning = [0; pem::BEGIN.len()];
        let length = read_full(&file, &mut beginning).map_err(|errno| failed("read", &self.path(id), errno))?;
        let beginning = &beginning[..length];
        Ok(pem::BEGIN.as_bytes().starts_with(beginning) || beginning.iter().all(|byte| *byte == 0))
    }

    /// The directory, checked. It is opened anew each time: it may have been replaced or mounted over meanwhile.
    fn descriptor(&self) -> Result<OwnedFd, BackendError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = match rustix::fs::open(&self.path, flags, Mode::empty()) {
            Ok(descriptor) => descriptor,
            // Not seeing the directory says nothing about the keys in it.
            Err(Errno::NOENT) => {
                return Err(BackendError::new(
                    BackendErrorKind::Unavailable,
                    format!("the key directory {} is missing", self.path.display()),
                )
                .with_hint("mount or restore it, or make an empty one (mode 0700) if the keys are gone for good"));
            }
            Err(errno) => return Err(failed("open", &self.path, errno)),
        };
        let stat = rustix::fs::fstat(&descriptor).map_err(|errno| failed("open", &self.path, errno))?;
        check_owner(&self.path, &stat, "0700")?;
        Ok(descriptor)
    }

    /// The directory, locked against other writers until the descriptor is dropped or the process ends.
    fn lock(&self) -> Result<OwnedFd, BackendError> {
        let descriptor = self.descriptor()?;
        retry_on_intr(|| rustix::fs::flock(&descriptor, FlockOperation::LockExclusive))
            .map_err(|errno| failed("lock", &self.path, errno))?;
        Ok(descriptor)
    }

    /// Removes what a crash in the middle of a write left; under the lock nobody is writing it.
    fn sweep(&self, locked: &OwnedFd) -> Result<(), BackendError> {
        match rustix::fs::unlinkat(locked, TEMPORARY, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed("remove", &self.path.join(TEMPORARY), errno)),
        }
    }
}

/// Makes the directory and those above it as far as they are missing, durably, with mode 0700.
fn make(path: &Path) -> Result<(), BackendError> {
    let made = match rustix::fs::mkdir(path, Mode::RWXU) {
        Err(Errno::NOENT) => {
            if let Some(parent) = path.parent() {
                make(parent)?;
            }
            rustix::fs::mkdir(path, Mode::RWXU)
        }
        made => made,
    };
    match made {
        Ok(()) => {
            let parent = path.parent().unwrap_or(path);
            rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .and_then(rustix::fs::fsync)
                .map_err(|errno| failed("write", parent, errno))
        }
        Err(Errno::EXIST) => Ok(()),
        // A read-only file system is reported as such even where the directory exists.
        Err(_) if path.is_dir() => Ok(()),
        Err(errno) => Err(failed("make the directory", path, errno)),
    }
}

fn file_name(id: &KeyId) -> String {
    format!("{id}{SUFFIX}")
}

/// The id whose file has this name; `None` if no id's has.
fn id_of(name: &[u8]) -> Option<KeyId> {
    let id: KeyId = std::str::from_utf8(name).ok()?.strip_suffix(SUFFIX)?.parse().ok()?;
    // The text of an id is unique: `%41` is not how `A` is written.
    (file_name(&id).as_bytes() == name).then_some(id)
}

fn stamp(stat: &Stat) -> Stamp {
    Stamp {
        device: stat.st_dev as _,
        inode: stat.st_ino as _,
        owner: stat.st_uid,
        mode: stat.st_mode as _,
        size: stat.st_size as _,
        modified: (stat.st_mtime as _, stat.st_mtime_nsec as _),
        changed: (stat.st_ctime as _, stat.st_ctime_nsec as _),
    }
}

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn check_owner(path: &Path, stat: &Stat, mode: &str) -> Result<(), BackendError> {
    let refused =
        |detail: String, hint: String| Err(BackendError::new(BackendErrorKind::Unavailable, detail).with_hint(hint));
    let shown = path.display();
    if stat.st_uid != user() {
        return refused(
            format!("{shown} belongs to user {}, and this process runs as user {}", stat.st_uid, user()),
            format!("see who put it there; if it is yours: chown {} {shown}", user()),
        );
    }
    if stat.st_mode & OTHERS != 0 {
        return refused(
            format!("{shown} is accessible to other users (mode {:04o})", stat.st_mode & 0o7777),
            format!("if nobody can have read the keys: chmod {mode} {shown}; otherwise remove them"),
        );
    }
    Ok(())
}

/// What the caller can do about a system call that failed.
fn failed(action: &str, path: &Path, errno: Errno) -> BackendError {
    let (cause, hint) = match errno {
        Errno::NOSPC | Errno::DQUOT => {
            ("the disk is full".to_owned(), Some("make room on the file system; pintle goes on by itself"))
        }
        Errno::ACCESS | Errno::PERM => (
            "permission denied".to_owned(),
            Some("the key directory and its files must belong to the user that pintle runs as"),
        ),
        Errno::ROFS => ("the file system is read-only".to_owned(), Some("mount it writable")),
        Errno::LOOP => (
            "a symbolic link stands where a key file should be".to_owned(),
            Some("put the file itself there, or remove the link"),
        ),
        Errno::NOTDIR => ("it is not a directory".to_owned(), None),
        errno => (std::io::Error::from(errno).to_string(), None),
    };
    let error =
        BackendError::new(BackendErrorKind::Unavailable, format!("cannot {action} {}: {cause}", path.display()));
    match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    }
}

/// Reads until the buffer is full or the file ends; answers how much.
fn read_full(file: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut length = 0;
    while length < buffer.len() {
        match retry_on_intr(|| rustix::io::read(file, &mut buffer[length..]))? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

fn write_full(file: &OwnedFd, mut content: &[u8]) -> Result<(), Errno> {
    while !content.is_empty() {
        let written = retry_on_intr(|| rustix::io::write(file, content))?;
        content = &content[written..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_an_id_has_are_ids() {
        for bytes in [&b"node-1/client/3"[..], b"\0\xff/..%", b".hidden", b"\xff".repeat(83).as_slice()] {
            let id = KeyId::new(bytes).expect("an id");
            assert!(file_name(&id).len() <= LONGEST_NAME);
            assert_eq!(id_of(file_name(&id).as_bytes()), Some(id));
        }
        for name in ["key", ".pem", ".new", "%41.pem", "a%2fb.pem", "a b.pem", ".hidden.pem", "ä.pem"] {
            assert_eq!(id_of(name.as_bytes()), None, "{name}");
        }
    }
}
