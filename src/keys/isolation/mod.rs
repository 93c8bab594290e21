//! Runs a module in a child process, so that a crash or hang of the module does not affect the agent.
//!
//! # Flow
//! The agent starts its own executable as `pintle plugin-host`, with one end of a socketpair as standard input. The
//! child drops its privileges (`host`), opens the module named in the first frame (`protocol`), and serves calls one
//! at a time. The backend's thread writes a call, and waits for the response until the call's deadline (`process`).
//!
//! # Guarantees
//! - A call returns by its deadline. A child that has not responded by then is killed. Whatever a child does, the
//!   resulting error is `Unavailable` and describes it.
//! - A child that has exited is restarted at the next call: immediately the first time, and then with increasing
//!   back-off.
//! - A PIN that the module has rejected is not tried again by the next child or by another pintle process (case C27).
//! - The child's arguments and environment contain no secrets. The module's configuration is sent over the socket,
//!   and a PIN only as the path of its file.
//! - A call whose child exited before responding may have been carried out. The agent records key ids before it
//!   generates keys, so a repeated `generate` returns the existing key.

pub(crate) mod host;
mod process;
mod protocol;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};

use super::module::{ModuleConfiguration, PinOrigin};
use super::refused_pins::{PinState, RefusedPins};
use crate::config::ProcessIsolation;
use crate::world::User;
use process::{CallFailure, ChildProcess};
use protocol::{Answer, Bytes, Request, Response};

/// A child that ran for this long resets the count of consecutive failures.
const FAILURE_RESET: Duration = Duration::from_secs(60);
/// Limit on the back-off between two children.
const MAXIMUM_BACK_OFF: Duration = Duration::from_secs(30);
/// The number of children that may hang in the kernel, where signals do not reach them, before no more are started.
const MAXIMUM_STUCK_CHILDREN: usize = 3;

/// How long a child may take for a call.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For generating a key.
    pub generate: Duration,
    /// For every other call.
    pub call: Duration,
}

impl Default for Deadlines {
    /// Shorter than the timeouts of the backend thread's callers, so that they receive the cause instead.
    fn default() -> Self {
        Self { generate: super::GENERATE_DEADLINE * 9 / 10, call: super::CALL_DEADLINE * 3 / 4 }
    }
}

/// A key backend that runs a module in a child process.
pub struct IsolatedBackend {
    name: String,
    module: ModuleConfiguration,
    pin: PinOrigin,
    refused: RefusedPins,
    isolation: ProcessIsolation,
    user: Option<User>,
    program: PathBuf,
    deadlines: Deadlines,
    child: Option<Running>,
    last_failure: Option<LastFailure>,
    stuck: Vec<ChildProcess>,
    /// Whether the module may have rejected a PIN, which the next success then clears.
    may_be_refused: bool,
}

struct Running {
    process: ChildProcess,
    /// Whether the child has opened the module.
    opened: bool,
}

/// The last child's failure.
struct LastFailure {
    cause: String,
    /// Consecutive children that did not run for long.
    failures: u32,
    /// No child is started before this time.
    until: Instant,
}

impl IsolatedBackend {
    /// A backend with this name for `module`. The first call starts the child.
    ///
    /// # Errors
    /// `Unsupported` if the user to run it as does not exist.
    pub fn new(
        name: impl Into<String>,
        module: ModuleConfiguration,
        isolation: ProcessIsolation,
    ) -> Result<Self, BackendError> {
        let user = isolation.run_as().map_err(|error| {
            BackendError::new(BackendErrorKind::Unsupported, format!("{error} to run the backend as"))
                .with_hint("name a user and a group that getent passwd and getent group show, or give both as numbers")
        })?;
        Ok(Self {
            name: name.into(),
            pin: module.pin(),
            refused: RefusedPins::default(),
            module,
            isolation,
            user,
            // Not by path: agent and child must be the same program, even after an upgrade has replaced the file.
            program: "/proc/self/exe".into(),
            deadlines: Deadlines::default(),
            child: None,
            last_failure: None,
            stuck: Vec::new(),
            may_be_refused: true,
        })
    }

    /// Replaces the deadlines.
    #[must_use]
    pub fn with_deadlines(self, deadlines: Deadlines) -> Self {
        Self { deadlines, ..self }
    }

    /// Shares this record of rejected PINs. The default is one for this backend alone.
    #[must_use]
    pub(super) fn with_refused_pins(self, refused: RefusedPins) -> Self {
        Self { refused, ..self }
    }

