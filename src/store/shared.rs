//! Files that others keep and read too: replaced where they are, and left as open or closed as they were.

use std::io;
use std::path::{Path, PathBuf};

use super::durable;
use crate::world::files::FileKind;
use crate::world::{Files, User};

/// As many as the kernel follows (path_resolution(7)).
const LINKS: usize = 40;

/// Replaces the content of `path`, or of what it is a link to. Mode, owner and group stay; a new file has mode 0600. With
/// `owner`, the file is that user's afterwards, and nobody else's if it was somebody else's before.
///
/// # Errors
/// Whatever the file system says, and if a link is somebody else's; the file is then as it was.
pub fn replace(files: &dyn Files, path: &Path, content: &[u8], owner: Option<User>) -> io::Result<()> {
    let target = target_of(files, path)?;
    files.create_directories(durable::directory_of(&target), 0o755)?;
    let (mode, owner) = match (files.metadata(&target), owner) {
        (Ok(there), wanted) if wanted.is_none_or(|wanted| wanted.uid == there.uid) => {
            (there.mode, Some(User { uid: there.uid, gid: there.gid }))
        }
        (_, wanted) => (0o600, wanted),
    };
    durable::replace_for(files, &target, content, mode, owner)
}

/// What `path` is a link to in the end, whether or not that exists; `path` itself if it is no link.
///
/// # Errors
/// If a link is somebody else's: he would choose which file is written. If there is no end to them.
pub fn target_of(files: &dyn Files, path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let Ok(found) = files.symlink_metadata(&path) else { return Ok(path) };
        if found.kind != FileKind::Link {
            return Ok(path);
        }
        if found.uid != rustix::process::geteuid().as_raw() {
            let detail = format!("{} is a symbolic link of user {}", path.display(), found.uid);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, detail));
        }
        path = durable::directory_of(&path).join(files.read_link(&path)?);
    }
    Err(io::Error::other(format!("the symbolic links at {} have no end", path.display())))
}

/// Whether both paths lead to one file, or would if it existed.
pub fn is_same(files: &dyn Files, one: &Path, other: &Path) -> bool {
    let identity = |path| files.metadata(path).map(|found| (found.device, found.inode)).ok();
    match (identity(one), identity(other)) {
        (Some(one), Some(other)) => one == other,
        (None, None) => resolved(files, one) == resolved(files, other),
        _ => false,
    }
}

/// The path with the links and `..` in it resolved, as far as it exists.
fn resolved(files: &dyn Files, path: &Path) -> PathBuf {
    let path = target_of(files, path).unwrap_or_else(|_| path.to_owned());
    match (files.canonicalize(&path), path.parent(), path.file_name()) {
        (Ok(found), ..) => found,
        (Err(_), Some(parent), Some(name)) => resolved(files, parent).join(name),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};

    use super::*;
    use crate::world::SystemFiles;

    fn access(path: &Path) -> (u32, u32, u32) {
        let found = fs::symlink_metadata(path).expect("there");
        (found.mode() & 0o777, found.uid(), found.gid())
    }

    #[test]
    fn a_file_stays_as_open_as_it_was_and_a_link_stays_a_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        symlink("real", &link).expect("linked");
        replace(&SystemFiles, &link, b"new", None).expect("written where the link leads");
        assert_eq!(access(&real).0, 0o600);
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).expect("ours");
        if !rustix::process::geteuid().is_root() {
            return; // Only root can give files away.
        }
        chown(&real, None, Some(65534)).expect("as root");
        replace(&SystemFiles, &link, b"one", None).expect("written");
        assert_eq!((fs::read(&real).expect("readable"), access(&real)), (b"one".to_vec(), (0o640, 0, 65534)));
        replace(&SystemFiles, &link, b"two", Some(User { uid: 0, gid: 0 })).expect("written");
        assert_eq!(access(&real), (0o640, 0, 65534), "it is root's already");
        replace(&SystemFiles, &link, b"three", Some(User { uid: 65534, gid: 7 })).expect("written");
        assert_eq!((fs::read(&link).expect("readable"), access(&real)), (b"three".to_vec(), (0o600, 65534, 7)));
        assert!(fs::symlink_metadata(&link).expect("there").is_symlink());

        // Its owner would have root write what root alone may.
        lchown(&link, Some(65534), None).expect("as root");
        assert!(replace(&SystemFiles, &link, b"four", None).is_err());
        assert_eq!(fs::read(&real).expect("readable"), b"three");
    }

    #[test]
    fn one_file_has_many_names() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("real")).expect("made");
        symlink("real", path("link")).expect("linked");
        symlink("missing", path("real/dangling")).expect("linked");
        symlink("round", path("round")).expect("linked");
        let (one, other) = (path("link/config"), path("link/../real/config"));
        assert!(is_same(&SystemFiles, &one, &other), "before it exists");
        fs::write(&one, "").expect("written");
        fs::hard_link(&one, path("hard")).expect("linked");
        assert!(is_same(&SystemFiles, &one, &other) && is_same(&SystemFiles, &one, &path("hard")));
        assert!(is_same(&SystemFiles, &path("link/dangling"), &path("real/missing")));
        assert!(
            !is_same(&SystemFiles, &one, &path("link/missing"))
                && !is_same(&SystemFiles, &path("missing"), &path("round"))
        );
    }
}
