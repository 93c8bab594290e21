//! A disk that loses what was not synced and tears what was half-written, and on which other people work as well.
//!
//! Names and contents are durable separately, as on a journalling file system: fsync(2) of a file makes its content
//! durable, fsync(2) of a directory the names in it; a crash keeps any prefix of the other changes of names, in their
//! order, and of a file that was not synced any part, or zeros.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zeroize::Zeroizing;

use super::random::Random;
use crate::world::User;
use crate::world::files::{FileKind, FileLock, Files, Metadata, NewFile};

type Inode = usize;

/// What the kernel is about to do, as a fault sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskCall {
    Read,
    Create,
    Write,
    SetMode,
    Sync,
    Rename,
    Link,
    Remove,
    SyncDirectory,
    CreateDirectory,
}

impl DiskCall {
    /// Whether it changes anything: what does not goes on on a full or a read-only file system.
    pub(super) fn changes(self) -> bool {
        self != Self::Read
    }
}

/// Decides what a system call does instead of what it should; it may also not return.
pub(super) type DiskFaults = Arc<dyn Fn(DiskCall, &Path) -> io::Result<()> + Send + Sync>;

/// One node's disk.
#[derive(Clone)]
pub(super) struct Disk {
    inner: Arc<Mutex<Inner>>,
    faults: DiskFaults,
    /// Milliseconds since 1970.
    clock: Arc<dyn Fn() -> i64 + Send + Sync>,
}

#[derive(Clone)]
enum Content {
    File(Vec<u8>),
    Directory,
    Link(PathBuf),
}

#[derive(Clone)]
struct Node {
    content: Content,
    /// What a crash leaves of a file; the content itself for everything else.
    durable: Option<Vec<u8>>,
    mode: u32,
    owner: User,
    /// Milliseconds since 1970.
    modified: i64,
    changed: i64,
}

/// A change of names that is not durable yet: what it was before and is after.
type NameChange = Vec<(PathBuf, Option<Inode>)>;

#[derive(Default)]
struct Inner {
    nodes: Vec<Node>,
    names: BTreeMap<PathBuf, Inode>,
    durable_names: BTreeMap<PathBuf, Inode>,
    pending: Vec<NameChange>,
    locked: Vec<(Inode, Arc<AtomicBool>)>,
}

fn error(kind: ErrorKind) -> io::Error {
    io::Error::from(kind)
}

impl Disk {
    /// An empty disk with these directories.
    pub(super) fn new(
        directories: &[&str],
        faults: DiskFaults,
        clock: impl Fn() -> i64 + Send + Sync + 'static,
    ) -> Self {
        let mut inner = Inner::default();
        for directory in std::iter::once("/").chain(directories.iter().copied()) {
            let inode = inner.add(Content::Directory, 0o755, 0);
            inner.names.insert(directory.into(), inode);
        }
        inner.durable_names = inner.names.clone();
        Self { inner: Arc::new(Mutex::new(inner)), faults, clock: Arc::new(clock) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn before(&self, call: DiskCall, path: &Path) -> io::Result<()> {
        (self.faults)(call, path)
    }

    /// What is left after the power went.
    pub(super) fn crash(&self, random: &mut Random) {
        let mut inner = self.inner();
        let kept = usize::try_from(random.below(inner.pending.len() as u64 + 1)).unwrap_or_default();
        let pending = std::mem::take(&mut inner.pending);
        for (path, inode) in pending.into_iter().take(kept).flatten() {
            set(&mut inner.durable_names, path, inode);
        }
        inner.names = inner.durable_names.clone();
        inner.locked.clear();
        for node in &mut inner.nodes {
            let Content::File(content) = &mut node.content else { continue };
            if node.durable.as_ref() != Some(content) {
                *content = match random.below(4) {
                    0 => content.clone(),
                    1 => content[..usize::try_from(random.below(content.len() as u64)).unwrap_or_default()].to_vec(),
                    2 => vec![0; content.len()],
                    _ => node.durable.clone().unwrap_or_default(),
                };
                node.durable = Some(content.clone());
            }
        }
    }

    /// The process was killed and the machine was not: only the locks are gone.
    pub(super) fn process_ended(&self) {
        self.inner().locked.clear();
    }

    /// What is durable of a file.
    pub(super) fn peek_durable(&self, path: &Path) -> Option<Vec<u8>> {
        let inner = self.inner();
        let inode = *inner.durable_names.get(path)?;
        inner.nodes[inode].durable.clone()
    }

    /// Somebody else writes a file, with no fault and durably.
    pub(super) fn put(&self, path: &Path, content: &[u8]) {
        let now = (self.clock)();
        let mut inner = self.inner();
        let inode = inner.add(Content::File(content.to_vec()), 0o600, now);
        inner.nodes[inode].durable = Some(content.to_vec());
        inner.names.insert(path.to_owned(), inode);
        inner.durable_names.insert(path.to_owned(), inode);
        inner.forget_pending(path);
    }

    /// Somebody else makes a link, with no fault and durably.
    pub(super) fn put_link(&self, path: &Path, target: &Path) {
        let now = (self.clock)();
        let mut inner = self.inner();
        let inode = inner.add(Content::Link(target.to_owned()), 0o777, now);
        inner.names.insert(path.to_owned(), inode);
        inner.durable_names.insert(path.to_owned(), inode);
        inner.forget_pending(path);
    }

    /// Somebody else removes a name.
    pub(super) fn take_away(&self, path: &Path) {
        let mut inner = self.inner();
        inner.names.remove(path);
        inner.durable_names.remove(path);
        inner.forget_pending(path);
    }

    /// The content of a file as everybody sees it now; links are followed.
    pub(super) fn peek(&self, path: &Path) -> Option<Vec<u8>> {
        let inner = self.inner();
        match &inner.nodes[inner.resolve(path, true).ok()?].content {
            Content::File(content) => Some(content.clone()),
            _ => None,
        }
    }

    /// The names below a directory that begin with this.
    pub(super) fn names(&self, directory: &Path, prefix: &str) -> Vec<PathBuf> {
        let inner = self.inner();
        let is_one = |path: &&PathBuf| {
            path.parent() == Some(directory)
                && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        };
        inner.names.keys().filter(is_one).cloned().collect()
    }
}

fn set(names: &mut BTreeMap<PathBuf, Inode>, path: PathBuf, inode: Option<Inode>) {
    match inode {
        Some(inode) => names.insert(path, inode),
        None => names.remove(&path),
    };
}

/// The path without `.` and `..`, whatever is there.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                normal.pop();
            }
            _ => {}
        }
    }
    normal
}

