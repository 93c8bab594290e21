//! The PIN's file: where it is, whether it is to be trusted, and in which state it is.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pintle_plugins_api::{BackendError, BackendErrorKind};
use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use crate::misconfigured;

/// The longest PIN file that is read, in bytes. Tokens take far shorter PINs.
const MAXIMUM_LENGTH: usize = 1024;

/// Where the PIN is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PinSource {
    /// Nowhere: the token has a keypad, or wants no login.
    None,
    /// In a file that only its owner may read.
    File(PathBuf),
    /// In a file of `$CREDENTIALS_DIRECTORY` (systemd.exec(5), "Credentials"), which only this service may enter.
    Credential(PathBuf),
}

/// The state of a PIN's file. Writing to it, replacing it or touching it changes that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    changed: (i64, i64),
}

impl PinSource {
    /// The file at `path`, or the one of this name in `credentials_directory` if `path` is relative.
    pub(crate) fn new(path: Option<PathBuf>, credentials_directory: Option<PathBuf>) -> Result<Self, BackendError> {
        match path {
            None => Ok(Self::None),
            Some(path) if path.is_absolute() => Ok(Self::File(path)),
            Some(name) if name.components().count() != 1 || name.starts_with("..") => {
                Err(misconfigured(format!("the PIN's file {} is neither absolute nor a mere name", name.display())))
            }
            Some(name) => match credentials_directory {
                Some(directory) if directory.is_absolute() => Ok(Self::Credential(directory.join(name))),
                _ => Err(misconfigured(format!(
                    "the PIN's file {} is a credential's name and there is no $CREDENTIALS_DIRECTORY",
                    name.display()
                ))
                .with_hint("add LoadCredential= to the service, or give an absolute path")),
            },
        }
    }

    /// The file, if there is one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::None => None,
            Self::File(path) | Self::Credential(path) => Some(path),
        }
    }

    /// The state of the file, if there is one that can be seen.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        let metadata = std::fs::symlink_metadata(self.path()?).ok()?;
        Some(Stamp { inode: metadata.ino(), changed: (metadata.ctime(), metadata.ctime_nsec()) })
    }

    /// What to do about a PIN that the token refused: each part of it changes the state of the file.
    pub(crate) fn retry_hint(&self) -> String {
        match self {
            Self::None => "log in once by hand (pkcs11-tool --login --list-objects), then restart pintle".to_owned(),
            Self::File(path) => {
                let path = path.display();
                format!("put the right PIN into {path}; if the token was changed instead, touch {path}")
            }
            Self::Credential(_) => "put the right PIN where the unit's LoadCredential= takes it from, and restart the \
                                    unit; if the token was changed instead, restart the unit"
                .to_owned(),
        }
    }

    /// The same about a token that must be changed in this way first, whatever the PIN is.
    pub(crate) fn hint_after(&self, change: &str) -> String {
        match self {
            Self::None => change.to_owned(),
            Self::File(path) => format!("{change}, then touch {}", path.display()),
            Self::Credential(_) => format!("{change}, then restart the unit"),
        }
    }

    /// The PIN, without the newline that editors put at its end; `None` if there is none.
    ///
    /// # Errors
    /// `Locked` if the file is missing, or readable by others, or not this user's.
    pub(crate) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, BackendError> {
        match self {
            Self::None => Ok(None),
            // Only its owner: 0400 or 0600.
            Self::File(path) => read_pin(path, 0o177).map(Some),
            // systemd grants access by ACL, which shows as a readable group.
            Self::Credential(path) => read_pin(path, 0o137).map(Some),
        }
    }
}

/// Where systemd puts this service's credentials.
pub(crate) fn credentials_directory() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// Opens a PIN's file, and nothing that a link there leads to.
pub(crate) fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    // NONBLOCK: a FIFO put there instead must not stop the agent.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    rustix::fs::open(path, flags, Mode::empty())
}

