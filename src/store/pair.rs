//! The credential pair that everybody else reads, in the kubelet's own layout.
//!
//! `kubelet-client-<timestamp>.pem` (0600, the chain, then the key) and the symbolic link `kubelet-client-current.pem`
//! to the newest of them, as client-go's `certificate.FileStore` has them: a kubelet and pintle can take over from each
//! other.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pintle_agent_core::UnixTime;
use zeroize::Zeroizing;

use super::durable;
use crate::world::files::{FileKind, LONGEST_FILE, Metadata};
use crate::world::{Files, SystemFiles};

/// The directory of pairs (`--cert-dir`), and what the pairs in it are called.
pub struct PairDirectory {
    files: Arc<dyn Files>,
    directory: PathBuf,
    prefix: String,
}

/// When the pair in this file of this machine was installed, as far as the file system says.
pub fn installed_at(path: &Path) -> Option<UnixTime> {
    SystemFiles.metadata(path).ok().map(|found| modified_at(&found))
}

/// The text of a pair. What stands around its PEM blocks may be in any encoding, and means nothing (case C38).
pub fn text_of(content: &[u8]) -> Zeroizing<String> {
    Zeroizing::new(String::from_utf8_lossy(content).into_owned())
}

fn modified_at(found: &Metadata) -> UnixTime {
    let (seconds, nanoseconds) = found.modified;
    UnixTime::from_milliseconds(seconds.saturating_mul(1000).saturating_add(nanoseconds / 1_000_000))
}

/// A pair found in the directory.
pub struct FoundPair {
    /// The file it is in.
    pub path: PathBuf,
    /// Its text: chain and key.
    pub content: Zeroizing<String>,
}

/// A pair that is there and cannot be read, which is not the same as one that is not there.
#[derive(Debug)]
pub struct UnreadablePair {
    /// The file it is in.
    pub path: PathBuf,
    /// What the file system says.
    pub error: io::Error,
}

impl PairDirectory {
    /// The pairs `<prefix>-….pem` in this directory; the kubelet's client pairs have the prefix `kubelet-client`.
    pub fn new(directory: PathBuf, prefix: &str) -> Self {
        Self::on(Arc::new(SystemFiles), directory, prefix)
    }

    /// As [`new`](Self::new), on this file system.
    pub fn on(files: Arc<dyn Files>, directory: PathBuf, prefix: &str) -> Self {
        Self { files, directory, prefix: prefix.to_owned() }
    }