impl Inner {
    fn add(&mut self, content: Content, mode: u32, now: i64) -> Inode {
        let owner = User { uid: rustix::process::geteuid().as_raw(), gid: 0 };
        self.nodes.push(Node { content, durable: None, mode, owner, modified: now, changed: now });
        self.nodes.len() - 1
    }

    /// What stands at a path, with the last link followed or not. Links on the way are not made here.
    fn resolve(&self, path: &Path, follow: bool) -> io::Result<Inode> {
        self.resolve_path(path, follow).map(|(_, inode)| inode)
    }

    fn resolve_path(&self, path: &Path, follow: bool) -> io::Result<(PathBuf, Inode)> {
        let mut path = normal(path);
        for _ in 0..40 {
            let inode = *self.names.get(&path).ok_or_else(|| error(ErrorKind::NotFound))?;
            match &self.nodes[inode].content {
                Content::Link(target) if follow => {
                    path = normal(&path.parent().unwrap_or(Path::new("/")).join(target));
                }
                _ => return Ok((path, inode)),
            }
        }
        Err(io::Error::from_raw_os_error(rustix::io::Errno::LOOP.raw_os_error()))
    }

    fn check_parent(&self, path: &Path) -> io::Result<()> {
        let parent = self.names.get(path.parent().unwrap_or(Path::new("/")));
        match parent.map(|inode| &self.nodes[*inode].content) {
            Some(Content::Directory) => Ok(()),
            Some(_) => Err(error(ErrorKind::NotADirectory)),
            None => Err(error(ErrorKind::NotFound)),
        }
    }

    fn change(&mut self, change: NameChange, now: i64) {
        for (path, inode) in &change {
            if let Some(inode) = inode {
                self.nodes[*inode].changed = now;
            }
            set(&mut self.names, path.clone(), *inode);
        }
        self.pending.push(change);
    }

    fn forget_pending(&mut self, path: &Path) {
        for change in &mut self.pending {
            change.retain(|(changed, _)| changed != path);
        }
    }

    fn metadata(&self, inode: Inode) -> Metadata {
        let node = &self.nodes[inode];
        let (kind, size) = match &node.content {
            Content::File(content) => (FileKind::File, content.len() as u64),
            Content::Directory => (FileKind::Directory, 0),
            Content::Link(_) => (FileKind::Link, 0),
        };
        let time = |at: i64| (at.div_euclid(1000), at.rem_euclid(1000) * 1_000_000);
        Metadata {
            kind,
            mode: node.mode,
            uid: node.owner.uid,
            gid: node.owner.gid,
            size,
            device: 1,
            inode: inode as u64,
            modified: time(node.modified),
            changed: time(node.changed),
        }
    }
}

