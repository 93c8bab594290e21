//! The file system, at the level of system calls.
//!
//! [`crate::store`] decides what to make durable, and in which order; this module only wraps the kernel. The
//! simulation replaces it with a disk that loses whatever was not synced.

use std::any::Any;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use zeroize::Zeroizing;

use super::User;

/// Limit on the size of files that pintle reads, in bytes: configuration, kubeconfigs, pairs, tokens, the journal.
pub const LONGEST_FILE: u64 = 1024 * 1024;

/// A file system.
///
/// Errors are those of the system calls. Paths are resolved as by the kernel, unless a method says otherwise.
pub trait Files: Send + Sync {
    /// Reads a regular file of at most `limit` bytes. Never blocks on a pipe without a writer.
    ///
    /// # Errors
    /// `InvalidInput` if it is not a regular file, `FileTooLarge` if it is longer, and those of the system calls.
    fn read(&self, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>>;

    /// As [`read`](Self::read), but fails if the last component of the path is a symbolic link.
    ///
    /// # Errors
    /// As [`read`](Self::read); that of `O_NOFOLLOW` for a link.
    fn read_no_follow(&self, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>>;

    /// Creates a file for writing, with this mode as reduced by the umask. The file must not exist (`O_EXCL`).
    ///
    /// # Errors
    /// `AlreadyExists` if the file exists.
    fn create(&self, path: &Path, mode: u32) -> io::Result<Box<dyn NewFile>>;

    /// Renames a file, atomically replacing any file with the new name (rename(2)).
    ///
    /// # Errors
    /// Those of the system call.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Creates a hard link (link(2)).
    ///
    /// # Errors
    /// Those of the system call.
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Creates a symbolic link at `link` to `target`.
    ///
    /// # Errors
    /// Those of the system call.
    fn symlink(&self, target: &Path, link: &Path) -> io::Result<()>;

    /// Removes a file or link; not a directory.
    ///
    /// # Errors
    /// Those of the system call.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory and its missing parents, with this mode as reduced by the umask. Does not change existing
    /// ones.
    ///
    /// # Errors
    /// Those of the system call.
    fn create_directories(&self, path: &Path, mode: u32) -> io::Result<()>;

    /// Makes a directory's entries durable (fsync(2) of the directory).
    ///
    /// # Errors
    /// Those of the system call.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, in no particular order.
    ///
    /// # Errors
    /// Those of the system call.
    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>>;

    /// The metadata of the file at this path, following links (stat(2)).
    ///
    /// # Errors
    /// Those of the system call.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;

    /// The metadata of the file at this path, not following a link (lstat(2)).
    ///
    /// # Errors
    /// Those of the system call.
    fn symlink_metadata(&self, path: &Path) -> io::Result<Metadata>;

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// Those of the system call.
    fn read_link(&self, path: &Path) -> io::Result<PathBuf>;

    /// The absolute path without links, `.` and `..`. Every component must exist.
    ///
    /// # Errors
    /// Those of the system calls.
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf>;

    /// Takes an exclusive advisory lock (flock(2)) on an existing file or directory, without waiting and without
    /// following a link. Dropping the result releases it; `None` if the file is already locked.
    ///
    /// # Errors
    /// Those of the system calls; `Unsupported` if the file system does not support locks.
    fn try_lock(&self, path: &Path) -> io::Result<Option<FileLock>>;

    /// The local time in the format that client-go uses in the names of pairs: `2026-01-31-23-59-59`.
    fn timestamp(&self) -> String {
        jiff::Zoned::now().strftime("%Y-%m-%d-%H-%M-%S").to_string()
    }

    /// Whether there is a file at this path, following links.
    fn exists(&self, path: &Path) -> bool {
        self.metadata(path).is_ok()
    }
}

/// A file open for writing.
pub trait NewFile: Send {
    /// Appends bytes.
    ///
    /// # Errors
    /// Those of the system call; some of the bytes may have been written.
    fn write(&mut self, content: &[u8]) -> io::Result<()>;

    /// Sets the mode, regardless of the umask.
    ///
    /// # Errors
    /// Those of the system call.
    fn set_mode(&mut self, mode: u32) -> io::Result<()>;

    /// Sets the owner and group.
    ///
    /// # Errors
    /// Those of the system call.
    fn set_owner(&mut self, owner: User) -> io::Result<()>;

    /// Makes content and mode durable (fsync(2)), but not the directory entry.
    ///
    /// # Errors
    /// Those of the system call.
    fn sync(&mut self) -> io::Result<()>;

    /// Locks the file while it is open, so that a cleanup can tell it from a leftover. Returns whether the file still
    /// has a name: a cleanup may have removed it first.
    ///
    /// # Errors
    /// Those of the system calls. A file system without locks is not an error.
    fn lock(&mut self) -> io::Result<bool>;
}

/// A lock, held until dropped.
pub struct FileLock {
    /// The inode of the locked file.
    pub inode: u64,
    _held: Box<dyn Any + Send + Sync>,
}

impl FileLock {
    /// A lock on this inode, released when `held` is dropped.
    pub fn new(inode: u64, held: impl Any + Send + Sync) -> Self {
        Self { inode, _held: Box::new(held) }
    }
}

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A pipe, socket or device.
    Other,
}

/// A file's metadata (stat(2)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Regular file, directory, or other.
    pub kind: FileKind,
    /// The permission bits, `0o777` and below.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// In bytes.
    pub size: u64,
    /// The number of the device that contains the file.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
    /// When the content was last changed (`st_mtim`), in seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
    /// When content, owner, mode or links were last changed (`st_ctim`), in the same format.
    pub changed: (i64, i64),
}

