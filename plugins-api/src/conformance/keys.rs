//! The life of keys: generating, naming, listing, deleting, and finding them again.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::suite::{Checked, Suite, Throwaway, Verdict, fail, refused};
use crate::{BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference};

/// Signatures by each concurrent caller with each of its two keys.
const CONCURRENT_SIGNATURES: usize = 10;

/// Endings of ids with every kind of byte that a file name, a URI, a C string or a shell could stumble over.
const ODD_ENDINGS: [&[u8]; 8] = [
    b".",
    b"..",
    b"a\0b",
    b"/../x/",
    b"\xff\xfe\x80",
    b"100%2F%",
    b"white space\n\t'\"\\;*?#",
    // 60 bytes in all with what comes before, all of which a file name must encode.
    b"////////////////////////////////////",
];

pub(super) fn check_generating(suite: &mut Suite<'_>, algorithms: &[KeyAlgorithm]) {
    suite.check("generate with another algorithm is a Conflict", |suite| {
        let key = suite.key("conflict")?;
        let own = key.public_key.algorithm();
        let (other, kinds): (_, &[_]) = match algorithms.iter().find(|other| **other != own) {
            Some(other) => (*other, &[BackendErrorKind::Conflict]),
            // A backend with a single algorithm may look at the algorithm before it looks for the key.
            None => (
                KeyAlgorithm::ALL.into_iter().find(|other| *other != own).unwrap_or_default(),
                &[BackendErrorKind::Conflict, BackendErrorKind::Unsupported],
            ),
        };
        let backend = suite.backend()?;
        refused("generate", backend.generate(&key.id, other), kinds)?;
        same_key(backend, &key)
    });
    suite.check("generate of an algorithm that it does not have is Unsupported", |suite| {
        let others: Vec<_> = KeyAlgorithm::ALL.into_iter().filter(|other| !algorithms.contains(other)).collect();
        if others.is_empty() {
            return Err(Verdict::Skipped("it has every algorithm".to_owned()));
        }
        for other in others {
            let id = suite.id(format!("unsupported-{other}").as_bytes())?;
            let backend = suite.backend()?;
            refused(&format!("generate {other}"), backend.generate(&id, other), &[BackendErrorKind::Unsupported])?;
            refused("public_key after it", backend.public_key(&id), &[BackendErrorKind::NotFound])?;
        }
        Ok(None)
    });
    suite.check("two ids are two keys", |suite| {
        let (first, second) = (suite.key("first")?, suite.key("second")?);
        if first.public_key == second.public_key {
            return fail("both have the same SubjectPublicKeyInfo");
        }
        let backend = suite.backend()?;
        for key in [first, second] {
            same_key(backend, &key)?;
            key.signs(backend)?;
        }
        Ok(None)
    });
    suite.check("an absent key is NotFound", |suite| {
        let id = suite.id(b"absent")?;
        let algorithm = suite.harness.algorithms().first().copied().unwrap_or_default();
        let backend = suite.backend()?;
        let started = Instant::now();
        let answer = backend.public_key(&id);
        let latency = started.elapsed();
        refused("public_key", answer, &[BackendErrorKind::NotFound])?;
        refused("reference", backend.reference(&id), &[BackendErrorKind::NotFound])?;
        absent_key_does_not_sign(backend, &id, algorithm)?;
        Ok(Some(latency))
    });
    suite.check("reference names the key and does not hold it", |suite| {
        let key = suite.key("reference")?;
        let backend = suite.backend()?;
        let reference = backend.reference(&key.id)?;
        if backend.reference(&key.id)? != reference {
            return fail("it changes from call to call");
        }
        check_reference(&reference)
    });
}

