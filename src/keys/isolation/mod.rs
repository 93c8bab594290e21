//! A module in a process of its own: what crashes or hangs there takes neither the agent nor its certificate along.
//!
//! # Flow
//! The agent starts its own program again as `pintle plugin-host`, with one end of a socketpair as standard input. The
//! child gives up what it does not need (`host`), opens the module that the first frame names (`protocol`), and
//! answers calls one at a time. The thread that owns the backend writes a call, and waits for the answer until the
//! call's deadline (`process`).
//!
//! # Guarantees
//! - A call ends at its deadline. A child that has not answered by then is killed; whatever a child does, the error is
//!   `Unavailable` and says it.
//! - A child that has ended is started again at a next call, at once the first time and then after longer and longer
//!   waits.
//! - A PIN that was refused to one child is not tried by the next one, nor by another process's (case C27).
//! - Nothing secret is in the child's arguments or environment: what it opens comes over the socket, and a PIN only as
//!   the path of its file.
//! - A call that a child did not live to answer may have been carried out. Keys are made under ids that the agent has
//!   written down before, so a repeated `generate` answers the key that is there.

pub(crate) mod host;
mod process;
mod protocol;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};

use super::module::{ModuleConfiguration, PinOrigin};
use super::refused::{PinState, RefusedPins};
use crate::config::ProcessIsolation;
use crate::world::User;
use process::{ChildProcess, Silence};
use protocol::{Answer, Octets, Request, Response};

/// A child that ran for this long before it ended had nothing to do with how the one before it ended.
const MEMORY: Duration = Duration::from_secs(60);
/// No wait between two children is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// So many children may hang in the kernel, where no signal reaches them, before no more are started.
const STUCK_CHILDREN: usize = 3;

/// How long a child may take for a call.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For generating a key.
    pub generate: Duration,
    /// For anything else.
    pub call: Duration,
}

impl Default for Deadlines {
    /// A little less than who asks the backend's thread waits, so that the cause is told before the wait is over.
    fn default() -> Self {
        Self { generate: super::GENERATE_DEADLINE * 9 / 10, call: super::CALL_DEADLINE * 3 / 4 }
    }
}

/// A module in a child process, as a key backend.
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
    trouble: Option<Trouble>,
    stuck: Vec<ChildProcess>,
    /// Whether the module may be one that refused a PIN.
    doubtful: bool,
}

struct Running {
    process: ChildProcess,
    /// Whether the module is open in it.
    opened: bool,
}

/// How the last child ended.
struct Trouble {
    cause: String,
    /// Children in a row that did not live long.
    failures: u32,
    /// No other one is started before.
    until: Instant,
}

