//! A session that is logged in, however often the token is logged out, removed and put back.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::RawAuthPin;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId};

use crate::fault::{Fault, answer, describe, is_recoverable, return_value};
use crate::keys::KeyPair;
use crate::module::{Initialization, Module, trusted};
use crate::pin::{self, PinSource};
use crate::uri::{TokenIdentity, TokenUri};
use crate::{Configuration, misconfigured};

/// A token, whether or not it is there at the moment.
pub(crate) struct Token {
    uri: TokenUri,
    module_path: PathBuf,
    pin: PinSource,
    reload_interval: Duration,
    module: Option<Arc<Module>>,
    session: Option<LoggedInSession>,
    /// A new session did not help the last time, or would not: initialise the module anew before the next one.
    suspect: bool,
    /// When C_Login last failed in a way that may mean the PIN.
    login_failed: Option<Instant>,
}

/// A session on a token, logged in if the token wants that.
pub(crate) struct LoggedInSession {
    pkcs11: Pkcs11,
    raw: Session,
    slot: Slot,
    generation: u64,
    identity: Option<TokenIdentity>,
    login_required: bool,
    /// The key pairs found so far. Handles are good for as long as the session is.
    pub(crate) found: HashMap<KeyId, KeyPair>,
}

impl Token {
    /// The token that `configuration` names. It need not be there, nor the module.
    pub(crate) fn new(configuration: Configuration) -> Result<Self, BackendError> {
        let Configuration { uri, module, pin_file, reload_interval } = configuration;
        let uri = TokenUri::parse(&uri)?;
        let module_path = match (module, uri.module_path.clone()) {
            (Some(_), Some(_)) => return Err(misconfigured("the module is named twice, in the URI and beside it")),
            (Some(path), None) | (None, Some(path)) => path,
            (None, None) => {
                return Err(misconfigured("no module is named")
                    .with_hint("add ?module-path=/usr/lib/…/module.so to the pkcs11: URI"));
            }
        };
        if let Err(error) = trusted(&module_path)
            && error.kind != BackendErrorKind::Unavailable
        {
            return Err(error);
        }
        let pin_path = match (pin_file, uri.pin_source.clone()) {
            (Some(_), Some(_)) => return Err(misconfigured("the PIN's file is named twice, in the URI and beside it")),
            (path, source) => path.or(source),
        };
        let pin = PinSource::new(pin_path, pin::credentials_directory())?;
        let (module, session, suspect, login_failed) = (None, None, false, None);
        Ok(Self { uri, module_path, pin, reload_interval, module, session, suspect, login_failed })
    }

    /// The URI that names the token.
    pub(crate) fn uri(&self) -> &TokenUri {
        &self.uri
    }

