//! One OS thread that owns a backend.

mod queue;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyBackend};

use super::Opener;
use queue::{Job, Purpose, Sender};

#[cfg(test)]
use queue::SIGNING_QUEUE;

type Work = Box<dyn FnOnce(&mut Slot) + Send>;

/// A backend and how it is opened: at the first call, and again at a later one as long as that fails.
struct Slot {
    name: Arc<str>,
    opener: Opener,
    opened: Option<Box<dyn KeyBackend>>,
    health: Arc<Mutex<Option<BackendError>>>,
}

impl Slot {
    /// Does `work`. A backend that panics over it is closed, and opened again by the next call: what it was in the
    /// middle of is not to be relied on.
    fn run<T>(&mut self, work: impl FnOnce(&mut dyn KeyBackend) -> Result<T, BackendError>) -> Result<T, BackendError> {
        let result = catch_unwind(AssertUnwindSafe(|| self.backend().and_then(work))).unwrap_or_else(|_| {
            let opened = self.opened.take();
            // It may panic once more when it is dropped.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(opened)));
            let detail = format!("backend {:?} panicked", self.name);
            Err(BackendError::new(BackendErrorKind::Unavailable, detail)
                .with_hint("it is opened again at the next call; report the panic that the log shows"))
        });
        note(&self.health, result)
    }

    fn backend(&mut self) -> Result<&mut dyn KeyBackend, BackendError> {
        let backend = match self.opened.take() {
            Some(backend) => backend,
            None => (self.opener.open)()?,
        };
        Ok(self.opened.insert(backend).as_mut())
    }
}

/// A handle of the thread that owns a backend. Dropping the last one ends the thread after its current call.
#[derive(Clone)]
pub struct BackendThread {
    name: Arc<str>,
    jobs: Arc<Sender<Work>>,
    health: Arc<Mutex<Option<BackendError>>>,
    /// The backend itself, where a call takes no longer than asking the thread for it.
    prompt: Option<Arc<Mutex<Slot>>>,
    /// In a simulation there is no thread.
    #[cfg(test)]
    simulated: Option<Arc<Simulated>>,
}

/// A backend whose calls are made by whoever asks, after the time that the simulation says.
#[cfg(test)]
struct Simulated {
    slot: Mutex<Slot>,
    pace: Pace,
}

/// Waits as long as a simulated call takes, at most until the deadline; whether the call is made before it.
#[cfg(test)]
pub(crate) type Pace = Box<dyn Fn(Duration) -> futures::future::BoxFuture<'static, bool> + Send + Sync>;

