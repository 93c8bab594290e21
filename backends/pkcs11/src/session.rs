//! A session on a token: what it was opened on, what it has found, and whether it still sees everything.

use std::collections::HashMap;

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState};
use cryptoki::slot::{Slot, TokenInfo};
use pintle_plugins_api::KeyId;

use crate::fault::Fault;
use crate::module::Initialization;
use crate::objects::PrivateKey;
use crate::turn::Turns;
use crate::uri::TokenIdentity;

/// A session on a token, logged in if the token wants that.
pub(crate) struct LoggedInSession {
    pkcs11: Pkcs11,
    raw: Session,
    slot: Slot,
    generation: u64,
    identity: Option<TokenIdentity>,
    login_required: bool,
    turns: Turns,
    /// The private keys found so far. Handles are good for as long as the session is.
    pub(crate) found: HashMap<KeyId, PrivateKey>,
}

impl LoggedInSession {
    /// Opens a session, which is yet to be logged in.
    pub(crate) fn open(
        initialization: &Initialization,
        slot: Slot,
        info: Option<&TokenInfo>,
        turns: Turns,
    ) -> Result<Self, Error> {
        let pkcs11 = initialization.pkcs11();
        Ok(Self {
            pkcs11: pkcs11.clone(),
            // Closed by hand: a handle of an earlier initialisation must not close somebody's session of this one.
            raw: pkcs11.open_rw_session_no_drop(slot)?,
            slot,
            generation: initialization.generation(),
            identity: info.map(identity),
            login_required: info.is_none_or(TokenInfo::login_required),
            turns,
            found: HashMap::new(),
        })
    }

    /// Closes it. To be called only while the initialisation holds that it was opened in.
    pub(crate) fn close(self) {
        let _ = self.raw.close();
    }

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

    /// The initialisation that it was opened in.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// What the token said of itself when the session was opened, if it could be read.
    pub(crate) fn identity(&self) -> Option<&TokenIdentity> {
        self.identity.as_ref()
    }

    /// Whether a login is wanted and has not taken place.
    pub(crate) fn wants_login(&self) -> Result<bool, Error> {
        if !self.login_required {
            return Ok(false);
        }
        let state = self.raw.get_session_info()?.session_state();
        Ok(!matches!(state, SessionState::RoUser | SessionState::RwUser))
    }

    /// Makes sure that an object which was not found is not there: private objects cannot be seen without a login
    /// (PKCS #11 v3.1, section 4.4), and of a token that was removed SoftHSM says that it holds nothing.
    pub(crate) fn confirm_absence(&self) -> Result<(), Fault> {
        use cryptoki::context::Function::{FindObjects, GetTokenInfo};
        if self.wants_login()? {
            return Err(Fault::Device(Error::Pkcs11(RvError::UserNotLoggedIn, FindObjects)));
        }
        if self.token_info()?.as_ref().map(identity) == self.identity {
            Ok(())
        } else {
            Err(Fault::busy(Error::Pkcs11(RvError::DeviceRemoved, GetTokenInfo)))
        }
    }

    /// What the token says of itself now, if it can be read.
    pub(crate) fn token_info(&self) -> Result<Option<TokenInfo>, Fault> {
        use cryptoki::context::Function::GetTokenInfo;
        // Not while somebody logs in.
        let _turn = self.turns.wait();
        match self.pkcs11.get_token_info(self.slot) {
            Ok(info) => Ok(Some(info)),
            // Whatever the code is: the token is not in a state to tell what it holds.
            Err(Error::Pkcs11(..)) => Err(Fault::busy(Error::Pkcs11(RvError::TokenNotPresent, GetTokenInfo))),
            Err(_) => Ok(None),
        }
    }
}

/// What a token says of itself. Some modules pad with NUL rather than with blanks.
pub(crate) fn identity(info: &TokenInfo) -> TokenIdentity {
    let trimmed = |text: &str| text.trim_end_matches(['\0', ' ']).to_owned();
    TokenIdentity {
        label: trimmed(info.label()),
        manufacturer: trimmed(info.manufacturer_id()),
        model: trimmed(info.model()),
        serial: trimmed(info.serial_number()),
    }
}
