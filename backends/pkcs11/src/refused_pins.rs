//! The PINs that tokens refused to this process.
//!
//! A token locks itself for good after a few wrong PINs, and a TPM behind PKCS#11 may allow three for everybody on the
//! machine. So a refused PIN is not tried again until its file changes (C27), whichever backend of this process asks;
//! [`PinSource::retry_hint`](crate::pin::PinSource::retry_hint) says how to change it. The agent keeps the same rule for
//! the processes after this one.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::{hmac, rand};

use crate::pin::Stamp;

/// A login that a token refused.
#[derive(Clone)]
pub(crate) struct Refusal {
    /// The state of the PIN's file; `None` where there is no file.
    pub(crate) stamp: Option<Stamp>,
    /// What the token answered.
    pub(crate) answer: String,
    /// The initialisation of the module in which it did. SoftHSM compares with the PIN that it read in its own, so a
    /// token's new PIN is unknown until the next one.
    pub(crate) generation: u64,
    /// The PIN, as a digest under a key that lives as long as this process; `None` if there is no PIN or no such key.
    digest: Option<Vec<u8>>,
}

impl Refusal {
    pub(crate) fn new(stamp: Option<Stamp>, pin: Option<&[u8]>, answer: String, generation: u64) -> Self {
        Self { stamp, answer, generation, digest: pin.and_then(digest) }
    }

    /// Whether another PIN was refused, for certain.
    pub(crate) fn is_of_another_pin(&self, pin: &[u8]) -> bool {
        self.digest.is_some() && digest(pin) != self.digest
    }
}

/// The last refusal of each token.
static REFUSED: LazyLock<Mutex<BTreeMap<String, Refusal>>> = LazyLock::new(Mutex::default);

fn refused() -> MutexGuard<'static, BTreeMap<String, Refusal>> {
    REFUSED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers that `token` refused a PIN.
pub(crate) fn remember(token: &str, refusal: Refusal) {
    refused().insert(token.to_owned(), refusal);
}

/// Forgets it: the token let somebody in.
pub(crate) fn forget(token: &str) {
    refused().remove(token);
}

/// The last refusal of `token` since it let somebody in.
pub(crate) fn last(token: &str) -> Option<Refusal> {
    refused().get(token).cloned()
}

/// A digest that is of no use to anybody without this process's memory.
fn digest(pin: &[u8]) -> Option<Vec<u8>> {
    static KEY: LazyLock<Option<hmac::Key>> =
        LazyLock::new(|| hmac::Key::generate(hmac::HMAC_SHA256, &rand::SystemRandom::new()).ok());
    KEY.as_ref().map(|key| hmac::sign(key, pin).as_ref().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c27_a_refused_pin_is_remembered_for_its_token_until_that_lets_somebody_in() {
        assert!(last("a").is_none());
        remember("a", Refusal::new(None, Some(b"1234"), "no".to_owned(), 1));
        let refusal = last("a").expect("remembered");
        assert!(refusal.is_of_another_pin(b"12345") && !refusal.is_of_another_pin(b"1234"));
        assert!(last("b").is_none());
        forget("a");
        assert!(last("a").is_none());
    }
}