impl IsolatedBackend {
    /// A backend of this name for `module`. The child is started by the first call.
    ///
    /// # Errors
    /// `Unsupported` if it is to run as a user that does not exist.
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
            // Also after an upgrade has replaced the file: both ends must be the same program.
            program: "/proc/self/exe".into(),
            deadlines: Deadlines::default(),
            child: None,
            trouble: None,
            stuck: Vec::new(),
            doubtful: true,
        })
    }

    /// The same with other deadlines.
    #[must_use]
    pub fn with_deadlines(self, deadlines: Deadlines) -> Self {
        Self { deadlines, ..self }
    }

    /// The same with this memory of refused PINs, instead of one for this process alone.
    #[must_use]
    pub(super) fn with_refused_pins(self, refused: RefusedPins) -> Self {
        Self { refused, ..self }
    }

    /// The same for a process that is not pintle: `program` is.
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
                    // The child knows which PIN it was, so the next attempt is made in the same one.
                    self.child = Some(next);
                    return Err(error);
                }
            }
        }
        let (running, response) = self.exchange(running, request, deadline, &pin)?;
        self.child = Some(running);
        response
    }

    /// How long a call may take.
    fn time(&self, request: &Request) -> Duration {
        match request {
            Request::Generate { .. } => self.deadlines.generate,
            _ => self.deadlines.call,
        }
    }

    /// The child; a new one if there is none that runs.
    fn running(&mut self) -> Result<Running, BackendError> {
        if let Some(mut running) = self.child.take() {
            match running.process.ended() {
                None if running.opened => return Ok(running),
                None => {
                    if let Err(error) = self.unless_refused() {
                        self.child = Some(running);
                        return Err(error);
                    }
                    return Ok(running);
                }
                Some(how) => {
                    let age = running.process.age();
                    self.ended(age, format!("backend child {how} between two calls"));
                }
            }
        }
        self.unless_refused()?;
        self.stuck.retain_mut(|process| process.ended().is_none());
        if self.stuck.len() >= STUCK_CHILDREN {
            let detail = format!("{} backend children hang in the kernel and cannot be killed", self.stuck.len());
            return Err(unavailable(detail).with_hint("unplug the device and plug it in again, or restart the machine"));
        }
        if let Some(trouble) = &self.trouble
            && let Some(left) = trouble.until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            let seconds = left.as_secs() + 1;
            return Err(unavailable(format!("{}; another one is started in {seconds} s", trouble.cause)));
        }
        let environment = self.isolation.environment.clone();
        match ChildProcess::start(&self.program, &self.name, self.user, environment) {
            Ok(process) => Ok(Running { process, opened: false }),
            Err(error) => {
                let cause = format!("a backend child cannot be started: {error}");
                self.ended(Duration::ZERO, cause.clone());
                let hint = "see ulimit -u; to run it as another user, pintle must be root";
                Err(unavailable(cause).with_hint(hint))
            }
        }
    }

    /// Not with a PIN that was refused before.
    fn unless_refused(&self) -> Result<(), BackendError> {
        self.refused.still_refused(&self.module, self.user).map_or(Ok(()), Err)
    }

    /// One exchange; the child comes back with the answer, unless it has ended over it.
    fn exchange(
        &mut self,
        mut running: Running,
        request: &Request,
        deadline: Instant,
        pin: &PinState,
    ) -> Result<(Running, Response), BackendError> {
        let silence = match running.process.exchange(request, deadline) {
            Ok(response) => {
                match &response {
                    Err(error) if error.kind == BackendErrorKind::Locked => {
                        self.refused.remember(&self.module, pin.clone(), error);
                        self.doubtful = true;
                    }
                    Ok(_) if running.opened && self.doubtful => {
                        self.refused.forget(&self.module);
                        self.doubtful = false;
                    }
                    _ => {}
                }
                return Ok((running, response));
            }
            Err(silence) => silence,
        };
        let (age, call) = (running.process.age(), request.name());
        let killed = |ended| if ended { "was killed" } else { "cannot be killed" };
        let (how, ended) = match silence {
            Silence::Ended => match running.process.bury() {
                Some(how) => (format!("{how} in {call}"), true),
                None => (format!("hung up in {call} and cannot be killed"), false),
            },
            Silence::Late => {
                let time = self.time(request);
                let ended = running.process.kill().is_some();
                (format!("did not answer {call} within {time:.0?} and {}", killed(ended)), ended)
            }
            Silence::Nonsense(detail) => {
                let ended = running.process.kill().is_some();
                (format!("answered {call} with nonsense ({detail}) and {}", killed(ended)), ended)
            }
        };
        if !ended {
            self.stuck.push(running.process);
        }
        let cause = format!("backend child {how}");
        self.ended(age, cause.clone());
        let hint = "it is started again at the next call; if this goes on, ask the module's vendor, and see pintle backend check";
        Err(unavailable(cause).with_hint(hint))
    }

    /// Notes how a child ended, and how long to wait before the next one.
    fn ended(&mut self, age: Duration, cause: String) {
        let before = self.trouble.as_ref().map_or(0, |trouble| trouble.failures);
        let failures = if age >= MEMORY { 1 } else { before.saturating_add(1) };
        let wait = match failures {
            0 | 1 => Duration::ZERO,
            failures => Duration::from_secs(1 << (failures - 2).min(5)).min(LONGEST_WAIT),
        };
        self.trouble = Some(Trouble { cause, failures, until: Instant::now() + wait });
    }
}

impl KeyBackend for IsolatedBackend {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        match self.call(&Request::Generate { id: id.clone(), algorithm })? {
            Answer::PublicKey(key) => Ok(key),
            _ => Err(out_of_step()),
        }
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        match self.call(&Request::PublicKey { id: id.clone() })? {
            Answer::PublicKey(key) => Ok(key),
            _ => Err(out_of_step()),
        }
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        match self.call(&Request::Sign { id: id.clone(), scheme, message: Octets(message.to_vec()) })? {
            Answer::Signature(Octets(signature)) => Ok(signature),
            _ => Err(out_of_step()),
        }
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        match self.call(&Request::Delete { id: id.clone() })? {
            Answer::Done => Ok(()),
            _ => Err(out_of_step()),
        }
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        match self.call(&Request::List)? {
            Answer::Keys(keys) => Ok(keys),
            _ => Err(out_of_step()),
        }
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        match self.call(&Request::Reference { id: id.clone() })? {
            Answer::Reference(reference) => Ok(reference),
            _ => Err(out_of_step()),
        }
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        match self.call(&Request::Usage)? {
            Answer::Usage(resources) => Ok(resources),
            _ => Err(out_of_step()),
        }
    }
}

fn unavailable(detail: String) -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, detail)
}

fn out_of_step() -> BackendError {
    BackendError::new(BackendErrorKind::Corrupt, "the backend child answered another call than it was asked")
}
