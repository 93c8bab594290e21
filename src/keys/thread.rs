//! One OS thread that owns a backend.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use pintle_plugins_api::{BackendError, BackendErrorKind, KeyBackend};

use super::Opener;

type Job = Box<dyn FnOnce(Result<&mut dyn KeyBackend, BackendError>) + Send>;

/// A handle of the thread that owns a backend. Dropping the last one ends the thread after its current call.
#[derive(Clone)]
pub struct BackendThread {
    name: String,
    jobs: mpsc::Sender<Job>,
    health: Arc<Mutex<Option<BackendError>>>,
}

impl BackendThread {
    /// Starts the thread. The backend is opened there at the first call, and again at a later one as long as that fails.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(name: &str, mut opener: Opener) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new().name(format!("backend {name}")).spawn(move || {
            let mut opened: Option<Box<dyn KeyBackend>> = None;
            for job in queue {
                if opened.is_none() {
                    match opener() {
                        Ok(backend) => opened = Some(backend),
                        Err(error) => {
                            job(Err(error));
                            continue;
                        }
                    }
                }
                if let Some(backend) = &mut opened {
                    job(Ok(backend.as_mut()));
                }
            }
        })?;
        Ok(Self { name: name.to_owned(), jobs, health: Arc::default() })
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

    /// Has the thread do `work`, and blocks until it is done: for callers that cannot wait otherwise, such as a TLS
    /// handshake.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_blocking<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut dyn KeyBackend) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let health = Arc::clone(&self.health);
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Box::new(move |backend| {
            let _ = reply.try_send(note(&health, backend.and_then(work)));
        }))?;
        match answer.recv_timeout(deadline) {
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
