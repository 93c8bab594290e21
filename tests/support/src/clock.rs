//! The wall clock of one process, moved without touching the machine's.

use std::path::{Path, PathBuf};

use crate::ScratchDirectory;
use crate::process::ProcessCommand;

/// An offset from the machine's wall clock, read by libfaketime at each look at the clock.
///
/// The monotonic clock stays true, as it does when an administrator sets the clock. A timer on the wall clock (timerfd
/// with TFD_TIMER_CANCEL_ON_SET) is the kernel's and does not notice: only looking at the clock does.
#[derive(Debug)]
pub struct MovableClock {
    file: PathBuf,
    library: PathBuf,
}

impl MovableClock {
    /// A clock that shows the true time until it is moved. Its file is in `scratch`.
    #[must_use]
    pub fn new(scratch: &ScratchDirectory) -> Self {
        let file = scratch.write("clock", "+0\n");
        Self { file, library: library() }
    }

    /// Shows the true time plus `seconds` (or minus) from now on, also to processes that already run.
    pub fn set_offset(&self, seconds: i64) {
        // By rename: a reader must never see half a number.
        let next = self.file.with_extension("next");
        std::fs::write(&next, format!("{seconds:+}\n"))
            .and_then(|()| std::fs::rename(&next, &self.file))
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", self.file.display()));
    }

    /// Gives this clock to the process that `command` will start.
    #[must_use]
    pub fn apply_to(&self, command: ProcessCommand) -> ProcessCommand {
        command
            .environment("LD_PRELOAD", &self.library)
            .environment("FAKETIME_TIMESTAMP_FILE", &self.file)
            .environment("FAKETIME_NO_CACHE", "1")
            .environment("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    }
}

/// The variant for processes with threads.
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
    fn a_running_process_sees_the_clock_move_and_the_test_does_not() {
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