pub(super) fn check_naming(suite: &mut Suite<'_>) {
    suite.check("list shows a new key, and nothing else is new", |suite| {
        let before: BTreeSet<_> = suite.backend()?.list()?.into_iter().collect();
        let key = suite.key("listed")?;
        let backend = suite.backend()?;
        let after = backend.list()?;
        let unique: BTreeSet<_> = after.iter().cloned().collect();
        if unique.len() != after.len() {
            return fail("a key is listed twice");
        }
        let new: Vec<_> = unique.difference(&before).collect();
        if new != [&key.id] || !unique.is_superset(&before) {
            return fail(format!("expected {} to be new, but new are {new:?}", key.id));
        }
        Ok(None)
    });
    suite.check("usage tells of what the device can run out of", |suite| {
        suite.key("usage")?;
        let backend = suite.backend()?;
        let started = Instant::now();
        let resources = backend.usage()?;
        let latency = started.elapsed();
        if resources.is_empty() {
            return Err(Verdict::Skipped("it says nothing of that".to_owned()));
        }
        let mut names = BTreeSet::new();
        for resource in &resources {
            if resource.name.is_empty() || resource.name.contains(char::is_control) || !names.insert(&resource.name) {
                return fail(format!("{:?} is no name of a resource, or that of two", resource.name));
            }
            if resource.limit.is_some_and(|limit| resource.used > limit) {
                return fail(format!("{resource}: more is taken than there is"));
            }
        }
        Ok(Some(latency))
    });
    suite.check("ids of any octets keep keys apart", |suite| {
        let mut keys: Vec<Throwaway> = Vec::new();
        for ending in ODD_ENDINGS {
            let id = suite.id(ending)?;
            let algorithm = suite.harness.algorithms().first().copied().unwrap_or_default();
            let public_key = suite.backend()?.generate(&id, algorithm)?;
            if let Some(other) = keys.iter().find(|other| other.public_key == public_key) {
                return fail(format!("{id} and {} are the same key", other.id));
            }
            keys.push(Throwaway { id, public_key });
        }
        let backend = suite.backend()?;
        let listed = backend.list()?;
        for key in &keys {
            same_key(backend, key)?;
            key.signs(backend)?;
            if !listed.contains(&key.id) {
                return fail(format!("{} is not listed", key.id));
            }
        }
        Ok(None)
    });
    suite.check("an id that begins as another one is another key", |suite| {
        let long = suite.key("prefix-and-more")?;
        let short = suite.id(b"prefix")?;
        let backend = suite.backend()?;
        refused("public_key", backend.public_key(&short), &[BackendErrorKind::NotFound])?;
        backend.delete(&short)?;
        same_key(backend, &long)
    });
}

pub(super) fn check_deleting(suite: &mut Suite<'_>) {
    suite.check("delete destroys the key", |suite| {
        let key = suite.key("deleted")?;
        let kept = suite.key("kept")?;
        let backend = suite.backend()?;
        // Once used, so that what a backend remembers of it goes too.
        key.signs(backend)?;
        let started = Instant::now();
        backend.delete(&key.id)?;
        let latency = started.elapsed();
        gone(backend, &key)?;
        same_key(backend, &kept)?;
        kept.signs(backend)?;
        suite.close();
        gone(suite.backend()?, &key)?;
        Ok(Some(latency))
    });
    suite.check("delete of an absent key succeeds", |suite| {
        let never = suite.id(b"never")?;
        let key = suite.key("twice")?;
        let backend = suite.backend()?;
        backend.delete(&never)?;
        backend.delete(&key.id)?;
        backend.delete(&key.id)?;
        Ok(None)
    });
    suite.check("generate after delete makes a new key", |suite| {
        let key = suite.key("again")?;
        let algorithm = key.public_key.algorithm();
        let backend = suite.backend()?;
        backend.delete(&key.id)?;
        let again = Throwaway { public_key: backend.generate(&key.id, algorithm)?, id: key.id.clone() };
        if again.public_key == key.public_key {
            return fail("it is the key that was deleted");
        }
        same_key(backend, &again)?;
        again.signs(backend)?;
        Ok(None)
    });
}

pub(super) fn check_restarting(suite: &mut Suite<'_>) {
    suite.check("keys outlive a restart", |suite| {
        let key = suite.key("restart")?;
        let algorithm = key.public_key.algorithm();
        let before: BTreeSet<_> = suite.backend()?.list()?.into_iter().collect();
        suite.close();
        let started = Instant::now();
        let backend = suite.backend()?;
        let latency = started.elapsed();
        if backend.list()?.into_iter().collect::<BTreeSet<_>>() != before {
            return fail("list answers other keys than before");
        }
        same_key(backend, &key)?;
        key.signs(backend)?;
        if backend.generate(&key.id, algorithm)? != key.public_key {
            return fail("generate makes another key than before");
        }
        Ok(Some(latency))
    });
}

