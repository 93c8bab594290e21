//! A wall clock for a single process, which can be changed without affecting the machine.

use std::path::{Path, PathBuf};

use crate::ScratchDirectory;
use crate::process::ProcessCommand;

/// An offset to the machine's wall clock, read by libfaketime whenever the process reads the clock.
///
/// As when an administrator sets the clock, the monotonic clock does not change. A timer on the wall clock (timerfd
/// with TFD_TIMER_CANCEL_ON_SET) is in the kernel and does not notice: a process notices only when it reads the
/// clock.
#[derive(Debug)]
pub struct MovableClock {
    file: PathBuf,
    library: PathBuf,
}

impl MovableClock {
    /// A clock without an offset. Its file is in `scratch`.
    #[must_use]
    pub fn new(scratch: &ScratchDirectory) -> Self {
        let file = scratch.write("clock", "+0\n");
        Self { file, library: library() }
    }

    /// Sets the offset to `seconds`, which may be negative, for running processes too.
    pub fn set_offset(&self, seconds: i64) {
        // By rename: a reader must never see an incomplete number.
        let next = self.file.with_extension("next");
        std::fs::write(&next, format!("{seconds:+}\n"))
            .and_then(|()| std::fs::rename(&next, &self.file))
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", self.file.display()));
    }

    /// Makes the process that `command` starts use this clock.
    #[must_use]
    pub fn apply_to(&self, command: ProcessCommand) -> ProcessCommand {
        command
            .environment("LD_PRELOAD", &self.library)
            .environment("FAKETIME_TIMESTAMP_FILE", &self.file)
            .environment("FAKETIME_NO_CACHE", "1")
            .environment("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    }
}

/// The libfaketime for multi-threaded processes.
fn library() -> PathBuf {
    let name = Path::new("faketime/libfaketimeMT.so.1");
    let architecture = std::env::consts::ARCH;
    [format!("/usr/lib/{architecture}-linux-gnu"), "/usr/lib64".into(), "/usr/lib".into()]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|library| library.exists())
        .unwrap_or_else(|| panic!("{} is not installed: run ./tests/run, or apt-get install faketime", name.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_the_process_sees_the_clock_change() {
        let scratch = ScratchDirectory::new();
        let clock = MovableClock::new(&scratch);
        let script = "while :; do date +%Y; sleep 0.1; done";
        let shell = ProcessCommand::new("/bin/sh", scratch.join("output")).arguments(["-c", script]);
        let process = clock.apply_to(shell).start();
        let years = || process.output().lines().filter_map(|line| line.parse::<i32>().ok()).collect::<Vec<_>>();
        let first = crate::eventually("a year is printed", Duration::from_secs(10), || years().first().copied());
        clock.set_offset(20 * 365 * 24 * 3600);
        crate::eventually("the clock moves", Duration::from_secs(10), || {
            (*years().last()? >= first + 19).then_some(())
        });
    }
}
