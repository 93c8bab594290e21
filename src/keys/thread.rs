//! One OS thread that owns a backend.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyBackend};

use super::Opener;

type Job = Box<dyn FnOnce(Result<&mut dyn KeyBackend, BackendError>) + Send>;

/// A backend and how it is opened: at the first call, and again at a later one as long as that fails.
struct Slot {
    opener: Opener,
    opened: Option<Box<dyn KeyBackend>>,
}

impl Slot {
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
    name: String,
    jobs: mpsc::Sender<Job>,
    health: Arc<Mutex<Option<BackendError>>>,
    /// The backend itself, where a call takes no longer than asking the thread for it.
    prompt: Option<Arc<Mutex<Slot>>>,
}

impl BackendThread {
    /// Starts the thread. The backend is opened at the first call, and again at a later one as long as that fails.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(name: &str, opener: Opener) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let is_prompt = opener.is_prompt;
        let slot = Arc::new(Mutex::new(Slot { opener, opened: None }));
        let prompt = is_prompt.then(|| Arc::clone(&slot));
        std::thread::Builder::new().name(format!("backend {name}")).spawn(move || {
            for job in queue {
                job(slot.lock().unwrap_or_else(PoisonError::into_inner).backend());
            }
        })?;
        Ok(Self { name: name.to_owned(), jobs, health: Arc::default(), prompt })
    }

    /// Has the thread do `work`, and waits for it without blocking the runtime.
    ///
    /// # Errors
    /// Those of `work`; `Unavailable` after the deadline. The thread may still be at it then: what is asked of it next
    /// waits behind.
    pub async fn call<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut dyn KeyBackend) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let health = Arc::clone(&self.health);
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.send(Box::new(move |backend| {
            // Nobody waits any more after the deadline.
            let _ = reply.send(note(&health, backend.and_then(work)));
        }))?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(self.died()),
            Err(_) => Err(self.late(deadline)),
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
            return note(&self.health, slot.backend().and_then(work));
        }
        let health = Arc::clone(&self.health);
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Box::new(move |backend| {
            let _ = reply.try_send(note(&health, backend.and_then(work)));
        }))?;
        match others_go_on(|| answer.recv_timeout(deadline)) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(self.died()),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(self.late(deadline)),
        }
    }

    fn send(&self, job: Job) -> Result<(), BackendError> {
        self.jobs.send(job).map_err(|_| self.died())
    }

    fn died(&self) -> BackendError {
        BackendError::new(BackendErrorKind::Unavailable, format!("the thread of backend {:?} has ended", self.name))
            .with_hint("restart pintle, and report the panic that its log shows")
    }

    fn late(&self, deadline: Duration) -> BackendError {
        let detail = format!("backend {:?} did not answer within {} s", self.name, deadline.as_secs());
        let error = BackendError::new(BackendErrorKind::Unavailable, detail);
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
