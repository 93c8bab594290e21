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

    /// The current pair, then all others, the newest first.
    pub fn pairs(&self) -> Vec<Result<FoundPair, UnreadablePair>> {
        let current = self.current_file();
        let mut paths: Vec<PathBuf> = current.iter().cloned().collect();
        paths.extend(self.pair_files().into_iter().filter(|path| self.files.canonicalize(path).ok() != current));
        let read = |path: PathBuf| match self.read(&path) {
            Ok(content) => Ok(FoundPair { path, content }),
            Err(error) => Err(UnreadablePair { path, error }),
        };
        paths.into_iter().map(read).collect()
    }

    /// The file that the link to the current pair leads to, if it leads to one.
    pub fn current_file(&self) -> Option<PathBuf> {
        self.files.canonicalize(&self.current()).ok()
    }

    /// When the pair in this file was installed, as far as the file system says.
    pub fn installed_at(&self, pair: &Path) -> Option<UnixTime> {
        self.files.metadata(pair).ok().map(|found| modified_at(&found))
    }

    fn read(&self, path: &Path) -> io::Result<Zeroizing<String>> {
        let content = self.files.read(path, LONGEST_FILE)?;
        // What stands around the PEM blocks may be in any encoding; it says nothing to anybody.
        Ok(Zeroizing::new(String::from_utf8_lossy(&content).into_owned()))
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
    /// Whatever the file system says; the current pair is then as it was.
    pub fn publish(&self, content: &str) -> io::Result<PathBuf> {
        self.prepare()?;
        if self.read_current().is_ok_and(|current| *current == content) {
            self.files.sync_directory(&self.directory)?;
            return self.files.canonicalize(&self.current());
        }
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
    /// Whatever the file system says.
    pub fn make_current(&self, pair: &Path) -> io::Result<()> {
        durable::flip_link(self.files.as_ref(), &self.current(), Path::new(pair.file_name().unwrap_or_default()))
    }

    /// Removes all pairs but the newest `keep`, never the current one (case C15), and how many are left.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn prune(&self, keep: usize) -> io::Result<usize> {
        let current = self.current_file();
        let (mut kept, mut removed) = (usize::from(current.is_some()), false);
        for path in self.pair_files() {
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
    fn pair_files(&self) -> Vec<PathBuf> {
        let names = self.files.list(&self.directory).unwrap_or_default();
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
        pairs.into_iter().rev().map(|(_, path)| path).collect()
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
        let stamp = jiff::Zoned::now().strftime("%Y-%m-%d-%H-%M-%S").to_string();
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
