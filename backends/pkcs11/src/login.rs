//! Logging in to a token, without spending the tries that it allows.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use cryptoki::context::Function;
use cryptoki::error::{Error, RvError};
use cryptoki::session::UserType;
use cryptoki::slot::TokenInfo;
use cryptoki::types::RawAuthPin;
use pintle_plugins_api::{BackendError, BackendErrorKind};

use crate::fault::{Fault, describe, return_value};
use crate::pin::{PinSource, Stamp};
use crate::refused_pins::{self, Refusal};
use crate::session::LoggedInSession;

/// Logins that fail by an unknown code before the PIN counts as refused: a token may lock its PIN at the third wrong one.
const MAXIMUM_DOUBTFUL_LOGINS: u32 = 2;

/// How to log in to one token.
pub(crate) struct Login {
    /// The token, as errors name it.
    name: String,
    module_path: PathBuf,
    pin: PinSource,
    /// The least time between two logins that fail without a reason.
    interval: Duration,
    doubtful: Option<DoubtfulLogins>,
    /// Whether the module's view of the token may be out of date: kryoptic reads the flags of a PIN once per
    /// initialisation, and somebody may unlock it meanwhile.
    pub(crate) is_stale: bool,
}

/// Logins that failed, one after the other, by a code that may or may not count as a wrong PIN.
struct DoubtfulLogins {
    last: Instant,
    number: u32,
    /// What the token answered to the last one.
    answer: String,
    /// The state of the PIN's file at the last one.
    stamp: Option<Stamp>,
}

impl Login {
    pub(crate) fn new(name: String, module_path: PathBuf, pin: PinSource, interval: Duration) -> Self {
        Self { name, module_path, pin, interval, doubtful: None, is_stale: false }
    }

    fn locked(&self, what: &str) -> BackendError {
        BackendError::new(BackendErrorKind::Locked, format!("{} {what}", self.name))
    }

