//! The state of one run: the open backend, the throwaway keys, and the rows so far.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{Harness, Outcome, Report, Row, Situation, THROWAWAY_PREFIX};
use crate::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, PublicKey, SignatureScheme};

/// How long a device that is back may answer `Unavailable` before this counts as a failure. A PKCS#11 module is loaded
/// again at most every 30 seconds.
const RECOVERY: Duration = Duration::from_secs(60);

/// Why a check did not pass.
pub(super) enum Verdict {
    Failed(String),
    Skipped(String),
}

impl From<BackendError> for Verdict {
    fn from(error: BackendError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What a check answers: the latency of the call that it is about, if it is about one.
pub(super) type Checked = Result<Option<Duration>, Verdict>;

/// A throwaway key.
#[derive(Clone)]
pub(super) struct Throwaway {
    pub(super) id: KeyId,
    pub(super) public_key: PublicKey,
}

impl Throwaway {
    /// Signs with the key's preferred scheme and verifies the signature.
    pub(super) fn signs(&self, backend: &mut dyn KeyBackend) -> Result<(), Verdict> {
        let scheme = self.public_key.algorithm().schemes()[0];
        self.signs_with(backend, scheme, b"conformance").map(|_| ())
    }

    /// Signs `message`, verifies the signature, and answers how long the signing took.
    pub(super) fn signs_with(
        &self,
        backend: &mut dyn KeyBackend,
        scheme: SignatureScheme,
        message: &[u8],
    ) -> Result<Duration, Verdict> {
        let started = Instant::now();
        let signature = backend.sign(&self.id, scheme, message)?;
        let latency = started.elapsed();
        if self.public_key.verifies(scheme, message, &signature) {
            Ok(latency)
        } else {
            fail(format!("the {scheme:?} signature over {} bytes does not verify under the public key", message.len()))
        }
    }
}

pub(super) struct Suite<'a> {
    pub(super) harness: &'a mut dyn Harness,
    backend: Option<Box<dyn KeyBackend>>,
    /// Random, so that two runs on one device do not meet.
    run: String,
    /// What the device held before, and what it answered about it.
    existing: Vec<(KeyId, Result<PublicKey, BackendErrorKind>)>,
    /// Every throwaway id so far.
    made: Vec<KeyId>,
    /// Those of the check that is running.
    current: Vec<KeyId>,
    arranged: bool,
    rows: Vec<Row>,
}

impl<'a> Suite<'a> {
    pub(super) fn new(harness: &'a mut dyn Harness) -> Self {
        let mut random = [0; 6];
        // Without randomness the ids merely repeat from run to run.
        let _ = aws_lc_rs::rand::fill(&mut random);
        Self {
            harness,
            backend: None,
            run: random.iter().map(|byte| format!("{byte:02x}")).collect(),
            existing: Vec::new(),
            made: Vec::new(),
            current: Vec::new(),
            arranged: false,
            rows: Vec::new(),
        }
    }

    /// Runs one check and adds its row. Whatever came of it, the situation is ended and its keys are deleted.
    pub(super) fn check(&mut self, name: impl Into<String>, check: impl FnOnce(&mut Self) -> Checked) {
        let started = Instant::now();
        let checked = catch_unwind(AssertUnwindSafe(|| check(self)))
            .unwrap_or_else(|_| fail("the backend panicked, see standard error"));
        let duration = started.elapsed();
        self.restore();
        let (outcome, latency) = match checked {
            Ok(latency) => (Outcome::Passed, latency),
            Err(Verdict::Failed(detail)) => (Outcome::Failed(detail), None),
            Err(Verdict::Skipped(reason)) => (Outcome::Skipped(reason), None),
        };
        if matches!(outcome, Outcome::Failed(_)) {
            // The next check starts afresh and is judged by itself.
            self.close();
        }
        for id in std::mem::take(&mut self.current) {
            // What remains is reported by `clean_up`.
            let _ = catch_unwind(AssertUnwindSafe(|| self.backend().map(|backend| backend.delete(&id))));
        }
        self.rows.push(Row { name: name.into(), outcome, duration, latency });
    }

    pub(super) fn failed(&self) -> bool {
        self.rows.iter().any(|row| matches!(row.outcome, Outcome::Failed(_)))
    }

    pub(super) fn into_report(mut self) -> Report {
        self.close();
        Report { rows: self.rows }
    }

    /// The backend; opened if it is not.
    pub(super) fn backend(&mut self) -> Result<&mut dyn KeyBackend, Verdict> {
        let opened = match self.backend.take() {
            Some(backend) => backend,
            None => self.harness.open()?,
        };
        Ok(self.backend.insert(opened).as_mut())
    }

