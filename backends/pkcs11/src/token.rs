//! A session that is logged in, however often the token is logged out, removed and put back.

use std::path::PathBuf;
use std::sync::{Arc, RwLockReadGuard};
use std::thread;
use std::time::Duration;

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::slot::{Slot, TokenInfo};
use pintle_plugins_api::{BackendError, BackendErrorKind};

use crate::Configuration;
use crate::fault::{Fault, answer, describe, is_absence, is_recoverable, return_value};
use crate::login::Login;
use crate::module::{Initialization, Module, trusted};
use crate::pin::{self, PinSource};
use crate::session::{LoggedInSession, identity};
use crate::turn::{Turn, Turns};
use crate::uri::TokenUri;

/// The pauses before an operation is repeated that another program may have spoilt by writing to the token just then.
/// The first is short, since a write takes microseconds unless whoever does it is interrupted.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
    Duration::from_millis(160),
];
/// Pauses before a token is reported as absent.
const PAUSES_BEFORE_ABSENCE: usize = 4;

/// A token, whether or not it is there at the moment.
pub(crate) struct Token {
    uri: TokenUri,
    module_path: PathBuf,
    login: Login,
    turns: Turns,
    reload_interval: Duration,
    module: Option<Arc<Module>>,
    session: Option<LoggedInSession>,
    /// A new session did not help the last time, or would not: initialise the module anew before the next one.
    suspect: bool,
}

/// A session, and the initialisation that it is one of, which is held for as long as this lives.
type Opened<'a> = (RwLockReadGuard<'a, Initialization>, LoggedInSession);

impl Token {
    /// The token that `configuration` names. It need not be there, nor the module.
    pub(crate) fn new(configuration: &Configuration) -> Result<Self, BackendError> {
        let (uri, module_path, pin_path) = configuration.parts()?;
        let reload_interval = configuration.reload_interval;
        if let Err(error) = trusted(&module_path)
            && error.kind != BackendErrorKind::Unavailable
        {
            return Err(error);
        }
        let pin = PinSource::new(pin_path, pin::credentials_directory())?;
        let turns = Turns::of(&pin);
        let login = Login::new(uri.name(), module_path.clone(), pin, reload_interval);
        let (module, session, suspect) = (None, None, false);
        Ok(Self { uri, module_path, login, turns, reload_interval, module, session, suspect })
    }

    /// The URI that names the token.
    pub(crate) fn uri(&self) -> &TokenUri {
        &self.uri
    }

    /// Runs `operation` on a session that is logged in. While another program seems to be writing to the token, runs it
    /// again after a moment; if it fails in a way that a new session may fix, runs it once more on a new one. So
    /// `operation` must be one that can be repeated.
    pub(crate) fn with_session<T>(
        &mut self,
        mut operation: impl FnMut(&mut LoggedInSession) -> Result<T, Fault>,
    ) -> Result<T, BackendError> {
        let (mut pauses, mut repeated) = (PAUSES.into_iter(), false);
        loop {
            let error = match self.attempt(&mut operation) {
                Ok(result) => {
                    self.suspect = false;
                    return Ok(result);
                }
                Err(Fault::Busy(_)) if pause(&mut pauses) => continue,
                Err(fault) => fault.settled()?,
            };
            let recoverable = is_recoverable(&error);
            if recoverable {
                self.close();
            }
            if !recoverable || repeated {
                self.suspect = recoverable;
                let mut error = answer(&error);
                error.detail = format!("{}: {}", self.uri.name(), error.detail);
                return Err(error);
            }
            repeated = true;
        }
    }

    fn attempt<T>(&mut self, operation: &mut impl FnMut(&mut LoggedInSession) -> Result<T, Fault>) -> Result<T, Fault> {
        let (module, mut turn) = self.module()?;
        if std::mem::take(&mut self.suspect) {
            turn = turn.or_else(|| self.reload(&module));
        }
        let initialization = match self.hold(&module) {
            Ok(initialization) => initialization,
            Err(error) => {
                if turn.is_none() {
                    turn = self.reload(&module);
                }
                if turn.is_none() {
                    return Err(error.into());
                }
                self.hold(&module)?
            }
        };
        // Another backend of this process may have had the module initialised anew.
        let usable = self.session.take().filter(|session| session.generation() == initialization.generation());
        let (initialization, session) = match usable {
            Some(session) => (initialization, session),
            None => {
                drop(initialization);
                self.open(&module, turn)?
            }
        };
        let outcome = operation(self.session.insert(session));
        drop(initialization);
        outcome
    }

    /// The module; with the turn to log in, if it is loaded just now.
    fn module(&mut self) -> Result<(Arc<Module>, Option<Turn>), BackendError> {
        if let Some(module) = &self.module {
            return Ok((Arc::clone(module), None));
        }
        let turn = self.turns.wait();
        let loaded = Module::load(&self.module_path).map_err(|error| self.naming_the_token(error))?;
        let module = self.module.insert(loaded);
        Ok((Arc::clone(module), Some(turn)))
    }