    /// Runs `operation` on a session that is logged in. If that fails in a way that a new session may mend, runs it
    /// once more on a new one, so `operation` must be one that can be repeated.
    pub(crate) fn with_session<T>(
        &mut self,
        mut operation: impl FnMut(&mut LoggedInSession) -> Result<T, Fault>,
    ) -> Result<T, BackendError> {
        let mut repeated = false;
        loop {
            match self.attempt(&mut operation) {
                Ok(result) => {
                    self.suspect = false;
                    return Ok(result);
                }
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Device(error)) => {
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
        }
    }

    fn attempt<T>(&mut self, operation: &mut impl FnMut(&mut LoggedInSession) -> Result<T, Fault>) -> Result<T, Fault> {
        let module = match &self.module {
            Some(module) => Arc::clone(module),
            None => Arc::clone(self.module.insert(Module::load(&self.module_path)?)),
        };
        if std::mem::take(&mut self.suspect) {
            module.reload(self.reload_interval);
        }
        let mut initialization = match module.hold() {
            Ok(initialization) => initialization,
            Err(error) if !module.reload(self.reload_interval) => return Err(error.into()),
            Err(_) => module.hold()?,
        };
        // Another backend of this process may have had the module initialised anew.
        let usable = self.session.take().filter(|session| session.generation == initialization.generation());
        let session = match usable {
            Some(session) => session,
            None => match self.open(&initialization) {
                Ok(session) => session,
                Err(Fault::Device(error)) if is_recoverable(&error) => {
                    drop(initialization);
                    if !module.reload(self.reload_interval) {
                        return Err(self.absent(&error).into());
                    }
                    initialization = module.hold()?;
                    self.open(&initialization).map_err(|fault| match fault {
                        Fault::Device(error) if is_recoverable(&error) => self.absent(&error).into(),
                        fault => fault,
                    })?
                }
                Err(fault) => return Err(fault),
            },
        };
        let outcome = operation(self.session.insert(session));
        drop(initialization);
        outcome
    }

    fn absent(&self, error: &Error) -> BackendError {
        let detail = format!("{} is not present: {}", self.uri.name(), describe(error));
        BackendError::new(BackendErrorKind::Unavailable, detail)
            .with_hint(format!("is it plugged in, and does {} see it?", self.module_path.display()))
    }

    /// Opens a session on the token and logs in.
    fn open(&mut self, initialization: &Initialization) -> Result<LoggedInSession, Fault> {
        let pkcs11 = initialization.pkcs11();
        let (slot, info) = self.find(pkcs11)?;
        // Closed by hand: a handle of an earlier initialisation must not close somebody's session of this one.
        let raw = pkcs11.open_rw_session_no_drop(slot)?;
        let session = LoggedInSession {
            pkcs11: pkcs11.clone(),
            raw,
            slot,
            generation: initialization.generation(),
            identity: info.as_ref().map(identity),
            login_required: info.as_ref().is_none_or(TokenInfo::login_required),
            found: HashMap::new(),
        };
        match self.log_in(&session, info.as_ref()) {
            Ok(()) => Ok(session),
            Err(fault) => {
                let _ = session.raw.close();
                Err(fault)
            }
        }
    }

    /// The slot of the one token that the URI means.
    fn find(&self, pkcs11: &Pkcs11) -> Result<(Slot, Option<TokenInfo>), Fault> {
        let mut found = None;
        for slot in pkcs11.get_slots_with_token()? {
            let info = match pkcs11.get_token_info(slot) {
                Ok(info) if !info.token_initialized() => continue,
                Ok(info) => Some(info),
                // A token that is gone, as SoftHSM tells it: the slot stays, CK_TOKEN_INFO is not to be had.
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
        found.ok_or(Fault::Device(Error::Pkcs11(RvError::TokenNotPresent, cryptoki::context::Function::GetSlotList)))
    }

    fn log_in(&mut self, session: &LoggedInSession, info: Option<&TokenInfo>) -> Result<(), Fault> {
        // The login belongs to the token, not to the session: another backend of this process may have done it.
        if !session.login_required || session.is_logged_in()? {
            return Ok(());
        }
        let name = self.uri.name();
        let locked = |what: &str| BackendError::new(BackendErrorKind::Locked, format!("{name} {what}"));
        if info.is_some_and(TokenInfo::user_pin_locked) {
            // Kryoptic reads this once per initialisation, and somebody may unlock it meanwhile.
            self.suspect = true;
            return Err(locked("has locked its PIN after too many wrong ones")
                .with_hint("unlock it with the security officer's PIN, as the token's manual says")
                .into());
        }
        // A new initialisation does not make another PIN of it.
        if self.login_failed.is_some_and(|when| when.elapsed() < self.reload_interval) {
            let detail = format!("{name} refused the last login without saying why");
            return Err(BackendError::new(BackendErrorKind::Unavailable, detail).into());
        }
        let token = format!("{} {:?}", self.module_path.display(), session.identity);
        let pin = self.pin.read()?;
        let outcome = match &pin {
            Some(pin) => {
                if pin::was_refused(&token, pin) {
                    return Err(locked("refused this PIN; it is not tried again")
                        .with_hint("put the right PIN into its file; if the token was changed instead, restart pintle")
                        .into());
                }
                if info.is_some_and(TokenInfo::user_pin_final_try) && !pin::refused_any(&token) {
                    self.suspect = true;
                    return Err(locked("allows only one more try before it locks its PIN")
                        .with_hint("log in once by hand (pkcs11-tool --login --list-objects), so that it counts anew")
                        .into());
                }
                session.raw.login_with_raw(UserType::User, &RawAuthPin::new(Box::new(pin.to_vec())))
            }
            None if info.is_some_and(TokenInfo::protected_authentication_path) => {
                session.raw.login(UserType::User, None)
            }
            None => {
                return Err(locked("wants a PIN and none is configured")
                    .with_hint("put the PIN into a file of mode 0400 and add pin-source=file:/path to the URI")
                    .into());
            }
        };
        let Err(error) = outcome else { return Ok(()) };
        match return_value(&error) {
            Some(RvError::UserAlreadyLoggedIn) => Ok(()),
            Some(
                RvError::PinIncorrect
                | RvError::PinInvalid
                | RvError::PinLenRange
                | RvError::PinExpired
                | RvError::PinLocked,
            ) => {
                if let Some(pin) = &pin {
                    pin::remember_refused(&token, pin);
                }
                Err(locked(&format!("refused the PIN: {}", describe(&error)))
                    .with_hint("put the right PIN into its file; this one is not tried again")
                    .into())
            }
            Some(RvError::UserPinNotInitialized) => {
                Err(locked("has no user PIN yet").with_hint("initialise it: pkcs11-tool --init-pin").into())
            }
            Some(RvError::UserAnotherAlreadyLoggedIn | RvError::UserTooManyTypes) => Err(BackendError::new(
                BackendErrorKind::Unavailable,
                format!("{name}: another kind of user is logged in: {}", describe(&error)),
            )
            .into()),
            // The token or the session went away under the login: that says nothing of the PIN.
            Some(
                RvError::CryptokiNotInitialized
                | RvError::DeviceRemoved
                | RvError::SessionClosed
                | RvError::SessionHandleInvalid
                | RvError::SlotIdInvalid
                | RvError::TokenNotPresent
                | RvError::TokenNotRecognized,
            ) => Err(Fault::Device(error)),
            _ => {
                // A module may mean a wrong PIN by any other code, so this is not repeated at once either.
                self.login_failed = Some(Instant::now());
                Err(Fault::Device(error))
            }
        }
    }

    /// Gives the session up. What it knew of objects goes with it.
    fn close(&mut self) {
        let Some(session) = self.session.take() else { return };
        if let Some(initialization) = self.module.as_ref().and_then(|module| module.hold().ok())
            && initialization.generation() == session.generation
        {
            let _ = session.raw.close();
        }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.close();
    }
}

impl LoggedInSession {
    /// The session for PKCS#11 calls.
    pub(crate) fn raw(&self) -> &Session {
        &self.raw
    }

    /// The module's functions.
    pub(crate) fn pkcs11(&self) -> &Pkcs11 {
        &self.pkcs11
    }

    /// The slot that the token is in.
    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }

    /// What the token said of itself when the session was opened, if it could be read.
    pub(crate) fn identity(&self) -> Option<&TokenIdentity> {
        self.identity.as_ref()
    }

    fn is_logged_in(&self) -> Result<bool, Error> {
        let state = self.raw.get_session_info()?.session_state();
        Ok(matches!(state, SessionState::RoUser | SessionState::RwUser))
    }

    /// Makes sure that an object which was not found is not there: private objects cannot be seen without a login
    /// (PKCS #11 v3.1, section 4.4), and of a token that was removed SoftHSM says that it holds nothing.
    pub(crate) fn confirm_absence(&self) -> Result<(), Fault> {
        use cryptoki::context::Function::{FindObjects, GetTokenInfo};
        if self.login_required && !self.is_logged_in()? {
            return Err(Fault::Device(Error::Pkcs11(RvError::UserNotLoggedIn, FindObjects)));
        }
        let now = match self.pkcs11.get_token_info(self.slot) {
            Ok(info) => Some(identity(&info)),
            // Whatever the code is: the token is not in a state to tell what it holds.
            Err(Error::Pkcs11(..)) => return Err(Fault::Device(Error::Pkcs11(RvError::TokenNotPresent, GetTokenInfo))),
            Err(_) => None,
        };
        if now == self.identity {
            Ok(())
        } else {
            Err(Fault::Device(Error::Pkcs11(RvError::DeviceRemoved, GetTokenInfo)))
        }
    }
}

/// What a token says of itself. Some modules pad with NUL rather than with blanks.
fn identity(info: &TokenInfo) -> TokenIdentity {
    let trimmed = |text: &str| text.trim_end_matches(['\0', ' ']).to_owned();
    TokenIdentity {
        label: trimmed(info.label()),
        manufacturer: trimmed(info.manufacturer_id()),
        model: trimmed(info.model()),
        serial: trimmed(info.serial_number()),
    }
}
