//! Writing so that a power cut leaves the old content or the new, never anything between (case C02).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

/// Replaces the content of `path`: a temporary file beside it, fsynced, renamed over it, and the directory fsynced.
///
/// # Errors
/// Whatever the file system says; `path` then has its old content and no temporary file stays behind.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = temporary_beside(path);
    let result = create(&temporary, content, mode).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // The error to report is the first one; a leftover is swept at the next try.
        let _ = fs::remove_file(&temporary);
    }
    result?;
    sync_directory(directory_of(path))
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
    let temporary = temporary_beside(link);
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

/// One temporary name for each path: a leftover of a crash is written over, not collected.
fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".pintle");
    let temporary = path.with_file_name(name);
    // Only a crash leaves one, and create() insists on a new file.
    let _ = fs::remove_file(&temporary);
    temporary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_leaves_one_file_with_the_new_content() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("journal");
        fs::write(directory.path().join(".journal.pintle"), "torn").expect("a leftover");
        replace(&path, b"one", 0o600).expect("written");
        replace(&path, b"two", 0o600).expect("written again");
        assert_eq!(fs::read(&path).expect("readable"), b"two");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
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