    /// The module for one call.
    fn hold<'a>(&self, module: &'a Module) -> Result<RwLockReadGuard<'a, Initialization>, BackendError> {
        module.hold().map_err(|error| self.naming_the_token(error))
    }

    fn naming_the_token(&self, error: BackendError) -> BackendError {
        BackendError { detail: format!("{}: {}", self.uri.name(), error.detail), ..error }
    }

    /// Initialises the module anew, if that may be; then it is this backend's turn to log in.
    fn reload(&self, module: &Module) -> Option<Turn> {
        let turn = self.turns.wait();
        module.reload(self.reload_interval).then_some(turn)
    }

    /// Opens a session on the token and logs in; initialises the module anew for that if need be, and if that may be.
    fn open<'a>(&mut self, module: &'a Module, mut turn: Option<Turn>) -> Result<Opened<'a>, Fault> {
        let mut reloaded = false;
        loop {
            let error = match self.open_patiently(module, turn.take()) {
                Ok(opened) => return Ok(opened),
                Err(fault) => fault.settled()?,
            };
            if !is_recoverable(&error) {
                return Err(error.into());
            }
            if !reloaded {
                turn = self.reload(module);
            }
            if turn.is_none() {
                return Err(self.unusable(&error).into());
            }
            reloaded = true;
        }
    }

    /// Opens a session on the token and logs in. Of a token that another program writes to, a module may say for a
    /// moment that it is not there.
    fn open_patiently<'a>(&mut self, module: &'a Module, mut turn: Option<Turn>) -> Result<Opened<'a>, Fault> {
        let mut pauses = PAUSES.into_iter().take(PAUSES_BEFORE_ABSENCE);
        loop {
            let turn = turn.take().unwrap_or_else(|| self.turns.wait());
            let initialization = self.hold(module)?;
            match self.open_at_once(&initialization) {
                Ok(session) => return Ok((initialization, session)),
                Err(fault) => {
                    // Neither other processes nor other threads have to wait for the end of the pause.
                    drop((initialization, turn));
                    if !matches!(fault, Fault::Busy(_)) || !pause(&mut pauses) {
                        return Err(fault);
                    }
                }
            }
        }
    }

    fn open_at_once(&mut self, initialization: &Initialization) -> Result<LoggedInSession, Fault> {
        let (slot, info) = self.find(initialization.pkcs11())?;
        let session = LoggedInSession::open(initialization, slot, info.as_ref(), self.turns.clone())?;
        match self.login.log_in(&session, info.as_ref()) {
            Ok(()) => Ok(session),
            Err(fault) => {
                self.suspect |= std::mem::take(&mut self.login.is_stale);
                session.close();
                Err(fault)
            }
        }
    }

    /// Why there is no session, when nothing is left to try.
    fn unusable(&self, error: &Error) -> BackendError {
        let (name, module) = (self.uri.name(), self.module_path.display());
        let unavailable = |what| BackendError::new(BackendErrorKind::Unavailable, format!("{name} {what}"));
        if is_absence(error) {
            unavailable(format!("is not present: {}", describe(error)))
                .with_hint(format!("is it plugged in, and does {module} see it?"))
        } else if return_value(error) == Some(RvError::UserNotLoggedIn) {
            unavailable(
                "refused this PIN before, and the module is initialised anew before it is tried again".to_owned(),
            )
            .with_hint(format!("wait for at most {} s", self.reload_interval.as_secs_f32()))
        } else {
            unavailable(format!("cannot be opened: {}", describe(error)))
                .with_hint(format!("if this lasts, look at the log of {module}"))
        }
    }

    /// The slot of the one token that the URI means.
    fn find(&self, pkcs11: &Pkcs11) -> Result<(Slot, Option<TokenInfo>), Fault> {
        use cryptoki::context::Function::GetSlotList;
        let mut found = None;
        for slot in pkcs11.get_slots_with_token()? {
            let info = match pkcs11.get_token_info(slot) {
                Ok(info) if !info.token_initialized() => continue,
                Ok(info) => Some(info),
                // A token that is gone, as SoftHSM tells it: the slot stays, CK_TOKEN_INFO is not to be had. The same
                // is to be had of one that another process logs in to at this moment.
                Err(Error::Pkcs11(..)) => continue,
                // The module answered, with something that could not be read (opencryptoki's clock).
                Err(_) => None,
            };
            if !self.uri.matches(slot.id(), info.as_ref().map(identity).as_ref()) {
                continue;
            }
            if found.replace((slot, info)).is_some() {
                let detail = format!("several tokens match the pkcs11: URI of {}", self.uri.name());
                return Err(BackendError::new(BackendErrorKind::Unavailable, detail)
                    .with_hint("add serial= or slot-id= to the URI; pkcs11-tool --list-slots shows them")
                    .into());
            }
        }
        found.ok_or_else(|| Fault::busy(Error::Pkcs11(RvError::TokenNotPresent, GetSlotList)))
    }

    /// Gives the session up. What it knew of objects goes with it.
    fn close(&mut self) {
        let Some(session) = self.session.take() else { return };
        if let Some(initialization) = self.module.as_ref().and_then(|module| module.hold().ok())
            && initialization.generation() == session.generation()
        {
            session.close();
        }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits for the next of these pauses; `false` if none is left.
fn pause(pauses: &mut impl Iterator<Item = Duration>) -> bool {
    pauses.next().map(thread::sleep).is_some()
}
