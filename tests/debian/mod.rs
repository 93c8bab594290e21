//! A clean Debian for installing packages: no libtss2, no PKCS#11 module, nothing from this machine.

#![allow(dead_code, reason = "each test file uses a part of this room")]

pub(crate) mod kubeadm;
pub(crate) mod machine;
mod network;
pub(crate) mod packages;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pintle_test_support::ScratchDirectory;

/// Longer than anything here takes on a busy machine; turns a hang into a failure.
const PATIENCE_SECONDS: &str = "180";

/// A file's mode, owner, group, modification time, and content (of a link, its target).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct File(u32, u32, u32, i64, Vec<u8>);

impl File {
    /// The content of the file, or the target of the link.
    pub(crate) fn content(&self) -> &[u8] {
        &self.4
    }
}

/// A Debian in a directory, which is removed after the test.
pub(crate) struct Debian {
    scratch: ScratchDirectory,
}

impl Debian {
    /// Unpacks the archive created by `./tests/run`.
    pub(crate) fn new() -> Self {
        let archive = std::env::var_os("PINTLE_TEST_DEBIAN").expect("./tests/run sets PINTLE_TEST_DEBIAN");
        let scratch = ScratchDirectory::new();
        succeed(Command::new("tar").arg("-C").arg(scratch.path()).arg("-xf").arg(archive));
        Self { scratch }
    }

    /// The path on this machine of `path` in the Debian.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.scratch.path().join(path.trim_start_matches('/'))
    }

    /// Its root directory on this machine.
    fn root(&self) -> &Path {
        self.scratch.path()
    }

    /// Runs a command in it, in a new mount namespace.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", PATIENCE_SECONDS, "unshare", "--mount", "--propagation", "private", "sh", "-c"])
            .arg(r#"mount -t proc proc "$0/proc" && exec chroot "$0" "$@""#)
            .arg(self.scratch.path())
            .args(words)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("HOME", "/root");
        command
    }

    /// Runs a command that must succeed, and returns its output.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> String {
        succeed(&mut self.command(words))
    }

    /// Copies a file of this machine to a path in it.
    pub(crate) fn put(&self, file: &Path, path: &str) {
        std::fs::copy(file, self.path(path)).expect("the file can be copied");
    }

    /// Writes a file in it, creating missing directories.
    pub(crate) fn write(&self, path: &str, mode: u32, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("a file is in a directory")).expect("the directory is made");
        std::fs::write(&path, content).expect("the file is written");
        std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("its mode is set");
    }

    /// All files below these directories.
    pub(crate) fn files(&self, directories: &[&str]) -> BTreeMap<PathBuf, File> {
        let mut files = BTreeMap::new();
        let mut left: Vec<PathBuf> = directories.iter().map(|directory| self.path(directory)).collect();
        while let Some(path) = left.pop() {
            let metadata = path.symlink_metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let content = if metadata.is_dir() {
                left.extend(std::fs::read_dir(&path).expect("readable").map(|entry| entry.expect("readable").path()));
                Vec::new()
            } else if metadata.is_symlink() {
                std::fs::read_link(&path).expect("readable").into_os_string().into_encoded_bytes()
            } else {
                std::fs::read(&path).expect("readable")
            };
            let file = File(metadata.mode(), metadata.uid(), metadata.gid(), metadata.mtime(), content);
            files.insert(path, file);
        }
        files
    }
}

/// Runs a command that must succeed, and returns its output, standard error last.
#[track_caller]
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{command:?} ended with {}\n{}", output.status, text(&output));
    text(&output)
}

/// Runs a command, and returns its result.
pub(crate) fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// A command's output, standard error last.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