    /// Drops the backend, as the end of the agent does.
    pub(super) fn close(&mut self) {
        let backend = self.backend.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(backend)));
    }

    /// A new throwaway id with this ending, which is deleted when the check ends.
    pub(super) fn id(&mut self, ending: &[u8]) -> Result<KeyId, Verdict> {
        let bytes = [THROWAWAY_PREFIX, self.run.as_bytes(), b"/", ending].concat();
        let id = KeyId::new(bytes).map_err(|error| Verdict::Failed(error.to_string()))?;
        self.made.push(id.clone());
        self.current.push(id.clone());
        Ok(id)
    }

    /// A new throwaway key of the algorithm that is used where it does not matter.
    pub(super) fn key(&mut self, ending: &str) -> Result<Throwaway, Verdict> {
        let Some(algorithm) = self.harness.algorithms().first().copied() else {
            return fail("the backend has no algorithm");
        };
        self.key_of(algorithm, ending)
    }

    /// A new throwaway key.
    pub(super) fn key_of(&mut self, algorithm: KeyAlgorithm, ending: &str) -> Result<Throwaway, Verdict> {
        let id = self.id(ending.as_bytes())?;
        let public_key = self.backend()?.generate(&id, algorithm)?;
        if public_key.algorithm() != algorithm {
            return fail(format!("asked for {algorithm}, got {}", public_key.algorithm()));
        }
        Ok(Throwaway { id, public_key })
    }

    /// Lets the key live until [`clean_up`](Self::clean_up), for the checks that follow.
    pub(super) fn keep(&mut self, key: &Throwaway) {
        self.current.retain(|id| *id != key.id);
    }

    /// Deletes a kept key with the current check.
    pub(super) fn discard(&mut self, key: &Throwaway) {
        self.current.push(key.id.clone());
    }

    /// Puts the device into this situation until the check ends or [`restore`](Self::restore) is called.
    pub(super) fn arrange(&mut self, situation: Situation) -> Result<(), Verdict> {
        if self.harness.arrange(situation) {
            self.arranged = true;
            Ok(())
        } else {
            Err(Verdict::Skipped("cannot be arranged with this device".to_owned()))
        }
    }

    pub(super) fn restore(&mut self) {
        if std::mem::take(&mut self.arranged) {
            self.harness.restore();
        }
    }

    /// Calls the backend until it answers something other than `Unavailable`, or the device has had its time.
    pub(super) fn await_device<T>(
        &mut self,
        mut call: impl FnMut(&mut dyn KeyBackend) -> Result<T, BackendError>,
    ) -> Result<Result<T, BackendError>, Verdict> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(10);
        loop {
            match call(self.backend()?) {
                Err(error) if error.kind == BackendErrorKind::Unavailable && started.elapsed() < RECOVERY => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                answer => return Ok(answer),
            }
        }
    }

    pub(super) fn record_existing_keys(&mut self) -> Checked {
        let backend = self.backend()?;
        let started = Instant::now();
        let ids = backend.list()?;
        let latency = started.elapsed();
        let existing = ids
            .into_iter()
            .map(|id| {
                let answer = backend.public_key(&id).map_err(|error| error.kind);
                (id, answer)
            })
            .collect();
        self.existing = existing;
        Ok(Some(latency))
    }

    pub(super) fn compare_existing_keys(&mut self) -> Checked {
        let existing = std::mem::take(&mut self.existing);
        let backend = self.backend()?;
        let listed = backend.list()?;
        for (id, before) in existing {
            if !listed.contains(&id) {
                return fail(format!("the key {id} was there before and is no longer listed"));
            }
            if backend.public_key(&id).map_err(|error| error.kind) != before {
                return fail(format!("the key {id} is another one than before"));
            }
        }
        Ok(None)
    }

    pub(super) fn clean_up(&mut self) -> Checked {
        let own = [THROWAWAY_PREFIX, self.run.as_bytes(), b"/"].concat();
        let made = std::mem::take(&mut self.made);
        // Afresh: what a backend remembers is not what the device holds.
        self.close();
        self.await_device(|backend| backend.list())??;
        let backend = self.backend()?;
        let mut remaining = Vec::new();
        for id in &made {
            if let Err(error) = backend.delete(id) {
                remaining.push(format!("{id} ({error})"));
            }
        }
        for id in backend.list()? {
            if id.as_bytes().starts_with(&own) {
                remaining.push(id.to_string());
            }
        }
        if remaining.is_empty() { Ok(None) } else { fail(format!("still there: {}", remaining.join(", "))) }
    }
}

pub(super) fn fail<T>(detail: impl Into<String>) -> Result<T, Verdict> {
    Err(Verdict::Failed(detail.into()))
}

/// Fails unless `answer` is an error of one of these kinds that reads as an error of pintle must: one line each.
pub(super) fn refused<T>(
    call: &str,
    answer: Result<T, BackendError>,
    kinds: &[BackendErrorKind],
) -> Result<(), Verdict> {
    let wanted = || kinds.iter().map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(" or ");
    match answer {
        Ok(_) => fail(format!("{call} succeeded, expected {}", wanted())),
        Err(error) if !kinds.contains(&error.kind) => {
            fail(format!("{call} answered {:?} ({}), expected {}", error.kind, error.detail, wanted()))
        }
        Err(error) => {
            let hint = error.hint.as_deref().unwrap_or("none");
            if error.detail.is_empty() || error.detail.contains('\n') || hint.is_empty() || hint.contains('\n') {
                fail(format!("{call}: detail and hint of an error are one line of text each"))
            } else {
                Ok(())
            }
        }
    }
}
