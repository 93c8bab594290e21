//! A directory that is gone after the test, even when the test process is killed.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A temporary directory with a sweeper beside it.
///
/// The sweeper is a child that removes the directory as soon as its standard input closes: on drop, or when the kernel
/// closes it because the test process ended without dropping anything (a value in a `static`, a signal).
#[derive(Debug)]
pub struct ScratchDirectory {
    path: PathBuf,
    sweeper: Child,
}

/// Tries for a while: processes that die with the test may still be writing.
const SWEEP: &str = r#"read -r _; for i in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$0" && exit; sleep 0.2; done"#;

impl ScratchDirectory {
    /// Makes a new directory, mode 0700, below the system's temporary directory.
    #[must_use]
    pub fn new() -> Self {
        let path = tempfile::Builder::new()
            .prefix("pintle-test-")
            .tempdir()
            .expect("the temporary directory is writable")
            .keep();
        let sweeper = Command::new("/bin/sh")
            .args(["-c", SWEEP])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0) // an interrupt from the terminal must not stop the sweeping
            .spawn()
            .expect("/bin/sh starts");
        Self { path, sweeper }
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
        drop(self.sweeper.stdin.take());
        let _ = self.sweeper.wait();
    }
}

/// Writes `path` with mode 0600, over what is there.
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

    /// Set in the process that is to be killed.
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
    fn the_directory_is_gone_after_the_drop() {
        let scratch = ScratchDirectory::new();
        let file = scratch.write("file", "contents");
        assert!(file.exists());
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
    }
}