    /// Logs in, if the session wants that.
    ///
    /// # Errors
    /// `Locked` for what only a person can change; a device's fault for what a new initialisation may mend.
    pub(crate) fn log_in(&mut self, session: &LoggedInSession, info: Option<&TokenInfo>) -> Result<(), Fault> {
        // The login belongs to the token, not to the session: another backend of this process may have done it.
        if !session.wants_login()? {
            return Ok(());
        }
        if info.is_some_and(TokenInfo::user_pin_locked) {
            self.is_stale = true;
            let unlock = "unlock it with the security officer's PIN, as the token's manual says";
            return Err(self
                .locked("has locked its PIN after too many wrong ones")
                .with_hint(self.pin.hint_after(unlock))
                .into());
        }
        let token = format!("{} {:?}", self.module_path.display(), session.identity());
        // Before the file is read: one that is replaced meanwhile then counts as another one.
        let (stamp, refusal) = (self.pin.stamp(), refused_pins::last(&token));
        if let Some(refusal) = refusal.as_ref().filter(|refusal| refusal.stamp == stamp) {
            return Err(self.refused_before(refusal).into());
        }
        self.wait_after_a_doubtful_login(stamp)?;
        let pin = self.pin.read()?;
        let outcome = match &pin {
            Some(pin) => {
                let is_the_refused_one = refusal.as_ref().is_some_and(|refusal| !refusal.is_of_another_pin(pin));
                if is_the_refused_one
                    && refusal.as_ref().map(|refusal| refusal.generation) == Some(session.generation())
                {
                    // Its file was touched, so it is the token that was changed, and the module need not know.
                    return Err(Fault::Device(Error::Pkcs11(RvError::UserNotLoggedIn, Function::Login)));
                }
                let is_another_one = refusal.is_some() && !is_the_refused_one;
                if info.is_some_and(TokenInfo::user_pin_final_try) && !is_another_one {
                    self.is_stale = true;
                    let by_hand = "log in once by hand (pkcs11-tool --login --list-objects), so that it counts anew";
                    return Err(self
                        .locked("allows only one more try before it locks its PIN")
                        .with_hint(self.pin.hint_after(by_hand))
                        .into());
                }
                session.raw().login_with_raw(UserType::User, &RawAuthPin::new(Box::new(pin.to_vec())))
            }
            None if info.is_some_and(TokenInfo::protected_authentication_path) => {
                session.raw().login(UserType::User, None)
            }
            None => {
                return Err(self
                    .locked("wants a PIN and none is configured")
                    .with_hint("put the PIN into a file of mode 0400 and add pin-source=file:/path to the URI")
                    .into());
            }
        };
        let Err(error) = outcome else {
            self.doubtful = None;
            refused_pins::forget(&token);
            return Ok(());
        };
        let pin = pin.as_ref().map(|pin| pin.as_slice());
        match return_value(&error) {
            Some(RvError::UserAlreadyLoggedIn) => Ok(()),
            Some(
                RvError::PinIncorrect
                | RvError::PinInvalid
                | RvError::PinLenRange
                | RvError::PinExpired
                | RvError::PinLocked,
            ) => {
                let refusal =
                    Refusal::new(stamp, pin, format!("refused the PIN: {}", describe(&error)), session.generation());
                let refused = self.refused_before(&refusal);
                // Without a file somebody types it, and may have mistyped it.
                if pin.is_some() {
                    refused_pins::remember(&token, refusal);
                }
                Err(refused.into())
            }
            // It said the contrary a moment ago, so it has read one half of that while another process was writing.
            // SoftHSM keeps to it until it is initialised anew. No PIN was tried: there was none to compare it with.
            Some(RvError::UserPinNotInitialized) if info.is_some_and(TokenInfo::user_pin_initialized) => {
                Err(Fault::Device(error))
            }
            Some(RvError::UserPinNotInitialized) => Err(self
                .locked("has no user PIN yet")
                .with_hint(self.pin.hint_after("initialise it: pkcs11-tool --init-pin"))
                .into()),
            Some(RvError::UserAnotherAlreadyLoggedIn | RvError::UserTooManyTypes) => Err(BackendError::new(
                BackendErrorKind::Unavailable,
                format!("{}: another kind of user is logged in: {}", self.name, describe(&error)),
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
            // A module may mean a wrong PIN by any other code.
            _ => {
                let logins = self.count_doubtful_login(session, &error, stamp);
                if logins < MAXIMUM_DOUBTFUL_LOGINS {
                    return Err(Fault::Device(error));
                }
                let answer = format!("refused the login without saying why: {}", describe(&error));
                let refusal = Refusal::new(stamp, pin, answer, session.generation());
                let refused = self.refused_before(&refusal);
                refused_pins::remember(&token, refusal);
                Err(refused.into())
            }
        }
    }

    /// The PIN was refused, and nothing has changed since.
    fn refused_before(&self, refusal: &Refusal) -> BackendError {
        self.locked(&format!("{}; the PIN is not tried again", refusal.answer)).with_hint(self.pin.retry_hint())
    }

    /// Not again at once after a login that failed without a reason: a new initialisation does not make another PIN of
    /// it. Another PIN in the file, or the same one written anew, is.
    fn wait_after_a_doubtful_login(&mut self, stamp: Option<Stamp>) -> Result<(), BackendError> {
        let Some(failed) = &self.doubtful else { return Ok(()) };
        if failed.stamp != stamp {
            self.doubtful = None;
            return Ok(());
        }
        if failed.last.elapsed() < self.interval {
            let detail = format!("{} refused the last login without saying why: {}", self.name, failed.answer);
            return Err(BackendError::new(BackendErrorKind::Unavailable, detail)
                .with_hint(format!("one more is tried in a moment; see the log of {}", self.module_path.display())));
        }
        Ok(())
    }

    /// The number of doubtful logins, this one included; the most there may be if the token says that it counted.
    fn count_doubtful_login(&mut self, session: &LoggedInSession, error: &Error, stamp: Option<Stamp>) -> u32 {
        let before = self.doubtful.as_ref().map_or(0, |failed| failed.number);
        // Asked anew: it may have been this very login.
        let was_counted = session
            .pkcs11()
            .get_token_info(session.slot())
            .is_ok_and(|info| info.user_pin_count_low() || info.user_pin_final_try() || info.user_pin_locked());
        let number = if was_counted { MAXIMUM_DOUBTFUL_LOGINS } else { before + 1 };
        self.doubtful = Some(DoubtfulLogins { last: Instant::now(), number, answer: describe(error), stamp });
        number
    }
}
