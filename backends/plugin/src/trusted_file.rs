//! Opens a shared object that nobody but its owner can have changed, or can change while it is being loaded.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use pintle_plugins_api::{BackendError, BackendErrorKind};
use rustix::fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat};
use rustix::io::Errno;

/// Where plugins are, and whose files are loaded.
///
/// A plugin runs with the privileges of the process that loads it, so whoever can write to it, or to any directory on
/// the way to it, has these privileges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Where a plugin is that is named by its bare name. Absolute.
    pub directory: PathBuf,
    /// The user, beside root, who may own the plugin and the directories on its path.
    pub owner: u32,
}

impl Default for Trust {
    /// The directory of installed plugins, and files of root only.
    fn default() -> Self {
        Self { directory: PathBuf::from("/usr/lib/pintle/plugins"), owner: 0 }
    }
}

impl Trust {
    /// Whether the plugin of this name would be loaded, as far as its file goes.
    ///
    /// # Errors
    /// Why it would not be: those of [`PluginBackend::open_with`](crate::PluginBackend::open_with) that are about the file.
    pub fn check(&self, name: &str) -> Result<(), BackendError> {
        self.open(&self.locate(name)?).map(drop)
    }

    /// Where the plugin is: `name` if it is an absolute path, else `lib<name>.so` or `<name>` in the directory.
    ///
    /// # Errors
    /// `Unsupported` if it is neither a bare name nor an absolute path.
    pub(crate) fn locate(&self, name: &str) -> Result<PathBuf, BackendError> {
        let path = Path::new(name);
        if path.is_absolute() {
            return Ok(path.to_owned());
        }
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(BackendError::new(BackendErrorKind::Unsupported, format!("{name:?} names no plugin"))
                .with_hint(format!(
                    "give the bare name of a file in {}, or an absolute path",
                    self.directory.display()
                )));
        }
        let file = if name.ends_with(".so") { name.to_owned() } else { format!("lib{name}.so") };
        Ok(self.directory.join(file))
    }

    /// Opens the file, walking down from the root without following a link, so that what was checked is what is
    /// opened.
    ///
    /// # Errors
    /// `Unavailable` if there is no such file (it may yet be installed), `Corrupt` if somebody else could have
    /// written it.
    pub(crate) fn open(&self, path: &Path) -> Result<OwnedFd, BackendError> {
        let mut walked = PathBuf::from("/");
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at = openat(CWD, &walked, directory, Mode::empty()).map_err(|errno| unopened(&walked, errno))?;
        self.check_file(&walked, FileType::Directory, &at)?;

        let mut components = path.components().peekable();
        components.next();
        while let Some(component) = components.next() {
            let Component::Normal(name) = component else {
                return Err(refused(path, "its path contains \"..\""));
            };
            walked.push(name);
            let (kind, flags) = if components.peek().is_some() {
                (FileType::Directory, directory)
            } else {
                // Without NONBLOCK the opening of a named pipe would wait for a writer.
                (FileType::RegularFile, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK)
            };
            at = openat(&at, name, flags, Mode::empty()).map_err(|errno| unopened(&walked, errno))?;
            self.check_file(&walked, kind, &at)?;
        }
        Ok(at)
    }

    fn check_file(&self, path: &Path, kind: FileType, descriptor: &OwnedFd) -> Result<Stat, BackendError> {
        let status = fstat(descriptor).map_err(|errno| unopened(path, errno))?;
        if FileType::from_raw_mode(status.st_mode) != kind {
            return Err(refused(path, "it is not a regular file"));
        }
        if status.st_uid != 0 && status.st_uid != self.owner {
            return Err(refused(path, &format!("it belongs to user {}", status.st_uid))
                .with_hint(format!("chown root {}", path.display())));
        }
        if Mode::from_raw_mode(status.st_mode).intersects(Mode::WGRP | Mode::WOTH) {
            return Err(refused(path, "others than its owner can write to it")
                // A directory that is everybody's, such as /tmp, must stay so.
                .with_hint(if kind == FileType::Directory && status.st_mode & 0o1000 != 0 {
                    format!("install the plugin where only root can write, not in {}", path.display())
                } else {
                    format!("chmod go-w {}", path.display())
                }));
        }
        Ok(status)
    }
}

fn refused(path: &Path, why: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Corrupt, format!("plugin not loaded, {} is not trusted: {why}", path.display()))
}

fn unopened(path: &Path, errno: Errno) -> BackendError {
    match errno {
        // With O_NOFOLLOW a link is ELOOP, with O_DIRECTORY as well it is ENOTDIR.
        Errno::LOOP | Errno::NOTDIR => refused(path, "it is a symbolic link, or not a directory")
            .with_hint("name the plugin by its real path, see realpath(1)"),
        Errno::NOENT => {
            BackendError::new(BackendErrorKind::Unavailable, format!("there is no plugin {}", path.display()))
                .with_hint("install the package that holds the plugin")
        }
        _ => BackendError::new(BackendErrorKind::Unavailable, format!("cannot open {}: {errno}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_names_are_files_of_the_directory_and_nothing_else() {
        let trust = Trust::default();
        assert_eq!(trust.locate("pintle_tpm"), Ok("/usr/lib/pintle/plugins/libpintle_tpm.so".into()));
        assert_eq!(trust.locate("vendor.so"), Ok("/usr/lib/pintle/plugins/vendor.so".into()));
        assert_eq!(trust.locate("/opt/vendor.so"), Ok("/opt/vendor.so".into()));
        for name in ["", "..", "../etc/x", "a/b", "./x", "a\0b"] {
            assert_eq!(trust.locate(name).map_err(|error| error.kind), Err(BackendErrorKind::Unsupported), "{name:?}");
        }
    }

    #[test]
    fn a_path_through_a_link_or_upwards_is_refused() {
        let trust = Trust::default();
        for path in ["/proc/self/exe", "/usr/../usr/lib/x.so"] {
            assert_eq!(
                trust.open(Path::new(path)).map_err(|error| error.kind).err(),
                Some(BackendErrorKind::Corrupt),
                "{path}"
            );
        }
        let everybodys = trust.open(Path::new("/tmp/x.so")).expect_err("everybody can write there");
        assert_eq!(everybodys.hint.as_deref(), Some("install the plugin where only root can write, not in /tmp"));
        let absent = trust.open(Path::new("/nothing-here.so")).expect_err("there is no such file");
        assert_eq!(absent.kind, BackendErrorKind::Unavailable);
    }
}
