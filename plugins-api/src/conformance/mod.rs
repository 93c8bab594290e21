//! What every backend must do, checked from outside.
//!
//! Each backend's tests run this suite through one [`Harness`], and `pintle backend check` runs it against the device
//! of an operator. It uses nothing but [`KeyBackend`], so a file, a token, a TPM and a plugin in a child process are
//! held to the same promises.
//!
//! # Flow
//! [`run`] opens the backend, makes one throwaway key of each algorithm, signs with it, then works through ids,
//! deletion, restart, concurrent callers, and the [`Situation`]s that the harness can arrange. Whatever a harness
//! cannot arrange is a skipped row with its reason, never a passed one.
//!
//! # Guarantees
//! Throwaway keys have ids that begin with [`THROWAWAY_PREFIX`] and a random part, and are deleted after each check,
//! also after a failed one and after a panic of the backend. No other key is signed with or deleted, and the suite
//! checks at its end that the others are still there and still the same.
//!
//! # Assumptions
//! Nobody else makes or deletes keys in the device meanwhile.

mod keys;
mod report;
mod signatures;
mod situations;
mod suite;

pub use report::{Outcome, Report, Row};

use crate::{BackendError, KeyAlgorithm, KeyBackend};
use suite::Suite;

/// The bytes that the ids of all throwaway keys begin with: a key so named belongs to no identity, and a run that was
/// killed may have left it.
pub const THROWAWAY_PREFIX: &[u8] = b"conformance/";

/// How the suite reaches a backend, and what it may do to the device.
///
/// Two methods are needed. The others let the suite check what a backend does in trouble; without them these checks
/// are skipped.
pub trait Harness {
    /// Opens the backend anew, as a start of the agent does. Blocks as long as the device takes.
    ///
    /// # Errors
    /// As the backend's own constructor.
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError>;

    /// The algorithms that this backend can hold keys of. The suite checks that it can, and that every other one is
    /// refused as `Unsupported`. The first one is used wherever the algorithm does not matter.
    fn algorithms(&self) -> Vec<KeyAlgorithm>;

    /// Puts the device into this situation; `false` if this harness cannot. Backends that are open stay open.
    fn arrange(&mut self, situation: Situation) -> bool {
        let _ = situation;
        false
    }

    /// Ends the situation that was arranged last. Called once after each `arrange` that answered `true`.
    fn restore(&mut self) {}

    /// How many times the device has been shown a PIN so far, where this can be counted.
    fn pin_attempts(&mut self) -> Option<u64> {
        None
    }

    /// How many backends may be open at once: 1 for a device that serves a single user.
    fn callers(&self) -> usize {
        4
    }
}

/// A situation that a [`Harness`] arranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Situation {
    /// The device holds a key that pintle did not make. Restoring removes it.
    ForeignKey,
    /// The device is unplugged, stopped or unmounted. Restoring brings it back with its keys.
    DeviceGone,
    /// A backend that is opened now is given a PIN that the device refuses. Restoring gives it the right one.
    WrongPin,
    /// All keys of the device are gone for good: a cleared TPM, a re-initialised token. Only for a device that exists
    /// for the tests. Restoring makes the device usable again, without the keys.
    KeysLost,
}

/// Runs every check and answers what came of each.
///
/// Blocks for seconds, or minutes with a slow device. A panic of the backend is a failed check.
pub fn run(harness: &mut dyn Harness) -> Report {
    let algorithms = harness.algorithms();
    let mut suite = Suite::new(harness);
    suite.check("opens and lists the keys it has", Suite::record_existing_keys);
    if !suite.failed() {
        for algorithm in &algorithms {
            signatures::check_algorithm(&mut suite, *algorithm);
        }
        keys::check_generating(&mut suite, &algorithms);
        keys::check_naming(&mut suite);
        keys::check_deleting(&mut suite);
        keys::check_restarting(&mut suite);
        keys::check_concurrent_callers(&mut suite);
        situations::check_foreign_key(&mut suite);
        situations::check_device_gone(&mut suite);
        situations::check_wrong_pin(&mut suite);
        suite.check("the keys that were there before are untouched", Suite::compare_existing_keys);
        suite.check("all throwaway keys are deleted", Suite::clean_up);
        // The last one, since no key survives it, whoever made it.
        situations::check_keys_lost(&mut suite);
    }
    suite.into_report()
}