    /// Sets the path of pintle, for use in a process that is not pintle.
    #[must_use]
    pub fn with_program(self, program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), ..self }
    }

    fn call(&mut self, request: &Request) -> Response {
        let deadline = Instant::now() + self.time(request);
        let mut running = self.running()?;
        let pin = PinState::now(&self.pin, self.user);
        if !running.opened {
            let open = Request::Open(self.module.clone());
            match self.exchange(running, &open, deadline, &pin)? {
                (next, Ok(_)) => running = Running { opened: true, ..next },
                (next, Err(error)) => {
                    // The module in this child knows which PIN failed, so the next attempt uses the same child.
                    self.child = Some(next);
                    return Err(error);
                }
            }
        }
        let (running, response) = self.exchange(running, request, deadline, &pin)?;
        self.child = Some(running);
        response
    }

    fn time(&self, request: &Request) -> Duration {
        match request {
            Request::Generate { .. } => self.deadlines.generate,
            _ => self.deadlines.call,
        }
    }

    /// Returns the child, and starts one if none is running.
    fn running(&mut self) -> Result<Running, BackendError> {
        if let Some(mut running) = self.child.take() {
            match running.process.exited() {
                None if running.opened => return Ok(running),
                None => {
                    if let Err(error) = self.check_not_refused() {
                        self.child = Some(running);
                        return Err(error);
                    }
                    return Ok(running);
                }
                Some(how) => {
                    let age = running.process.age();
                    self.exited(age, format!("backend child {how} between calls"));
                }
            }
        }
        self.check_not_refused()?;
        self.stuck.retain_mut(|process| process.exited().is_none());
        if self.stuck.len() >= MAXIMUM_STUCK_CHILDREN {
            let detail = format!("{} backend children hang in the kernel and cannot be killed", self.stuck.len());
            return Err(unavailable(detail).with_hint("unplug the device and plug it in again, or restart the machine"));
        }
        if let Some(last_failure) = &self.last_failure
            && let Some(left) = last_failure.until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            let seconds = left.as_secs() + 1;
            return Err(unavailable(format!("{}; restarting in {seconds} s", last_failure.cause)));
        }
        let environment = self.isolation.environment.clone();
        match ChildProcess::start(&self.program, &self.name, self.user, environment) {
            Ok(process) => Ok(Running { process, opened: false }),
            Err(error) => {
                let cause = format!("cannot start a backend child: {error}");
                self.exited(Duration::ZERO, cause.clone());
                let hint = "check ulimit -u; to run the child as another user, pintle must run as root";
                Err(unavailable(cause).with_hint(hint))
            }
        }
    }

    /// Fails if the configured PIN has already been rejected.
    fn check_not_refused(&self) -> Result<(), BackendError> {
        self.refused.still_refused(&self.module, self.user).map_or(Ok(()), Err)
    }

    /// Makes one call. Returns the child together with the response, unless it failed to respond.
    fn exchange(
        &mut self,
        mut running: Running,
        request: &Request,
        deadline: Instant,
        pin: &PinState,
    ) -> Result<(Running, Response), BackendError> {
        let call_failure = match running.process.exchange(request, deadline) {
            Ok(response) => {
                match &response {
                    Err(error) if error.kind == BackendErrorKind::Locked => {
                        self.refused.remember(&self.module, pin.clone(), error);
                        self.may_be_refused = true;
                    }
                    Ok(_) if running.opened && self.may_be_refused => {
                        self.refused.forget(&self.module);
                        self.may_be_refused = false;
                    }
                    _ => {}
                }
                return Ok((running, response));
            }
            Err(call_failure) => call_failure,
        };
        let (age, call) = (running.process.age(), request.name());
        let killed = |exited| if exited { "was killed" } else { "cannot be killed" };
        let (how, exited) = match call_failure {
            CallFailure::Disconnected => match running.process.reap() {
                Some(how) => (format!("{how} in {call}"), true),
                None => (format!("closed its connection in {call} and cannot be killed"), false),
            },
            CallFailure::DeadlineExceeded => {
                let time = self.time(request);
                let exited = running.process.kill().is_some();
                (format!("did not answer {call} within {time:.0?} and {}", killed(exited)), exited)
            }
            CallFailure::Malformed(detail) => {
                let exited = running.process.kill().is_some();
                (format!("sent an invalid response to {call} ({detail}) and {}", killed(exited)), exited)
            }
        };
        if !exited {
            self.stuck.push(running.process);
        }
        let cause = format!("backend child {how}");
        self.exited(age, cause.clone());
        let hint = "it is restarted at the next call; if this persists, run pintle backend check and report the result \
                    to the module's vendor";
        Err(unavailable(cause).with_hint(hint))
    }

    /// Records a child's failure, and how long to wait before starting the next one.
    fn exited(&mut self, age: Duration, cause: String) {
        let before = self.last_failure.as_ref().map_or(0, |last_failure| last_failure.failures);
        let failures = if age >= FAILURE_RESET { 1 } else { before.saturating_add(1) };
        let wait = match failures {
            0 | 1 => Duration::ZERO,
            failures => Duration::from_secs(1 << (failures - 2).min(5)).min(MAXIMUM_BACK_OFF),
        };
        self.last_failure = Some(LastFailure { cause, failures, until: Instant::now() + wait });
    }
}

impl KeyBackend for IsolatedBackend {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        match self.call(&Request::Generate { id: id.clone(), algorithm })? {
            Answer::PublicKey(key) => Ok(key),
            _ => Err(unexpected_response()),
        }
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        match self.call(&Request::PublicKey { id: id.clone() })? {
            Answer::PublicKey(key) => Ok(key),
            _ => Err(unexpected_response()),
        }
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        match self.call(&Request::Sign { id: id.clone(), scheme, message: Bytes(message.to_vec()) })? {
            Answer::Signature(Bytes(signature)) => Ok(signature),
            _ => Err(unexpected_response()),
        }
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        match self.call(&Request::Delete { id: id.clone() })? {
            Answer::Done => Ok(()),
            _ => Err(unexpected_response()),
        }
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        match self.call(&Request::List)? {
            Answer::Keys(keys) => Ok(keys),
            _ => Err(unexpected_response()),
        }
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        match self.call(&Request::Reference { id: id.clone() })? {
            Answer::Reference(reference) => Ok(reference),
            _ => Err(unexpected_response()),
        }
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        match self.call(&Request::Usage)? {
            Answer::Usage(resources) => Ok(resources),
            _ => Err(unexpected_response()),
        }
    }
}

fn unavailable(detail: String) -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, detail)
}

fn unexpected_response() -> BackendError {
    BackendError::new(BackendErrorKind::Corrupt, "the backend child's response does not match the request")
}
