//! Writing so that a power cut leaves the old content or the new, never anything between (case C02).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use crate::world::User;

/// Replaces the content of `path`: a temporary file beside it, fsynced, renamed over it, and the directory fsynced. Of
/// several writers at once, the last one's content stays, whole.
///
/// # Errors
/// Whatever the file system says; `path` then has its old content and no temporary file stays behind.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    replace_for(path, content, mode, None)
}

/// As [`replace`]; the file has this mode, whatever the umask, and belongs to `owner` before it is seen, so that nobody
/// who may read it ever finds it closed.
///
/// # Errors
/// As [`replace`].
pub fn replace_for(path: &Path, content: &[u8], mode: u32, owner: Option<User>) -> io::Result<()> {
    sweep(path);
    let (temporary, file) = temporary_beside(path)?;
    let result = fill(&file, content, mode, owner).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // The error to report is the first one; a leftover is swept at the next try.
        let _ = fs::remove_file(&temporary);
    }
    result?;
    sync_directory(directory_of(path))
}

fn fill(mut file: &File, content: &[u8], mode: u32, owner: Option<User>) -> io::Result<()> {
    file.write_all(content)?;
    // The mode first: without CAP_FOWNER, only the owner may set it.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    if let Some(owner) = owner {
        fchown(file, Some(owner.uid), Some(owner.gid)).map_err(|error| {
            io::Error::new(error.kind(), format!("it cannot be given to user {}: {error}", owner.uid))
        })?;
    }
    file.sync_all()
}

/// Creates `path`, which must not exist, with this content, fsynced. The directory is not.
///
/// # Errors
/// Whatever the file system says; what was written by then is removed.
pub fn create(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let result = file.write_all(content).and_then(|()| file.sync_all());
    if result.is_err() {
        let _ = fs::remove_file(path);
    }
    result
}

/// Makes `link` a symbolic link to `target` by renaming a new link over it, so that `link` is never missing.
///
/// # Errors
/// Whatever the file system says; `link` is then as it was.
pub fn flip_link(link: &Path, target: &Path) -> io::Result<()> {
    let temporary = link.with_file_name(temporary_name(link));
    // Only a crash leaves one: links are the running agent's alone.
    let _ = fs::remove_file(&temporary);
    symlink(target, &temporary)?;
    let result = fs::rename(&temporary, link);
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result?;
    sync_directory(directory_of(link))
}

/// Makes the names in a directory durable.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// The directory that holds `path`.
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    }
}

/// What the names of the temporary files beside `path` begin with.
fn temporary_name(path: &Path) -> OsString {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".pintle");
    name
}

/// A new file beside `path`, locked for as long as it is written: whoever sweeps knows by that that it is no leftover.
fn temporary_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    for number in 0..u16::MAX {
        let mut name = temporary_name(path);
        name.push(format!("-{}-{number}", std::process::id()));
        let temporary = path.with_file_name(name);
        let file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
            // Another thread's, or a process's of another PID namespace.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            opened => opened?,
        };
        // Where the file system has no locks, nothing is swept either.
        let _ = flock(&file, FlockOperation::LockExclusive);
        // Swept in the moment before it was locked.
        if file.metadata()?.nlink() > 0 {
            return Ok((temporary, file));
        }
    }
    Err(io::Error::other("there is no temporary name left"))
}

/// Removes the temporary files beside `path` that no living writer has: a crash left them. What cannot be removed now is
/// left for the next time.
fn sweep(path: &Path) {
    let (whole, prefix) = (temporary_name(path), [temporary_name(path).as_bytes(), b"-"].concat());
    let entries = fs::read_dir(directory_of(path)).into_iter().flatten().filter_map(Result::ok);
    for entry in entries.filter(|entry| {
        let name = entry.file_name();
        name == whole || name.as_bytes().starts_with(&prefix)
    }) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::open(entry.path(), flags, Mode::empty()).map(File::from) else { continue };
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        // Its writer may have finished meanwhile, and another one have taken the name.
        let same = |found: fs::Metadata| file.metadata().is_ok_and(|opened| opened.ino() == found.ino());
        if locked && fs::symlink_metadata(entry.path()).is_ok_and(same) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_leaves_one_file_with_the_new_content() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        for leftover in [".journal.pintle", ".journal.pintle-1-0"] {
            fs::write(directory.path().join(leftover), "torn").expect("a leftover");
        }
        replace(&path, b"one", 0o600).expect("written");
        replace(&path, b"two", 0o600).expect("written again");
        assert_eq!(fs::read(&path).expect("readable"), b"two");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn several_writers_at_once_leave_one_whole_file_and_none_fails() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("kubeconfig");
        std::thread::scope(|scope| {
            for writer in b'a'..b'i' {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        replace(path, &[writer; 5000], 0o600).expect("written");
                        let found = fs::read(path).expect("readable");
                        assert!(found.len() == 5000 && found.iter().all(|octet| *octet == found[0]));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn what_a_living_writer_has_is_not_swept() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        let (temporary, file) = temporary_beside(&path).expect("made");
        replace(&path, b"one", 0o600).expect("written");
        assert!(temporary.exists());
        drop(file);
        replace(&path, b"two", 0o600).expect("written");
        assert!(!temporary.exists());
    }

    #[test]
    fn flip_link_replaces_a_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let link = directory.path().join("current");
        flip_link(&link, Path::new("a")).expect("linked");
        flip_link(&link, Path::new("b")).expect("flipped");
        assert_eq!(fs::read_link(&link).expect("a link"), Path::new("b"));
    }
}
