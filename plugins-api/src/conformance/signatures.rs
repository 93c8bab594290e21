//! One key of each algorithm: generating it, signing with each of its schemes, refusing the others.

use std::time::Instant;

use super::suite::{Suite, Throwaway, Verdict, fail, refused};
use crate::{BackendErrorKind, KeyAlgorithm, SignatureScheme};

/// Repetitions of the call whose median latency is shown.
const SAMPLES: usize = 9;

pub(super) fn check_algorithm(suite: &mut Suite<'_>, algorithm: KeyAlgorithm) {
    let mut made = None;
    suite.check(format!("generate {algorithm}"), |suite| {
        let id = suite.id(algorithm.name().as_bytes())?;
        let backend = suite.backend()?;
        let started = Instant::now();
        let public_key = backend.generate(&id, algorithm)?;
        let latency = started.elapsed();
        if public_key.algorithm() != algorithm {
            return fail(format!("the key is {}", public_key.algorithm()));
        }
        let key = Throwaway { id, public_key };
        suite.keep(&key);
        made = Some(key);
        Ok(Some(latency))
    });
    let Some(key) = made else { return };
    suite.check(format!("generate {algorithm} again answers the same key"), |suite| {
        let backend = suite.backend()?;
        let started = Instant::now();
        let again = backend.generate(&key.id, algorithm)?;
        let latency = started.elapsed();
        if again != key.public_key || backend.public_key(&key.id)? != key.public_key {
            return fail("the SubjectPublicKeyInfo is another one");
        }
        Ok(Some(latency))
    });
    for scheme in algorithm.schemes() {
        suite.check(format!("sign {scheme:?} with {algorithm}"), |suite| {
            let backend = suite.backend()?;
            key.signs_with(backend, *scheme, b"")?;
            key.signs_with(backend, *scheme, &vec![0x5a; 1 << 20])?;
            let mut latencies = (0..SAMPLES)
                .map(|sample| key.signs_with(backend, *scheme, &[sample as u8; 130]))
                .collect::<Result<Vec<_>, Verdict>>()?;
            latencies.sort();
            Ok(Some(latencies[SAMPLES / 2]))
        });
    }
    suite.check(format!("{algorithm} refuses the schemes of other algorithms"), |suite| {
        // The key goes with this check, the last one that needs it: some devices hold only a few.
        suite.discard(&key);
        let backend = suite.backend()?;
        for scheme in SignatureScheme::ALL.into_iter().filter(|scheme| !algorithm.schemes().contains(scheme)) {
            let answer = backend.sign(&key.id, scheme, b"conformance");
            refused(&format!("sign {scheme:?}"), answer, &[BackendErrorKind::Unsupported])?;
        }
        Ok(None)
    });
}
