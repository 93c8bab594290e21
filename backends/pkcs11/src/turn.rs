//! Whose turn it is: of pintle's processes that share a token, one at a time logs in to it or asks what it is.
//!
//! C_Login writes to some tokens. SoftHSM 2.6.1 stores the token's flags then, and gives its lock on the token's file
//! back when the file has been emptied and what belongs in it is still in a buffer (mended after 2.6.1 by "Flush files
//! before unlocking"). In that moment
//! - C_Initialize does not find the token, or finds one without a PIN, which stays so until the module is initialised
//!   anew;
//! - C_GetTokenInfo answers CKR_GENERAL_ERROR, and goes on doing so until then, if an object is made or destroyed before
//!   it is called again;
//! - C_Login answers CKR_GENERAL_ERROR, which of another module may mean a wrong PIN, so that it is not repeated (C27).
//!
//! Nothing that a module says tells this from a token that is gone, and it may not be initialised anew each time. But
//! agents, their children and their tools can keep out of each other's way.
//!
//! The lock is one on the PIN's file: whoever is to log in can open it, and nobody else. It is a courtesy and not a
//! promise. Other programs do not know of it, and it is not waited for long.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::pin::{self, PinSource};

/// Longer than several logins one after the other on a machine that is busy, and short beside the deadline of a call: a
/// module that hangs in C_Login, in a process that will be killed for it, must not stop the others.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(3);

/// The turns of all who log in with one PIN.
#[derive(Clone)]
pub(crate) struct Turns {
    file: Option<PathBuf>,
}

/// A turn, which ends when this is dropped.
pub(crate) struct Turn {
    file: Option<File>,
}

impl Turns {
    /// Those of `pin`. Without a file for it nobody waits.
    pub(crate) fn of(pin: &PinSource) -> Self {
        Self { file: pin.path().map(Path::to_owned) }
    }

    /// Waits for a turn, for a while. What keeps the file from being opened is told by whoever reads the PIN.
    pub(crate) fn wait(&self) -> Turn {
        let opened = self.file.as_ref().and_then(|path| pin::open(path).ok()).map(File::from);
        let deadline = Instant::now() + PATIENCE;
        let file = opened.filter(|file| {
            loop {
                match file.try_lock() {
                    Ok(()) => return true,
                    Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(PAUSE),
                    Err(_) => return false,
                }
            }
        });
        Turn { file }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // By hand: a process that the module has forked meanwhile would keep it.
        if let Some(file) = &self.file {
            let _ = file.unlock();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_waited_for_and_not_for_ever() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        std::fs::write(&path, "1234").expect("written");
        let turns = Turns::of(&PinSource::new(Some(path), None).expect("a source"));
        let first = turns.wait();
        assert!(first.file.is_some());
        assert!(turns.wait().file.is_none());
        thread::scope(|scope| {
            let second = scope.spawn(|| turns.wait().file.is_some());
            thread::sleep(Duration::from_millis(50));
            drop(first);
            assert!(second.join().expect("no panic"), "it is had when it is free");
        });
    }

    #[test]
    fn without_a_file_nobody_waits() {
        for path in [None, Some("/nonexistent/pin".into())] {
            let turns = Turns::of(&PinSource::new(path, None).expect("a source"));
            assert!(turns.wait().file.is_none());
        }
    }
}