    /// The link to the current pair.
    pub fn current(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.prefix))
    }

    /// Creates the directory where it is missing, and turns a current pair that is a plain file into a pair and a link
    /// (case C09), nothing lost in between.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn prepare(&self) -> io::Result<()> {
        let files = self.files.as_ref();
        files.create_directories(&self.directory, 0o755)?;
        let current = self.current();
        if files.symlink_metadata(&current).is_ok_and(|found| found.kind == FileKind::File) {
            let (pair, name) = self.unused_name()?;
            files.hard_link(&current, &pair)?;
            files.sync_directory(&self.directory)?;
            durable::flip_link(files, &current, Path::new(&name))?;
        }
        Ok(())
    }

    /// The current pair, then all others, the newest first. Also what stands there and cannot be read: a link that leads
    /// nowhere, a file of somebody else, a directory that cannot be listed.
    pub fn pairs(&self) -> Vec<Result<FoundPair, UnreadablePair>> {
        let read = |path: PathBuf| match self.read(&path) {
            Ok(content) => Ok(FoundPair { path, content }),
            Err(error) => Err(UnreadablePair { path, error }),
        };
        let current = self.current_file();
        let mut pairs = Vec::new();
        match &current {
            Some(file) => pairs.push(read(file.clone())),
            None => pairs.extend(self.broken_link().map(|error| Err(UnreadablePair { path: self.current(), error }))),
        }
        match self.pair_files() {
            Ok(files) => {
                let others = files.into_iter().filter(|path| self.files.canonicalize(path).ok() != current);
                pairs.extend(others.map(read));
            }
            Err(error) => pairs.push(Err(UnreadablePair { path: self.directory.clone(), error })),
        }
        pairs
    }

    /// Why the link to the current pair leads to no file, if there is one.
    fn broken_link(&self) -> Option<io::Error> {
        self.files.symlink_metadata(&self.current()).ok()?;
        Some(match self.files.canonicalize(&self.current()).err()? {
            error
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) =>
            {
                io::Error::new(error.kind(), "it is a link that leads nowhere")
            }
            error => error,
        })
    }

    /// Whether this is the path of the current pair: of the link, or of the file that it leads to.
    pub fn is_current(&self, path: &Path) -> bool {
        path == self.current() || self.current_file().is_some_and(|current| current == path)
    }

    /// What stands in the place of the link and is neither a link nor a file, so that it is not replaced: it may be
    /// somebody's (case C39).
    pub fn obstacle(&self) -> Option<FileKind> {
        let kind = self.files.symlink_metadata(&self.current()).ok()?.kind;
        (!matches!(kind, FileKind::Link | FileKind::File)).then_some(kind)
    }

    fn refuse_obstacle(&self) -> io::Result<()> {
        match self.obstacle() {
            None => Ok(()),
            Some(FileKind::Directory) => {
                Err(io::Error::new(io::ErrorKind::IsADirectory, "a directory is in its place"))
            }
            Some(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "a pipe, socket or device is in its place")),
        }
    }

    /// The file that the link to the current pair leads to, if it leads to one.
    pub fn current_file(&self) -> Option<PathBuf> {
        self.files.canonicalize(&self.current()).ok()
    }

    /// The user whom this file belongs to, as far as the file system says.
    pub fn owner_of(&self, path: &Path) -> Option<u32> {
        self.files.metadata(path).ok().map(|found| found.uid)
    }

    /// When the pair in this file was installed, as far as the file system says.
    pub fn installed_at(&self, pair: &Path) -> Option<UnixTime> {
        self.files.metadata(pair).ok().map(|found| modified_at(&found))
    }

    fn read(&self, path: &Path) -> io::Result<Zeroizing<String>> {
        Ok(text_of(&self.files.read(path, LONGEST_FILE)?))
    }

    /// The text of the current pair.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn read_current(&self) -> io::Result<Zeroizing<String>> {
        self.read(&self.current())
    }

    /// Writes a pair and makes it the current one; a repeat with the same content changes nothing.
    ///
    /// The link is flipped only after the pair has been read back from the file and found equal, and file and directory
    /// are durable.
    ///
    /// # Errors
    /// Whatever the file system says, and if there is an [`obstacle`](Self::obstacle); the current pair is then as it was.
    pub fn publish(&self, content: &str) -> io::Result<PathBuf> {
        self.prepare()?;
        if self.read_current().is_ok_and(|current| *current == content) {
            self.files.sync_directory(&self.directory)?;
            return self.files.canonicalize(&self.current());
        }
        self.refuse_obstacle()?;
        let (pair, name) = self.unused_name()?;
        let flipped = self.write_and_flip(&pair, &name, content.as_bytes());
        if flipped.is_err() && self.current_file() != self.files.canonicalize(&pair).ok() {
            // It is tried again with another name: what nobody uses must not pile up, with a key in each.
            let _ = self.files.remove(&pair);
        }
        flipped.map(|()| pair)
    }

    fn write_and_flip(&self, pair: &Path, name: &str, content: &[u8]) -> io::Result<()> {
        let files = self.files.as_ref();
        durable::create(files, pair, content, 0o600)?;
        if *files.read(pair, LONGEST_FILE)? != content {
            return Err(io::Error::other("the file system gave back something else than was written"));
        }
        files.sync_directory(&self.directory)?;
        durable::flip_link(files, &self.current(), Path::new(name))
    }

    /// Makes this pair of the directory the current one.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn make_current(&self, pair: &Path) -> io::Result<()> {
        self.refuse_obstacle()?;
        durable::flip_link(self.files.as_ref(), &self.current(), Path::new(pair.file_name().unwrap_or_default()))
    }

    /// Removes all pairs but the newest `keep`, never the current one (case C15), and how many are left.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn prune(&self, keep: usize) -> io::Result<usize> {
        let current = self.current_file();
        let (mut kept, mut removed) = (usize::from(current.is_some()), false);
        for path in self.pair_files()? {
            if self.files.canonicalize(&path).ok() == current {
                continue;
            }
            if kept < keep {
                kept += 1;
            } else {
                self.files.remove(&path)?;
                removed = true;
            }
        }
        if removed {
            self.files.sync_directory(&self.directory)?;
        }
        Ok(kept)
    }

    /// The pair files, the newest first; links and strangers are left out.
    fn pair_files(&self) -> io::Result<Vec<PathBuf>> {
        let names = self.files.list(&self.directory)?;
        let mut pairs: Vec<((i64, i64), PathBuf)> = names
            .into_iter()
            .filter(|name| self.is_pair_name(name))
            .filter_map(|name| {
                let path = self.directory.join(name);
                let found: Metadata = self.files.symlink_metadata(&path).ok()?;
                (found.kind == FileKind::File).then_some((found.modified, path))
            })
            .collect();
        pairs.sort();
        Ok(pairs.into_iter().rev().map(|(_, path)| path).collect())
    }

    fn is_pair_name(&self, name: &OsString) -> bool {
        name.to_str()
            .and_then(|name| name.strip_prefix(&self.prefix)?.strip_prefix('-')?.strip_suffix(".pem"))
            .is_some_and(|stamp| {
                stamp.len() >= 19 && stamp.chars().all(|character| character.is_ascii_digit() || character == '-')
            })
    }

    /// A name that no file has, from the local time as client-go has it, with a number within the same second
    /// (case C30).
    fn unused_name(&self) -> io::Result<(PathBuf, String)> {
        let stamp = self.files.timestamp();
        for number in 0..10_000 {
            let name = match number {
                0 => format!("{}-{stamp}.pem", self.prefix),
                number => format!("{}-{stamp}-{number}.pem", self.prefix),
            };
            let path = self.directory.join(&name);
            if self.files.symlink_metadata(&path).is_err() {
                return Ok((path, name));
            }
        }
        Err(io::Error::other("ten thousand pairs within one second"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn directory() -> (tempfile::TempDir, PairDirectory) {
        let directory = tempfile::tempdir().expect("a directory");
        let pairs = PairDirectory::new(directory.path().join("pki"), "kubelet-client");
        (directory, pairs)
    }

    #[test]
    fn c30_two_pairs_within_one_second_are_two_files() {
        let (_directory, pairs) = directory();
        let first = pairs.publish("one").expect("published");
        let second = pairs.publish("two").expect("published");
        assert_ne!(first, second);
        assert_eq!(*pairs.read_current().expect("current"), "two");
        assert_eq!(fs::read_to_string(first).expect("kept"), "one");
        assert_eq!(pairs.publish("two").expect("again"), fs::canonicalize(second).expect("a file"));
        assert_eq!(pairs.pairs().len(), 2);
    }

    #[test]
    fn a_pair_that_cannot_become_current_does_not_stay() {
        let (_directory, pairs) = directory();
        fs::create_dir_all(pairs.current()).expect("a directory in the link's place");
        for _ in 0..3 {
            pairs.publish("one").expect_err("in the way");
        }
        assert!(pairs.pairs().iter().all(Result::is_err), "the directory alone is there");
    }

    #[test]
    fn c38_what_cannot_be_read_is_listed_and_only_what_is_not_there_is_left_out() {
        let (_directory, pairs) = directory();
        assert_eq!(pairs.pairs().iter().map(Result::is_ok).collect::<Vec<_>>(), [false], "there is no directory");
        pairs.prepare().expect("made");
        assert!(pairs.pairs().is_empty());
        let first = pairs.publish("one").expect("published");
        pairs.publish("two").expect("published");
        for target in ["nowhere.pem", "kubelet-client-current.pem", ".", "/proc/self/mem"] {
            fs::remove_file(pairs.current()).expect("removed");
            std::os::unix::fs::symlink(target, pairs.current()).expect("linked");
            let found = pairs.pairs();
            assert_eq!(found.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, true, true], "{target}");
            assert!(found[0].as_ref().is_err_and(|unreadable| pairs.is_current(&unreadable.path)), "{target}");
        }
        pairs.make_current(&first).expect("a link is replaced");
        assert_eq!(*pairs.read_current().expect("current"), "one");
    }

    #[test]
    fn c39_what_is_no_link_and_no_file_is_not_replaced() {
        let (_directory, pairs) = directory();
        let pair = pairs.publish("one").expect("published");
        fs::remove_file(pairs.current()).expect("removed");
        rustix::fs::mkfifoat(rustix::fs::CWD, pairs.current(), rustix::fs::Mode::RUSR).expect("a pipe");
        assert_eq!(pairs.obstacle(), Some(FileKind::Other));
        pairs.make_current(&pair).expect_err("in the way");
        pairs.publish("two").expect_err("in the way");
        assert_eq!(pairs.obstacle(), Some(FileKind::Other));
    }

    #[test]
    fn c09_a_plain_file_becomes_a_pair_and_a_link() {
        let (_directory, pairs) = directory();
        fs::create_dir_all(&pairs.directory).expect("a directory");
        fs::write(pairs.current(), "plain").expect("a plain file");
        pairs.prepare().expect("adopted");
        assert!(fs::symlink_metadata(pairs.current()).expect("there").is_symlink());
        assert_eq!(*pairs.read_current().expect("current"), "plain");
    }

    #[test]
    fn c15_old_pairs_are_pruned_and_strangers_left_alone() {
        let (_directory, pairs) = directory();
        for content in ["one", "two", "three", "four"] {
            pairs.publish(content).expect("published");
        }
        for stranger in ["kubelet.key", "kubelet-client-notes.pem", "kubelet-server-2026-01-01-00-00-00.pem"] {
            fs::write(pairs.directory.join(stranger), "mine").expect("a stranger");
        }
        assert_eq!(pairs.prune(2).expect("pruned"), 2);
        assert_eq!(pairs.pairs().len(), 2);
        assert_eq!(*pairs.read_current().expect("current"), "four");
        assert_eq!(fs::read_dir(&pairs.directory).expect("listed").count(), 6);
    }
}
