//! What a backend does in trouble, as far as the harness can arrange it.

use super::Situation;
use super::suite::{Suite, fail, refused};
use crate::BackendErrorKind;

/// Calls after a refused PIN, none of which may try it again.
const CALLS_WHILE_LOCKED: usize = 5;

pub(super) fn check_foreign_key(suite: &mut Suite<'_>) {
    suite.check("a key that somebody else made is not listed", |suite| {
        let before = suite.backend()?.list()?;
        suite.arrange(Situation::ForeignKey)?;
        for _ in 0..2 {
            let mut listed = suite.backend()?.list()?;
            listed.retain(|id| !before.contains(id));
            if let Some(id) = listed.first() {
                return fail(format!("{id} is listed"));
            }
            suite.close();
        }
        Ok(None)
    });
}

pub(super) fn check_device_gone(suite: &mut Suite<'_>) {
    suite.check("while the device is gone every call is Unavailable, and keys come back with it", |suite| {
        let key = suite.key("device-gone")?;
        let new = suite.id(b"meanwhile")?;
        let algorithm = key.public_key.algorithm();
        let scheme = algorithm.schemes()[0];
        key.signs(suite.backend()?)?;
        suite.arrange(Situation::DeviceGone)?;
        let backend = suite.backend()?;
        let unavailable = [BackendErrorKind::Unavailable];
        refused("sign", backend.sign(&key.id, scheme, b"conformance"), &unavailable)?;
        refused("public_key", backend.public_key(&key.id), &unavailable)?;
        refused("generate", backend.generate(&new, algorithm), &unavailable)?;
        refused("list", backend.list(), &unavailable)?;
        // A key that nobody can reach is not a destroyed key.
        refused("delete", backend.delete(&key.id), &unavailable)?;
        suite.restore();
        let answer = suite.await_device(|backend| backend.public_key(&key.id))??;
        if answer != key.public_key {
            return fail("public_key answers another key than before");
        }
        let backend = suite.backend()?;
        key.signs(backend)?;
        if !backend.list()?.contains(&key.id) {
            return fail("the key is no longer listed");
        }
        backend.generate(&new, algorithm)?;
        Ok(None)
    });
}

pub(super) fn check_wrong_pin(suite: &mut Suite<'_>) {
    suite.check("a refused PIN is Locked and is not tried again", |suite| {
        let key = suite.key("wrong-pin")?;
        let scheme = key.public_key.algorithm().schemes()[0];
        suite.close();
        suite.arrange(Situation::WrongPin)?;
        let attempts = suite.harness.pin_attempts();
        let locked = [BackendErrorKind::Locked];
        match suite.harness.open() {
            Err(error) => refused("open", Err::<(), _>(error), &locked)?,
            Ok(mut backend) => {
                for _ in 0..CALLS_WHILE_LOCKED {
                    refused("public_key", backend.public_key(&key.id), &locked)?;
                    refused("sign", backend.sign(&key.id, scheme, b"conformance"), &locked)?;
                    refused("list", backend.list(), &locked)?;
                    refused("delete", backend.delete(&key.id), &locked)?;
                }
            }
        }
        if let (Some(before), Some(after)) = (attempts, suite.harness.pin_attempts())
            && after > before + 1
        {
            return fail(format!("the PIN was shown to the device {} times", after - before));
        }
        suite.restore();
        key.signs(suite.backend()?)?;
        Ok(None)
    });
}

pub(super) fn check_keys_lost(suite: &mut Suite<'_>) {
    suite.check("a lost key is KeyLost or NotFound, and a new one can be made", |suite| {
        let key = suite.key("lost")?;
        let scheme = key.public_key.algorithm().schemes()[0];
        suite.arrange(Situation::KeysLost)?;
        let lost = [BackendErrorKind::KeyLost, BackendErrorKind::NotFound];
        let answer = suite.await_device(|backend| backend.sign(&key.id, scheme, b"conformance"))?;
        refused("sign", answer, &lost)?;
        refused("public_key", suite.backend()?.public_key(&key.id), &lost)?;
        suite.restore();
        suite.close();
        let new = suite.key("after-loss")?;
        if new.public_key == key.public_key {
            return fail("the new key is the lost one");
        }
        new.signs(suite.backend()?)?;
        let backend = suite.backend()?;
        for id in [&key.id, &new.id] {
            backend.delete(id)?;
        }
        Ok(None)
    });
}