pub(super) fn check_concurrent_callers(suite: &mut Suite<'_>) {
    suite.check("concurrent callers do not disturb each other", |suite| {
        let callers = suite.harness.callers();
        if callers < 2 {
            return Err(Verdict::Skipped("the device serves a single user".to_owned()));
        }
        let shared = suite.key("shared")?;
        let algorithm = shared.public_key.algorithm();
        let ids = (0..callers)
            .map(|caller| suite.id(format!("caller-{caller}").as_bytes()))
            .collect::<Result<Vec<_>, Verdict>>()?;
        suite.close();
        let mut backends = Vec::new();
        for id in ids {
            backends.push((id, suite.harness.open()?));
        }
        let answers: Vec<Result<(), Verdict>> = std::thread::scope(|scope| {
            let threads: Vec<_> = backends
                .into_iter()
                .map(|(id, mut backend)| {
                    let shared = &shared;
                    scope.spawn(move || {
                        let calling = || call_concurrently(backend.as_mut(), &id, algorithm, shared);
                        catch_unwind(AssertUnwindSafe(calling)).unwrap_or_else(|_| fail("the backend panicked"))
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| fail("a thread panicked"))).collect()
        });
        answers.into_iter().collect::<Result<(), Verdict>>()?;
        Ok(None)
    });
}

fn call_concurrently(
    backend: &mut dyn KeyBackend,
    id: &KeyId,
    algorithm: KeyAlgorithm,
    shared: &Throwaway,
) -> Result<(), Verdict> {
    let own = Throwaway { id: id.clone(), public_key: backend.generate(id, algorithm)? };
    for _ in 0..CONCURRENT_SIGNATURES {
        own.signs(backend)?;
        shared.signs(backend)?;
    }
    same_key(backend, &own)?;
    backend.delete(id)?;
    refused("public_key after delete", backend.public_key(id), &[BackendErrorKind::NotFound])?;
    same_key(backend, shared).map(|_| ())
}

fn same_key(backend: &mut dyn KeyBackend, key: &Throwaway) -> Checked {
    if backend.public_key(&key.id)? == key.public_key {
        Ok(None)
    } else {
        fail(format!("public_key of {} answers another key than generate did", key.id))
    }
}

fn gone(backend: &mut dyn KeyBackend, key: &Throwaway) -> Result<(), Verdict> {
    refused("public_key after delete", backend.public_key(&key.id), &[BackendErrorKind::NotFound])?;
    absent_key_does_not_sign(backend, &key.id, key.public_key.algorithm())?;
    if backend.list()?.contains(&key.id) { fail("it is still listed") } else { Ok(()) }
}

fn absent_key_does_not_sign(backend: &mut dyn KeyBackend, id: &KeyId, algorithm: KeyAlgorithm) -> Result<(), Verdict> {
    let answer = backend.sign(id, algorithm.schemes()[0], b"conformance");
    refused("sign with an absent key", answer, &[BackendErrorKind::NotFound, BackendErrorKind::KeyLost])
}

/// What goes out of the agent by a reference must not be a key, other than by the path of its file.
fn check_reference(reference: &KeyReference) -> Checked {
    match reference {
        KeyReference::File(path) if !path.is_absolute() => fail(format!("{} is not an absolute path", path.display())),
        KeyReference::File(path) if !path.is_file() => fail(format!("there is no file {}", path.display())),
        KeyReference::File(_) => Ok(None),
        KeyReference::Pem(text) => {
            let labels: Vec<_> = text.lines().filter_map(|line| line.trim().strip_prefix("-----BEGIN ")).collect();
            let holds_key = |label: &&str| label.contains("PRIVATE KEY") && !label.starts_with("TSS2 ");
            if labels.is_empty() {
                fail("the PEM reference is not PEM")
            } else if labels.iter().any(holds_key) {
                fail("the PEM reference holds a private key")
            } else {
                Ok(None)
            }
        }
        // RFC 3986, section 3.1; RFC 7512, section 2.4, for the attribute.
        KeyReference::Uri(uri) => match uri.split_once(':') {
            _ if uri.contains("pin-value=") => fail("the URI holds a PIN"),
            _ if uri.contains("PRIVATE KEY") => fail("the URI holds a private key"),
            Some((scheme, rest)) if !scheme.is_empty() && !rest.is_empty() => Ok(None),
            _ => fail("the URI has no scheme"),
        },
    }
}
