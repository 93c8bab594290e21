//! Keys in a PKCS#11 token: a smart card, a hardware security module, or software that behaves like one.
//!
//! The module (the vendor's shared object) is opened at run time; nothing of PKCS#11 is linked. Keys are generated in
//! the token, sensitive and never extractable, and what the token says of them afterwards is checked.
//!
//! - `uri`: which token, which module, which PIN: a `pkcs11:` URI (RFC 7512)
//! - `pin`: the PIN's file
//! - `login`: logging in, without spending the tries that the token allows
//! - `refused`: the PINs that were refused
//! - `module`: loading a module once in a process, and initialising it anew when its token went away
//! - `token`: a session that is logged in, however often the token is logged out, removed and put back
//! - `turn`: whose turn it is, of several processes that use a token at once
//! - `session`: what such a session was opened on, and whether it still sees everything
//! - `keys`: what a key pair is in a token
//! - `objects`: what its objects are called
//! - `generation`: how a new one is asked for
//! - `signature`: how a scheme becomes a mechanism
//! - `usage`: what is taken of the token's room
//! - `encoding`: what PKCS#11's attributes say of public keys and signatures
//! - `fault`: PKCS#11's return values, sorted by what to do next

mod encoding;
mod fault;
mod generation;
mod keys;
mod login;
mod module;
mod objects;
mod pin;
mod refused_pins;
mod session;
mod signature;
mod token;
mod turn;
mod uri;
mod usage;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};

use crate::fault::Fault;
use crate::objects::PrivateKey;
use crate::pin::{PinSource, credentials_directory};
use crate::token::Token;
use crate::uri::TokenUri;

/// Which token holds the keys, and how to log in to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// A `pkcs11:` URI (RFC 7512) that names one token by `token`, `serial`, `model`, `manufacturer` or `slot-id`, and
    /// may name the module by `module-path` and the PIN's file by `pin-source`. A PIN in the URI itself is refused.
    pub uri: String,
    /// The module's absolute path, if the URI does not say it.
    pub module: Option<PathBuf>,
    /// The PIN's file, if the URI does not say it. A relative path is a name in `$CREDENTIALS_DIRECTORY`, where
    /// systemd's `LoadCredential=` puts files.
    pub pin_file: Option<PathBuf>,
    /// The least time between two initialisations of a module whose token is gone.
    pub reload_interval: Duration,
}

impl Configuration {
    /// The least time between two initialisations, unless configured otherwise.
    pub const RELOAD_INTERVAL: Duration = Duration::from_secs(30);

    /// The token that `uri` names, with everything else as the URI says.
    pub fn new(uri: impl Into<String>) -> Self {
        Self { uri: uri.into(), module: None, pin_file: None, reload_interval: Self::RELOAD_INTERVAL }
    }

    /// The file that the PIN is read from, if there is one and the configuration makes sense.
    pub fn pin_path(&self) -> Option<PathBuf> {
        let path = self.pin_file.clone().or(TokenUri::parse(&self.uri).ok()?.pin_source)?;
        PinSource::new(Some(path), credentials_directory()).ok()?.path().map(Path::to_owned)
    }

    /// Whether the configuration makes sense, without a look at the module or the PIN. A credential's name does, even
    /// where there is no `$CREDENTIALS_DIRECTORY`: only the service has one.
    ///
    /// # Errors
    /// `Unsupported` if it makes none.
    pub fn check(&self) -> Result<(), BackendError> {
        let (_, _, pin) = self.parts()?;
        PinSource::new(pin, Some(credentials_directory().unwrap_or_else(|| "/run/credentials".into()))).map(drop)
    }

    /// The token, the path of its module, and the path or name of its PIN's file.
    fn parts(&self) -> Result<(TokenUri, PathBuf, Option<PathBuf>), BackendError> {
        let uri = TokenUri::parse(&self.uri)?;
        let module = match (self.module.clone(), uri.module_path.clone()) {
            (Some(_), Some(_)) => {
                return Err(misconfigured("the module is named twice, in the URI and beside it")
                    .with_hint("leave one of them out"));
            }
            (Some(path), None) | (None, Some(path)) => path,
            (None, None) => {
                return Err(misconfigured("no module is named")
                    .with_hint("set module = \"/usr/lib/…/module.so\" for the backend"));
            }
        };
        module::check_path(&module)?;
        let pin = match (self.pin_file.clone(), uri.pin_source.clone()) {
            (Some(_), Some(_)) => {
                return Err(misconfigured("the PIN's file is named twice, in the URI and beside it")
                    .with_hint("leave one of them out"));
            }
            (path, source) => path.or(source),
        };
        Ok((uri, module, pin))
    }
}

/// A token as a key backend.
///
/// # Guarantees
/// - A token that is absent, removed or logged out is `Unavailable`, never `NotFound`, and is used again as soon as it
///   is back, without a restart.
/// - A PIN that the token refused is not given to it again by this process, so a wrong PIN costs one try.
/// - A key is one private and one public object with the key's id as CKA_ID and `pintle ` and the id's text as
///   CKA_LABEL. Where the public one is gone the key still signs, and is not taken for lost. Objects of anybody else are neither listed nor touched.
pub struct Pkcs11Backend {
    token: Token,
}

impl Pkcs11Backend {
    /// A backend for the token that `configuration` names. The token need not be there yet, nor the module.
    ///
    /// # Errors
    /// `Unsupported` if the configuration makes no sense, or if somebody other than root or this process's own user
    /// could replace the module.
    pub fn open(configuration: Configuration) -> Result<Self, BackendError> {
        Ok(Self { token: Token::new(&configuration)? })
    }
}

impl KeyBackend for Pkcs11Backend {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        self.token.with_session(|session| keys::generate(session, id, algorithm))
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        self.token.with_session(|session| keys::existing(session, id).map(|pair| pair.public_key))
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.token.with_session(|session| {
            let PrivateKey { object, algorithm } = keys::private_key(session, id)?;
            if !algorithm.schemes().contains(&scheme) {
                let detail = format!("key {id} is {algorithm} and does not sign with {scheme:?}");
                return Err(BackendError::new(BackendErrorKind::Unsupported, detail).into());
            }
            signature::sign(session.raw(), object, scheme, message)
        })
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        self.token.with_session(|session| keys::delete(session, id))
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        self.token.with_session(keys::list)
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        let identity = self.token.with_session(|session| {
            session.found.remove(id);
            keys::private_key(session, id)?;
            Ok(session.identity().cloned())
        })?;
        Ok(KeyReference::Uri(self.token.uri().of_key(identity.as_ref(), id)))
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        self.token.with_session(usage::usage)
    }
}

/// What is wrong with a configuration.
fn misconfigured(detail: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, detail)
}

impl From<BackendError> for Fault {
    fn from(error: BackendError) -> Self {
        Self::Final(error)
    }
}