impl BackendThread {
    /// Starts the thread. The backend is opened at the first call, and again at a later one as long as that fails.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(name: &str, opener: Opener) -> std::io::Result<Self> {
        let (jobs, queue) = queue::queue::<Work>();
        let (name, health): (Arc<str>, Arc<Mutex<_>>) = (name.into(), Arc::default());
        let is_prompt = opener.is_prompt;
        let slot = Slot { name: Arc::clone(&name), opener, opened: None, health: Arc::clone(&health) };
        let slot = Arc::new(Mutex::new(slot));
        let prompt = is_prompt.then(|| Arc::clone(&slot));
        std::thread::Builder::new().name(format!("backend {name}")).spawn(move || {
            while let Some(work) = queue.next() {
                work(&mut slot.lock().unwrap_or_else(PoisonError::into_inner));
            }
        })?;
        Ok(Self {
            name,
            jobs: Arc::new(jobs),
            health,
            prompt,
            #[cfg(test)]
            simulated: None,
        })
    }

    /// A backend without a thread, for a simulation.
    #[cfg(test)]
    pub(crate) fn simulated(name: &str, opener: Opener, pace: Pace) -> Self {
        let (name, health): (Arc<str>, Arc<Mutex<_>>) = (name.into(), Arc::default());
        let slot = Slot { name: Arc::clone(&name), opener, opened: None, health: Arc::clone(&health) };
        let simulated = Some(Arc::new(Simulated { slot: Mutex::new(slot), pace }));
        Self { name, jobs: Arc::new(queue::queue::<Work>().0), health, prompt: None, simulated }
    }

    /// Has the thread do `work`, and waits for it without blocking the runtime. Work whose deadline passes while it
    /// waits behind other calls is not done any more.
    ///
    /// # Errors
    /// Those of `work`; `Unavailable` after the deadline, or at once if too many other calls wait already. After the
    /// deadline the thread may still be at it: what is asked of it next waits behind.
    pub async fn call<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut dyn KeyBackend) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        #[cfg(test)]
        if let Some(simulated) = &self.simulated {
            if !(simulated.pace)(deadline).await {
                return Err(self.late(deadline));
            }
            return simulated.slot.lock().unwrap_or_else(PoisonError::into_inner).run(work);
        }
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.send(Purpose::Call, deadline, move |slot| {
            // Nobody waits any more after the deadline.
            let _ = reply.send(slot.run(work));
        })?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(result)) => result,
            // Either the wait is over, or the thread has thrown the call away because it is.
            Ok(Err(_)) | Err(_) => Err(self.late(deadline)),
        }
    }

    /// Has `work` done, and blocks until it is: for callers that cannot wait otherwise, such as a TLS handshake. The
    /// thread does it, unless the backend is a prompt one that nobody else uses: to wake up another thread and to be
    /// woken up by it takes as long as a signature, and the deadline is none of such a backend's business.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_blocking<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut dyn KeyBackend) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        if let Some(mut slot) = self.prompt.as_ref().and_then(|slot| slot.try_lock().ok()) {
            return slot.run(work);
        }
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Purpose::Handshake, deadline, move |slot| {
            let _ = reply.try_send(slot.run(work));
        })?;
        match others_go_on(|| answer.recv_timeout(deadline)) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Disconnected | mpsc::RecvTimeoutError::Timeout) => Err(self.late(deadline)),
        }
    }

    fn send(
        &self,
        purpose: Purpose,
        deadline: Duration,
        work: impl FnOnce(&mut Slot) + Send + 'static,
    ) -> Result<(), BackendError> {
        let job = Job { expires: Instant::now() + deadline, purpose, work: Box::new(work) as Work };
        self.jobs.send(job).map_err(|queue::Full| {
            let detail = format!("backend {:?} is busy: too many calls wait for it already", self.name);
            self.down(detail, "if this lasts, the device is too slow for its load: see pintle backend check")
        })
    }

    fn late(&self, deadline: Duration) -> BackendError {
        let detail = format!("backend {:?} did not answer within {} s", self.name, deadline.as_secs());
        self.down(detail, "see whether the device hangs, or has too much to do: pintle backend check")
    }

    /// Notes that the backend is unavailable.
    fn down(&self, detail: String, hint: &str) -> BackendError {
        let error = BackendError::new(BackendErrorKind::Unavailable, detail).with_hint(hint);
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        error
    }

    /// What is wrong with the backend, as of its last call.
    pub fn health(&self) -> Option<BackendError> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Blocks in `wait`. On a runtime with several workers the others take over the tasks of this one meanwhile; elsewhere
/// (tests on one thread) there is nobody to hold up.
fn others_go_on<T>(wait: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current() {
        Ok(handle) if handle.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread => {
            tokio::task::block_in_place(wait)
        }
        _ => wait(),
    }
}

/// Notes whether the device answered.
fn note<T>(health: &Mutex<Option<BackendError>>, result: Result<T, BackendError>) -> Result<T, BackendError> {
    let wrong = match &result {
        // The device answered, if not what was hoped for.
        Ok(_) | Err(BackendError { kind: BackendErrorKind::NotFound | BackendErrorKind::Conflict, .. }) => None,
        // It says something of the call, or of the configuration; nothing new of the device.
        Err(BackendError { kind: BackendErrorKind::Unsupported, .. }) => return result,
        Err(error) => Some(error.clone()),
    };
    *health.lock().unwrap_or_else(PoisonError::into_inner) = wrong;
    result
}

#[cfg(test)]
mod tests;