fn read_pin(path: &Path, forbidden: u32) -> Result<Zeroizing<Vec<u8>>, BackendError> {
    let locked =
        |what: String| BackendError::new(BackendErrorKind::Locked, format!("the PIN's file {} {what}", path.display()));
    // The process that holds the module may have another user than the agent.
    let user = rustix::process::geteuid().as_raw();
    let hint =
        format!("write the PIN to {} with mode 0400, owned by user {user}, which runs the module", path.display());
    let descriptor = open(path).map_err(|error| match error {
        rustix::io::Errno::LOOP => locked("is a symbolic link".into()).with_hint(hint.clone()),
        error => locked(format!("cannot be opened: {error}")).with_hint(hint.clone()),
    })?;
    let file = File::from(descriptor);
    let metadata = file.metadata().map_err(|error| locked(format!("cannot be examined: {error}")))?;
    if !metadata.is_file() {
        return Err(locked("is not a regular file".into()).with_hint(hint));
    }
    if metadata.uid() != 0 && metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(locked(format!("belongs to user {}", metadata.uid())).with_hint(hint));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & forbidden != 0 {
        return Err(locked(format!("has mode {mode:04o}, so others may read or change it")).with_hint(hint));
    }
    // The whole capacity at once: growing would leave copies behind.
    let mut pin = Zeroizing::new(Vec::with_capacity(MAXIMUM_LENGTH + 1));
    file.take(MAXIMUM_LENGTH as u64 + 1)
        .read_to_end(&mut pin)
        .map_err(|error| locked(format!("cannot be read: {error}")).with_hint(hint.clone()))?;
    if pin.len() > MAXIMUM_LENGTH {
        return Err(locked(format!("is longer than {MAXIMUM_LENGTH} bytes")).with_hint(hint));
    }
    if pin.ends_with(b"\n") {
        pin.pop();
    }
    if pin.is_empty() {
        return Err(locked("is empty".into()).with_hint(hint));
    }
    Ok(pin)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn file(content: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode set");
        (directory, path)
    }

    fn read(path: &Path) -> Result<String, BackendError> {
        let pin = PinSource::new(Some(path.into()), None)?.read()?.expect("a PIN");
        Ok(String::from_utf8(pin.to_vec()).expect("UTF-8"))
    }

    #[test]
    fn one_newline_at_the_end_is_not_part_of_the_pin() {
        for (content, pin) in [("1234\n", "1234"), ("1234", "1234"), ("12\n34\n\n", "12\n34\n"), (" 1 ", " 1 ")] {
            let (_directory, path) = file(content, 0o400);
            assert_eq!(read(&path).as_deref(), Ok(pin));
        }
    }

    #[test]
    fn a_file_that_others_can_read_or_replace_is_refused() {
        let (_directory, path) = file("1234", 0o644);
        let user = rustix::process::geteuid().as_raw();
        let hint = read(&path).expect_err("refused").hint.expect("a hint");
        assert!(hint.contains(&format!("owned by user {user},")), "{hint}");
        for mode in [0o440, 0o644, 0o602, 0o700, 0o4400] {
            let (_directory, path) = file("1234", mode);
            let outcome = read(&path);
            if mode == 0o4400 {
                // Neither readable nor writable by others: the bit means nothing here.
                assert!(outcome.is_ok());
                continue;
            }
            let error = outcome.expect_err("refused");
            assert_eq!(error.kind, BackendErrorKind::Locked, "{mode:o}");
            assert!(error.detail.contains("mode"), "{error}");
        }
        let (directory, path) = file("1234", 0o400);
        let link = directory.path().join("link");
        symlink(&path, &link).expect("linked");
        assert!(read(&link).expect_err("refused").detail.contains("symbolic link"));
        assert!(read(directory.path()).is_err());
        assert!(read(&directory.path().join("absent")).expect_err("refused").hint.is_some());
    }

    #[test]
    fn an_empty_or_endless_file_is_no_pin() {
        for content in ["", "\n", &"1".repeat(2000)] {
            let (_directory, path) = file(content, 0o400);
            assert_eq!(read(&path).expect_err("refused").kind, BackendErrorKind::Locked);
        }
    }

    #[test]
    fn a_relative_path_is_a_name_in_the_credentials_directory() {
        let (directory, path) = file("1234\n", 0o440);
        let source = PinSource::new(Some("pin".into()), Some(directory.path().into())).expect("valid");
        assert_eq!(source, PinSource::Credential(path));
        assert_eq!(source.read().expect("read").expect("a PIN").as_slice(), b"1234");
        assert!(PinSource::new(Some("pin".into()), None).is_err());
        assert!(PinSource::new(Some("../pin".into()), Some(directory.path().into())).is_err());
        assert!(PinSource::new(Some("..".into()), Some(directory.path().into())).is_err());
    }
}