impl Files for Disk {
    fn read(&self, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
        self.before(DiskCall::Read, path)?;
        let inner = self.inner();
        match &inner.nodes[inner.resolve(path, true)?].content {
            Content::File(content) if content.len() as u64 > limit => Err(error(ErrorKind::FileTooLarge)),
            Content::File(content) => Ok(Zeroizing::new(content.clone())),
            _ => Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file")),
        }
    }

    fn read_no_follow(&self, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
        match self.symlink_metadata(path)?.kind {
            FileKind::Link => Err(io::Error::from_raw_os_error(rustix::io::Errno::LOOP.raw_os_error())),
            _ => self.read(path, limit),
        }
    }

    fn create(&self, path: &Path, mode: u32) -> io::Result<Box<dyn NewFile>> {
        self.before(DiskCall::Create, path)?;
        let now = (self.clock)();
        let mut inner = self.inner();
        let path = normal(path);
        inner.check_parent(&path)?;
        if inner.names.contains_key(&path) {
            return Err(error(ErrorKind::AlreadyExists));
        }
        let inode = inner.add(Content::File(Vec::new()), mode, now);
        inner.change(vec![(path.clone(), Some(inode))], now);
        drop(inner);
        Ok(Box::new(OpenFile { disk: self.clone(), inode, path, lock: None }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before(DiskCall::Rename, to)?;
        let now = (self.clock)();
        let mut inner = self.inner();
        let (from, to) = (normal(from), normal(to));
        let inode = inner.resolve(&from, false)?;
        inner.check_parent(&to)?;
        let in_the_way = inner.names.get(&to).map(|inode| &inner.nodes[*inode].content);
        if matches!(in_the_way, Some(Content::Directory)) {
            return Err(error(ErrorKind::IsADirectory));
        }
        inner.change(vec![(to, Some(inode)), (from, None)], now);
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before(DiskCall::Link, to)?;
        let now = (self.clock)();
        let mut inner = self.inner();
        let inode = inner.resolve(from, false)?;
        let to = normal(to);
        inner.check_parent(&to)?;
        if inner.names.contains_key(&to) {
            return Err(error(ErrorKind::AlreadyExists));
        }
        inner.change(vec![(to, Some(inode))], now);
        Ok(())
    }

    fn symlink(&self, target: &Path, link: &Path) -> io::Result<()> {
        self.before(DiskCall::Link, link)?;
        let now = (self.clock)();
        let mut inner = self.inner();
        let link = normal(link);
        inner.check_parent(&link)?;
        if inner.names.contains_key(&link) {
            return Err(error(ErrorKind::AlreadyExists));
        }
        let inode = inner.add(Content::Link(target.to_owned()), 0o777, now);
        inner.change(vec![(link, Some(inode))], now);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.before(DiskCall::Remove, path)?;
        let now = (self.clock)();
        let mut inner = self.inner();
        let inode = inner.resolve(path, false)?;
        if matches!(inner.nodes[inode].content, Content::Directory) {
            return Err(error(ErrorKind::IsADirectory));
        }
        inner.change(vec![(normal(path), None)], now);
        Ok(())
    }

    fn create_directories(&self, path: &Path, mode: u32) -> io::Result<()> {
        let path = normal(path);
        for directory in path.ancestors().collect::<Vec<_>>().into_iter().rev() {
            let there = self.inner().names.contains_key(directory);
            if there {
                continue;
            }
            self.before(DiskCall::CreateDirectory, directory)?;
            let now = (self.clock)();
            let mut inner = self.inner();
            let inode = inner.add(Content::Directory, mode, now);
            inner.change(vec![(directory.to_owned(), Some(inode))], now);
        }
        Ok(())
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.before(DiskCall::SyncDirectory, path)?;
        let mut inner = self.inner();
        let directory = inner.resolve_path(path, true)?.0;
        let pending = std::mem::take(&mut inner.pending);
        for change in pending {
            let (synced, rest): (NameChange, NameChange) =
                change.into_iter().partition(|(path, _)| path.parent() == Some(directory.as_path()));
            for (path, inode) in synced {
                set(&mut inner.durable_names, path, inode);
            }
            if !rest.is_empty() {
                inner.pending.push(rest);
            }
        }
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        self.before(DiskCall::Read, directory)?;
        let inner = self.inner();
        let (directory, inode) = inner.resolve_path(directory, true)?;
        if !matches!(inner.nodes[inode].content, Content::Directory) {
            return Err(error(ErrorKind::NotADirectory));
        }
        let below = inner.names.keys().filter(|path| path.parent() == Some(directory.as_path()));
        Ok(below.filter_map(|path| path.file_name().map(ToOwned::to_owned)).collect())
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let inner = self.inner();
        inner.resolve(path, true).map(|inode| inner.metadata(inode))
    }

    fn symlink_metadata(&self, path: &Path) -> io::Result<Metadata> {
        let inner = self.inner();
        inner.resolve(path, false).map(|inode| inner.metadata(inode))
    }

    fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        let inner = self.inner();
        match &inner.nodes[inner.resolve(path, false)?].content {
            Content::Link(target) => Ok(target.clone()),
            _ => Err(error(ErrorKind::InvalidInput)),
        }
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.inner().resolve_path(path, true).map(|(path, _)| path)
    }

    fn timestamp(&self) -> String {
        format!("{:019}", (self.clock)())
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<FileLock>> {
        let mut inner = self.inner();
        let inode = inner.resolve(path, false)?;
        inner.locked.retain(|(_, held)| held.load(Ordering::Relaxed));
        if inner.locked.iter().any(|(locked, _)| *locked == inode) {
            return Ok(None);
        }
        let held = Arc::new(AtomicBool::new(true));
        inner.locked.push((inode, Arc::clone(&held)));
        Ok(Some(FileLock::new(inode as u64, Held(held))))
    }
}

/// Unlocks when it is dropped.
struct Held(Arc<AtomicBool>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A file that is being written.
struct OpenFile {
    disk: Disk,
    inode: Inode,
    path: PathBuf,
    lock: Option<Held>,
}

impl NewFile for OpenFile {
    fn write(&mut self, content: &[u8]) -> io::Result<()> {
        let fault = self.disk.before(DiskCall::Write, &self.path);
        let now = (self.disk.clock)();
        let mut inner = self.disk.inner();
        let node = &mut inner.nodes[self.inode];
        (node.modified, node.changed) = (now, now);
        let Content::File(written) = &mut node.content else { return Err(error(ErrorKind::Other)) };
        // A disk that fills up takes what there is room for.
        written.extend_from_slice(if fault.is_ok() { content } else { &content[..content.len() / 2] });
        fault
    }

    fn set_mode(&mut self, mode: u32) -> io::Result<()> {
        self.disk.before(DiskCall::SetMode, &self.path)?;
        self.disk.inner().nodes[self.inode].mode = mode;
        Ok(())
    }

    fn set_owner(&mut self, owner: User) -> io::Result<()> {
        self.disk.before(DiskCall::SetMode, &self.path)?;
        self.disk.inner().nodes[self.inode].owner = owner;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.before(DiskCall::Sync, &self.path)?;
        let mut inner = self.disk.inner();
        let node = &mut inner.nodes[self.inode];
        if let Content::File(content) = &node.content {
            node.durable = Some(content.clone());
        }
        Ok(())
    }

    fn lock(&mut self) -> io::Result<bool> {
        let held = Arc::new(AtomicBool::new(true));
        let mut inner = self.disk.inner();
        inner.locked.push((self.inode, Arc::clone(&held)));
        self.lock = Some(Held(held));
        let inode = self.inode;
        Ok(inner.names.values().any(|named| *named == inode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::durable;

    fn disk() -> Disk {
        Disk::new(&["/state"], Arc::new(|_, _| Ok(())), || 0)
    }

    /// What durable.rs promises, for each crash of a hundred.
    #[test]
    fn what_was_replaced_durably_is_there_after_a_crash_and_nothing_is_torn() {
        let path = Path::new("/state/journal");
        let (mut torn, mut random) = (false, Random::new(1));
        for seed in 0..100 {
            let disk = disk();
            durable::replace(&disk, path, b"old content", 0o600).expect("written");
            // Written as nobody should.
            let mut careless = disk.create(Path::new("/state/careless"), 0o600).expect("created");
            careless.write(b"careless").expect("written");
            disk.crash(&mut Random::new(seed));
            assert_eq!(disk.peek(path).expect("there"), b"old content");
            torn |= disk.peek(Path::new("/state/careless")).is_some_and(|content| content != b"careless");
            durable::replace(&disk, path, b"new", 0o600).expect("written");
            disk.crash(&mut random);
            assert_eq!(disk.peek(path).expect("there"), b"new");
        }
        assert!(torn, "a file that was not synced is torn now and then");
    }
}
