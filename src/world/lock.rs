//! Files that exist only to be locked (flock(2)).

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// An open lock file. Dropping it releases the lock.
pub struct LockFile(File);

impl LockFile {
    /// Opens the file, or creates it with mode 0600; never through a symbolic link, which might lead to somebody's file.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path).map(Self)
    }

    /// Locks it together with others that share it; waits for one that does not.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn lock_shared(&self) -> io::Result<()> {
        self.0.lock_shared()
    }

    /// Locks it for this process alone, without waiting; whether nobody else has it.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn try_lock(&self) -> io::Result<bool> {
        match self.0.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}