impl From<&fs::Metadata> for Metadata {
    fn from(found: &fs::Metadata) -> Self {
        let kind = match found.file_type() {
            kind if kind.is_file() => FileKind::File,
            kind if kind.is_dir() => FileKind::Directory,
            kind if kind.is_symlink() => FileKind::Link,
            _ => FileKind::Other,
        };
        Self {
            kind,
            mode: found.mode() & 0o777,
            uid: found.uid(),
            gid: found.gid(),
            size: found.size(),
            device: found.dev(),
            inode: found.ino(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

/// This machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemFiles;

impl SystemFiles {
    /// Gives what stands at this path this mode, whatever the umask.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }
}

/// The text of a file that the person who started this process named: it may also be a pipe, such as `<(command)` in a
/// shell, which is read to its end.
///
/// # Errors
/// Those of the system calls, and `InvalidData` for what is not UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    fs::read_to_string(path)
}

/// Reads a file, opened with these additional flags.
fn read_with(path: &Path, limit: u64, flags: OFlags) -> io::Result<Zeroizing<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | flags;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let too_long = || io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {limit} bytes"));
    if metadata.len() > limit {
        return Err(too_long());
    }
    // Enough capacity for all of it: growing the buffer would leave copies of secrets in freed memory.
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len() + 1).unwrap_or_default()));
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit { Err(too_long()) } else { Ok(content) }
}

impl Files for SystemFiles {
    fn read(&self, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
        read_with(path, limit, OFlags::empty())
    }

    fn read_no_follow(&self, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
        read_with(path, limit, OFlags::NOFOLLOW)
    }

    fn create(&self, path: &Path, mode: u32) -> io::Result<Box<dyn NewFile>> {
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        Ok(Box::new(SystemFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn symlink(&self, target: &Path, link: &Path) -> io::Result<()> {
        symlink(target, link)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_directories(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(mode).create(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        fs::metadata(path).map(|found| Metadata::from(&found))
    }

    fn symlink_metadata(&self, path: &Path) -> io::Result<Metadata> {
        fs::symlink_metadata(path).map(|found| Metadata::from(&found))
    }

    fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        fs::read_link(path)
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        fs::canonicalize(path)
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<FileLock>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        match file.try_lock() {
            Ok(()) => Ok(Some(FileLock::new(file.metadata()?.ino(), file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(io::Error::new(io::ErrorKind::Unsupported, error)),
        }
    }
}

/// A file of this machine, open for writing.
struct SystemFile(File);

impl NewFile for SystemFile {
    fn write(&mut self, content: &[u8]) -> io::Result<()> {
        self.0.write_all(content)
    }

    fn set_mode(&mut self, mode: u32) -> io::Result<()> {
        self.0.set_permissions(fs::Permissions::from_mode(mode))
    }

    fn set_owner(&mut self, owner: User) -> io::Result<()> {
        fchown(&self.0, Some(owner.uid), Some(owner.gid))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn lock(&mut self) -> io::Result<bool> {
        // Where locks are not supported, leftovers are not removed either.
        let _ = flock(&self.0, FlockOperation::LockExclusive);
        Ok(self.0.metadata()?.nlink() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_up_to_the_limit_are_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let (file, pipe) = (directory.path().join("file"), directory.path().join("pipe"));
        fs::write(&file, "12345").expect("written");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR | Mode::WUSR).expect("a pipe");
        assert_eq!(*SystemFiles.read(&file, 5).expect("read"), b"12345");
        let refused = |path: &Path, limit| SystemFiles.read(path, limit).expect_err("refused").kind();
        assert_eq!(refused(&file, 4), io::ErrorKind::FileTooLarge);
        for other in [pipe.as_path(), Path::new("/dev/zero"), directory.path()] {
            assert_eq!(refused(other, 5), io::ErrorKind::InvalidInput, "{}", other.display());
        }
        // Its reported size is 0, but it is not empty.
        assert!(!SystemFiles.read(Path::new("/proc/self/stat"), LONGEST_FILE).expect("read").is_empty());
    }
}
