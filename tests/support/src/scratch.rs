//! A directory that is removed after the test, even if the test process is killed.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A temporary directory with a cleanup process.
///
/// The cleanup process is a child that removes the directory when its standard input closes: on drop, or when the
/// test process exits without dropping the value (a `static`, a signal).
#[derive(Debug)]
pub struct ScratchDirectory {
    path: PathBuf,
    cleanup: Child,
}

/// Retries for a while: processes that are being killed with the test may still write.
const CLEANUP: &str = r#"read -r _; for i in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$0" && exit; sleep 0.2; done"#;

impl ScratchDirectory {
    /// Creates a directory with mode 0700 in the system's temporary directory.
    #[must_use]
    pub fn new() -> Self {
        let path = tempfile::Builder::new()
            .prefix("pintle-test-")
            .tempdir()
            .expect("the temporary directory is writable")
            .keep();
        let cleanup = Command::new("/bin/sh")
            .args(["-c", CLEANUP])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0) // Ctrl-C must not stop the cleanup
            .spawn()
            .expect("/bin/sh starts");
        Self { path, cleanup }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of `name` in the directory.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file, mode 0600, and returns its path.
    #[must_use]
    pub fn write(&self, name: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        write_private(&path, contents.as_ref());
        path
    }
}

impl Default for ScratchDirectory {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        drop(self.cleanup.stdin.take());
        let _ = self.cleanup.wait();
    }
}

/// Writes `path` with mode 0600, replacing an existing file.
pub(crate) fn write_private(path: &Path, contents: &[u8]) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(contents))
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{ProcessCommand, eventually};

    /// Set in the process that will be killed.
    const VICTIM: &str = "PINTLE_TEST_VICTIM";

    #[test]
    fn a_killed_test_process_leaves_neither_files_nor_processes() {
        if let Some(report) = std::env::var_os(VICTIM) {
            let scratch = ScratchDirectory::new();
            let sleeper = ProcessCommand::new("/bin/sleep", scratch.join("output")).argument("1000").start();
            let contents = format!("{} {}", sleeper.id(), scratch.path().display());
            std::fs::write(Path::new(&report).with_extension("next"), contents).expect("the report is written");
            std::fs::rename(Path::new(&report).with_extension("next"), report).expect("the report is written");
            std::thread::sleep(Duration::from_secs(1000));
        }
        let (scratch, deadline) = (ScratchDirectory::new(), Duration::from_secs(20));
        let report = scratch.join("report");
        let mut victim = Command::new(std::env::current_exe().expect("a test binary has a path"))
            .args(["--exact", "scratch::tests::a_killed_test_process_leaves_neither_files_nor_processes"])
            .env(VICTIM, &report)
            .stdout(Stdio::null())
            .spawn()
            .expect("the test binary starts");
        let report = eventually("the victim reports", deadline, || std::fs::read_to_string(&report).ok());
        victim.kill().expect("the victim can be killed");
        victim.wait().expect("the victim can be waited for");
        let (sleeper, directory) = report.split_once(' ').expect("two words");
        let command_line = format!("/proc/{sleeper}/cmdline");
        eventually("the victim's process is gone", deadline, || {
            // A zombie has an empty command line.
            std::fs::read(&command_line).map_or(true, |line| line.is_empty()).then_some(())
        });
        eventually("the victim's directory is gone", deadline, || (!Path::new(directory).exists()).then_some(()));
    }

    #[test]
    fn the_directory_is_removed_on_drop() {
        let scratch = ScratchDirectory::new();
        let file = scratch.write("file", "contents");
        assert!(file.exists());
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
    }
}
