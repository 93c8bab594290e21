//! Writing so that a power cut leaves the old content or the new, never anything between (case C02).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::world::User;
use crate::world::files::{Files, NewFile};

/// Replaces the content of `path`: a temporary file beside it, fsynced, renamed over it, and the directory fsynced. Of
/// several writers at once, the last one's content stays, whole.
///
/// # Errors
/// Whatever the file system says; `path` then has its old content and no temporary file stays behind.
pub fn replace(files: &dyn Files, path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    replace_for(files, path, content, mode, None)
}

/// As [`replace`]; the file has this mode, whatever the umask, and belongs to `owner` before it is seen, so that nobody
/// who may read it ever finds it closed.
///
/// # Errors
/// As [`replace`].
pub fn replace_for(files: &dyn Files, path: &Path, content: &[u8], mode: u32, owner: Option<User>) -> io::Result<()> {
    sweep(files, path);
    let (temporary, mut file) = temporary_beside(files, path)?;
    let result = fill(file.as_mut(), content, mode, owner).and_then(|()| files.rename(&temporary, path));
    if result.is_err() {
        // The error to report is the first one; a leftover is swept at the next try.
        let _ = files.remove(&temporary);
    }
    result?;
    files.sync_directory(directory_of(path))
}

fn fill(file: &mut dyn NewFile, content: &[u8], mode: u32, owner: Option<User>) -> io::Result<()> {
    file.write(content)?;
    // The mode first: without CAP_FOWNER, only the owner may set it.
    file.set_mode(mode)?;
    if let Some(owner) = owner {
        file.set_owner(owner).map_err(|error| {
            io::Error::new(error.kind(), format!("it cannot be given to user {}: {error}", owner.uid))
        })?;
    }
    file.sync()
}

/// Creates `path`, which must not exist, with this content and mode, fsynced. The directory is not.
///
/// # Errors
/// Whatever the file system says; what was written by then is removed.
pub fn create(files: &dyn Files, path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = files.create(path, mode)?;
    let result = fill(file.as_mut(), content, mode, None);
    if result.is_err() {
        let _ = files.remove(path);
    }
    result
}

/// Makes `link` a symbolic link to `target` by renaming a new link over it, so that `link` is never missing.
///
/// # Errors
/// Whatever the file system says; `link` is then as it was.
pub fn flip_link(files: &dyn Files, link: &Path, target: &Path) -> io::Result<()> {
    let temporary = link.with_file_name(temporary_name(link));
    // Only a crash leaves one: links are the running agent's alone.
    let _ = files.remove(&temporary);
    files.symlink(target, &temporary)?;
    let result = files.rename(&temporary, link);
    if result.is_err() {
        let _ = files.remove(&temporary);
    }
    result?;
    files.sync_directory(directory_of(link))
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

/// A new file beside `path`, locked for as long as it is written, which tells it from a leftover.
fn temporary_beside(files: &dyn Files, path: &Path) -> io::Result<(PathBuf, Box<dyn NewFile>)> {
    for number in 0..u16::MAX {
        let mut name = temporary_name(path);
        name.push(format!("-{}-{number}", std::process::id()));
        let temporary = path.with_file_name(name);
        let mut file = match files.create(&temporary, 0o600) {
            // Another thread's, or a process's of another PID namespace.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            opened => opened?,
        };
        if file.lock()? {
            return Ok((temporary, file));
        }
    }
    Err(io::Error::other("there is no temporary name left"))
}

/// Removes the temporary files beside `path` that no living writer has: a crash left them. What cannot be removed now is
/// left for the next time.
fn sweep(files: &dyn Files, path: &Path) {
    let (whole, prefix) = (temporary_name(path), [temporary_name(path).as_bytes(), b"-"].concat());
    let names = files.list(directory_of(path)).unwrap_or_default();
    for name in names.into_iter().filter(|name| *name == whole || name.as_bytes().starts_with(&prefix)) {
        let leftover = path.with_file_name(name);
        let Ok(Some(lock)) = files.try_lock(&leftover) else { continue };
        // Its writer may have finished meanwhile, and another one have taken the name.
        if files.symlink_metadata(&leftover).is_ok_and(|found| found.inode == lock.inode) {
            let _ = files.remove(&leftover);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::world::SystemFiles;

    #[test]
    fn replace_leaves_one_file_with_the_new_content() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        for leftover in [".journal.pintle", ".journal.pintle-1-0"] {
            fs::write(directory.path().join(leftover), "torn").expect("a leftover");
        }
        replace(&SystemFiles, &path, b"one", 0o600).expect("written");
        replace(&SystemFiles, &path, b"two", 0o600).expect("written again");
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
                        replace(&SystemFiles, path, &[writer; 5000], 0o600).expect("written");
                        let found = fs::read(path).expect("readable");
                        assert!(found.len() == 5000 && found.iter().all(|byte| *byte == found[0]));
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
        let (temporary, file) = temporary_beside(&SystemFiles, &path).expect("made");
        replace(&SystemFiles, &path, b"one", 0o600).expect("written");
        assert!(temporary.exists());
        drop(file);
        replace(&SystemFiles, &path, b"two", 0o600).expect("written");
        assert!(!temporary.exists());
    }

    #[test]
    fn flip_link_replaces_a_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let link = directory.path().join("current");
        flip_link(&SystemFiles, &link, Path::new("a")).expect("linked");
        flip_link(&SystemFiles, &link, Path::new("b")).expect("flipped");
        assert_eq!(fs::read_link(&link).expect("a link"), Path::new("b"));
    }
}
